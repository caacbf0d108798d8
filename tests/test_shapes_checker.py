"""The shapes checker: true captions pass, minimally wrong ones do not, and real failures are named."""

import numpy as np
import pytest
from scipy import ndimage

from kartina.training.data.shapes_captions import wrong_captions
from kartina.training.data.shapes_scenes import Facts, grammar, place, render, sample_scenes
from kartina.training.evaluation import shapes_checker
from kartina.training.evaluation.shapes_checker import check, compare, parse

FACTS = Facts(6, ((1, 0, 0), (0, 4, 1)), (0,))  # a large red circle above a small blue square on a white background


def _pictures(seed, count, objects, side, noise=0.0, tint=0.02, blur=0.0):
    scenes = sample_scenes(seed, np.arange(count), grammar(objects), side)
    rng = np.random.default_rng(seed)
    images = render(scenes) + rng.normal(0, tint, (count, 1, 1, 3))
    images = ndimage.gaussian_filter(images, (0, blur, blur, 0)) + rng.normal(0, noise, images.shape)
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8), scenes.facts()


def _acceptance(images, facts, seed=0):
    """(true captions accepted, wrong captions accepted, wrong captions asked)."""
    rng = np.random.default_rng(seed)
    seen = parse(images)
    true = sum(not compare(s, f) for s, f in zip(seen, facts, strict=True))
    wrong = [not compare(s, w) for s, f in zip(seen, facts, strict=True) for w in wrong_captions(f, rng).values()]
    return true, sum(wrong), len(wrong)


def _example():
    draws = np.full((1, 6), 0.5)
    return render(place(FACTS.row()[None], draws, 32))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("objects", [1, 2])
def test_clean_images_are_accepted_and_wrong_captions_are_not(side, objects):
    true, wrong, asked = _acceptance(*_pictures(11, 300, objects, side))
    assert (true, wrong) == (300, 0) and asked >= 1200


def test_noisy_images_take_the_careful_search_and_pass():
    images, facts = _pictures(12, 60, 2, 32, noise=0.06, tint=0.0)
    true, wrong, _ = _acceptance(images, facts)
    assert true >= 59 and wrong == 0


def test_the_careful_search_agrees_with_the_fast_pass(monkeypatch):
    images, facts = _pictures(13, 60, 2, 32)
    fast = parse(images)
    monkeypatch.setattr(shapes_checker, "_parse_clean", lambda images, *_: [None] * len(images))
    for quick, slow, wanted in zip(fast, parse(images), facts, strict=True):
        assert compare(quick, wanted) == compare(slow, wanted) == set()


def test_each_changed_fact_is_named():
    image = _example()
    assert check(image, [FACTS]) == [set()]
    first, second = FACTS.objects
    cases = {
        "background": Facts(7, FACTS.objects, (0,)),
        "count": Facts(6, (first,)),
        "colour": Facts(6, ((1, 5, 0), second), (0,)),
        "shape": Facts(6, (first, (0, 4, 3)), (0,)),
        "size": Facts(6, (first, (1, 4, 1)), (0,)),
        "relation": Facts(6, FACTS.objects, (2,)),
    }
    for failure, wanted in cases.items():
        assert check(image, [wanted]) == [{failure}]


def test_spoiled_images_are_rejected():
    image = _example()[0]
    erased = image.copy()
    erased[16:] = image[0, 0]
    assert "count" in check(erased[None], [FACTS])[0]
    assert "relation" in check(image[None, ::-1], [FACTS])[0]
    extra = image.copy()
    extra[20:26, 1:7] = (0.16, 0.63, 0.27)
    assert "count" in check(extra[None], [FACTS])[0]
    line = image.copy()
    line[1:3, 1:31] = (0.16, 0.63, 0.27)
    assert check(line[None], [FACTS])[0] & {"count", "malformed"}
    assert check(1 - image[None], [FACTS])[0]
    assert "background" in check(np.zeros((1, 32, 32, 3), np.uint8), [FACTS])[0]


def test_noise_is_never_a_scene():
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    facts = sample_scenes(0, np.arange(20), grammar(2)).facts()
    assert all(check(noise, facts))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "channels last"),
        (np.full((1, 32, 32, 3), -0.5, np.float32), "clamp"),
        (np.full((1, 32, 32, 3), np.nan, np.float32), "clamp"),
        (np.zeros((2, 32, 32, 3), np.float32), "one facts for each image"),
    ],
)
def test_wrong_arguments_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        check(images, [FACTS])


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 64])
def test_twenty_thousand_wrong_captions(side):
    true, wrong, asked = _acceptance(*_pictures(14, 2500, 2, side))
    assert (true, wrong) == (2500, 0) and asked >= 20_000


def test_of_an_object_that_is_missing_nothing_else_is_said():
    """A large red circle left of a small blue square, of which only the square is there."""
    wanted = Facts(background=6, objects=((1, 0, 0), (0, 4, 1)), relations=(2,))
    square = shapes_checker.Found(size=0, colour=4, shape=1, x=0.6, y=0.5, radius=0.1, error=0.0)
    assert compare(shapes_checker.Parsed(6, (square,)), wanted) == {"count"}
    circle = shapes_checker.Found(size=1, colour=0, shape=0, x=0.8, y=0.5, radius=0.2, error=0.0)
    assert compare(shapes_checker.Parsed(6, (square, circle)), wanted) == {"relation"}
    assert compare(shapes_checker.Parsed(6, ()), wanted) == {"count"}
