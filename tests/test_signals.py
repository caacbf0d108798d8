"""Signals and kills: a run that is asked to stop saves and leaves no process; a killed one keeps what it saved."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from kartina.training import __main__ as trainer
from kartina.training import state
from kartina.training.stages import STAGES


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def newest(folder, stage="tokenizer"):
    return state.load(state.newest(folder / "state" / stage))


def start(argv, processes=1, **options):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kartina.cli", "train", *argv, f"--processes={processes}"]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **options)


def wait_for_step(folder, step, process, seconds=120):
    """Until the log of a run holds a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if (folder / "log.jsonl").exists() and f'"step": {step},' in (folder / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def family(process):
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


PATTERNS = ("patch_dvae", "vqgan", "vqvae, moved", "clip")  # one network, two, a codebook, a loss over pairs of samples
OTHERS = [kind for kind in STAGES if kind not in PATTERNS]
LONG = ["stages.tokenizer.steps=100000", "stages.tokenizer.validate_every=100000"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_command_saves_and_leaves_no_process(processes, tiny, tmp_path):
    process = start([*tiny["patch_dvae"][1], *LONG, "--run", str(tmp_path)], processes)
    wait_for_step(tmp_path, 5, process)
    started = family(process)
    assert len(started) == 1 if processes == 1 else len(started) >= 4  # the command, torchrun, two trainers
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not psutil.wait_procs(started, timeout=10)[1]
    (stopped,) = events(tmp_path, "stopped")
    assert newest(tmp_path)["step"] == stopped["step"] >= 5


def test_a_signal_to_the_whole_group_saves_too(tiny, tmp_path):
    """As a scheduler sends it: to the processes that read as well."""
    argv = [*tiny["patch_dvae"][1], *LONG, "training.data.workers=2", "--run", str(tmp_path)]
    process = start(argv, start_new_session=True)
    wait_for_step(tmp_path, 5, process)
    started = family(process)
    assert len(started) == 3
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not psutil.wait_procs(started, timeout=10)[1] and events(tmp_path, "stopped")


def test_a_second_signal_stops_at_once(tiny, tmp_path):
    """Also a trainer that no longer comes to look at signals, as one that waits for ever in a save."""
    stuck = "import time; from kartina.training import state; state.save = lambda *rest: time.sleep(1000); "
    argv = [*tiny["patch_dvae"][1], *LONG, "stages.tokenizer.save_every=7", "--run", str(tmp_path)]
    code = f"{stuck}import sys; from kartina.training import __main__ as trainer; sys.exit(trainer.main({argv!r}))"
    (tmp_path / "state" / "tokenizer").mkdir(parents=True)
    code = code.replace("lambda *rest: time", "lambda folder, content, *rest: content['at'] and time")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path, 7, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_killed_command_leaves_no_process_either(tiny, tmp_path):
    process = start([*tiny["patch_dvae"][1], *LONG, "--run", str(tmp_path)], 2)
    wait_for_step(tmp_path, 5, process)
    started = family(process)
    process.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]
    assert newest(tmp_path)["step"] >= 5


@pytest.mark.parametrize("kind", [*PATTERNS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_sigkill_and_a_new_process_equal_an_uninterrupted_run(kind, tiny, trained_tokenizer, tmp_path):
    """What the killed run had done since its last checkpoint is done again, bit for bit."""
    stage, argv = tiny[kind]
    argv = [*argv, f"stages.{stage}.save_every=3", "--run"]
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        if stage == "tokenizer" or kind == "unet":  # that one is tried on pixels
            folder.mkdir()
        else:
            shutil.copytree(trained_tokenizer, folder, ignore=shutil.ignore_patterns("state", "log.jsonl"))
    assert trainer.main([*argv, str(folders[0])]) == 0
    process = start([*argv, str(folders[1])])
    wait_for_step(folders[1], 7, process)
    process.kill()
    process.communicate()
    assert trainer.main([*argv, str(folders[1])]) == 0
    whole, killed = (newest(folder, stage) for folder in folders)
    assert whole["step"] == killed["step"] == 20
    for name in ("networks", "optimizers", "ema"):
        torch.testing.assert_close(killed[name], whole[name], rtol=0, atol=0)


def save_forever(folder):
    """Saves checkpoints without end, in a process that is to be killed; see the test below."""
    return f"""
import torch
from pathlib import Path
from kartina.training import loop, state
at = 0
while True:
    at += 1
    state.save(Path({str(folder)!r}), {{"at": at, "step": at, "weights": torch.full((400_000,), float(at))}}, keep=KEEP)
    print(at, flush=True)
"""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_of_saving_a_whole_checkpoint_remains(kills, keep, tmp_path):
    draw = random.Random(kills + keep)
    folder, reached = tmp_path / "state", 0
    code = save_forever(folder).replace("KEEP", str(keep)).replace("at = 0", f"at = {reached}")
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2):
            reached = int(process.stdout.readline())
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        rest = process.communicate()[0].split()
        reached = int(rest[-1]) if rest else reached
        saved = state.load(state.newest(folder))
        assert saved["at"] >= reached and bool((saved["weights"] == saved["at"]).all())
        code = save_forever(folder).replace("KEEP", str(keep)).replace("at = 0", f"at = {saved['at']}")
