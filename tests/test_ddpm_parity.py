"""Diffusion beside what `make parity` recorded of denoising-diffusion-pytorch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity import record_ddpm as recorder

from kartina.priors.denoiser import Denoiser
from kartina.priors.schedules import new_schedule
from kartina.training.objectives.diffusion import bits_per_dim, diffusion, step_nats

HERE = Path(__file__).parent
SCHEDULES = {"linear": {"beta_start": 1e-3, "beta_end": 0.2}, "cosine": {}}  # theirs is stretched to 100 timesteps
TARGETS = {"pred_noise": "eps", "pred_x0": "x_0", "pred_v": "v"}


@pytest.fixture(scope="module")
def recorded():
    with np.load(recorder.RECORD) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "seed"}


def equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_schedule_and_posterior(kind, recorded):
    x_0, eps, t = recorder.inputs(recorder.SEED)
    schedule = new_schedule(kind, 100, **SCHEDULES[kind])
    equal(schedule.alpha_bar.float(), recorded[f"{kind}.alpha_bar"])
    x_t = schedule.diffuse(x_0, t, eps)
    equal(x_t, recorded[f"{kind}.x_t"])
    mean, variance = schedule.posterior(x_0, x_t, t)
    equal(mean, recorded[f"{kind}.mean"])
    equal(variance, recorded[f"{kind}.variance"])


@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("theirs", list(TARGETS))
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_losses(kind, theirs, min_snr, recorded):
    x_0, eps, t = recorder.inputs(recorder.SEED)
    schedule, target = new_schedule(kind, 100, **SCHEDULES[kind]), TARGETS[theirs]
    (alpha, sigma), network = schedule.at(t, x_0), recorder.Network(False)
    found = Denoiser(network, schedule, target)(schedule.diffuse(x_0, t, eps), t, None)
    weighting = {"weighting": "min_snr", "gamma": 5.0} if min_snr else {}
    # Without min-SNR they weigh x_0 and v so that all targets have the loss of eps: min-SNR with no bound.
    weighting = weighting or {"weighting": "min_snr", "gamma": float("inf")}
    each = [diffusion(found, x_0, eps, alpha, sigma, row, target, **weighting)[0][0] for row in torch.eye(4)]
    equal(torch.stack(each), recorded[f"{kind}.{theirs}.{min_snr}"], 1e-4)


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_learned_variances(kind, recorded):
    x_0, eps, t = recorder.inputs(recorder.SEED)
    schedule = new_schedule(kind, 100, **SCHEDULES[kind])
    x_t, (alpha, sigma) = schedule.diffuse(x_0, t, eps), schedule.at(t, x_0)
    found = Denoiser(recorder.Network(True), schedule)(x_t, t, None)
    a, _, variance = schedule.posterior_terms(t, x_0)
    log_variance = schedule.log_variance(t, found.variance_share, x_0)
    bound = bits_per_dim(step_nats(x_0, found.x_0, log_variance, a, variance), x_0)
    each = [diffusion(found, x_0, eps, alpha, sigma, row, bound=bound)[0][0] for row in torch.eye(4)]
    # At t = 0 theirs clips beta_tilde at 1e-20, and approximates the Gaussian's distribution function.
    equal(torch.stack(each)[1:], recorded[f"{kind}.learned"][1:])
