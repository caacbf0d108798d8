"""Runs training jobs one after the other in one process: the caller's, or one of the ranks of `two_ranks`, which reads
from its standard input where they are and where results go, a list in a line, and says `done` after each.

A job is a line {"name", "argv", ...}: the arguments of the trainer, and what happens to it: "stop_at", the step at
which the first rank sends itself a real SIGTERM; "poison", first and last positions of samples whose pictures are not
numbers; "steep_at", the step at which the last rank's loss is finite and its gradient is not; "chunk", the samples that
validation reads at once (8); "previews", whether it makes them; "full", the rank whose disk is full when it writes its
parts of a checkpoint, by the step. Of images that codes begin with it reads few. Per job
and rank, RESULTS/<name>-<rank>.json holds {"status", "world", "keys", "scored", "held", "hash"}: the keys of the
samples of each step; those that were measured, with a weight; of each network the number of its values that this rank
holds, of how many, and whether all its parameters are DTensors; and the hashes of the networks and their average after
the last step, and of what is exported.
"""

import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from kartina.pipeline.checkpoint import part_hash
from kartina.training import __main__ as trainer
from kartina.training import exchange, loop, sharded, stages, state
from kartina.training.stages import contract


class Steep(torch.autograd.Function):
    """Its argument, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def held(network):
    """Of a network: the number of values that this rank holds, of how many, and whether they are DTensors."""
    parameters = list(network.parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    divided = all(isinstance(p, DTensor) for p in parameters)
    return [sum(p.numel() for p in local), sum(p.numel() for p in parameters), divided]


def steepened(updates):
    for name, (loss, count), scalars in updates:
        yield name, (Steep.apply(loss), count), scalars


def troubled(kind, job, keys, scored, found, hashes):
    """The stage, which also writes down its samples, and to which happens what the job says."""

    class Troubled(kind):
        def updates(self, batch, step):
            keys.append([step, batch.keys])
            found.update({name: held(network) for name, network in self.networks.items()})
            if step == job.get("stop_at") and RANK == 0:
                signal.raise_signal(signal.SIGTERM)
            for first, last in job.get("poison", []):
                batch.image[(batch.samples >= first) & (batch.samples <= last)] = float("nan")
            updates = super().updates(batch, step)
            return steepened(updates) if step == job.get("steep_at") and RANK == WORLD - 1 else updates

        def measure(self, batch):
            scored.extend(key for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight)
            return super().measure(batch)

        def preview(self, batch):
            return super().preview(batch) if job.get("previews") else None

        def finish(self):
            super().finish()
            self.mark({})

        def mark(self, more):
            """Adds the hash of all networks as they are, and of more. Divided ones are compared by their export."""
            if not any(found[name][2] for name in self.networks):
                networks = self.networks.items()
                hashes.append(part_hash({f"{n}.{k}": v for n, m in networks for k, v in m.state_dict().items()} | more))

    return Troubled


def marked(train):
    """The training of a stage, which marks its networks before they are rounded, and their average."""

    def trained(identity, stage, *rest):
        ema = train(identity, stage, *rest)
        stage.mark(ema.average)
        return ema

    return trained


def tight(write, full):
    """The writing of what is divided, in which no file of a rank may be large when its disk is full."""

    def written(folder, content, together):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full.get(str(content["at"])) == RANK:
            resource.setrlimit(resource.RLIMIT_FSIZE, (state.size(content) // 8, limit[1]))
        try:
            return write(folder, content, together)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    return written


def run(job, results):
    keys, scored, found, hashes, known = [], [], {}, [], dict(stages.STAGES)
    stages.STAGES.update({name: troubled(kind, job, keys, scored, found, hashes) for name, kind in known.items()})
    usual = exchange.CHUNK, contract.IMAGES, loop.train_stage, sharded.write
    exchange.CHUNK, contract.IMAGES, loop.train_stage = job.get("chunk", 8), 256, marked(loop.train_stage)
    sharded.write = tight(sharded.write, job.get("full", {}))
    try:
        status = trainer.main([*job["argv"], f"--processes={WORLD}"])
    finally:
        stages.STAGES.update(known)
        exchange.CHUNK, contract.IMAGES, loop.train_stage, sharded.write = usual
    facts = {"status": status, "world": PartialState().num_processes, "keys": keys, "scored": scored, "held": found}
    facts["hash"] = "".join(hashes)  # of one stage
    (results / f"{job['name']}-{RANK}.json").write_text(json.dumps(facts))


def run_all(jobs, results):
    """The lines of a file, one after the other."""
    for line in jobs.read_text().splitlines():
        run(json.loads(line), results)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays: each job ends by looking for garbage
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainings say
    for line in sys.stdin:
        run_all(*map(Path, json.loads(line)))
        print("done", file=answers, flush=True)
    trainer.end(0)
