"""The shapes suite: perfect pictures score 1, wrong ones 0 and say why, and the statistics are the known ones."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import Recipe, build
from kartina.pipeline.text_to_image import Painting, TextToImage
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.tokenizers.spec import CodesSpec
from kartina.training.data.shapes import ShapesSource
from kartina.training.data.shapes_captions import canonical, caption, parse_caption, wrong_captions
from kartina.training.data.shapes_scenes import place, render
from kartina.training.data.shapes_splits import TEST_COUNTS, TESTS, test_captions
from kartina.training.evaluation import shapes_suite as suite
from kartina.training.evaluation.statistics import mcnemar, mean_rate, rate

CAPTIONS = CaptionTokenizer.train([caption(f, t) for f in test_captions("S2none")[:200] for t in ("en", "ru")], 512, 64)


class Painter:
    """A system that draws what it is told: `draw` turns (facts, language, candidate) into the facts to show."""

    scorer = object()

    def __init__(self, draw=lambda facts, language, candidate: facts):
        self.draw, self.asked = draw, []

    def __call__(self, prompts, seed, candidates, keep, **knobs):
        assert keep == candidates and len(seed) == len(prompts)
        self.asked += zip(prompts, seed, strict=True)
        painted = []
        for prompt, first in zip(prompts, seed, strict=True):
            facts, language = parse_caption(prompt), "en" if prompt.isascii() else "ru"
            for k in reversed(range(candidates)):  # the last candidate ranks first
                shown = self.draw(facts, language, k)
                draws = np.random.default_rng(first + k).uniform(size=(1, 6))
                pixels = (render(place(shown.row()[None], draws))[0] * 255 + 0.5).astype(np.uint8)
                common = {"model": "tests/painter", "model_hash": "0" * 64, "device": "cpu", "dtype": "float32"}
                painted.append(
                    Painting(Image.fromarray(pixels), prompt, first + k, 0.0, common | {"knobs": knobs, "candidate": k})
                )
        return painted


def wrong(kind, facts):
    return wrong_captions(facts, np.random.default_rng(0))[kind]


def test_exact_pictures_score_one():
    calls = []
    result = suite.evaluate(Painter(), per_test=70, candidates=2, progress=lambda *call: calls.append(call))
    assert list(result["tests"]) == list(TESTS) and calls[-1] == (350, 350) and len(calls) == 10
    for columns in result["tests"].values():
        assert set(columns) == {"one_sample", "best_of_n"}
        for tally in columns.values():
            assert (tally["n"], tally["accepted"], tally["rate"]) == (70, 70, 1.0)
            assert set(tally["failures"].values()) == {0}
            assert [tally["languages"][name]["accepted"] for name in ("en", "ru")] == [35, 35]
    assert result["S2"]["one_sample"]["rate"] == 1.0 and result["S2"]["one_sample"]["interval"][0] < 1
    assert result["ranking"] == {"n": 210, "gained": 0, "lost": 0, "p": 1.0, "errors_removed": None}
    assert suite.headline(result) == dict.fromkeys(
        [f"{test}{end}" for end in ("", " best of 2") for test in (*TESTS, "S2")], 1.0
    )


def test_wrong_pictures_score_zero_and_say_why():
    kinds = {"background": "background", "one colour": "colour", "one shape": "shape", "one size": "size"}
    kinds |= {"opposite relation": "relation", "drop an object": "count"}
    for kind, failure in kinds.items():
        painter = Painter(lambda facts, language, k, kind=kind: wrong(kind, facts))
        tally = suite.evaluate(painter, tests=["S2b"], per_test=10)["tests"]["S2b"]["one_sample"]
        assert tally["accepted"] == 0 and tally["rate"] == 0.0
        assert tally["failures"][failure] == 10, kind
        assert tally["languages"]["ru"]["failures"][failure] == 5


def test_ranking_is_compared_pair_by_pair():
    """Candidate 0 is wrong in Russian; the one ranked first never is."""
    painter = Painter(lambda f, language, k: wrong("background", f) if language == "ru" and k == 0 else f)
    result = suite.evaluate(painter, tests=suite.HELD_OUT, per_test=8, candidates=3, temperature=0.5)
    one, best = (result["tests"]["S2a"][column] for column in ("one_sample", "best_of_n"))
    assert (one["rate"], best["rate"]) == (0.5, 1.0)
    assert one["languages"]["en"]["rate"] == 1.0 and one["languages"]["ru"]["rate"] == 0.0
    assert result["ranking"] == {"n": 24, "gained": 12, "lost": 0, "p": 2 * 0.5**12, "errors_removed": 1.0}
    assert result["knobs"] == {"temperature": 0.5}
    assert suite.headline(result)["S2"] == 0.5 and suite.headline(result)["S2 best of 3"] == 1.0
    text = suite.report(result)
    assert "best of 3" in text and "12 gained, 0 lost of 24" in text and "100.0% [67.6, 100.0]" in text
    painter.scorer = None
    with pytest.raises(ValueError, match="needs a CLIP"):
        suite.evaluate(painter, candidates=2)


def test_the_captions_are_the_promised_ones():
    one = suite.prompts("S1")
    assert len(one) == 500 and len({p.text for p in one}) == 480
    assert [p.text for p in one[480:]] == [p.text for p in one[:20]]
    assert [p.language for p in one[:3]] == ["en", "ru", "en"] and one[0].facts == one[1].facts
    two = suite.prompts("S2b")
    assert [p.facts for p in two] == test_captions("S2b")
    assert [p.language for p in two] == ["en", "ru"] * 500 and two[:3] == suite.prompts("S2b", count=3)
    seeds = np.sort([p.seed for test in TEST_COUNTS for p in suite.prompts(test, seed=5)])
    assert len(seeds) == sum(TEST_COUNTS.values()) and seeds[0] == 5 and np.diff(seeds).min() == suite.SEED_STRIDE
    painter = Painter()
    suite.evaluate(painter, tests=["S2c", "S1"], per_test=2, seed=9)
    assert painter.asked == [(p.text, p.seed) for test in ("S2c", "S1") for p in suite.prompts(test, 9, 2)]


@pytest.mark.parametrize(
    "arguments", [{"tests": []}, {"tests": ["S3"]}, {"tests": "S1"}, {"per_test": 0}, {"candidates": 0}]
)
def test_what_cannot_be_asked_is_refused(arguments):
    with pytest.raises(ValueError, match=r"tests|at least 1"):
        suite.evaluate(Painter(), **arguments)


class Memory(torch.nn.Module):
    """A tokenizer that shows the picture it was given last, changed by `change`; its only code is 3."""

    spec = CodesSpec("codes", (1, 1), 8)

    def __init__(self, change):
        super().__init__()
        self.weight, self.change = torch.nn.Parameter(torch.zeros(1)), change

    def encode(self, image):
        self.image = image
        return torch.full((len(image), 1, 1), 3)

    def decode(self, codes):
        return self.change(self.image)


def studio(**parts):
    return SimpleNamespace(parts=parts, recipe=SimpleNamespace(image_size=32, training={}), captions=CAPTIONS)


def test_a_tokenizer_is_judged_by_what_it_keeps():
    kept = suite.tokenizer_rate(studio(tokenizer=Memory(lambda image: image)), per_test=70)
    assert (kept["n"], kept["rate"], kept["psnr"]) == (280, 1.0, None) and set(kept["tests"]) == {"S1", *suite.HELD_OUT}
    assert kept["codes_used"] == 1 / 8 and kept["perplexity"] == pytest.approx(1.0)
    blank = suite.tokenizer_rate(studio(tokenizer=Memory(torch.zeros_like)), tests=["S1"], per_test=70, seed=4)
    true = (ShapesSource(32, 4, split="S1").read(range(70)).image.double() + 1) * 127.5
    expected = 10 * np.log10(255**2 / float((true.round() - 128).square().mean()))
    assert blank["rate"] == 0.0 and blank["psnr"] == pytest.approx(expected)
    assert blank["failures"]["count"] == 70


class Oracle(torch.nn.Module):
    """A CLIP whose captions of equal meaning share a direction; it knows the pictures by the order of the tests."""

    def __init__(self, tests, count, blind=False):
        super().__init__()
        self.weight, self.blind = torch.nn.Parameter(torch.zeros(1)), blind
        self.truth = iter([facts for test in tests for facts in test_captions(test)[:count]])

    def direction(self, facts):
        seed = [int(v) + 1 for v in canonical(facts).row()]
        vector = np.ones(64) if self.blind else np.random.default_rng(seed).normal(size=64)
        return torch.tensor(vector / np.linalg.norm(vector))

    def frame(self, text, lengths):
        return text

    def encode_image(self, image, normalize):
        return torch.stack([self.direction(next(self.truth)) for _ in image])

    def encode_text(self, text, normalize):
        return torch.stack([self.direction(parse_caption(t)) for t in CAPTIONS.decode(text)])


def test_a_clip_must_beat_every_wrong_caption():
    seeing = suite.clip_rate(studio(clip=Oracle(suite.HELD_OUT, 20)), per_test=20)
    assert (seeing["n"], seeing["rate"]) == (60, 1.0)
    assert [seeing["languages"][name]["n"] for name in ("en", "ru")] == [30, 30]
    assert seeing["kinds"]["background"]["n"] == seeing["kinds"]["drop an object"]["accepted"] == 60
    assert 0 < seeing["kinds"]["swap shapes"]["n"] < 60  # left out where both shapes are the same
    blind = suite.clip_rate(studio(clip=Oracle(["S2c"], 20, blind=True)), tests=["S2c"], per_test=20)
    assert blind["rate"] == 0.0 and all(not won["accepted"] for won in blind["kinds"].values())
    with pytest.raises(ValueError, match="no CLIP to judge"):
        suite.clip_rate(studio())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model with all three parts."""
    path = tmp_path_factory.mktemp("model")
    parts = {
        "tokenizer": {"kind": "dvae", "image_size": 32, "num_codes": 16, "width": 8, "init_width": 8}
        | {"num_groups": 4, "blocks_per_group": 1},
        "prior": {"kind": "dalle", "text_vocab": 512, "text_length": 64, "num_codes": 16, "grid": [4, 4]}
        | {"width": 16, "depth": 1, "num_heads": 2, "attention": "full"},
        "clip": {"kind": "clip", "embed_dim": 8, "image_size": 32, "patch_size": 16, "vision_width": 8}
        | {"vision_depth": 1, "vision_heads": 1, "text_vocab": 514, "text_length": 66, "text_width": 8}
        | {"text_depth": 1, "text_heads": 1},
    }
    recipe = Recipe(
        name="tests/tiny", paper="none", image_size=32, captions={"vocab_size": 512, "context_length": 64}, parts=parts
    )
    CAPTIONS.save(path / "captions.json")
    for part in parts:
        torch.manual_seed(0)
        checkpoint.save_part(path, recipe, part, checkpoint.export(build(recipe, part), torch.float32))
    return path


def test_an_untrained_model_goes_the_whole_way(folder):
    result = suite.evaluate(str(folder), per_test=3, candidates=2, seed=1)
    assert result == suite.evaluate(TextToImage.load(folder), per_test=3, candidates=2, seed=1)
    result |= {"tokenizer": suite.tokenizer_rate(folder, per_test=3), "clip": suite.clip_rate(folder, per_test=3)}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["model"], result["candidates"], result["S2"]["best_of_n"]["rate"]) == ("tests/tiny", 2, 0.0)
    assert 1 <= result["tokenizer"]["perplexity"] <= 16 * result["tokenizer"]["codes_used"] + 1e-9
    figures = suite.headline(result)
    assert figures["S1"] == 0.0 and {"S2 best of 2", "S2none", "tokenizer", "clip"} <= set(figures)
    text = suite.report(result)
    assert "tests/tiny" in text and "malformed" in text and "perplexity" in text and "swap colours" in text
    assert max(map(len, text.splitlines())) <= 120


BODY = {"image_size": 32, "width": 4, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 2}
ALONE = {
    "autoencoder_kl": BODY,
    "vae": BODY | {"latent_dim": 8},
    "vqvae": {"image_size": 32, "num_codes": 16, "code_dim": 2, "width": 8, "residual_width": 4},
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_folder_with_only_a_tokenizer_is_judged_by_what_it_keeps(kind, tmp_path):
    parts, shapes = {"tokenizer": {"kind": kind} | ALONE[kind]}, {"data": {"kind": "shapes"}}
    recipe = Recipe(name="tests/alone", paper="none", image_size=32, parts=parts, training=shapes)
    torch.manual_seed(0)
    part = checkpoint.export(build(recipe, "tokenizer"), torch.float32)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", part)

    def ask(*options):
        return CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), "--device=cpu", *options])

    found = json.loads(ask("--tests=S2a", "--per-test=5", "--json").stdout)["tokenizer"]
    assert (found["n"], found["rate"]) == (5, 0.0) and 0 < found["psnr"] < 20
    assert found == suite.tokenizer_rate(tmp_path, tests=["S2a"], per_test=5)
    said = ask("--tests=S2a", "--per-test=5").stdout
    assert said.startswith("tokenizer: 0.0% ") and "of 5 pictures keep their facts" in said
    assert (found["codes_used"] is None, found["perplexity"] is None) == (kind != "vqvae",) * 2
    assert ("perplexity" in said) == (kind == "vqvae")
    assert "paints no candidates; leave out --candidates" in str(ask("--candidates=2").exception)
    assert "leave --tests out" in str(ask("--tests=S2a", "--save").exception)
    checkpoint.save_part(tmp_path / "m", recipe.model_copy(update={"training": {}}), "tokenizer", part)  # as converted
    said = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "m"), "--device=cpu"])
    assert "was not trained on shapes" in str(said.exception)


@pytest.mark.parametrize(
    ("accepted", "n", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_wilsons(accepted, n, low, high):
    assert rate(accepted, n)["interval"] == pytest.approx([low, high], abs=5e-5)


def test_a_mean_has_an_interval_that_never_closes():
    single = rate(30, 40)
    assert mean_rate([single])["interval"] == pytest.approx(single["interval"])
    mean = mean_rate([rate(700, 1000), rate(800, 1000), rate(900, 1000)])
    normal = 1.96 * np.sqrt((0.21 + 0.16 + 0.09) / 1000) / 3
    assert mean["rate"] == pytest.approx(0.8)
    assert mean["interval"] == pytest.approx([0.8 - normal, 0.8 + normal], abs=1e-3)
    low, high = mean_rate([rate(1000, 1000)] * 3)["interval"]
    assert 0.997 < low < 0.999 and high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="n >= 1"):
        mean_rate([rate(0, 0)])


def test_mcnemar_is_the_exact_binomial_test():
    rng = np.random.default_rng(2)
    for _ in range(20):
        first, second = rng.random(60) < 0.5, rng.random(60) < 0.7
        gained, lost = int((~first & second).sum()), int((first & ~second).sum())
        got = mcnemar(first.tolist(), second.tolist())
        assert (got["gained"], got["lost"]) == (gained, lost)
        assert got["p"] == pytest.approx(min(1, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5)))
        assert got["errors_removed"] == pytest.approx(((~first).sum() - (~second).sum()) / (~first).sum())
    assert mcnemar([True, False], [True, False])["p"] == 1.0
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([True], [])
