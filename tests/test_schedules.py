"""Noise schedules: the papers' formulas, the posterior against Monte Carlo, timesteps as diffusers spaces them."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from kartina.priors.schedules import SCHEDULES, SPACINGS, Schedule, new_schedule, zero_terminal_snr

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(
    ("kind", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedules_are_those_of_diffusers(kind, theirs):
    ends = {} if kind == "cosine" else {"beta_start": 0.001, "beta_end": 0.015}
    betas = DDPMScheduler(beta_schedule=theirs, **ends).betas
    found = new_schedule(kind, **ends)
    torch.testing.assert_close(found.betas, betas.double(), atol=1e-7, rtol=1e-5)
    assert found.alpha_bar.dtype == F64 and found.num_timesteps == 1000


def test_schedules_by_the_papers_numbers():
    linear = new_schedule("linear")
    assert (linear.betas[0].item(), linear.betas[-1].item()) == (1e-4, 0.02)
    assert linear.alpha_bar[-1].item() == pytest.approx(4.04e-5, rel=2e-3)
    cosine = new_schedule("cosine", num_timesteps=4000)

    def f(t: float) -> float:
        return math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 1000, 3900):
        assert cosine.alpha_bar[t - 1].item() == pytest.approx(f(t) / f(0), abs=1e-12)
    assert cosine.betas.max().item() == 0.999


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_zero_terminal_snr_ends_at_pure_noise(kind):
    before, after = new_schedule(kind), new_schedule(kind, zero_terminal=True)
    assert after.alpha_bar[-1].item() == 0 and after.betas[-1].item() == 1
    assert after.alpha_bar[0].item() == pytest.approx(before.alpha_bar[0].item(), abs=1e-12)
    x_0, eps, last = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.tensor([999, 999])
    assert torch.equal(after.diffuse(x_0, last, eps), eps)
    mean, variance = after.posterior(x_0, eps, last)
    torch.testing.assert_close(mean, after.alpha_bar[-2].sqrt() * x_0)  # x_T says nothing
    torch.testing.assert_close(variance.flatten(), (1 - after.alpha_bar[-2]).expand(2))


def test_zero_terminal_snr_is_that_of_diffusers():
    theirs = DDIMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True).alphas_cumprod[:-1]
    found = new_schedule("linear", zero_terminal=True).alpha_bar[:-1]
    torch.testing.assert_close(found.float(), theirs, atol=1e-6, rtol=1e-4)


def noised_once(schedule, x, t, eps):
    """A draw of q(x_t | x_{t-1}), whose variance is beta_t (Ho 2020, equation 2)."""
    return (1 - schedule.betas[t]).sqrt() * x + schedule.betas[t].sqrt() * eps


def test_one_step_after_another_is_the_kernel():
    schedule = Schedule(torch.tensor([0.1, 0.3, 0.5, 0.2], dtype=F64))
    x = normal(400_000, 1) * 0.5 + 2
    for t in range(4):
        x = noised_once(schedule, x, t, normal(len(x), 1, seed=t + 1))
    alpha_bar = schedule.alpha_bar[-1]
    assert x.mean().item() == pytest.approx((2 * alpha_bar.sqrt()).item(), abs=0.006)
    assert x.var().item() == pytest.approx((0.25 * alpha_bar + 1 - alpha_bar).item(), abs=0.01)


def test_the_posterior_equals_monte_carlo():
    schedule, t = Schedule(torch.tensor([0.2, 0.4, 0.3], dtype=F64)), torch.tensor([2])
    count = 2_000_000
    many = torch.full((count,), 1)
    before = schedule.diffuse(torch.full((count, 1), 0.7, dtype=F64), many, normal(count, 1))  # x_1 given x_0 = 0.7
    after = noised_once(schedule, before, 2, normal(count, 1, seed=1))
    near = before[(after - 0.4).abs() < 0.02]  # those that came to x_2 = 0.4
    mean, variance = schedule.posterior(torch.tensor([[0.7]], dtype=F64), torch.tensor([[0.4]], dtype=F64), t)
    assert len(near) > 20_000
    assert near.mean().item() == pytest.approx(mean.item(), abs=4 * (variance.item() / len(near)) ** 0.5 + 1e-3)
    assert near.var().item() == pytest.approx(variance.item(), rel=0.03)


def test_the_posterior_is_that_of_the_paper():
    schedule = new_schedule("linear", num_timesteps=20, beta_end=0.4)
    x_0, x_t, t = normal(20, 3, 2, 2), normal(20, 3, 2, 2, seed=1), torch.arange(20)
    mean, variance = schedule.posterior(x_0, x_t, t)
    beta, bar = schedule.betas, schedule.alpha_bar
    before = torch.cat([torch.ones(1, dtype=F64), bar[:-1]])
    first, second = before.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - before) / (1 - bar)  # equation 7
    shape = (20, 1, 1, 1)
    torch.testing.assert_close(mean, first.view(shape) * x_0 + second.view(shape) * x_t)
    torch.testing.assert_close(variance.flatten(), (1 - before) / (1 - bar) * beta)
    torch.testing.assert_close(mean[0], x_0[0])
    least, most = schedule.log_variance(t, 0.0, x_t), schedule.log_variance(t, torch.tensor(1.0, dtype=F64), x_t)
    torch.testing.assert_close(least[1:].exp(), variance[1:])
    assert torch.equal(least[0], least[1])  # beta_tilde of the first step is 0
    torch.testing.assert_close(most.exp().flatten(), beta)


def test_levels_between_timesteps_and_the_clean_one():
    schedule = new_schedule()
    like = torch.zeros(3, 1, dtype=F64)
    alpha, sigma = schedule.at(torch.tensor([-1, 0, 999]), like)
    assert alpha.shape == (3, 1) and (alpha[0].item(), sigma[0].item()) == (1, 0)
    torch.testing.assert_close(alpha[1:].flatten().square(), schedule.alpha_bar[[0, 999]])
    alpha, sigma = schedule.at(torch.tensor([10.0, 10.25, 11.0], dtype=F64), like)
    ratio = (sigma / alpha).flatten()
    torch.testing.assert_close(ratio[1], 0.75 * ratio[0] + 0.25 * ratio[2])
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    single = schedule.at(torch.tensor([0]), torch.zeros(1, 1, dtype=torch.bfloat16))[1]
    assert single.dtype == torch.float32 and single.item() == pytest.approx(1e-2, rel=1e-6)  # not 1 - 0.9999 in float32


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_spacings_are_those_of_diffusers(steps):
    schedule = new_schedule()
    for spacing in ("leading", "trailing"):
        scheduler = DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        levels = schedule.levels(steps, spacing)
        assert [level.t for level in levels] == [*scheduler.timesteps.tolist(), -1]
    for spacing in ("linspace", "karras"):
        if steps == 1:
            continue  # theirs divides by zero
        scheduler = EulerDiscreteScheduler(timestep_spacing="linspace", use_karras_sigmas=spacing == "karras")
        scheduler.set_timesteps(steps)
        levels = schedule.levels(steps, spacing)
        ratio = [level.sigma / level.alpha for level in levels]
        np.testing.assert_allclose(ratio, scheduler.sigmas.numpy(), rtol=2e-3, atol=1e-5)  # theirs are made in float32
        assert ratio[-1] == 0 and all(a > b for a, b in zip(ratio, ratio[1:], strict=False))
    for spacing in SPACINGS:
        assert len(schedule.levels(steps, spacing)) == steps + 1


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="linear, scaled_linear, cosine"):
        new_schedule("quadratic")
    with pytest.raises(ValueError, match="1 to 1000 steps"):
        new_schedule().levels(1001)
    with pytest.raises(ValueError, match="leading, trailing"):
        new_schedule().levels(10, "even")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        new_schedule(zero_terminal=True).levels(10, "karras")
    for betas in (torch.ones(3), torch.tensor([0.1, 1.0, 0.1], dtype=F64), torch.tensor([0.0, 0.5], dtype=F64)):
        with pytest.raises(ValueError, match="a schedule needs betas"):
            Schedule(betas)
    assert zero_terminal_snr(new_schedule().betas).dtype == F64
