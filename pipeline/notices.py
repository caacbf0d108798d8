"""The licence of what a model was trained on: its notices travel with it, and its recipe must name it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .recipe import Recipe, RecipeError

_AND = " AND "
_NONE = "not stated"
_FREE = {"CC0-1.0", _NONE}  # asks for nothing, or for what nobody knows


def copy(notices: Path, model: Path) -> None:
    """Copies the files of a folder of notices, if there is one, to the LICENSES of a model folder.

    Where another notice has the name already, the name gets the first digits of the text's hash. Raises RecipeError for
    a link that leaves the folder, or a folder that is one.
    """
    if notices.is_symlink():
        raise RecipeError(f"{notices} is a link; put the folder itself there")
    for notice in sorted(notices.rglob("*")):
        if not notice.resolve().is_relative_to(notices.resolve()):
            raise RecipeError(f"{notice} is a link that leaves {notices}; put the file itself there")
        if not notice.is_file():
            continue
        text, path = notice.read_bytes(), model / "LICENSES" / notice.relative_to(notices)
        if path.exists() and path.read_bytes() != text:
            path = path.with_stem(f"{path.stem}-{hashlib.sha256(text).hexdigest()[:8]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def of_model(card: dict[str, Any]) -> list[str]:
    """The licences that a card names."""
    names: list[str] = card["licence"].split(_AND)
    return names


def of_data(shards: Path) -> list[str]:
    """The licences that the manifest of a folder of shards names; none where it has no manifest, or names none."""
    try:
        manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
        return [name for one in manifest["licences"] for name in str(one["licence"]).split(_AND)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def joined(names: Iterable[str]) -> str:
    """Licences as one, each once; what is not stated only where nothing else is."""
    known = dict.fromkeys(names)
    return _AND.join(name for name in known if name != _NONE or len(known) == 1)


def check_licences(recipe: Recipe, names: Iterable[str], why: str) -> None:
    """Raises RecipeError where the recipe does not name one of these licences. why: it should."""
    named = recipe.licence.split(_AND)
    missing = sorted(set(names) - _FREE - set(named))
    if missing:
        raise RecipeError(
            f"{why} ({_AND.join(missing)}), not named by the recipe; write licence={joined([*named, *missing])!r}"
        )
