"""What the suites share: the check of what is asked, figures for a card, and lines of a report.

It does not know what was judged.
"""

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ...pipeline.text_to_image import Painting

Result = dict[str, Any]


def check_tests(tests: Sequence[str], known: Iterable[str], count: int | None) -> None:
    """Raises ValueError unless `tests` names some of the known ones, each once, and count is None or at least 1."""
    known = tuple(known)
    if not tests or isinstance(tests, str) or len(set(tests)) < len(tests) or not set(tests) <= set(known):
        raise ValueError(f"the suite has the tests {known}, got {tests!r}; name some of these, each once")
    if count is not None and count < 1:
        raise ValueError(f"the number of captions of a test must be at least 1, got {count}")


def columns_of(result: Result) -> dict[str, str]:
    """The columns of a suite's result, in words: one sample, and best of N where there are candidates."""
    words = {"one_sample": "one sample", "best_of_n": f"best of {result['candidates']}"}
    return words if result["candidates"] > 1 else {"one_sample": words["one_sample"]}


def by_column(paintings: Sequence[Painting], candidates: int) -> dict[str, list[Painting]]:
    """Of all candidates of each prompt, the best first, those that a column judges: the first painted, the best."""
    columns = {"one_sample": [painting for painting in paintings if painting.facts["candidate"] == 0]}
    return columns | ({"best_of_n": list(paintings[::candidates])} if candidates > 1 else {})


def table_text(table: Table) -> str:
    """A table as text, 120 characters wide."""
    text = io.StringIO()
    Console(file=text, width=120, markup=False, highlight=False).print(table)
    return text.getvalue()


def psnr(errors: Sequence[float]) -> float | None:
    """dB over 8-bit pictures, of the mean of their mean squared errors; None where nothing differs."""
    error = sum(errors) / len(errors)
    return 10 * math.log10(255**2 / error) if error else None


def decibels(value: float | None) -> str:
    """What `psnr` gives, in words."""
    return "exact" if value is None else f"{value:.2f} dB"


def percent(entry: Result) -> str:
    """A rate with its interval, as `91.0% [88.1, 93.2]`, or a dash where nothing was judged."""
    if entry["rate"] is None:
        return "-"
    low, high = entry["interval"]
    return f"{entry['rate']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def rates_of(result: Result, column: str) -> dict[str, float | None]:
    """The rate of each test in a column, by the name that it has on a card: "S2a", or "S2a best of 8"."""
    return {test + suffix_of(result, column): entry[column]["rate"] for test, entry in result["tests"].items()}


def suffix_of(result: Result, column: str) -> str:
    """What a column adds to a figure's name on a card: nothing for one sample."""
    return "" if column == "one_sample" else f" {columns_of(result)[column]}"


def rounded(rates: dict[str, float | None]) -> dict[str, float]:
    """Rates with 4 digits, without those over nothing."""
    return {name: round(value, 4) for name, value in rates.items() if value is not None}


def title(result: Result) -> str:
    """The first line of a report: model, seed, knobs."""
    knobs = ", ".join(f"{name} {value}" for name, value in result["knobs"].items() if value is not None)
    return f"{result['model']} {result['model_hash'][:12]}, seed {result['seed']}, {knobs}"


def ranking_line(ranking: Result, candidates: int) -> str:
    """What ranking changes, of the result of `statistics.mcnemar`."""
    removed = "no errors to remove" if ranking["errors_removed"] is None else f"{ranking['errors_removed']:.1%} removed"
    changed = f"{ranking['gained']} gained, {ranking['lost']} lost of {ranking['n']}"
    return f"errors by best of {candidates}: {removed} ({changed}; McNemar's exact p = {ranking['p']:.2g})"
