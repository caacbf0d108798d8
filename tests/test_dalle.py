"""DALL-E: what may see what, the cache, sampling, the published size, and that it learns."""

import pytest
import torch

from kartina.layers.attention import shift_tokens
from kartina.layers.random import gumbel
from kartina.priors.code_samplers import draw, sample_codes, truncate
from kartina.priors.dalle import DALLE, layer_masks
from kartina.training.objectives.dalle import dalle

V, T, K, GRID = 20, 5, 13, (3, 4)
N = GRID[0] * GRID[1]


def _prior(attention: str | list[str] = "sparse", **more) -> DALLE:
    torch.manual_seed(0)
    prior = DALLE(V, T, K, GRID, width=32, depth=6, num_heads=4, attention=attention, kernel=3, **more).eval()
    with torch.no_grad():
        for parameter in prior.parameters():  # large enough that a leak would show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return prior


def _batch(b: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    text = torch.randint(1, V, (b, T), generator=g)
    text[:, 3:] = 0
    return text, torch.randint(0, K, (b, N), generator=g)


MIXED = ["conv", "column", "causal", "conv", "row", "causal"]
MODELS = [
    {"attention": "sparse"},
    {"attention": MIXED},
    {"attention": MIXED, "rotary": True},
    {"attention": MIXED, "rotary": True, "shift": [1, 3, 9]},
    {"attention": "full", "mlp": "squared_relu", "qk_norm": True, "norm": "rms"},
]


@pytest.mark.parametrize("options", MODELS)
@torch.no_grad()
def test_a_changed_token_leaves_everything_up_to_it(options: dict) -> None:
    prior = _prior(**options)
    text, codes = _batch(1)
    before = prior(text, codes)
    assert before[0].shape == (1, T, V) and before[1].shape == (1, N, K)
    for i in range(T + N):
        changed = [text.clone(), codes.clone()]
        kind, place, size = (0, i, V) if i < T else (1, i - T, K)
        changed[kind][:, place] = (changed[kind][:, place] + 1) % size
        shift = [(a - b).abs().amax(dim=(0, 2)) for a, b in zip(before, prior(*changed), strict=True)]
        shift = torch.cat(shift)  # (T + N,): output j predicts token j
        assert shift[: i + 1].max() < 1e-6, i
        if i < T + N - 1:
            assert shift[i + 1] > 1e-4, f"token {i} must reach the next prediction"
        if i < T:
            assert shift[T:].min() > 1e-5, "every code sees all the text"


def test_shifted_channels_come_from_so_many_places_before():
    x = torch.arange(1.0, 6).view(1, 5, 1).expand(2, 5, 8)
    moved = shift_tokens(x, [1, 3])  # two channels each, four of its own
    assert moved[1, :, 0].tolist() == moved[0, :, 1].tolist() == [0, 1, 2, 3, 4]
    assert moved[1, :, 2].tolist() == moved[0, :, 3].tolist() == [0, 0, 0, 1, 2]
    assert torch.equal(moved[..., 4:], x[..., 4:])
    assert shift_tokens(x, [7])[0, :, :4].abs().max() == 0


def test_text_lies_on_the_diagonal_and_the_image_behind_it():
    places = _prior(rotary=True)._coordinates(torch.arange(T + 1 + N - 1)).tolist()
    assert places[: T + 1] == [[i, i] for i in range(6)]
    assert places[T + 1 :] == [[6 + i // 4, 6 + i % 4] for i in range(N - 1)]


@torch.no_grad()
def test_rotary_positions_are_used():
    torch.manual_seed(0)
    plain, rotary = _prior(), _prior(rotary=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), rotary.parameters(), strict=True))
    assert (plain(*_batch())[1] - rotary(*_batch())[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shift": 1}, "whole numbers"), ({"shift": [1.5]}, "whole numbers"), ({"shift": [17]}, "17 tokens"),
     ({"rotary": True, "width": 24}, "4 must divide the width of a head, got 6")],
)  # fmt: skip
def test_positions_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DALLE(**{"text_vocab": V, "text_length": T, "num_codes": K, "grid": GRID, "width": 32, "depth": 1,
                 "num_heads": 4, **options})  # fmt: skip


@torch.no_grad()
def test_full_sees_everything_before() -> None:
    prior = _prior("full")
    text, codes = _batch(1)
    changed = codes.clone()
    changed[:, 0] = (changed[:, 0] + 1) % K
    assert (prior(text, codes)[1] - prior(text, changed)[1]).abs().amax(dim=(0, 2))[1:].min() > 1e-5


@pytest.mark.parametrize("options", MODELS)
@torch.no_grad()
def test_cache_equals_the_full_forward(options: dict) -> None:
    prior = _prior(**options)
    text, codes = _batch()
    whole = prior(text, codes)[1]
    cache, logits = prior.prefill(text)
    for i in range(N):
        assert (logits - whole[:, i]).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item()), i
        assert torch.allclose(logits, prior.next_logits(text, codes[:, :i]), atol=1e-5)
        if i < N - 1:
            logits = prior.step(cache, codes[:, i], i)


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_cached_and_uncached_draw_the_same_codes(options: dict, guidance_scale: float) -> None:
    prior, (text, _) = _prior(**options), _batch(3)
    drawn = [sample_codes(prior, text, [5, 6, 7], guidance_scale=guidance_scale, use_cache=c) for c in (True, False)]
    assert drawn[0].shape == (3, *GRID) and drawn[0].dtype == torch.int64
    assert torch.equal(*drawn)


def test_sample_k_does_not_depend_on_the_batch() -> None:
    prior, (text, _) = _prior(), _batch(4)
    seeds = [11, 12, 13, 14]
    together = sample_codes(prior, text, seeds, guidance_scale=2.0)
    for k in range(4):
        assert torch.equal(together[k], sample_codes(prior, text[k : k + 1], [seeds[k]], guidance_scale=2.0)[0])
    same_text = sample_codes(prior, text[:1].expand(2, -1), [1, 2])
    assert not torch.equal(same_text[0], same_text[1]), "seeds must matter"


def test_the_guidance_formula() -> None:
    prior, (text, _) = _prior(), _batch(2)
    plain = sample_codes(prior, text, [1, 2])
    assert torch.equal(plain, sample_codes(prior, text, [1, 2], guidance_scale=1.0))
    near = sample_codes(prior, text, [1, 2], guidance_scale=1.0 + 1e-7)  # takes the guided way
    assert torch.equal(plain, near)
    null = sample_codes(prior, prior.null_text(2), [1, 2])
    assert torch.equal(null, sample_codes(prior, text, [1, 2], guidance_scale=0.0))
    assert not torch.equal(plain, null)


def test_truncation_keeps_exactly_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = lambda **k: truncate(logits, **k).isfinite().tolist()  # noqa: E731
    assert kept(top_k=2)[0] == [False, True, False, True]
    assert sum(kept(top_k=2)[1]) == 2, "ties keep exactly k"
    assert kept(top_p=0.65)[0] == [False, True, False, True]
    assert kept(top_p=0.75)[0] == [False, True, True, True]
    assert kept(top_p=0.01)[0] == [False, True, False, False]
    assert kept(top_k=9, top_p=1.0)[0] == [True] * 4
    assert torch.equal(truncate(logits, top_k=4), logits)


def test_gumbel_max_frequencies_are_the_softmax() -> None:
    pi = torch.tensor([0.1, 0.4, 0.2, 0.3])
    n = 40_000
    noise = gumbel(3, 0, torch.arange(n), (4,), "gumbel")
    logits = pi.log().expand(n, 4)
    for temperature, top_k, want in ((1.0, None, pi), (0.5, None, pi**2), (1.0, 2, pi * (pi > 0.25))):
        found = draw(logits, noise, temperature, top_k).bincount(minlength=4) / n
        assert torch.allclose(found, want / want.sum(), atol=0.012)
    assert (draw(logits, noise, 0.0) == 1).all()


@torch.no_grad()
def test_each_position_has_its_own_pad() -> None:
    prior = _prior()
    text, codes = _batch(1)  # pads at 3 and 4
    before = prior(text, codes)[1]
    change = torch.linspace(-1, 1, prior.start.numel())  # not a constant, which the norms would remove
    prior.text_embedding.weight[V + 1] += change  # the pad of position 1, unused by this caption
    assert torch.equal(before, prior(text, codes)[1])
    prior.text_embedding.weight[0] += change  # id 0 itself is never looked up
    assert torch.equal(before, prior(text, codes)[1])
    prior.text_embedding.weight[V + 3] += change
    assert not torch.allclose(before, prior(text, codes)[1])
    assert len(prior.text_embedding.weight) == V + T
    assert (prior.null_text(2) == 0).all() and prior.null_text(2).shape == (2, T)


def test_the_masks_of_the_published_layers() -> None:
    kinds = layer_masks(64)
    assert kinds[:7] == ["row", "column", "row", "row", "row", "column", "row"]
    assert kinds[-1] == "conv" and kinds.count("column") == 16 and len(kinds) == 64


def test_the_published_size() -> None:
    with torch.device("meta"):
        prior = DALLE()
    assert sum(p.numel() for p in prior.blocks.parameters() if p.dim() == 2) == 12_092_178_432
    assert 12.0e9 < sum(p.numel() for p in prior.parameters()) < 12.4e9


def test_zero_init_starts_every_block_as_the_identity() -> None:
    prior = DALLE(V, T, K, GRID, width=32, depth=2, num_heads=4, zero_init=True)
    x = torch.randn(1, 6, 32)
    assert torch.equal(prior.blocks[0](x), x)


def test_errors_say_what_to_do() -> None:
    prior, (text, codes) = _prior(), _batch()
    with pytest.raises(ValueError, match="context length"):
        prior(text[:, 1:], codes)
    with pytest.raises(ValueError, match="raster order"):
        prior(text, codes.view(2, *GRID))
    with pytest.raises(ValueError, match="text ids"):
        prior.prefill(torch.full_like(text, V))
    with pytest.raises(ValueError, match="one seed for each"):
        sample_codes(prior, text, [1])
    with pytest.raises(ValueError, match="divide"):
        DALLE(V, T, K, GRID, width=30, depth=1, num_heads=4)


def test_the_objective_by_hand() -> None:
    text, codes = _batch()
    uniform = torch.zeros(2, T, V), torch.zeros(2, N, K)
    (total, count), shown = dalle(*uniform, text, codes.view(2, *GRID), torch.tensor([1.0, 0.0]))
    log_v, log_k = torch.tensor([V, K]).log()
    assert torch.isclose(total, log_v / 8 + 7 * log_k / 8) and count == 1
    assert torch.isclose(shown["text_loss"], log_v) and torch.isclose(shown["image_loss"], log_k)
    certain = torch.nn.functional.one_hot(codes, K) * 100.0
    (total, _), shown = dalle(uniform[0], certain, text, codes, torch.ones(2), text_weight=0.0)
    assert total < 1e-6 and shown["image_loss"] < 1e-6


def test_it_overfits_eight_samples() -> None:
    torch.manual_seed(0)
    prior = DALLE(V, T, K, GRID, width=32, depth=3, num_heads=4, kernel=3, qk_norm=True, zero_init=True)
    text, codes = _batch(8)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(120):
        (total, count), shown = dalle(*prior(text, codes), text, codes, torch.ones(8))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert shown["image_loss"] < 0.05
    assert torch.equal(sample_codes(prior.eval(), text, [0] * 8, temperature=0.0).flatten(1), codes)


@pytest.mark.parametrize("attention", ["dense", ["causal"] * 5, ["causal"] * 5 + ["diagonal"]])
def test_an_unknown_or_short_pattern_of_masks_is_refused(attention) -> None:
    with pytest.raises(ValueError, match="for each of the 6 layers"):
        _prior(attention)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_logits_that_are_not_numbers_are_no_codes(guidance_scale: float) -> None:
    prior, (text, _) = _prior(), _batch(2)
    prior.image_head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="must give numbers, got NaN in float32; take float32 or less guidance"):
        sample_codes(prior, text, [1, 2], guidance_scale=guidance_scale)
