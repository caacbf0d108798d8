"""Level S3 of the shapes data: three objects and counts, from captions to the checker."""

from itertools import combinations, product

import numpy as np
import pytest

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
from kartina.training.data.shapes_many import DRAWS, place_many
from kartina.training.data.shapes_scenes import EXTENTS, GAP, MARGIN, RADII, Facts, render, things
from kartina.training.evaluation import shapes_checker
from kartina.training.evaluation.shapes_checker import check, compare, parse

THREE = Facts(6, ((0, 0, 5), (1, 4, 1), (0, 3, 0)), (0, 2))
FOUR = Facts(4, ((0, 0, 0),) * 4, (), True)


def _assert_placed(scenes):
    """Everything inside, boxes GAP apart, and every relation in the rule of two objects."""
    side, slots = scenes.size, things(scenes.rows)
    present = slots[..., 2] >= 0
    reach = EXTENTS[slots[..., 2]] * scenes.radius[..., None] + MARGIN - 1e-9
    left, right = scenes.x - reach[..., 2], scenes.x + reach[..., 2]
    top, bottom = scenes.y - reach[..., 0], scenes.y + reach[..., 1]
    assert (np.minimum.reduce([left, top, side - right, side - bottom])[present] >= 0).all()
    for i, j in combinations(range(4), 2):
        gaps = [left[:, j] - right[:, i], left[:, i] - right[:, j], top[:, j] - bottom[:, i], top[:, i] - bottom[:, j]]
        assert (np.maximum.reduce(gaps) >= GAP * side)[present[:, i] & present[:, j]].all()
    for slot, column in ((1, 7), (2, 11)):
        related = scenes.rows[:, column] >= 0
        relation = scenes.rows[related, column]
        dx, dy = (v[related, slot] - v[related, 0] for v in (scenes.x, scenes.y))
        along, across = np.choose(relation, [dy, -dy, dx, -dx]), np.where(relation < 2, dx, dy)
        assert (along > 0).all() and (np.abs(across) <= 0.5 * along + 1e-9).all()
    bounds = RADII[slots[..., 0]]
    assert ((scenes.radius / side >= bounds[..., 0]) & (scenes.radius / side <= bounds[..., 1]))[present].all()
    assert (scenes.radius[~present] == 0).all()


@pytest.mark.parametrize("side", [32, 64])
def test_every_drawn_scene_fits_and_keeps_its_relations(side):
    _assert_placed(ShapesSource(size=side, levels=("S3",)).scenes(range(20_000)))


def _hardest_rows():
    shapes = np.array(list(product(range(6), range(6), range(6), range(2), range(2, 4), range(2))))
    three = np.full((len(shapes), 13), -1)
    three[:, [0, 2, 5, 9]] = range(4)
    three[:, [1, 4, 8]] = 1
    three[:, [3, 6, 10, 7, 11]] = shapes[:, :5]
    swapped = shapes[:, 5] == 1
    three[swapped, 4:12] = np.roll(three[swapped, 4:12], 4, axis=1)
    counts = np.full((18, 13), -1)
    counts[:, :4] = [(0, 1, 1, shape) for shape in range(6)] * 3
    counts[:, 12] = np.repeat([2, 3, 4], 6)
    return np.concatenate([three, counts])


@pytest.mark.parametrize("side", [32, 64])
def test_large_shapes_fit_at_the_ends_of_every_draw(side):
    rows, rng = _hardest_rows(), np.random.default_rng(0)
    for _ in range(8):
        draws = np.where(rng.random((len(rows), DRAWS)) < 0.5, 1e-7, 1 - 1e-7)
        draws[:, 6:10] = 1 - 1e-7  # the largest radii
        _assert_placed(place_many(rows, draws, side))


def test_captions_read_as_specified():
    assert caption_en(THREE) == (
        "a small red ring above a large blue square and left of a small green circle on a white background"
    )
    assert caption_ru(THREE) == (
        "маленькое красное кольцо над большим синим квадратом и слева от маленького зелёного круга на белом фоне"
    )
    cases = {
        (1, 0): ("one small red circle", "один маленький красный круг"),
        (1, 5): ("one small red ring", "одно маленькое красное кольцо"),
        (2, 5): ("two small red rings", "два маленьких красных кольца"),
        (3, 0): ("three small red circles", "три маленьких красных круга"),
        (4, 4): ("four small red crosses", "четыре маленьких красных креста"),
    }
    for (count, shape), (english, russian) in cases.items():
        facts = Facts(4, ((0, 0, shape),) * count, (), True)
        assert caption_en(facts) == f"{english} on a blue background"
        assert caption_ru(facts) == f"{russian} на синем фоне"
    assert caption_ru(Facts(0, ((1, 4, 2),) * 2, (), True)) == "два больших синих треугольника на красном фоне"


@pytest.mark.parametrize("language", ["en", "ru"])
def test_captions_and_rows_round_trip(language):
    facts = ShapesSource(levels=("S1", "S2", "S3")).facts(range(3000))
    assert [parse_caption(caption(f, language)) for f in facts] == facts
    assert [Facts.from_row(f.row()) for f in facts] == facts
    texts = {caption(f, language) for f in facts}
    assert len(texts) == len(set(facts))


@pytest.mark.parametrize(
    "text",
    [
        "two small red circle on a blue background",
        "five small red circles on a blue background",
        "a small red ring above a large blue square left of a small green circle on a white background",
        "одно маленькое красное круг на синем фоне",
        "три маленькие красные круга на синем фоне",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


def test_the_order_of_clauses_does_not_change_the_meaning():
    a, b, c = THREE.objects
    assert same_meaning(THREE, Facts(6, (a, c, b), (2, 0)))
    assert not same_meaning(THREE, Facts(6, (a, c, b), (0, 2)))
    assert not same_meaning(THREE, Facts(6, (b, a, c), (1, 2)))
    assert same_meaning(Facts(4, FOUR.objects[:1], (), True), Facts(4, FOUR.objects[:1]))
    assert not same_meaning(FOUR, Facts(4, FOUR.objects[:3], (), True))


def test_wrong_captions_are_valid_false_and_of_every_kind():
    facts = Facts(6, ((0, 0, 5), (1, 4, 1), (0, 3, 0)), (1, 3))
    for seed in range(20):
        wrong = wrong_captions(facts, np.random.default_rng(seed))
        assert set(wrong) >= set(WRONG_KINDS) - {"swap sizes"}  # two of the sizes are equal
        counts = wrong_captions(FOUR, np.random.default_rng(seed))
        assert set(counts) == {"one colour", "one shape", "one size", "background", "count"}
        assert len(counts["count"].objects) == 3
        for true, false in [(facts, f) for f in wrong.values()] + [(FOUR, f) for f in counts.values()]:
            assert not same_meaning(false, true)
            assert parse_caption(caption_en(false)) == false


def _breaks_a_rule(facts):
    pairs = [(facts.objects[0], r, other) for r, other in zip(facts.relations, facts.objects[1:], strict=True)]
    parts = [Facts(facts.background, (first, other), (r,)) for first, r, other in pairs]
    parts += [Facts(facts.background, (thing,)) for thing in facts.objects]
    return any(splits.broken_rules(np.stack([part.row()])).any() for part in parts)


def test_training_shows_both_parts_and_never_a_held_out_meaning():
    source = ShapesSource(levels=("S3",), seed=3)
    facts = source.facts(range(30_000))
    shown = {canonical(f) for f in facts}
    assert not any(_breaks_a_rule(f) for f in facts[:500] if not f.counted)
    assert not any(_breaks_a_rule(Facts(f.background, f.objects[:1])) for f in facts[:500] if f.counted)
    for name in splits.TEST_COUNTS:
        assert shown.isdisjoint(canonical(f) for f in splits.test_captions(name))
    three = [f for f in facts if not f.counted]
    assert 0.48 < len(three) / len(facts) < 0.52
    assert len({f.relations for f in three}) == 8 and len({tuple(t[0] for t in f.objects) for f in three}) == 8
    assert {len(f.objects) for f in facts if f.counted} == {1, 2, 3, 4}
    used = {(kind, v) for f in facts for thing in f.objects for kind, v in enumerate(thing)}
    assert len(used) == 2 + 8 + 6


def test_reserved_rows_cover_every_variant():
    """Sizes and the order of clauses cannot bring a reserved meaning back."""
    sizeless = {tuple(row) for row in splits.training_rows("S3objects").tolist()}
    for facts in splits.test_captions("S3objects"):
        small = Facts(facts.background, tuple((0, *thing[1:]) for thing in facts.objects), facts.relations)
        assert tuple(canonical(small).row().tolist()) not in sizeless


@pytest.mark.parametrize("name", ["S3objects", "S3counts"])
def test_the_test_sets_are_distinct_and_break_no_rule(name):
    facts = splits.test_captions(name)
    assert len({canonical(f) for f in facts}) == 500
    assert {len(f.objects) for f in facts} == ({3} if name == "S3objects" else {2, 3, 4})
    assert all(f.counted == (name == "S3counts") for f in facts)
    assert not any(_breaks_a_rule(f if not f.counted else Facts(f.background, f.objects[:1])) for f in facts)
    source = ShapesSource(split=name, languages=("en",))
    assert source.size == 500 and source.read([0, 499]).captions == [caption_en(facts[0]), caption_en(facts[499])]


def test_read_is_pure_and_mixes_the_levels():
    source = ShapesSource(levels=("S1", "S2", "S3"), seed=7)
    batch = source.read(range(100, 164))
    again = ShapesSource(levels=("S1", "S2", "S3"), seed=7).read([163, 120])
    np.testing.assert_array_equal(batch.image[[63, 20]], again.image)
    assert [batch.captions[63], batch.captions[20]] == again.captions
    assert [parse_caption(text) for text in batch.captions] == source.facts(range(100, 164))
    facts = source.facts(range(6000))
    kinds = [sum(f.counted or len(f.objects) == 3 for f in facts), sum(len(f.relations) == 1 for f in facts)]
    assert all(1850 < n < 2150 for n in kinds)


@pytest.mark.parametrize("side", [32, 64])
def test_the_checker_accepts_true_captions_and_no_wrong_one(side):
    source = ShapesSource(size=side, levels=("S3",), seed=5)
    images = ((source.read(range(400)).image.permute(0, 2, 3, 1) + 1) / 2).numpy()
    rng, asked = np.random.default_rng(0), 0
    for seen, facts in zip(parse(images), source.facts(range(400)), strict=True):
        assert compare(seen, facts) == set()
        for kind, wrong in wrong_captions(facts, rng).items():
            asked += 1
            assert compare(seen, wrong), (kind, facts)
    assert asked > 2400


def test_the_careful_search_reads_many_objects_too(monkeypatch):
    source = ShapesSource(levels=("S3",), seed=6)
    images = ((source.read(range(60)).image.permute(0, 2, 3, 1) + 1) / 2).numpy()
    monkeypatch.setattr(shapes_checker, "_parse_clean", lambda images, *_: [None] * len(images))
    assert check(images, source.facts(range(60))) == [set()] * 60


def test_each_changed_fact_of_three_is_named():
    image = render(place_many(THREE.row()[None], np.full((1, DRAWS), 0.5), 32))
    a, b, c = THREE.objects
    cases = {
        "count": Facts(6, (a, b, c, c), (0, 2, 2)),
        "colour": Facts(6, (a, b, (0, 5, 0)), (0, 2)),
        "relation": Facts(6, THREE.objects, (0, 3)),
    }
    assert check(image, [THREE]) == [set()]
    assert "count" in check(image, [Facts(6, (a, b), (0,))])[0]
    for failure, wanted in cases.items():
        assert check(image, [wanted]) == [{failure}]
    noise = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    assert all(check(noise, [FOUR] * 10))
