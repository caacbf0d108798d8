"""What the temperature of a Gumbel-softmax does (Jang 2016, arXiv:1611.01144, figure 1): draws over a few logits, and
what a discrete VAE gives back at each temperature.

A low one draws nearly one-hot weights, whose gradients vary much; a high one draws nearly even weights, of which the
decoder never sees the like again. At any of them the largest weight is drawn from the softmax of the logits.

N draws, K logits, B images.

It does not know how a model was trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...layers import random
from ...pipeline.images import grid
from ...tokenizers.dvae import GumbelAutoencoder, relax
from ..stages.contract import psnr
from .panels import Column, bars, page

TEMPERATURES = (0.1, 0.5, 1.0, 2.0, 5.0)
LOGITS = (2.0, 1.0, 0.5, 0.0, -1.0)
_DRAWS, _SHOWN, _BARS = 20_000, 5, (296, 80)


def draws(logits: Sequence[float], temperature: float, seed: int) -> Tensor:
    """N draws of the weights, (N, K). Raises ValueError for fewer than two logits, or no temperature above 0."""
    if len(logits) < 2 or not temperature > 0:
        raise ValueError(
            f"a Gumbel-softmax needs two logits or more and temperatures above 0, got {len(logits)} and {temperature}"
        )
    noise = random.gumbel(seed, 0, torch.arange(_DRAWS), (len(logits), 1, 1), "show gumbel")
    return relax(torch.tensor(logits).view(1, -1, 1, 1).expand_as(noise), noise, temperature)[:, :, 0, 0]


def measure(logits: Sequence[float], temperature: float, seed: int) -> dict[str, Any]:
    """`mean`: weights over all draws; `largest`: how often each is; `peak`: the mean of the largest weight.

    `largest` is softmax(logits) at any temperature, `mean` only as it falls to 0.
    """
    weights = draws(logits, temperature, seed)
    largest = torch.bincount(weights.argmax(dim=1), minlength=len(logits)) / len(weights)
    facts = {"temperature": temperature, "peak": float(weights.amax(dim=1).mean())}
    return facts | {"mean": weights.mean(dim=0).tolist(), "largest": largest.tolist()}


@torch.no_grad()
def reconstruct(tokenizer: Any, image: Tensor, temperature: float, seed: int) -> Tensor:
    """Images (B, 3, H, W) through the relaxation. Raises ValueError for a tokenizer without one."""
    if not isinstance(tokenizer, GumbelAutoencoder):
        raise ValueError(
            "its decoder reads no mixtures of codes, as a dVAE's does; name a model with one, as shapes/dalle"
        )
    shape = (tokenizer.spec.vocabulary, *tokenizer.spec.shape)
    noise = random.gumbel(seed, 0, torch.arange(len(image), device=image.device), shape, "show gumbel")
    return tokenizer.image(tokenizer(image, noise, temperature)["parameters"]).clamp(-1, 1)


def column(
    found: dict[str, Any], logits: Sequence[float], seed: int, again: Tensor | None, pictures: Tensor | None
) -> Column:
    """What stands under one temperature; again: the pictures as they come back, of which it knows the dB."""
    names = [f"{logit:g}" for logit in logits]
    lines = [f"the largest weight is {found['peak']:.2f} in the mean"]
    shown = Column(f"temperature {found['temperature']:g}", lines)
    for k, weights in enumerate(draws(logits, found["temperature"], seed)[:_SHOWN].tolist()):
        shown.pictures.append((f"draw {k + 1}: weights, by logit", bars(weights, names, _BARS)))
    shown.pictures.append((f"their mean over {_DRAWS:,} draws", bars(found["mean"], names, _BARS)))
    shown.pictures.append(("how often each is the largest", bars(found["largest"], names, _BARS)))
    if again is not None and pictures is not None:
        found["psnr"] = float(psnr(again, pictures).mean())
        scale = max(1, 64 // again.shape[-1])
        shown.pictures.append((f"decoded: {found['psnr']:.1f} dB", grid(again, 4, scale=scale)))
    return shown


def picture(
    logits: Sequence[float],
    temperatures: Sequence[float],
    seed: int,
    tokenizer: Any = None,
    images: Tensor | None = None,
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """The page, a column for each temperature, and their numbers; images (B, 3, H, W) with a tokenizer."""
    columns, numbers = [], []
    for temperature in temperatures:
        found = measure(logits, temperature, seed)
        again = None if images is None else reconstruct(tokenizer, images, temperature, seed)
        columns.append(column(found, logits, seed, again, images))
        numbers.append(found)
    share = torch.tensor(logits).softmax(dim=0).tolist()
    title = "Gumbel-softmax over logits whose softmax is " + ", ".join(f"{value:.2f}" for value in share)
    return page(title, columns), numbers
