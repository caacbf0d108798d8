"""The same run on one process and on two, through the launcher that users call."""

import json
import os
import subprocess
import sys

import torch

from kartina.training import __main__ as trainer
from kartina.training import state
from kartina.training.data.shapes import ShapesSource

TINY = [f"stages.tokenizer.{key}" for key in ("steps=4", "global_batch=4", "validate_samples=96")]
CLIP = [
    *[f"stages.clip.{key}" for key in ("steps=4", "global_batch=64", "log_every=1", "levels=[S1]")],
    *[f"stages.clip.{key}" for key in ("objective.canonical=0.5", "objective.canonical_end=0.5", "optimizer.warmup=0")],
    *["stages.clip.validate_samples=96", "parts.clip.vision_depth=1", "parts.clip.text_depth=1"],
    "training.precision=fp32",
]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("clip/loss", "clip/chance", "clip/accuracy", "clip/norm")
    return torch.tensor([line[name] for name in names for line in lines if line["stage"] == "clip" and name in line])


def test_two_processes_compare_all_samples_of_a_step(tmp_path):
    """CLIP's loss is one of the whole batch: 64 samples, some of equal meaning, with wrong captions."""
    command = ["shapes/dalle", *CLIP, "--stage", "clip"]
    assert trainer.main([*command, "--run", str(tmp_path / "one")]) == 0
    arguments = ["train", *command, "--run", str(tmp_path / "two"), "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launched = subprocess.run(
        [sys.executable, "-m", "kartina.cli", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    one, two = (losses(tmp_path / run) for run in ("one", "two"))
    assert len(one) > 4 and torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    one, two = (
        state.load(state.newest(tmp_path / run / "state" / "clip"))["networks"]["clip"] for run in ("one", "two")
    )
    assert all(torch.allclose(two[name], value, atol=1e-4) for name, value in one.items())
    batch = ShapesSource(levels=["S1"], jitter=0.0).read(range(64))
    first, second = ({ShapesSource().meaning(c) for c in half} for half in (batch.captions[:32], batch.captions[32:]))
    assert first & second  # so that meanings were compared across processes


def test_a_missing_process_is_refused(tmp_path, capsys):
    """`accelerate launch` starts one process on CPU whatever is asked for; that must not pass unnoticed."""
    command = ["shapes/dalle", *TINY, "--stage", "tokenizer", "--run", str(tmp_path)]
    assert trainer.main([*command, "--processes", "2"]) == 2
    assert "asked for 2 processes, got 1" in capsys.readouterr().err


def test_accelerate_launch_of_several_on_a_cpu_is_refused(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command = ["-m", "kartina.training", "shapes/dalle", *TINY, "--stage", "tokenizer", "--run", str(tmp_path)]
    where = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "MASTER_ADDR")}
    found = subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, env=where, timeout=120)
    assert found.returncode and "asked for several processes, got 1" in found.stderr
