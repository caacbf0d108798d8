"""Counter-based draws: purity, independence of the batch, and the distributions they claim."""

import pytest
import torch
from scipy import stats

from kartina.layers import random


def test_a_sample_does_not_depend_on_its_batch():
    together = random.normal(7, 3, torch.arange(8), (4, 5), "noise")
    alone = random.normal(7, 3, torch.tensor([5]), (4, 5), "noise")
    assert torch.equal(together[5:6], alone)


@pytest.mark.parametrize(
    ("first", "second"), [(dict(seed=0, step=1), dict(seed=1, step=0)), (dict(seed=6, step=5), dict(seed=5, step=6))]
)
def test_seed_and_step_do_not_stand_in_for_each_other(first, second):
    """Else runs with neighbouring seeds, meant to be independent, would share their draws a few steps apart."""
    a, b = (random.uniform(**given, samples=torch.arange(8), shape=(64,), stream="noise") for given in (first, second))
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.15


@pytest.mark.parametrize(
    "change", [dict(seed=8), dict(step=4), dict(stream="other"), dict(samples=torch.arange(8, 16))]
)
def test_each_argument_changes_the_draw(change):
    given = dict(seed=7, step=3, samples=torch.arange(8), shape=(64,), stream="noise")
    a, b = random.uniform(**given), random.uniform(**{**given, **change})
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.15


def test_distributions():
    samples = torch.arange(200)
    u = random.uniform(0, 0, samples, (500,), "u").flatten().double().numpy()
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(random.normal(0, 0, samples, (500,), "n").flatten().double().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(random.gumbel(0, 0, samples, (500,), "g").flatten().double().numpy(), "gumbel_r").pvalue > 1e-3
    counts = torch.bincount(random.integers(0, 0, samples, (500,), "i", 7).flatten(), minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


GOLDEN = {-5: [981385, 111001], 2**63 - 1: [583001, 302556]}  # by seed


def test_known_values_never_change():
    """A stored run must resume with the same draws in every later version."""
    got = random.integers(1, 2, torch.tensor([3]), (4,), "golden", 1_000_000)
    assert got.tolist() == [[157894, 704444, 381399, 921058]]
    for seed, expected in GOLDEN.items():
        assert random.integers(seed, 99999, torch.tensor([-7]), (2,), "golden", 1_000_000).tolist() == [expected]


WORDS = (1 << 64) - 1


def splitmix(x):
    """The finaliser of a word, as published."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORDS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORDS
    return x ^ (x >> 31)


def test_uniform_draws_are_the_upper_bits_of_splitmix64():
    keys = random._keys(1, 2, torch.tensor([3, -4]), "words")
    drawn = random.uniform(1, 2, torch.tensor([3, -4]), (50,), "words")
    for key, row in zip(keys.tolist(), drawn, strict=True):
        words = [splitmix((key + i * 0x9E3779B97F4A7C15) & WORDS) for i in range(1, 51)]
        assert row.tolist() == [((word >> 41) + 0.5) / 2**23 for word in words]


@pytest.mark.parametrize("draw", [random.uniform, random.normal, random.gumbel])
def test_draws_are_the_same_whatever_parts_they_are_made_in(draw, monkeypatch):
    given = dict(seed=7, step=3, samples=torch.arange(5), shape=(3, 11), stream="noise")
    whole = draw(**given)
    monkeypatch.setattr(random, "_IN_CACHE", 5 * 7)  # uneven parts
    assert torch.equal(draw(**given), whole) and whole.shape == (5, 3, 11)
    assert torch.equal(random.gumbel(**given), -torch.log(-torch.log(random.uniform(**given))))


def test_dropout_leaves_the_mean():
    draws = random.Draws(0, 3, torch.arange(100))
    found = random.dropout(torch.ones(100, 1000), 0.1, draws, "test")
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (found == 0).float().mean().item() == pytest.approx(0.1, abs=0.004)
    assert random.dropout(torch.ones(100, 4).bfloat16(), 0.5, draws, "test").dtype == torch.bfloat16


def test_wrong_samples_and_seeds_are_refused():
    with pytest.raises(ValueError, match="int64"):
        random.uniform(0, 0, torch.zeros(3), (2,), "u")
    with pytest.raises(ValueError, match="64 bits"):
        random.uniform(2**63, 0, torch.zeros(3, dtype=torch.int64), (2,), "u")
