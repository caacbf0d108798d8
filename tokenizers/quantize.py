"""Quantizers between an encoder and a decoder: to the nearest vector of a codebook (van den Oord 2017,
arXiv:1711.00937), by Gumbel-softmax (Jang 2016, arXiv:1611.01144), or each channel to a few levels (FSQ, Mentzer 2023,
arXiv:2309.15505).

Called with latents (B, D, h, w) they return a dict: `quantized` (B, D, h, w) for the decoder, through which gradients
reach the latents, `codes` int64 (B, h, w), and what the objective needs. `encode` gives codes, `lookup` their vectors,
in float32 all of them.

B images, D channels on a grid of h x w, K codes, N vectors.

They do not know their loss, draw nothing, and gather nothing: statistics of all ranks and candidates for dead codes
come from the caller, so that equal inputs keep the codebooks of all ranks equal.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.precision import full, without_autocast
from .dvae import relax
from .kmeans import kmeans, nearest


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `latents` (van den Oord 2017, section 3.2)."""
    return latents + (quantized - latents).detach()


class VectorQuantizer(nn.Module):
    """Latents to the nearest of K codewords, with the straight-through gradient.

    num_codes, code_dim: K and D. cosine: latents and codewords are compared, and handed on, at length 1 (Yu 2021,
    arXiv:2110.04627, section 3.2). ema_decay: None for a codebook that the objective's second term trains; a number for
    one that follows the latents (appendix A.1): then `update` moves it, and no gradient reaches it.

    leapt: the codes that began anew, until an average of the weights has taken note; rows: the tensors that say a code.
    """

    leapt: Tensor | None = None
    rows = "embedding.weight", "ema_counts", "ema_sums"

    def __init__(self, num_codes: int, code_dim: int, cosine: bool = False, ema_decay: float | None = None) -> None:
        if min(num_codes, code_dim) < 1 or not (ema_decay is None or 0 <= ema_decay < 1):
            raise ValueError(
                "VectorQuantizer needs num_codes and code_dim of at least 1 and an ema_decay in [0, 1) or None, got "
                f"{num_codes}, {code_dim} and {ema_decay}; correct the recipe"
            )
        super().__init__()
        self.cosine, self.ema_decay = cosine, ema_decay
        self.embedding = nn.Embedding(num_codes, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_counts", torch.ones(num_codes))  # N_k of appendix A.1
            self.register_buffer("ema_sums", self.codebook().detach().clone())  # m_k

    def codebook(self) -> Tensor:
        """The codewords (K, D), of length 1 if they are compared by cosine."""
        weight = full(self.embedding.weight)
        return F.normalize(weight, dim=1) if self.cosine else weight

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """(B, D, h, w) -> `quantized` and `codes`, and for the objective `latents` and `codewords`, both (B, D, h, w).

        `latents` are of length 1 if compared by cosine; `codewords` carry the codebook's gradient, unless it has none.
        """
        latents = full(latents)
        latents = F.normalize(latents, dim=1) if self.cosine else latents
        codes = self._codes(latents)
        codewords = self.lookup(codes)
        quantized = straight_through(latents, codewords)
        return {"quantized": quantized, "codes": codes, "latents": latents, "codewords": codewords}

    def encode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> codes (B, h, w)."""
        return self._codes(F.normalize(full(latents), dim=1) if self.cosine else latents)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> codewords (B, D, h, w)."""
        codebook = self.codebook() if self.ema_decay is None else self.codebook().detach()
        return F.embedding(codes, codebook).permute(0, 3, 1, 2)

    def _codes(self, latents: Tensor) -> Tensor:
        batch, _, h, w = latents.shape
        return nearest(as_vectors(latents), self.codebook()).view(batch, h, w)

    @torch.no_grad()
    def start(self, vectors: Tensor, seed: int) -> None:
        """The codewords become the k-means centres of latents (N, D), in place; see `kmeans`."""
        vectors = F.normalize(full(vectors), dim=1) if self.cosine else vectors
        centres, counts = kmeans(vectors, len(self.embedding.weight), seed)
        self.embedding.weight.copy_(F.normalize(centres, dim=1) if self.cosine else centres)
        if self.ema_decay is not None:
            # An average code starts with a count of 1, as those that were never moved.
            self.ema_counts.copy_(counts * len(counts) / counts.sum()).clamp_(min=1e-3)
            self.ema_sums.copy_(self.ema_counts[:, None] * self.embedding.weight)

    @torch.no_grad()
    def statistics(self, latents: Tensor, codes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What one rank hands to `update`, once it is added up over all ranks.

        latents (B, D, h, w) and codes (B, h, w) as `forward` gives them; weight (B,), of each image. Returns the number
        of latents of each code, float32 (K,), and their sums (K, D), both weighted.
        """
        codebook = self.embedding.weight
        each = full(weight)[:, None, None].expand(codes.shape).reshape(-1)
        # index_put_ rather than bincount and index_add_: it has a deterministic kernel on every device.
        index = (codes.reshape(-1),)
        counts = codebook.new_zeros(len(codebook)).index_put_(index, each, accumulate=True)
        sums = torch.zeros_like(codebook).index_put_(index, as_vectors(full(latents)) * each[:, None], accumulate=True)
        return counts, sums

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """Moves the codebook towards the means of its latents, in place (appendix A.1, equations 6 to 8).

        counts (K,), sums (K, D): the `statistics` of the whole batch, of all ranks. A codeword whose count has faded
        away stays where it is. Raises ValueError for a codebook that is trained by gradient.
        """
        if self.ema_decay is None:
            raise ValueError("this codebook is trained by gradient; build it with ema_decay to move it by statistics")
        self.ema_counts.lerp_(counts.to(self.ema_counts), 1 - self.ema_decay)
        self.ema_sums.lerp_(sums.to(self.ema_sums), 1 - self.ema_decay)
        alive = self.ema_counts[:, None] > 1e-5
        means = self.ema_sums / self.ema_counts[:, None].clamp(min=1e-5)
        means = F.normalize(means, dim=1) if self.cosine else means
        self.embedding.weight.copy_(torch.where(alive, means, self.embedding.weight))

    @torch.no_grad()
    def restart(self, dead: Tensor, candidates: Tensor) -> int:
        """Gives dead codes (a bool (K,)) the candidates (M, D) in their order, in place; returns how many got one.

        With fewer candidates than dead codes the first codes get them. A restarted code's moving averages begin anew,
        at the mean count of all codes: it has as long as any other to find latents. Candidates: latents, for
        instance drawn from the batch, the same on all ranks (Dhariwal 2020, arXiv:2005.00341, section 3.1).
        """
        index = dead.nonzero()[:, 0][: len(candidates)]
        vectors = full(candidates[: len(index)]).to(self.embedding.weight)
        vectors = F.normalize(vectors, dim=1) if self.cosine else vectors
        self.embedding.weight[index] = vectors
        self.leapt = index
        if self.ema_decay is not None:
            mean = self.ema_counts.mean()
            self.ema_counts[index] = mean
            self.ema_sums[index] = mean * vectors
        return len(index)


def as_vectors(latents: Tensor) -> Tensor:
    """(B, D, h, w) -> (B * h * w, D)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class GumbelQuantizer(nn.Module):
    """Latents to weights over K codes and their mean codeword; as published for VQ-GAN with f = 8.

    latent_channels: channels of the latents. The logits are a 1x1 convolution of them, in float32.
    """

    outer = ("proj",)

    def __init__(self, latent_channels: int, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, num_codes, 1)
        self.embed = nn.Embedding(num_codes, code_dim)

    def logits(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w)."""
        with without_autocast(latents):
            weight, bias = full(self.proj.weight).flatten(1), full(self.proj.bias)
            return F.linear(full(latents).permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> dict[str, Tensor]:
        """(B, C, h, w) -> `quantized`, `codes` (of the noisy logits) and `logits` (B, K, h, w).

        noise: standard Gumbel draws (B, K, h, w), or None for none. The decoder sees one codeword; the gradient is that
        of the relaxed mean of codewords (straight-through Gumbel-softmax, Jang 2016, section 2.2).
        """
        logits = self.logits(latents)
        if noise is not None and noise.shape != logits.shape:
            raise ValueError(f"GumbelQuantizer needs noise of shape {tuple(logits.shape)}, got {tuple(noise.shape)}")
        soft = relax(logits, torch.zeros_like(logits) if noise is None else noise, temperature).permute(0, 2, 3, 1)
        codes = soft.argmax(dim=-1)
        hard = torch.zeros_like(soft).scatter_(-1, codes[..., None], 1.0)
        with without_autocast(latents):
            quantized = (straight_through(soft, hard) @ full(self.embed.weight)).permute(0, 3, 1, 2)
        return {"quantized": quantized, "codes": codes, "logits": logits}

    def encode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> codes (B, h, w), the argmax of the logits without noise."""
        return self.logits(latents).argmax(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> codewords (B, D, h, w)."""
        return full(F.embedding(codes, self.embed.weight)).permute(0, 3, 1, 2)


class FSQ(nn.Module):
    """Each channel of the latents to one of a few levels; a code names the levels of all channels. Nothing is learned.

    levels: L_i >= 2 of each of the D channels; K is their product. (8, 5, 5, 5) stands for 1,000 codes (table 1).
    """

    counts: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or any(type(level) is not int or level < 2 for level in levels):
            raise ValueError(f"FSQ needs levels as whole numbers of at least 2, got {levels}; write e.g. [8, 5, 5, 5]")
        super().__init__()
        self.num_codes = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Whole numbers, which no change of the module's dtype rounds.
        self.register_buffer("counts", torch.tensor(levels).view(-1, 1, 1), persistent=False)  # L_i, (D, 1, 1)
        self.register_buffer("basis", torch.tensor(basis).view(-1, 1, 1), persistent=False)

    def bound(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> the same, inside a range that rounds to L_i whole numbers (appendix A.1, `bound`)."""
        latents = full(latents)
        half = (self.counts.to(latents.dtype) - 1) * (1 - 1e-3) / 2  # a little less, so that no end is rounded over
        offset = 0.5 * (self.counts % 2 == 0)
        return torch.tanh(latents + torch.tan(offset / half)) * half - offset

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """(B, D, h, w) -> `quantized` in [-1, 1] and `codes`."""
        bounded = self.bound(latents)
        digits = bounded.round()
        quantized = straight_through(bounded, digits) / (self.counts // 2)
        return {"quantized": quantized, "codes": self._codes(digits)}

    def encode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> codes (B, h, w)."""
        return self._codes(self.bound(latents).round())

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> vectors in [-1, 1], float32 (B, D, h, w)."""
        half = self.counts // 2
        return (codes[:, None] // self.basis % self.counts - half) / half

    def _codes(self, digits: Tensor) -> Tensor:
        return ((digits.long() + self.counts // 2) * self.basis).sum(dim=1)
