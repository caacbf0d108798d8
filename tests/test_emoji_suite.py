"""The emoji suite: true pictures score 1 on any background, other cells 0, and what is wrong is told apart.

The data: the fixture's 12 concepts, and two roles of 3 genders x 5 tones drawn here, written by `prepare`.
"""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

pytest.importorskip("resvg_py")  # of the extra [data]; so it goes before the imports that need it

from kartina.pipeline import checkpoint  # noqa: E402
from kartina.pipeline.recipe import Recipe, build  # noqa: E402
from kartina.pipeline.text_to_image import Painting  # noqa: E402
from kartina.tokenizers.captions import CaptionTokenizer  # noqa: E402
from kartina.training.data import emoji, emoji_packages  # noqa: E402
from kartina.training.data.emoji_captions import BACKGROUNDS  # noqa: E402
from kartina.training.evaluation import emoji_suite as suite  # noqa: E402
from kartina.training.shards import ShardWriter, check_shards  # noqa: E402

FIXTURE = Path(__file__).parent / "data" / "emoji" / "emoji.json"
JOBS = {"1f33e": ("farmer", "фермер"), "1f52c": ("scientist", "учёный")}
GENDERS = {"1f9d1": ("", ""), "1f468": ("man ", "мужчина-"), "1f469": ("woman ", "женщина-")}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SKINS = ("#fadcbc", "#e0bb95", "#bf8f68", "#9b643d", "#594539")


def add_people(content: dict) -> None:
    """Adds JOBS to the packages: a face of the tone, hair by gender, a coat by job, other shapes in another style."""
    for j, (job, names) in enumerate(JOBS.items()):
        for g, (person, called) in enumerate(GENDERS.items()):
            skins = {"en": [], "ru": []}
            for tone, (word, skin) in enumerate(zip((None, *TONES), ("#fc0", *SKINS), strict=True)):
                code = f"{person}-1f3f{'abcdef'[tone]}-200d-{job}" if tone else f"{person}-200d-{job}"
                for s, package in enumerate(emoji_packages.STYLES.values()):
                    name, icons = f"person-{code}", content[package]["icons.json"]
                    hair = f'<rect x="{10 + 5 * s}" y="5" width="{22 + 30 * g}" height="{12 + 20 * g}" fill="#532"/>'
                    coat = f'<rect x="20" y="80" width="{60 + 20 * s}" height="40" fill="{("#284", "#eef")[j]}"/>'
                    body = f'{hair}{coat}<circle cx="64" cy="{50 + 8 * s}" r="30" fill="{skin}"/>'
                    icons["icons"][name] = {"body": body, "width": 128, "height": 128}
                    content[package]["chars.json"][code] = name
                for language, title, said in zip(("en", "ru"), names, called, strict=True):
                    entry = {"label": said + title + (f": {word} skin tone" if tone else ""), "hexcode": code}
                    entry |= {"tone": tone} if tone else {"tags": [title], "skins": skins[language]}
                    if tone:
                        skins[language].append(entry)
                    else:
                        content["emojibase-data"][f"{language}/data.json"].append(entry)


def write(folder: Path, content: dict, **options) -> Path:
    """What `prepare` makes of packages of this content."""
    for package, files in content.items():
        stem = package.removeprefix("@").replace("/", "-")
        with tarfile.open(folder / f"{stem}-1.0.0.tgz", "w:gz") as tar:
            for name, file in files.items():
                info, data = tarfile.TarInfo(f"package/{name}"), json.dumps(file).encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    emoji.prepare(folder / "out", packed=folder, per_concept=2, **options)
    return folder / "out"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    content = json.loads(FIXTURE.read_text(encoding="utf-8"))
    add_people(content)
    return write(tmp_path_factory.mktemp("packed"), content)


@pytest.fixture(scope="module")
def gallery(data):
    return suite.Gallery(data)


class Painter:
    """Paints the true emoji that `pick` makes of (gallery, place, language, candidate), on a background by its seed."""

    scorer, recipe = object(), SimpleNamespace(image_size=64)
    colours = tuple(BACKGROUNDS)

    def __init__(self, gallery, pick=lambda gallery, place, language, candidate: place):
        self.gallery, self.pick, self.seeds = gallery, pick, []
        self.asked = {p.text: p for test in suite.TESTS for p in suite.prompts(gallery, test)}

    def __call__(self, prompts, seed, candidates, keep, **knobs):
        assert keep == candidates and len(seed) == len(prompts)
        self.seeds += seed
        painted = []
        for text, first in zip(prompts, seed, strict=True):
            for k in reversed(range(candidates)):  # the last candidate ranks first
                place = self.pick(self.gallery, self.asked[text].place, self.asked[text].language, k)
                colour = self.colours[(first // suite.SEED_STRIDE + k) % len(self.colours)]
                picture = Image.fromarray(self.gallery.emoji[place].pixels)
                shown = Image.open(io.BytesIO(emoji.compose(picture, colour)))
                common = {"model": "tests/painter", "model_hash": "0" * 64, "device": "cpu", "dtype": "float32"}
                painted.append(Painting(shown, text, first + k, 0.0, common | {"knobs": knobs, "candidate": k}))
        return painted


def other(place, *rules):
    """The first place that differs by the first rule and is equal in the others."""
    differs, *equal = rules
    return next(i for i in np.flatnonzero(differs != differs[place]) if all(e[i] == e[place] for e in equal))


def test_the_gallery_holds_every_emoji_once(data, gallery):
    assert not (bad := check_shards(data / "gallery")).bad and bad.samples == len(gallery.emoji) == 24 + 2 * 36
    split = json.loads((data / "splits.json").read_text(encoding="utf-8"))
    cells = [art.cell for art in gallery.emoji]
    assert cells == sorted(cells) and {*split["training"], *split["E1"], *split["E2"]} <= set(cells)
    art = next(art for art in gallery.emoji if art.cell == "noto/1f469-1f3fd-200d-1f52c")
    assert (art.style, art.concept, art.tone, art.hexcode) == ("noto", "1f469-200d-1f52c", 3, art.cell[5:])
    assert art.labels == {"en": "woman scientist: medium skin tone", "ru": "женщина-учёный: medium skin tone"}
    content = json.loads(FIXTURE.read_text(encoding="utf-8"))
    names = content.pop("emojibase-data")
    heart = emoji_packages.join(
        {s: content[p] for s, p in emoji_packages.STYLES.items()}, names["en/data.json"], names["ru/data.json"]
    )[0][0]
    same = next(art for art in gallery.emoji if art.cell == heart.cell)
    assert np.array_equal(same.pixels, np.asarray(emoji.rasterise(heart.svg)))
    notices = json.loads((data / "gallery" / "manifest.json").read_text())["licences"]
    assert all((data / "gallery" / one["notice"]).is_file() for one in notices)


def test_the_captions_are_the_promised_ones(data, gallery):
    e1 = suite.prompts(gallery, "E1")
    split = json.loads((data / "splits.json").read_text(encoding="utf-8"))
    assert len(e1) == 12 and {gallery.emoji[p.place].cell for p in e1} == set(split["E1"])
    assert [p.language for p in e1] == ["en", "ru"] * 6
    said = {(gallery.emoji[p.place].cell, p.language): p.text for p in e1}
    for (cell, language), text in said.items():
        style, code = cell.split("/")
        job, (en, ru) = JOBS[code[-5:]][language == "ru"], GENDERS[code[:5]]
        word = {"1f33e": "light", "1f52c": "medium-light"}[code[-5:]]
        if language == "en":
            assert text == f"a {en}{job} with {word} skin, {style} style emoji"
        else:
            assert text == f"{ru}{job}: {word} skin tone, стиль {style}"
    for test, kept in (("trained", set(split["training"])), ("E2", set(split["E2"]))):
        asked = [gallery.emoji[p.place] for p in suite.prompts(gallery, test)]
        assert asked and {a.cell for a in asked} <= kept
        assert len({(a.concept, a.style) for a in asked}) == len(asked)
    seeds = np.sort([p.seed for test in suite.TESTS for p in suite.prompts(gallery, test, seed=5)])
    assert seeds[0] == 5 and np.diff(seeds).min() >= suite.SEED_STRIDE
    painter = Painter(gallery)
    suite.evaluate(painter, data, tests=["E1"], per_test=3, seed=9)
    assert painter.seeds == [p.seed for p in suite.prompts(gallery, "E1", 9)[:3]]


def test_true_pictures_score_one_on_any_background(data, gallery):
    calls = []
    result = suite.evaluate(Painter(gallery), data, candidates=2, progress=lambda *call: calls.append(call))
    total = sum(len(suite.prompts(gallery, test)) for test in suite.TESTS)
    assert calls[-1] == (total, total) and result["gallery"] == {"fluent": 48, "noto": 48}
    for test, columns in result["tests"].items():
        assert set(columns) == {"one_sample", "best_of_n"}
        for tally in columns.values():
            assert tally["rate"] == 1.0 and tally["n"] == len(suite.prompts(gallery, test)) and tally["interval"][0] < 1
            assert {answer["rate"] for answer in tally["answers"].values()} == {1.0}
    one = {test: columns["one_sample"] for test, columns in result["tests"].items()}
    assert one["trained"]["chance"] == pytest.approx(1 / 48) == one["E2"]["chance"]
    assert one["trained"]["answers"]["R@5"]["chance"] == pytest.approx(5 / 48)
    assert one["E2"]["answers"]["style"]["chance"] == 0.5
    chances = (one["E1"]["chance"], *(one["E1"]["answers"][name]["chance"] for name in ("tone", "gender")))
    assert chances == pytest.approx((1 / 15, 1 / 5, 1 / 3))
    assert result["ranking"]["E1"] == {"n": 12, "gained": 0, "lost": 0, "p": 1.0, "errors_removed": None}
    names = [f"{test}{end}" for end in ("", " best of 2") for test in suite.TESTS]
    assert suite.headline(result) == dict.fromkeys(names, 1.0)


def test_true_pictures_are_like_true_ones_on_the_background_of_captions_that_name_none(data, gallery):
    painter = Painter(gallery)
    painter.colours = ("white",)
    for test, columns in suite.evaluate(painter, data)["tests"].items():
        kid = columns["one_sample"]["kid"]
        assert kid is None if len(suite.prompts(gallery, test)) < 4 else abs(kid[0]) < 3 * kid[1], (test, kid)
    painter.colours = ("blue",)
    mean, deviation = suite.evaluate(painter, data, tests=["trained"])["tests"]["trained"]["one_sample"]["kid"]
    assert mean > 3 * deviation  # as far from 0 as true ones are not


def test_pictures_that_are_no_emoji_are_far_from_them_and_without_the_package_no_kid_is_given(
    data, gallery, monkeypatch
):
    class Noise(Painter):
        def __call__(self, prompts, **rest):
            draws = np.random.default_rng(0)
            noise = (Image.fromarray(draws.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in prompts)
            return [replace(each, image=next(noise)) for each in super().__call__(prompts, **rest)]

    noise = suite.evaluate(Noise(gallery), data, tests=["trained"])
    mean, deviation = noise["tests"]["trained"]["one_sample"]["kid"]
    assert mean > 0.1 and mean > 5 * deviation and "trained: KID-lite0 x 1000 of one sample" in suite.report(noise)

    monkeypatch.setattr(suite, "has_package", lambda name: False)
    without = suite.evaluate(Painter(gallery), data, tests=["trained"])
    assert without["tests"]["trained"]["one_sample"]["kid"] is None and "no KID" in suite.report(without)


def test_large_pictures_are_compared_at_fewer_points(tmp_path):
    large = write(tmp_path, json.loads(FIXTURE.read_text(encoding="utf-8")), size=128)
    painter = Painter(suite.Gallery(large))
    painter.recipe = SimpleNamespace(image_size=128)
    result = suite.evaluate(painter, large)
    assert suite.headline(result) == {"trained": 1.0, "E2": 1.0}  # the fixture has no people in five tones
    assert result["tests"]["E1"]["one_sample"]["n"] == 0 and "-" in suite.report(result)


def test_wrong_pictures_score_zero_and_say_why(data, gallery):
    g = gallery
    picks = {
        "tone": lambda _, p, *rest: other(p, g.tone, g.role, g.gender, g.style),
        "gender": lambda _, p, *rest: other(p, g.gender, g.role, g.tone, g.style),
        "style": lambda _, p, *rest: other(p, g.style, g.hexcode),
        "concept": lambda _, p, *rest: other(p, g.concept, g.style, g.tone),
    }
    tallies = {
        name: suite.evaluate(Painter(g, pick), data, tests=tests)["tests"]
        for name, pick, tests in [
            ("tone", picks["tone"], ["E1"]),
            ("gender", picks["gender"], ["E1"]),
            ("style", picks["style"], ["E2"]),
            ("concept", picks["concept"], ["trained", "E2"]),
        ]
    }
    rates = {
        (name, test): {"R@1": columns["one_sample"]["rate"]}
        | {question: answer["rate"] for question, answer in columns["one_sample"]["answers"].items()}
        for name, tests in tallies.items()
        for test, columns in tests.items()
    }
    assert rates["tone", "E1"] == {"R@1": 0.0, "tone": 0.0, "gender": 1.0}
    assert rates["gender", "E1"] == {"R@1": 0.0, "tone": 1.0, "gender": 0.0}
    assert rates["style", "E2"]["style"] == 0.0
    for test in ("trained", "E2"):
        assert rates["concept", test]["R@1"] == rates["concept", test]["concept"] == 0.0


def test_ranking_is_compared_pair_by_pair(data, gallery):
    """Candidate 0 is wrong in Russian; the one ranked first never is."""

    def pick(g, place, language, k):
        return other(place, g.tone, g.role, g.gender, g.style) if language == "ru" and k == 0 else place

    result = suite.evaluate(Painter(gallery, pick), data, tests=["E1"], candidates=3, temperature=0.5)
    one, best = (result["tests"]["E1"][column] for column in ("one_sample", "best_of_n"))
    assert (one["rate"], best["rate"], result["knobs"]) == (0.5, 1.0, {"temperature": 0.5})
    assert one["languages"]["en"]["rate"] == 1.0 and one["languages"]["ru"]["rate"] == 0.0
    assert result["ranking"]["E1"] == {"n": 12, "gained": 6, "lost": 0, "p": 2 * 0.5**6, "errors_removed": 1.0}
    assert suite.headline(result) == {"E1": 0.5, "E1 best of 3": 1.0}
    text = suite.report(result)
    assert "best of 3" in text and "6 gained, 0 lost of 12" in text and "100.0% [75.8, 100.0]" in text
    assert "6.67%" in text and max(map(len, text.splitlines())) <= 120


def test_the_distance_is_that_of_blurred_pixels(gallery):
    """Against composing every emoji on every background and blurring it."""
    rng = np.random.default_rng(0)
    places, painted = rng.permutation(len(gallery.emoji))[:6], rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    found = gallery.distances(painted)[:, places]
    soft = ndimage.gaussian_filter(painted / 255, (0, 2, 2, 0), mode="nearest")
    for column, place in enumerate(places):
        pictures = [emoji.compose(Image.fromarray(gallery.emoji[place].pixels), colour) for colour in BACKGROUNDS]
        true = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]) / 255
        true = ndimage.gaussian_filter(true, (0, 2, 2, 0), mode="nearest")
        expected = np.square(soft[:, None] - true).sum((2, 3, 4)).min(1)
        assert found[:, column] == pytest.approx(expected, rel=1e-3)


def test_equal_pictures_count_as_one(data):
    """As Noto's astronauts: where all genders look the same, none is wrong and gender is not asked."""
    g = suite.Gallery(data)
    place = g.cells["E1"][0]
    alike = (g.role == g.role[place]) & (g.style == g.style[place]) & (g.tone == g.tone[place])
    g.picture = np.where(alike, g.picture[place], g.picture)
    far = np.arange(len(g.emoji), 0, -1.0)
    far[np.flatnonzero(alike)[-1]] = 0
    assert g.judge("E1", place, far)["R@1"] == (True, pytest.approx(3 / 15))
    everyone = (g.role == g.role[place]) & (g.style == g.style[place]) & (g.tone > 0)
    for tone in range(1, 6):
        g.picture = np.where(everyone & (g.tone == tone), -tone, g.picture)
    assert set(g.judge("E1", place, far)) == {"R@1", "tone"}


@pytest.mark.parametrize(
    "arguments", [{"tests": []}, {"tests": ["S1"]}, {"tests": "E1"}, {"per_test": 0}, {"candidates": 0}]
)
def test_what_cannot_be_asked_is_refused(data, gallery, arguments):
    with pytest.raises(ValueError, match=r"tests|at least 1"):
        suite.evaluate(Painter(gallery), data, **arguments)


def test_what_does_not_fit_is_refused(data, gallery, tmp_path):
    painter = Painter(gallery)
    painter.scorer = None
    with pytest.raises(ValueError, match="needs a CLIP"):
        suite.evaluate(painter, data, candidates=2)
    painter.recipe = SimpleNamespace(image_size=32)
    with pytest.raises(ValueError, match="paints 32 px.*--size 32"):
        suite.evaluate(painter, data)
    with pytest.raises(ValueError, match="no gallery/.*kartina data emoji"):
        suite.Gallery(tmp_path)
    small = write(tmp_path, json.loads(FIXTURE.read_text(encoding="utf-8")), size=32, languages=["ru"])
    with pytest.raises(ValueError, match="no cell of E1"):
        suite.evaluate(painter, small, tests=["E1"])
    assert {p.language for p in suite.prompts(suite.Gallery(small), "trained")} == {"ru"}
    (small / "splits.json").write_text('{"training": ["noto/0"], "E1": [], "E2": []}')
    with pytest.raises(ValueError, match="does not fit the gallery"):
        suite.Gallery(small)


def test_a_broken_gallery_is_named(data, tmp_path):
    with ShardWriter(tmp_path / "gallery", 10, "gallery") as writer:
        writer.write({"png": b"no picture", "txt": b"x"}, name="noto/0", style="noto")
    with pytest.raises(ValueError, match="gallery-000000/000000000 is no record of a gallery"):
        emoji.read_gallery(tmp_path)


def test_an_untrained_model_goes_the_whole_way(data, gallery, tmp_path):
    parts = {
        "tokenizer": {"kind": "dvae", "image_size": 64, "num_codes": 16, "width": 8, "init_width": 8}
        | {"num_groups": 4, "blocks_per_group": 1},
        "prior": {"kind": "dalle", "text_vocab": 512, "text_length": 64, "num_codes": 16, "grid": [8, 8]}
        | {"width": 16, "depth": 1, "num_heads": 2, "attention": "full"},
        "clip": {"kind": "clip", "embed_dim": 8, "image_size": 64, "patch_size": 16, "vision_width": 8}
        | {"vision_depth": 1, "vision_heads": 1, "text_vocab": 514, "text_length": 66, "text_width": 8}
        | {"text_depth": 1, "text_heads": 1},
    }
    captions = {"vocab_size": 512, "context_length": 64}
    recipe = Recipe(name="tests/tiny", paper="none", image_size=64, captions=captions, parts=parts)
    texts = [p.text for test in suite.TESTS for p in suite.prompts(gallery, test)]
    CaptionTokenizer.train(texts, 512, 64).save(tmp_path / "captions.json")
    for part in parts:
        torch.manual_seed(0)
        checkpoint.save_part(tmp_path, recipe, part, checkpoint.export(build(recipe, part), torch.float32))
    result = suite.evaluate(str(tmp_path), data, per_test=3, candidates=2, seed=1)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["model"] == "tests/tiny" and result["tests"]["E1"]["best_of_n"]["n"] == 3
    assert "tests/tiny" in suite.report(result) and {"E1", "E2 best of 2"} <= set(suite.headline(result))
