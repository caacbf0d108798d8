"""The shipped models: whole, small, and still as good as their cards say."""

import numpy as np
import pytest

from kartina.pipeline import checkpoint
from kartina.pipeline.known_models import SHIPPED, known_models
from kartina.pipeline.text_to_image import TextToImage
from kartina.training.evaluation.shapes_suite import evaluate

NAMES = [name for name, folder in known_models().items() if folder.is_relative_to(SHIPPED)]


def test_something_is_shipped_and_all_of_it_is_small():
    assert "shapes/dalle" in NAMES
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 60e6


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_whole_measured_and_ranks(name):
    system = TextToImage.load(name, device="cpu")
    card = checkpoint.read_card(SHIPPED / name)
    assert card["measured"] and set(card["parts"]) == {"tokenizer", "prior", "clip"}
    best, other = system("a large green triangle on a white background", candidates=2, keep=2)
    assert best.clip_score >= other.clip_score
    assert np.asarray(best.image).shape == (system.recipe.image_size, system.recipe.image_size, 3)


def test_shapes_are_painted_as_well_as_the_card_says():
    """Of 24 captions; 0.3 is four standard deviations, so that another machine's rounding does not matter."""
    figures = next(iter(checkpoint.read_card(SHIPPED / "shapes/dalle")["measured"].values()))["figures"]
    rates = evaluate("shapes/dalle", tests=["S1", "S2none"], per_test=24)["tests"]
    for test, columns in rates.items():
        assert columns["one_sample"]["rate"] >= figures[test] - 0.3, test
