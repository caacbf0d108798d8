"""Solvers that walk from noise to a sample: plain functions over one call, `denoise(x_t, t, condition)`.

    sampler(denoise, condition, shape, seeds, **knobs) -> z

Ancestral DDPM (Ho 2020, arXiv:2006.11239, algorithm 2), DDIM (Song 2020, arXiv:2010.02502, equation 12), Euler, its
ancestral form and Heun (Karras 2022, arXiv:2206.00364, algorithm 1 without churn), DPM-Solver++ 2M and its SDE form (Lu
2022, arXiv:2211.01095, algorithm 2 and appendix), UniPC (Zhao 2023, arXiv:2302.04867). Several of them are one formula:
in sigma / alpha an Euler step of the probability flow is DDIM's with eta = 0, the ancestral Euler step is DDIM's with
eta = 1, that is DDPM's with its smaller variance, and UniPC's predictor is DPM-Solver++ 2M. They are written once.

A solver is a rule for one step; `_walk` does what is common to all: the grid of timesteps, the draws, where to begin
(image-to-image, given noise) and what to keep (inpainting). With h = lambda' - lambda, lambda = ln(alpha / sigma), and
primes for the level that a step goes to, alpha' (1 - exp(-h)) is written alpha' - sigma' alpha / sigma, which is finite
at pure noise and at the clean picture.

B samples of `shape`, as (C, h, w).

It does not know the network, guidance or clipping (see `denoiser`), nor how a sample is decoded.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ..layers.precision import full
from ..layers.random import normal
from .denoiser import Denoise, Denoised
from .schedules import Level

Look = Callable[[Tensor, Level], Denoised]
Draw = Callable[[], Tensor]
Step = Callable[[Tensor, Level, Level, Look, Draw], Tensor]
_FAINT = 1e-4  # alpha: of the last timestep of cosine noise, and near that of zero terminal SNR


class Keep(NamedTuple):
    """What inpainting keeps: x_0 (B, *shape) where mask (B, 1, h, w) is 1; between 0 and 1 it is blended."""

    x_0: Tensor
    mask: Tensor


class Walk(TypedDict, total=False):
    """The knobs of every sampler.

    num_steps: steps, by default 50. spacing: see `Schedule.levels`, by default "trailing" ("linspace" of the Euler
    family and Heun). start: x_0 (B, *shape) to begin from, noised so far that the last share `strength` in [0, 1] of
    the steps is left (image-to-image). noise: (B, *shape), in place of the drawn noise of the beginning. keep: see
    `Keep`. progress: called with (steps done, steps in all).
    """

    num_steps: int
    spacing: str
    start: Tensor | None
    strength: float
    noise: Tensor | None
    keep: Keep | None
    progress: Callable[[int, int], None] | None


def ddpm(
    denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, variance: str = "small",
    **walk: Unpack[Walk],
) -> Tensor:  # fmt: skip
    """Ancestral sampling (Ho 2020, algorithm 2), also over fewer steps (Nichol 2021, section 4).

    variance: "small", beta_tilde, or "large", beta (Ho 2020, section 3.2); where variances are learned, these are used.
    seeds: int64 (B,), on the device of the network, one for each sample. Returns (B, *shape). Raises ValueError for
    knobs out of range.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be 'small' (beta_tilde) or 'large' (beta), got {variance!r:.40}")

    def step(x: Tensor, now: Level, then: Level, look: Look, draw: Draw) -> Tensor:
        found, (beta, beta_tilde) = look(x, now), _variances(now, then)
        mean = _toward(found, then, then.sigma**2 - beta_tilde)
        if beta_tilde == 0:  # the clean picture
            return mean
        share = x.new_tensor(float(variance == "large")) if found.variance_share is None else found.variance_share
        log_variance = share * math.log(beta) + (1 - share) * math.log(beta_tilde)
        return mean + torch.exp(0.5 * log_variance) * draw()

    return _walk(step, denoise, condition, shape, seeds, **walk)


def ddim(
    denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, eta: float = 0.0, **walk: Unpack[Walk]
) -> Tensor:
    """DDIM (Song 2020, equation 12). eta in [0, 1]: 0 draws no noise after the first, 1 has DDPM's smaller variance.

    Arguments and result as in `ddpm`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in [0, 1], from deterministic to DDPM's variance, got {eta}")

    def step(x: Tensor, now: Level, then: Level, look: Look, draw: Draw) -> Tensor:
        variance = eta**2 * _variances(now, then)[1]  # equation 16
        x = _toward(look(x, now), then, then.sigma**2 - variance)
        return x + math.sqrt(variance) * draw() if variance else x

    return _walk(step, denoise, condition, shape, seeds, **walk)


def euler(denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, **walk: Unpack[Walk]) -> Tensor:
    """Euler's method for the probability flow in sigma / alpha: DDIM with eta = 0, by default between timesteps too."""
    return ddim(denoise, condition, shape, seeds, 0.0, **_between(walk))


def euler_ancestral(
    denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, **walk: Unpack[Walk]
) -> Tensor:
    """Euler down to less noise than wanted, then as much again: DDIM with eta = 1, by default between timesteps too."""
    return ddim(denoise, condition, shape, seeds, 1.0, **_between(walk))


def heun(denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, **walk: Unpack[Walk]) -> Tensor:
    """Heun's method in sigma / alpha (Karras 2022, algorithm 1): of second order, two looks a step.

    Euler's where a level has hardly any signal, or no noise: the second look corrects by the ratio of noise to signal,
    which at the end of cosine noise is 20,000. Arguments and result as in `ddpm`.
    """

    def step(x: Tensor, now: Level, then: Level, look: Look, draw: Draw) -> Tensor:
        found = look(x, now)
        tried = _toward(found, then, then.sigma**2)
        if then.sigma == 0 or now.alpha < _FAINT:
            return tried
        turn = look(tried, then).eps - found.eps
        return tried + 0.5 * (then.sigma - then.alpha * now.sigma / now.alpha) * turn

    return _walk(step, denoise, condition, shape, seeds, **_between(walk))


def dpmpp_2m(denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, **walk: Unpack[Walk]) -> Tensor:
    """DPM-Solver++ of second order from two looks at x_0 (Lu 2022, algorithm 2). Arguments and result as in `ddpm`."""
    past = _Past()

    def step(x: Tensor, now: Level, then: Level, look: Look, draw: Draw) -> Tensor:
        x_0, turn = past.extrapolate(look(x, now).x_0, now, then)
        return then.sigma / now.sigma * x + _gain(now, then) * (x_0 + 0.5 * turn)

    return _walk(step, denoise, condition, shape, seeds, **walk)


def dpmpp_2m_sde(
    denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, **walk: Unpack[Walk]
) -> Tensor:
    """SDE-DPM-Solver++ of second order (Lu 2022, appendix): with fresh noise. Arguments and result as in `ddpm`."""
    past = _Past()

    def step(x: Tensor, now: Level, then: Level, look: Look, draw: Draw) -> Tensor:
        x_0, turn = past.extrapolate(look(x, now).x_0, now, then)
        decay = then.sigma * now.alpha / (then.alpha * now.sigma)  # exp(-h)
        x = then.sigma / now.sigma * decay * x + then.alpha * (1 - decay**2) * (x_0 + 0.5 * turn)
        return x + then.sigma * math.sqrt(1 - decay**2) * draw() if then.sigma else x

    return _walk(step, denoise, condition, shape, seeds, **walk)


def unipc(denoise: Denoise, condition: Any, shape: tuple[int, ...], seeds: Tensor, **walk: Unpack[Walk]) -> Tensor:
    """UniPC-2 with B(h) = exp(h) - 1 in x_0 (Zhao 2023): DPM-Solver++ 2M, whose look at a level also corrects how the
    level was reached, at no cost. Arguments and result as in `ddpm`.
    """
    past, last = _Past(), None

    def step(x: Tensor, now: Level, then: Level, look: Look, draw: Draw) -> Tensor:
        nonlocal last
        new = look(x, now).x_0
        if last is not None:
            x = _correct(*last, now, new)
        before, (x_0, turn) = past.newest, past.extrapolate(new, now, then)
        last = x, now, new, before
        return then.sigma / now.sigma * x + _gain(now, then) * (x_0 + 0.5 * turn)

    return _walk(step, denoise, condition, shape, seeds, **walk)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    each.__name__: each for each in (ddpm, ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc)
}


@torch.no_grad()
def ddim_invert(
    denoise: Denoise, condition: Any, x_0: Tensor, num_steps: int = 50, spacing: str = "trailing", looks: int = 4,
    strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """The noise (B, *shape) from which `ddim` with the same knobs, and this as `noise`, makes x_0 (B, *shape).

    A step of DDIM is a rotation, x' = cos x - sin v (Salimans 2022, arXiv:2202.00512, appendix D). It is undone by a
    fixed point in v, approached in so many looks; one look, as usual (Song 2020, section 4.3), is off by the curvature
    of a step. strength: below 1 for a walk with x_0 as its `start`.
    """
    levels = denoise.schedule.levels(num_steps, spacing)[num_steps - round(strength * num_steps) :][::-1]
    x = full(x_0)
    for now, then in zip(levels, levels[1:], strict=False):  # up: `then` is the noisier one
        held, cos = x, then.alpha * now.alpha + then.sigma * now.sigma
        for _ in range(looks):
            found = denoise(x, _time(then, x), condition)
            v = then.alpha * found.eps - then.sigma * found.x_0
            x = (held + (then.sigma * now.alpha - then.alpha * now.sigma) * v) / cos
    return x if strength == 1 else (x - levels[-1].alpha * full(x_0)) / levels[-1].sigma


@torch.no_grad()
def _walk(
    step: Step,
    denoise: Denoise,
    condition: Any,
    shape: tuple[int, ...],
    seeds: Tensor,
    num_steps: int = 50,
    spacing: str = "trailing",
    start: Tensor | None = None,
    strength: float = 1.0,
    noise: Tensor | None = None,
    keep: Keep | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """All levels from noise to the clean picture by one rule; see `Walk`."""
    if not 0 <= strength <= 1 or (strength < 1 and start is None):
        raise ValueError(f"strength must be in [0, 1], and below 1 only with a start, got {strength}")
    levels = denoise.schedule.levels(num_steps, spacing)
    first = num_steps - round(strength * num_steps)
    for name, given in (("noise", noise), ("start", start), ("keep", keep.x_0 if keep else None)):
        if given is not None and given.shape != (len(seeds), *shape):
            raise ValueError(f"a sampler needs {name} as {(len(seeds), *shape)}, got {tuple(given.shape)}")
    eps = normal(0, 0, seeds, shape, "sampler start") if noise is None else full(noise)
    x = eps if start is None else levels[first].alpha * full(start) + levels[first].sigma * eps
    for i in range(first, num_steps):
        now, then = levels[i], levels[i + 1]

        def look(x: Tensor, at: Level) -> Denoised:
            return denoise(x, _time(at, x), condition)

        def draw(i: int = i) -> Tensor:
            return normal(0, i, seeds, shape, "sampler step").to(eps.dtype)

        x = _blend(step(x, now, then, look, draw), keep, then, eps)
        if progress is not None:
            progress(i + 1 - first, num_steps - first)
    return x


def _blend(x: Tensor, keep: Keep | None, at: Level, eps: Tensor) -> Tensor:
    """What is to be kept, with the noise of a level, over what was made (Avrahami 2022, arXiv:2111.14818)."""
    return x if keep is None else torch.lerp(x, at.alpha * full(keep.x_0) + at.sigma * eps, keep.mask.to(x))


def _time(at: Level, x: Tensor) -> Tensor:
    """The timestep for each sample, (B,): int64, or floating where it lies between two."""
    return torch.full((len(x),), at.t, device=x.device, dtype=torch.int64 if at.t.is_integer() else x.dtype)


def _between(walk: Walk) -> Walk:
    return Walk(spacing="linspace") | walk


def _variances(now: Level, then: Level) -> tuple[float, float]:
    """beta and beta_tilde of a step over any number of timesteps (Ho 2020, equation 7)."""
    beta = 1 - (now.alpha / then.alpha) ** 2
    return beta, beta * (then.sigma / now.sigma) ** 2


def _toward(found: Denoised, then: Level, variance: float) -> Tensor:
    """x at a level with so much of its variance from the noise that is there already (Song 2020, equation 12)."""
    return then.alpha * found.x_0 + math.sqrt(max(variance, 0.0)) * found.eps


def _gain(now: Level, then: Level) -> float:
    """alpha' (1 - exp(-h))."""
    return then.alpha - then.sigma * now.alpha / now.sigma


def _half_log_snr(at: Level) -> float:
    """lambda; infinite at the ends."""
    return math.log(at.alpha / at.sigma) if at.alpha and at.sigma else math.copysign(math.inf, at.alpha - 0.5)


class _Past:
    """The last look of a solver with two."""

    def __init__(self) -> None:
        self.newest: tuple[Level, Tensor] | None = None

    def extrapolate(self, x_0: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor | float]:
        """x_0, and by how much it would change over the step if it went on as before; 0 where that is not known."""
        before, self.newest = self.newest, (now, x_0)
        if before is None or before[0].alpha == 0 or then.sigma == 0:
            return x_0, 0.0
        ahead, behind = (_half_log_snr(b) - _half_log_snr(a) for a, b in ((now, then), (before[0], now)))
        return x_0, ahead / behind * (x_0 - before[1])


def _correct(
    x: Tensor, was: Level, old: Tensor, before: tuple[Level, Tensor] | None, now: Level, new: Tensor
) -> Tensor:
    """x at `now`, again from x at `was`, by x_0 as seen at both, and at one before (Zhao 2023, UniC with B(h))."""
    x = now.sigma / was.sigma * x + _gain(was, now) * old
    h = _half_log_snr(now) - _half_log_snr(was)
    if before is None or before[0].alpha == 0:
        return x + _gain(was, now) * 0.5 * (new - old)
    r = (_half_log_snr(before[0]) - _half_log_snr(was)) / h
    gain = math.expm1(-h)
    phi_2 = -gain / h - 1
    phi_3 = -phi_2 / h - 0.5
    first, second = phi_2 / gain, 2 * phi_3 / gain
    past = (first - second) / (1 - r)
    return x + _gain(was, now) * (past / r * (before[1] - old) + (first - past) * (new - old))
