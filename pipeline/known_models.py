"""The models that can be named: shipped ones, those trained under ./runs, folders, the hub's; and a model's one hash.

It does not know what a model is made of.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..tokenizers.captions import CaptionTokenizer
from . import checkpoint, published
from .denoising import noise_of
from .recipe import Recipe, nearest, section_of
from .shared import SHIPPED


def known_models() -> dict[str, Path]:
    """Model folders by name: shipped ones, then those trained under ./runs.

    One whose card is unreadable is left out with a warning.
    """
    return {name: folder for name, folder in _folders().items() if _has_card(folder)}


def _folders() -> dict[str, Path]:
    shipped = {str(p.parent.relative_to(SHIPPED)): p.parent for p in sorted(SHIPPED.glob("*/*/card.json"))}
    runs = {str(p.parent): p.parent for p in sorted(Path("runs").glob("**/model/card.json"))}
    return shipped | runs


def _has_card(folder: Path) -> bool:
    try:
        checkpoint.read_card(folder)
    except (ValueError, OSError, RecursionError) as error:
        warnings.warn(f"{folder} is left out: {error}", stacklevel=3)
        return False
    return True


def find_model(name: str) -> Path:
    """A model by shipped name, path or hf-hub:OWNER/NAME; a run folder stands for the model folder in it.

    Raises ModelError naming the nearest known model.
    """
    known = _folders()
    if name in known or Path(name).exists():
        folder = known.get(name, Path(name))
        return folder / "model" if (folder / "model" / "card.json").is_file() else folder
    if name.startswith(published.HUB):
        return published.fetch(name)
    hint = nearest(name, list(known)) if known else "no model is here yet: train one with `kartina train shapes/dalle`"
    if name.count("/") == 1 and all(name.split("/")):
        hint += f" A model of the hub is named {published.HUB}{name}"
    raise checkpoint.ModelError(f"no model {name!r}; {hint}")


def model_hash(recipe: Recipe, hashes: Mapping[str, str], captions: CaptionTokenizer | None) -> str:
    """One sha256 for all that decides what a model paints, wherever it lies and whatever of its defaults is written.

    hashes: of its parts, see `checkpoint.hashes`; what is no part of the recipe does not count. captions: the caption
    tokenizer, where it has one.
    """
    facts = {
        "parts": {part: [digest, section_of(recipe, part)] for part, digest in hashes.items() if part in recipe.parts},
        "image_size": recipe.image_size,
        "diffusion": noise_of(recipe),
        "captions": None if captions is None else captions.definition(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_by_hash(wanted: str) -> Path:
    """The known model folder with this hash. Raises ModelError where there is none."""
    for folder in known_models().values():
        if _hash_of(folder) == wanted:
            return folder
    raise checkpoint.ModelError(
        f"no known model has the hash {wanted[:12]}...; `kartina models` lists the known ones, and --model names "
        "one that lies elsewhere"
    )


def _hash_of(folder: Path) -> str | None:
    """A model folder's hash; None where it cannot paint, for it is damaged or a pretrained part is not here."""
    try:
        card, recipe = checkpoint.read_card(folder), checkpoint.load_recipe(folder)
        return model_hash(recipe, checkpoint.hashes(card, recipe), checkpoint.load_captions(folder, recipe))
    except Exception:  # what is damaged raises anything
        return None
