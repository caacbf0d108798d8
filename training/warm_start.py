"""The trained model that a run begins with: what a recipe's stages take over from its folder.

It does not know what a stage trains.
"""

from pathlib import Path
from typing import Any

from ..pipeline import checkpoint, notices
from ..pipeline.built import check_built, differences
from ..pipeline.recipe import Recipe, RecipeError, is_frozen, is_pretrained, reads_captions
from ..tokenizers.autoencoder import LatentScale
from .run import Stage

_KEPT = ("trained_against", "identity", "computed_in")  # of a part's entry in a card


def check(recipe: Recipe, stages: dict[str, tuple[Any, Stage]], origin: Path, model: Path) -> None:
    """Raises ValueError unless these stages, by name (class, configuration), can begin with the model of a folder.

    One whose part the model lacks begins anew, over the parts of it that it reads. model: the model folder of the run,
    in which there may be parts already.
    """
    if origin.resolve() == model.resolve():
        raise RecipeError(f"{origin} is what this run writes; begin another run with it, by --run FOLDER")
    card, theirs = checkpoint.read_card(origin), checkpoint.load_recipe(origin)
    check_built(origin, card, theirs)
    for name, (kind, config) in stages.items():
        if name not in card["parts"]:
            if card["parts"].keys().isdisjoint(kind.needs(recipe)):
                raise RecipeError(
                    f"{origin} has no {name} to begin with, nor anything that it reads, it has "
                    f"{', '.join(card['parts'])}; train only these by --stage, and then the others without --from"
                )
            _check_below(recipe, kind.needs(recipe), origin, model, [*stages])
            continue
        for knob in config.objective:
            if knob in kind.knobs and kind.knobs[knob].anew and round(config.number(knob, 0) * config.steps):
                raise RecipeError(
                    f"stages.{name}.objective.{knob}: codes would begin anew after that share of the steps, and those "
                    f"of {origin} be lost; set it to 0"
                )
    notices.check_licences(recipe, notices.of_model(card), f"what is trained from {origin} is under its licence too")
    begun = [part for name, (kind, _) in stages.items() for part in began_with(recipe, origin, (name, *kind.beside))]
    along = comes_along(recipe, origin, model, list(stages))
    for part in (*begun, *along):
        for other in differences(recipe, theirs, part) if part in theirs.parts else ["was built by no recipe"]:
            raise RecipeError(
                f"{origin}: its {part} has {other}; write parts.{part} and diffusion as in its recipe.yaml, or begin "
                "without --from"
            )
        checkpoint.load_part(origin, recipe, part)
    if reads_captions(recipe) and (origin / "captions.json").is_file():
        checkpoint.read_captions(origin, theirs)
        if theirs.captions != recipe.captions:
            raise RecipeError(
                f"{origin}: its captions have {theirs.captions}, the recipe's {recipe.captions}; write captions as in "
                "its recipe.yaml, or begin without --from"
            )
    for part in begun:
        _check_read(recipe, origin, model, part, {*begun, *stages, *along, "captions"})


def _check_below(recipe: Recipe, read: tuple[str, ...], origin: Path, model: Path, names: list[str]) -> None:
    """What a stage that begins anew reads of the model must be what the run then has."""
    entries, own = checkpoint.read_card(origin)["parts"], checkpoint.parts_in(model)
    along = comes_along(recipe, origin, model, names)
    for part in read:
        here = own.get(part, {}).get("hash") == entries.get(part, {}).get("hash")
        if part in entries and part not in along and part not in names and not here:
            raise RecipeError(
                f"{model} has another {part} than {origin}, which would not be read; take another --run, or leave out "
                "--from"
            )


def _check_read(recipe: Recipe, origin: Path, model: Path, part: str, taken: set[str]) -> None:
    """What a part was trained against must be there, or what grows out of it; taken: stages and parts from `origin`."""
    entries, own = checkpoint.read_card(origin)["parts"], checkpoint.parts_in(model)
    for other, wanted in entries[part].get("trained_against", {}).items():
        theirs = entries.get(other, {})
        maker = theirs.get("identity", {}).get("stage", other)
        if taken & {maker, other} or is_pretrained(recipe, other):
            if wanted != _hash(recipe, origin, entries, other):
                raise RecipeError(
                    f"{origin}: its {part} was trained against another {other} than it would read now, "
                    "and would read it wrongly; take another model"
                )
        elif other not in own:
            raise RecipeError(
                f"the {part} of {origin} was trained against a {other}, which is neither there nor in {model}; "
                f"train the {other} first, or the {part} without --from"
            )
        else:
            grown = own[other].get("identity", {}).get("from") or {}
            same = wanted in (own[other]["hash"], grown.get(other))
            if not same and (maker == other or grown.get(maker) != entries.get(maker, {}).get("hash")):
                raise RecipeError(
                    f"the {part} of {origin} was trained against another {other} than that of {model}, and would "
                    f"read it wrongly; take another --run, or train the {part} without --from"
                )


def _hash(recipe: Recipe, origin: Path, entries: dict[str, Any], other: str) -> str | None:
    """Of what a part of the model reads now: another part, the captions, or what comes pretrained."""
    if other == "captions":
        path = origin / "captions.json"
        return checkpoint.file_hash(path) if path.is_file() else None
    if is_pretrained(recipe, other):
        return checkpoint.pretrained_hash(recipe, other)
    return entries.get(other, {}).get("hash")


def comes_along(recipe: Recipe, origin: Path, model: Path, names: list[str]) -> list[str]:
    """The parts that a run takes over as they are.

    Those that it has not, that no named stage trains, and that were trained against nothing else than what is there.
    """
    entries = checkpoint.read_card(origin)["parts"]
    own = checkpoint.parts_in(model)
    stage = {part: entry.get("identity", {}).get("stage", part) for part, entry in entries.items()}
    along = {part for part in entries.keys() & recipe.parts.keys() if not is_pretrained(recipe, part)}
    along -= own.keys() | set(names)
    if "prior" in names and not is_frozen(recipe, "text"):
        along -= {"text"}  # it trains with the prior
    if "clip" in names and stage.get("text") == "clip":
        along -= {"text"}  # it is the text tower

    def is_there(other: str, wanted: str) -> bool:
        if other == "captions" or is_pretrained(recipe, other):
            return wanted == _hash(recipe, origin, entries, other)
        return wanted == own.get(other, entries[other] if other in along else {}).get("hash")

    while lost := {
        part for part in along if not all(is_there(*read) for read in entries[part].get("trained_against", {}).items())
    }:
        along -= lost
    return sorted(along)


def take_over(recipe: Recipe, origin: Path, model: Path, names: list[str]) -> None:
    """Copies to the run's model folder what comes along, and the notices of the data."""
    notices.copy(origin / "LICENSES", model)
    for part in comes_along(recipe, origin, model, names):
        copy_part(origin, recipe, part, model)


def copy_part(origin: Path, recipe: Recipe, part: str, model: Path) -> str:
    """Copies a part to a model folder of this recipe as it is, with what its card says of it. Returns its hash."""
    entry = checkpoint.read_card(origin)["parts"][part]
    facts = {key: entry[key] for key in _KEPT if key in entry}
    return checkpoint.save_part(model, recipe, part, checkpoint.load_weights(origin, part), **facts)


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
