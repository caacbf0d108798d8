"""Distributions over latents: draws against densities, pieces by label, and the discriminator of latents."""

import math

import pytest
import torch
from torch.nn import functional as F

from kartina.layers.discriminator import LatentDiscriminator
from kartina.priors.gaussian import KINDS, Mixture, Standard, SwissRoll, distribution
from kartina.training.objectives import gan

SAMPLES = torch.arange(20_000)


def points(side: float, steps: int) -> torch.Tensor:
    """The middles of steps x steps cells of a square from -side to side, (steps ** 2, 2)."""
    axis = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * 2 * side - side
    return torch.cartesian_prod(axis, axis)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_of_the_sample_alone_and_of_deviation_one(kind):
    prior = distribution(kind, 2)
    z = prior.draw(3, 0, SAMPLES, "test")
    assert z.shape == (20_000, 2) and z.dtype == torch.float32
    assert torch.equal(z[7:9], prior.draw(3, 0, SAMPLES[7:9], "test"))
    assert not torch.equal(z, prior.draw(3, 1, SAMPLES, "test"))
    assert not torch.equal(z, prior.draw(3, 0, SAMPLES, "other"))
    tolerance = 0.35 if kind == "swiss_roll" else 0.03  # the roll is not even on all sides
    assert z.mean(dim=0).abs().max() < tolerance
    assert ((z.std(dim=0) - 1).abs() < tolerance).all()


@pytest.mark.parametrize("prior", [Standard(2), Mixture(3), Mixture(10)])
def test_densities_integrate_to_one_and_are_those_of_the_draws(prior):
    grid = points(5.0, 500)
    density = prior.log_density(grid).exp() * (10 / 500) ** 2
    assert density.sum().item() == pytest.approx(1, abs=1e-4)
    z = prior.draw(0, 0, SAMPLES, "test").double()
    entropy = -(density * prior.log_density(grid)).sum()
    each = -prior.log_density(z)
    assert (each.mean() - entropy).abs() < 4 * each.std() / math.sqrt(len(z))
    cells = points(2.5, 5)  # how many fall into each of 25 squares, against the density's share
    home = ((grid[:, None] - cells).abs() < 0.5).all(dim=2).double()
    expected = density @ home
    found = ((z[:, None] - cells).abs() < 0.5).all(dim=2).double().mean(dim=0)
    assert ((found - expected).abs() < 5 * (expected / len(z)).sqrt() + 1e-4).all()


@pytest.mark.parametrize("kind", ["mixture", "swiss_roll"])
def test_a_label_names_where_its_draws_lie(kind):
    prior = distribution(kind, 2, 6)
    labels = SAMPLES % 6
    z = prior.draw(0, 0, SAMPLES, "test", labels)
    if kind == "mixture":
        angle = 2 * math.pi / 6 * torch.arange(6)
        found = torch.cdist(z, torch.stack([angle.cos(), angle.sin()], 1) * prior.radius).argmin(dim=1)
        assert (found == labels).float().mean() > 0.99
    else:  # pieces of equal length, from the centre on
        reach = torch.stack([z[labels == k].norm(dim=1).mean() for k in range(6)])
        assert (reach.diff() > 0).all() and reach[0] < 0.7 and reach[5] > 1.8
    assert (prior.piece(z) == labels).float().mean() > (0.99 if kind == "mixture" else 0.9)  # a roll's pieces touch
    whole = prior.draw(0, 0, SAMPLES, "test")
    torch.testing.assert_close(z.mean(dim=0), whole.mean(dim=0), atol=0.04, rtol=0)  # together they are the whole
    torch.testing.assert_close(z.T.cov(), whole.T.cov(), atol=0.04, rtol=0)


def test_a_swiss_roll_is_even_along_its_length(monkeypatch):
    """The length of a spiral grows as the square of its radius, but near the centre."""
    monkeypatch.setattr("kartina.priors.gaussian._THICKNESS", 0.0)
    share = (SwissRoll().draw(0, 0, SAMPLES, "test").norm(dim=1) / 2).square().sort().values
    even = (torch.arange(len(SAMPLES)) + 0.5) / len(SAMPLES)
    assert (share - even).abs().max() < 1.63 / len(SAMPLES) ** 0.5  # Kolmogorov's, at 1 %
    z = SwissRoll().draw(0, 0, SAMPLES, "test")
    turns = torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi) - 2 * (z.norm(dim=1) / 2)
    assert (turns - turns.round()).abs().max() < 1e-3  # two of them


def test_the_standard_normal_is_torchs():
    z = Standard(3).draw(0, 0, SAMPLES[:5], "test")
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    torch.testing.assert_close(Standard(3).log_density(z), expected)


def test_what_has_no_place_in_the_plane_is_refused():
    for build, message in (
        (lambda: distribution("cauchy", 2), "one of standard, mixture, swiss_roll"),
        (lambda: distribution("mixture", 8), "over 2 values, got 'mixture' over 8"),
        (lambda: Standard(0), "dim of at least 1"),
        (lambda: Mixture(2), "at least 3"),
        (lambda: SwissRoll(0), "at least 1 piece"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_the_discriminator_of_latents_reads_a_label_as_one_hot():
    torch.manual_seed(0)
    judge = LatentDiscriminator(2, 3, width=8, depth=1)
    z, labels = torch.randn(4, 2), torch.tensor([0, 2, 1, 1])
    weight, bias = judge.main[0].weight, judge.main[0].bias
    hidden = z @ weight[:, :2].T + weight[:, 2:].T[labels] + bias
    torch.testing.assert_close(judge(z, labels), judge.main[2](hidden.relu()))
    assert LatentDiscriminator(8).main[2].weight.shape == (1000, 1000)  # as published: two layers of 1,000
    for wrong in ((z,), (torch.randn(4, 3), labels), (torch.randn(4, 2, 1, 1), labels)):
        with pytest.raises(ValueError, match=r"latents \(B, 2\) and labels"):
            judge(*wrong)
    with pytest.raises(ValueError, match="no labels"):
        LatentDiscriminator(2)(z, labels)
    with pytest.raises(ValueError, match="at least 1"):
        LatentDiscriminator(width=0)


def test_the_logistic_losses_by_hand():
    real, fake, weight = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]]), torch.tensor([1.0, 0.5])
    (total, count), scalars = gan.discriminator(real, fake, weight)
    each = -F.logsigmoid(real[:, 0]) - torch.log(1 - fake[:, 0].sigmoid())
    torch.testing.assert_close(total, (weight * each).sum())
    assert count.item() == 1.5 and scalars["accuracy"].item() == pytest.approx((1 * 0.5 + 0.5 * 0.5) / 1.5)
    torch.testing.assert_close(gan.generator(fake), -torch.log(fake[:, 0].sigmoid()))
    patches = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(gan.generator(patches), F.softplus(-patches).mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="logistic loss needs"):
        gan.discriminator(real, fake, weight[:1])
    best = gan.discriminator(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2))[0][0]
    assert best.item() == pytest.approx(2 * math.log(4))  # where nothing can be told apart (theorem 1)
