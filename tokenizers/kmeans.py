"""The nearest of many centres, and k-means with k-means++ seeding (Arthur 2007, doi:10.5555/1283383.1283494): where a
codebook starts.

N points of D dimensions, K centres.

It does not know what the points are, nor which codebook the centres become.
"""

import torch
from torch import Tensor

from ..layers import random
from ..layers.precision import full, without_autocast

_DISTANCES = 2**24  # how many are held at once: 64 MiB


@torch.no_grad()
def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The centre nearest to each point (N, D) among (K, D), int64 (N,): argmin of |e|^2 / 2 - z . e, in float32."""
    with without_autocast(points):
        points, centres = full(points), full(centres)
        half_squares = centres.square().sum(1) / 2
        parts = points.split(max(1, _DISTANCES // len(centres)))
        return torch.cat([torch.addmm(half_squares, part, centres.T, alpha=-1).argmin(1) for part in parts])


@torch.no_grad()
def kmeans(
    points: Tensor, num_centres: int, seed: int, rounds: int = 10, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Centres (K, D) and how many points each has, int64 (K,), for points (N, D): float32, on the CPU.

    weight: of each point's squared distance, positive, (N,); 1 if not given. The draws are a function of `seed`. A
    centre that loses all its points stays where it is. Raises ValueError when there are fewer points than centres.
    """
    if len(points) < num_centres:
        raise ValueError(
            f"k-means needs at least as many points as centres, got {len(points)} for {num_centres}; give "
            "more pictures, or lower num_codes"
        )
    points = points.float().cpu()
    weighted = points  # times the weight
    if weight is None:
        weight = torch.ones(len(points), dtype=torch.float32)
    else:
        weight = weight.float().cpu()
        weighted = points * weight[:, None]
    draws = random.uniform(seed, 0, torch.arange(num_centres), (1,), "k-means")[:, 0].double()
    centres = points[:1].expand(num_centres, -1).clone()
    distance = torch.full((len(points),), torch.inf)  # squared distance to the nearest centre so far
    pick = int(draws[0] * len(points))
    for k in range(num_centres):
        centres[k] = points[pick]
        distance = torch.minimum(distance, (points - centres[k]).square().sum(1))
        total = (distance * weight).double().cumsum(0)
        # The next one is drawn in proportion to its weighted squared distance.
        pick = min(int(torch.searchsorted(total, draws[(k + 1) % num_centres] * total[-1])), len(points) - 1)
    counts = torch.zeros(num_centres, dtype=torch.int64)
    for _ in range(rounds):
        own = nearest(points, centres)
        counts = torch.bincount(own, minlength=num_centres)
        shares = torch.zeros(num_centres, dtype=torch.float32).index_add_(0, own, weight)
        sums = torch.zeros_like(centres).index_add_(0, own, weighted)
        centres = torch.where(counts[:, None] > 0, sums / shares[:, None], centres)
    return centres, counts
