"""Judging a model on captions of any shards: what training held out, what CLIP chooses, how far pictures are off."""

import json

import pytest
from shape_shards import pack
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline.text_to_image import TextToImage
from kartina.training.evaluation import captions_suite


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("judged") / "shards", 24, 10)


@pytest.fixture(scope="module")
def system():
    return TextToImage.load("shapes/dalle", "cpu")


@pytest.mark.slow
def test_painted_pictures_are_told_from_those_of_other_captions(system, shards):
    found = captions_suite.evaluate(system, shards, per_test=20, candidates=2)
    one, best = (found["tests"]["captions"][column] for column in ("one_sample", "best_of_n"))
    assert one["n"] == best["n"] == found["true"]["n"] == 20
    assert min(one["chosen"]["rate"], found["true"]["chosen"]["rate"]) >= 0.8
    assert best["chosen"]["accepted"] >= one["chosen"]["accepted"] - 1
    assert found["ranking"]["captions"]["n"] == 20 and "on which its card does not say" in found["pictures"]
    things = ("large white ring", "small white ring", "large red cross", "small red cross")
    texts = [f"a {thing} on a green background" for thing in things]
    pictures = [painting.image for painting in system(texts)]
    both = (
        captions_suite._judged(system, {"true": pictures, "one": p}, texts, [()] * 4)
        for p in (pictures, pictures[::-1])
    )
    right, wrong = (found["one"] for found, _ in both)
    assert right["chosen"]["rate"] == 1 and wrong["chosen"]["rate"] == 0
    headline, report = captions_suite.headline(found), " ".join(captions_suite.report(found).split())
    assert headline["captions"] == round(one["kid"][0], 4) and "captions best of 2" in headline
    assert "its CLIP chooses among 16" in report and "true" in report
    shuffled = {
        "true": pictures,
        "one": [picture.rotate(0, fillcolor=0).point(lambda v: 255 - v) for picture in pictures],
    }
    far = captions_suite._judged(system, shuffled, texts, [()] * 4)[0]["one"]["kid"][0]
    assert far > 3 * right["kid"][0]


def test_without_a_clip_nothing_is_chosen_and_without_different_captions_nothing_is_judged(
    system, tmp_path, monkeypatch
):
    alone = TextToImage.load("shapes/dalle", "cpu")
    monkeypatch.setattr(alone, "scorer", None)
    texts = ["a small red ring on a green background"] * 4
    pictures = [painting.image for painting in alone(texts, seed=[1, 2, 3, 4])]
    found, chosen = captions_suite._judged(alone, {"true": pictures, "one_sample": pictures}, texts, [()] * 4)
    assert found["one_sample"]["chosen"] is None and not chosen
    same = pack(tmp_path / "same", 1, 10, caption=texts[0])
    with pytest.raises(ValueError, match="best of 2 needs a CLIP"):
        captions_suite.evaluate(alone, same, candidates=2)
    with pytest.raises(ValueError, match="1 pictures with captions can be read, at least 4"):
        captions_suite.evaluate(alone, same)
    empty = pack(tmp_path / "broken", 5, 10, broken=1)
    monkeypatch.setattr(captions_suite.ShardSource, "drawn", lambda *_: texts[0])
    with pytest.raises(ValueError, match="pictures need captions that tell them apart"):
        captions_suite.evaluate(alone, empty)


def test_of_shards_that_were_trained_on_what_was_held_out_is_judged(shards, tmp_path, monkeypatch):
    system = TextToImage.load("shapes/dalle", "cpu")
    data = {"kind": "shards", "shards": "elsewhere", "validation_share": 0.4}
    training = system.recipe.training | {"data": data}
    monkeypatch.setattr(system, "recipe", system.recipe.model_copy(update={"training": training}))
    held = captions_suite.held_out(system.recipe, set(), shards)
    assert held == (False, None)
    whole = captions_suite.ShardSource(shards, 32, 0, part="train", share=0.4)
    found = captions_suite.evaluate(system, shards, trained_on={whole.fingerprint})
    assert found["pictures"].endswith("held out of training") and found["true"]["n"] == 24 - whole.size
    mixed = captions_suite._source(system, shards, {whole.fingerprint, "another"})[1]
    assert "others were trained on other data" in mixed
    data["validation_share"] = 0.0
    everything = captions_suite.ShardSource(shards, 32, 0)
    with pytest.raises(ValueError, match="was trained on all pictures of"):
        captions_suite.evaluate(system, shards, trained_on={everything.fingerprint})


def test_the_command_judges_any_shards_and_refuses_tests_by_name(shards, tmp_path):
    done = CliRunner().invoke(cli.app, ["evaluate", "shapes/dalle", "--data", str(shards), "--per-test", "6", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["tests"]["captions"]["one_sample"]["n"] == 6
    done = CliRunner().invoke(cli.app, ["evaluate", "shapes/dalle", "--data", str(shards), "--tests", "S1"])
    assert "has no tests by name; leave --tests out" in str(done.exception)
