"""What a model without captions draws of shapes, judged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.images import to_uint8
from kartina.training import __main__ as trainer
from kartina.training.data.shapes import ShapesSource
from kartina.training.evaluation import scenes_suite

FACTS = {"model": "tests/own", "model_hash": "0", "device": "cpu", "dtype": "float32", "knobs": {}}


def scenes(count):
    return list(to_uint8(ShapesSource(levels=["S1", "S2"], jitter=0.0).read(range(count)).image).numpy())


def test_pictures_are_scenes_where_they_show_one_or_two_shapes():
    three = scenes(3)
    blank, blots = np.full_like(three[0], 255), np.full_like(three[0], 255)
    blots[4:7, 4:20], blots[7:20, 4:7] = (0, 0, 0), (0, 0, 0)  # an L
    pictures = [*three, blank, blots, *scenes(95)]
    seeds = []

    def system(prompts, seed):
        seeds.extend(seed)
        return [SimpleNamespace(image=Image.fromarray(pictures[s - 7]), facts=FACTS) for s in seed]

    result = scenes_suite.evaluate(system, 100, seed=7)
    assert seeds == list(range(7, 107))
    assert (result["n"], result["accepted"], result["malformed"], result["objects"]["0"]) == (100, 98, 1, 1)
    assert sum(result["objects"].values()) == 100 and result["objects"]["2"] > 20
    assert "98.0% [93.0, 99.4] of 100 pictures are scenes of one to 2 objects" in scenes_suite.report(result)
    alone = scenes_suite.evaluate(system, 100, seed=7, levels=["S1"])
    assert alone["accepted"] == 98 - result["objects"]["2"]
    with pytest.raises(ValueError, match="count of at least 1, got 0"):
        scenes_suite.evaluate(system, 0)


def test_a_model_without_captions_is_judged_by_its_scenes_alone(tiny, tmp_path, monkeypatch):
    argv = [*tiny["unet"][1], "stages.prior.steps=2", "stages.prior.validate_samples=4", "--run", str(tmp_path)]
    assert trainer.main(argv) == 0
    command = ["evaluate", str(tmp_path), "--device=cpu", "--json"]
    result = CliRunner().invoke(cli.app, [*command, "--per-test=3"])
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["n"] == 3
    result = CliRunner().invoke(cli.app, [*command, "--tests=S1"])
    assert "reads no captions; leave out --tests and --candidates" in str(result.exception)
    monkeypatch.setattr(scenes_suite, "PICTURES", 4)
    assert CliRunner().invoke(cli.app, [*command, "--save"]).exit_code == 0
    (measured,) = checkpoint.read_card(tmp_path / "model")["measured"].values()
    assert measured["pictures"] == 4 and measured["figures"].keys() == {"scenes"}
