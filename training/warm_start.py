"""The trained model that a run begins with: what a recipe's stages take over from its folder.

It does not know what a stage trains.
"""

import shutil
from pathlib import Path
from typing import Any

from ..pipeline import checkpoint
from ..pipeline.denoising import noise_of
from ..pipeline.recipe import Recipe, RecipeError, is_frozen, is_pretrained, section_of
from ..tokenizers.autoencoder import LatentScale
from .run import Stage

_ANEW = ("kmeans", "autoencoder")  # shares of the steps after which codes begin anew


def check(recipe: Recipe, stages: dict[str, tuple[Any, Stage]], origin: Path, model: Path) -> None:
    """Raises RecipeError unless these stages, by name (class, configuration), can begin with the model of a folder.

    model: the model folder of the run, in which there may be parts already.
    """
    if origin.resolve() == model.resolve():
        raise RecipeError(f"{origin} is what this run writes; begin another run with it, by --run FOLDER")
    entries, theirs = checkpoint.read_card(origin)["parts"], checkpoint.load_recipe(origin)
    along = comes_along(recipe, origin, model, list(stages))
    for part in along:
        _check_built(recipe, theirs, origin, part)
    for name, (kind, config) in stages.items():
        if name not in entries:
            raise RecipeError(
                f"{origin} has no {name} to begin with, it has {', '.join(entries)}; train only these by --stage, and "
                "then the others without --from"
            )
        begun = began_with(recipe, origin, (name, *kind.beside))
        for part in begun:
            _check_built(recipe, theirs, origin, part)
        for knob in _ANEW:
            if round(config.number(knob, 0) * config.steps):
                raise RecipeError(
                    f"stages.{name}.objective.{knob}: codes would begin anew after that share of the steps, and those "
                    f"of {origin} be lost; set it to 0"
                )
        for other, wanted in entries[name].get("trained_against", {}).items():
            if other not in (*stages, *begun, *along, "captions") and not is_pretrained(recipe, other):
                _check_read(origin, model, name, other, wanted)
    missing = set(checkpoint.read_card(origin)["licence"].split(" AND ")) - set(recipe.licence.split(" AND "))
    if missing:
        raise RecipeError(
            f"what is trained from {origin} is under its licence too ({' AND '.join(sorted(missing))}), not named "
            f"by the recipe; write licence={' AND '.join([recipe.licence, *sorted(missing)])!r}"
        )


def _check_built(recipe: Recipe, theirs: Recipe, origin: Path, part: str) -> None:
    """Not every change shows in the shapes of the weights: another number of heads changes what they mean."""
    ours, held = (section_of(one, part) for one in (recipe, theirs))
    changed = [key for key in sorted(ours | held) if _plain(ours.get(key)) != _plain(held.get(key))]
    if changed:
        raise RecipeError(
            f"{origin}: its {part} has {changed[0]}: {held.get(changed[0])}, the recipe {ours.get(changed[0])}; "
            f"write parts.{part} as in its recipe.yaml, or begin without --from"
        )
    if ours["kind"] == "unet" and noise_of(recipe) != noise_of(theirs):
        raise RecipeError(
            f"{origin}: its noise is {noise_of(theirs)}, the recipe's {noise_of(recipe)}; write diffusion as there"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_read(origin: Path, model: Path, name: str, other: str, wanted: str) -> None:
    """What a part was trained against must be there still, or have grown out of it."""
    entry = checkpoint.parts_in(model).get(other, {})
    if wanted not in (entry.get("hash"), (entry.get("identity", {}).get("from") or {}).get(other)):
        raise RecipeError(
            f"the {name} of {origin} was trained against another {other} than that of {model}, and would read it "
            f"wrongly; take another --run, or train the {name} without --from"
        )


def comes_along(recipe: Recipe, origin: Path, model: Path, names: list[str]) -> list[str]:
    """The parts that a run takes over as they are.

    Those that it has not, that no named stage trains, and that were trained against nothing else than what is there.
    """
    entries = checkpoint.read_card(origin)["parts"]
    own = checkpoint.parts_in(model)
    stage = {part: entry.get("identity", {}).get("stage", part) for part, entry in entries.items()}
    along = set(entries.keys() & recipe.parts.keys()) - own.keys() - set(names)
    if "prior" in names and not is_frozen(recipe, "text"):
        along -= {"text"}  # it trains with the prior
    if "clip" in names and stage.get("text") == "clip":
        along -= {"text"}  # it is the text tower
    kept = {part for part, entry in own.items() if entry["hash"] == entries.get(part, {}).get("hash")}
    known = along | kept | {"captions"} | {part for part in recipe.parts if is_pretrained(recipe, part)}
    while lost := {part for part in along if not entries[part].get("trained_against", {}).keys() <= known}:
        along, known = along - lost, known - lost
    return sorted(along)


def take_over(recipe: Recipe, origin: Path, model: Path, names: list[str]) -> None:
    """Copies to the run's model folder what comes along, and the notices of the data."""
    for notice in (origin / "LICENSES").glob("*"):
        if notice.is_file() and not notice.is_symlink():
            (model / "LICENSES").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(notice, model / "LICENSES" / notice.name)
    for part in comes_along(recipe, origin, model, names):
        facts = dict(checkpoint.read_card(origin)["parts"][part])
        del facts["hash"]
        checkpoint.save_part(model, recipe, part, checkpoint.load_weights(origin, part), **facts)


def began_with(recipe: Recipe, origin: Path, parts: tuple[str, ...]) -> dict[str, str]:
    """The hashes of what a stage that trains these parts begins with."""
    entries = checkpoint.read_card(origin)["parts"]
    ours = [part for part in parts if part in recipe.parts and part in entries and not is_frozen(recipe, part)]
    return {part: entries[part]["hash"] for part in ours}


def begin(stage: Any, recipe: Recipe, origin: Path, parts: list[str]) -> None:
    """Gives the networks of a stage the weights of the model, of these parts that it exports (see `began_with`).

    What only training needs is new, and so is what is measured at its end, the scale of latents. k-means is left out.
    """
    stage.restart_step = None
    networks = stage.exported()
    for part in parts:
        network = networks[part]
        weights = checkpoint.load_part(origin, recipe, part).state_dict()
        unknown = network.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, unknown
        for module in network.modules():
            if isinstance(module, LatentScale):
                module.forget()
