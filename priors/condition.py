"""What a diffusion prior is conditioned on: classes, captions, image embeddings, and images beside the one to denoise.

B samples, L tokens, D width of a token, E width of an image embedding, c channels, h x w positions.

It does not know who makes them, nor which network reads them: a field that a network has no use for is its error.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """A tuple, so that what maps over tensors (devices, dtypes, wrappers of networks) maps over its fields.

    labels: int64 (B,), classes. tokens: (B, L, D), the output of a text encoder, of which mask, bool (B, L), is True
    where there is a token, at least one in each row; no mask, all are. embedding: (B, E), CLIP's of an image. image:
    (B, c, h, w), concatenated behind x_t: the small image of an upsampler, or mask and masked latents of an inpainter.
    """

    labels: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    embedding: Tensor | None = None
    image: Tensor | None = None

    def dropped(self, drop: Tensor, null: "Condition") -> "Condition":
        """With the null condition in place of the samples where `drop`, bool (B,), is True.

        A field that `null` lacks, such as `image`, is kept. Training drops with it, and guidance with all samples.
        """
        return Condition(*(_chosen(drop, other, own) for other, own in zip(null, self, strict=True)))

    def beside(self, other: "Condition") -> "Condition":
        """Both as one of twice the samples, (2 B, ...): first this, then the other, which has the same fields."""
        pairs = list(zip(self, other, strict=True))
        assert all((a is None) == (b is None) for a, b in pairs), "conditions of one network have the same fields"
        return Condition(*(torch.cat([a, b]) if a is not None and b is not None else None for a, b in pairs))


def _chosen(drop: Tensor, null: Tensor | None, own: Tensor | None) -> Tensor | None:
    if null is None or own is None:
        return own
    return torch.where(drop.view(-1, *[1] * (own.dim() - 1)), null.to(own.dtype), own)
