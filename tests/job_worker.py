"""Runs training jobs one after the other in one process, as one of the ranks that torchrun started, or alone.

    python job_worker.py JOBS.jsonl RESULTS

A job is a line {"name", "argv", "stop_at"}: the arguments of the trainer, and the step at which the first rank sends
itself a real SIGTERM, or null. Per job and rank, RESULTS/<name>-<rank>.json holds {"status", "world", "keys"}, with
the keys of the samples of each step.
"""

import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState

from kartina.training import __main__ as trainer
from kartina.training import stages


def recording(kind, keys, stop_at):
    """The stage, which also writes down its samples and at a step asks its own process to stop."""

    class Recording(kind):
        def updates(self, batch, step):
            keys.append([step, batch.keys])
            if step == stop_at and os.environ.get("RANK", "0") == "0":
                signal.raise_signal(signal.SIGTERM)
            return super().updates(batch, step)

    return Recording


def run(job, results):
    keys, known = [], dict(stages.STAGES)
    stages.STAGES.update({name: recording(kind, keys, job["stop_at"]) for name, kind in known.items()})
    try:
        status = trainer.main([*job["argv"], f"--processes={os.environ.get('WORLD_SIZE', 1)}"])
    finally:
        stages.STAGES.update(known)
    here = PartialState()
    facts = {"status": status, "world": here.num_processes, "keys": keys}
    (results / f"{job['name']}-{here.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text().splitlines():
        run(json.loads(line), Path(sys.argv[2]))
