"""The scheduler_config.json of diffusers to the noise and the sampler of a recipe, and back.

A config comes from anyone: noise that ours does not make is an error. Of the steps themselves the spacing goes along
where ours means the same by it; an offset and the order of a solver are left to our sampler of that name. The other
way, what their class would do otherwise than ours is an error too; guidance is no part of a config.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from ..priors.diffusion_samplers import SAMPLERS
from .denoising import ends_of
from .recipe import Recipe

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_DEFAULT = "dpmpp_2m"  # for a scheduler of which we have none
# Ours: the class there that makes the same steps, and how it has to be set for it.
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
}
_BETWEEN = {"euler", "euler_ancestral", "heun"}  # step between timesteps, by default


def noise_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `diffusion` of a recipe. Raises ValueError for betas or a prediction that ours has no word for."""
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        name = config.get("_class_name")
        raise ValueError(f"the scheduler must make its noise from betas, got {name!r:.40} of flow matching or EDM")
    schedules = {theirs: ours for ours, theirs in _SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    kind, predicted = config["beta_schedule"], config.get("prediction_type", "epsilon")
    if config.get("trained_betas") is not None or kind not in schedules or predicted not in predictions:
        raise ValueError(
            f"the scheduler must have no trained_betas, a beta_schedule among {', '.join(schedules)} and a "
            f"prediction_type among {', '.join(predictions)}, got {kind!r:.40} and {predicted!r:.40}"
        )
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return {
        "schedule": schedules[kind],
        "num_timesteps": config.get("num_train_timesteps", 1000),
        **({} if schedules[kind] == "cosine" else ends),
        "zero_terminal": bool(config.get("rescale_betas_zero_snr", False)),
        "prediction": predictions[predicted],
    }


def sampling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `sampler` that a scheduler is, and its `spacing` where ours means the same by it and does not take it anyway.

    `dpmpp_2m` where there is none, as for Stable Diffusion's PNDM. That of a latent consistency model, or of weights
    that its LoRA was merged into, takes few steps, of its own kind, without guidance.
    """
    if config.get("_class_name") == "LCMScheduler":
        return {"sampler": "LCMScheduler", "num_steps": 4, "guidance_scale": 1.0}
    name, algorithm = config.get("_class_name"), config.get("algorithm_type", "dpmsolver++")
    for ours, (theirs, settings) in _CLASSES.items():
        if name == theirs and settings.get("algorithm_type", algorithm) == algorithm:
            karras = config.get("use_karras_sigmas") and not config.get("rescale_betas_zero_snr")
            spacing = "karras" if karras else str(config.get("timestep_spacing"))
            keeps = ours in _BETWEEN and spacing in ("karras", "trailing")
            return {"sampler": ours, **({"spacing": spacing} if keeps else {})}
    return {"sampler": _DEFAULT}


def scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """A scheduler of diffusers with the recipe's noise, that takes the steps of its sampler.

    Raises ValueError where that class takes others: it cannot be set so, its steps begin at timestep 0 ("leading"),
    which their pipeline of Stable Diffusion moves by one, it rounds timesteps that ours does not ("linspace" and
    "karras" of the samplers from timestep to timestep), or the recipe names one of their classes, which has a spacing
    of its own here.
    """
    import diffusers  # slow to import

    noise, knobs = recipe.diffusion, recipe.sampling
    sampler, spacing = knobs.get("sampler", _DEFAULT), knobs.get("spacing")
    if sampler not in SAMPLERS:
        raise ValueError(
            f"{recipe.name}: sampling.sampler {sampler} has its own steps; set one of {', '.join(SAMPLERS)}"
        )
    if sampler == "heun" and noise.schedule == "cosine":
        raise ValueError(
            f"{recipe.name}: HeunDiscreteScheduler's first step from cosine noise leads far off, which ours does not "
            "take; set another sampling.sampler"
        )
    eta = knobs.get("eta") or 0.0
    if eta:
        raise ValueError(f"{recipe.name}: sampling.eta is {eta}, which no config of diffusers holds; leave it out")
    name, settings = _CLASSES[sampler]
    spacing = spacing or ("linspace" if sampler in _BETWEEN else "trailing")
    config = {
        **settings,
        **({"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}),
        **ends_of(noise),
        "beta_schedule": _SCHEDULES[noise.schedule],
        "num_train_timesteps": noise.num_timesteps,
        "prediction_type": _PREDICTIONS[noise.prediction],
        "steps_offset": 1,  # of "leading" alone; their pipeline warns of any other number
        **({"rescale_betas_zero_snr": True} if noise.zero_terminal else {}),
    }
    lacking = [key for key in config if key not in inspect.signature(getattr(diffusers, name)).parameters]
    if lacking or spacing == "leading" or (spacing in ("linspace", "karras") and sampler not in _BETWEEN):
        what = lacking[0] if lacking else f"spacing {spacing!r} that takes the steps of {sampler}"
        raise ValueError(f"{recipe.name}: {name} of diffusers has no {what}; set another sampling.sampler or spacing")
    return {"_class_name": name, **config}
