"""Runs side by side, from their logs alone: every curve that they share, and "am I normal?".

It does not know how curves are drawn (`charts` does), nor what is normal (`reference` does).
"""

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ..pipeline import gallery
from ..pipeline.images import save_png
from ..pipeline.recipe import nearest
from ..pipeline.terminal import printable
from . import charts
from .charts import Panel, Points
from .history import History, read
from .reference import Reference, Verdict, band, judge, metrics_of, reference_of, save_reference, span_of

_LEFT_OUT = {"samples", "seconds", "bad", "counts_per_code"}  # they tell nothing that steps do not
_LOSSES = ("loss", "total", "nll", "squared", "norm", "nats_per_code", "perplexity")


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
    chosen = [(name, key) for name, key in chosen if keys or key.rpartition("/")[2] not in _LEFT_OUT]
    if not chosen:
        if stage is not None and stage not in first:
            raise ValueError(f"the runs share no stage {stage!r}; {nearest(stage, [*first])}")
        wanted = ", ".join(keys)
        raise ValueError(f"the runs share no curve {wanted!r}; {nearest(wanted, [key for _, key in found])}")
    known = {str(folder): reference_of(folder, runs[str(folder)]) for folder in folders}
    references, unfit = ({label: pair[i] for label, pair in known.items()} for i in range(2))
    return Comparison(runs, chosen, references, unfit)


# --- for people -------------------------------------------------------------------------------------------------------


def picture(comparison: Comparison) -> Image:
    """All curves, a panel each."""
    return charts.draw([_panel(comparison, *key) for key in comparison.keys], [*comparison.runs])


def _panel(comparison: Comparison, stage: str, key: str) -> Panel:
    lines: list[Points] = [run[stage].curve(key) for run in comparison.runs.values()]
    known = [reference.get(stage, {"curves": {}}) for reference in comparison.references.values()]
    told = known[0]["curves"].get(key, []) if all(other == known[0] for other in known) else []
    last = max(step for line in lines for step, _ in line)
    reference = [point for point in told if point[0] <= last] or told[:1]
    shade = []
    if told and key in metrics_of(next(iter(comparison.runs.values()))[stage]):
        begin, end = span_of(known[0], key)
        shade = [(step, *band(told, step)) for step, _ in reference if begin <= step <= end]
    low, high = charts.limits([*lines, reference])
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
    for line in _unjudged(comparison):
        console.print(line)
    return text.getvalue()


def _unjudged(comparison: Comparison) -> Iterator[str]:
    """Of each run and stage without a verdict, why."""
    stages = dict.fromkeys(name for name, _ in comparison.keys)
    for label, verdicts in comparison.verdicts.items():
        judged, unfit = {one.stage for one in verdicts}, comparison.unfit[label]
        for name in (name for name in stages if name not in judged):
            if name in unfit:
                why = unfit[name]
            elif name not in comparison.references[label]:
                why = "the recipe carries no reference of it (--save-reference)"
            elif comparison.runs[label][name].headline is None:
                why = "the run was not validated yet"
            else:
                why = "the reference was not measured around these steps"
            yield f"{printable(label)}: no verdict on {name}: {why}"


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
