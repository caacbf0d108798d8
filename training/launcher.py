"""Starts the trainer on several processes of one machine, and passes on the signals that ask it to stop.

`accelerate launch` starts them on GPUs; on CPU it starts one whatever is asked for, so there torchrun does. The
launcher stands in a session of its own, so that a Ctrl-C of the terminal reaches the trainers once and through us, and
it ends where we are killed.

It does not know recipes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from . import stopping

_CONFIG = Path(__file__).parent.parent / "accelerate_config.yaml"


def launch(trainer: Sequence[str], processes: int) -> int:
    """Runs `python -m <trainer>` in so many processes. Returns its exit status, 128 + the signal that stopped it."""
    import torch

    environment = dict(os.environ)
    if torch.cuda.is_available():
        starter = ["accelerate.commands.launch", f"--config_file={_CONFIG}", "--multi_gpu"]
        starter += [f"--num_processes={processes}"]
    else:
        environment["ACCELERATE_USE_CPU"] = "1"
        # Else torchrun says 1, and several processes would be slower than one wherever there are more cores than they.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
        starter = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, "-m", *starter, "-m", *trainer]
    agent = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=stopping.ends_with_parent(signal.SIGTERM)
    )
    asked: list[int] = []
    begun, first = True, 0.0

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal begun, first
        now = time.monotonic()
        if asked and now - first <= stopping.SAME:
            return
        first = first or now
        asked.append(signum)
        begun = _signal_trainers(agent.pid, signum)
        if len(asked) > 1:  # a trainer that waits for another one does not look at signals
            agent.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = agent.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # A second signal, or one before they watch, ends trainers in the midst of things: a failure, says their launcher.
    return 128 + asked[-1] if asked and (status == 0 or len(asked) > 1 or not begun) else status


def _signal_trainers(agent: int, signum: int) -> bool:
    """To the trainers, not to their launcher, which would not wait for them to save. Returns whether all watched.

    Before they do nothing is begun, and they are ended; or their launcher is, where it has started none yet: by
    SIGTERM, for Python may lose a Ctrl-C while it imports.
    """
    try:
        launcher = psutil.Process(agent)
        trainers = launcher.children()
        begun = bool(trainers) and all(_watches(process.pid) for process in trainers)
        if not trainers:
            launcher.terminate()
        for process in trainers:
            process.send_signal(signum if begun else signal.SIGKILL)
        return begun
    except psutil.NoSuchProcess:
        return True  # it has ended by itself


def _watches(process: int) -> bool:
    """Whether a trainer has come to where SIGTERM asks it to stop, in place of ending it; True where nothing tells."""
    try:
        _, found, rest = Path(f"/proc/{process}/status").read_bytes().partition(b"\nSigCgt:")
    except OSError:
        return True
    caught = int(rest.split()[0], 16) if found else -1  # bit n - 1 is of signal n
    return bool(caught >> signal.SIGTERM - 1 & 1)
