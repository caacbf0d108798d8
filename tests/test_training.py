"""The spine, tiny and whole: three stages train, resume bit for bit, export, and paint."""

import gc
import json
import shutil
import weakref

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.images import read_metadata, to_pil
from kartina.pipeline.known_models import SHIPPED
from kartina.pipeline.text_to_image import TextToImage
from kartina.training import __main__ as trainer
from kartina.training import loop, state
from kartina.training import run as runs
from kartina.training.data.shapes import ShapesSource
from kartina.training.run import Data
from kartina.training.stages import STAGES

TINY = [
    "captions.vocab_size=300",
    "captions.context_length=22",
    "parts.tokenizer.width=8",
    "parts.tokenizer.num_codes=32",
    *[f"parts.prior.{key}" for key in ("num_codes=32", "text_vocab=300", "width=32", "depth=2", "num_heads=2")],
    "parts.prior.attention=full",
    *[f"parts.clip.{key}" for key in ("text_vocab=302", "vision_depth=1", "text_depth=1")],
    "training.precision=fp32",
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "prior", "clip") for key in ("steps=4", "global_batch=4")],
    *[f"stages.{stage}.log_every=1" for stage in ("tokenizer", "prior", "clip")],
    *[f"stages.{stage}.validate_samples=8" for stage in ("tokenizer", "prior", "clip")],
]
DVAE = """parts.tokenizer={kind: dvae, image_size: 32, num_codes: 32, width: 8, init_width: 8, num_groups: 2,
    blocks_per_group: 1, branch_gain: 1.0}"""


def test_codes_of_patches_need_no_autoencoder_and_others_have_no_evenness(tmp_path, capsys):
    command = ["shapes/dalle", *TINY, "stages.tokenizer.objective.autoencoder=0.25", "--run", str(tmp_path)]
    assert trainer.main(command) == 2
    assert "codes of patches start from k-means" in capsys.readouterr().err
    assert trainer.main(["shapes/dalle", *TINY, DVAE, "--stage", "tokenizer", "--run", str(tmp_path)]) == 2
    assert "evenness is of codes that are patches" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_and_kept(tmp_path_factory):
    """The run folder, and of each parameter of a stage whether it was there when a later one began."""
    real, seen, kept, folder = loop.train_stage, [], [], tmp_path_factory.mktemp("run")

    def train_stage(identity, stage, *rest):
        gc.collect()
        kept.extend(one() is not None for one in seen)
        seen.extend(weakref.ref(parameter) for parameter in stage.network.parameters())
        return real(identity, stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_stage", train_stage)
        assert trainer.main(["shapes/dalle", *TINY, "--run", str(folder)]) == 0
    return folder, kept


@pytest.fixture
def run(run_and_kept):
    return run_and_kept[0]


def test_every_stage_is_exported_with_what_it_was_trained_against(run):
    parts = checkpoint.read_card(run / "model")["parts"]
    assert set(parts) == {"tokenizer", "prior", "clip"}
    assert parts["prior"]["trained_against"]["tokenizer"] == parts["tokenizer"]["hash"]
    read = {part: parts[part]["identity"]["data"] for part in parts}
    assert read["tokenizer"] == read["prior"] == "shapes train 32 px, ('S1', 'S2'), ('en', 'ru'), 0.0, 0"
    assert read["clip"] == "shapes train 32 px, ('S1', 'S2', 'S2', 'S2'), ('en', 'ru'), 0.0, 0, groups of 4"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "prior/image_loss" in line] == [1, 2, 3, 4]
    headlines = {"tokenizer": "psnr", "prior": "nats_per_code", "clip": "accuracy"}
    for stage, headline in headlines.items():
        assert [line["step"] for line in lines if line["stage"] == stage and f"valid/{headline}" in line] == [4]
    assert (run / "previews" / "prior-000004.png").stat().st_size > 0


def test_the_same_command_again_changes_nothing(run):
    before = checkpoint.read_card(run / "model")
    assert trainer.main(["shapes/dalle", *TINY, "--run", str(run)]) == 0
    assert checkpoint.read_card(run / "model") == before


def test_a_candidate_does_not_depend_on_how_many_are_painted(run):
    model = TextToImage.load(run / "model")
    many = model("a small red ring on a blue background", seed=3, candidates=4, keep=4)
    alone = model("a small red ring on a blue background", seed=5)[0]
    same = next(p for p in many if p.seed == 5)
    assert same.image.tobytes() == alone.image.tobytes()
    scores = [p.clip_score for p in many]
    assert scores == sorted(scores, reverse=True)


def test_a_preview_is_what_users_paint(tiny, trained_tokenizer, monkeypatch):
    given = trainer._arguments([*tiny["dalle"][1], "sampling={temperature: 0.5, guidance_scale: 3.0}"])
    recipe, training = runs.load(given.recipe, given.overrides)
    source, folder, shown = ShapesSource(levels=("S1",)), trained_tokenizer / "model", []
    stage = STAGES["dalle"](recipe, training.stages["prior"], source, folder, 0, torch.device("cpu"))
    batch = source.read(range(4))
    monkeypatch.setattr("kartina.training.stages.dalle.contact_sheet", lambda images, words: shown.append(images))
    stage.preview(batch)
    system = TextToImage(recipe, {"prior": stage.network.eval(), "tokenizer": stage.tokenizer}, stage.captions, "")
    painted = system(batch.captions, seed=[0, 1, 2, 3])
    assert [picture.tobytes() for picture in to_pil(shown[0])] == [painting.image.tobytes() for painting in painted]


def test_a_part_trained_against_another_tokenizer_is_refused(run, tmp_path):
    copy = shutil.copytree(run / "model", tmp_path / "model")
    card = checkpoint.read_card(copy)
    weights = checkpoint.load_weights(copy, "tokenizer")
    changed = {name: value + 1 for name, value in weights.items()}
    checkpoint.save_part(copy, checkpoint.load_recipe(copy), "tokenizer", changed)
    assert checkpoint.read_card(copy)["parts"]["prior"] == card["parts"]["prior"]
    with pytest.raises(checkpoint.ModelError, match="trained against another tokenizer"):
        TextToImage.load(copy)


@pytest.mark.parametrize(  # codes from k-means: at the start, never, before and after the stop
    ("kind", "autoencoder"), [("patch_dvae", 0), ("dvae", 0), ("dvae", 0.25), ("dvae", 0.75)]
)
def test_stopped_and_resumed_equals_uninterrupted(kind, autoencoder, tmp_path, monkeypatch):
    """4 steps == 2 + stop + resume + 2, bit for bit, in weights, averages and optimizer."""
    real = loop.rate

    def stop_at_two(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(loop, "rate", stop_at_two)
    command = ["shapes/dalle", *TINY, "stages.tokenizer.save_minutes=1e-9", "--stage", "tokenizer", "--run"]
    command[1:1] = ["stages.tokenizer.optimizer.muon=0.02"]
    command[1:1] = [f"stages.tokenizer.objective.autoencoder={autoencoder}"]
    if kind == "dvae":
        command[1:1] = [DVAE, "stages.tokenizer.objective.evenness=0"]
    with pytest.raises(KeyboardInterrupt):
        trainer.main([*command, str(tmp_path / "stopped")])
    monkeypatch.setattr(loop, "rate", real)
    assert state.load(state.newest(tmp_path / "stopped" / "state" / "tokenizer"))["step"] == 2
    assert trainer.main([*command, str(tmp_path / "stopped")]) == 0
    assert trainer.main([*command, str(tmp_path / "whole")]) == 0
    resumed, whole = (
        state.load(state.newest(tmp_path / name / "state" / "tokenizer")) for name in ("stopped", "whole")
    )
    for name, value in whole["networks"]["tokenizer"].items():
        assert torch.equal(resumed["networks"]["tokenizer"][name], value), name
    for name, value in whole["ema"].items():
        assert value == resumed["ema"][name] if name == "updates" else torch.equal(resumed["ema"][name], value)
    cards = [checkpoint.read_card(tmp_path / n / "model")["parts"]["tokenizer"]["hash"] for n in ("stopped", "whole")]
    assert cards[0] == cards[1]


def test_accumulation_gives_the_same_gradient(tmp_path):
    """1 x 4 and 2 passes x 2 log the same losses and end with the same weights."""
    command = ["shapes/dalle", *TINY, "--stage", "tokenizer", "--run"]
    trainer.main([*command, str(tmp_path / "one")])
    trainer.main([*command, str(tmp_path / "two"), "stages.tokenizer.micro_batch=2"])
    one, two = (
        state.load(state.newest(tmp_path / name / "state" / "tokenizer"))["networks"]["tokenizer"]
        for name in ("one", "two")
    )
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-4), name


def test_a_part_trained_with_another_recipe_is_not_reused(run, capsys):
    assert trainer.main(["shapes/dalle", *TINY, "stages.tokenizer.steps=9", "--run", str(run)]) == 2
    assert "with another recipe or other data (differs in steps: 4 -> 9); put back" in capsys.readouterr().err


def test_swapped_captions_are_refused(run, tmp_path):
    copy = shutil.copytree(run / "model", tmp_path / "model")
    (copy / "captions.json").write_text((copy / "captions.json").read_text() + " ")
    with pytest.raises(checkpoint.ModelError, match="trained against another captions"):
        TextToImage.load(copy)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.prior.objective.caption_drp=0.9", "did you mean 'caption_drop'"),
        ("stages.clip.micro_batch=2", "cannot be read in 2 passes"),
        ("stages.clip.levels=[S4]", "shapes has the levels"),
        ("stages.clip.objective.wrong_captions=0.5", "wrong_captions must be a whole number, got 0.5"),
        ("stages.clip.objective.canonical=22", "must lie between 0 and 1, got 22"),
    ],
)
def test_what_a_late_stage_cannot_do_is_refused_at_once(tmp_path, capsys, override, message):
    assert trainer.main(["shapes/dalle", *TINY, override, "--run", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_wrong_captions_of_shards_are_refused_at_once(tmp_path, capsys):
    data = ["training.data.kind=shards", f"training.data.shards={tmp_path}"]
    assert trainer.main(["shapes/dalle", *TINY, *data, "--run", str(tmp_path / "run")]) == 2
    assert "needs captions of a known grammar" in capsys.readouterr().err


def test_a_changed_recipe_is_refused_with_the_differing_key(run, capsys):
    (run / "model" / "card.json").rename(run / "card.json")
    try:
        assert trainer.main(["shapes/dalle", *TINY, "stages.tokenizer.steps=9", "--run", str(run)]) == 2
    finally:
        (run / "card.json").rename(run / "model" / "card.json")
    assert "what this run began with changed (steps: 4 -> 9)" in capsys.readouterr().err


def test_painting_from_the_command_line(run, tmp_path, capsys):
    from typer.testing import CliRunner

    from kartina import cli

    out = tmp_path / "ring.png"
    arguments = ["paint", "a small red ring on a blue background", "--model", str(run / "model"), "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    facts = read_metadata(out)
    assert facts["prompt"] == "a small red ring on a blue background" and facts["seed"] == 0
    assert len(facts["model_hash"]) == 64


@pytest.mark.parametrize("prompts", [[""], ["  "], []])
def test_empty_prompts_are_refused(run, prompts):
    with pytest.raises(ValueError, match="prompt is empty"):
        TextToImage.load(run / "model")(prompts)


def test_unknown_model_is_named():
    with pytest.raises(checkpoint.ModelError, match="no model 'shapes/none'"):
        TextToImage.load("shapes/none")


def test_a_changed_section_of_a_trained_part_is_refused(run, capsys):
    """Equal shapes, another function: the weights would load and mean something else."""
    command = ["shapes/dalle", *TINY, "--stage", "clip", "--run", str(run)]
    assert trainer.main([*command, "parts.prior.shift=[1]"]) == 2
    assert "the trained prior was built otherwise than parts.prior" in capsys.readouterr().err


def test_another_caption_tokenizer_is_not_reused(run, capsys):
    command = ["shapes/dalle", *TINY, "--run", str(run), "training.data.seed=1"]
    assert trainer.main(command) == 2
    assert "put back what it began with" in (said := capsys.readouterr().err)
    assert "caption tokenizer was trained with another recipe or other data (differs in data" in said


def test_notices_of_the_data_go_to_the_model(tmp_path):
    (tmp_path / "data" / "LICENSES").mkdir(parents=True)
    (tmp_path / "data" / "LICENSES" / "art.txt").write_text("of the art")
    data = Data(kind="shards", shards=str(tmp_path / "data"))
    trainer._carry_notices(data, tmp_path / "model")
    assert (tmp_path / "model" / "LICENSES" / "art.txt").read_text() == "of the art"


def test_a_run_folder_has_one_trainer(tmp_path, capsys):
    with runs.locked(tmp_path):
        assert trainer.main(["shapes/dalle", *TINY, "--run", str(tmp_path)]) == 2
    assert "in use by another trainer" in capsys.readouterr().err


def test_clip_reads_captions_in_their_canonical_wording_first_and_less_and_less():
    objective = "stages.clip.objective={wrong_captions: 2, canonical: 0.25, canonical_end: 0.75}"
    recipe, training = runs.load("shapes/dalle", ["stages.clip.steps=8", objective])
    source = ShapesSource(levels=("S2",))
    stage = STAGES["clip"](recipe, training.stages["clip"], source, SHIPPED / "shapes/dalle", 0, torch.device("cpu"))
    read, encode = [], stage.captions.encode
    stage.captions.encode = lambda captions: (read.append(list(captions)), encode(captions))[1]
    batch = source.read(range(64))
    for step in range(8):
        next(stage.updates(batch, step))
    wrong = source.wrong(batch.captions, batch.samples.tolist())
    early, late = ([*batch.captions, *(text for texts in wrong for text in texts[:count])] for count in (1, 2))
    assert read[0] == read[1] == read[2] == [source.canonical(text) for text in early] != early
    assert read[6] == read[7] == late
    for step, share in ((3, 0.75), (4, 0.5), (5, 0.25)):
        told = []
        for i, own in enumerate(batch.captions):
            mine = slice(64 + 2 * i, 66 + 2 * i)
            plain = [own, *late[mine]]
            found, rewritten = [read[step][i], *read[step][mine]], [source.canonical(text) for text in plain]
            assert found in (plain, rewritten)
            told += [found == rewritten] if plain != rewritten else []
        assert abs(sum(told) / len(told) - share) < 0.2


SHORT = ["shapes/dalle", *TINY, "--stage", "tokenizer"]


def test_more_steps_go_on_where_the_run_ended_and_other_changes_do_not(tmp_path, capsys):
    """--extend names more steps; the part is exported anew, and what was trained against the old one is found out."""
    command = [*SHORT, "--run", str(tmp_path)]
    assert trainer.main(command) == 0
    before = checkpoint.read_card(tmp_path / "model")["parts"]["tokenizer"]["hash"]
    assert trainer.main([*command, "--extend", "tokenizer=6"]) == 0
    saved = state.load(state.newest(tmp_path / "state" / "tokenizer"))
    assert saved["step"] == saved["at"] == 6
    assert checkpoint.read_card(tmp_path / "model")["parts"]["tokenizer"]["hash"] != before
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "tokenizer/nll" in line] == [1, 2, 3, 4, 5, 6]
    assert trainer.main([*command, "--extend", "tokenizer=6"]) == 0  # done already
    for wish, message in (("tokenizer=3", "more steps"), ("prior", "STAGE=STEPS"), ("pior=9", "STAGE=STEPS")):
        assert trainer.main([*command, "--extend", wish]) == 2
        assert message in capsys.readouterr().err
    assert trainer.main([*command, "--extend", "tokenizer=8", "stages.tokenizer.optimizer.lr=0.1"]) == 2
    assert "(differs in optimizer.lr: 0.002 -> 0.1)" in capsys.readouterr().err


def test_the_best_checkpoint_is_kept_and_may_be_what_is_exported(tmp_path, monkeypatch, capsys):
    """The headline metric of step 2 is made the best; rotation spares it, and `export: best` takes its weights."""
    real, measured = loop.exchange.validate, iter([10.0, 30.0, 20.0, 25.0])
    monkeypatch.setattr(loop.exchange, "validate", lambda *rest: (real(*rest)[0] | {"psnr": next(measured)}, {}))
    often = [f"stages.tokenizer.{key}=1" for key in ("validate_every", "save_every", "keep")]
    assert trainer.main([*SHORT, *often, "stages.tokenizer.export=best", "--run", str(tmp_path)]) == 0
    folder = tmp_path / "state" / "tokenizer"
    assert [path.name for path in state.complete(folder)] == ["step-00000002", "step-00000004"]
    best, last = (state.load(path)["ema"] for path in state.complete(folder))
    exported = checkpoint.load_weights(tmp_path / "model", "tokenizer")
    assert all(torch.equal(best[f"average.{name}"].to(value.dtype), value) for name, value in exported.items())
    assert not all(torch.equal(last[f"average.{name}"].to(value.dtype), value) for name, value in exported.items())
    assert state.load(state.newest(folder))["best"] == (30.0, 2, 2)
    shutil.rmtree(tmp_path / "model")  # as if nothing had been exported, since the best one is damaged
    (folder / "step-00000002" / "state.pt").write_bytes(b"damaged")
    command = [*SHORT, *often, "--run", str(tmp_path)]
    assert trainer.main([*command, "stages.tokenizer.export=best"]) == 2
    assert "leave out stages.*.export=best to take the last" in capsys.readouterr().err
    assert trainer.main(command) == 0
    exported = checkpoint.load_weights(tmp_path / "model", "tokenizer")
    assert all(torch.equal(last[f"average.{name}"].to(value.dtype), value) for name, value in exported.items())


def test_what_a_stage_trained_is_not_kept_for_the_next_one(run_and_kept):
    _, kept = run_and_kept
    assert len(kept) > 10 and not any(kept)


def test_tensorboard_has_the_scalars_and_a_missing_tracker_is_refused_at_once(tmp_path, capsys, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert trainer.main([*SHORT, "training.trackers=[tensorboard]", "--run", str(tmp_path)]) == 0
    events = reader.EventAccumulator(str(tmp_path / "tensorboard" / "tokenizer")).Reload()
    assert [event.step for event in events.Scalars("tokenizer/nll")] == [1, 2, 3, 4]
    monkeypatch.setattr("kartina.training.log._is_installed", lambda name: False)
    assert trainer.main([*SHORT, "training.trackers=[trackio]", "--run", str(tmp_path / "other")]) == 2
    assert "training.trackers names trackio, which is not installed" in capsys.readouterr().err
