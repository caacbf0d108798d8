"""The way from one caption's picture to another's: conditions change along a line, and noise along a great circle
(Shoemake 1985, doi:10.1145/325334.325242, section 3.3, as in Song 2020, arXiv:2010.02502, appendix D.5), where it stays
noise: halfway along a line it would be too small by a factor of sqrt(2).

F frames, C x h x w of what the prior draws, L tokens of width D.

It does not know how a prior is sampled.
"""

from operator import index
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from ..layers.random import normal
from ..priors.condition import Condition
from ..priors.diffusion_samplers import Walk
from .drawing import DiffusionDrawing
from .images import to_pil
from .memory import Progress, in_batches
from .recipe import sampling_knobs

if TYPE_CHECKING:
    from .text_to_image import TextToImage

MAX_FRAMES = 64


def lerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Two tensors (1, ...) and shares (F,) of the second -> (F, ...), on the line between them."""
    return torch.lerp(first, second, _wide(shares, first))


def slerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Two tensors (1, ...) and shares (F,) of the second -> (F, ...), on the great circle through them.

    Where they point the same way it is the line.
    """
    angle = F.cosine_similarity(first.flatten(1), second.flatten(1)).clamp(-1, 1).acos()  # (1,)
    if angle.sin() < 1e-4:
        return lerp(first, second, shares)
    begin, end = (_wide(torch.sin(share * angle) / torch.sin(angle), first) for share in (1 - shares, shares))
    return begin * first + end * second


def between(first: Condition, second: Condition, shares: Tensor) -> Condition:
    """Two captions' conditions of one sample and shares (F,) of the second -> those on the line between them.

    A token that only one of both has counts on the way.
    """
    mask = None
    if first.mask is not None and second.mask is not None:
        ends = torch.stack([shares < 1, shares > 0])[..., None]  # (2, F, 1)
        mask = (ends[0] & first.mask) | (ends[1] & second.mask)  # (F, L)
    assert first.tokens is not None and second.tokens is not None
    many = first.image if first.image is None else first.image.expand(len(shares), -1, -1, -1)
    return Condition(tokens=lerp(first.tokens, second.tokens, shares), mask=mask, image=many)


@torch.inference_mode()
def interpolate(
    system: "TextToImage",
    first: str,
    second: str,
    frames: int = 8,
    seed: int = 0,
    to_seed: int | None = None,
    progress: Progress | None = None,
    micro_batch: int | None = None,
    **knobs: Any,
) -> list[Image]:
    """F pictures from that of one caption to that of another, in equal steps.

    seed: of the noise of all of them. to_seed: of the noise of the last one, to which that of the others changes then.
    progress, micro_batch, knobs: as in painting, but 8 at once at most if nobody says. The first and, by a sampler that
    draws no noise on the way, the last are what `system` paints. Raises ValueError for frames outside [2, 64], empty
    captions, and a model without captions or a diffusion prior.
    """
    if not isinstance(system.draw, DiffusionDrawing) or system.draw.text is None:
        raise ValueError(f"{system.recipe.name} must have a diffusion prior that reads captions, to pass between two")
    if not 2 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames must lie between 2 and {MAX_FRAMES}, both ends among them, got {frames}")
    seed, end = index(seed), index(seed if to_seed is None else to_seed)
    micro_batch = system.at_once(micro_batch, 8)
    system._check([first, second], [seed, end], 1, 1)
    draw, used = system.draw, sampling_knobs(system.recipe, knobs, "knobs of painting")
    device = next(draw.prior.parameters()).device
    numbers = torch.tensor([seed, end], device=device)
    begin, target = normal(0, 0, numbers, draw.shape, "sampler start").split(1)  # as a sampler would draw it
    one, other = (draw.condition([caption]) for caption in (first, second))
    shares = torch.linspace(0, 1, frames, device=device)

    def paint(some: slice, report: Progress | None) -> list[Image]:
        walk = Walk(noise=slerp(begin, target, shares[some]), progress=report)
        z = draw.sample(between(one, other, shares[some]), [seed] * len(shares[some]), used, **walk)
        return to_pil(system.decode(z).float())

    return in_batches(paint, frames, micro_batch, system.parts, progress)


def _wide(shares: Tensor, like: Tensor) -> Tensor:
    return shares.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
