"""How many steps each sampler needs: right pictures of held-out captions of two objects, by sampler and steps.

Run as `python -m kartina.benchmarks.samplers MODEL [--per-test N] [--steps 50,20,10,5] [--guidance G]`, for a
diffusion model of shapes. A figure is the mean over the tests S2a, S2b and S2c, of one sample a caption, with the same
seeds everywhere. heun looks twice a step. It is about accuracy, not about time: other work on the machine does no harm.
"""

import argparse
import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from kartina.pipeline.terminal import progress_bar
from kartina.pipeline.text_to_image import TextToImage
from kartina.priors.diffusion_samplers import SAMPLERS
from kartina.training.evaluation.shapes_suite import HELD_OUT, evaluate


def measure(system: TextToImage, sampler: str, steps: int, per_test: int, **knobs: Any) -> dict[str, Any]:
    """The rate over the three tests with its interval, and how often each fact fails."""
    found = evaluate(system, tests=HELD_OUT, per_test=per_test, sampler=sampler, num_steps=steps, **knobs)
    failures = Counter()
    for test in HELD_OUT:
        failures.update(found["tests"][test]["one_sample"]["failures"])
    return {"sampler": sampler, "steps": steps, **found["S2"]["one_sample"], "failures": dict(failures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="shapes/stable-diffusion")
    parser.add_argument("--per-test", type=int, default=50)
    parser.add_argument("--steps", default="50,20,10,5")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--json", action="store_true", help="one JSON line a figure")
    given = parser.parse_args()
    system, knobs = TextToImage.load(given.model, "cpu"), {}
    if given.guidance is not None:
        knobs["guidance_scale"] = given.guidance
    steps, samplers = [int(each) for each in given.steps.split(",")], given.samplers.split(",")
    table = Table(f"S2 of {system.recipe.name}", *(f"{each} steps" for each in steps))
    with progress_bar("sampling") as progress:
        for i, sampler in enumerate(samplers):
            row = []
            for j, count in enumerate(steps):
                found = measure(system, sampler, count, given.per_test, **knobs)
                row.append(f"{100 * found['rate']:.1f} %")
                if given.json:
                    print(json.dumps(found), flush=True)
                progress(i * len(steps) + j + 1, len(samplers) * len(steps))
            table.add_row(sampler, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
