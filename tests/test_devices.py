"""The same run on one process and on two, through the launcher that users call."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kartina.training import __main__ as trainer
from kartina.training import state
from kartina.training.data.shapes import ShapesSource

DVAE = """parts.tokenizer={kind: dvae, image_size: 32, num_codes: 32, width: 8, init_width: 8, num_groups: 2,
    blocks_per_group: 1, branch_gain: 1.0}"""
PATCHES = "parts.tokenizer={kind: patch_dvae, num_codes: 32, width: 8, depth: 1}"
SMALL = [
    *[f"stages.tokenizer.{key}" for key in ("steps=4", "global_batch=4", "log_every=1")],
    *[f"stages.{stage}.validate_samples=96" for stage in ("tokenizer", "clip")],
    "stages.tokenizer.optimizer.muon=0.02",
    "training.precision=fp32",
]


def losses(folder, stage, names):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for name in names for line in lines if line["stage"] == stage and name in line])


def assert_two_train_as_one(command, stage, names, folder):
    """The same losses and metrics by name, and the same weights."""
    command = ["shapes/dalle", *SMALL, *command, "--stage", stage]
    assert trainer.main([*command, "--run", str(folder / "one")]) == 0
    arguments = ["train", *command, "--run", str(folder / "two"), "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launched = subprocess.run(
        [sys.executable, "-m", "kartina.cli", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    one, two = (losses(folder / run, stage, names) for run in ("one", "two"))
    assert len(one) > 4 and torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    one, two = (state.load(state.newest(folder / run / "state" / stage))["networks"][stage] for run in ("one", "two"))
    assert all(torch.allclose(two[name], value, atol=1e-4) for name, value in one.items())


@pytest.mark.parametrize(("tokenizer", "autoencoder"), [(DVAE, 0.5), (PATCHES, 0)])  # k-means half-way, and at once
def test_two_processes_train_as_one(tokenizer, autoencoder, tmp_path):
    command = [tokenizer, f"stages.tokenizer.objective.autoencoder={autoencoder}"]
    names = ["tokenizer/nll", "tokenizer/total", "valid/psnr", "valid/usage", "valid/perplexity"]
    assert_two_train_as_one(command, "tokenizer", names, tmp_path)


def test_two_processes_compare_all_samples_of_a_step(tmp_path):
    """CLIP's loss is one of the whole batch: 64 samples, some of equal meaning, with wrong captions."""
    command = [f"stages.clip.{key}" for key in ("steps=4", "global_batch=64", "log_every=1", "levels=[S1]")]
    command += ["parts.clip.vision_depth=1", "parts.clip.text_depth=1", "stages.clip.objective.canonical=0.5"]
    command += ["stages.clip.objective.canonical_end=0.5", "stages.clip.optimizer.warmup=0"]
    names = ["clip/loss", "clip/chance", "clip/accuracy", "clip/norm"]
    assert_two_train_as_one(command, "clip", names, tmp_path)
    batch = ShapesSource(levels=["S1"], jitter=0.0).read(range(64))
    first, second = ({ShapesSource().meaning(c) for c in half} for half in (batch.captions[:32], batch.captions[32:]))
    assert first & second  # so that meanings were compared across processes


def test_a_missing_process_is_refused(tmp_path, capsys):
    """`accelerate launch` starts one process on CPU whatever is asked for; that must not pass unnoticed."""
    assert (
        trainer.main(["shapes/dalle", *SMALL, "--stage", "tokenizer", "--run", str(tmp_path), "--processes", "2"]) == 2
    )
    assert "asked for 2 processes, got 1" in capsys.readouterr().err
