"""The suite that judges what a model without captions draws of `shapes`: whether its pictures are scenes at all.

A scene is a background with as many objects as training shows, each of one of the shapes; what is drawn is read back by
`shapes_checker`. Which scenes they are is not asked, nor whether all come.

It does not know how the model was trained.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...pipeline.text_to_image import TextToImage
from .reports import Result, percent, title
from .shapes_checker import MALFORMED, parse
from .statistics import rate

PICTURES = 500
_CHUNK = 64
_MOST = {"S1": 1, "S2": 2, "S3": 4}  # objects, by level


def evaluate(
    system: TextToImage,
    count: int = PICTURES,
    *,
    levels: Sequence[str] = ("S1", "S2"),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **knobs: Any,
) -> Result:
    """Draws pictures with the seeds from `seed` on and judges them.

    levels: of its training. progress: called with the pictures judged and in all. knobs: of the pipeline. The result
    holds only what JSON can: n, accepted, rate, interval of the pictures that are scenes; most: the objects that a
    scene may have; objects: how many pictures have so many; malformed: how many have an object that is of no shape.
    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"evaluate needs a count of at least 1, got {count}")
    most = max(_MOST[level] for level in levels)
    objects, malformed, accepted = Counter[int](), 0, 0
    facts: dict[str, Any] = {}
    for start in range(0, count, _CHUNK):
        seeds = [seed + i for i in range(start, min(start + _CHUNK, count))]
        drawn = system(["a scene"] * len(seeds), seed=seeds, **knobs)
        facts = drawn[0].facts
        for seen in parse(np.stack([np.asarray(painting.image) for painting in drawn])):  # (B, S, S, 3)
            bad = any(thing.error > MALFORMED for thing in seen.objects)
            objects[len(seen.objects)] += 1
            malformed += bad
            accepted += 1 <= len(seen.objects) <= most and not bad
        if progress is not None:
            progress(start + len(seeds), count)
    result: Result = {key: facts[key] for key in ("model", "model_hash", "device", "dtype", "knobs")}
    found = {"objects": {str(number): objects[number] for number in sorted(objects)}, "malformed": malformed}
    return result | {"seed": seed, "most": most} | rate(accepted, count) | found


def report(result: Result) -> str:
    """The figures as text for people."""
    numbers = ", ".join(f"{count} of {number}" for number, count in result["objects"].items())
    return (
        f"{title(result)}\n{percent(result)} of {result['n']} pictures are scenes of one to {result['most']} objects; "
        f"objects: {numbers}; {result['malformed']} have one that is of no shape"
    )
