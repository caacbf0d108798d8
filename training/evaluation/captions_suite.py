"""What a model paints for captions of any shards that training did not show it, beside the pictures that they are of.

- chosen: for how many pictures CLIP scores their own caption above OTHERS that are true of others alone; of the
  true pictures too, for CLIP errs as well. It is the CLIP that ranks candidates, so that the best of N says more of it
  than of the pictures.
- kid: KID-lite0 between features of painted and of true pictures, as in `reconstruction`: no picture meets its own.

It does not know what the captions say.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...pipeline.images import to_pil
from ...pipeline.text_to_image import TextToImage
from ..features import RULER, has_package, ruler
from ..sources import held_out
from ..stream import Batch, ShardSource
from .reconstruction import features_of, kid, kid_words
from .reports import Result, by_column, columns_of, percent, ranking_line, rounded, suffix_of, title
from .shapes_suite import SEED_STRIDE
from .statistics import mcnemar, rate

COUNT, OTHERS = 500, 15
_CHUNK, _TEST = 16, "captions"


def evaluate(
    system: TextToImage,
    data: Path,
    *,
    trained_on: set[str] | None = None,
    per_test: int | None = None,
    candidates: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Paints the captions of shards: of those that the model was trained on the ones that it held out.

    trained_on: fingerprints of the data that its parts were trained on. per_test: how many captions, 500 by default.
    candidates: also judges the best of N, by CLIP. progress: called with the captions judged and in all. Returns what
    JSON can hold; a KID is None without its package, and nothing is chosen without a CLIP.

    Raises ValueError for a model that was trained on all of the shards, candidates > 1 without a CLIP, fewer than 4
    pictures, and captions that are all the same.
    """
    if candidates > 1 and system.scorer is None:
        raise ValueError(f"best of {candidates} needs a CLIP, the model has none; train it, or set candidates=1")
    source, what = _source(system, data, trained_on or set())
    source.captioned = True
    images, texts, told = _read(source, min(per_test or COUNT, source.size))
    if len(set(texts)) < 2:
        raise ValueError(
            f"{what}: all {len(texts)} captions are {texts[0]!r:.60}; pictures need captions that tell them apart"
        )
    painted: dict[str, list[Image.Image]] = {column: [] for column in ("one_sample", "best_of_n")[:candidates]}
    facts: dict[str, Any] = {}
    for start in range(0, len(texts), _CHUNK):
        part = texts[start : start + _CHUNK]
        seeds = [seed + SEED_STRIDE * (start + i) for i in range(len(part))]
        found = system(part, seed=seeds, candidates=candidates, keep=candidates)
        facts = found[0].facts
        for column, paintings in by_column(found, candidates).items():
            painted[column] += [each.image for each in paintings]
        if progress is not None:
            progress(start + len(part), len(texts))
    columns, chosen = _judged(system, {**painted, "true": to_pil(images)}, texts, told)
    result: Result = {key: facts[key] for key in ("model", "model_hash", "device", "dtype", "knobs")}
    result |= {"seed": seed, "candidates": candidates, "pictures": what, "true": columns.pop("true")}
    result["tests"] = {_TEST: columns}
    if "best_of_n" in chosen:
        result["ranking"] = {_TEST: mcnemar(chosen["one_sample"], chosen["best_of_n"])}
    return result


def _source(system: TextToImage, data: Path, trained_on: set[str]) -> tuple[Any, str]:
    """What the captions are read of, and that in words."""
    trained, rest = held_out(system.recipe, trained_on, data)
    if not trained:
        return ShardSource(data, system.recipe.image_size, 0), f"{data}, on which its card does not say it was trained"
    if rest is None:
        raise ValueError(f"the model was trained on all pictures of {data}; name shards that were held out")
    others = "" if len(trained_on) == 1 else ", by some of its parts; others were trained on other data"
    return rest, f"{data}, held out of training{others}"


def _read(source: Any, count: int) -> tuple[Tensor, list[str], list[Sequence[str]]]:
    """Pictures, captions and all captions of the first samples. Raises ValueError where too few can be read."""
    batch: Batch = source.read(range(count))
    good = (batch.weight > 0).nonzero()[:, 0].tolist()
    if len(good) < 4:
        raise ValueError(f"{len(good)} pictures with captions can be read, at least 4 are needed; see data check")
    return batch.image[good], [batch.captions[i] for i in good], [batch.told[i] for i in good]


def _judged(
    system: TextToImage,
    pictures: dict[str, list[Image.Image]],
    texts: Sequence[str],
    told: Sequence[Sequence[str]],
) -> tuple[dict[str, Result], dict[str, list[bool]]]:
    """The figures of each column, and of each picture whether its caption was chosen. told: all that are true of it."""
    network = ruler() if has_package(RULER) else None
    found: dict[str, Result] = {}
    chosen: dict[str, list[bool]] = {}
    features: dict[str, Tensor] = {}
    for column, images in pictures.items():
        found[column] = {"n": len(images), "chosen": None, "kid": None}
        if system.scorer is not None:
            chosen[column] = [_chosen(system.scorer, images[i], i, texts, told[i]) for i in range(len(images))]
            found[column]["chosen"] = rate(sum(chosen[column]), len(images))
        if network is not None:
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            features[column] = torch.cat([features_of(network, part) for part in pixels.split(64)])
    for column in features:
        if column != "true":
            found[column]["kid"] = kid(features["true"], features[column])
    return found, chosen


def _chosen(scorer: Any, image: Image.Image, place: int, texts: Sequence[str], told: Sequence[str]) -> bool:
    """Whether its own caption scores above the next ones that are not true of it."""
    true = {texts[place], *told}
    others = [text for text in dict.fromkeys([*texts[place:], *texts[:place]]) if text not in true][:OTHERS]
    scores = scorer.score([image] * (1 + len(others)), [texts[place], *others]).tolist()
    return all(scores[0] > score for score in scores[1:])


def headline(result: Result) -> dict[str, float]:
    """The figures for a model's card: KID alone, for CLIP is the model's own. {"captions": 0.0213}."""
    tests = result["tests"][_TEST].items()
    return rounded({_TEST + suffix_of(result, column): entry["kid"] and entry["kid"][0] for column, entry in tests})


def report(result: Result) -> str:
    """The figures as text for people."""
    text = io.StringIO()
    console = Console(file=text, width=120, markup=False, highlight=False)
    console.print(title(result))
    told = "it has no CLIP to choose" if result["true"]["chosen"] is None else f"its CLIP chooses among {OTHERS + 1}"
    console.print(f"captions of {result['pictures']}; {told}, KID of {RULER}")
    table = Table("pictures", box=box.SIMPLE)
    for heading in ("n", "own caption chosen", "KID x 1000"):
        table.add_column(heading, justify="right")
    rows = {words: result["tests"][_TEST][column] for column, words in columns_of(result).items()}
    for words, entry in {**rows, "true": result["true"]}.items():
        told = "-" if entry["chosen"] is None else percent(entry["chosen"])
        table.add_row(words, str(entry["n"]), told, "-" if entry["kid"] is None else kid_words(*entry["kid"]))
    console.print(table)
    for ranking in result.get("ranking", {}).values():
        console.print(ranking_line(ranking, result["candidates"]))
    return text.getvalue()
