"""Objectives of diffusion: the simple loss (Ho 2020, arXiv:2006.11239, equation 14), its weights by SNR (min-SNR: Hang
2023, arXiv:2303.09556, section 3.4; P2: Choi 2022, arXiv:2204.00227, equation 8; truncated SNR: Salimans 2022,
arXiv:2202.00512, section 4; its root is ours), which timesteps are drawn (Esser 2024, arXiv:2403.03206, section 3.1),
the terms of the variational bound (Ho 2020, equations 5 and 13), and the hybrid for learned variances (Nichol 2021,
arXiv:2102.09672, equation 16).

The lecture leaves out KL(q(x_T | x_0) || p(x_T)), which the bound needs: it is `prior_nats`.

B samples of D values, T timesteps; SNR = (alpha / sigma)^2.

It does not know the network or the schedule: of the latter it is given numbers, (B, 1, ...) each.
"""

import math

import torch
from torch import Tensor

from ...layers.precision import full
from ...priors.denoiser import Denoised
from .vae import gaussian_kl
from .weighting import weighted

WEIGHTINGS = ("none", "min_snr", "truncated", "p2", "root")


def diffusion(
    found: Denoised,
    x_0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor,
    target: str = "eps",
    weighting: str = "none",
    gamma: float | None = None,
    bound: Tensor | None = None,
    bound_weight: float = 0.001,
    simple: bool = True,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Squared error of what is found in x_t = alpha x_0 + sigma eps, (B, ...). Separable.

    target: in which terms the error is taken, "eps", "x_0" or "v", each its mean over D. weight: (B,), 0 leaves a
    sample out. weighting, gamma: see `snr_weight`. bound: bits per dimension of the whole bound, as estimated from this
    t, (B,), which counts `bound_weight` (the hybrid loss: see `step_nats` for where gradients go). simple: False leaves
    the squared error out, so that the bound alone is learned, L_vlb (Ho 2020, equation 5).

    Returns ((weighted loss sum, weight sum), scalars), detached weighted means: `error` without the weighting, and
    `bound`. Raises ValueError for another target or weighting, or shapes that disagree.
    """
    if found.x_0.shape != x_0.shape or eps.shape != x_0.shape or weight.shape != x_0.shape[:1]:
        shapes = [tuple(x.shape) for x in (found.x_0, x_0, eps, weight)]
        raise ValueError(f"diffusion needs found, x_0 and eps of one shape (B, ...) and weight (B,), got {shapes}")
    error = squared_error(found, x_0, eps, alpha, sigma, target)
    snr = (alpha / sigma).square().flatten()
    loss, shown = snr_weight(snr, target, weighting, gamma) * error * float(simple), {"error": error}
    if bound is not None:
        loss, shown = loss + bound_weight * bound, shown | {"bound": bound}
    return weighted(loss, weight, shown)


def squared_error(found: Denoised, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, target: str) -> Tensor:
    """Of each sample, (B,), the mean over D in terms of the target; see `diffusion`."""
    errors = {
        "eps": lambda: found.eps - full(eps),
        "x_0": lambda: found.x_0 - full(x_0),
        "v": lambda: alpha * (found.eps - full(eps)) - sigma * (found.x_0 - full(x_0)),
    }
    if target not in errors:
        raise ValueError(f"diffusion: the error is taken in one of {', '.join(errors)}, got {target!r:.40}")
    return errors[target]().square().flatten(1).mean(dim=1)


def snr_weight(snr: Tensor, target: str, weighting: str = "none", gamma: float | None = None) -> Tensor:
    """The weight of a squared error at an SNR (B,), (B,). The papers state it for eps; an error of x_0 is 1 / SNR of
    that, one of v is (1 + 1 / SNR) of it, so the same loss has other weights there.

    "none": 1 in any target. "min_snr": min(SNR, gamma) / SNR of eps, gamma 5. "truncated": of x_0 max(SNR, 1), so that
    where noise prevails the whole picture still counts; an addition of ours is gamma, at most which it is, by default
    without end. "p2": (1 + SNR) ** -gamma, gamma 1. "root", ours: of x_0 max(sqrt(SNR), gamma), gamma 0.3; the error of
    x_0 that is left to a network that predicts v falls about as 1 / sqrt(SNR), so that above the floor all levels count
    alike, as under weights that are learned (Karras 2024, arXiv:2312.02696, equation 21), and the floor is for the
    noisiest ones, where captions are learned.
    Raises ValueError for another weighting, and a gamma that it cannot have.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "min_snr":
        of_x_0 = snr.clamp(max=5.0 if gamma is None else gamma)
    elif weighting == "truncated":
        if gamma is not None and gamma < 1:
            raise ValueError(f"diffusion: truncated weights are at least 1, so that their gamma is too, got {gamma}")
        of_x_0 = snr.clamp(1.0, gamma)
    elif weighting == "root":
        of_x_0 = snr.sqrt().clamp(min=0.3 if gamma is None else gamma)
    elif weighting == "p2":
        of_x_0 = snr * (1 + snr) ** -(1.0 if gamma is None else gamma)
    else:
        raise ValueError(f"diffusion: the weighting is one of {', '.join(WEIGHTINGS)}, got {weighting!r:.40}")
    return of_x_0 / {"eps": snr, "x_0": torch.ones_like(snr), "v": 1 + snr}[target]


def logit_normal(u: Tensor, std: float, mean: float = 0.0) -> Tensor:
    """sigmoid(mean + std z), z Gaussian, for the quantile u of z: both in [0, 1].

    Esser 2024, arXiv:2403.03206, equation 19, draw the time of a rectified flow by it; here it is the place among the
    timesteps of a schedule, whose noise levels are others.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def step_nats(
    x_0: Tensor, found_x_0: Tensor, log_variance: Tensor, coefficient: Tensor, posterior_variance: Tensor,
    levels: int = 256,
) -> Tensor:  # fmt: skip
    """The bound's term of one timestep, of each sample, in nats: (B,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) (Ho 2020, equation 5), where both means have the same share of x_t and
    `coefficient` of their x_0; where posterior_variance is 0, at t = 0, -ln p(x_0 | x_1) of 8-bit pixels (equation 13).
    log_variance: of p. For the hybrid loss found_x_0 comes detached, so that only variances learn from it; for L_vlb it
    does not.
    """
    apart = coefficient * (full(x_0) - full(found_x_0))
    log_q = posterior_variance.clamp(min=1e-30).log()
    precision = torch.exp(-log_variance)
    kl = 0.5 * (log_variance - log_q - 1 + torch.exp(log_q - log_variance) + apart.square() * precision)
    nll = discretised_gaussian_nll(x_0, found_x_0, 0.5 * log_variance, levels)
    return torch.where(posterior_variance == 0, nll, kl).flatten(1).sum(dim=1)


def prior_nats(x_0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) of each sample, in nats (B,), with alpha and sigma of the last timestep."""
    mean = alpha * full(x_0)
    return gaussian_kl(mean, (2 * sigma.log()).expand_as(mean)).flatten(1).sum(dim=1)


def bits_per_dim(nats: Tensor, x_0: Tensor) -> Tensor:
    """Nats of a sample as bits of each of its values, (B,)."""
    return nats / (x_0[0].numel() * math.log(2))


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor, levels: int = 256) -> Tensor:
    """-ln of a Gaussian's mass around each value of x in [-1, 1], half way to its neighbours (Ho 2020, equation 13).

    The lowest and the highest of the levels have the tails. All shapes broadcast.
    """
    x, half = full(x), 1 / (levels - 1)
    away, per_std = x - full(mean), torch.exp(-full(log_std))
    low, high = (away - half) * per_std, (away + half) * per_std
    above = low + high > 0  # there the mass is a difference of numbers near 1: mirror it
    near, far = torch.where(above, -low, high), torch.where(above, -high, low)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    inside = log_near + torch.log(-torch.expm1((log_far - log_near).clamp(max=-1e-7)))
    lowest, highest = torch.special.log_ndtr(high), torch.special.log_ndtr(-low)
    return -torch.where(x < half - 1, lowest, torch.where(x > 1 - half, highest, inside))
