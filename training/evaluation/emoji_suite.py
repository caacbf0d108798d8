"""The suite that judges a text-to-image model on `emoji`: is a painted emoji nearest to the true one?

Captions name label and style (`woman astronaut with dark skin, noto style emoji`) and no background: in the data it is
then white, but any of the 12 will do. A picture is as far from an emoji as from the nearest of that emoji's pictures on
them; the distance is that of pixels after a Gaussian blur of 2 px at 64 px. The gallery is what `emoji.prepare` wrote:
every (style, concept, tone) once, held out or not. Equal pictures count as one: Noto's astronaut looks the same in all
three genders.

- trained: cells that training shows, one of each (concept, style), the first 300 of a fixed shuffle.
  R@1: nearest of all emoji of its style. R@5: among the nearest five. concept: the nearest is the right one in any
  tone. style: nearer to the true emoji than to the same one in another style.
- E1: held-out cells of role x tone. R@1: nearest of the 15 of its role (3 genders x 5 tones) in its style. tone,
  gender: that of the nearest of the 15 is right.
- E2: held-out cells of concept x style, one of each; answers as in `trained`. Read R@1 beside `style`: the true emoji
  of the other style has R@1 0.19 (Noto 1.2.9, Fluent 1.2.6) and style 0.

KID-lite0 of each test is `reconstruction.kid` of its painted pictures and the true ones, on white: do they look like
emoji, whichever? It needs the package of the ruler's features.

The cells are the same at every seed, and English and Russian come in turn. M emoji of the gallery, B pictures, S side,
P points compared.

It does not know how the model was trained.
"""

import hashlib
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from ...pipeline.text_to_image import TextToImage
from ..data.emoji import lay, read_gallery, role_of
from ..data.emoji_captions import BACKGROUNDS, NAMES_STYLE, PLAIN, caption
from ..features import RULER, EfficientNetLite, has_package, ruler
from .reconstruction import features_of, kid, kid_words
from .reports import Result, by_column, check_tests, columns_of, percent, ranking_line, rates_of, rounded, title
from .shapes_suite import SEED_STRIDE, Model
from .statistics import mcnemar, rate

TESTS = ("trained", "E1", "E2")
FIRST = 5
QUESTIONS = {test: (f"R@{FIRST}", "concept", "style") for test in TESTS} | {"E1": ("tone", "gender")}  # besides R@1
TRAINED = 300  # cells of the test `trained`, if not asked otherwise
BLUR = 1 / 32  # of the side: 2 px at 64
_CHUNK = 64
_GROUNDS = np.array([rgb for rgb, _ in BACKGROUNDS.values()], dtype=np.float32) / 255  # (12, 3)

Answers = dict[str, tuple[bool, float]]  # question: (answered rightly, its chance)
Judged = dict[str, dict[str, list[Answers]]]  # test, column
Features = dict[str, dict[str, list[torch.Tensor]]]  # test, column or "true": (B, D) each


@dataclass(frozen=True)
class Prompt:
    """One caption of a test: the emoji's place in the gallery, and the seed of its candidate 0."""

    place: int
    text: str
    language: str
    seed: int


class Gallery:
    """The true emoji of a folder that `emoji.prepare` wrote, ready to be compared with.

    Raises ValueError for a folder that lacks its gallery or splits, or where the two do not belong together.
    """

    def __init__(self, data: Path | str):
        self.emoji = read_gallery(data)
        self.side, self.languages = len(self.emoji[0].pixels), list(self.emoji[0].labels)
        places = {art.cell: place for place, art in enumerate(self.emoji)}
        try:
            splits = json.loads((Path(data) / "splits.json").read_text(encoding="utf-8"))
            names = zip(TESTS, ("training", "E1", "E2"), strict=True)
            self.cells = {test: [places[cell] for cell in splits[name]] for test, name in names}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{data}/splits.json does not fit the gallery: {error!r}; write the data again") from error
        people = [role_of(art.hexcode) for art in self.emoji]
        self.role, self.gender = (np.array(column) for column in zip(*people, strict=True))  # (M,), as all below
        self.style, self.concept = np.array([a.style for a in self.emoji]), np.array([a.concept for a in self.emoji])
        self.tone, self.hexcode = np.array([a.tone for a in self.emoji]), np.array([a.hexcode for a in self.emoji])
        digests = [hashlib.sha256(a.pixels.tobytes()).hexdigest() for a in self.emoji]
        self.picture = np.unique(digests, return_inverse=True)[1]
        self._measure()

    def _measure(self) -> None:
        """Sets what emoji add to a picture (M, 3 P) and the share of the background they let through (M, P)."""
        light, clear = [], []
        for art in self.emoji:
            pixels = art.pixels.astype(np.float32)[None] / 255  # (1, S, S, 4)
            alpha = pixels[..., 3:]
            light.append(self._blurred(pixels[..., :3] * alpha).reshape(-1))
            clear.append(self._blurred(1 - alpha).reshape(-1))
        self._light, self._clear = np.stack(light), np.stack(clear)
        self._light_light = np.einsum("mp,mp->m", self._light, self._light)
        self._clear_clear = np.einsum("mp,mp->m", self._clear, self._clear)
        count = len(self.emoji)
        self._light_clear = np.einsum("mcp,mp->cm", self._light.reshape(count, 3, -1), self._clear)

    def _blurred(self, images: np.ndarray) -> np.ndarray:
        """(B, S, S, C) -> (B, C, P): blurred, then at most about 64 of them a side, which a blur makes enough."""
        soft = ndimage.gaussian_filter(images, BLUR * self.side, axes=(1, 2), mode="nearest")
        step = max(1, self.side // 64)
        return np.moveaxis(soft[:, ::step, ::step], 3, 1).reshape(len(soft), soft.shape[3], -1)

    def distances(self, pictures: np.ndarray) -> np.ndarray:
        """Squared distances of RGB pictures, uint8 (B, S, S, 3), from every emoji on its best background: (B, M).

        An emoji on a background g is light + clear g, so |picture - light - clear g|^2 is a polynomial in g.
        """
        shown = self._blurred(pictures.astype(np.float32) / 255)  # (B, 3, P)
        flat = shown.reshape(len(shown), -1)
        plain = np.square(flat).sum(1)[:, None] + self._light_light - 2 * flat @ self._light.T  # (B, M)
        found = np.full_like(plain, np.inf)
        hidden = self._light_clear - shown @ self._clear.T  # (B, 3, M)
        for ground in _GROUNDS:
            through = 2 * np.einsum("bcm,c->bm", hidden, ground) + ground @ ground * self._clear_clear
            np.minimum(found, plain + through, out=found)
        return found

    def pictures(self, places: Sequence[int]) -> np.ndarray:
        """The emoji at these places, uint8 (B, S, S, 3), on the background of captions that name none."""
        return np.stack([np.asarray(lay(Image.fromarray(self.emoji[place].pixels), PLAIN)) for place in places])

    def judge(self, test: str, place: int, distances: np.ndarray) -> Answers:
        """The answers that distances (M,) give about the emoji at a place; what cannot be missed is not asked.

        Chance is that of an emoji drawn evenly from those that the question compares.
        """
        same, exact = self.style == self.style[place], self.picture == self.picture[place]
        if test == "E1":
            among = same & (self.role == self.role[place]) & (self.tone > 0)
            questions = {"R@1": (among, exact, 1)}
            questions["tone"] = among, self.tone == self.tone[place], 1
            questions["gender"] = among, self.gender == self.gender[place], 1
        else:
            questions = {"R@1": (same, exact, 1), f"R@{FIRST}": (same, exact, FIRST)}
            questions["concept"] = same, self.concept == self.concept[place], 1
            questions["style"] = self.hexcode == self.hexcode[place], same, 1
        answers = {}
        for question, (among, wanted, first) in questions.items():
            right = among & np.isin(self.picture, self.picture[among & wanted])
            count, wrong = int(among.sum()), int((among & ~right).sum())
            if wrong >= first:
                nearer = int((distances[among & ~right] < distances[right].min()).sum())
                answers[question] = nearer < first, 1 - comb(wrong, first) / comb(count, first)
        return answers


def prompts(gallery: Gallery, test: str, seed: int = 0, count: int | None = None) -> list[Prompt]:
    """The captions of a test, the first `count` of them if given; each has its own seed.

    Raises ValueError for an unknown test or a count below 1.
    """
    check_tests([test], TESTS, count)
    draws, places = random.Random(0), gallery.cells[test]
    if test != "E1":
        tones = defaultdict(list)
        for place in places:
            tones[gallery.emoji[place].concept, gallery.emoji[place].style].append(place)
        places = [draws.choice(of_one) for of_one in tones.values()]
    places = draws.sample(places, len(places))[: count or (TRAINED if test == "trained" else None)]
    first, asked = len(gallery.emoji) * TESTS.index(test), []
    for i, place in enumerate(places):
        art, language = gallery.emoji[place], gallery.languages[i % len(gallery.languages)]
        text = caption(art.labels[language], (), art.style, PLAIN, language, NAMES_STYLE)  # names no colour
        asked.append(Prompt(place, text, language, seed + SEED_STRIDE * (first + i)))
    return asked


def evaluate(
    model: Model,
    data: Path | str,
    *,
    tests: Sequence[str] = TESTS,
    per_test: int | None = None,
    candidates: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **knobs: Any,
) -> Result:
    """Paints captions of emoji and asks which true emoji each picture is nearest to.

    model: a shipped name or a folder, loaded on the CPU, or a loaded system. data: the folder that `emoji.prepare`
    wrote, at the model's size. tests: of TESTS. per_test: the first captions of each test only (`trained` has 300 by
    default). candidates: N; one_sample judges candidate 0, best_of_n the one of N that CLIP ranks first. progress:
    called with the captions judged and in all. knobs: of the pipeline. The result holds only what JSON can:

    tests.<test>.<column>: n, accepted, rate, interval and chance of R@1; the same of the other answers under answers,
    and of R@1 under languages. A rate over nothing is None.
    tests.<test>.<column>.kid: mean and deviation of KID-lite0, None for fewer than 4 pictures or without its package
    ranking.<test>: McNemar's test of one_sample against best_of_n by R@1, for candidates > 1 (`statistics.mcnemar`)
    gallery: emoji of each style

    Raises ValueError for unknown tests, numbers below 1, candidates > 1 without a CLIP, tests for which the data hold
    no cell, data of another size than the model's, and as `Gallery` and loading do.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    check_tests(tests, TESTS, per_test)
    gallery = Gallery(data)
    asked = {test: prompts(gallery, test, seed, per_test) for test in tests}
    if not any(asked.values()):
        raise ValueError(f"{data} holds no cell of {', '.join(tests)}; name other tests, or write more emoji")
    system = TextToImage.load(model) if isinstance(model, str | Path) else model
    if candidates > 1 and system.scorer is None:
        raise ValueError(f"best of {candidates} needs a CLIP, the model has none; train it, or set candidates=1")
    if (side := system.recipe.image_size) != gallery.side:
        raise ValueError(f"the model paints {side} px, {data} holds {gallery.side}; write it with --size {side}")
    total, done = sum(map(len, asked.values())), 0
    judged: Judged = {test: {column: [] for column in ("one_sample", "best_of_n")[:candidates]} for test in tests}
    seen: Features = {test: defaultdict(list) for test in tests}
    network = _ruler()
    facts: dict[str, Any] = {}
    parts = [(test, asked[test][i : i + _CHUNK]) for test in tests for i in range(0, len(asked[test]), _CHUNK)]
    for test, part in parts:
        painted, facts = _painted(system, part, candidates, knobs)
        for column, pictures in painted.items():
            pairs = zip(part, gallery.distances(pictures), strict=True)
            judged[test][column] += [gallery.judge(test, prompt.place, row) for prompt, row in pairs]
        if network is not None:
            for column, pictures in {**painted, "true": gallery.pictures([prompt.place for prompt in part])}.items():
                seen[test][column].append(features_of(network, torch.from_numpy(pictures)))
        done += len(part)
        if progress is not None:
            progress(done, total)
    result: Result = {key: facts[key] for key in ("model", "model_hash", "device", "dtype", "knobs")}
    result |= {"seed": seed, "candidates": candidates, "gallery": Counter(gallery.style.tolist())}
    result |= _summary(gallery.languages, asked, judged)
    for test, columns in result["tests"].items():
        for column, entry in columns.items():
            features = [torch.cat(seen[test][name]) for name in ("true", column) if seen[test][name]]
            entry["kid"] = kid(*features) if features and len(features[0]) >= 4 else None
    return result | {"features": None if network is None else RULER}


def _ruler() -> EfficientNetLite | None:
    """The network of KID, or None without its package: the answers need none."""
    return ruler() if has_package(RULER) else None


def _painted(
    system: TextToImage, part: list[Prompt], candidates: int, knobs: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The pictures of each column, uint8 (B, S, S, 3), and the facts of one painting."""
    texts, seeds = [prompt.text for prompt in part], [prompt.seed for prompt in part]
    painted = system(texts, seed=seeds, candidates=candidates, keep=candidates, **knobs)
    columns = by_column(painted, candidates)
    pictures = {name: np.stack([np.asarray(each.image) for each in chosen]) for name, chosen in columns.items()}
    return pictures, painted[0].facts


def _summary(languages: list[str], asked: dict[str, list[Prompt]], judged: Judged) -> Result:
    tests: Result = {}
    ranking: Result = {}
    for test, columns in judged.items():
        tests[test] = {}
        for column, answers in columns.items():
            spoken = list(zip(answers, (prompt.language for prompt in asked[test]), strict=True))
            tests[test][column] = _tally("R@1", answers) | {
                "answers": {question: _tally(question, answers) for question in QUESTIONS[test]},
                "languages": {name: _tally("R@1", [a for a, s in spoken if s == name]) for name in languages},
            }
        if "best_of_n" in columns:
            one, best = ([answer["R@1"][0] for answer in answers if "R@1" in answer] for answers in columns.values())
            ranking[test] = mcnemar(one, best)
    return {"tests": tests} | ({"ranking": ranking} if ranking else {})


def _tally(question: str, answers: list[Answers]) -> Result:
    """Rate of right answers to a question and by chance, over the pictures of which it was asked."""
    asked = [answer[question] for answer in answers if question in answer]
    chance = sum(chance for _, chance in asked) / len(asked) if asked else None
    return rate(sum(right for right, _ in asked), len(asked)) | {"chance": chance}


def headline(result: Result) -> dict[str, float]:
    """The figures for a model's card, R@1 rounded to 4 digits: {"trained": 0.41, "E1": 0.62, "E1 best of 8": 0.7}."""
    return rounded({name: r for column in columns_of(result) for name, r in rates_of(result, column).items()})


def report(result: Result) -> str:
    """The figures as text for people: rates with 95 % intervals beside chance, and what ranking changes."""
    text = io.StringIO()
    console = Console(file=text, width=120, markup=False, highlight=False)
    console.print(title(result))
    gallery = ", ".join(f"{count} {style}" for style, count in result["gallery"].items())
    console.print(f"nearest by blurred pixels on any of {len(BACKGROUNDS)} backgrounds; gallery: {gallery}")
    console.print(_rate_table(result))
    for test, columns in result["tests"].items():
        known = [
            f"{columns_of(result)[name]} {kid_words(*entry['kid'])}" for name, entry in columns.items() if entry["kid"]
        ]
        if known:
            console.print(f"{test}: KID-lite0 x 1000 of {', of '.join(known)}")
    if result["features"] is None:
        console.print('no KID: .venv/bin/pip install -c constraints.txt -e ".[perceptual]" in the checkout')
    for test, ranking in result.get("ranking", {}).items():
        console.print(f"{test}: {ranking_line(ranking, result['candidates'])}")
    return text.getvalue()


def _rate_table(result: Result) -> Table:
    columns = columns_of(result)
    languages = list(next(iter(result["tests"].values()))["one_sample"]["languages"])
    table = Table("test", "answer", "n", "chance", box=box.SIMPLE)
    for words in columns.values():
        for heading in (words, *languages):
            table.add_column(heading, justify="right")
    for test, tallies in result["tests"].items():
        for question in ("R@1", *QUESTIONS[test]):
            entries = {c: tally if question == "R@1" else tally["answers"][question] for c, tally in tallies.items()}
            first = entries["one_sample"]
            row = [test, question, str(first["n"]), "-" if first["chance"] is None else f"{first['chance']:.2%}"]
            for entry in entries.values():
                said = [percent(entry["languages"][name]).split(" [")[0] for name in languages if "languages" in entry]
                row += [percent(entry), *(said or [""] * len(languages))]
            table.add_row(*row)
    return table
