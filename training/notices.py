"""The licence of what a model was trained on: its notices travel with it, and its recipe must name it."""

import hashlib
from pathlib import Path
from typing import Any

from ..pipeline.recipe import Recipe, RecipeError


def copy(notices: Path, model: Path) -> None:
    """Copies the files of a folder of notices, if there is one, to the LICENSES of a model folder.

    Where another notice has the name already, the name gets the first digits of the text's hash. Raises RecipeError for
    a link that leaves the folder.
    """
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


def check_licence(recipe: Recipe, card: dict[str, Any], why: str) -> None:
    """Raises RecipeError where a card names a licence that the recipe does not name. why: it should."""
    missing = set(card["licence"].split(" AND ")) - set(recipe.licence.split(" AND "))
    if missing:
        raise RecipeError(
            f"{why} ({' AND '.join(sorted(missing))}), not named by the recipe; "
            f"write licence={' AND '.join([recipe.licence, *sorted(missing)])!r}"
        )
