"""A recipe's diffusion prior as the denoiser that its objective and its samplers call.

It does not know how the prior was trained.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..priors.denoiser import Denoiser
from ..priors.schedules import SCHEDULES, Schedule, new_schedule
from .recipe import Diffusion, Recipe, RecipeError


def ends_of(noise: Diffusion) -> dict[str, float]:
    """The ends of beta, as stated or the schedule's own; {} of a schedule that has none."""
    own = inspect.signature(SCHEDULES[noise.schedule]).parameters
    return {end: getattr(noise, end) or own[end].default for end in ("beta_start", "beta_end") if end in own}


def noise_of(recipe: Recipe) -> dict[str, Any]:
    """The `diffusion` section of a recipe, with the ends of beta that its schedule has by default."""
    return recipe.diffusion.model_dump() | ends_of(recipe.diffusion)


def schedule_of(recipe: Recipe) -> Schedule:
    """The noise schedule of a recipe. Raises RecipeError for ends of beta where the schedule has none."""
    given = recipe.diffusion
    ends = {name: value for name in ("beta_start", "beta_end") if (value := getattr(given, name)) is not None}
    if ends and given.schedule == "cosine":
        raise RecipeError(f"{recipe.name}: diffusion: the cosine schedule has no {' or '.join(ends)}; leave it out")
    return new_schedule(given.schedule, given.num_timesteps, given.zero_terminal, **ends)


def denoiser_of(recipe: Recipe, network: Callable[[Tensor, Tensor, Any], Tensor]) -> Denoiser:
    """The network by what the recipe says of it. Raises RecipeError where this cannot be, as eps without any signal."""
    try:
        return Denoiser(network, schedule_of(recipe), recipe.diffusion.prediction)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: diffusion: {error}") from None
