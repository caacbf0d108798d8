"""Runs side by side, from their logs alone: every curve that they share, and "am I normal?" against the reference.

A shipped recipe carries the reference beside it: `dalle.yaml`, `dalle.curves.json`, made of a log by `save_reference`.
It says nothing of runs of a recipe that was changed since, or on other data: they get no verdict, and are told why.
A metric is judged at the last step at which the reference was measured around it: one that was not finished ends.
What is normal at a step s is what the reference was between 3/4 s and 4/3 s, and on either side three times its own
scatter more, 2 % of the value at least. A band in time rather than in value needs no constant for each metric, and
another seed or device shifts a curve mostly in time.

It does not know how curves are drawn (`charts` does).
"""

import bisect
import io
import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ..pipeline import gallery
from ..pipeline.checkpoint import write_text
from ..pipeline.images import save_png
from ..pipeline.recipe import Recipe, RecipeError, nearest
from ..pipeline.recipe import read as read_recipe
from ..pipeline.terminal import printable
from . import charts
from .charts import Panel, Points
from .history import History, read
from .run import CADENCE, differences, find

_FORMAT = 2
_LEFT_OUT = {"samples", "seconds", "bad"}  # they tell nothing that steps do not
_LOSSES = ("loss", "total", "nll", "squared", "norm", "nats_per_code", "perplexity")
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


@dataclass
class Comparison:
    """The curves of some runs. runs: label -> stage -> history. keys: (stage, curve), those of one stage together.

    references: of each run, the stages that it can be judged by. unfit: of each run, stage -> why its reference says
    nothing of it.
    """

    runs: dict[str, dict[str, History]]
    keys: list[tuple[str, str]]
    references: dict[str, Reference]
    unfit: dict[str, dict[str, str]]

    @property
    def verdicts(self) -> dict[str, list[Verdict]]:
        """Of each run, stage by stage, on the metrics that its reference has."""
        stages = dict.fromkeys(stage for stage, _ in self.keys)
        return {
            label: [one for stage in stages for one in judge(run[stage], self.references[label])]
            for label, run in self.runs.items()
        }


def compare(folders: Sequence[Path], stage: str | None = None, keys: Sequence[str] = ()) -> Comparison:
    """The curves that all runs share, of one stage or of all, and of some names or of all.

    Raises ValueError where there is no log, or nothing is shared.
    """
    runs = {str(folder): read(folder) for folder in folders}
    first = next(iter(runs.values()))
    found = [
        (name, key)
        for name, history in first.items()
        for key in sorted(history.curves, key=lambda key: (key != history.headline, "valid/" not in key, key))
        if all(name in run and key in run[name].curves for run in runs.values())
    ]
    chosen = [(name, key) for name, key in found if stage in (None, name) and (key in keys or not keys)]
    chosen = [(name, key) for name, key in chosen if keys or key not in _LEFT_OUT]
    if not chosen:
        if stage is not None and stage not in first:
            raise ValueError(f"the runs share no stage {stage!r}; {nearest(stage, [*first])}")
        wanted = ", ".join(keys)
        raise ValueError(f"the runs share no curve {wanted!r}; {nearest(wanted, [key for _, key in found])}")
    known = {str(folder): reference_of(folder, runs[str(folder)]) for folder in folders}
    references, unfit = ({label: pair[i] for label, pair in known.items()} for i in range(2))
    return Comparison(runs, chosen, references, unfit)


# --- the reference ----------------------------------------------------------------------------------------------------


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
        measured, known = history.curve(history.headline)[-1][0], stages.get(name, {})
        if (known.get("recipe"), known.get("data")) == (decides, history.facts.get("data")):
            there = known["curves"][history.headline][-1][0]
            if measured < there:
                raise ValueError(f"{name} is measured at step {measured}; its reference until step {there}, train on")
        names = [*_metrics(history), *(f"{network}/total" for network in history.facts["networks"])]
        curves = {key: _thin(history.curve(key)) for key in names if key in history.curves}
        facts = {key: history.facts.get(key) for key in ("steps", "global_batch", "higher_is_better", "data")}
        stages[name] = {**facts, "depends": depends, "recipe": decides, "curves": curves}
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in stages.items()]  # a line for each stage
    text = f'{{"format": {_FORMAT}, "recipe": {json.dumps(recipe.name)}, "stages": {{\n' + ",\n".join(lines) + "\n}}\n"
    write_text(written, text)
    return written


def _metrics(history: History) -> list[str]:
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


def judge(history: History, reference: Reference) -> list[Verdict]:
    """Where a stage stands by each metric at the last step that it was measured and the reference around it."""
    known = reference.get(history.stage, {"curves": {}})
    keys = [key for key in _metrics(history) if key in history.curves and key in known["curves"]]
    return [one for key in keys if (one := _judge(history, key, known))]


def _judge(history: History, key: str, known: dict[str, Any]) -> Verdict | None:
    points = known["curves"][key]
    begin, end = points[0][0], points[-1][0]
    whole = end >= known["steps"]
    told = [(s, v) for s, v in history.curve(key) if begin <= s * _APART and (whole or s * _APART <= end)]
    if not told:
        return None
    (step, value), why = told[-1], "" if whole else f"the reference ends at step {end} of {known['steps']}; "
    low, high = band(points, step)
    why += f"normal at step {step} is {low:.4g} to {high:.4g}"
    word = "normal" if low <= value <= high else "higher" if value > high else "lower"
    if key == history.headline and word != "normal":
        word = "ahead" if (word == "higher") == known["higher_is_better"] else "behind"
    if word == "behind":
        sign = 1 if known["higher_is_better"] else -1
        passed = [at for at, other in points if sign * other <= sign * value]
        why += f"; the reference was there at step {passed[-1]}" if passed else "; the reference never was there"
    same = {name: history.facts.get(name) for name in ("steps", "global_batch")}
    if same != {name: known[name] for name in same}:
        why += f"; it trained {known['steps']} steps of {known['global_batch']}"
    return Verdict(history.stage, key, step, value, word, why)


# --- for people -------------------------------------------------------------------------------------------------------


def picture(comparison: Comparison) -> Image:
    """All curves, a panel each."""
    return charts.draw([_panel(comparison, *key) for key in comparison.keys], [*comparison.runs])


def _panel(comparison: Comparison, stage: str, key: str) -> Panel:
    lines: list[Points] = [run[stage].curve(key) for run in comparison.runs.values()]
    known = [reference.get(stage, {}).get("curves", {}).get(key) for reference in comparison.references.values()]
    reference = known[0] if known[0] and all(other == known[0] for other in known) else ()
    last = max(step for line in lines for step, _ in line)
    reference = [point for point in reference if point[0] <= last] or reference[:1]
    metrics = _metrics(next(iter(comparison.runs.values()))[stage])
    shade = [(step, *band(known[0], step)) for step, _ in reference] if key in metrics else []
    low, high = charts.limits(lines)
    log = key.rpartition("/")[2].endswith(_LOSSES) and low > 0 and high > 10 * low
    return Panel(f"{stage}: {key}", lines, reference, shade, log)


def report(comparison: Comparison) -> str:
    """A line for each curve of each run, and the verdict on each stage."""
    table = Table("curve", "run", "", "first", "last", "at step", box=box.SIMPLE)
    for name, key in comparison.keys:
        panel = _panel(comparison, name, key)
        curves = {**dict(zip(comparison.runs, panel.lines, strict=True))}
        curves |= {"reference": panel.reference} if panel.reference else {}
        span = min(line[0][0] for line in curves.values()), max(line[-1][0] for line in curves.values())
        low, high = charts.limits([*curves.values()])
        for i, (label, points) in enumerate(curves.items()):
            spark = charts.sparkline(points, span, low, high, panel.log)
            figures = f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}", str(points[-1][0])
            table.add_row("" if i else printable(panel.title), printable(label), spark, *figures)
    verdicts = Table("run", "stage", "am I normal?", "value", "why", box=box.SIMPLE)
    for label, found in comparison.verdicts.items():
        for one in found:
            verdicts.add_row(printable(label), one.stage, one.word, f"{one.key} {one.value:.4g}", one.why)
    text = io.StringIO()
    console = Console(file=text, width=shutil.get_terminal_size((140, 24)).columns, markup=False, highlight=False)
    console.print(table)
    if verdicts.rows:
        console.print(verdicts)
    elif any(comparison.references.values()):
        console.print("no verdict: the reference was not measured at these steps")
    elif not any(comparison.unfit.values()):
        console.print("no verdict: the recipe carries no reference (--save-reference)")
    shown = {name for name, _ in comparison.keys}
    for label, unfit in comparison.unfit.items():
        for name, why in unfit.items():
            if name in shown:
                console.print(f"{printable(label)}: no verdict on {name}: {why}")
    return text.getvalue()


def main(
    folders: Sequence[Path],
    out: Path,
    stage: str | None,
    keys: Sequence[str],
    as_reference: bool,
    tell: Callable[[str], object],
) -> bool:
    """`kartina compare`. Returns whether any stage of any run is not normal, nor ahead."""
    if as_reference:
        if len(folders) != 1:
            raise ValueError(f"--save-reference takes one run, got {len(folders)}")
        tell(str(save_reference(folders[0], stage)))
        return False
    comparison = compare(folders, stage, keys)
    path = gallery.targets(out, 1)[0]
    save_png(picture(comparison), path, {"runs": [*comparison.runs]})
    tell(report(comparison))
    tell(str(path))
    return any(one.word not in ("normal", "ahead") for found in comparison.verdicts.values() for one in found)
