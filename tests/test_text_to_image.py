"""Painting: batches over prompts and candidates, ranking, and the same picture again from what its PNG carries."""

import fnmatch
import json
import shutil

import numpy as np
import pytest
import torch

from kartina.pipeline import checkpoint, images, known_models
from kartina.pipeline.recipe import Recipe, build
from kartina.pipeline.text_to_image import TextToImage, check_facts, metadata, repaint
from kartina.tokenizers.captions import CaptionTokenizer

CAPTIONS = {"vocab_size": 300, "context_length": 4}
PARTS = {
    "tokenizer": {"kind": "dvae", "image_size": 8, "num_codes": 16, "width": 8, "init_width": 8, "num_groups": 2}
    | {"blocks_per_group": 1},
    "prior": {"kind": "dalle", "text_vocab": 300, "text_length": 4, "num_codes": 16, "grid": [4, 4], "width": 16}
    | {"depth": 1, "num_heads": 2, "attention": "full"},
    "clip": {"kind": "clip", "embed_dim": 8, "image_size": 8, "patch_size": 4, "vision_width": 8, "vision_depth": 1}
    | {"vision_heads": 1, "text_vocab": 302, "text_length": 6, "text_width": 8, "text_depth": 1, "text_heads": 1},
}
PROMPTS, OTHER = ["a red dot", "два круга", "a blue ring"], "a cat"
STEPS = 16  # codes of a picture


def write_model(folder, parts, seed=0):
    recipe = Recipe(name="tests/tiny", paper="none", image_size=8, captions=CAPTIONS, parts=PARTS)
    folder.mkdir(parents=True, exist_ok=True)
    CaptionTokenizer.train([*PROMPTS, OTHER], 300, 4).save(folder / "captions.json")
    for k, part in enumerate(parts):
        torch.manual_seed(seed + k)
        module = build(recipe, part)
        for name, parameter in module.named_parameters():  # captions matter, yet no code is certain
            parameter.data.normal_(std=0.3 if name.startswith("image_head") else 1.0)
        checkpoint.save_part(folder, recipe, part, checkpoint.export(module, torch.float32))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model", PARTS)


@pytest.fixture(scope="module")
def system(folder):
    return TextToImage.load(folder)


def bits(paintings):
    return [(p.prompt, p.seed, p.image.tobytes()) for p in paintings]


def alike(first, second):
    """The same pictures in the same order, but for the rounding of another batch size."""
    same = [(p.prompt, p.seed) for p in first] == [(p.prompt, p.seed) for p in second]
    pixels = [np.stack([np.asarray(p.image, np.int64) for p in paintings]) for paintings in (first, second)]
    return same and np.abs(pixels[0] - pixels[1]).max() <= 1


def test_out_of_memory_halves_the_micro_batch_and_says_so(system, monkeypatch):
    """Every picture is painted, once, and as by the micro-batch that fits."""
    expected, paint, sizes = system(PROMPTS, seed=3, candidates=3, keep=3, micro_batch=2), system._paint, []

    def tight(rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return paint(rows, *rest)

    monkeypatch.setattr(system, "_paint", tight)
    with pytest.warns(UserWarning, match="out of memory with 4 pictures: going on with 2"):
        found = system(PROMPTS, seed=3, candidates=3, keep=3, micro_batch=8)
    assert sizes[:3] == [8, 4, 2] and [p.facts for p in found] == [p.facts for p in expected]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(found, expected, strict=True))
    monkeypatch.setattr(system, "_paint", lambda rows, *rest: tight([*rows, *rows, *rows], *rest))
    with pytest.raises(torch.OutOfMemoryError):
        system(PROMPTS[:1], micro_batch=1)


def test_a_run_folder_stands_for_its_model_folder(folder, system):
    assert TextToImage.load(folder.parent).model_hash == system.model_hash


def test_a_model_folder_comes_from_the_hub(folder, system, tmp_path, monkeypatch):
    """The stand-in keeps files as the hub's cache does: links of a snapshot to blobs, or files where it is told to."""
    import huggingface_hub

    stored = tmp_path / "repository"
    shutil.copytree(folder, stored)
    (stored / "LICENSES").mkdir()
    (stored / "LICENSES" / "art.txt").write_text("CC0")
    (stored / "last.safetensors").write_bytes(b"of a training")
    commit = "0123456789" * 4

    def fetch(name, allow_patterns, revision=None, local_dir=None):
        assert name == "someone/tiny" and revision in (None, commit)
        home = local_dir or tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
        for path in files(stored):
            inside = path.relative_to(stored)
            if any(fnmatch.fnmatch(str(inside), pattern) for pattern in allow_patterns):
                (home / inside).parent.mkdir(parents=True, exist_ok=True)
                if local_dir is None:
                    (home / inside).symlink_to(path)
                else:
                    shutil.copy(path, home / inside)
        return str(home)

    names = [str(path.relative_to(stored)) for path in files(stored)]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda _, name: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    again = TextToImage.load("hf-hub:someone/tiny")
    assert again.model_hash == system.model_hash and bits(again(PROMPTS[:1], seed=3)) == bits(
        system(PROMPTS[:1], seed=3)
    )
    copy = tmp_path / "home" / "kartina" / "someone" / "tiny"
    assert {str(path.relative_to(copy)) for path in files(tmp_path / "home")} == {*names} - {"last.safetensors"}


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 64])
def test_batches_change_neither_pictures_nor_their_order(system, micro_batch):
    together = system(PROMPTS, seed=3, candidates=3, keep=2, micro_batch=micro_batch)
    alone = [p for prompt in PROMPTS for p in system(prompt, seed=3, candidates=3, keep=2)]
    assert alike(together, alone)
    assert [p.prompt for p in together] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len({picture for _, _, picture in bits(together)}) == 6
    for first, second in zip(together[::2], together[1::2], strict=True):
        assert first.clip_score >= second.clip_score


def test_facts_say_batch_row_and_candidate(system):
    painted = system(PROMPTS, seed=3, candidates=3, keep=3, micro_batch=4)
    facts = sorted((p.facts for p in painted), key=lambda f: -f["micro_batch"])
    assert [f["micro_batch"] for f in facts] == [4] * 8 + [1]
    assert sorted(f["row"] for f in facts[:8]) == [0, 0, 1, 1, 2, 2, 3, 3] and facts[8]["row"] == 0
    assert all(p.seed == 3 + p.facts["candidate"] for p in painted)
    knobs = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    assert facts[0]["knobs"] == knobs and (facts[0]["device"], facts[0]["dtype"]) == ("cpu", "float32")


def test_a_model_paints_with_its_own_knobs_where_none_are_given(system, monkeypatch):
    monkeypatch.setattr(system, "recipe", system.recipe.model_copy(update={"sampling": {"guidance_scale": 2.0}}))
    own, given = system(PROMPTS), system(PROMPTS, guidance_scale=1, top_k=3)
    assert [p.facts["knobs"]["guidance_scale"] for p in (own[0], given[0])] == [2.0, 1.0]
    assert given[0].facts["knobs"]["top_k"] == 3 and bits(own) == bits(system(PROMPTS, guidance_scale=2))


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "guidance_scale": 2}])
def test_a_png_is_painted_again_bit_for_bit(system, tmp_path, knobs):
    path = tmp_path / "one.png"
    for painting in system(PROMPTS, seed=-5, candidates=3, keep=3, micro_batch=4, **knobs):
        images.save_png(painting.image, path, metadata(painting))
        again = repaint(system, images.read_metadata(path))
        assert bits([again]) == bits([painting]) and metadata(again) == metadata(painting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_see_its_batch(folder, dtype):
    system = TextToImage.load(folder, dtype=dtype)
    first = system(PROMPTS, seed=[1, 2, 3], micro_batch=3)
    second = system(PROMPTS[:2] + [OTHER], seed=[1, 2, 99], micro_batch=3)
    assert bits(first[:2]) == bits(second[:2])
    assert [p.clip_score for p in first[:2]] == [p.clip_score for p in second[:2]]
    assert first[0].facts["dtype"] == str(dtype).removeprefix("torch.")


def test_each_prompt_may_have_its_own_seed(system):
    own = system(PROMPTS, seed=[7, 100, -3], candidates=2, keep=2)
    assert sorted(p.seed for p in own) == [-3, -2, 7, 8, 100, 101]
    assert alike(own[2:4], system(PROMPTS[1], seed=np.int64(100), candidates=2, keep=2))


def test_progress_counts_the_steps_of_the_whole_call(system):
    calls = []
    system(PROMPTS, candidates=3, micro_batch=4, progress=lambda *call: calls.append(call))
    assert calls == [(done, 3 * STEPS) for done in range(1, 3 * STEPS + 1)]


ALTERED = [
    ("prompt", ""), ("prompt", 7), ("prompt", "\ud800"), ("seed", 1.0), ("seed", 2**63), ("seed", True),
    ("candidate", -1), ("model_hash", None), ("model_hash", "../x"), ("device", "meta"), ("device", "cuda:0;"),
    ("dtype", "int8"), ("dtype", ["float32"]), ("micro_batch", 0), ("micro_batch", 4097), ("micro_batch", "4"),
    ("micro_batch", 2.0), ("row", -1), ("row", 2), ("knobs", []), ("knobs", {"use_cache": False}),
    ("knobs", {"temperature": "1"}), ("knobs", {"temperature": float("nan")}), ("knobs", {"temperature": 10**400}),
    ("knobs", {"temperature": None}), ("knobs", {"top_k": 0}), ("knobs", {"top_k": 2**40}), ("knobs", {"top_p": 1.5}),
    ("knobs", {"guidance_scale": -1}), ("knobs", {"guidance_scale": True}),
    ("knobs", {"x" * 10**6: 1}), ("knobs", {"top_k": "x" * 10**6}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ALTERED)
def test_altered_facts_are_refused(system, name, value):
    facts = metadata(system(PROMPTS, micro_batch=2)[0])
    assert check_facts(facts)["row"] == 0
    with pytest.raises(ValueError, match=r"must|unknown key|knobs of painting: .*should be") as raised:
        repaint(system, facts | {name: value})
    assert len(str(raised.value)) < 400


def test_facts_of_a_grid_and_of_another_model_are_refused(system, tmp_path):
    painting = system(PROMPTS[0])[0]
    for facts in ({"paintings": [metadata(painting)]}, [], None):
        with pytest.raises(ValueError, match="not the facts of one painting"):
            repaint(system, facts)
    other = TextToImage.load(write_model(tmp_path / "model", ["tokenizer", "prior"], seed=9))
    with pytest.raises(ValueError, match="painted by the model"):
        repaint(other, metadata(painting))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batch": 0}, "micro_batch"),
        ({"micro_batch": 5000}, "micro_batch"),
        ({"seed": [1, 2]}, "one for each of the 3"),
        ({"seed": 2**63 - 1, "candidates": 2}, "64 bits"),
        ({"keep": 2}, "keep"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
    ],
)
def test_numbers_out_of_range_are_refused(system, arguments, message):
    with pytest.raises(ValueError, match=message):
        system(PROMPTS, **arguments)


class Darkest:
    """Prefers dark pictures and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, images, captions):
        self.asked += captions
        return torch.tensor([-float(np.asarray(image).mean()) for image in images])


def test_a_reranker_takes_the_place_of_the_own_clip(folder, tmp_path):
    own = write_model(tmp_path / "model", PARTS)
    (own / "clip.safetensors").write_bytes(b"damaged")  # it is not even read
    scorer = Darkest()
    system = TextToImage.load(own, reranker=scorer)
    assert set(system.parts) == {"tokenizer", "prior"}
    ranked = system(PROMPTS[:2], candidates=4, keep=4, micro_batch=3)
    light = [np.asarray(p.image).mean() for p in ranked]
    assert light[:4] == sorted(light[:4]) and light[4:] == sorted(light[4:])
    assert [p.clip_score for p in ranked] == pytest.approx([-value for value in light], rel=1e-6)
    assert scorer.asked == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    with pytest.raises(checkpoint.ModelError, match="not a whole safetensors"):
        TextToImage.load(own)


def test_without_a_clip_nothing_is_ranked(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "model", ["tokenizer", "prior"]))
    painted = system(PROMPTS[:2], candidates=2, keep=2)
    assert [p.facts["candidate"] for p in painted] == [0, 1, 0, 1] and painted[0].clip_score is None
    assert metadata(repaint(system, metadata(painted[3]))) == metadata(painted[3])
    with pytest.raises(ValueError, match="no trained CLIP"):
        system(PROMPTS, candidates=2)


def test_one_unreadable_card_does_not_hide_the_other_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known_models, "SHIPPED", tmp_path / "none")
    good = write_model(tmp_path / "runs" / "good" / "model", ["tokenizer", "prior"])
    bad = tmp_path / "runs" / "bad" / "model"
    bad.mkdir(parents=True)
    (bad / "card.json").write_text("{")
    with pytest.warns(UserWarning, match="runs/bad/model is left out"):
        assert [path.resolve() for path in known_models.known_models().values()] == [good]
        assert known_models.find_by_hash(TextToImage.load(good).model_hash).resolve() == good
    with pytest.raises(checkpoint.ModelError, match="not readable as JSON"):
        TextToImage.load("runs/bad/model")


def test_a_recipe_that_builds_another_part_is_refused(folder, tmp_path):
    """Another number of heads fits the same weights, and would paint something else without a word."""
    copy = shutil.copytree(folder, tmp_path / "model")
    recipe, weights = checkpoint.load_recipe(copy), checkpoint.load_weights(copy, "prior")
    checkpoint.save_part(copy, recipe, "prior", weights, identity={"part": PARTS["prior"] | {"num_heads": 4}})
    with pytest.raises(checkpoint.ModelError, match="builds another prior than was trained"):
        TextToImage.load(copy)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [("prior", {"num_codes": 17}, "the tokenizer reads"), ("clip", {"image_size": 4}, "4 px")],
)
def test_parts_of_two_systems_are_refused(folder, tmp_path, part, change, said):
    copy = shutil.copytree(folder, tmp_path / "model")
    parts = PARTS | {part: PARTS[part] | change}
    recipe = Recipe(name="tests/tiny", paper="none", image_size=8, captions=CAPTIONS, parts=parts)
    checkpoint.save_part(copy, recipe, part, checkpoint.export(build(recipe, part), torch.float32))
    with pytest.raises(checkpoint.ModelError, match=said):
        TextToImage.load(copy)


def test_a_models_hash_tells_apart_all_that_paints_otherwise(folder, tmp_path, monkeypatch):
    """The same weights with other captions, noise or section of a part are another model, and each is found again."""
    recipe, captions = checkpoint.load_recipe(folder), CaptionTokenizer.load(folder / "captions.json")
    hashes = checkpoint.hashes(checkpoint.read_card(folder), recipe)
    own = known_models.model_hash(recipe, hashes, captions)
    assert own == TextToImage.load(folder).model_hash
    noise = recipe.diffusion.model_copy(update={"prediction": "v"})
    parts = recipe.parts | {"prior": recipe.parts["prior"] | {"num_heads": 4}}
    others = [
        known_models.model_hash(recipe.model_copy(update={"diffusion": noise}), hashes, captions),
        known_models.model_hash(recipe.model_copy(update={"parts": parts}), hashes, captions),
        known_models.model_hash(recipe, hashes | {"prior": "0" * 64}, captions),
        known_models.model_hash(recipe, hashes, None),
    ]
    assert len({own, *others}) == 5
    written = noise.model_copy(update={"prediction": "eps", "beta_start": 1e-4, "beta_end": 0.02})
    assert known_models.model_hash(recipe.model_copy(update={"diffusion": written}), hashes, captions) == own
    twin = shutil.copytree(folder, tmp_path / "twin")
    text = (twin / "recipe.yaml").read_text()
    assert "prediction: eps" in text
    (twin / "recipe.yaml").write_text(text.replace("prediction: eps", "prediction: v"))
    monkeypatch.setattr(known_models, "known_models", lambda: {"twin": twin, "own": folder})
    assert known_models.find_by_hash(own) == folder
    (twin / "captions.json").write_text("{")  # one that cannot be loaded is passed over
    assert known_models.find_by_hash(own) == folder


def test_a_deeply_nested_card_is_one_clear_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "card.json").write_text("[" * 100_000)
    with pytest.raises(checkpoint.ModelError, match="not readable as JSON"):
        TextToImage.load(copy)


def test_an_identity_that_is_no_table_is_one_clear_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    card = json.loads((copy / "card.json").read_text())
    card["parts"]["prior"]["identity"] = None
    (copy / "card.json").write_text(json.dumps(card))
    with pytest.raises(checkpoint.ModelError, match="expected format"):
        TextToImage.load(copy)


def test_half_a_character_is_no_prompt(system):
    with pytest.raises(ValueError, match="not Unicode"):
        system("a red \udce9")
