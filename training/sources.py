"""The sources that the `data` section of a recipe names: what is trained on, and what is measured on.

It does not know stages. Nothing heavy is imported before a source is asked for.
"""

from pathlib import Path
from typing import Any

from ..pipeline.recipe import Recipe, RecipeError
from .cache import check_data
from .run import Data, training_of


def source_of(recipe: Recipe, data: Data) -> Any:
    """The source of pictures and captions that a recipe names. Raises RecipeError for `shards` without a folder."""
    check_data(data)
    if data.kind == "shapes":
        from .data.shapes import ShapesSource

        size, languages = recipe.image_size, data.languages
        return ShapesSource(
            size, data.seed, data.levels, languages=languages, jitter=data.jitter, contrast=data.contrast
        )
    if data.kind == "digits":
        from .data.digits import DigitsSource

        return DigitsSource(recipe.image_size, data.seed, part="train", share=data.validation_share)
    from .stream import ShardSource

    if data.shards is None:
        raise RecipeError(f"{recipe.name}: training.data.shards is not set; pass training.data.shards=FOLDER")
    if data.validation is not None or not data.validation_share:
        return ShardSource(data.shards, recipe.image_size, data.seed, data.window)
    return ShardSource(
        data.shards, recipe.image_size, data.seed, data.window, part="train", share=data.validation_share
    )


def classes_of(data: Data) -> int | None:
    """How many classes the labels of the data have, None where it has no labels."""
    return 10 if data.kind == "digits" else None


def held_out(recipe: Recipe, trained_on: set[str], shards: Path) -> tuple[bool, Any]:
    """Whether a model was trained on shards, and then what it held out of them, or None.

    trained_on: fingerprints of data, as its card tells them.
    """
    try:
        config = training_of(recipe).data
    except RecipeError:  # it was converted, or written by another version
        return False, None
    if config.kind != "shards":
        return False, None
    config = config.model_copy(update={"shards": str(shards)})
    if source_of(recipe, config).fingerprint not in trained_on:
        return False, None
    return True, None if config.validation is not None else validation_of(recipe, config)


def expect_captions(source: Any, read: bool) -> None:
    """Says whether a stage reads the captions of a source; those of `shards` may lack them."""
    if hasattr(source, "captioned"):
        source.captioned = read


def validation_of(recipe: Recipe, data: Data) -> Any:
    """Where the headline metrics are measured, or None: `shapes` has meanings that training never shows."""
    if data.kind == "shapes":
        from .data.shapes import ShapesSource

        size, languages = recipe.image_size, data.languages
        return ShapesSource(size, data.seed, split="S2none", languages=languages, jitter=data.jitter)
    from .data.digits import DigitsSource
    from .stream import ShardSource

    rest: Any
    if data.kind == "digits":
        rest = DigitsSource(recipe.image_size, data.seed, part="validation", share=data.validation_share)
    elif data.validation is not None:
        return ShardSource(data.validation, recipe.image_size, data.seed, data.window)
    elif data.shards is None or not data.validation_share:
        return None
    else:
        share = data.validation_share
        rest = ShardSource(data.shards, recipe.image_size, data.seed, data.window, part="validation", share=share)
    return rest if rest.size else None
