"""Decoding latents piece by piece where the whole picture does not fit into memory.

B pictures, C channels of latents on a grid of h x w, H x W pixels.

It does not know the decoder. One whose normalisation or attention sees all places decodes a tile otherwise than the
whole picture: tiles overlap and are blended, which hides seams and is no equality.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def decode_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, side: int, overlap: int) -> Tensor:
    """Latents (B, C, h, w) -> (B, 3, H, W), one picture and one tile of side x side places at a time.

    Tiles overlap by at least so many places, over which each fades into the next. Raises ValueError unless
    0 <= overlap < side.
    """
    if not 0 <= overlap < side:
        raise ValueError(f"decode_tiles needs 0 <= overlap < side, got {overlap} and {side}; take smaller overlaps")
    return torch.cat([_one(decode, latents[i : i + 1], side, overlap) for i in range(len(latents))])


def _one(decode: Callable[[Tensor], Tensor], latents: Tensor, side: int, overlap: int) -> Tensor:
    height, width = latents.shape[2:]
    total = weight = latents.new_zeros(())
    for top in _starts(height, side, overlap):
        for left in _starts(width, side, overlap):
            tile = decode(latents[..., top : top + side, left : left + side])  # (1, 3, s, s)
            factor = tile.shape[2] // min(side, height)
            if not total.dim():
                total = tile.new_zeros(1, tile.shape[1], height * factor, width * factor)
                weight = torch.zeros_like(total[:, :1])
            down, across = (_fade(size, overlap * factor, tile) for size in tile.shape[2:])
            fade = down[:, None] * across
            rows = slice(top * factor, top * factor + tile.shape[2])
            columns = slice(left * factor, left * factor + tile.shape[3])
            total[..., rows, columns] += fade * tile
            weight[..., rows, columns] += fade
    return total / weight


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin; the last one ends where the grid does."""
    last = max(length - side, 0)
    return [*range(0, last, side - overlap), last]


def _fade(size: int, over: int, like: Tensor) -> Tensor:
    """Rises from the edge over so many pixels, and falls to the other one; never 0."""
    place = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    return torch.minimum(place, place.flip(0)).clamp(max=max(over, 1)) / max(over, 1)  # to 1: half has no room for more
