"""What is normal for a recipe: the reference that a shipped one carries, and how a run stands against it.

`dalle.yaml` has `dalle.curves.json` beside it, made of a log by `save_reference`. It says nothing of runs of a recipe
that was changed since, or on other data. What is normal at a step s is what the reference was between 3/4 s and 4/3 s,
and on either side three times its own scatter more, 2 % of the value at least. A band in time rather than in value
needs no constant for each metric, and another seed or device shifts a curve mostly in time. A run is judged by the last
step around which the reference was measured: one that was not finished ends.

It does not know how anything is shown.
"""

import bisect
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline.checkpoint import write_text
from ..pipeline.recipe import Recipe, RecipeError
from ..pipeline.recipe import read as read_recipe
from .charts import Points
from .history import History, read
from .run import CADENCE, differences, find

_FORMAT = 2
_APART = 4 / 3  # in steps
_SCATTER, _FLOOR = 3.0, 0.02
_POINTS = 50  # of a reference curve

Reference = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How a stage stands by one metric. word: normal; behind or ahead by the headline, higher or lower by another."""

    stage: str
    key: str
    step: int
    value: float
    word: str
    why: str


def _recipe_of(folder: Path) -> Recipe | None:
    """What a run was trained by."""
    for path in (folder / "model" / "recipe.yaml", folder / "recipe.yaml"):  # the former as of the last stage
        if path.is_file():
            return read_recipe(path)
    return None


def _shipped(recipe: Recipe | None) -> Path | None:
    """The recipe of this name as it stands now."""
    try:
        return None if recipe is None else find(recipe.name)
    except RecipeError:
        return None  # one of the user's own


def reference_of(folder: Path, run: dict[str, History]) -> tuple[Reference, dict[str, str]]:
    """By stage, what a run's recipe carries and the run can be judged by; and why not, where it cannot.

    Both are empty where the recipe carries none. Raises ValueError for a spoilt file.
    """
    path = _shipped(_recipe_of(folder))
    stages = {} if path is None else _stored(path.with_suffix(".curves.json"))
    unfit = {}
    for name, one in stages.items():
        changed = differences(one["recipe"], _deciding(read_recipe(path), name, one["depends"])) if path else ""
        data = run[name].facts.get("data", one["data"]) if name in run else one["data"]
        if changed:
            unfit[name] = f"the reference is of this recipe before it was changed ({changed})"
        elif data != one["data"]:
            unfit[name] = "the reference read other data"
    return {name: one for name, one in stages.items() if name not in unfit}, unfit


def _stored(path: Path) -> Reference:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected curves of format {_FORMAT}, got {content.get('format')!r}; update kartina")
    return content["stages"]


def _deciding(recipe: Recipe, stage: str, depends: Iterable[str]) -> dict[str, Any]:
    """What decides a stage's curves, as the recipe has it written. depends: parts, and `captions`, that it reads."""
    names, training = (stage, *depends), recipe.training
    found: dict[str, Any] = {"image_size": recipe.image_size, "frozen": [*recipe.frozen]}
    found |= {key: training.get(key) for key in ("seed", "precision", "data")}
    found |= {"captions": recipe.captions.model_dump()} if "captions" in names else {}
    found |= {"diffusion": recipe.diffusion.model_dump()} if recipe.parts[stage]["kind"] == "unet" else {}
    found["parts"] = {name: recipe.parts[name] for name in names if name in recipe.parts}
    found["stages"] = {
        name: {key: value for key, value in training["stages"][name].items() if key not in CADENCE}
        for name in names
        if name in training["stages"]
    }
    return found


def save_reference(folder: Path, stage: str | None = None) -> Path:
    """Writes a run's metrics and losses beside its recipe, as what is normal from now on. Returns the path.

    stage: of this one alone. Stages that the run has not stay as they were.

    Raises ValueError where the run is of no shipped recipe, or of one that it changed, or where a stage was not
    validated yet, or is not as far as the reference that it would replace.
    """
    recipe = _recipe_of(folder)
    path = _shipped(recipe)
    if recipe is None or path is None:
        raise ValueError(f"{folder} names no shipped recipe; expected recipe.yaml in it, as `kartina train` writes it")
    from .checks import stage_of  # and torch with it

    written = path.with_suffix(".curves.json")
    stages = dict(_stored(written))
    for name, history in read(folder).items():
        if stage not in (None, name):
            continue
        kind = stage_of(recipe, name)
        depends = [*kind.needs(recipe), *(part for part in kind.beside if part in recipe.parts)]
        decides = _deciding(recipe, name, depends)
        if changed := differences(_deciding(read_recipe(path), name, depends), decides):
            raise ValueError(f"{folder} changes its recipe ({changed}); a reference is a run of the recipe as it is")
        if history.headline is None:
            raise ValueError(f"{name} is at step {history.step} and was never validated; a reference has its metrics")
        measured, known = history.curve(history.headline)[-1][0], stages.get(name, {"curves": {}})
        before = known["curves"].get(history.headline, [(0, 0.0)])[-1][0]
        if measured < before and (known["recipe"], known["data"]) == (decides, history.facts.get("data")):
            raise ValueError(f"{name} is measured at step {measured}; its reference until step {before}, train on")
        names = [*metrics_of(history), *(f"{network}/total" for network in history.facts["networks"])]
        curves = {key: _thin(history.curve(key)) for key in names if key in history.curves}
        facts = {key: history.facts.get(key) for key in ("steps", "global_batch", "higher_is_better", "data")}
        stages[name] = {**facts, "depends": depends, "recipe": decides, "curves": curves}
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in stages.items()]  # a line for each stage
    text = f'{{"format": {_FORMAT}, "recipe": {json.dumps(recipe.name)}, "stages": {{\n' + ",\n".join(lines) + "\n}}\n"
    write_text(written, text)
    return written


def metrics_of(history: History) -> list[str]:
    """The curves of what was validated, the headline first."""
    return [f"valid/{name}" for name in history.facts.get("metrics", [])]


def _thin(points: Points) -> list[tuple[int, float]]:
    """At most 50 of many points, each the median of those since the one before; four digits of each."""
    groups = [points[len(points) * i // _POINTS : len(points) * (i + 1) // _POINTS] for i in range(_POINTS)]
    groups = [group for group in groups if group] if len(points) > _POINTS else [[point] for point in points]
    return [(group[-1][0], float(f"{statistics.median(value for _, value in group):.4g}")) for group in groups]


def _at(points: Points, step: float) -> float:
    """A curve between its points, and beyond them as at its ends."""
    i = bisect.bisect_right([s for s, _ in points], step)
    if i in (0, len(points)):
        return points[min(i, len(points) - 1)][1]
    (s, a), (t, b) = points[i - 1], points[i]
    return a + (b - a) * (step - s) / (t - s)


def band(points: Points, step: int) -> tuple[float, float]:
    """Lowest and highest normal value at a step, see above."""
    begin, end = step / _APART, step * _APART
    near = [_at(points, begin), _at(points, end), *(value for at, value in points if begin <= at <= end)]
    middle = zip(points, points[1:], points[2:], strict=False)
    off = [abs(b[1] - (a[1] + c[1]) / 2) for a, b, c in middle] if len(points) >= 8 else [0.0]
    room = max(_SCATTER * statistics.median(off), _FLOOR * abs(_at(points, step)))
    return min(near) - room, max(near) + room


def span_of(known: dict[str, Any], key: str) -> tuple[float, float]:
    """From what step to what step a stage's reference says what is normal of a curve: where it was measured around."""
    begin, end = known["curves"][key][0][0], known["curves"][key][-1][0]
    return begin / _APART, math.inf if end >= known["steps"] else end / _APART


def judge(history: History, reference: Reference) -> list[Verdict]:
    """Where a stage stands by each metric at the last step that it was measured and the reference around it."""
    known = reference.get(history.stage, {"curves": {}})
    keys = [key for key in metrics_of(history) if key in history.curves and key in known["curves"]]
    return [one for key in keys if (one := _judge(history, key, known))]


def _judge(history: History, key: str, known: dict[str, Any]) -> Verdict | None:
    points, (begin, end) = known["curves"][key], span_of(known, key)
    told = [(step, value) for step, value in history.curve(key) if begin <= step <= end]
    if not told:
        return None
    (step, value), trained = told[-1], points[-1][0]
    low, high = band(points, step)
    why = f"normal at step {step} is {low:.4g} to {high:.4g}"
    if trained < known["steps"]:
        why = f"the reference ends at step {trained} of {known['steps']}; {why}"
    word = "normal" if low <= value <= high else "higher" if value > high else "lower"
    if key == history.headline and word != "normal":
        word = "ahead" if (word == "higher") == known["higher_is_better"] else "behind"
    if word == "behind":
        sign = 1 if known["higher_is_better"] else -1
        passed = [at for at, other in points if sign * other <= sign * value]
        why += f"; the reference was there at step {passed[-1]}" if passed else "; the reference never was there"
    same = {name: history.facts.get(name) for name in ("steps", "global_batch")}
    if same != {name: known[name] for name in same}:
        why += f"; it trained {min(trained, known['steps'])} steps of {known['global_batch']}"
    return Verdict(history.stage, key, step, value, word, why)
