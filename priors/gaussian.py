"""Distributions over flat latents from which generators and decoders paint, and towards which an adversarial
autoencoder pulls its codes: the standard normal, a ring of Gaussians and a swiss roll (Makhzani 2015, arXiv:1511.05644,
figures 2 and 4).

Each has draws that are a function of (seed, step, sample), of deviation about 1 in every channel. Two of them have
pieces, so that a label can name where its draws lie (section 2.3).

B draws of D values, K pieces.

They do not know who draws, nor what becomes of it.
"""

import math

import torch
from torch import Tensor

from ..layers import random

_LN_2PI = math.log(2 * math.pi)
_RADIAL = 0.25  # deviation of a mode along its radius, where the ring's radius is 1
_TURNS, _THICKNESS = 2, 0.05  # of the roll


class Standard:
    """N(0, I) over D = dim values."""

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"a standard normal needs dim of at least 1, got {dim}")
        self.dim = dim

    def draw(self, seed: int, step: int, samples: Tensor, stream: str) -> Tensor:
        """Draws (B, D); arguments as in `layers.random`."""
        return random.normal(seed, step, samples, (self.dim,), stream)

    def log_density(self, z: Tensor) -> Tensor:
        """ln p(z) in nats: (B, D) -> (B,)."""
        return -0.5 * (z.square() + _LN_2PI).sum(dim=1)


class Mixture:
    """K = num_pieces equally likely Gaussians of the plane on a ring, each longer along its radius: K petals.

    The mean is 0 and the variance 1 in both channels. Raises ValueError for fewer than three, whose variances differ.
    """

    dim = 2

    def __init__(self, num_pieces: int = 10) -> None:
        if num_pieces < 3:
            raise ValueError(f"a ring of Gaussians needs at least 3 of them, got {num_pieces}")
        self.num_pieces = num_pieces
        across = min(_RADIAL, math.sin(math.pi / num_pieces) / 3)  # a sixth of the way to the next
        scale = math.sqrt(2 / (1 + _RADIAL**2 + across**2))
        self.radius, self.std = scale, (scale * _RADIAL, scale * across)

    def _frames(self, like: Tensor) -> Tensor:
        """The unit vectors along and across each radius, (K, 2, 2)."""
        angle = 2 * math.pi / self.num_pieces * torch.arange(self.num_pieces, device=like.device)
        along = torch.stack([angle.cos(), angle.sin()], dim=1).to(like.dtype)
        return torch.stack([along, torch.stack([-along[:, 1], along[:, 0]], dim=1)], dim=1)

    def draw(self, seed: int, step: int, samples: Tensor, stream: str, labels: Tensor | None = None) -> Tensor:
        """Draws (B, 2), of the mode that labels, int64 (B,) in [0, K), name, or of any where there are none."""
        if labels is None:
            labels = random.integers(seed, step, samples, (), f"{stream} mode", self.num_pieces)
        noise = random.normal(seed, step, samples, (2,), stream)
        placed = noise * noise.new_tensor(self.std) + noise.new_tensor([self.radius, 0.0])
        return torch.einsum("bi,bij->bj", placed, self._frames(noise)[labels])

    def _log_densities(self, z: Tensor) -> Tensor:
        """Of each mode: (B, 2) -> (B, K)."""
        std = z.new_tensor(self.std)
        placed = torch.einsum("bj,kij->bki", z, self._frames(z)) - z.new_tensor([self.radius, 0.0])  # (B, K, 2)
        return -0.5 * ((placed / std).square() + _LN_2PI).sum(dim=2) - std.log().sum()

    def log_density(self, z: Tensor) -> Tensor:
        """ln p(z) in nats: (B, 2) -> (B,)."""
        return self._log_densities(z).logsumexp(dim=1) - math.log(self.num_pieces)

    def piece(self, z: Tensor) -> Tensor:
        """The mode that most likely drew z: (B, 2) -> int64 (B,)."""
        return self._log_densities(z).argmax(dim=1)


class SwissRoll:
    """A spiral of two turns in the plane, evenly filled along its length, in K = num_pieces pieces from its centre on.

    Its density has no closed form.
    """

    dim = 2

    def __init__(self, num_pieces: int = 10) -> None:
        if num_pieces < 1:
            raise ValueError(f"a swiss roll needs at least 1 piece, got {num_pieces}")
        self.num_pieces = num_pieces

    def draw(self, seed: int, step: int, samples: Tensor, stream: str, labels: Tensor | None = None) -> Tensor:
        """Draws (B, 2), of the piece that labels, int64 (B,) in [0, K), name, or of the whole where there are none."""
        share = random.uniform(seed, step, samples, (), f"{stream} roll")
        share = share if labels is None else (share + labels) / self.num_pieces
        return self._line(share) + _THICKNESS * random.normal(seed, step, samples, (2,), stream)

    @staticmethod
    def _line(share: Tensor) -> Tensor:
        """Where the spiral is after a share of its length: (B,) -> (B, 2)."""
        reach = share.sqrt()  # the length of a spiral grows as the square of its angle
        angle = 2 * math.pi * _TURNS * reach
        return 2 * reach[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)

    def piece(self, z: Tensor) -> Tensor:
        """The piece with the point of the spiral that is nearest to z, to a thousandth: (B, 2) -> int64 (B,)."""
        share = (torch.arange(1000, device=z.device, dtype=z.dtype) + 0.5) / 1000
        return (share[torch.cdist(z, self._line(share)).argmin(dim=1)] * self.num_pieces).long()


Distribution = Standard | Mixture | SwissRoll
KINDS = ("standard", "mixture", "swiss_roll")


def distribution(kind: str, dim: int, num_pieces: int = 10) -> Distribution:
    """The distribution of a kind over `dim` values. Raises ValueError for another kind, or one that is of the plane."""
    if kind not in KINDS or (kind != "standard" and dim != 2):
        raise ValueError(
            f"a distribution over latents is one of {', '.join(KINDS)}, the last two over 2 values, "
            f"got {kind!r} over {dim}; change prior, or latent_dim"
        )
    if kind == "standard":
        return Standard(dim)
    return Mixture(num_pieces) if kind == "mixture" else SwissRoll(num_pieces)
