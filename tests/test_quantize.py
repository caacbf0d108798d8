"""Quantizers: nearest codes, gradients, moving averages, restarts, Gumbel-softmax, FSQ."""

import itertools
import math

import pytest
import torch

from kartina.layers import random
from kartina.tokenizers import kmeans, quantize
from kartina.tokenizers.kmeans import nearest
from kartina.tokenizers.quantize import FSQ, GumbelQuantizer, VectorQuantizer, as_vectors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**arguments) -> VectorQuantizer:
    torch.manual_seed(0)
    model = VectorQuantizer(7, 5, **arguments)
    model.start(normal(200, 5, seed=3), seed=1)
    return model


def test_nearest_is_what_brute_force_finds(monkeypatch):
    vectors, codebook = normal(300, 6), normal(40, 6, seed=1)
    brute = [min(range(40), key=lambda k: float((z - codebook[k]).square().sum())) for z in vectors]
    assert nearest(vectors, codebook).tolist() == brute
    monkeypatch.setattr(kmeans, "_DISTANCES", 40 * 7)  # uneven parts
    assert nearest(vectors, codebook).tolist() == brute
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest(vectors, codebook).tolist() == brute


def test_by_cosine_lengths_do_not_matter():
    model, latents = quantizer(cosine=True), normal(2, 5, 3, 4, seed=4)
    similarity = torch.nn.functional.cosine_similarity(
        as_vectors(latents)[:, None], model.embedding.weight[None], dim=2
    )
    out = model(latents)
    assert torch.equal(out["codes"].flatten(), similarity.argmax(dim=1))
    assert torch.equal(model(latents * 100)["codes"], out["codes"])
    assert torch.equal(model.encode(latents), out["codes"])
    for name in ("quantized", "latents", "codewords"):
        torch.testing.assert_close(out[name].norm(dim=1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_gradient_passes_straight_through(ema_decay):
    model, latents = quantizer(ema_decay=ema_decay), normal(2, 5, 3, 4).requires_grad_()
    out, g = model(latents), normal(2, 5, 3, 4, seed=9)
    torch.testing.assert_close(out["quantized"], model.lookup(out["codes"]))
    out["quantized"].backward(g, retain_graph=True)
    assert torch.equal(latents.grad, g)
    assert model.embedding.weight.grad is None  # no gradient of the decoder reaches the codebook
    assert out["codewords"].requires_grad == (ema_decay is None)


def test_statistics_and_moving_averages_by_hand():
    model = VectorQuantizer(3, 2, ema_decay=0.9)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]]))
        model.ema_sums.copy_(model.embedding.weight)  # counts are 1
    latents = torch.tensor([[[[1.0, 5.0]], [[0.0, 0.0]]], [[[3.0, 1.0]], [[2.0, 0.0]]]])  # (2, 2, 1, 2)
    codes = model.encode(latents)
    assert codes.tolist() == [[[0, 1]], [[1, 0]]]
    counts, sums = model.statistics(latents, codes, torch.tensor([1.0, 0.5]))
    assert counts.tolist() == [1.5, 1.5, 0.0]
    assert sums.tolist() == [[1.0 + 0.5, 0.0], [5.0 + 1.5, 1.0], [0.0, 0.0]]
    model.update(counts, sums)
    torch.testing.assert_close(model.ema_counts, torch.tensor([0.9 + 0.15, 0.9 + 0.15, 0.9]))
    expected = torch.tensor([[0.15, 0.0], [3.6 + 0.65, 0.1], [0.0, 8.1]])
    torch.testing.assert_close(model.ema_sums, expected)
    torch.testing.assert_close(
        model.embedding.weight.data, expected / torch.tensor([1.05, 1.05, 0.9])[:, None], atol=1e-6, rtol=1e-6
    )
    for _ in range(400):  # a code that is never met fades, and stays where it is
        model.update(counts, sums)
    assert model.ema_counts[2] < 1e-5
    torch.testing.assert_close(model.embedding.weight[2].data, torch.tensor([0.0, 9.0]))
    torch.testing.assert_close(model.embedding.weight[0].data, sums[0] / counts[0])


def test_ranks_that_add_their_statistics_move_alike():
    latents, weight = normal(6, 5, 4, 4, seed=5), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    one, many = quantizer(ema_decay=0.5), quantizer(ema_decay=0.5)
    one.update(*one.statistics(latents, one.encode(latents), weight))
    parts = [many.statistics(z, many.encode(z), w) for z, w in zip(latents.split(2), weight.split(2), strict=True)]
    many.update(*(sum(column) for column in zip(*parts, strict=True)))
    torch.testing.assert_close(one.state_dict(), many.state_dict(), atol=1e-6, rtol=1e-6)
    assert not one.embedding.weight.requires_grad
    with pytest.raises(ValueError, match="trained by gradient"):
        quantizer().update(torch.zeros(7), torch.zeros(7, 5))


@pytest.mark.parametrize("cosine", [False, True])
def test_dead_codes_begin_anew(cosine):
    model = quantizer(ema_decay=0.9, cosine=cosine)
    with torch.no_grad():
        model.ema_counts[2] = 1e-4
        model.ema_counts[5] = 0.0
    mean, before = model.ema_counts.mean().item(), model.embedding.weight.detach().clone()
    candidates = normal(9, 5, seed=6)
    assert model.restart(model.ema_counts < 0.01, candidates) == 2
    given = torch.nn.functional.normalize(candidates, dim=1) if cosine else candidates
    assert torch.equal(model.embedding.weight[[2, 5]], given[:2])
    torch.testing.assert_close(model.ema_counts[[2, 5]], torch.tensor([mean, mean]))
    torch.testing.assert_close(model.ema_sums[[2, 5]], mean * given[:2])
    others = [0, 1, 3, 4, 6]
    assert torch.equal(model.embedding.weight[others], before[others])
    model.update(torch.zeros(7), torch.zeros(7, 5))  # nothing of the old state comes back
    torch.testing.assert_close(model.embedding.weight[[2, 5]].data, given[:2], atol=1e-6, rtol=1e-5)
    assert model.restart(torch.ones(7, dtype=torch.bool), candidates[:3]) == 3
    assert quantizer().restart(torch.tensor([True] + [False] * 6), candidates) == 1


def test_codewords_start_as_k_means_centres():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[:, None] + 0.1 * normal(3, 40, 2)).flatten(0, 1)
    model = VectorQuantizer(3, 2, ema_decay=0.99)
    model.start(points, seed=0)
    assert torch.cdist(centres, model.embedding.weight.data).amin(1).max() < 0.1
    torch.testing.assert_close(model.ema_sums, model.ema_counts[:, None] * model.embedding.weight.data)
    assert model.ema_counts.tolist() == [1.0, 1.0, 1.0]


def gumbel_quantizer() -> GumbelQuantizer:
    torch.manual_seed(1)
    model = GumbelQuantizer(4, 6, 3)
    torch.nn.init.normal_(model.proj.weight)
    return model


def test_gumbel_codes_are_drawn_from_the_softmax():
    model, n = gumbel_quantizer(), 200
    latents = normal(1, 4, 1, 1, seed=2).expand(n, 4, 10, 10)
    noise = random.gumbel(0, 0, torch.arange(n), (6, 10, 10), "test")
    drawn = torch.bincount(model(latents, noise)["codes"].flatten(), minlength=6)
    expected = model.logits(latents[:1])[0, :, 0, 0].softmax(dim=0).detach() * n * 100
    chi_square = ((drawn - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.52  # the 0.999 quantile at 5 degrees of freedom
    assert drawn.min() > 0


def test_gumbel_sees_one_codeword_and_learns_from_all():
    model, latents, noise = gumbel_quantizer(), normal(2, 4, 3, 3), normal(2, 6, 3, 3, seed=8)
    latents.requires_grad_()
    out = model(latents, noise, 0.7)
    torch.testing.assert_close(out["quantized"], model.lookup(out["codes"]))
    assert torch.equal(out["codes"], (out["logits"] + noise).argmax(dim=1))
    assert torch.equal(model.encode(latents), out["logits"].argmax(dim=1))
    (gradient,) = torch.autograd.grad(out["quantized"].square().sum(), latents)
    soft = ((model.logits(latents) + noise) / 0.7).softmax(dim=1)
    upstream = torch.einsum("bdhw,kd->bkhw", 2 * out["quantized"].detach(), model.embed.weight.detach())
    (expected,) = torch.autograd.grad((soft * upstream).sum(), latents)
    torch.testing.assert_close(gradient, expected)


def test_gumbel_becomes_the_argmax_as_the_temperature_falls():
    model, latents, noise = gumbel_quantizer(), normal(2, 4, 3, 3), normal(2, 6, 3, 3, seed=8)
    soft = quantize.relax(model.logits(latents), noise, 1e-4)
    assert soft.amax(dim=1).min() > 0.999
    assert torch.equal(soft.argmax(dim=1), model(latents, noise, 1e-4)["codes"])
    with pytest.raises(ValueError, match=r"noise of shape \(2, 6, 3, 3\)"):
        model(latents, noise[:1])


LEVELS = [(8, 5, 5, 5), (2, 3), (7,), (4, 4)]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_the_papers(levels):
    model, latents = FSQ(levels), 3 * normal(5, len(levels), 6, 6, seed=7)
    out = model(latents)
    assert model.num_codes == math.prod(levels)
    codes = torch.zeros(5, 6, 6, dtype=torch.int64)
    basis = 1
    for i, level in enumerate(levels):  # appendix A.1, one channel at a time in float64
        half = (level - 1) * (1 - 1e-3) / 2
        offset = 0.0 if level % 2 else 0.5
        bounded = torch.tanh(latents[:, i].double() + math.tan(offset / half)) * half - offset
        digits = bounded.round()
        assert digits.min() >= -(level // 2) and digits.max() <= level - 1 - level // 2
        torch.testing.assert_close(out["quantized"][:, i].double(), digits / (level // 2), atol=1e-6, rtol=0)
        codes += basis * (digits.long() + level // 2)
        basis *= level
    assert torch.equal(out["codes"], codes) and torch.equal(model.encode(latents), codes)
    torch.testing.assert_close(model.lookup(codes), out["quantized"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_codes_and_vectors_are_one_to_one(levels):
    model = FSQ(levels)
    codes = torch.arange(model.num_codes).view(1, 1, -1)
    vectors = model.lookup(codes)[0, :, 0].T
    axes = [[(digit - level // 2) / (level // 2) for digit in range(level)] for level in levels]
    grid = {tuple(round(v, 6) for v in point) for point in itertools.product(*axes)}
    assert {tuple(round(v, 6) for v in vector.tolist()) for vector in vectors} == grid
    assert vectors.min() >= -1 and vectors.max() <= 1


def test_fsq_gradient_is_that_of_the_bound_and_no_dtype_rounds_it():
    model, latents = FSQ((8, 5)), normal(2, 2, 3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(model(latents)["quantized"].sum(), latents)
    width = torch.tensor([4.0, 2.0]).view(2, 1, 1)
    (expected,) = torch.autograd.grad((model.bound(latents) / width).sum(), latents)
    assert torch.equal(gradient, expected)
    codes = model.encode(latents)
    assert torch.equal(model.to(torch.bfloat16).encode(latents), codes)
    assert not list(model.parameters()) and not model.state_dict()


def test_bad_sizes_are_refused():
    for build, message in (
        (lambda: VectorQuantizer(0, 4), "at least 1"),
        (lambda: VectorQuantizer(4, 4, ema_decay=1.0), r"\[0, 1\)"),
        (lambda: FSQ(()), "whole numbers of at least 2"),
        (lambda: FSQ((8, 1)), "whole numbers of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
