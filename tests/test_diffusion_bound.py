"""The stage of diffusion and the variational bound: who learns by it, and what of a known picture it must be."""

import math

import pytest
import torch
from test_diffusion_stage import OBJECTIVE, stage_of

from kartina.layers import random
from kartina.training.objectives import diffusion as objective
from kartina.training.stages.diffusion import _LOOKS


@pytest.fixture
def hybrid(tmp_path):
    def of(*words):
        torch.manual_seed(0)
        stage, source = stage_of(tmp_path, "parts.prior.out_channels=6", *words)
        with torch.no_grad():  # the last layer begins at zero
            for parameter in stage.network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return stage, source.read(range(8))

    return of


def test_the_mean_learns_by_the_error_alone_and_the_variance_by_the_bound(hybrid):
    """Nichol 2021, section 3.1: the gradient of the bound is stopped on its way to the mean."""
    gradients, shown = {}, {}
    for weight in (0, 1):
        stage, batch = hybrid(f"{OBJECTIVE}={{bound_weight: {weight}}}")
        ((_, (loss, count), scalars),) = stage.updates(batch, 3)
        (loss / count).backward()
        gradients[weight], shown[weight] = stage.network.conv_out.weight.grad, scalars
    mean, variance = (torch.stack([gradients[weight][part] for weight in (0, 1)]) for part in (slice(3), slice(3, 6)))
    assert mean[0].abs().max() > 0 and torch.equal(mean[0], mean[1])
    assert (variance[0] == 0).all() and (variance[1] != 0).any()
    torch.testing.assert_close(shown[0]["bound"], shown[1]["bound"])


def test_the_bound_of_a_step_is_that_of_all_timesteps(hybrid):
    stage, batch = hybrid(f"{OBJECTIVE}={{condition_drop: 0}}")
    seen = []
    stage.forward = {"prior": lambda *given: seen.append((given, stage.network(*given))) or seen[-1][1]}
    ((_, _, scalars),) = stage.updates(batch, 3)
    ((x_t, t, *_), out), x_0, schedule = seen[0], batch.image, stage.schedule
    alpha, sigma = schedule.at(t, x_t)
    guess = (x_t - sigma * out[:, :3]) / alpha if stage.recipe.diffusion.prediction == "eps" else None
    guess = alpha * x_t - sigma * out[:, :3] if guess is None else guess  # v
    share = (out[:, 3:] + 1) / 2
    coefficient, _, variance = schedule.posterior_terms(t, x_0)
    nats = objective.step_nats(x_0, guess, schedule.log_variance(t, share, x_0), coefficient, variance)
    bits = nats / (3 * 32 * 32 * math.log(2))
    torch.testing.assert_close(scalars["bound"], (schedule.num_timesteps * bits).mean().detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_the_bits_of_a_network_that_is_off_by_a_known_error_are_known(tmp_path, monkeypatch, off):
    """All terms but the decoder's and the prior's are 0 where x_0 is right, and else those of two Gaussians' means.

    It is off everywhere but at the first timestep.
    """
    stage, source = stage_of(tmp_path, "diffusion={schedule: linear, num_timesteps: 300, prediction: v}")
    batch, schedule = source.read(range(4)), stage.schedule
    x_0 = (batch.image * 0.8 * 127.5 + 127.5).round() / 127.5 - 1  # within the range, whatever is added
    monkeypatch.setattr(stage, "_read", lambda batch: x_0)
    total, values = schedule.num_timesteps, x_0[0].numel()

    def exact(x_t, t, condition):
        alpha, sigma = schedule.at(t, x_t)
        return (alpha * x_t - x_0 - off * (t > 0).view(-1, 1, 1, 1)) / sigma  # v

    assert schedule.alpha_bar[-1] > 0.04  # so that the prior's term is seen
    stage.network = exact
    found = stage.measure(batch)["bits_per_dim"].double()
    first = schedule.log_variance(torch.tensor([0]), 0.0, x_0[:1].double()).exp().sqrt()
    high = torch.where(x_0 > 0.999, math.inf, 1 / 255 / first).double()
    low = torch.where(x_0 < -0.999, -math.inf, -1 / 255 / first).double()
    decoder = -(torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-12).log().sum(dim=(1, 2, 3))
    bar = float(schedule.alpha_bar[-1])
    end = 0.5 * (bar * x_0.double().square().sum(dim=(1, 2, 3)) - values * bar - values * math.log1p(-bar))
    looks = random.uniform(0, 0, batch.samples, (_LOOKS,), "validation timestep")
    place = (looks + torch.arange(_LOOKS)) / _LOOKS
    times = 1 + (place * (total - 1)).long().clamp(max=total - 2)
    coefficient, _, variance = schedule.posterior_terms(times.flatten(), torch.zeros(times.numel(), 1, 1, 1))
    apart = (coefficient**2 / (2 * variance)).view(times.shape).double() * off**2 * values
    between = (total - 1) * apart.mean(dim=1)
    torch.testing.assert_close(found, (decoder + between + end) / (values * math.log(2)), rtol=2e-3, atol=2e-3)
