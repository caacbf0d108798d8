"""How much noise a picture has at each of T timesteps: the forward process of diffusion, and its posterior.

    x_t = alpha_t x_0 + sigma_t eps,    alpha_t = sqrt(alpha_bar_t),    sigma_t = sqrt(1 - alpha_bar_t)

(Ho 2020, arXiv:2006.11239, equation 4.) Timestep t = 0 .. T - 1 has the noise of the paper's t + 1; -1 is the clean
picture, so that what comes before t = 0 needs no case of its own. Tables are made in float64. Between two timesteps,
where the grids of some solvers lie, sigma_t / alpha_t is linear.

Schedules: linear (Ho 2020, section 4), scaled_linear (Rombach 2022, arXiv:2112.10752, the released configurations),
cosine (Nichol 2021, arXiv:2102.09672, equation 17), each with zero terminal SNR if wanted (Lin 2023, arXiv:2305.08891).

B samples of any shape, T timesteps.

It does not know what a network predicts, nor how samples are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layers.precision import full

SPACINGS = ("leading", "trailing", "linspace", "karras")
_RHO = 7.0  # Karras 2022, table 1


def linear(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """beta, float64 (T,), in equal steps (Ho 2020, section 4). The ends are for T = 1000."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear(num_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """beta, float64 (T,), whose square root takes equal steps: that of latent diffusion."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()


def cosine(num_timesteps: int, offset: float = 0.008, most: float = 0.999) -> Tensor:
    """beta, float64 (T,), for alpha_bar like a squared cosine (Nichol 2021, equation 17), each at most `most`."""
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((time + offset) / (1 + offset) * torch.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=most)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The same schedule, shifted and stretched so that its last step leaves no signal (Lin 2023, algorithm 1)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    before = torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])
    return 1 - (alpha / before).square()


SCHEDULES: dict[str, Callable[..., Tensor]] = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}


@dataclass(frozen=True)
class Level:
    """A place on the way from noise to picture: its timestep, -1 where clean, and alpha and sigma there."""

    t: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class Schedule:
    """betas: float64 (T,), each in (0, 1], the last 1 where no signal is to be left."""

    betas: Tensor

    def __post_init__(self) -> None:
        good = self.betas.dtype == torch.float64 and self.betas.dim() == 1 and len(self.betas) > 1
        if not good or not (self.betas[:-1] < 1).all() or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(
                "a schedule needs betas as float64 (T,) with T > 1, each above 0 and below 1 (the last may be 1), got "
                f"{self.betas.dtype} of shape {tuple(self.betas.shape)}; make it by `new_schedule`"
            )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The product of 1 - beta up to each timestep, float64 (T,)."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float64 (1 + T,): the first is that of the clean picture."""
        alpha_bar = torch.cat([torch.ones_like(self.betas[:1]), self.alpha_bar])
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    @cached_property
    def _posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """What x_0 and x_t are multiplied with in the posterior's mean, and its variance, float64 (T,) each."""
        alpha, sigma = self._tables
        kept = (sigma[:-1] / sigma[1:]).square()
        return alpha[:-1] * self.betas / sigma[1:].square(), (1 - self.betas).sqrt() * kept, self.betas * kept

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the timesteps t (B,), in [-1, T - 1], to be multiplied with `like` (B, ...).

        t: int64, or floating where it may lie between two. Both are (B, 1, ...) in the full precision of `like`.
        """
        below = t.floor().long() + 1
        alpha, sigma = (_pick(table, below, like) for table in self._tables)
        if not t.is_floating_point():
            return alpha, sigma
        above = (below + 1).clamp(max=self.num_timesteps)
        share = (t - t.floor()).to(alpha.dtype).view(alpha.shape)
        next_alpha, next_sigma = (_pick(table, above, like) for table in self._tables)
        ratio = (1 - share) * sigma / alpha + share * next_sigma / next_alpha
        between = share > 0
        alpha = torch.where(between, (1 + ratio.square()).rsqrt(), alpha)
        return alpha, torch.where(between, (1 + ratio.pow(-2)).rsqrt(), sigma)

    def diffuse(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """A draw of q(x_t | x_0) for x_0 and eps (B, ...) and t (B,) (Ho 2020, equation 4)."""
        alpha, sigma = self.at(t, x_0)
        return alpha * full(x_0) + sigma * full(eps)

    def posterior_terms(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and the variance of q(x_{t-1} | x_t, x_0), whose mean is a x_0 + b x_t (Ho 2020, equations 6 and 7).

        t: int64 (B,). Each is (B, 1, ...). At t = 0 they are 1, 0 and 0.
        """
        a, b, variance = (_pick(table, t, like) for table in self._posterior)
        return a, b, variance

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and variance (B, 1, ...) of q(x_{t-1} | x_t, x_0); see `posterior_terms`."""
        a, b, variance = self.posterior_terms(t, x_t)
        return a * full(x_0) + b * full(x_t), variance

    def log_variance(self, t: Tensor, share: Tensor | float, like: Tensor) -> Tensor:
        """ln of a variance of p(x_{t-1} | x_t), (B, 1, ...) or the shape of `share`: share ln beta + (1 - share) ln
        beta_tilde (Nichol 2021, equation 15); 1 and 0 are the two fixed choices of Ho 2020, section 3.2.

        t: int64 (B,). beta_tilde of t = 0, which is 0, counts as that of t = 1.
        """
        beta_tilde = self._posterior[2]
        most, least = self.betas.log(), torch.cat([beta_tilde[1:2], beta_tilde[1:]]).log()
        return share * _pick(most, t, like) + (1 - share) * _pick(least, t, like)

    def level(self, t: float) -> Level:
        """One timestep in [-1, T - 1] as numbers."""
        return self._levels([t])[0]

    def _levels(self, times: list[float]) -> list[Level]:
        t = torch.tensor(times, dtype=torch.float64)
        alpha, sigma = self.at(t, t)
        return [Level(*numbers) for numbers in zip(t.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]

    def levels(self, num_steps: int, spacing: str = "trailing") -> list[Level]:
        """num_steps + 1 levels from the noisiest to the clean picture. Each spacing places the num_steps noisy ones:

        "trailing": T - 1 and down by T / num_steps. For all solvers, and needed with zero terminal SNR (Lin 2023,
        table 2). "leading": up from 0 by T // num_steps; what DDIM was published with, and Stable Diffusion one higher;
        begins below the noisiest. "linspace": from T - 1 to 0 in equal parts, also between timesteps; for Euler and
        Heun as in k-diffusion. "karras": equal parts of (sigma / alpha) ** (1 / 7) (Karras 2022, arXiv:2206.00364,
        equation 5); for few steps of a solver of second order.

        Raises ValueError for another spacing, num_steps outside [1, T], or "karras" with zero terminal SNR.
        """
        total = self.num_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"a sampler of {total} timesteps takes 1 to {total} steps, got {num_steps}")
        if spacing == "trailing":
            times: Any = np.round(total - np.arange(num_steps) * total / num_steps) - 1
        elif spacing == "leading":
            times = np.arange(num_steps)[::-1] * (total // num_steps)
        elif spacing == "linspace":
            times = np.linspace(total - 1, 0, num_steps)
        elif spacing == "karras":
            times = self._karras(num_steps)
        else:
            raise ValueError(f"timesteps are spaced by one of {', '.join(SPACINGS)}, got {spacing!r:.40}")
        return self._levels([*times.tolist(), -1])

    def _karras(self, num_steps: int) -> Any:
        alpha, sigma = (table[1:].numpy() for table in self._tables)
        if alpha[-1] == 0:
            raise ValueError(
                "karras spacing needs signal in the noisiest level, and this schedule has zero terminal SNR; choose "
                "trailing, or a schedule without (zero_terminal false)"
            )
        ratio = sigma / alpha
        low, high = ratio[0] ** (1 / _RHO), ratio[-1] ** (1 / _RHO)
        wanted = np.linspace(high, low, num_steps) ** _RHO
        return np.interp(wanted, ratio, np.arange(len(ratio)))


def _pick(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """table (N,) at index (B,), as (B, 1, ...) beside `like` (B, ...), in its full precision and on its device."""
    values = table.to(full(like[:0]).dtype).to(like.device, non_blocking=True)  # else the device is waited for
    return values[index].view(-1, *[1] * (like.dim() - 1))


def new_schedule(
    kind: str = "linear", num_timesteps: int = 1000, zero_terminal: bool = False, **knobs: float
) -> Schedule:
    """A schedule by name. kind: "linear", "scaled_linear" or "cosine". zero_terminal: see `zero_terminal_snr`.

    knobs: of the function of that name, by default the paper's. Raises ValueError for another kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"a noise schedule is one of {', '.join(SCHEDULES)}, got {kind!r:.40}")
    betas = SCHEDULES[kind](num_timesteps, **knobs)
    return Schedule(zero_terminal_snr(betas) if zero_terminal else betas)
