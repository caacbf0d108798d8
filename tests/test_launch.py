"""Launch files are what Accelerate reads, and the SLURM script starts, stops and queues itself again."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer
from kartina.training import launcher, stopping
from kartina.training import run as runs
from kartina.training.stopping import Stopped

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "training" / "launch"
FILES = {"one-gpu": ("NO", 1, 1), "several-gpus": ("MULTI_GPU", 8, 1), "fsdp": ("MULTI_GPU", 8, 1)}
FILES |= {"several-nodes": ("MULTI_GPU", 16, 2)}


def test_accelerate_reads_every_launch_file():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == set(FILES)
    for name, (kind, processes, machines) in FILES.items():
        config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
        assert (str(config.distributed_type.value), config.num_processes, config.num_machines) == (
            kind,
            processes,
            machines,
        )
        assert not config.fsdp_config and str(config.mixed_precision) == "no" and not config.use_cpu
        text = (LAUNCH / f"{name}.yaml").read_text()
        assert f"--config_file training/launch/{name}.yaml" in text and "-m kartina.training RECIPE" in text


def test_processes_on_a_cpu_share_its_cores(monkeypatch):
    asked = {}

    def start(command, env, **_):
        asked.update(env)
        raise RuntimeError("not started")

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    for given, threads in ((None, "8"), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with pytest.raises(RuntimeError, match="not started"):
            launcher.launch(["kartina.training"], 2)
        assert asked["OMP_NUM_THREADS"] == threads and asked["ACCELERATE_USE_CPU"] == "1"


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """A PATH whose srun runs one rank and whose trainer saves when it is told to stop."""
    commands = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
        "scontrol": f'if [ $1 = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> {tmp_path}/asked; fi',
        "trainer": f'echo "$@; $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" > {tmp_path}/called\n'
        f"trap 'sleep 0.2; echo saved > {tmp_path}/saved; exit ${{STOPPED:-143}}' TERM\n"
        'for i in $(seq "${TICKS:-0}"); do sleep 0.05; done; exit "${CODE:-0}"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41", "SLURM_NTASKS": "16", "PYTHON": "trainer"}
    return {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def submit(environment: dict[str, str], *words: str) -> subprocess.Popen:
    command = ["bash", str(ROOT / "docs" / "slurm.sh"), *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_the_slurm_script_starts_a_rank_with_its_words_and_place(cluster, tmp_path):
    assert submit(cluster, "shapes/dalle", "a.b={c: 1}").wait(30) == 0
    called = (tmp_path / "called").read_text().strip()
    assert called == "-m kartina.training shapes/dalle a.b={c: 1}; 3 1 16 node7 20041"
    assert not (tmp_path / "asked").exists()
    assert submit({**cluster, "CODE": "2"}, "shapes/dalle").wait(30) == 2
    job = submit(cluster)
    assert job.wait(30) == 2 and "a recipe is missing" in job.stderr.read()


def asked_to_stop(environment: dict[str, str], tmp_path: Path) -> int:
    """The status of a job to which SLURM sends its signal as it trains."""
    job = submit({**environment, "TICKS": "400"}, "shapes/dalle")
    for _ in range(200):
        if (tmp_path / "called").exists():
            break
        time.sleep(0.05)
    time.sleep(0.2)  # the trap is set right after
    job.send_signal(signal.SIGTERM)
    status = job.wait(30)
    assert (tmp_path / "saved").exists(), "the job ended before its trainer had saved"
    return status


def test_the_slurm_script_passes_the_signal_on_waits_and_requeues(cluster, tmp_path):
    assert asked_to_stop(cluster, tmp_path) == 0
    assert (tmp_path / "asked").read_text().split() == ["requeue", "41"]


@pytest.mark.parametrize("status", [0, 2])
def test_a_run_that_was_finished_or_failed_is_not_queued_again(status, cluster, tmp_path):
    assert asked_to_stop({**cluster, "STOPPED": str(status)}, tmp_path) == status
    assert not (tmp_path / "asked").exists()


def test_a_job_that_cannot_be_queued_again_says_that_it_was_stopped(cluster, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/bash\n[ $1 = show ] && echo node7\n")
    assert asked_to_stop(cluster, tmp_path) == 143


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_stopped_trainer_has_a_status_of_its_own_but_for_torchrun(torchrun, tmp_path, monkeypatch):
    def stop(*rest):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(trainer, "_train", stop)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any") if torchrun else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
    asked = ["shapes/dalle", "--processes=16", "--run", str(tmp_path)]
    assert trainer.main(asked) == (0 if torchrun else 128 + signal.SIGTERM)


def test_accelerates_launcher_trains_by_the_configuration_at_the_root(tiny, tmp_path):
    """As README's users may start it themselves; it names neither a device nor a number of processes."""
    config = runs.RECIPES.parent.parent / "accelerate_config.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}", "--cpu"]
    words = [*tiny["vae"][1], "stages.tokenizer.steps=2", "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [*launcher, "-m", "kartina.training", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "tokenizer" in checkpoint.read_card(tmp_path / "run" / "model")["parts"]


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_gives_its_own_status_whatever_a_stuck_rank_leaves(signals, tmp_path, monkeypatch):
    """A launcher in torchrun's place: it ends with 0 after its rank, and with 1 where it is ended before it."""
    stubborn = "trap : TERM INT; touch ready; for i in $(seq TIMES); do sleep 0.1; done"
    (tmp_path / "rank").write_text(stubborn.replace("TIMES", "10" if len(signals) == 1 else "600"))
    agent = "#!/bin/bash\ntrap 'kill -9 $!; exit 1' TERM\nbash rank & wait $!\n"
    (tmp_path / "agent").write_text(agent)
    (tmp_path / "agent").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "agent"))
    monkeypatch.setattr(stopping, "SAME", 0.05)

    def ask():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        for number in signals:
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    asker = threading.Thread(target=ask)
    asker.start()
    assert launcher.launch(["kartina.training", "shapes/dalle"], 2) == 128 + signals[-1]
    asker.join()
