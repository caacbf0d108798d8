"""Attention of short sequences in float32, where a CPU trains in bfloat16."""

import pytest
import torch
from accelerate.state import AcceleratorState

from kartina.layers import attention as layer
from kartina.layers.clip_transformer import CLIPTransformer
from kartina.training import __main__ as trainer
from kartina.training import loop, optim

PLACES = 24


def drawn(dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 3, PLACES, 8, dtype=dtype).requires_grad_() for _ in "qkv"]


@pytest.mark.parametrize("mask", ["none", "causal", "words", "numbers"])
def test_it_rounds_nothing_within(mask):
    lower = torch.ones(PLACES, PLACES, dtype=torch.bool).tril()
    added = torch.zeros(PLACES, PLACES).masked_fill(~lower, -torch.inf)
    given = {"words": lower, "numbers": added.bfloat16()}.get(mask)
    q, k, v = drawn(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), layer.short_in_float32():
        out = layer.attention(q, k, v, given, causal=mask == "causal")
    out.float().square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT / 8**0.5
    scores = scores if mask == "none" else scores.masked_fill(~lower, -torch.inf)
    expected = scores.softmax(-1) @ exact[2]
    assert out.dtype == torch.bfloat16 and (out != expected.bfloat16()).float().mean() < 0.01  # ties
    expected.backward(2 * out.detach().double())
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=2**-8, atol=1e-6)  # rounded once


@pytest.fixture
def dtypes(monkeypatch):
    """Those in which attention is computed."""
    seen, compute = set(), layer.F.scaled_dot_product_attention

    def noted(q, k, v, **rest):
        autocast = torch.is_autocast_enabled("cpu") and q.dtype == torch.float32
        seen.add(torch.bfloat16 if autocast else q.dtype)
        return compute(q, k, v, **rest)

    monkeypatch.setattr(layer.F, "scaled_dot_product_attention", noted)
    return seen


@pytest.mark.parametrize(("places", "training"), [(layer._SHORT + 1, True), (PLACES, False)])
def test_long_sequences_and_those_that_need_no_gradient_stay_as_they_are(places, training, dtypes):
    q = torch.randn(1, 1, places, 8).bfloat16().requires_grad_(training)
    with layer.short_in_float32():
        layer.attention(q, q, q)
    assert dtypes == {torch.bfloat16}


def test_float64_is_not_rounded():
    q, k, v = drawn(torch.float64)
    plain = layer.attention(q, k, v)
    with layer.short_in_float32():
        assert torch.equal(layer.attention(q, k, v), plain) and plain.dtype == torch.float64


@pytest.mark.parametrize("tiny_kind", ["dalle", "clip", "unet, captioned"])
def test_a_cpu_trains_so_in_bfloat16(tiny_kind, tiny, prepared, tmp_path, dtypes, monkeypatch):
    stage, argv = tiny[tiny_kind]
    monkeypatch.setattr(optim, "fast_bf16", lambda device: True)  # also where it is slow
    few = ["training.precision=bf16", *(f"stages.{stage}.{key}" for key in ("steps=1", "validate_samples=8"))]
    monkeypatch.setattr(loop._Run, "_look", lambda run: None)  # which needs no gradient
    run = prepared(tmp_path / "run", tiny_kind)
    AcceleratorState._reset_state()  # a fixture may just have trained in another precision
    assert trainer.main([*argv, *few, "--run", str(run)]) == 0
    assert dtypes == {torch.float32} and not layer._short_in_float32


def test_towers_read_as_torch_does_it(close):
    torch.manual_seed(0)
    network = CLIPTransformer(16, 1, 2)
    block, x = network.resblocks[0], torch.randn(3, 5, 16)
    torch.nn.init.normal_(block.attn.in_proj_bias)
    torch.nn.init.normal_(block.attn.out_proj.bias)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    theirs = torch.nn.MultiheadAttention.forward(block.attn, *(x.transpose(0, 1),) * 3, attn_mask=mask)[0]
    close(block.attn(x, mask), theirs.transpose(0, 1))


@pytest.mark.parametrize("read", [CLIPTransformer.forward, CLIPTransformer.read], ids=["patches", "captions"])
def test_the_one_place_that_is_read_is_as_among_all(read, close):
    network, places = CLIPTransformer(16, 2, 2).double(), torch.tensor([4, 0, 2])
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    found = []
    for only in (None, places):
        out = read(network, x, only=only)
        picked = out[range(3), places] if only is None else out
        found.append([picked, *torch.autograd.grad(picked.square().sum(), list(network.parameters()))])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


@pytest.mark.filterwarnings("error")
def test_rms_norm_keeps_bfloat16_without_a_warning():
    """Values as in float32, but for rounding, and a gradient of the weight in its own dtype."""
    norm = layer.RMSNorm(32, eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    found, expected = norm(x.bfloat16()), torch.nn.functional.rms_norm(x, (32,), norm.weight, 1e-6)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), expected, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert norm.weight.grad.dtype == torch.float32 and norm.weight.grad.abs().min() > 0
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_heads_of_places_lie_side_by_side_for_the_kernels(layout, monkeypatch):
    """Else torch takes the plain formula, which keeps all scores."""
    seen = []
    monkeypatch.setattr(layer, "attend", lambda q, k, v, **_: seen.append((q, k, v)) or v)
    network = layer.SpatialAttention(8, norm_groups=4, num_heads=2).to(memory_format=layout)
    network(torch.randn(2, 8, 4, 6).to(memory_format=layout))
    assert [y.stride(-1) for y in seen[0]] == [1, 1, 1] and seen[0][0].shape == (2, 2, 24, 4)
