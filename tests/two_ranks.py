"""Two processes of job_worker that live as long as the tests: to start them takes longer than most of their trainings.

They are told by torchrun's variables that it started them.
"""

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "job_worker.py"
PATIENCE = 600  # seconds for all jobs of one call


class TwoRanks:
    """Ranks 0 and 1, whose standard errors go to a file.

    They take one call after the other; where one fails both end, and so do all calls.
    """

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        place |= {"TORCHELASTIC_RUN_ID": "tests", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._log, self._read = log, 0
        with open(log, "wb") as errors:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, str(WORKER)],
                    env={**os.environ, **place, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                for rank in (0, 1)
            ]

    def run(self, jobs: Path, results: Path) -> str:
        """Runs the lines of a file, see job_worker, on both. Returns what they said; raises AssertionError with it."""
        for rank in self._ranks:
            print(json.dumps([str(jobs), str(results)]), file=rank.stdin, flush=True)
        waiting, failed = [rank.stdout for rank in self._ranks], False
        while waiting and not failed:
            ready, _, _ = select.select(waiting, [], [], PATIENCE)
            failed = not ready or any(answer.readline() != "done\n" for answer in ready)
            waiting = [answer for answer in waiting if answer not in ready]
        if failed:
            self.end()
        with open(self._log, encoding="utf-8", errors="replace") as log:
            log.seek(self._read)
            said = log.read()
            self._read = log.tell()
        assert not failed, said
        return said

    def end(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
