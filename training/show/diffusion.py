"""What diffusion does to a picture: the forward process q(x_t | x_0) (Ho 2020, arXiv:2006.11239, equation 4) at several
timesteps, and the way back from noise, in pixels and, where a model has a tokenizer, in its latents, decoded.

The signal-to-noise ratio is alpha_bar / (1 - alpha_bar) (Kingma 2021, arXiv:2107.00630, equation 1).

N timesteps, C x h x w of what a prior draws, S x S pixels.

It does not know how the prior was trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...layers.random import normal
from ...pipeline.denoising import schedule_of
from ...pipeline.drawing import DiffusionDrawing, Progress, sampler_of
from ...pipeline.images import fit, grid
from ...pipeline.recipe import sampling_knobs
from ...pipeline.text_to_image import TextToImage
from ...priors.denoiser import Denoise, Denoised
from ...priors.schedules import SCHEDULES, Schedule, new_schedule
from .panels import Column, page

Numbers = dict[str, list[dict[str, float]]]  # by schedule or model
_CELL, _SIDE = 128, 128  # pixels a side of a picture shown, and at most of one without a model


class Watched:
    """A denoiser that remembers what it was shown and what it said, of one sample: (t, x_t, x_0)."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.schedule = denoise, denoise.schedule
        self.seen: list[tuple[float, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Denoised:
        """See `Denoise`."""
        found = self.denoise(x_t, t, condition)
        self.seen.append((float(t[0]), x_t, found.x_0))
        return found


def times(schedule: Schedule, count: int) -> list[int]:
    """N timesteps from 0 to T - 1, in equal steps. Raises ValueError for fewer than two, or more than T."""
    if not 2 <= count <= schedule.num_timesteps:
        raise ValueError(f"the timesteps shown must number 2 to {schedule.num_timesteps}, got {count}")
    return torch.linspace(0, schedule.num_timesteps - 1, count).round().long().tolist()


def numbers(schedule: Schedule, t: float) -> dict[str, float]:
    """t with alpha_bar and snr there."""
    level = schedule.level(t)
    return {"t": t, "alpha_bar": level.alpha**2, "snr": (level.alpha / level.sigma) ** 2}


def forward(schedule: Schedule, x_0: Tensor, moments: Sequence[int], seed: int) -> Tensor:
    """x_0 (1, C, h, w) -> x_t of the same noise at each of N timesteps, (N, C, h, w)."""
    eps = normal(seed, 0, torch.zeros(1, dtype=torch.int64, device=x_0.device), tuple(x_0.shape[1:]), "show diffusion")
    t, many = torch.tensor(moments, device=x_0.device), (len(moments), -1, -1, -1)
    return schedule.diffuse(x_0.expand(many), t, eps.expand(many))


def reverse(
    draw: DiffusionDrawing, caption: str, seed: int, knobs: dict[str, Any], progress: Progress | None = None
) -> tuple[list[tuple[float, Tensor, Tensor]], Tensor]:
    """Each look on the way from noise, (t, x_t, x_0) of shape (1, C, h, w), and where it ends."""
    named = caption or draw.prior.num_classes is None  # of classes none is the empty caption
    condition = draw.condition([caption]) if named else draw.null(1)
    watched = Watched(draw.denoiser(condition, knobs))
    seeds = torch.tensor([seed], device=next(draw.prior.parameters()).device)
    return watched.seen, sampler_of(knobs)(watched, condition, draw.shape, seeds, progress=progress)


def schedules(shown: Image.Image, count: int = 8, seed: int = 0) -> tuple[Image.Image, Numbers]:
    """The page of a picture's centre square under noise by every schedule, and the numbers of the timesteps shown."""
    x_0 = fit(shown, min(*shown.size, _SIDE))[None]  # (1, 3, S, S)
    found: Numbers = {}
    strips = []
    for name in SCHEDULES:
        schedule = new_schedule(name)
        moments = times(schedule, count)
        found[name] = [numbers(schedule, t) for t in moments]
        noisy = torch.cat([x_0, forward(schedule, x_0, moments, seed)])
        strips.append((f"noise over the pixels, schedule {name}", _strip(noisy, ["x_0", *_labels(schedule, moments)])))
    return page("diffusion", [Column("", [], strips)]), found


@torch.inference_mode()
def of_model(
    shown: Image.Image,
    system: TextToImage,
    caption: str = "",
    count: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    **knobs: Any,
) -> tuple[Image.Image, Numbers]:
    """The same by a model's schedule, in its latents too, and its own way from noise under a caption, by knobs given.

    Raises ValueError for a system without a diffusion prior, and for knobs that it does not have.
    """
    draw = system.draw
    if not isinstance(draw, DiffusionDrawing):
        raise ValueError(f"{system.recipe.name} must have a diffusion prior to be shown, as shapes/stable-diffusion")
    schedule = schedule_of(system.recipe)
    moments, x_0 = times(schedule, count), fit(shown, system.recipe.image_size)[None]  # (1, 3, S, S)
    labels = ["x_0", *_labels(schedule, moments)]
    strips = [("noise over the pixels", _strip(torch.cat([x_0, forward(schedule, x_0, moments, seed)]), labels))]
    if draw.tokenizer is not None:
        z_0 = draw.encode(x_0)
        z = torch.cat([z_0, forward(schedule, z_0, moments, seed)])
        strips.append(("noise over the latents, decoded", _strip(_decoded(system, z), labels)))
    seen, end = reverse(draw, caption, seed, sampling_knobs(system.recipe, knobs, "knobs of painting"), progress)
    chosen = [seen[i] for i in torch.linspace(0, len(seen) - 1, min(count, len(seen))).round().long().tolist()]
    labels = [*_labels(schedule, [t for t, _, _ in chosen]), "the end"]
    under = f" under {caption!r:.60}" if caption else ""
    for place, head in ((1, f"from noise to a picture{under}"), (2, "what the network takes for x_0 there")):
        z = torch.cat([*(look[place] for look in chosen), end])
        strips.append((head, _strip(_decoded(system, z), labels)))
    title = f"diffusion: {system.recipe.name}"
    return page(title, [Column("", [], strips)]), {system.recipe.name: [numbers(schedule, t) for t in moments]}


def report(found: Numbers) -> str:
    """The numbers as a table."""
    lines = []
    for name, rows in found.items():
        lines.append(f"{name}\n      t   alpha_bar         SNR")
        lines += [f"  {row['t']:5g}   {row['alpha_bar']:9.4g}   {row['snr']:9.4g}" for row in rows]
    return "\n".join(lines) + "\n"


def _labels(schedule: Schedule, moments: Sequence[float]) -> list[str]:
    return [f"t {t:g}, SNR {numbers(schedule, t)['snr']:.2g}" for t in moments]


def _decoded(system: TextToImage, z: Tensor) -> Tensor:
    """(N, C, h, w) -> images (N, 3, S, S), one after another, as much as memory has."""
    weight = next(system.parts["prior"].parameters())
    return torch.cat([system.decode(one.to(weight.dtype)).float() for one in z.split(1)])


def _strip(images: Tensor, labels: Sequence[str]) -> Image.Image:
    return grid(images, len(labels), labels, scale=max(1, _CELL // images.shape[-1]))
