"""Every sampler step by step beside diffusers' scheduler of the same configuration, and every one of theirs as ours."""

import diffusers
import pytest
import torch

from kartina.layers.random import normal
from kartina.priors.denoiser import Clipped, Denoised, Denoiser
from kartina.priors.diffusers_schedulers import _schedulers, find_sampler
from kartina.priors.diffusion_samplers import SAMPLERS
from kartina.priors.schedules import new_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy
SHAPE, SEEDS = (3, 8, 8), torch.tensor([3, 4])
TRAILING = {"timestep_spacing": "trailing"}

# ours, our knobs, theirs, their configuration
PAIRS = {
    "ddpm": ("ddpm", {"spacing": "leading"}, "DDPMScheduler", {"clip_sample": False}),
    "ddpm, large": ("ddpm", {"variance": "large", "spacing": "leading"}, "DDPMScheduler",
                    {"clip_sample": False, "variance_type": "fixed_large"}),
    "ddpm, learned": ("ddpm", {"spacing": "leading"}, "DDPMScheduler",
                      {"clip_sample": False, "variance_type": "learned_range"}),
    "ddpm, clipped": ("ddpm", {}, "DDPMScheduler", {"clip_sample": True, **TRAILING}),
    "ddim": ("ddim", {"spacing": "leading"}, "DDIMScheduler", {"clip_sample": False}),
    "ddim, trailing": ("ddim", {}, "DDIMScheduler", {"clip_sample": False, **TRAILING}),
    "ddim, eta": ("ddim", {"eta": 0.6}, "DDIMScheduler", {"clip_sample": False, **TRAILING}),
    "euler": ("euler", {}, "EulerDiscreteScheduler", {}),
    "euler, karras": ("euler", {"spacing": "karras"}, "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_ancestral": ("euler_ancestral", {}, "EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun", {}, "HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmpp_2m", {}, "DPMSolverMultistepScheduler", {**TRAILING}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, "DPMSolverMultistepScheduler",
                     {"algorithm_type": "sde-dpmsolver++", **TRAILING}),
    "unipc": ("unipc", {}, "UniPCMultistepScheduler", {"solver_type": "bh2", **TRAILING}),
}  # fmt: skip


class Network(torch.nn.Module):
    """Smooth in x and t; gives v, and with twice the channels a share of the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, channels, 3, padding=1)

    def forward(self, x, t, condition):
        return torch.tanh(self.conv(x) + torch.cos(t.float() / 300).view(-1, 1, 1, 1))


def theirs(scheduler, network, steps, monkeypatch, **step_knobs) -> list[torch.Tensor]:
    """What their loop shows to the network, and the sample."""
    scheduler.set_timesteps(steps)
    drawn = iter(range(10**6))
    module = __import__(type(scheduler).__module__, fromlist=["_"])

    def draw(shape, **unused):
        return normal(0, next(drawn), SEEDS, SHAPE, "sampler step")

    monkeypatch.setattr(module, "randn_tensor", draw, raising=False)
    eps = normal(0, 0, SEEDS, SHAPE, "sampler start")
    x = eps * getattr(scheduler, "_begin", scheduler.init_noise_sigma)
    seen = []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        seen.append(given)
        x = scheduler.step(network(given, t.expand(2), None), t, x, **step_knobs).prev_sample
    return [*seen, x]


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("which", list(PAIRS))
@torch.no_grad()
def test_step_by_step(which, steps, monkeypatch):
    name, knobs, class_name, config = PAIRS[which]
    network, schedule = Network(6 if "learned" in which else 3), new_schedule("scaled_linear")
    scheduler = getattr(diffusers, class_name)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", **config
    )
    eta = {"eta": knobs["eta"]} if "eta" in knobs else {}
    # Ours begins with unit variance; theirs of the Euler family with sigma / alpha at the noisiest level.
    if scheduler.init_noise_sigma != 1:
        scheduler.set_timesteps(steps)
        level = schedule.level(999.0)
        scheduler._begin = 1 / level.alpha
    expected = theirs(scheduler, network, steps, monkeypatch, **eta)
    seen: list[torch.Tensor] = []

    class Recorder:
        def __init__(self, inner):
            self.inner, self.schedule = inner, inner.schedule

        def __call__(self, x_t, t, condition) -> Denoised:
            seen.append(x_t)
            return self.inner(x_t, t, condition)

    denoise = Recorder(Denoiser(network, schedule, "v"))
    denoise = Clipped(denoise) if "clipped" in which else denoise
    sample = SAMPLERS[name](denoise, None, SHAPE, SEEDS, num_steps=steps, **knobs)
    assert len(seen) + 1 == len(expected)
    for mine, other in zip([*seen, sample], expected, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("name", sorted(_schedulers()))
def test_every_scheduler_of_diffusers_paints(name):
    schedule = new_schedule()

    def gaussian(x_t, t, condition):  # of mean 0.3 and deviation 0.5
        alpha, sigma = schedule.at(t, x_t)
        x_0 = 0.3 + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (x_t - 0.3 * alpha)
        return Denoised(x_0, (x_t - alpha * x_0) / sigma)

    gaussian.schedule = schedule
    # The steps of these are for networks distilled for them, and at most 50.
    steps, apart = (20, 0.2) if name in ("LCMScheduler", "TCDScheduler") else (100, 0.03)
    z = find_sampler(name)(gaussian, None, (4, 16, 16), torch.arange(4), num_steps=steps)
    assert z.isfinite().all() and z.mean().item() == pytest.approx(0.3, abs=0.03)
    assert z.std().item() == pytest.approx(0.5, abs=apart)
