"""Training that begins with the weights of a model."""

import json
import shutil

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.known_models import find_model
from kartina.pipeline.recipe import build
from kartina.pipeline.text_to_image import TextToImage
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training import __main__ as trainer
from kartina.training import run as runs
from kartina.training import state, warm_start
from kartina.training.checks import check, names_of, stage_of


def short(stage, argv, folder, *more):
    few = [f"stages.{stage}.{key}" for key in ("steps=2", "validate_samples=8", "validate_every=10")]
    return trainer.main([*argv, *few, *more, "--run", str(folder)])


def card(run):
    return checkpoint.read_card(run / "model")["parts"]


def test_captions_of_a_model_that_was_put_there_are_not_written_over(tiny, prepared, tmp_path, capsys):
    stage, argv = tiny["dalle"]
    assert short(stage, argv, prepared(tmp_path / "first", "dalle")) == 0
    shutil.copytree(tmp_path / "first" / "model", tmp_path / "second" / "model")
    captions = tmp_path / "second" / "model" / "captions.json"
    before = captions.read_bytes()
    assert short(stage, argv, tmp_path / "second", "training.data.levels=[S1]") == 2
    assert "is what the parts beside it read, and would be lost" in capsys.readouterr().err
    assert captions.read_bytes() == before
    assert short(stage, argv, tmp_path / "second") == 0 and captions.read_bytes() == before  # which makes the same


def test_every_stage_begins_with_the_weights_of_a_model(tiny_kind, tiny, prepared, tmp_path):
    stage, argv = tiny[tiny_kind]
    first, second = prepared(tmp_path / "first", tiny_kind), tmp_path / "second"
    assert short(stage, argv, first) == 0
    assert short(stage, argv, second, "training.seed=1", "--from", str(first)) == 0
    begun = state.load(state.path_of(second / "state" / stage, 0))["networks"][stage]
    old, new = card(first), card(second)
    own = [part for part, entry in old.items() if entry["identity"]["stage"] == stage]
    for part in own:
        for name, value in checkpoint.load_weights(first / "model", part).items():
            if not name.startswith("scale."):  # of the latents, which is measured at the end
                assert any(key.endswith(name) and torch.equal(held, value.to(held)) for key, held in begun.items()), (
                    name
                )
    assert stage in own and old.keys() == new.keys()
    assert {part for part in old if old[part]["hash"] != new[part]["hash"]} == set(own)
    assert new[stage]["identity"]["from"] == {part: old[part]["hash"] for part in own}
    started = json.loads((second / "log.jsonl").read_text().splitlines()[0])
    assert started["event"] == "started" and started["restart_step"] is None


def test_a_run_goes_on_only_with_the_model_that_it_began_with(tiny, trained_tokenizer, tmp_path, capsys):
    argv, other, run = tiny["patch_dvae"][1], tmp_path / "other", tmp_path / "run"
    assert short("tokenizer", argv, other, "training.seed=1") == 0
    assert short("tokenizer", argv, run, "--from", str(trained_tokenizer)) == 0
    digest = card(run)["tokenizer"]["hash"]
    assert short("tokenizer", argv, run, "--from", str(trained_tokenizer)) == 0
    assert "already trained" in capsys.readouterr().out and card(run)["tokenizer"]["hash"] == digest
    for model in (["--from", str(other)], []):  # once as a finished part, and once as a checkpoint
        assert short("tokenizer", argv, run, *model) == 2
        assert "from" in capsys.readouterr().err
    (run / "model" / "tokenizer.safetensors").unlink()
    for model in (["--from", str(other)], []):
        assert short("tokenizer", argv, run, *model) == 2
        assert "what this run began with changed (from" in capsys.readouterr().err
    assert short("tokenizer", argv, run, "--from", str(trained_tokenizer)) == 0
    assert card(run)["tokenizer"]["hash"] == digest


def test_the_stages_that_a_model_lacks_are_trained_after_it(tiny, trained_tokenizer, tmp_path, capsys):
    run = tmp_path / "run"
    assert short("tokenizer", tiny["patch_dvae"][1], run, "--from", str(trained_tokenizer)) == 0
    assert short("clip", tiny["clip"][1], run, "--from", str(trained_tokenizer)) == 2
    assert "has no clip to begin with, nor anything that it reads, it has tokenizer" in capsys.readouterr().err
    assert short("prior", tiny["dalle"][1], run) == 0
    assert card(run)["prior"]["identity"]["from"] is None


def test_a_prior_begins_anew_over_the_tokenizer_of_a_model(tiny, trained_tokenizer, tmp_path, capsys):
    """One that was converted, without captions, too; the same command goes on."""
    alone = tmp_path / "alone"
    shutil.copytree(trained_tokenizer / "model", alone)
    (alone / "captions.json").unlink(missing_ok=True)
    for _ in range(2):
        assert short("prior", tiny["dalle"][1], tmp_path / "run", "--from", str(alone)) == 0
    parts = card(tmp_path / "run")
    assert parts["tokenizer"] == card(trained_tokenizer)["tokenizer"] and parts["prior"]["identity"]["from"] == {}
    assert parts["prior"]["trained_against"]["tokenizer"] == parts["tokenizer"]["hash"]
    assert (tmp_path / "run" / "model" / "captions.json").is_file()
    other = tmp_path / "other"
    assert short("tokenizer", [*tiny["patch_dvae"][1], "training.seed=1"], other) == 0
    assert short("prior", tiny["dalle"][1], other, "--from", str(alone)) == 2
    assert f"has another tokenizer than {alone}" in capsys.readouterr().err


@pytest.fixture
def origin(tiny, tmp_path):
    """A recipe with its training half, and the folder of a model that has all its parts."""
    given = trainer._arguments(tiny["dalle"][1])
    recipe, training = runs.load(given.recipe, given.overrides)
    folder = tmp_path / "origin"
    folder.mkdir()
    CaptionTokenizer.train(["a red ring"], 300, 22).save(folder / "captions.json")
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "notice.txt").write_text("of the data")
    captions = {"captions": checkpoint.file_hash(folder / "captions.json")}
    tokenizer = checkpoint.save_part(folder, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    for part, against in (("clip", captions), ("prior", captions | {"tokenizer": tokenizer})):
        checkpoint.save_part(folder, recipe, part, checkpoint.export(build(recipe, part)), trained_against=against)
    return recipe, training, folder


TAKEN = {"prior": {"tokenizer", "clip"}, "tokenizer": {"clip"}, "clip": {"tokenizer", "prior"}}


@pytest.mark.parametrize("trained", TAKEN)
def test_parts_come_along_where_what_they_read_does(trained, origin, tmp_path):
    recipe, _, folder = origin
    warm_start.take_over(recipe, folder, tmp_path / "model", [trained])
    theirs = checkpoint.read_card(folder)["parts"]
    assert checkpoint.read_card(tmp_path / "model")["parts"] == {part: theirs[part] for part in TAKEN[trained]}
    for part in TAKEN[trained]:
        assert checkpoint.load_weights(tmp_path / "model", part)
    assert [notice.name for notice in (tmp_path / "model" / "LICENSES").iterdir()] == ["notice.txt"]


def test_what_the_folder_holds_stays_and_what_reads_another_is_left_behind(origin, tmp_path):
    recipe, _, folder = origin
    own = checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    warm_start.take_over(recipe, folder, tmp_path, [])
    parts = checkpoint.read_card(tmp_path)["parts"]
    assert parts.keys() == {"tokenizer", "clip"} and parts["tokenizer"]["hash"] == own


def test_a_prior_does_not_begin_on_codes_that_it_never_read(origin, tmp_path):
    recipe, training, folder = origin
    stages = {"prior": (stage_of(recipe, "prior"), training.stages["prior"])}
    weights = checkpoint.export(build(recipe, "tokenizer"))
    run = tmp_path / "run"
    checkpoint.save_part(run, recipe, "tokenizer", weights)
    with pytest.raises(ValueError, match="the prior of .* was trained against another tokenizer than that of"):
        warm_start.check(recipe, stages, folder, run)
    theirs = checkpoint.read_card(folder)["parts"]["tokenizer"]["hash"]
    checkpoint.save_part(run, recipe, "tokenizer", weights, identity={"from": {"tokenizer": theirs}})
    warm_start.check(recipe, stages, folder, run)  # it grew out of theirs


@pytest.mark.parametrize(
    ("overrides", "licence", "said"),
    [
        ([], "MIT", "write licence='Apache-2.0 AND MIT'"),
        ([], "Apache-2.0 AND MIT", "write licence='Apache-2.0 AND MIT'"),
        (["licence=Apache-2.0 AND MIT"], "MIT", ""),
        (["parts.clip.vision_heads=4"], "Apache-2.0", "its clip has vision_heads: 2, the recipe 4"),  # it comes along
        (["parts.prior.num_heads=4"], "Apache-2.0", "its prior has num_heads: 2, the recipe 4"),
        (["parts.prior.qk_norm=true"], "Apache-2.0", ""),  # as it is
        (["captions.context_length=30", "parts.prior.text_length=30"], "Apache-2.0", "its prior has text_length: 22"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(overrides, licence, said, origin, tiny, tmp_path):
    _, _, folder = origin
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"licence": licence}))
    recipe, training = runs.load("shapes/dalle", [*trainer._arguments(tiny["dalle"][1]).overrides, *overrides])
    stages = {"prior": (stage_of(recipe, "prior"), training.stages["prior"])}
    if not said:
        return warm_start.check(recipe, stages, folder, tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        warm_start.check(recipe, stages, folder, tmp_path / "run")


def test_what_cannot_be_is_refused_before_anything_is_written(tiny, trained_tokenizer, tmp_path, capsys):
    argv, run = tiny["patch_dvae"][1], tmp_path / "run"
    late = [*argv, "stages.tokenizer.objective.autoencoder=0.25"]
    for words, said in (
        ([*late, "--from", str(trained_tokenizer)], "codes would begin anew after that share"),
        (
            [*argv, "parts.tokenizer.depth=1", "--from", str(trained_tokenizer)],
            "its tokenizer has depth: 2, the recipe 1",
        ),
        ([*argv, "--from", str(run)], "not a model folder"),
        ([*argv, "captions.context_length=30", "--from", str(trained_tokenizer)], "its captions have vocab_size=300"),
    ):
        assert trainer.main([*words, "--run", str(run)]) == 2
        assert said in capsys.readouterr().err
    assert not (run / "model").exists()
    assert trainer.main([*argv, "--run", str(trained_tokenizer), "--from", str(trained_tokenizer)]) == 2
    assert "is what this run writes" in capsys.readouterr().err
    assert trainer.main([*argv, "--run", str(run), "--from", ""]) == 2
    assert "not a model folder" in capsys.readouterr().err


@pytest.mark.parametrize("trained", [["prior"], ["clip"], ["prior", "tokenizer"]])
def test_parts_that_never_read_each_other_are_refused_or_left(trained, origin, tmp_path):
    """Of a folder whose tokenizer, then whose captions, were exchanged."""
    recipe, training, folder = origin
    stages = {name: (stage_of(recipe, name), training.stages[name]) for name in trained}
    warm_start.check(recipe, stages, folder, tmp_path / "run")
    checkpoint.save_part(folder, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    assert "prior" not in warm_start.comes_along(recipe, folder, tmp_path / "run", trained)
    if "prior" in trained:
        with pytest.raises(ValueError, match="its prior was trained against another tokenizer than"):
            warm_start.check(recipe, stages, folder, tmp_path / "run")
    CaptionTokenizer.train(["a blue ring"], 300, 22).save(folder / "captions.json")
    assert "clip" not in warm_start.comes_along(recipe, folder, tmp_path / "run", trained)
    if "clip" in trained:
        with pytest.raises(ValueError, match="its clip was trained against another captions than"):
            warm_start.check(recipe, stages, folder, tmp_path / "run")


@pytest.mark.parametrize("part", ["prior", "clip"])  # which begins, and which comes along
def test_altered_weights_are_met_before_anything_trains(part, origin, tmp_path):
    recipe, training, folder = origin
    stages = {name: (stage_of(recipe, name), training.stages[name]) for name in ("tokenizer", "prior")}
    warm_start.check(recipe, stages, folder, tmp_path / "run")
    content = bytearray((folder / f"{part}.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / f"{part}.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="altered"):
        warm_start.check(recipe, stages, folder, tmp_path / "run")


def test_what_is_written_and_what_is_left_to_its_default_are_the_same_part(tiny, trained_tokenizer, tmp_path):
    """The tokenizer comes along; the same command again resumes, and the system paints."""
    run = tmp_path / "run"
    first = [*tiny["dalle"][1], "--run", str(run), "stages.prior.steps=2", "stages.prior.validate_samples=8"]
    assert short("prior", tiny["dalle"][1], tmp_path / "whole", "--stage", "tokenizer", "stages.tokenizer.steps=2") == 0
    assert short("prior", tiny["dalle"][1], tmp_path / "whole") == 0
    written = "parts.tokenizer={kind: patch_dvae, image_size: 32, num_codes: 32, patch: [2, 4], width: 8, channels: 16}"
    for _ in range(2):
        assert trainer.main([*first, written, "--from", str(tmp_path / "whole")]) == 0
    assert TextToImage.load(run / "model")("a red ring", seed=1)[0].image.size == (32, 32)


def test_a_licence_stays_with_what_is_trained_on(tiny, trained_tokenizer, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained_tokenizer, folder)
    card = json.loads((folder / "model" / "card.json").read_text())
    (folder / "model" / "card.json").write_text(json.dumps(card | {"licence": "Apache-2.0 AND MIT"}))
    assert short("prior", tiny["dalle"][1], folder) == 2
    assert "is under its licence (MIT), not named by the recipe" in capsys.readouterr().err
    assert short("prior", tiny["dalle"][1], folder, "licence=Apache-2.0 AND MIT") == 0


@pytest.mark.parametrize("stage", [None, "clip", "prior"])
def test_the_shipped_models_may_be_begun_with(stage, tmp_path):
    for name in ("shapes/dalle", "shapes/stable-diffusion"):
        recipe, training = runs.load(name, [])
        check(recipe, training, names_of(training, stage), 1, tmp_path / "model", find_model(name))


@pytest.fixture(scope="module")
def towered(tmp_path_factory):
    """A recipe whose U-Net reads CLIP's text tower, frozen; its training, and its model."""
    sizes = "text_vocab: 302, text_length: 14"
    clip = (
        f"clip: {{kind: clip, embed_dim: 8, image_size: 32, patch_size: 16, vision_width: 16, vision_depth: 1, {sizes},"
    )
    clip += " vision_heads: 2, text_width: 16, text_depth: 2, text_heads: 2}"
    text = f"text: {{kind: clip_text, {sizes}, width: 16, depth: 2, num_heads: 2, quick_gelu: false}}"
    unet = "prior: {kind: unet, in_channels: 3, width: 16, channel_mult: [1, 2], blocks_per_level: 1, attn_levels: [1],"
    unet += " mid_attention: false, context_dim: 16, norm_groups: 4}"
    step, run = "{steps: 2, global_batch: 4, optimizer: {lr: 0.001}}", tmp_path_factory.mktemp("towered")
    asked = [f"parts={{{clip}, {text}, {unet}}}", "captions={vocab_size: 300, context_length: 12}", "frozen=[text]"]
    asked += [f"training.stages={{clip: {step}, prior: {step}}}", "training.trackers=[]"]
    asked += [f"stages.{stage}.validate_samples=8" for stage in ("clip", "prior")]
    assert trainer.main(["shapes/ddpm", *asked, "--run", str(run)]) == 0
    return asked, run / "model"


@pytest.mark.parametrize("stage", [None, "clip", "prior"])
def test_a_system_with_a_frozen_tower_may_be_begun_with(stage, towered, tmp_path):
    recipe, training = runs.load("shapes/ddpm", towered[0])
    check(recipe, training, names_of(training, stage), 1, tmp_path / "model", towered[1])


def test_a_frozen_tower_may_train_along_from_a_model_on(towered, tmp_path):
    asked, folder = towered
    recipe, training = runs.load("shapes/ddpm", [*asked, "frozen=[]"])
    check(recipe, training, ["prior"], 1, tmp_path / "model", folder)
    assert warm_start.began_with(recipe, folder, ("prior", "text")).keys() == {"prior", "text"}


def test_a_part_that_came_along_is_trained_by_its_own_stage_later(tiny, trained_tokenizer, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(trained_tokenizer, whole)
    assert short("clip", tiny["clip"][1], whole) == 0
    assert short("tokenizer", tiny["patch_dvae"][1], run, "--from", str(whole)) == 0
    assert card(run)["clip"] == card(whole)["clip"]
    assert short("clip", tiny["clip"][1], run, "--from", str(whole)) == 0
    assert card(run)["clip"]["identity"]["from"] == {"clip": card(whole)["clip"]["hash"]}
    assert card(run)["clip"]["hash"] != card(whole)["clip"]["hash"]


@pytest.mark.parametrize("stage", ["prior", "clip"])
def test_of_a_system_with_a_frozen_tower_less_may_be_begun_with(stage, towered, tmp_path):
    """A recipe without CLIP takes the tower along; one without the tower takes no CLIP that gives it."""
    (asked, folder), other = towered, {"prior": "clip", "clip": "text"}[stage]
    recipe, training = runs.load("shapes/ddpm", asked)
    less = recipe.model_copy(update={"parts": {k: v for k, v in recipe.parts.items() if k != other}})
    less = less.model_copy(update={"frozen": tuple(part for part in less.frozen if part in less.parts)})
    if stage == "prior":
        check(less, training, ["prior"], 1, tmp_path / "model", folder)
        assert warm_start.comes_along(less, folder, tmp_path / "model", ["prior"]) == ["text"]
    else:
        assert warm_start.comes_along(less, folder, tmp_path / "model", ["prior"]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"stage": []},
        {"part": [1]},
        {"beside": [1]},
        {"from": "abc"},
        {"part": {"kind": "nope"}},
        {"part": {"kind": []}},
    ],
)
def test_a_card_of_nonsense_is_one_clear_error(wrong, origin, tmp_path):
    recipe, training, folder = origin
    entry = json.loads((folder / "card.json").read_text())
    entry["parts"]["prior"]["identity"] = wrong
    (folder / "card.json").write_text(json.dumps(entry))
    with pytest.raises(checkpoint.ModelError):
        check(recipe, training, ["prior"], 1, tmp_path / "run", folder)
