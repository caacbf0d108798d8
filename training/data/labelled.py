"""Pictures with exact attributes, as `avatars.prepare` writes them: shards whose json has `attributes`, {field: value}.

N pictures, F fields, S image side.

It does not know what is learned from them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...pipeline.images import fit, to_uint8
from ...pipeline.terminal import progress_bar
from ..samples import BadSample, decode, find_shards, load_index, read_member, read_sample

NONE = "none"  # the value of a field for what is not there


@dataclass(frozen=True)
class Labelled:
    """fields: {field: its values}; pixels uint8 (N, S, S, 3); labels int64 (N, F), places among the values."""

    fields: dict[str, list[str]]
    pixels: Tensor
    labels: Tensor

    def images(self, rows: Sequence[int] | Tensor | slice) -> Tensor:
        """The images of some rows, float32 (B, 3, S, S) in [-1, 1]."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Attribute:
    """An attribute that a picture has or has not: a name, the field that it is of, and the values that have it.

    certain: a picture that has it not has one certain other value, or none, so that it can be asked to lose it.
    """

    name: str
    field: str
    values: tuple[str, ...]
    certain: bool


def attributes_of(fields: dict[str, list[str]]) -> list[Attribute]:
    """`hat` (any value but none), `mouth:happy` (of two values the first), `skin:dark` (each of three or more)."""
    found = []
    for name, values in fields.items():
        there = [value for value in values if value != NONE]
        if len(there) < len(values):
            found.append(Attribute(name, name, tuple(there), True))
        if len(there) > 1 and len(values) > 2:
            found += [Attribute(f"{name}:{value}", name, (value,), False) for value in there]
        elif len(there) > 1:
            found.append(Attribute(f"{name}:{there[0]}", name, (there[0],), True))
    return found


def read_fields(folder: Path | str) -> dict[str, list[str]] | None:
    """The fields of a folder of labelled shards, by its manifest; None for other data."""
    try:
        fields = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))["fields"]
        return {str(name): [str(value) for value in values] for name, values in fields.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_labelled(folder: Path | str, size: int, limit: int | None = None) -> Labelled:
    """The pictures of a folder of labelled shards at `size`, the first `limit` of them.

    Raises ValueError for other data, and for a sample that cannot be read or has other fields or values.
    """
    fields = read_fields(folder)
    if not fields:
        raise ValueError(f"{folder} holds no labelled pictures; expected what `kartina data avatars OUT` writes")
    shards = [load_index(shard) for shard in find_shards(folder)]
    total = sum(len(index.entries) for index in shards)
    total = total if limit is None else min(total, limit)
    pixels, labels = torch.empty(total, size, size, 3, dtype=torch.uint8), np.empty((total, len(fields)), np.int64)
    row = 0
    with progress_bar(f"reading {folder}", transient=True) as report:
        for index in shards:
            with open(index.path, "rb") as file:
                for entry in index.entries[: total - row]:
                    try:
                        picture, _ = read_sample(file, entry)
                        labels[row] = _places(decode("json", read_member(file, entry, "json")), fields)
                    except (BadSample, KeyError, ValueError, TypeError) as error:
                        named = f"{index.path.name.removesuffix('.tar')}/{entry.key}"
                        raise ValueError(f"{named} is no labelled picture: {error!r}; write the data again") from error
                    pixels[row] = to_uint8(fit(picture, size)[None])[0]
                    row += 1
                    report(row, total)
    return Labelled(fields, pixels, torch.from_numpy(labels))


def _places(facts: Any, fields: dict[str, list[str]]) -> list[int]:
    attributes = facts["attributes"]
    return [values.index(attributes[name]) for name, values in fields.items()]
