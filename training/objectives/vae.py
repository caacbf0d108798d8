"""Objective of the VAE: the evidence lower bound (Kingma 2013, arXiv:1312.6114, equation 3), with a Gaussian or a
discretised logistic likelihood and with free bits (both Kingma 2016, arXiv:1606.04934, appendix C), the weight beta of
the KL (Higgins 2017), and the importance-weighted bound (Burda 2015, arXiv:1509.00519, equation 8).

B images of D = 3 * H * W values in [-1, 1], L latents, S draws.

It does not know the model: it takes the parameters of its distributions. All is in nats, summed over dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers.precision import full
from .weighting import Average, check_images, weighted

_HALF_LEVEL = 1 / 255  # neighbouring 8-bit values are 2 / 255 apart
_LEAST_LOG_SCALE = -7.0  # a tenth of a level; a density would grow without bound on flat areas
_LN_2PI = math.log(2 * math.pi)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each dimension (Kingma 2013, appendix B), of the same shape."""
    mean, log_variance = full(mean), full(log_variance)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class _Bounded(torch.autograd.Function):
    """At least _LEAST_LOG_SCALE; below it gradients come through that lead upwards, so that there is a way back."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(log_scale)
        return log_scale.clamp(min=_LEAST_LOG_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (log_scale,) = ctx.saved_tensors
        return grad * ((log_scale >= _LEAST_LOG_SCALE) | (grad < 0))


def _bounded(log_scale: Tensor, values: Tensor) -> Tensor:
    """Of each of the values: of their sum, gradients would come through in passes otherwise than in one."""
    bounded: Tensor = _Bounded.apply(full(log_scale).expand_as(values))
    return bounded


def _to_levels(image: Tensor) -> Tensor:
    return ((image + 1) * 127.5).round() / 127.5 - 1


def gaussian_nll(image: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """-ln N(image | location, exp(log_scale)^2) of each value, a density over [-1, 1]: (B, 3, H, W)."""
    away = full(image) - full(location)
    log_scale = _bounded(log_scale, away)
    return 0.5 * (away * torch.exp(-log_scale)).square() + log_scale + 0.5 * _LN_2PI


def logistic_nll(image: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """-ln of the probability of each 8-bit value, (B, 3, H, W): a logistic distribution's mass between half levels.

    Of an image that was never stored in 8 bits, the nearest levels are meant. The lowest and the highest value have the
    tails. With a and b the ends of the interval, the mass is sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which loses no
    digits however far the value is from the location.
    """
    image = _to_levels(full(image))
    away = image - full(location)
    per_scale = torch.exp(-_bounded(log_scale, away))
    above = F.logsigmoid((away + _HALF_LEVEL) * per_scale)  # ln sigmoid(a)
    below = F.logsigmoid(-(away - _HALF_LEVEL) * per_scale)  # ln sigmoid(-b)
    inside = above + below + torch.log(-torch.expm1(-2 * _HALF_LEVEL * per_scale))
    log_mass = torch.where(image < _HALF_LEVEL - 1, above, torch.where(image > 1 - _HALF_LEVEL, below, inside))
    return -log_mass


def elbo_terms(
    reconstruction: Tensor,
    log_scale: Tensor,
    image: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    likelihood: str = "gaussian",
) -> tuple[Tensor, Tensor]:
    """-ln of the likelihood of each image (B,), and the KL of each of its latents (B, L), in nats; see `vae`."""
    each_nll = gaussian_nll if likelihood == "gaussian" else logistic_nll
    nll = each_nll(image, reconstruction, log_scale).flatten(1).sum(dim=1)
    return nll, gaussian_kl(mean, log_variance).flatten(1)


def bits_per_dim(elbo: Tensor, values: int, likelihood: str = "gaussian") -> Tensor:
    """The bound `elbo` of images of so many values, in nats, as bits per value of 8 bits."""
    units = values * math.log(127.5) if likelihood == "gaussian" else 0.0  # a level is 1 / 127.5 wide
    return (units - elbo) / (values * math.log(2))


def vae(
    reconstruction: Tensor,
    log_scale: Tensor,
    image: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    weight: Tensor,
    likelihood: str = "gaussian",
    beta: float = 1.0,
    free_bits: float = 0.0,
    average: Average | None = None,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Negative evidence lower bound of each image, with one draw of the latents, in nats.

    reconstruction: location (B, 3, H, W) of the likelihood, log_scale: to be broadcast to it. image: (B, 3, H, W).
    mean, log_variance: of the posterior, (B, L) or (B, C, h, w). weight: (B,), 0 leaves an image out. likelihood:
    "gaussian" or "logistic". beta: weight of the KL. free_bits: nats of each latent that cost nothing more: its KL,
    averaged over the batch, counts as at least this. With it the loss is coupled, over ranks by `average`; else it is
    separable.

    Returns ((weighted loss sum, weight sum), scalars), the scalars detached weighted means: `nll`, `kl` and `elbo` in
    nats per image, and `bits_per_dim`, -elbo in bits per value of 8 bits. With the Gaussian the last is a bound only
    for images with uniform noise of one level. Raises ValueError when shapes disagree.
    """
    check_images("vae", reconstruction, image, weight)
    if likelihood not in ("gaussian", "logistic") or mean.shape != log_variance.shape:
        raise ValueError(
            "vae needs likelihood 'gaussian' or 'logistic', and mean and log_variance of one shape, got "
            f"{likelihood!r}, {tuple(mean.shape)} and {tuple(log_variance.shape)}"
        )
    nll, each_kl = elbo_terms(reconstruction, log_scale, image, mean, log_variance, likelihood)
    kl = each_kl.sum(dim=1)
    shown = {"nll": nll, "kl": kl, "elbo": -(nll + kl)}
    shown["bits_per_dim"] = bits_per_dim(shown["elbo"], image[0].numel(), likelihood)
    (total, count), scalars = weighted(nll + beta * kl, weight, shown)
    if free_bits > 0:
        share = weight.to(kl.dtype) / count.clamp(min=1e-12)
        each = share @ each_kl  # (L,)
        each = each if average is None else average(each)
        total = total + beta * count * (each.clamp(min=free_bits) - each).sum()
    return (total, count), scalars


def iwae(log_likelihood: Tensor, latents: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln of the mean importance weight p(x | z) p(z) / q(z | x) over S draws z of q: a bound of ln p(x), (B,), in nats.

    log_likelihood: ln p(x | z), (S, B). latents: (S, B, L), drawn from the posteriors with mean and log_variance
    (B, L). With S = 1 its mean is the evidence lower bound; it grows with S. Raises ValueError when shapes disagree.
    """
    if latents.shape != (*log_likelihood.shape, *mean.shape[1:]) or mean.shape != log_variance.shape:
        raise ValueError(
            "iwae needs log_likelihood (S, B), latents (S, B, L), mean and log_variance (B, L), got "
            f"{[tuple(x.shape) for x in (log_likelihood, latents, mean, log_variance)]}"
        )
    latents, mean, log_variance = full(latents), full(mean), full(log_variance)
    log_prior = -0.5 * (latents.square() + _LN_2PI).flatten(2).sum(dim=2)
    deviation = (latents - mean).square() * torch.exp(-log_variance)
    log_posterior = -0.5 * (deviation + log_variance + _LN_2PI).flatten(2).sum(dim=2)
    log_weight = full(log_likelihood) + log_prior - log_posterior  # (S, B)
    return log_weight.logsumexp(dim=0) - math.log(len(log_weight))
