"""What a run folder holds on to: one ruler for the best, and a lock where there are locks."""

import errno
import json
import shutil

import pytest
from PIL import Image
from shape_shards import pack

from kartina.training import __main__ as trainer
from kartina.training import loop, packing, state
from kartina.training.optim import rate


def test_the_best_is_of_one_ruler(tiny, tmp_path, capsys):
    """A metric that was measured on other pictures does not stand in the way of those to come."""
    command = [*tiny["patch_dvae"][1], "--run", str(tmp_path)]
    assert trainer.main([*command, "stages.tokenizer.validate_samples=64"]) == 0
    capsys.readouterr()
    more = ["--extend", "tokenizer=30"]
    assert trainer.main([*command, *more, "stages.tokenizer.validate_samples=64"]) == 0
    assert "was measured on other data" not in capsys.readouterr().out
    assert trainer.main([*command, "--extend", "tokenizer=40", "stages.tokenizer.validate_samples=32"]) == 0
    assert "was measured on other data" in capsys.readouterr().out
    saved = state.load(state.newest(tmp_path / "state" / "tokenizer"))
    assert saved["ruler"].startswith("32 of shapes S2none") and saved["best"][1] > 30


def test_a_discriminator_warms_up_when_it_begins(tiny, tmp_path, monkeypatch):
    """Its warm-up of 4 steps from its first step on, the 5th of the run."""
    rates = []

    def recorded(step, steps, config, restart=0):
        found = rate(step, steps, config, restart)
        rates.extend([(step, found)] if config.warmup == 4 else [])
        return found

    monkeypatch.setattr(loop, "rate", recorded)
    argv = [*tiny["autoencoder_kl"][1], "stages.tokenizer.objective.discriminator_start=0.25", "--run", str(tmp_path)]
    judge = "stages.tokenizer.optimizers={discriminator: {lr: 0.001, warmup: 4, decay: 0.0}}"
    assert trainer.main([*argv, judge, "stages.tokenizer.optimizer.warmup=3"]) == 0
    assert dict(rates) == {step: min(1.0, max(0, step - 4) / 4) for step in range(20)}


def test_a_run_is_not_extended_back_into_a_phase_that_it_has_left(tiny, tmp_path, capsys):
    """Its 20 steps, in which the discriminator learns from 5 on and is heard in full from 12 on."""
    argv = [*tiny["autoencoder_kl"][1], "stages.tokenizer.objective.discriminator_start=0.25", "--run", str(tmp_path)]
    more = ["stages.tokenizer.objective.discriminator_warmup=0.25", "stages.tokenizer.objective.discriminator_ramp=0.1"]
    assert trainer.main([*argv, *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "discriminator/total" not in lines[1]
    assert trainer.main([*argv, *more, "--extend", "tokenizer=100"]) == 2
    assert "with 100 steps the phase that ends at step 25 would begin again at step 20" in capsys.readouterr().err
    assert trainer.main([*argv, *more, "--extend", "tokenizer=36"]) == 2
    assert "the phase that ends at step 22 would begin again" in capsys.readouterr().err
    assert trainer.main([*argv, *more, "--extend", "tokenizer=24"]) == 0


def test_without_anything_held_out_there_is_no_best(tiny, tmp_path, capsys):
    for k in range(3):
        Image.effect_noise((32, 32), 50 + k).save(tmp_path / f"{k}.png")
    packing.pack_folder(tmp_path, tmp_path / "shards", captionless=True)
    data = f"training.data={{kind: shards, shards: {tmp_path / 'shards'}, validation_share: 0.0}}"
    command = [*tiny["patch_dvae"][1], data, "stages.tokenizer.steps=1", "--run", str(tmp_path / "run")]
    assert trainer.main([*command, "stages.tokenizer.export=best"]) == 2
    assert "stages.tokenizer.export: best needs a metric, and nothing is held out" in capsys.readouterr().err
    assert trainer.main(command) == 0
    assert "nothing is held out to measure on" in capsys.readouterr().out


def test_a_file_system_without_locks_is_said(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert trainer.main([*tiny["patch_dvae"][1], "stages.tokenizer.steps=1", "--run", str(tmp_path)]) == 0
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["a picture", "the window"])
def test_a_run_is_refused_other_shards_than_it_began_with(tiny, tmp_path, capsys, change):
    shards = pack(tmp_path / "shards", 48, 12)
    data = f"training.data={{kind: shards, shards: {shards}, validation_share: 0}}"
    command = [*tiny["vae"][1], data, "stages.tokenizer.steps=4", "--run", str(tmp_path / "run")]
    assert trainer.main(command) == 0
    assert trainer.main([*command, "--extend", "tokenizer=6"]) == 0  # as they were, it goes on
    if change == "a picture":
        shutil.rmtree(shards)
        pack(shards, 48, 12, first=1)
    else:
        command.append("training.data.window=1")
    for said in ("tokenizer was trained with another", "what this run began with changed (data"):
        capsys.readouterr()
        assert trainer.main([*command, "--extend", "tokenizer=8"]) == 2
        assert said in capsys.readouterr().err
        (tmp_path / "run" / "model" / "tokenizer.safetensors").unlink(missing_ok=True)  # as of one that was stopped
