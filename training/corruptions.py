"""What a denoising autoencoder sees pictures through, and is to give them back without (Vincent 2010, JMLR 11:3371,
section 3.3).

B images of 3 x H x W pixels in [-1, 1].

It does not know the model.
"""

import torch
from torch import Tensor

from ..layers import random

KINDS = ("gaussian", "mask", "salt_and_pepper")


def add_gaussian(image: Tensor, noise: Tensor, std: float) -> Tensor:
    """image + std * noise, for standard normal noise of the same shape; not clamped."""
    return image + std * noise


def mask(image: Tensor, uniform: Tensor, share: float, value: float = -1.0) -> Tensor:
    """`share` of the values become `value`, black by default, which is the paper's 0 in our range.

    uniform: draws in (0, 1) that broadcast to the image: (B, 1, H, W) masks whole pixels.
    """
    return torch.where(uniform < share, value, image)


def salt_and_pepper(image: Tensor, uniform: Tensor, share: float) -> Tensor:
    """Half of `share` of the values become -1, the other half 1. uniform: see `mask`."""
    return torch.where(uniform < share / 2, -1.0, torch.where(uniform < share, 1.0, image))


def problem(kind: str, level: float) -> str:
    """What is wrong with a corruption of this level, or nothing."""
    if kind not in KINDS:
        return f"corruption is one of {', '.join(KINDS)}, got {kind!r}; choose one"
    if not level > 0:
        return f"corruption goes with a corruption_level above 0, got {kind} of {level}; set both"
    if kind != "gaussian" and level > 1:
        return f"corruption_level is a share of the pixels, at most 1, got {level}; lower it"
    return ""


def corrupt(image: Tensor, kind: str, level: float, seed: int, step: int, samples: Tensor) -> Tensor:
    """Images (B, 3, H, W) through one of KINDS, in [-1, 1] again; masks and salt and pepper take whole pixels.

    level: the noise's deviation, or the share of pixels that are lost. seed, step, samples: see `random.uniform`.
    """
    if kind == "gaussian":
        noise = random.normal(seed, step, samples, tuple(image.shape[1:]), "corruption")
        return add_gaussian(image, noise, level).clamp(-1, 1)
    draws = random.uniform(seed, step, samples, (1, *image.shape[2:]), "corruption")
    return (mask if kind == "mask" else salt_and_pepper)(image, draws, level)
