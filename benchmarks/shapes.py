"""How fast `shapes` scenes are drawn and checked, and whether the checker is right about them.

Run as `python -m kartina.benchmarks.shapes`, or by path with the package installed; on one core, for 32 and 64 px, one
and two objects. True captions must all be accepted, and minimal wrong ones never, or it exits with 1. `--json` prints
one JSON line. Clean images only: noise and blur take the slow path, image by image.
"""

import argparse
import json
import time

import numpy as np
import torch

from kartina.training.data.shapes_captions import wrong_captions
from kartina.training.data.shapes_scenes import grammar, render, sample_scenes
from kartina.training.evaluation.shapes_checker import check


def measure(objects: int, side: int, count: int) -> dict[str, float | int]:
    """Scenes of all the grammar, drawn with a colour shift of 0.02, then checked against true and wrong captions."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    scenes = sample_scenes(0, np.arange(count), grammar(objects), side)
    shift = rng.normal(0, 0.02, (count, 3, 3)).astype(np.float32)
    begin = time.perf_counter()
    images = render(scenes, shift)
    drawn = time.perf_counter() - begin
    pixels, facts = (images * 255).round().astype(np.uint8), scenes.facts()
    begin = time.perf_counter()
    verdicts = check(pixels, facts)
    checked = time.perf_counter() - begin
    wrong = [(i, other) for i, fact in enumerate(facts) for other in wrong_captions(fact, rng).values()]
    accepted = check(pixels[[i for i, _ in wrong]], [other for _, other in wrong])
    return {
        "objects": objects,
        "side": side,
        "renders_per_second": round(count / drawn),
        "checks_per_second": round(count / checked),
        "true_captions": count,
        "true_rejected": sum(bool(failures) for failures in verdicts),
        "wrong_captions": len(wrong),
        "wrong_accepted": sum(not failures for failures in accepted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--count", type=int, default=4000, help="scenes of each kind")
    options = parser.parse_args()
    rows = [measure(objects, side, options.count) for side in (32, 64) for objects in (1, 2)]
    if options.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            speed = "{objects} objects, {side} px: {renders_per_second} renders/s, {checks_per_second} checks/s"
            right = "true rejected {true_rejected}/{true_captions}, wrong accepted {wrong_accepted}/{wrong_captions}"
            print(f"{speed}, {right}".format(**row))
    if any(row["true_rejected"] or row["wrong_accepted"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
