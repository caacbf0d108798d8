"""The one seam between a network, what it predicts, its objective and its samplers: `denoise(x_t, t, condition)`.

    x_t = alpha x_0 + sigma eps,    v = alpha eps - sigma x_0

A network predicts eps (Ho 2020, arXiv:2006.11239), x_0, or v (Salimans 2022, arXiv:2202.00512, appendix D); from any of
them and x_t the others follow. A network with twice the channels predicts variances too (Nichol 2021,
arXiv:2102.09672, equation 15). Guidance and clipping are denoisers around a denoiser, so samplers know of neither.

B samples of shape (C, h, w).

It does not know the network, what a condition is, nor solvers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layers.precision import full, without_autocast
from .schedules import Schedule

PREDICTIONS = ("eps", "x_0", "v")


@dataclass(frozen=True)
class Denoised:
    """What is known of x_t, (B, C, h, w) each, in full precision.

    variance_share: where variances are learned, the part of ln beta in ln of the variance, the rest being of
    ln beta_tilde (Nichol 2021, equation 15). A share means the same on every grid of timesteps; a variance would be
    that of one step of the training schedule only.
    """

    x_0: Tensor
    eps: Tensor
    variance_share: Tensor | None = None


class Denoise(Protocol):
    """x_t (B, C, h, w), t (B,) int64 or floating in [0, T - 1], and a condition that is passed through."""

    @property
    def schedule(self) -> Schedule: ...
    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Denoised: ...


@dataclass(frozen=True)
class Denoiser:
    """A raw network as a denoiser.

    network: (x_t, t, condition) -> (B, C, h, w), or (B, 2 C, h, w) where variances are learned. prediction: what it
    predicts, "eps", "x_0" or "v". Raises ValueError for another prediction, and for "eps" where the schedule ends
    without signal: there eps is x_t, whatever x_0 is.
    """

    network: Callable[[Tensor, Tensor, Any], Tensor]
    schedule: Schedule
    prediction: str = "eps"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"a network predicts one of {', '.join(PREDICTIONS)}, got {self.prediction!r:.40}")
        if self.prediction == "eps" and self.schedule.alpha_bar[-1] == 0:
            raise ValueError(
                "a network that predicts eps cannot give x_0 where no signal is left, and this schedule has zero "
                "terminal SNR; let the network predict v or x_0, or keep the signal (zero_terminal false)"
            )

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Denoised:
        """See `Denoise`. Raises ValueError where the network gives another shape."""
        out = self.network(x_t, t, condition)
        batch, channels, *place = x_t.shape
        if out.shape not in ((batch, channels, *place), (batch, 2 * channels, *place)):
            raise ValueError(
                f"a network that denoises {tuple(x_t.shape)} must give the same shape, or twice the channels where "
                f"variances are learned, got {tuple(out.shape)}"
            )
        with without_autocast(x_t):
            # A copy, for a network that was compiled may write its next output to the same memory.
            predicted, *share = full(out.clone()).split(channels, dim=1)
            x_0, eps = convert(predicted, full(x_t), *self.schedule.at(t, x_t), self.prediction)
            return Denoised(x_0, eps, (share[0] + 1) / 2 if share else None)


def convert(predicted: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """x_0 and eps out of one prediction, all of the shape of x_t; alpha and sigma to be broadcast."""
    if prediction == "eps":
        return (x_t - sigma * predicted) / alpha, predicted
    if prediction == "x_0":
        return predicted, (x_t - alpha * predicted) / sigma
    return alpha * x_t - sigma * predicted, sigma * x_t + alpha * predicted


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance (Ho 2022, arXiv:2207.12598): null + scale (conditional - null), in x_0 and eps alike.

    null: the null condition, or that of a negative prompt. scale: 1 is no guidance, and looks at no null condition.
    interval: guides only where low < sigma / alpha <= high (Kynkaanniemi 2024, arXiv:2404.07724); elsewhere as scale 1.
    rescale: share in [0, 1] of v that is brought back to the deviation it has without guidance (Lin 2023,
    arXiv:2305.08891, equations 15 and 16). Learned variances are those of the condition. join: of two conditions one of
    twice the samples, such as `Condition.beside`, so that both passes are one; without it they are two.
    """

    denoise: Denoise
    null: Any
    scale: float
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    join: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        low, high = self.interval or (0.0, float("inf"))
        if not 0 <= self.scale < float("inf") or not 0 <= self.rescale <= 1 or not 0 <= low < high:
            raise ValueError(
                "guidance needs a finite scale of at least 0 (1 is none), a rescale in [0, 1] and an interval "
                f"0 <= low < high of sigma / alpha, got {self.scale}, {self.rescale} and {self.interval}"
            )

    @property
    def schedule(self) -> Schedule:
        """That of the denoiser within."""
        return self.denoise.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Denoised:
        """See `Denoise`."""
        alpha, sigma = self.schedule.at(t, x_t)
        low, high = self.interval or (0.0, float("inf"))
        inside = (sigma > low * alpha) & (sigma / high <= alpha)  # alpha may be 0
        always = low == 0 and high == float("inf")  # else the device is waited for
        if self.scale == 1 or not (always or inside.any()):
            return self.denoise(x_t, t, condition)
        own, null = self._both(x_t, t, condition)
        x_0, eps = (b + self.scale * (a - b) for a, b in ((own.x_0, null.x_0), (own.eps, null.eps)))
        if self.rescale:
            plain, guided = alpha * own.eps - sigma * own.x_0, alpha * eps - sigma * x_0
            factor = 1 + self.rescale * (_deviation(plain) / _deviation(guided) - 1)
            x_0, eps = convert(factor * guided, full(x_t), alpha, sigma, "v")
        return replace(own, x_0=torch.where(inside, x_0, own.x_0), eps=torch.where(inside, eps, own.eps))

    def _both(self, x_t: Tensor, t: Tensor, condition: Any) -> tuple[Denoised, Denoised]:
        """What is found under the condition and under the null one."""
        if self.join is None:
            return self.denoise(x_t, t, condition), self.denoise(x_t, t, self.null)
        found = self.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), self.join(condition, self.null))
        shares = (None, None) if found.variance_share is None else found.variance_share.chunk(2)
        own, null = (Denoised(*half) for half in zip(found.x_0.chunk(2), found.eps.chunk(2), shares, strict=True))
        return own, null


@dataclass(frozen=True)
class Clipped:
    """x_0 kept in [-limit, limit], and eps such that both still make x_t: for pixels, as Ho 2020 samples them."""

    denoise: Denoise
    limit: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """That of the denoiser within."""
        return self.denoise.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Denoised:
        """See `Denoise`."""
        found = self.denoise(x_t, t, condition)
        x_0 = found.x_0.clamp(-self.limit, self.limit)
        return replace(found, x_0=x_0, eps=convert(x_0, full(x_t), *self.schedule.at(t, x_t), "x_0")[1])


def _deviation(x: Tensor) -> Tensor:
    """Of each sample's values, (B, 1, ...)."""
    return x.flatten(1).std(dim=1).view(-1, *[1] * (x.dim() - 1)).clamp(min=1e-12)
