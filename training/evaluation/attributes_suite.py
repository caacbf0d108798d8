"""The suite that judges resynthesis on labelled pictures: is a moved attribute read as moved, and are the others kept?

The judged pictures are the second half of the data's held_out/, compositions that the tokenizer never saw. Each
attribute is asked of pictures that have it not, at +1, and, where it is certain what takes its place, at -1 of those
that have it. The reader (see `attribute_reader`) says what became of it; a field is kept where it reads the exact
label of the picture. Beside this stand the reader's accuracy on the same pictures, and on what the tokenizer makes of
them without a move: what a tokenizer loses, no move can keep.

B pictures, F fields.

It does not know how directions are found.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ...pipeline.resynthesis import Resynthesis
from ..data.labelled import Attribute, attributes_of, read_labelled
from .attribute_reader import AttributeReader, judged_half, reader_of
from .reports import Result, percent, table_text
from .statistics import rate

PER_MOVE = 100


def evaluate(
    system: Resynthesis,
    data: Path,
    per_move: int = PER_MOVE,
    strength: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """{"moves": {"glasses +1": {"moved", "kept"}}, "moved", "kept", "reader", "again"}: rates, see above.

    per_move: pictures of each move at most. "reader" and "again" are rates of each field, on pictures and on what the
    tokenizer makes of them. Raises ValueError for data without attributes, or others than the model's.
    """
    size = system.tokenizer.image_size
    held_out = judged_half(read_labelled(data / "held_out", size))
    attributes = attributes_of(held_out.fields)
    if [one.name for one in attributes] != system.names:
        raise ValueError(f"{data} has other attributes than the model's directions; run kartina directions on it first")
    reader, device = reader_of(data, size), next(system.tokenizer.parameters()).device
    images, names = held_out.images(slice(None)), list(held_out.fields)
    again = torch.cat([system(some.to(device), {}).cpu() for some in images.split(100)])
    moves = [(one, sign) for one in attributes for sign in ((1, -1) if one.certain else (1,))]
    result: Result = {"strength": strength, "pictures": len(images), "moves": {}}
    for name, shown in (("reader", images), ("again", again)):
        right = reader.read(shown) == held_out.labels  # (N, F)
        result[name] = {field: rate(int(right[:, place].sum()), len(right)) for place, field in enumerate(names)}
    for turn, (one, sign) in enumerate(moves):
        place = names.index(one.field)
        lacks = _shows(one, held_out.fields, held_out.labels[:, place]) != (sign > 0)
        rows = lacks.nonzero()[:per_move, 0]
        moved = system(images[rows].to(device), {one.name: sign}, strength).cpu()
        result["moves"][f"{one.name} {sign:+d}"] = _judge(reader, moved, held_out.labels[rows], one, sign, place)
        if progress:
            progress(turn + 1, len(moves))
    for name in ("moved", "kept"):
        entries = [entry[name] for entry in result["moves"].values()]
        result[name] = rate(sum(entry["accepted"] for entry in entries), sum(entry["n"] for entry in entries))
    return result


def _shows(one: Attribute, fields: dict[str, list[str]], labels: Tensor) -> Tensor:
    return torch.isin(labels, torch.tensor([fields[one.field].index(value) for value in one.values]))


def _judge(
    reader: AttributeReader, moved: Tensor, labels: Tensor, one: Attribute, sign: int, place: int
) -> dict[str, Any]:
    got = reader.read(moved)  # (B, F)
    success = _shows(one, reader.fields, got[:, place]) == (sign > 0)
    kept = (got == labels)[:, [other for other in range(labels.shape[1]) if other != place]]
    return {"moved": rate(int(success.sum()), len(success)), "kept": rate(int(kept.sum()), kept.numel())}


def headline(result: Result) -> dict[str, float]:
    """The figures for a card."""
    return {f"attributes {name}": round(result[name]["rate"], 4) for name in ("moved", "kept")}


def report(result: Result) -> str:
    """The result as text for people."""
    fields = Table("field", "the reader is right on pictures", "decoded again", box=box.SIMPLE)
    for name in result["reader"]:
        fields.add_row(name, percent(result["reader"][name]), percent(result["again"][name]))
    moves = Table("move", "pictures", "read as moved", "other fields kept", box=box.SIMPLE)
    for name, entry in result["moves"].items():
        moves.add_row(name, str(entry["moved"]["n"]), percent(entry["moved"]), percent(entry["kept"]))
    moves.add_section()
    moves.add_row("all", str(result["moved"]["n"]), percent(result["moved"]), percent(result["kept"]))
    head = f"resynthesis at strength {result['strength']:g}, {result['pictures']} held-out pictures\n"
    return head + table_text(fields) + table_text(moves)
