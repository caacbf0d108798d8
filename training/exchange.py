"""What micro-batches and ranks put together in a step: gradients, losses, scalars, and metrics.

It does not know optimizers, nor what is trained.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from . import parallel
from .optim import EMA
from .stages import TrainingStage, Update
from .stream import Batch, Source

_CHUNK, _VALIDATED = 64, 512


class TrainingError(ValueError):
    """A run that must not go on; the message says why and what to do."""


def advance(generators: list[Iterator[Update]], networks: Collection[Any], accelerator: Accelerator) -> list[Update]:
    """Every generator to its next yield, with its backward pass; gradients are exchanged on the last one."""
    updates = []
    for k, generator in enumerate(generators):
        with contextlib.ExitStack() as stack:
            if k < len(generators) - 1:
                for network in networks:
                    stack.enter_context(parallel.no_sync(network, accelerator))
            update = next(generator, None)
            if update is not None:
                accelerator.backward(update[1][0])
                updates.append(update)
    if len({update[0] for update in updates}) > 1 or len(updates) not in (0, len(generators)):
        raise TrainingError(f"micro-batches of one step disagree on what they train: {[u[0] for u in updates]}")
    return updates


def divide(network: torch.nn.Module, updates: list[Update], accelerator: Accelerator) -> tuple[float, float]:
    """Turns gradients of sums, averaged over ranks by DDP, into that of the global mean. Returns (loss, count)."""
    sums = [
        torch.stack([torch.as_tensor(x, device=accelerator.device, dtype=torch.float32) for x in u[1]]) for u in updates
    ]
    loss, count = accelerator.reduce(torch.stack(sums).sum(0).detach(), reduction="sum").tolist()
    if count > 0:
        scale = accelerator.num_processes / count
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return loss, count


def mean_scalars(updates: list[Update], accelerator: Accelerator) -> dict[str, float]:
    """The scalars of one step, averaged over micro-batches and ranks by the weight of their samples."""
    names = sorted(updates[0][2])
    rows = []
    for _, (_, count), scalars in updates:
        weight = torch.as_tensor(count, dtype=torch.float32, device=accelerator.device)
        rows.append(torch.stack([weight, *(weight * scalars[name].detach().float() for name in names)]))
    total = accelerator.reduce(torch.stack(rows).sum(0), reduction="sum")
    mean = (total[1:] / total[0].clamp(min=1e-12)).tolist()
    return {f"{updates[0][0]}/{name}": value for name, value in zip(names, mean, strict=True)}


def validate(stage: TrainingStage, ema: EMA, source: Source, accelerator: Accelerator) -> dict[str, float]:
    """The stage's metrics on the first samples of another source, each scored once, with the averaged weights.

    The samples lie in the same chunks on any number of ranks, since some metrics compare those of a chunk.
    """
    total, world = _VALIDATED if source.size is None else min(_VALIDATED, source.size), accelerator.num_processes
    chunks = [range(start, min(total, start + _CHUNK)) for start in range(0, total, _CHUNK)]
    count = torch.zeros((), device=accelerator.device)
    sums = dict.fromkeys(stage.metrics, count)  # all of them on every rank, for one may have no samples
    with ema.applied():
        for turn in range(0, len(chunks), world):
            at = turn + accelerator.process_index
            batch = to_device(source.read(chunks[at if at < len(chunks) else 0]), accelerator.device)
            batch.weight *= at < len(chunks)  # a rank without a chunk still takes part
            for name, value in stage.measure(batch).items():
                weighted = torch.where(batch.weight > 0, value.float() * batch.weight, 0.0)  # without it may be inf
                sums[name] = sums[name] + weighted.sum()
            count = count + batch.weight.sum()
    count = accelerator.reduce(count, reduction="sum")
    return {name: float(accelerator.reduce(value, reduction="sum") / count) for name, value in sums.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        image=batch.image.to(device),
        captions=batch.captions,
        keys=batch.keys,
        samples=batch.samples.to(device),
        weight=batch.weight.to(device),
        problems=batch.problems,
        encoded={name: array.to(device) for name, array in batch.encoded.items()},
    )
