"""Which models are here, what they weigh, and what they were measured to do: as rows, and as a table for people.

It does not load a model: a card and the sizes of files tell it all. Cards are untrusted, so a bad one becomes a problem
beside the others.
"""

import io
import shutil
import warnings
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .checkpoint import read_card
from .known_models import known_models
from .shared import place
from .terminal import printable


def catalogue() -> tuple[list[dict[str, Any]], list[str]]:
    """The known models, and what is wrong with those that cannot be read.

    A model is {"name", "folder", "licence", "parts": {part: bytes, 0 where another file has it}, "measured": what
    `save_measured` wrote, or {}}.
    """
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        found = known_models()
    rows, problems = [], [str(warning.message) for warning in left_out]
    for name, folder in found.items():
        card = read_card(folder)
        files = {part: place(folder, card["parts"], part) for part in card["parts"]}
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            problems.append(f"{folder} is left out: {', '.join(missing)} is missing; copy the folder again")
            continue
        sizes = {
            part: path.stat().st_size if path == folder / f"{part}.safetensors" else 0 for part, path in files.items()
        }
        facts = {"parts": sizes, "measured": card.get("measured", {})}
        rows.append({"name": name, "folder": str(folder), "licence": card["licence"], **facts})
    return rows, problems


def report(rows: list[dict[str, Any]], problems: list[str]) -> str:
    """The rows of `catalogue` as a table, and a line for each problem."""
    table = Table("name", "licence", "parts", "measured", box=box.SIMPLE)
    for row in rows:
        parts = [f"{part} {f'{size / 1e6:.1f} MB' if size else 'shared'}" for part, size in row["parts"].items()]
        figures = [f"{name} {value}" for entry in row["measured"].values() for name, value in entry["figures"].items()]
        cells = [row["name"]], [row["licence"]], parts, figures or ["not measured"]
        table.add_row(*("\n".join(map(printable, lines)) for lines in cells))
    text = io.StringIO()
    width = shutil.get_terminal_size((120, 24)).columns
    console = Console(file=text, width=width, markup=False, highlight=False)
    if rows:
        console.print(table)
    else:
        console.print("no models yet: train one with `kartina train shapes/dalle`")
    return text.getvalue() + "".join(f"{printable(problem)}\n" for problem in problems)
