"""Position embeddings.

Axial: the embedding of a grid cell is that of its row plus that of its column (DALL-E, arXiv 2102.12092, Appendix B.1;
Ho 2019, arXiv 1912.12180), so h + w vectors serve h * w cells.

h x w the grid, D the width of an embedding.

It does not know what stands in the cells.
"""

import torch
from torch import Tensor, nn


class AxialPositionEmbedding(nn.Module):
    """Learned row plus learned column. `grid` is (h, w); both tables start as normal(0, `std`)."""

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
