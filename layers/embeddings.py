"""Position embeddings.

Axial: the embedding of a grid cell is that of its row plus that of its column (DALL-E, arXiv 2102.12092, Appendix B.1;
Ho 2019, arXiv 1912.12180), so h + w vectors serve h * w cells.

Rotary: queries and keys are turned by angles that grow with their coordinates, so that their product depends on how far
apart two tokens lie, not on where (Su 2021, arXiv 2104.09864); with two coordinates each turns half of the pairs.

Timesteps: sines and cosines of the step at many frequencies, as of a position (Vaswani 2017, arXiv 1706.03762, section
3.5; of timesteps Ho 2020, arXiv 2006.11239).

h x w the grid, B samples, D the width of an embedding, L tokens, E the width of a head.

It does not know what stands in the cells.
"""

import math

import torch
from torch import Tensor, nn


class AxialPositionEmbedding(nn.Module):
    """Learned row plus learned column. `grid` is (h, w); both tables start as normal(0, `std`)."""

    outer = ("rows", "columns")

    def __init__(self, grid: tuple[int, int], width: int, std: float = 0.02) -> None:
        super().__init__()
        if min(grid) < 1:
            raise ValueError(f"axial position embedding: the grid must be at least (1, 1), got {tuple(grid)}")
        self.grid = (int(grid[0]), int(grid[1]))
        self.rows = nn.Parameter(torch.empty(self.grid[0], width))
        self.columns = nn.Parameter(torch.empty(self.grid[1], width))
        nn.init.normal_(self.rows, std=std)
        nn.init.normal_(self.columns, std=std)

    def forward(self, index: Tensor) -> Tensor:
        """index: int64 of any shape, raster order, in [0, h * w). Returns (*index.shape, D)."""
        columns = self.grid[1]
        return self.rows[index // columns] + self.columns[index % columns]


Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (L, E)


def rotation(coordinates: Tensor, head_width: int, base: float = 10_000.0) -> Rotation:
    """The turn of each token for `rotate`. coordinates: (L, A), one column an axis. Returns two fp32 (L, E).

    Pair j of an axis turns by coordinate * base ** (-j / pairs), with E / (2 A) pairs an axis (Su 2021, Equation 15).
    Raises ValueError unless 2 A divides E.
    """
    length, axes = coordinates.shape
    if head_width % (2 * axes):
        raise ValueError(
            f"rotary positions: {axes} axes need a head width that {2 * axes} divides, got {head_width}; "
            "choose another width or num_heads"
        )
    pairs = head_width // (2 * axes)
    speed = base ** -(torch.arange(pairs, device=coordinates.device, dtype=torch.float32) / pairs)
    angles = (coordinates[..., None].float() * speed).reshape(length, -1).repeat(1, 2)  # (L, E)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x: (..., L, E), channel i paired with channel i + E / 2. Returns the same shape and dtype."""
    first, second = x.chunk(2, dim=-1)
    return (x * by[0] + torch.cat([-second, first], dim=-1) * by[1]).to(x.dtype)


def timestep_embedding(t: Tensor, width: int, last: int = 0, cosine_first: bool = True) -> Tensor:
    """t: (B,), whole or not. Returns (B, D) in fp32: cosines and sines of t * 10000 ** (-j / (D / 2 - last)).

    j counts from 0 to D / 2 - 1. last=1 ends at the frequency 1 / 10000, as Ho 2020, who has the sines first. Raises
    ValueError unless D is even.
    """
    if width % 2:
        raise ValueError(f"a timestep embedding needs an even width, got {width}; change the width")
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - last)
    angles = t[:, None].float() * exponent.exp()  # (B, D / 2)
    waves = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)
