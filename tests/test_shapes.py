"""The shapes data: the grammar, its renderer, captions, held-out splits and the source."""

import hashlib

import numpy as np
import pytest
import torch

from kartina.training.data import shapes_splits as splits
from kartina.training.data.shapes import ShapesSource
from kartina.training.data.shapes_captions import (
    WRONG_KINDS,
    canonical,
    caption,
    caption_en,
    caption_ru,
    parse_caption,
    same_meaning,
    wrong_captions,
)
from kartina.training.data.shapes_scenes import AREAS, EXTENTS, PALETTE, RADII, Facts, grammar, render, sample_scenes

RING_AND_SQUARE = Facts(1, ((0, 0, 5), (1, 4, 1)), (3,))


def test_the_grammar_has_the_counted_rows_and_different_colours():
    assert grammar(1).shape == (672, 8)
    rows = grammar(2)
    assert rows.shape == (193_536, 8)
    ground, first, second = rows[:, 0], rows[:, 2], rows[:, 5]
    assert not ((ground == first) | (ground == second) | (first == second)).any()
    with pytest.raises(ValueError, match="1 or 2"):
        grammar(3)


@pytest.mark.parametrize("side", [32, 64])
def test_objects_lie_inside_and_keep_their_relation(side):
    scenes = sample_scenes(3, np.arange(5000), grammar(2), side)
    reach = EXTENTS[scenes.rows[:, [3, 6]]] * scenes.radius[..., None]
    assert (scenes.x - reach[..., 2] > 0).all() and (scenes.x + reach[..., 2] < side).all()
    assert (scenes.y - reach[..., 0] > 0).all() and (scenes.y + reach[..., 1] < side).all()
    dx, dy = scenes.x[:, 1] - scenes.x[:, 0], scenes.y[:, 1] - scenes.y[:, 0]
    along = np.choose(scenes.rows[:, 7], [dy, -dy, dx, -dx])
    across = np.where(scenes.rows[:, 7] < 2, dx, dy)
    assert (along > 0).all() and (np.abs(across) <= 0.5 * along + 1e-9).all()
    relative = scenes.radius / side
    bounds = RADII[scenes.rows[:, [1, 4]]]
    assert (relative >= bounds[..., 0]).all() and (relative <= bounds[..., 1]).all()


def test_the_renderer_paints_the_area_and_centre_of_each_shape():
    scenes = sample_scenes(1, np.arange(672), np.array(grammar(1)), 64)
    images = render(scenes)
    assert images.shape == (672, 64, 64, 3) and images.dtype == np.float32
    ground, colour = PALETTE[scenes.rows[:, 0]], PALETTE[scenes.rows[:, 2]]
    np.testing.assert_allclose(images[:, 0, 0], ground, atol=1e-6)
    vector = colour - ground
    alpha = ((images - ground[:, None, None]) * vector[:, None, None]).sum(-1) / (vector**2).sum(-1)[:, None, None]
    assert alpha.min() > -1e-5 and alpha.max() < 1 + 1e-5
    area = alpha.sum((1, 2))
    np.testing.assert_allclose(area, AREAS[scenes.rows[:, 3]] * scenes.radius[:, 0] ** 2, rtol=0.05)
    grid = np.arange(64) + 0.5
    np.testing.assert_allclose((alpha.sum(1) @ grid) / area, scenes.x[:, 0], atol=0.15)
    np.testing.assert_allclose((alpha.sum(2) @ grid) / area, scenes.y[:, 0], atol=0.15)


def test_captions_read_as_specified():
    assert caption_en(RING_AND_SQUARE) == "a small red ring right of a large blue square on an orange background"
    assert (
        caption_ru(RING_AND_SQUARE) == "маленькое красное кольцо справа от большого синего квадрата на оранжевом фоне"
    )
    above = Facts(4, ((1, 6, 0), (0, 7, 5)), (0,))
    assert caption_ru(above) == "большой белый круг над маленьким чёрным кольцом на синем фоне"


@pytest.mark.parametrize("language", ["en", "ru"])
def test_captions_round_trip_and_are_distinct(language):
    rows = np.concatenate([grammar(1), grammar(2)[::37]])
    facts = [Facts.from_row(row) for row in rows]
    texts = [caption(f, language) for f in facts]
    assert len(set(texts)) == len(texts)
    assert [parse_caption(text) for text in texts] == facts
    assert all((f.row() == row).all() for f, row in zip(facts, rows, strict=True))


@pytest.mark.parametrize(
    "text", ["", "a red ring", "a small red ring on a orange background", "большой белый круг на синий фоне"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


def test_equal_meaning_is_the_swapped_wording_only():
    other = Facts(1, RING_AND_SQUARE.objects[::-1], (2,))
    assert canonical(RING_AND_SQUARE) == other and same_meaning(other, RING_AND_SQUARE)
    assert not same_meaning(RING_AND_SQUARE, Facts(1, RING_AND_SQUARE.objects, (2,)))


def test_wrong_captions_are_valid_false_and_of_all_ten_kinds():
    wrong = wrong_captions(RING_AND_SQUARE, np.random.default_rng(0))
    assert tuple(wrong) == WRONG_KINDS
    for facts in wrong.values():
        assert not same_meaning(facts, RING_AND_SQUARE)
        assert parse_caption(caption_en(facts)) == facts
    single = wrong_captions(Facts(0, ((0, 1, 2),)), np.random.default_rng(0))
    assert set(single) == {"one colour", "one shape", "one size", "background"}


def _rules_by_hand(facts):
    facts = canonical(facts)
    names = ("circle", "square", "triangle", "diamond", "cross", "ring")
    a = any((colour - 3 * shape) % 8 in (0, 1) for _, colour, shape in facts.objects)
    c = any((colour - facts.background) % 8 == 1 for _, colour, _ in facts.objects)
    b = False
    if facts.relations:
        relation = {0: "above", 2: "left of"}[facts.relations[0]]
        words = f"{names[facts.objects[0][2]]} {relation} {names[facts.objects[1][2]]}"
        b = int(hashlib.sha256(words.encode()).hexdigest(), 16) % 5 == 0
    return a, b, c


def test_the_test_sets_break_what_they_say():
    for name, expected in {"S2a": (1, 0, 0), "S2b": (0, 1, 0), "S2c": (0, 0, 1), "S2none": (0, 0, 0)}.items():
        facts = splits.test_captions(name)
        assert len({canonical(f) for f in facts}) == 1000
        assert all(_rules_by_hand(f) == tuple(map(bool, expected)) for f in facts)
        assert len({f.relations for f in facts}) == 4
    single = splits.test_captions("S1")
    assert len(set(single)) == 240 and all(any(_rules_by_hand(f)) for f in single)
    with pytest.raises(ValueError, match="S2none"):
        splits.test_captions("S3")


def test_training_never_shows_a_held_out_meaning():
    facts = ShapesSource(seed=4).facts(range(50_000))
    shown = {canonical(f) for f in facts}
    assert not any(any(_rules_by_hand(f)) for f in shown)
    for name in splits.TESTS:
        assert shown.isdisjoint(canonical(f) for f in splits.test_captions(name))
    single = sum(not f.relations for f in facts)
    assert 0.48 < single / len(facts) < 0.52
    used = {(kind, v) for f in facts for thing in f.objects for kind, v in enumerate(thing)}
    assert len(used) == 2 + 8 + 6  # every word is still seen


@pytest.mark.parametrize("levels", [("S1",), ("S2",), ("S1", "S2", "S3")])
def test_training_never_speaks_of_a_held_out_meaning_even_as_false(levels):
    source, tests = ShapesSource(seed=4, levels=levels), {c for n in splits.TEST_COUNTS for c in _meanings(n)}
    shown = [parse_caption(w) for wrong in source.wrong(source.captions(range(1500)), range(1500)) for w in wrong]
    assert len(shown) > 4000
    assert tests.isdisjoint(canonical(f) for f in shown)
    assert not any(any(_rules_by_hand(f)) for f in shown if len(f.relations) < 2)
    judged = ShapesSource(split="S2a")
    assert any(splits.held_out([parse_caption(w) for w in judged.wrong(judged.captions([0]), [0])[0]]))


def _meanings(name):
    return {canonical(f) for f in splits.test_captions(name)}


def test_read_is_pure_and_independent_of_the_batch():
    source = ShapesSource(seed=7)
    batch = source.read(range(100, 164))
    again = ShapesSource(seed=7).read([163, 120, 10**12])
    torch.testing.assert_close(batch.image[[63, 20]], again.image[:2], rtol=0, atol=0)
    assert [batch.captions[63], batch.captions[20]] == again.captions[:2]
    assert [batch.keys[63], batch.keys[20]] == again.keys[:2]
    assert batch.image.shape == (64, 3, 32, 32) and batch.image.dtype == torch.float32
    assert batch.image.min() >= -1 and batch.image.max() <= 1
    assert batch.samples.tolist() == list(range(100, 164)) and (batch.weight == 1).all()
    assert batch.captions != ShapesSource(seed=8).read(range(100, 164)).captions
    assert [parse_caption(text) for text in batch.captions] == source.facts(range(100, 164))
    assert source.size is None


def test_one_and_two_objects_are_drawn_as_ever():
    """A model's card names its data by seed and position, so these draws may never change."""
    source = ShapesSource()
    batch = source.read(range(64))
    text = "\n".join(batch.captions)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6f6dcf509f9a7a1b"
    means = batch.image.double().mean((1, 2, 3))
    assert means[:4].tolist() == pytest.approx([-0.093164, -0.013017, -0.029352, -0.062058], abs=1e-5)
    assert source.fingerprint == "shapes train 32 px, ('S1', 'S2'), ('en', 'ru'), 0.02, 0"


def test_a_test_split_is_finite_and_follows_its_captions():
    source = ShapesSource(split="S2b", languages=("ru",), size=64)
    assert source.size == 1000
    batch = source.read([0, 999])
    wanted = splits.test_captions("S2b")
    assert batch.captions == [caption_ru(wanted[0]), caption_ru(wanted[999])]
    assert batch.image.shape == (2, 3, 64, 64)
    with pytest.raises(IndexError, match="1000"):
        source.read([1000])


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 48},
        {"levels": ("S9",)},
        {"levels": ()},
        {"split": "x"},
        {"languages": ("de",)},
        {"jitter": -1.0},
        {"contrast": 0},
        {"split": "S2a", "contrast": 4},
    ],
)
def test_a_wrong_option_is_refused(bad):
    with pytest.raises(ValueError):
        ShapesSource(**bad)


def test_captions_are_read_without_pictures():
    source = ShapesSource(levels=("S1", "S2", "S3"))
    assert source.captions(range(5, 40)) == source.read(range(5, 40)).captions


@pytest.mark.parametrize("levels", [("S1",), ("S2",), ("S3",)])
def test_wrong_captions_mean_another_thing_in_the_same_language(levels):
    source = ShapesSource(levels=levels)
    true = source.captions(range(40))
    found = source.wrong(true, range(40))
    for sample, (text, wrong) in enumerate(zip(true, found, strict=True)):
        assert len(wrong) >= 2 and len(set(wrong)) == len(wrong)
        assert all(source.meaning(w) != source.meaning(text) for w in wrong)
        assert all(w.isascii() == text.isascii() for w in wrong)
        assert [wrong] == source.wrong([text], [sample])  # whatever stands beside it
    ground = parse_caption(true[0]).background
    drawn = source.wrong([true[0]] * 60, range(60))
    places = {i for wrong in drawn for i, w in enumerate(wrong) if parse_caption(w).background != ground}
    assert min(places) < 2 and max(places) >= 3  # another sample, another order


def test_the_opposite_relation_comes_first():
    source = ShapesSource(levels=("S2",))
    true = source.captions(range(40))
    first = 0
    for text, wrong in zip(true, source.wrong(true, range(40)), strict=True):
        facts, opposite = parse_caption(text), [parse_caption(w) for w in wrong]
        flipped = [f.objects == facts.objects and f.relations == (facts.relations[0] ^ 1,) for f in opposite]
        assert not any(flipped[1:])
        first += flipped[0]
    assert 20 < first < 40  # some are held out


@pytest.mark.parametrize("levels", [("S1",), ("S1", "S2"), ("S2", "S3")])
def test_scenes_of_a_group_are_one_fact_away_from_its_first(levels):
    plain, grouped = ShapesSource(seed=4, levels=levels), ShapesSource(seed=4, levels=levels, contrast=4)
    batch = grouped.read(range(200, 1000))
    assert batch.captions[::4] == plain.captions(range(50, 250))
    hidden = {f for name in splits.TEST_COUNTS for f in _meanings(name)}
    for group, first in enumerate(batch.captions[::4]):
        others = batch.captions[4 * group + 1 : 4 * group + 4]
        assert [parse_caption(w) for w in others] == grouped.facts(range(201 + 4 * group, 204 + 4 * group))
        assert set(others) <= set(grouped.wrong([first], [50 + group])[0])
        assert hidden.isdisjoint(canonical(parse_caption(w)) for w in others)
    again = ShapesSource(seed=4, levels=levels, contrast=4).read([350, 203])  # in the middle of a group
    torch.testing.assert_close(batch.image[[150, 3]], again.image, rtol=0, atol=0)
    assert [batch.captions[150], batch.captions[3]] == again.captions
    assert grouped.fingerprint != plain.fingerprint


def test_the_canonical_wording_means_the_same_in_the_same_language():
    source = ShapesSource(levels=("S1", "S2", "S3"))
    changed = 0
    for text in source.captions(range(200)):
        plain = source.canonical(text)
        assert source.meaning(plain) == source.meaning(text) and plain.isascii() == text.isascii()
        assert source.canonical(plain) == plain
        changed += plain != text
    assert 40 < changed < 100
