"""Two processes of job_worker that live as long as the tests: to start them takes longer than most of their trainings.

They are told, by its variables, that torchrun started them.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from kartina.training.stopping import ends_with_parent

WORKER = Path(__file__).parent / "job_worker.py"
PATIENCE = 600  # seconds for all jobs of one call


class TwoRanks:
    """Ranks 0 and 1, which take one call after the other, and end where one of them fails.

    log: a file for their standard errors.
    """

    def __init__(self, log: Path) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": "2"}
        place |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        place |= {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._log, self._read = log, 0
        with open(log, "wb") as errors:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, str(WORKER)],
                    env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    preexec_fn=ends_with_parent(signal.SIGKILL),  # xdist ends workers without their fixtures
                )
                for rank in (0, 1)
            ]

    def run(self, jobs: Path, results: Path) -> str:
        """Runs the lines of a file, see job_worker, on both. Returns what they said; raises AssertionError with it."""
        done = self._done(json.dumps([str(jobs), str(results)]))
        if not done:
            self.end()
        with open(self._log, encoding="utf-8", errors="replace") as log:
            log.seek(self._read)
            said = log.read()
            self._read = log.tell()
        assert done, said
        return said

    def _done(self, call: str) -> bool:
        try:
            for rank in self._ranks:
                print(call, file=rank.stdin, flush=True)
        except BrokenPipeError:
            return False
        waiting, end = [rank.stdout for rank in self._ranks], time.monotonic() + PATIENCE
        while waiting:
            ready, _, _ = select.select(waiting, [], [], max(0, end - time.monotonic()))
            if not ready or any(answer.readline() != "done\n" for answer in ready):
                return False
            waiting = [answer for answer in waiting if answer not in ready]
        return True

    def end(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()
