"""Steps that are not taken: of every stage where the loss is finite and its gradient is not, and of two networks."""

import json
import math

import pytest
import torch
from test_weather import events, is_finite, newest, optimizer_steps

from kartina.training import __main__ as trainer
from kartina.training import loop
from kartina.training.stages.dvae import DVAEStage
from kartina.training.stages.vqgan import VQGANStage

ANEW = ("vqvae, moved", "dvae")  # whose codes begin anew at the second step, with another optimizer and average


def test_of_every_stage_a_step_with_an_infinite_gradient_is_left_out(tiny_kind, tiny, prepared, tmp_path, work):
    stage, argv = tiny[tiny_kind]
    words = [*argv, *(f"stages.{stage}.{key}" for key in ("steps=4", "global_batch=4", "validate_samples=4"))]
    job = {"name": "steep", "argv": [*words, "--run", str(prepared(tmp_path, tiny_kind))], "steep_at": 2}
    assert work([job], 1)["steep"][0]["status"] == 0
    assert [event["step"] for event in events(tmp_path, "skipped")] == [3]
    saved = newest(tmp_path, stage)
    taken = 2 if tiny_kind in ANEW else 3
    assert (saved["step"], saved["ema"]["updates"]) == (4, taken) and is_finite(saved)
    assert optimizer_steps(saved, stage) == {taken}


def test_a_signal_amid_bad_steps_stops_and_saves_nothing_of_them(tiny, prepared, tmp_path, work):
    words = ["stages.tokenizer.patience=400", "stages.tokenizer.save_every=4", "--run"]
    argv = [*tiny["patch_dvae"][1], *words, str(prepared(tmp_path, "patch_dvae"))]
    (facts,) = work([{"name": "asked", "argv": argv, "poison": [[40, 10**6]], "stop_at": 5}], 1)["asked"]
    assert facts["status"] == 143 and [step for step, _ in facts["keys"]] == [0, 1, 2, 3, 4, 5]
    assert newest(tmp_path)["at"] == 4 and [event["step"] for event in events(tmp_path, "stopped")] == [6]


@pytest.mark.parametrize("within", [1000, 6])
def test_returns_that_lie_far_apart_end_no_run_and_one_that_ends_names_the_samples(
    within, tiny, prepared, tmp_path, work, monkeypatch, capsys
):
    """Three, of the steps 5, 9 and 13 of the data: the first is within 1,000 steps of the last, not within 6."""
    monkeypatch.setattr(loop, "_WITHIN", within)
    words = ["stages.tokenizer.patience=1", "stages.tokenizer.save_every=1", "--run"]
    argv = [*tiny["patch_dvae"][1], *words, str(prepared(tmp_path, "patch_dvae"))]
    (facts,) = work([{"name": "far", "argv": argv, "poison": [[40, 40], [72, 72], [104, 104]]}], 1)["far"]
    bad = [event["bad"] for event in events(tmp_path, "returned")]
    if within == 6:
        assert facts["status"] == 0 and bad == [[5, 5], [9, 9], [13, 13]]
    else:
        assert facts["status"] == 2 and bad == [[5, 5], [9, 9]]
        said = " ".join(capsys.readouterr().err.split())
        assert f"for the third time within 1000 steps, last at samples {facts['keys'][-1][1][0]}, " in said


def test_a_step_of_two_networks_ends_with_the_one_that_is_not_finite(tiny, tmp_path, monkeypatch):
    """What the autoencoder has learned in it stays; the discriminator, whose loss is at fault, learns nothing."""
    real = VQGANStage.updates

    def poisoned(stage, batch, step):
        for name, (loss, count), scalars in real(stage, batch, step):
            yield name, (loss * math.nan if (name, step) == ("discriminator", 12) else loss, count), scalars

    monkeypatch.setattr(VQGANStage, "updates", poisoned)
    assert trainer.main([*tiny["vqgan"][1], "--run", str(tmp_path)]) == 0
    assert [event["step"] for event in events(tmp_path, "skipped")] == [13]
    saved = newest(tmp_path)
    assert is_finite(saved)
    steps = {name: optimizer_steps(saved, name) for name in saved["optimizers"]}
    assert steps == {"tokenizer": {20}, "discriminator": {17}}  # which begins at step 2


def test_codes_in_a_line_are_of_the_steps_since_they_began_anew_and_since_a_run_went_back(tiny, tmp_path, monkeypatch):
    """Step s meets code s alone. Codes begin anew at step 5; at 13 and 14 nothing is finite, and the run goes back to
    10, where it was saved, at what would be step 15. Lines stand after 10 and 20 steps: 5 codes each, then 10."""
    real, met = DVAEStage.updates, []

    def marked(stage, batch, step):
        bad = step in (12, 13) and len(met) < 16
        met.append(step)
        for name, (loss, count), scalars in real(stage, batch, step):
            code = torch.nn.functional.one_hot(torch.tensor(len(met)), 64).float()
            yield name, (loss * math.nan if bad else loss, count), {**scalars, "codes": code}

    monkeypatch.setattr(DVAEStage, "updates", marked)
    stage = [f"stages.tokenizer.{key}" for key in ("log_every=10", "save_every=10", "patience=2")]
    assert trainer.main([*tiny["dvae"][1], *stage, "--run", str(tmp_path)]) == 0
    (returned,) = events(tmp_path, "returned")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    usage = {line["step"]: line["tokenizer/usage"] * 64 for line in lines if "tokenizer/usage" in line}
    assert returned["reached"] == 14 and usage == {1: 1, 10: 5, 20: 10}
