"""Samplers with exact denoisers: moments, orders of convergence, seeds, where they begin and what they keep."""

import math
from functools import partial

import pytest
import torch

from kartina.layers.random import normal
from kartina.priors.denoiser import Denoised, Denoiser
from kartina.priors.diffusers_schedulers import find_sampler
from kartina.priors.diffusion_samplers import SAMPLERS, Keep, ddim, ddim_invert, ddpm, heun
from kartina.priors.schedules import Schedule, new_schedule

F64 = torch.float64
SHAPE = (4, 8, 8)
SEEDS = torch.arange(32)


class Mixture:
    """The exact denoiser of values that are each drawn from a mixture of Gaussians."""

    def __init__(self, weights: list[float], means: list[float], stds: list[float], schedule: Schedule | None = None):
        self.schedule = schedule or new_schedule()
        self.weights, self.means, self.stds = (torch.tensor(v, dtype=F64) for v in (weights, means, stds))
        self.mean = (self.weights * self.means).sum().item()
        self.variance = (self.weights * (self.stds**2 + self.means**2)).sum().item() - self.mean**2
        self.looks = 0

    def __call__(self, x_t, t, condition):
        assert t.shape == x_t.shape[:1] and condition == "asked"
        self.looks += 1
        alpha, sigma = self.schedule.at(t, x_t)
        x, a, s = x_t[..., None].double(), alpha[..., None].double(), sigma[..., None].double()
        variance = a**2 * self.stds**2 + s**2  # of x_t in each component
        off = x - a * self.means
        share = (self.weights.log() - 0.5 * (off**2 / variance + variance.log())).softmax(dim=-1)
        x_0 = (share * (self.means + a * self.stds**2 / variance * off)).sum(dim=-1).to(x_t.dtype)
        return Denoised(x_0, (x_t - alpha * x_0) / sigma)


def gaussian(schedule: Schedule | None = None) -> Mixture:
    return Mixture([1.0], [0.4], [0.5], schedule)


# Steps that make the error of a solver small beside that of 8,192 draws.
ENOUGH = {"ddpm": 500, "ddim": 150, "euler": 150, "euler_ancestral": 500, "dpmpp_2m_sde": 150}


@pytest.mark.parametrize("noise", ["linear", "zero terminal", "cosine"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_recovers_a_gaussian_and_a_mixture(name, noise):
    schedule = new_schedule("cosine" if noise == "cosine" else "linear", zero_terminal=noise == "zero terminal")
    exact = Mixture([0.3, 0.7], [-1.0, 0.8], [0.2, 0.3], schedule) if noise == "linear" else gaussian(schedule)
    z = SAMPLERS[name](exact, "asked", SHAPE, SEEDS, num_steps=ENOUGH.get(name, 40)).double()
    assert z.shape == (len(SEEDS), *SHAPE) and z.isfinite().all()
    assert z.mean().item() == pytest.approx(exact.mean, abs=4 * (exact.variance / z.numel()) ** 0.5)
    assert z.var().item() == pytest.approx(exact.variance, rel=0.06)


def slope(sampler, counts: list[int], exact: Mixture, spacing: str) -> float:
    """The power of 1 / num_steps with which the error falls, between the first and the last count."""
    noise = normal(0, 0, torch.arange(2), (1, 8, 8), "test").double()
    run = partial(sampler, exact, "asked", (1, 8, 8), torch.arange(2), noise=noise, spacing=spacing)
    truth = run(num_steps=8 * counts[-1])
    errors = [(run(num_steps=count) - truth).abs().max().item() for count in counts]
    return -math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_orders_of_convergence(name, order):
    exact = Mixture([0.4, 0.6], [-0.5, 0.6], [0.8, 0.6])
    assert slope(SAMPLERS[name], [20, 40], exact, "karras") == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(("name", "order"), [("ddpm", 1), ("euler_ancestral", 1), ("dpmpp_2m_sde", 2)])
def test_weak_orders_of_convergence(name, order):
    """Of samplers that draw noise: the power with which the error of the variance falls, over 524,288 values."""
    exact, run = gaussian(), partial(SAMPLERS[name], shape=(16, 32, 32), seeds=SEEDS, spacing="karras")
    off = [run(exact, "asked", num_steps=count).double().var().item() / exact.variance - 1 for count in (40, 80)]
    assert -math.log2(off[1] / off[0]) == pytest.approx(order, abs=0.25)


def test_ddim_with_noise_has_the_moments_of_ddpm():
    exact = gaussian()
    small, ddim_1 = (run(exact, "asked", SHAPE, SEEDS, num_steps=20) for run in (ddpm, partial(ddim, eta=1.0)))
    torch.testing.assert_close(small, ddim_1, atol=1e-5, rtol=1e-5)  # the same draws, so the same samples
    large = ddpm(exact, "asked", SHAPE, SEEDS, num_steps=20, variance="large")
    assert small.var() < 0.9 * exact.variance < exact.variance < large.var()  # the bounds of Ho 2020, section 3.2


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_learned_variances_are_used_on_any_grid(zero_terminal):
    exact = gaussian(new_schedule(zero_terminal=zero_terminal))

    class Learned:
        schedule = exact.schedule

        def __init__(self, share: float) -> None:
            self.share = share

        def __call__(self, x_t, t, condition):
            found = exact(x_t, t, condition)
            return Denoised(found.x_0, found.eps, torch.full_like(x_t, self.share))

    for share, variance in ((0.0, "small"), (1.0, "large")):
        z = ddpm(Learned(share), "asked", (2, 4, 4), SEEDS[:3], num_steps=10)
        torch.testing.assert_close(z, ddpm(exact, "asked", (2, 4, 4), SEEDS[:3], num_steps=10, variance=variance))


@pytest.mark.parametrize("name", [*SAMPLERS, "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_sample_is_the_same_at_any_batch_size(name):
    exact, sampler = gaussian(), find_sampler(name)
    many = sampler(exact, "asked", (1, 4, 4), torch.tensor([7, 8, 9]), num_steps=6)
    one = sampler(exact, "asked", (1, 4, 4), torch.tensor([8]), num_steps=6)
    assert torch.equal(many[1:2], one) and not torch.equal(many[0], many[2])


@pytest.mark.parametrize("name", [*SAMPLERS, "DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_image_to_image_begins_where_strength_says(name):
    exact, sampler = gaussian(), find_sampler(name)
    start = torch.full((2, 1, 4, 4), 3.0)
    run = partial(sampler, exact, "asked", (1, 4, 4), torch.tensor([1, 2]), start=start, num_steps=10)
    done = []
    little = run(strength=0.2, progress=lambda *step: done.append(step))
    assert len({total for _, total in done}) == 1 and done[-1][0] == done[-1][1] <= 4
    near, far = ((run(strength=s) - start).abs().mean() for s in (0.2, 0.9))
    assert near < 0.8 * far and torch.equal(little, run(strength=0.2))
    torch.testing.assert_close(run(strength=0.0), start)


@pytest.mark.parametrize("name", [*SAMPLERS, "DDIMScheduler"])
def test_what_is_masked_is_kept(name):
    exact, sampler = gaussian(), find_sampler(name)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    known = torch.full((2, 3, 4, 4), -2.0)
    z = sampler(exact, "asked", (3, 4, 4), torch.tensor([1, 2]), num_steps=10, keep=Keep(known, mask))
    assert torch.equal(z[..., :2], known[..., :2])
    assert (z[..., 2:] > -1.9).all() and z.isfinite().all()


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_what_is_kept_has_the_noise_that_is_told(name):
    """Also where KDPM2 looks between two steps: all is kept here, so that each look finds the noise it is told."""
    known, schedule, seen = torch.full((2, 1, 4, 4), 0.5), new_schedule(), []
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def exact(x_t, t, condition):
        alpha, sigma = schedule.at(t, x_t)
        seen.append((x_t, alpha * known + sigma * noise))
        return Denoised(known, (x_t - alpha * known) / sigma, None)

    exact.schedule = schedule
    keep = Keep(known, torch.ones(2, 1, 4, 4))
    find_sampler(name)(exact, None, (1, 4, 4), SEEDS[:2], num_steps=6, noise=noise, keep=keep)
    for found, expected in seen[2:]:  # the first step begins with noise alone
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_inversion_and_back(zero_terminal):
    exact = Mixture([0.3, 0.7], [-0.7, 0.8], [0.3, 0.2], new_schedule(zero_terminal=zero_terminal))
    x_0 = exact.means[[0, 1, 1]].float().view(3, 1, 1, 1) + 0.1 * torch.randn(3, 2, 4, 4)
    noise = ddim_invert(exact, "asked", x_0, num_steps=100)
    again = ddim(exact, "asked", (2, 4, 4), torch.arange(3), noise=noise, num_steps=100)
    assert (again - x_0).abs().max() < 1e-3
    half = ddim_invert(exact, "asked", x_0, num_steps=100, strength=0.5)
    walk = {"noise": half, "start": x_0, "strength": 0.5, "num_steps": 100}
    assert (ddim(exact, "asked", (2, 4, 4), torch.arange(3), **walk) - x_0).abs().max() < 1e-3
    if not zero_terminal:
        once = ddim_invert(exact, "asked", x_0, num_steps=100, looks=1)
        back = ddim(exact, "asked", (2, 4, 4), torch.arange(3), noise=once, num_steps=100)
        assert (back - x_0).abs().max() > 2e-3


def test_given_noise_and_looks():
    exact = gaussian()
    noise = torch.randn(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = ddim(exact, "asked", (1, 4, 4), torch.arange(2), noise=noise, num_steps=1000)
    ratio = exact.schedule.level(999.0)
    scale = 0.5 / math.sqrt(0.25 * ratio.alpha**2 + ratio.sigma**2)  # the flow of a Gaussian is linear
    torch.testing.assert_close(z, 0.4 + scale * (noise - ratio.alpha * 0.4), atol=5e-3, rtol=0)
    assert z.dtype == F64 and exact.looks == 1000
    exact.looks = 0
    heun(exact, "asked", (1, 4, 4), torch.arange(2), num_steps=10)
    assert exact.looks == 19


def test_the_table_is_closed():
    for name, near in (("ddmp", "ddpm"), ("DPMSolverMultistepSchedular", "sampler"), ("EulerScheduler", "Euler")):
        with pytest.raises(ValueError, match="no sampler") as error:
            find_sampler(name)
        assert near in str(error.value) and len(str(error.value).splitlines()) == 1
    for name in (
        "StableDiffusionPipeline",
        "__doc__",
        "os.path",
        "FlowMatchEulerDiscreteScheduler",
        "KarrasVeScheduler",
    ):
        with pytest.raises(ValueError, match="no sampler"):
            find_sampler(name)


def test_bad_knobs_are_refused():
    exact, run = gaussian(), ((1, 4, 4), torch.arange(2))
    for knobs, message in (
        ({"strength": 0.5}, "with a start"), ({"noise": torch.zeros(1, 1, 4, 4)}, "needs noise as"),
        ({"start": torch.zeros(2, 1, 4, 5)}, "needs start as"), ({"num_steps": 0}, "1 to 1000"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ddim(exact, "asked", *run, **knobs)
    with pytest.raises(ValueError, match="eta"):
        ddim(exact, "asked", *run, eta=2.0)
    with pytest.raises(ValueError, match="variance"):
        ddpm(exact, "asked", *run, variance="medium")
    silent = Denoiser(lambda x, t, c: x, new_schedule(zero_terminal=True), "v")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        find_sampler("DDIMScheduler")(silent, None, *run)
    with pytest.raises(ValueError, match="cannot begin in the middle"):
        find_sampler("PNDMScheduler")(exact, "asked", *run, start=torch.zeros(2, 1, 4, 4), strength=0.5)
    with pytest.raises(ValueError, match="no knob 'steps'"):
        find_sampler("DDIMScheduler")(exact, "asked", *run, steps=4)
