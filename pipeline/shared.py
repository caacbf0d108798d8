"""Where a part's weights lie: in its model folder, or in a shipped model that has the very same part.

So that shipped models need not each have a copy of one CLIP, nor of the text tower that a prior reads.

It does not know what a part is, beyond its name and hash.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "models"
_OUTSIDE_TEXT = ("visual.", "text_projection", "logit_scale")  # what CLIP has beside its text tower


def place(folder: Path, entries: Mapping[str, Any], part: str) -> Path:
    """The file with the weights of a part, which may not be there.

    entries: of the card's parts. That of the folder itself, else of the shipped model whose part has the same hash,
    else, for a text encoder that was CLIP's text tower, that of the CLIP beside it.
    """
    own = folder / f"{part}.safetensors"
    if own.is_file() or part not in entries:
        return own
    for path in sorted(SHIPPED.glob(f"*/*/{own.name}")):
        if _hash(path.with_name("card.json"), part) == entries[part].get("hash"):
            return path
    tower = part == "text" and entries[part].get("identity", {}).get("stage") == "clip"
    if tower and (found := place(folder, entries, "clip")).is_file():
        return found
    return own


def _hash(card: Path, part: str) -> str | None:
    """Of a part, by a card; None where that cannot be read."""
    try:
        return json.loads(card.read_text(encoding="utf-8"))["parts"][part]["hash"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def text_tower(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Of CLIP's tensors those of its text tower, where they have the same names."""
    return {name: value for name, value in weights.items() if not name.startswith(_OUTSIDE_TEXT)}
