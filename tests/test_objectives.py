"""Objectives of the tokenizers: closed forms, sums over outcomes, known likelihoods, which term a weight scales."""

import math

import pytest
import torch

from kartina.layers.discriminator import PatchDiscriminator
from kartina.training import corruptions
from kartina.training.objectives import autoencoder as ae
from kartina.training.objectives import vae as vae_objective
from kartina.training.objectives import vqgan as vqgan_objective
from kartina.training.objectives.autoencoder_kl import autoencoder_kl
from kartina.training.objectives.vae import gaussian_kl, gaussian_nll, iwae, logistic_nll, vae
from kartina.training.objectives.vqgan import adaptive_weight, fooling, hinge, vqgan
from kartina.training.objectives.vqvae import quantization, vqvae


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(batch: int = 3, size: int = 4, seed: int = 0) -> torch.Tensor:
    """8-bit values in [-1, 1]."""
    levels = torch.randint(256, (batch, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


def test_kl_equals_monte_carlo():
    mean, log_variance = torch.tensor([0.7, -1.5], dtype=torch.float64), torch.tensor([0.3, -1.0], dtype=torch.float64)
    z = mean + (log_variance / 2).exp() * normal(400_000, 2, dtype=torch.float64)
    log_q = -0.5 * ((z - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi))
    log_p = -0.5 * (z**2 + math.log(2 * math.pi))
    each = log_q - log_p
    error = 4 * each.std(dim=0) / math.sqrt(len(each))
    assert ((each.mean(dim=0) - gaussian_kl(mean, log_variance)).abs() < error).all()
    assert gaussian_kl(torch.zeros(3), torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize(("location", "log_scale"), [(0.0, -1.0), (0.3, -4.0), (-1.2, -2.0), (0.99, -9.0), (5.0, 0.5)])
def test_the_discretised_logistic_sums_to_one(location, log_scale):
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    nll = logistic_nll(levels, torch.tensor(location, dtype=torch.float64), torch.tensor(log_scale).double())
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-9)
    single = logistic_nll(levels.float(), torch.tensor(location), torch.tensor(log_scale))
    assert torch.isfinite(single).all()  # also far from the location, where the mass is nothing in float32
    torch.testing.assert_close(single.double(), nll, atol=1e-3, rtol=1e-4)


def test_the_discretised_logistic_is_the_mass_between_half_levels():
    x, location, log_scale = 101 / 127.5 - 1, -0.1, -2.0
    scale = math.exp(log_scale)
    ends = [1 / (1 + math.exp(-(x + end - location) / scale)) for end in (1 / 255, -1 / 255)]
    found = logistic_nll(torch.tensor(x), torch.tensor(location), torch.tensor(log_scale))
    assert found.item() == pytest.approx(-math.log(ends[0] - ends[1]), abs=1e-4)


def test_the_gaussian_is_torchs():
    x, location, log_scale = images(), normal(3, 3, 4, 4), normal(3, 1, 1)
    expected = -torch.distributions.Normal(location, log_scale.exp().expand_as(location)).log_prob(x)
    torch.testing.assert_close(gaussian_nll(x, location, log_scale), expected)


class Linear:
    """z ~ N(0, I), x ~ N(W z, s^2 I) with orthogonal columns of W: posterior and ln p(x) are known."""

    def __init__(self) -> None:
        basis = torch.linalg.qr(normal(12, 12, dtype=torch.float64))[0]
        self.matrix, self.std = basis[:, :2] * torch.tensor([0.8, 0.3], dtype=torch.float64), 0.4
        z, noise = normal(5, 2, seed=1, dtype=torch.float64), normal(5, 12, seed=2, dtype=torch.float64)
        self.x = z @ self.matrix.T + self.std * noise  # (5, 12)
        precision = 1 + self.matrix.square().sum(0) / self.std**2
        self.mean = self.x @ self.matrix / self.std**2 / precision
        self.log_variance = (-precision.log()).expand(5, 2)
        covariance = self.matrix @ self.matrix.T + self.std**2 * torch.eye(12, dtype=torch.float64)
        marginal = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance)
        self.log_p = marginal.log_prob(self.x)

    def elbo(self, mean: torch.Tensor, log_variance: torch.Tensor, draws: int) -> torch.Tensor:
        """The mean over draws, through the objective: (5,)."""
        z = mean + (log_variance / 2).exp() * normal(draws, 5, 2, seed=3, dtype=torch.float64)
        each = []
        for i in range(5):
            wide = [v[i].expand(draws, 2) for v in (mean, log_variance)]
            shape = (draws, 3, 2, 2)
            location, image = (z[:, i] @ self.matrix.T).view(shape), self.x[i].expand(draws, 12).reshape(shape)
            log_scale = torch.tensor(math.log(self.std), dtype=torch.float64)
            (total, count), _ = vae(location, log_scale, image, *wide, torch.ones(draws, dtype=torch.float64))
            each.append(-total / count)
        return torch.stack(each)

    def log_weights(self, mean: torch.Tensor, log_variance: torch.Tensor, draws: int) -> torch.Tensor:
        """The importance-weighted bound through the objective: (5,)."""
        z = mean + (log_variance / 2).exp() * normal(draws, 5, 2, seed=4, dtype=torch.float64)
        likelihood = torch.distributions.Normal(z @ self.matrix.T, self.std).log_prob(self.x).sum(dim=2)
        return iwae(likelihood, z, mean, log_variance)


def test_the_bound_is_below_the_likelihood_and_tight_at_the_posterior():
    linear = Linear()
    best = linear.elbo(linear.mean, linear.log_variance, 20_000)
    torch.testing.assert_close(best, linear.log_p, atol=0.02, rtol=0)
    worse = linear.elbo(linear.mean + 0.3, linear.log_variance + 0.5, 20_000)
    assert (worse < linear.log_p - 0.1).all()


def test_the_importance_weighted_bound_lies_between():
    linear = Linear()
    exact = linear.log_weights(linear.mean, linear.log_variance, 1)
    torch.testing.assert_close(exact, linear.log_p, atol=1e-9, rtol=0)  # every weight is p(x)
    wrong = linear.mean + 0.3, linear.log_variance + 0.5
    few = torch.stack([linear.log_weights(*wrong, 3000)])
    torch.testing.assert_close(few[0], linear.log_p, atol=0.1, rtol=0)
    elbo = linear.elbo(*wrong, 3000)
    assert (few[0] > elbo + 0.1).all()
    with pytest.raises(ValueError, match="iwae needs"):
        iwae(torch.zeros(2, 5), torch.zeros(2, 4, 2), *wrong)


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic"])
def test_vae_scalars_and_weights(likelihood):
    x, out, log_scale = images(), normal(3, 3, 4, 4) / 4, torch.tensor([-1.0, -2.0, -3.0]).view(1, 3, 1, 1)
    mean, log_variance = normal(3, 5, seed=5), normal(3, 5, seed=6)
    weight = torch.tensor([1.0, 0.0, 0.5])
    (total, count), scalars = vae(out, log_scale, x, mean, log_variance, weight, likelihood, beta=3.0)
    each = gaussian_nll if likelihood == "gaussian" else logistic_nll
    nll, kl = each(x, out, log_scale).sum(dim=(1, 2, 3)), gaussian_kl(mean, log_variance).sum(dim=1)
    torch.testing.assert_close(total, (weight * (nll + 3 * kl)).sum())
    assert count.item() == 1.5
    torch.testing.assert_close(scalars["elbo"], -(weight * (nll + kl)).sum() / 1.5)
    units = 48 * math.log(127.5) if likelihood == "gaussian" else 0
    torch.testing.assert_close(scalars["bits_per_dim"], (units - scalars["elbo"]) / (48 * math.log(2)))
    with pytest.raises(ValueError, match="'gaussian' or 'logistic'"):
        vae(out, log_scale, x, mean, log_variance, weight, "laplace")
    with pytest.raises(ValueError, match="vae needs reconstruction"):
        vae(out[:2], log_scale, x, mean, log_variance, weight)


def test_both_likelihoods_give_the_bits_of_a_uniform_guess():
    x = images(batch=64)
    wide = torch.full((1, 1, 1, 1), 6.0)  # as flat as nothing known
    zeros = torch.zeros(64, 2), torch.zeros(64, 2)
    _, logistic = vae(torch.zeros_like(x), wide, x, *zeros, torch.ones(64), "logistic")
    assert logistic["bits_per_dim"] > 8  # its tails take what lies outside
    fitted = torch.tensor(0.5 * math.log(1 / 3))  # the Gaussian with the variance of a uniform
    _, gaussian = vae(torch.zeros_like(x), fitted, x, *zeros, torch.ones(64), "gaussian")
    entropy = 0.5 * math.log2(2 * math.pi * math.e / 3) + math.log2(127.5)
    assert gaussian["bits_per_dim"].item() == pytest.approx(entropy, abs=0.05)  # 0.25 bits above the uniform's 8


def test_free_bits_count_as_at_least_so_much():
    x, out, weight = images(), torch.zeros(3, 3, 4, 4), torch.tensor([1.0, 1.0, 0.0])
    mean = torch.tensor([[2.0, 0.1], [1.0, 0.2], [9.0, 9.0]]).requires_grad_()
    log_variance = torch.zeros(3, 2)
    arguments = (out, torch.zeros(()), x, mean, log_variance, weight)
    plain, free = vae(*arguments)[0][0], vae(*arguments, free_bits=0.5)[0][0]
    average = gaussian_kl(mean, log_variance)[:2].mean(dim=0)
    assert average[0] > 0.5 > average[1]
    torch.testing.assert_close(free - plain, 2 * (0.5 - average[1]))
    weighed = vae(*arguments, beta=3.0, free_bits=0.5)[0][0] - vae(*arguments, beta=3.0)[0][0]
    torch.testing.assert_close(weighed, 3 * (free - plain))
    (gradient,) = torch.autograd.grad(free, mean)
    assert (gradient[:2, 0] != 0).all() and (gradient[:, 1] == 0).all()


def test_the_commitment_weight_scales_the_encoders_term():
    latents, codewords = normal(2, 4, 3, 3).requires_grad_(), normal(2, 4, 3, 3, seed=1).requires_grad_()
    codebook, commitment = quantization(latents, codewords)
    assert torch.autograd.grad(codebook.sum(), [latents, codewords], allow_unused=True)[0] is None
    assert torch.autograd.grad(commitment.sum(), [latents, codewords], allow_unused=True)[1] is None
    x, weight, codes = images(2), torch.ones(2), torch.zeros(2, 3, 3, dtype=torch.int64)

    def gradients(beta: float) -> tuple[torch.Tensor, ...]:
        total = vqvae(x, x, latents, codewords, codes, 5, weight, commitment_weight=beta)[0][0]
        return torch.autograd.grad(total, [latents, codewords])

    (encoder, codebook), (encoder_4, codebook_4) = gradients(0.25), gradients(1.0)
    torch.testing.assert_close(encoder * 4, encoder_4)
    assert torch.equal(codebook, codebook_4)
    torch.testing.assert_close(codebook, 2 * (codewords - latents).detach() / 36)  # unscaled


def test_vqvae_sums_by_hand():
    x, out, weight = images(2), normal(2, 3, 4, 4), torch.tensor([1.0, 3.0])
    latents, codewords = normal(2, 4, 2, 2), normal(2, 4, 2, 2, seed=1)
    codes = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]])
    (total, count), scalars = vqvae(out, x, latents, codewords, codes, 4, weight, 0.25, 1.0, data_variance=0.5)
    squared, apart = (out - x).square().mean(dim=(1, 2, 3)), (latents - codewords).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(total, (weight * (squared / 0.5 + 1.25 * apart)).sum())
    torch.testing.assert_close(scalars["squared"], (weight * squared).sum() / count)
    assert scalars["codes"].tolist() == [2, 2, 12, 0]
    with pytest.raises(ValueError, match="one shape"):
        vqvae(out, x, latents, codewords[:, :2], codes, 4, weight)


def test_hinge_by_hand():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [0.5, -1.5]])
    weight = torch.tensor([1.0, 0.5])
    (total, count), scalars = hinge(real.view(2, 1, 1, 2), fake.view(2, 1, 1, 2), weight)
    each = torch.tensor([(0.25 + 0.5) / 2, (1.0 + 0.75) / 2])
    torch.testing.assert_close(total, (weight * each).sum())
    torch.testing.assert_close(scalars["hinge"], (weight * each).sum() / 1.5)
    torch.testing.assert_close(fooling(fake.view(2, 1, 1, 2)), torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match="logits"):
        hinge(real.view(2, 1, 1, 2), fake.view(2, 1, 2, 1), weight)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    last = normal(5).requires_grad_()
    a, b = normal(5, seed=1), normal(5, seed=2)
    found = adaptive_weight((last * a).sum(), (last * b).sum(), last)
    torch.testing.assert_close(found, a.norm() / (b.norm() + 1e-6))
    assert not found.requires_grad
    assert adaptive_weight((last * a).sum(), (last * 0).sum(), last).item() == 1e4  # clamped
    seen = []
    adaptive_weight((last * a).sum(), (last * b).sum(), last, average=lambda g: seen.append(g) or g)
    assert torch.equal(seen[0], a) and torch.equal(seen[1], b)


def decoder_and_judge() -> tuple[torch.nn.Conv2d, torch.nn.Module]:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8, depth=1, norm="group", norm_groups=4).requires_grad_(False)
    return torch.nn.Conv2d(4, 3, 3, padding=1), judge


@pytest.mark.parametrize("error", ["l1", "l2"])
@pytest.mark.parametrize("which", ["vqgan", "kl"])
def test_the_generators_loss_by_hand(which, error):
    last, judge = decoder_and_judge()
    x, features, weight = images(3, 8), normal(3, 4, 8, 8), torch.tensor([1.0, 0.0, 2.0])
    out, perceptual = last(features), torch.tensor([0.3, 9.0, 0.1])
    mean, log_variance = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1)
    logits, each = judge(out), {"l1": (out - x).abs(), "l2": (out - x) ** 2}[error].mean(dim=(1, 2, 3))
    knobs = {"fake_logits": logits, "last_layer": last.weight, "ramp": 0.8, "perceptual": perceptual, "error": error}
    if which == "vqgan":
        regular, codes = torch.tensor([0.5, 7.0, 0.25]), torch.zeros(3, 2, 2, dtype=torch.int64)
        (total, count), scalars = vqgan(out, x, regular, codes, 4, weight, perceptual_weight=2.0, **knobs)
        nll = each + 2 * perceptual
    else:
        small = normal(3, 3, 4, 4)
        knobs |= {"shrunk": [small], "equivariance": 0.3}
        (total, count), scalars = autoencoder_kl(
            out, x, mean, log_variance, weight, kl_weight=0.1, perceptual_weight=2.0, **knobs
        )
        apart = small - x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
        apart = {"l1": apart.abs(), "l2": apart**2}[error].mean(dim=(1, 2, 3))
        regular = 0.1 * gaussian_kl(mean, log_variance).sum(dim=(1, 2, 3)) + 0.3 * 192 * apart
        nll = 192 * (each + 2 * perceptual)
    norms = [
        torch.autograd.grad((weight * loss).sum() / 3, last.weight, retain_graph=True)[0].norm()
        for loss in (nll, fooling(logits))
    ]
    adaptive = norms[0] / (norms[1] + 1e-6)
    torch.testing.assert_close(scalars["adaptive"], adaptive)
    torch.testing.assert_close(total, (weight * (nll + regular + 0.8 * adaptive * fooling(logits))).sum())
    assert count.item() == 3
    torch.testing.assert_close(scalars["nll"], (weight * nll).sum() / 3)
    torch.testing.assert_close(scalars[error], (weight * each).sum() / 3)
    total.backward()
    assert last.weight.grad is not None and all(p.grad is None for p in judge.parameters())


def test_before_the_ramp_there_is_no_judge():
    x, codes = images(2), torch.zeros(2, 1, 1, dtype=torch.int64)
    (total, _), scalars = vqgan(x * 0.5, x, torch.zeros(2), codes, 4, torch.ones(2))
    torch.testing.assert_close(total, (x * 0.5).abs().mean(dim=(1, 2, 3)).sum())
    assert "adaptive" not in scalars
    with pytest.raises(ValueError, match="fake_logits and last_layer"):
        vqgan(x, x, torch.zeros(2), codes, 4, torch.ones(2), ramp=1.0)
    with pytest.raises(ValueError, match="vqgan needs"):
        vqgan(x, x, torch.zeros(3), codes, 4, torch.ones(2))


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_autoencoder_errors(error):
    x, out, weight = images(), normal(3, 3, 4, 4), torch.tensor([1.0, 0.0, 0.5])
    (total, count), scalars = ae.autoencoder(out, x, weight, error=error)
    each = ((out - x).abs() if error == "l1" else (out - x) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(total, (weight * each).sum())
    torch.testing.assert_close(scalars["error"], (weight * each).sum() / 1.5)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2, 2)])
def test_sparsity_by_hand(shape):
    x, latents, weight = images(), normal(*shape), torch.tensor([1.0, 0.0, 3.0])
    flat = latents.reshape(3, 5, -1)
    (total, _), scalars = ae.autoencoder(x, x, weight, latents, sparsity="l1", sparsity_weight=0.1)
    each = flat.abs().mean(dim=2).sum(dim=1)
    torch.testing.assert_close(total, 0.1 * (weight * each).sum())
    torch.testing.assert_close(scalars["sparsity"], (weight * each).sum() / 4)
    knobs = {"sparsity": "kl", "sparsity_weight": 0.1, "rho": 0.2}
    (total, _), scalars = ae.autoencoder(x, x, weight, latents.sigmoid(), **knobs)
    active = flat.sigmoid().mean(dim=2)
    mean = (active[0] + 3 * active[2]) / 4
    kl = (0.2 * (0.2 / mean).log() + 0.8 * (0.8 / (1 - mean)).log()).sum()
    torch.testing.assert_close(scalars["sparsity"], kl)
    torch.testing.assert_close(total, 0.1 * 4 * kl)
    assert ae.sparsity_kl(torch.full((2, 4), 0.2), torch.ones(2), 0.2).abs().item() < 1e-6
    wild = torch.tensor([[0.5, torch.nan]]), torch.tensor([[0.5, 1 + 2**-22]]), torch.tensor([[0.5, 0.0]])
    assert [ae.sparsity_kl(each, torch.ones(1), 0.2).isfinite().item() for each in wild] == [False, True, True]
    with pytest.raises(ValueError, match="latents for sparsity"):
        ae.autoencoder(x, x, weight, sparsity="l1")
    with pytest.raises(ValueError, match="one of l1, l2"):
        ae.autoencoder(x, x, weight, error="huber")


def test_corruptions_do_what_their_draws_say():
    x = images(2)
    assert torch.equal(corruptions.add_gaussian(x, torch.ones_like(x), 0.5), x + 0.5)
    u = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masked, noisy = corruptions.mask(x, u, 0.3), corruptions.salt_and_pepper(x, u, 0.4)
    gone = (u < 0.3).expand_as(x)
    assert (masked[gone] == -1).all() and torch.equal(masked[~gone], x[~gone])
    pepper, salt = (u < 0.2).expand_as(x), ((u >= 0.2) & (u < 0.4)).expand_as(x)
    assert (noisy[pepper] == -1).all() and (noisy[salt] == 1).all() and salt.any() and pepper.any()
    assert torch.equal(noisy[~(salt | pepper)], x[~(salt | pepper)])
    assert noisy.dtype == x.dtype and torch.equal(corruptions.mask(x, u, 0.0), x)


def test_half_precision_is_summed_in_full():
    x = images(2).bfloat16()
    for total in (
        ae.autoencoder(x, x, torch.ones(2))[0][0],
        vae_objective.vae(x, torch.zeros(1), x, torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))[0][0],
        vqgan_objective.hinge(x[:, :1], x[:, :1], torch.ones(2))[0][0],
    ):
        assert total.dtype == torch.float32
