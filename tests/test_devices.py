"""The same run on one process and on two, through the launcher that users call."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kartina.training import __main__ as trainer
from kartina.training import state

DVAE = """parts.tokenizer={kind: dvae, image_size: 32, num_codes: 32, width: 8, init_width: 8, num_groups: 2,
    blocks_per_group: 1, branch_gain: 1.0}"""
PATCHES = "parts.tokenizer={kind: patch_dvae, num_codes: 32, width: 8, depth: 1}"
SMALL = [
    *[f"stages.tokenizer.{key}" for key in ("steps=4", "global_batch=4", "log_every=1")],
    "stages.tokenizer.optimizer.muon=0.02",
    "training.precision=fp32",
]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained = [line["tokenizer/nll"] for line in lines if "tokenizer/nll" in line]
    return [*trained, *(line["valid/psnr"] for line in lines if "valid/psnr" in line)]


@pytest.mark.parametrize(("tokenizer", "autoencoder"), [(DVAE, 0.5), (PATCHES, 0)])  # k-means half-way, and at once
def test_two_processes_train_as_one(tokenizer, autoencoder, tmp_path):
    command = ["shapes/dalle", tokenizer, f"stages.tokenizer.objective.autoencoder={autoencoder}", *SMALL]
    command += ["--stage", "tokenizer"]
    assert trainer.main([*command, "--run", str(tmp_path / "one")]) == 0
    arguments = ["train", *command, "--run", str(tmp_path / "two"), "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launched = subprocess.run(
        [sys.executable, "-m", "kartina.cli", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    assert torch.allclose(torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "two")), atol=1e-5)
    one, two = (state.load_newest(tmp_path / name / "state" / "tokenizer")["network"] for name in ("one", "two"))
    assert all(torch.allclose(two[name], value, atol=1e-4) for name, value in one.items())


def test_a_missing_process_is_refused(tmp_path, capsys):
    """`accelerate launch` starts one process on CPU whatever is asked for; that must not pass unnoticed."""
    assert (
        trainer.main(["shapes/dalle", *SMALL, "--stage", "tokenizer", "--run", str(tmp_path), "--processes", "2"]) == 2
    )
    assert "asked for 2 processes, got 1" in capsys.readouterr().err
