"""Whether what a part was trained as is what a recipe builds.

Not every change shows in the shapes of the weights: another number of heads changes what they mean. What is left to
its default is equal to what is written as such.
"""

from pathlib import Path
from typing import Any

from .checkpoint import ModelError, file_hash, hashes
from .denoising import noise_of
from .recipe import Recipe, is_pretrained, reads_captions, section_of


def differences(recipe: Recipe, theirs: Recipe, part: str) -> list[str]:
    """What of a part that both recipes have differs, "KEY: THEIRS, the recipe OURS"; of a U-Net the noise too."""
    ours, held = section_of(recipe, part), section_of(theirs, part)
    if ours["kind"] == held["kind"] == "unet":
        ours, held = ours | noise_of(recipe), held | noise_of(theirs)
    return [
        f"{key}: {held.get(key)}, the recipe {ours.get(key)}"
        for key in sorted(ours | held)
        if ours.get(key) != held.get(key)
    ]


def built_otherwise(entries: dict[str, Any], recipe: Recipe) -> list[str]:
    """The parts, of these entries of a card, that were trained from another section than the recipe's."""
    return [part for part, entry in entries.items() if not _as_trained(recipe, part, entry.get("identity", {}))]


def check_built(folder: Path, card: dict[str, Any], recipe: Recipe) -> None:
    """Raises ModelError where the recipe of a model folder is not what its parts were trained from."""
    for part in built_otherwise(card["parts"], recipe):
        raise ModelError(f"{folder}: recipe.yaml builds another {part} than was trained; copy again")


def check_whole(folder: Path, card: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """The hashes of all that a model folder has. Raises ModelError as `check_built`, and where a part was trained
    against other parts, or captions, than lie beside it.
    """
    found = hashes(card, recipe)
    if reads_captions(recipe):
        found["captions"] = file_hash(folder / "captions.json")
    for part, entry in card["parts"].items():
        for other, digest in entry.get("trained_against", {}).items():
            if found.get(other) != digest:
                raise ModelError(
                    f"{folder}: {part} was trained against another {other}; put that one back, or train again"
                )
    check_built(folder, card, recipe)
    return found


def _as_trained(recipe: Recipe, part: str, identity: dict[str, Any]) -> bool:
    beside = identity.get("beside", {})
    if any(is_pretrained(recipe, other) and recipe.parts[other] != section for other, section in beside.items()):
        return False
    if part not in recipe.parts:
        return "part" not in identity
    section = identity.get("part") or recipe.parts[part]
    if section.get("kind") != recipe.parts[part]["kind"]:
        return False
    held = {"parts": recipe.parts | {part: section}, "diffusion": identity.get("diffusion", recipe.diffusion)}
    try:  # a card is not trusted
        return not differences(recipe, Recipe.model_validate(recipe.model_dump() | held), part)
    except ValueError:
        return False
