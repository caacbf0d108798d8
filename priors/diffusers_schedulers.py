"""Any scheduler of diffusers that takes betas, by the name of its class, as one of our samplers.

The scheduler is given our schedule, and v as what the network predicts, whatever it does predict. Its own draws come
from a torch generator for each sample, seeded by the sample's seed, so that sample k is the same at any batch size.

B samples of `shape`, as (C, h, w).

It does not know what the scheduler does. diffusers is imported when a sampler is asked for.
"""

import difflib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..layers.precision import full
from ..layers.random import normal
from .denoiser import Denoise
from .diffusion_samplers import SAMPLERS, Keep
from .schedules import Schedule

_STEP = ["model_output", "timestep", "sample"]


def find_sampler(name: str) -> Callable[..., Tensor]:
    """A sampler by name: one of `SAMPLERS`, or the class of a scheduler of diffusers, as DEISMultistepScheduler.

    Raises ValueError for any other name, with the nearest valid one.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    known = _schedulers() if name.endswith("Scheduler") else {}
    if name in known:
        return partial(_walk, known[name])
    close = difflib.get_close_matches(name, known or SAMPLERS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "or the name of a scheduler of diffusers that takes betas"
    raise ValueError(f"no sampler {name!r:.60}; valid: {', '.join(SAMPLERS)}; {hint}")


def check_signal(name: str, schedule: Schedule) -> None:
    """Raises ValueError where a scheduler of diffusers would divide by the signal that a schedule does not leave."""
    if schedule.alpha_bar[-1] == 0:
        raise ValueError(
            f"{name} needs a schedule that keeps some signal, and this one has zero terminal SNR; choose one of "
            f"{', '.join(SAMPLERS)}"
        )


@cache
def _schedulers() -> dict[str, Any]:
    """The schedulers for which the betas and what is predicted may be chosen, by the name of their class."""
    import diffusers

    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {name: each for name, each in found.items() if _fits(each, diffusers.SchedulerMixin)}


def _fits(scheduler: Any, mixin: Any) -> bool:
    """Whether its betas and what is predicted may be chosen, and its steps go from noise to picture by one look."""
    whole = inspect.isclass(scheduler) and issubclass(scheduler, mixin) and "Inverse" not in scheduler.__name__
    if not whole or not {"trained_betas", "prediction_type"} <= _accepts(scheduler):
        return False
    if "noise_sampler_seed" in _accepts(scheduler):  # its noise is of one seed for a whole batch
        return False
    return list(inspect.signature(scheduler.step).parameters)[1:4] == _STEP


def _accepts(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@torch.no_grad()
def _walk(
    scheduler_class: Any,
    denoise: Denoise,
    condition: Any,
    shape: tuple[int, ...],
    seeds: Tensor,
    num_steps: int = 50,
    start: Tensor | None = None,
    strength: float = 1.0,
    noise: Tensor | None = None,
    keep: Keep | None = None,
    progress: Callable[[int, int], None] | None = None,
    **config: Any,
) -> Tensor:
    """A sampler; the knobs as in `diffusion_samplers.Walk`, config of the scheduler's constructor.

    Raises ValueError for a schedule with zero terminal SNR, of which the schedulers make numbers that are not finite,
    and for a start where a scheduler's first steps are unlike the others.
    """
    check_signal(scheduler_class.__name__, denoise.schedule)
    scheduler = _build(scheduler_class, denoise.schedule.betas, config)
    scheduler.set_timesteps(num_steps, device=seeds.device)  # some compare a timestep with their own
    accepted = _accepts(scheduler.step)
    own = {"generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds]} if "generator" in accepted else {}
    eps = full(noise) if noise is not None else normal(0, 0, seeds, shape, "sampler start")
    times = scheduler.timesteps.to(seeds.device)
    first = (num_steps - round(strength * num_steps)) * scheduler.order  # looks a step
    if start is not None and len(times) not in (num_steps * scheduler.order, num_steps * scheduler.order - 1):
        raise ValueError(
            f"{scheduler_class.__name__} cannot begin in the middle, for it takes {len(times)} looks in {num_steps} "
            f"steps; choose another sampler, as {', '.join(SAMPLERS)}"
        )
    x = eps * scheduler.init_noise_sigma
    if start is not None:
        if hasattr(scheduler, "set_begin_index"):  # those that count their steps
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(full(start), eps, times[first].expand(len(x))) if first < len(times) else full(start)
    for i, t in enumerate(times[first:], start=first):
        given = scheduler.scale_model_input(x, t)
        found = denoise(given, t.expand(len(x)), condition)
        alpha, sigma = denoise.schedule.at(t.expand(len(x)), x)
        x = scheduler.step(alpha * found.eps - sigma * found.x_0, t, x, **own).prev_sample
        whole = (i + 1) % scheduler.order == 0 or i + 1 == len(times)  # of half a step not all tell the noise
        if keep is not None and whole:
            known = full(keep.x_0)
            if i + 1 < len(times):
                known = scheduler.add_noise(known, eps, times[i + 1].expand(len(x)))
            x = torch.lerp(x, known, keep.mask.to(x))
        if progress is not None:
            progress(i + 1 - first, len(times) - first)
    return x


def _build(scheduler_class: Any, betas: Tensor, config: dict[str, Any]) -> Any:
    ours = {"num_train_timesteps": len(betas), "trained_betas": betas.numpy(), "prediction_type": "v_prediction"}
    if "clip_sample" in _accepts(scheduler_class):
        ours["clip_sample"] = False  # see `denoiser.Clipped`
    if "snr_shift_scale" in _accepts(scheduler_class):
        ours["snr_shift_scale"] = 1.0  # or the betas would not be those of the network
    unknown = [key for key in config if key in ours or key not in _accepts(scheduler_class)]
    if unknown:
        raise ValueError(f"{scheduler_class.__name__} has no knob {unknown[0]!r}; see its constructor in diffusers")
    return scheduler_class(**ours, **config)
