"""What a tokenizer says of its output, so that a prior can be shaped before any image is encoded, and the checks of
what goes in at its edges.

B images of H x W pixels; h, w the grid of codes or latents, C their channels; D a flat latent; K the size of the
codebook.

It does not know how the codes are made or what they decode to.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOUD = 1.5  # beyond any overshoot of a resampled image in [-1, 1], below what [0, 255] holds


@dataclass(frozen=True)
class CodesSpec:
    """`kind` is "codes" for discrete codes; `shape` is (h, w); `vocabulary` is K, codes are int64 in [0, K)."""

    kind: str
    shape: tuple[int, int]
    vocabulary: int

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1 or self.vocabulary < 1:
            raise ValueError(
                "CodesSpec needs a shape (h, w) of positive sizes and a vocabulary of at least 1, "
                f"got shape {self.shape} and vocabulary {self.vocabulary}"
            )

    def check(self, codes: Tensor, owner: str) -> None:
        """Raises ValueError unless codes are int64 (B, h, w) in [0, K). owner: who asks, for the message."""
        if codes.dtype != torch.int64 or codes.dim() != 3 or tuple(codes.shape[1:]) != self.shape:
            raise ValueError(
                f"{owner} needs codes as int64 of shape (B, {self.shape[0]}, {self.shape[1]}), "
                f"got {codes.dtype} of shape {tuple(codes.shape)}; pass what its encode gives"
            )
        if codes.device.type == "meta" or not codes.numel():
            return
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"{owner} needs codes in [0, {self.vocabulary}), got {low} to {high}; "
                "pass codes of this tokenizer, without a prior's special tokens"
            )


@dataclass(frozen=True)
class LatentsSpec:
    """`kind` is "latents" for real-valued ones; `shape` is (C, h, w), or (D,) where they are flat.

    They are scaled so that each channel has about mean 0 and standard deviation 1.
    """

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"LatentsSpec needs a shape (C, h, w) or (D,) of positive sizes, got {self.shape}")

    def check(self, latents: Tensor, owner: str) -> None:
        """Raises ValueError unless latents are floating, (B, *shape). owner: who asks, for the message."""
        if not latents.is_floating_point() or tuple(latents.shape[1:]) != self.shape:
            raise ValueError(
                f"{owner} needs floating latents of shape (B, {', '.join(map(str, self.shape))}), "
                f"got {latents.dtype} of shape {tuple(latents.shape)}; pass what its encode gives"
            )


def check_image(image: Tensor, image_size: int, owner: str, values: bool = True) -> None:
    """Raises ValueError unless the image is floating, (B, 3, H, W), and not clearly outside [-1, 1].

    owner: who asks, for the message. values: whether to look at the range, for which the host must wait
    until the device has the image.
    """
    if not image.is_floating_point() or image.dim() != 4 or image.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"{owner} needs floating images of shape (B, 3, {image_size}, {image_size}), got {image.dtype} of shape "
            f"{tuple(image.shape)}; convert and resize them, or build the model with their image_size"
        )
    if not values or image.device.type == "meta" or type(image) is not Tensor or not image.numel():
        return
    peak = float(image.detach().abs().amax())
    if math.isnan(peak) or peak > _LOUD:
        raise ValueError(
            f"{owner} needs images in [-1, 1], got values as large as {peak:g}; "
            "divide pixels of 0 to 255 by 127.5 and subtract 1"
        )
