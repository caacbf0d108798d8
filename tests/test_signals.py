"""Signals and kills: a run that is asked to stop saves and leaves no process; a killed one keeps what it saved."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kartina.training import __main__ as trainer
from kartina.training import state, stopping
from kartina.training.stages.dvae import DVAEStage


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


PATTERNS = ("patch_dvae", "vqgan", "clip")  # one network, two and a codebook, a loss over pairs
LONG = ["stages.tokenizer.steps=100000", "stages.tokenizer.validate_every=100000"]


@pytest.fixture
def folder(prepared, tmp_path):
    """Of a run that need not make its captions."""
    return prepared(tmp_path / "run", "patch_dvae")


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGINT)])
def test_a_signal_to_the_command_saves_and_leaves_no_process(processes, number, tiny, folder):
    process = start([*tiny["patch_dvae"][1], *LONG, "--run", str(folder)], processes)
    wait_for_step(folder, 5, process)
    started = family(process)
    assert len(started) == 1 if processes == 1 else len(started) >= 4  # the command, torchrun, two trainers
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert not psutil.wait_procs(started, timeout=10)[1]
    (stopped,) = events(folder, "stopped")
    assert newest(folder)["step"] == stopped["step"] >= 5


@pytest.mark.parametrize("trainers", [0, 2])
def test_a_signal_before_the_trainers_watch_is_no_failure(trainers, tiny, folder):
    """While torchrun starts, and while the trainers import what they need."""
    process = start([*tiny["patch_dvae"][1], *LONG, "--run", str(folder)], 2)
    end = time.monotonic() + 60
    while len(family(process)) < 2 + trainers and time.monotonic() < end:
        time.sleep(0.01)
    started = family(process)
    assert len(started) == 2 + trainers
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), output  # the same to a shell
    assert not psutil.wait_procs(started, timeout=10)[1] and not (folder / "log.jsonl").exists()


def test_a_signal_to_the_whole_group_saves_too(tiny, folder):
    """As a scheduler sends it: to the processes that read as well."""
    argv = [*tiny["patch_dvae"][1], *LONG, "training.data.workers=2", "--run", str(folder)]
    process = start(argv, start_new_session=True)
    wait_for_step(folder, 5, process)
    started = family(process)
    assert len(started) == 3
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not psutil.wait_procs(started, timeout=10)[1] and events(folder, "stopped")


def test_a_second_signal_stops_at_once(tiny, folder):
    """Also a trainer that no longer comes to look at signals, as one that waits for ever in a save."""
    stuck = "import time; from kartina.training import state; state.save = lambda *rest: time.sleep(1000); "
    stuck += "from kartina.training import stopping; stopping.SAME = 0.3; "
    argv = [*tiny["patch_dvae"][1], *LONG, "stages.tokenizer.save_every=7", "--run", str(folder)]
    code = f"{stuck}import sys; from kartina.training import __main__ as trainer; sys.exit(trainer.main({argv!r}))"
    code = code.replace("lambda *rest: time", "lambda folder, content, *rest: content['at'] and time")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_for_step(folder, 7, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    assert process.poll() is None and stopping.SAME == 2.0
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_killed_command_leaves_no_process_either(tiny, folder):
    process = start([*tiny["patch_dvae"][1], *LONG, "--run", str(folder)], 2)
    wait_for_step(folder, 5, process)
    started = family(process)
    process.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]
    assert newest(folder)["step"] >= 5


@pytest.fixture
def killed(tiny, prepared, tmp_path, all_images):
    """A function (kind): a run that was killed is resumed by a new process, and ends as one that was not."""

    def check(kind):
        stage, argv = tiny[kind]
        argv = [*argv, f"stages.{stage}.save_every=3", f"stages.{stage}.validate_every=20"]
        argv += [f"stages.{stage}.validate_samples=64", "--run"]
        folders = [prepared(tmp_path / name, kind) for name in ("whole", "killed")]
        process = start([*argv, str(folders[1])])
        wait_for_step(folders[1], 4, process)
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
        assert 3 <= newest(folders[1], stage)["step"] < 20
        for folder in folders:
            assert trainer.main([*argv, str(folder)]) == 0
        whole, resumed = (newest(folder, stage) for folder in folders)
        assert whole["step"] == resumed["step"] == 20
        for name in ("networks", "optimizers", "ema"):
            torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)

    return check


@pytest.mark.parametrize("tiny_kind", PATTERNS)
def test_sigkill_and_a_new_process_equal_an_uninterrupted_run(tiny_kind, killed):
    """What the killed run had done since its last checkpoint is done again, bit for bit."""
    killed(tiny_kind)


@pytest.mark.slow
def test_so_it_is_for_the_whole_table(tiny_kind, killed):
    killed(tiny_kind)


def save_forever(folder):
    """Saves checkpoints without end, in a process that is to be killed; see the test below."""
    return f"""
import torch
from pathlib import Path
from kartina.training import state
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


@pytest.mark.slow
def test_two_that_divide_a_network_killed_at_random_moments_of_saving(tiny, prepared, tmp_path):
    """Of parts that only one has written nothing is read, and the run ends as one that nobody killed, bit for bit."""
    draw, kept = random.Random(0), 0
    argv = [*tiny["dalle"][1], "training.shard=fsdp", "stages.prior.save_every=1", "stages.prior.steps=80", "--run"]
    folders = [prepared(tmp_path / name, "dalle") for name in ("whole", "killed")]
    saved = folders[1] / "state" / "prior"
    for _ in range(5):
        process = start([*argv, str(folders[1])], 2)
        wait_for_step(folders[1], kept + 2, process)
        while not list(saved.glob(".writing-*")):
            assert process.poll() is None, process.communicate()[0]
        time.sleep(draw.uniform(0, 0.03))
        for each in family(process):
            each.kill()
        process.communicate()
        kept, before = state.load(state.newest(saved))["at"], kept
        assert before < kept < 80
    for folder in folders:
        process = start([*argv, str(folder)], 2)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    whole, ended = (state.newest(folder / "state" / "prior") for folder in folders)
    parts = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(parts) == 2
    for part in parts:  # of networks, optimizers and average
        torch.testing.assert_close(load_file(ended / part), load_file(whole / part), rtol=0, atol=0)


LAST = """
import atexit, os, sys
import torch
from torch import distributed
from kartina.training.__main__ import end

class Late:
    def __del__(self, say=os.write):
        say(1, b"shut down\\n")

distributed.init_process_group("gloo")
held, sys.late = distributed.group.WORLD, Late()
distributed.all_reduce(torch.ones(4))
sys.stdout = open(1, "w", closefd=False)  # torchrun's own is unbuffered, and ranks would write into each other's lines
atexit.register(print, "closed")
end(0)
"""


def test_a_trainer_of_several_ends_without_pythons_shutdown(tmp_path):
    """In it a thread of gloo that still has a tensor to give back aborts the process, now and then."""
    script = tmp_path / "last.py"
    script.write_text(LAST)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "closed\n" * 2  # by atexit, and not "shut down"


def test_a_signal_at_the_last_step_stops_before_what_comes_after(folder, tiny, monkeypatch):
    """What a stage does when its steps are done may take long: it is done when the run goes on."""
    real = DVAEStage.updates

    def updates(self, batch, step):
        if step == 19:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch, step)

    argv = [*tiny["patch_dvae"][1], "--run", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(DVAEStage, "updates", updates)
        assert trainer.main(argv) == 128 + signal.SIGTERM
    assert newest(folder)["step"] == 20 and not (folder / "model" / "tokenizer.safetensors").exists()
    assert trainer.main(argv) == 0
    assert (folder / "model" / "tokenizer.safetensors").exists() and len(events(folder, "stopped")) == 1
