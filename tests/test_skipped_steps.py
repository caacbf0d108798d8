"""Steps that are not taken: of every stage where the loss is finite and its gradient is not, and of two networks."""

import math

from test_weather import events, is_finite, newest, optimizer_steps

from kartina.training import __main__ as trainer
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
