"""Objective of the discrete VAE: logit-Laplace likelihood and KL to the uniform prior (Ramesh 2021,
arXiv:2102.12092, sections 2.1 and A.2-A.3), with its schedules of temperature and KL weight.

B images of D = 3 * H * W values, K codes on a grid of h x w.

It does not know the model: it takes the decoder's parameters and the encoder's logits.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...layers.precision import full
from ...tokenizers.dvae import likeliest, map_pixels
from .weighting import weighted


def logit_laplace_nll(parameters: Tensor, mapped: Tensor) -> Tensor:
    """-ln f(x | mu, b), f = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)) (section A.3), in nats and float32.

    parameters: (B, 6, H, W), mu then ln b. mapped: (B, 3, H, W) inside (0, 1), from `map_pixels`. Returns (B, 3, H, W).
    """
    mu, log_b = full(parameters).chunk(2, dim=1)
    x = full(mapped)
    return math.log(2) + log_b + torch.log(x) + torch.log1p(-x) + (torch.logit(x) - mu).abs() * torch.exp(-log_b)


class _NegativeEntropy(torch.autograd.Function):
    """Of softmax(logits) over the last dim; with half of the arrays that separate operations make, which is its time.

    Its gradient is q (ln q - sum q ln q).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(dim=-1)
        q = log_q.exp()
        total = torch.linalg.vecdot(q, log_q)
        ctx.save_for_backward(log_q, q, total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        log_q, q, total = ctx.saved_tensors
        return torch.addcmul(-(grad * total)[..., None], log_q, grad[..., None]).mul_(q)


def uniform_kl(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) at each position, in nats: (B, K, h, w) -> float32 (B, h, w), in [0, ln K].

    Its gradient cannot be differentiated again.
    """
    rows = full(logits).permute(0, 2, 3, 1)  # (B, h, w, K), as the encoder lays it out
    return _NegativeEntropy.apply(rows) + math.log(logits.shape[1])


def codebook_counts(codes: Tensor, num_codes: int, weight: Tensor) -> Tensor:
    """How often each code stands in the batch, by image weight: codes (B, h, w), weight (B,) -> float32 (K,)."""
    each = weight.float()[:, None, None].expand(codes.shape).reshape(-1)
    # index_put_ rather than bincount: the sum has a deterministic kernel on every device.
    zeros = torch.zeros(num_codes, dtype=torch.float32, device=codes.device)
    return zeros.index_put_((codes.reshape(-1),), each, accumulate=True)


def counts_by_image(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code stands in each image: codes (B, h, w) -> float32 (B, K)."""
    flat = codes.flatten(1)
    zeros = torch.zeros(len(flat), num_codes, dtype=torch.float32, device=codes.device)
    return zeros.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))


def codebook_use(counts: Tensor) -> dict[str, Tensor]:
    """`perplexity`, exp of the entropy in nats, in [1, K], and `usage`, the share of codes that occur, in (0, 1].

    counts: (K,). Over few codes both are low in any case where K is large: lines of a training have those of its steps
    since the line before, its metrics those of a validation set.
    """
    share = counts / counts.sum().clamp(min=1e-12)
    return {"perplexity": torch.exp(torch.special.entr(share).sum()), "usage": (counts > 0).float().mean()}


def dvae(
    parameters: Tensor,
    logits: Tensor,
    image: Tensor,
    beta: float | Tensor,
    weight: Tensor,
    squared_weight: float = 0.0,
) -> tuple[tuple[Tensor, Tensor], Mapping[str, Tensor | Callable[[], Tensor]]]:
    """Negative ELBO over D, per image: (sum of the NLL + beta * sum of the KL over positions) / D.

    parameters: (B, 6, H, W). logits: (B, K, h, w). image: (B, 3, H, W) in [-1, 1]. beta: KL weight, 6.6 in the paper
    (which is beta / 192 on the mean KL of a position at 256 pixels and 32 x 32 codes). weight: (B,), 0 leaves an image
    out. squared_weight: weight of the mean squared error of the mapped pixels, an addition of ours (0 in the paper): a
    learned b lets the likelihood call small objects uncertain, long before it draws them.

    Returns ((weighted loss sum, weight sum), scalars); scalars are detached weighted means: `nll` nats per value,
    `squared` error of mapped pixels, and as functions, to be called where they are told, `kl` nats per position and
    `codes`, the counts (K,) of the argmax codes. The KL is of the plain categorical at any temperature.

    Raises ValueError when the shapes do not fit.
    """
    if parameters.shape != (image.shape[0], 6, *image.shape[2:]) or weight.shape != image.shape[:1]:
        raise ValueError(
            "dvae objective needs parameters (B, 6, H, W), image (B, 3, H, W) and weight (B,), "
            f"got {tuple(parameters.shape)}, {tuple(image.shape)} and {tuple(weight.shape)}"
        )
    mapped = map_pixels(full(image))
    nll = logit_laplace_nll(parameters, mapped).mean(dim=(1, 2, 3))  # (B,)
    squared = (torch.sigmoid(full(parameters[:, :3])) - mapped).square().mean(dim=(1, 2, 3))  # (B,)
    loss, known, kl = nll, logits.detach(), None
    if beta != 0:
        each = uniform_kl(logits).sum(dim=(1, 2))  # (B,)
        loss, kl = loss + beta * each / image[0].numel(), each.detach()
    total, scalars = weighted(loss + squared_weight * squared, weight, {"nll": nll, "squared": squared})

    def mean_kl() -> Tensor:
        found = (uniform_kl(known).sum(dim=(1, 2)) if kl is None else kl) / known[0, 0].numel()
        return weighted(found, weight, {"kl": found})[1]["kl"]

    def counts() -> Tensor:
        return codebook_counts(likeliest(known), known.shape[1], weight)

    return total, {**scalars, "kl": mean_kl, "codes": counts}


def anneal(step: int, start: float, end: float, steps: int, shape: str = "cosine") -> float:
    """start at step 0, end from `steps` on; between them half a cosine or a line. shape: "cosine" or "linear"."""
    if shape not in ("cosine", "linear"):
        raise ValueError(f'anneal needs shape "cosine" or "linear", got {shape!r}')
    t = min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0
    return start + (end - start) * (t if shape == "linear" else (1 - math.cos(math.pi * t)) / 2)


def temperature(
    step: int, start: float = 1.0, end: float = 1 / 16, steps: int = 150_000, shape: str = "cosine"
) -> float:
    """Temperature of the relaxation at `step`, as in appendix A.2."""
    return anneal(step, start, end, steps, shape)


def kl_weight(step: int, start: float = 0.0, end: float = 6.6, steps: int = 5000, shape: str = "cosine") -> float:
    """Weight beta of the KL at `step`: published as 0 to 6.6 over 5,000 updates, then constant."""
    return anneal(step, start, end, steps, shape)
