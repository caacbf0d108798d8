"""Objectives of diffusion: by hand, sums over outcomes, and a bound that is known in closed form."""

import math

import pytest
import torch

from kartina.priors.denoiser import Denoised, Denoiser
from kartina.priors.schedules import new_schedule
from kartina.training.objectives.diffusion import (
    bits_per_dim,
    diffusion,
    discretised_gaussian_nll,
    logit_normal,
    prior_nats,
    snr_weight,
    step_nats,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noised(zero_terminal: bool = False):
    schedule, t = new_schedule(zero_terminal=zero_terminal), torch.tensor([0, 20, 700, 999])
    x_0, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    return schedule, t, x_0, eps, schedule.diffuse(x_0, t, eps), schedule.at(t, x_0)


@pytest.mark.parametrize("target", ["eps", "x_0", "v"])
def test_the_simple_loss_is_the_error_of_what_the_network_gives(target):
    schedule, t, x_0, eps, x_t, (alpha, sigma) = noised(zero_terminal=target != "eps")
    out, weight = normal(4, 3, 2, 2, seed=2), torch.tensor([1.0, 0.0, 1.0, 0.5])
    found = Denoiser(lambda x, time, c: out, schedule, target)(x_t, t, None)
    (total, count), scalars = diffusion(found, x_0, eps, alpha, sigma, weight, target)
    right = {"eps": eps, "x_0": x_0, "v": alpha * eps - sigma * x_0}[target]
    each = (out - right).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(total, (weight * each).sum())
    torch.testing.assert_close(scalars["error"], (weight * each).sum() / 2.5)
    assert count == 2.5 and not scalars["error"].requires_grad


@pytest.mark.parametrize(
    ("weighting", "gamma"),
    [
        *[("min_snr", None), ("min_snr", 2.0), ("truncated", None), ("truncated", 5.0)],
        *[("p2", None), ("p2", 0.5), ("root", None), ("root", 1.5)],
    ],
)
def test_a_weighted_loss_is_the_same_in_every_target(weighting, gamma):
    schedule, t, x_0, eps, x_t, (alpha, sigma) = noised()
    found = Denoiser(lambda x, time, c: torch.tanh(x), schedule, "v")(x_t, t, None)
    weight, losses = torch.ones(4), []
    for target in ("eps", "x_0", "v"):
        losses.append(diffusion(found, x_0, eps, alpha, sigma, weight, target, weighting, gamma)[0][0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_weights_are_as_stated():
    snr = torch.tensor([0.0, 0.5, 4.0, 100.0])
    torch.testing.assert_close(snr_weight(snr[1:], "eps", "min_snr"), torch.tensor([1.0, 1.0, 0.05]))
    torch.testing.assert_close(snr_weight(snr, "x_0", "min_snr"), torch.tensor([0.0, 0.5, 4.0, 5.0]))
    torch.testing.assert_close(snr_weight(snr, "x_0", "truncated"), torch.tensor([1.0, 1.0, 4.0, 100.0]))
    torch.testing.assert_close(snr_weight(snr, "v", "min_snr"), torch.tensor([0.0, 1 / 3, 0.8, 5 / 101]))
    torch.testing.assert_close(snr_weight(snr[1:], "eps", "p2", 0.5), (1 + snr[1:]) ** -0.5)
    torch.testing.assert_close(snr_weight(snr, "x_0", "root"), torch.tensor([0.3, 0.5**0.5, 2.0, 10.0]))
    torch.testing.assert_close(snr_weight(snr, "x_0", "root", 3.0), torch.tensor([3.0, 3.0, 3.0, 10.0]))
    assert torch.equal(snr_weight(snr, "v"), torch.ones(4))


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (0.3, -4.0), (-1.2, -2.0), (0.99, -7.0), (3.0, 0.5)])
def test_the_discretised_gaussian_sums_to_one(mean, log_std):
    x = torch.arange(256, dtype=F64) / 127.5 - 1
    parameters = torch.tensor(mean, dtype=F64), torch.tensor(log_std, dtype=F64)
    nll = discretised_gaussian_nll(x, *parameters)
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-9)
    single = discretised_gaussian_nll(x.float(), *(p.float() for p in parameters))
    assert single.isfinite().all()
    torch.testing.assert_close(single.double(), nll, atol=2e-3, rtol=1e-3)
    cdf = torch.distributions.Normal(mean, math.exp(log_std)).cdf
    mass = cdf(x[100] + 1 / 255) - cdf(x[100] - 1 / 255)
    if mass > 1e-12:
        assert nll[100].item() == pytest.approx(-mass.log().item(), rel=1e-4)


def test_the_terms_are_kls_between_gaussians():
    schedule, t, x_0, eps, x_t, _ = noised()
    guess, share = normal(4, 3, 2, 2, seed=3), torch.rand(4, 3, 2, 2, dtype=F64)
    a, _, variance = schedule.posterior_terms(t, x_t)
    log_variance = schedule.log_variance(t, share, x_t)
    found = step_nats(x_0, guess, log_variance, a, variance)
    q_mean, p_mean = schedule.posterior(x_0, x_t, t)[0], schedule.posterior(guess, x_t, t)[0]
    p = torch.distributions.Normal(p_mean, (log_variance / 2).exp())
    q = torch.distributions.Normal(q_mean[1:], variance[1:].sqrt().expand_as(q_mean[1:]))
    p_after = torch.distributions.Normal(p.loc[1:], p.scale[1:])
    torch.testing.assert_close(found[1:], torch.distributions.kl_divergence(q, p_after).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(found[0], discretised_gaussian_nll(x_0, guess, log_variance / 2)[0].sum())
    alpha, sigma = schedule.at(t[-1:], x_0[:1])
    last = torch.distributions.Normal(alpha * x_0, sigma.expand_as(x_0))
    kl = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(prior_nats(x_0, alpha, sigma), kl)


def whole_bound(schedule, denoise, x_0: torch.Tensor, log_variance) -> torch.Tensor:
    """All T + 1 terms of each sample, with one draw of each x_t, in nats: (B,)."""
    last = torch.full((len(x_0),), schedule.num_timesteps - 1)
    total = prior_nats(x_0, *schedule.at(last, x_0))
    for step in range(schedule.num_timesteps):
        t = torch.full((len(x_0),), step)
        x_t = schedule.diffuse(x_0, t, normal(*x_0.shape, seed=step + 1))
        a, _, variance = schedule.posterior_terms(t, x_t)
        total = total + step_nats(x_0, denoise(x_t, t), log_variance(t, x_t), a, variance)
    return total


def test_the_bound_of_a_known_picture_is_known():
    """Of a network that always says the right picture, all terms but the last and the prior's are 0."""
    schedule = new_schedule(num_timesteps=50, beta_end=0.3)
    x_0 = (torch.randint(1, 255, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()
    nats = whole_bound(schedule, lambda x_t, t: x_0, x_0, lambda t, x: schedule.log_variance(t, 0.0, x))
    std = schedule.log_variance(torch.tensor([0]), 0.0, x_0[:1]).exp().sqrt().item()
    decoder = -16 * math.log(math.erf(1 / 255 / std / math.sqrt(2)))
    bar = schedule.alpha_bar[-1].item()
    prior = 0.5 * (bar * x_0.square().sum(dim=(1, 2, 3)) - 16 * bar - 16 * math.log(1 - bar))
    torch.testing.assert_close(nats, decoder + prior, atol=1e-6, rtol=1e-6)


def test_the_bound_of_a_gaussian_is_its_entropy():
    """Where x_0 is Gaussian, so is p(x_{t-1} | x_t): with its variance nothing is lost, with others something is."""
    schedule, std = new_schedule(num_timesteps=40, beta_start=0.01, beta_end=0.4), 0.3
    levels = (normal(5000, 4) * std * 127.5 + 127.5).round().clamp(0, 255)  # the width of a level is small beside it
    x_0 = levels / 127.5 - 1

    def left(t, x):  # Var(x_0 | x_t)
        alpha, sigma = schedule.at(t, x)
        return std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)

    def denoise(x_t, t):
        alpha, sigma = schedule.at(t, x_t)
        return alpha / sigma**2 * left(t, x_t) * x_t

    def exact(t, x):
        a, _, variance = schedule.posterior_terms(t, x)
        return (variance + a**2 * left(t, x)).log()

    def bits(log_variance) -> float:
        return bits_per_dim(whole_bound(schedule, denoise, x_0, log_variance), x_0).mean().item()

    entropy = 0.5 * math.log2(2 * math.pi * math.e * (std * 127.5) ** 2)
    assert bits(exact) == pytest.approx(entropy, abs=0.03)
    for share in (0.0, 1.0):
        assert bits(lambda t, x, share=share: schedule.log_variance(t, share, x)) > entropy + 0.05


def test_the_hybrid_teaches_variances_by_the_bound_only():
    schedule, t, x_0, eps, x_t, (alpha, sigma) = noised()
    out, share = normal(4, 3, 2, 2, seed=2).requires_grad_(), torch.full((4, 3, 2, 2), 0.3, dtype=F64).requires_grad_()
    denoised = Denoiser(lambda x, time, c: out, schedule)(x_t, t, None)
    found = Denoised(denoised.x_0, denoised.eps, share)
    a, _, variance = schedule.posterior_terms(t, x_t)
    nats = step_nats(x_0, found.x_0.detach(), schedule.log_variance(t, found.variance_share, x_t), a, variance)
    bound = 1000 * bits_per_dim(nats, x_0)
    weight = torch.ones(4, dtype=F64)
    plain = torch.autograd.grad(diffusion(found, x_0, eps, alpha, sigma, weight)[0][0], out, retain_graph=True)[0]
    (total, _), scalars = diffusion(found, x_0, eps, alpha, sigma, weight, bound=bound)
    of_out, of_share = torch.autograd.grad(total, [out, share])
    torch.testing.assert_close(of_out, plain)
    assert (of_share != 0).all()
    torch.testing.assert_close(total, 4 * (scalars["error"] + 0.001 * scalars["bound"]))


def test_the_bound_alone_weighs_the_error_of_eps_as_published():
    """Ho 2020, equation 12: beta^2 / (2 sigma^2 (1 - beta) (1 - alpha_bar)) of each, for t > 0 and fixed variances."""
    schedule, t, x_0, eps, x_t, (alpha, sigma) = noised()
    assert (t > 0).any()
    out = normal(4, 3, 2, 2, seed=2).requires_grad_()
    found = Denoiser(lambda x, time, c: out, schedule)(x_t, t, None)
    a, _, variance = schedule.posterior_terms(t, x_t)
    nats = step_nats(x_0, found.x_0, schedule.log_variance(t, 0.0, x_t), a, variance)
    weight = torch.ones(4, dtype=F64)
    bound = bits_per_dim(nats, x_0)
    (total, _), scalars = diffusion(found, x_0, eps, alpha, sigma, weight, bound=bound, bound_weight=1.0, simple=False)
    torch.testing.assert_close(total, bound.sum())
    assert set(scalars) == {"error", "bound"}
    (slope,) = torch.autograd.grad(total, out)
    beta, bar = (each[t].view(-1, 1, 1, 1) for each in (schedule.betas, schedule.alpha_bar))
    published = beta.square() / (2 * variance * (1 - beta) * (1 - bar)) * 2 * (out - eps) / (12 * math.log(2))
    torch.testing.assert_close(slope[t > 0], published[t > 0].detach())


def test_quantiles_of_the_logit_normal():
    quartile = 1 / (1 + math.exp(0.3 + 2 * 0.6744897501960817))
    wanted = torch.tensor([0.0, quartile, 1 / (1 + math.exp(0.3)), 1.0])
    torch.testing.assert_close(logit_normal(torch.tensor([0.0, 0.25, 0.5, 1.0]), 2.0, -0.3), wanted)


def test_bad_arguments_are_refused():
    _, _, x_0, eps, _, (alpha, sigma) = noised()
    found = Denoised(x_0, eps)
    with pytest.raises(ValueError, match="one of eps, x_0, v"):
        diffusion(found, x_0, eps, alpha, sigma, torch.ones(4), "noise")
    torch.testing.assert_close(snr_weight(torch.tensor([0.5, 9.0]), "x_0", "truncated", 5.0), torch.tensor([1.0, 5.0]))
    with pytest.raises(ValueError, match="at least 1"):
        snr_weight(torch.ones(1), "x_0", "truncated", 0.5)
    with pytest.raises(ValueError, match="one of none, min_snr, truncated, p2, root"):
        diffusion(found, x_0, eps, alpha, sigma, torch.ones(4), weighting="snr")
    with pytest.raises(ValueError, match="of one shape"):
        diffusion(found, x_0, eps[:2], alpha, sigma, torch.ones(4))
