"""What micro-batches and ranks put together in a step: gradients, losses, scalars, and metrics.

It does not know optimizers, nor what is trained.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from . import parallel
from .optim import EMA
from .stages import TrainingStage, Update
from .stream import Batch, Source, validation_positions

_VALIDATION_BATCH, _VALIDATED = 64, 512


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


def divide(network: torch.nn.Module, updates: list[Update], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Turns gradients of sums, averaged over ranks by DDP, into that of the global mean. Returns (loss, count)."""
    sums = [
        torch.stack([torch.as_tensor(x, device=accelerator.device, dtype=torch.float32) for x in u[1]]) for u in updates
    ]
    loss, count = accelerator.reduce(torch.stack(sums).sum(0).detach(), reduction="sum")
    if count > 0:
        scale = accelerator.num_processes / float(count)
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return loss, count


def mean_scalars(updates: list[Update], accelerator: Accelerator) -> dict[str, float]:
    """The scalars of one step, averaged over micro-batches and ranks by the weight of their samples.

    `total` among them is the loss itself, whatever it is made of.
    """
    names = sorted(updates[0][2])
    rows = []
    for _, (loss, count), scalars in updates:
        weight, loss, *values = (
            torch.as_tensor(x, dtype=torch.float32, device=accelerator.device).detach()
            for x in (count, loss, *(scalars[name] for name in names))
        )
        rows.append(torch.stack([weight, loss, *(weight * value for value in values)]))
    total = accelerator.reduce(torch.stack(rows).sum(0), reduction="sum")
    mean = (total[1:] / total[0].clamp(min=1e-12)).tolist()
    return {f"{updates[0][0]}/{name}": value for name, value in zip(["total", *names], mean, strict=True)}


def validate(stage: TrainingStage, ema: EMA, source: Source, accelerator: Accelerator) -> dict[str, float]:
    """The stage's metrics on the first samples of another source, each scored once, with the averaged weights.

    `ema_gain` is by how much the headline is better with them than with the live ones, over the first 64 samples, and
    `ema_gain_error` its standard error.
    """
    total = _VALIDATED if source.size is None else min(_VALIDATED, source.size)
    mine = validation_positions(total, accelerator.process_index, accelerator.num_processes)
    most, headline = -(-total // accelerator.num_processes), stage.metrics[0]  # all ranks make as many forward passes

    def read(start: int) -> Batch:
        chunk = mine[start : start + _VALIDATION_BATCH]
        batch = to_device(source.read(chunk or [0]), accelerator.device)
        batch.weight *= bool(chunk)  # a rank that has scored all its own still takes part
        return batch

    first = read(0)
    live = stage.measure(first)
    with ema.applied():  # no autocast here: codes must be those that training reads and painting makes
        averaged = stage.measure(first)
        sums = _sums(averaged, first.weight)
        for start in range(_VALIDATION_BATCH, most, _VALIDATION_BATCH):
            batch = read(start)
            more = _sums(stage.measure(batch), batch.weight)
            sums = {name: value + more[name] for name, value in sums.items()}
    sums = {name: accelerator.reduce(sums[name], reduction="sum") for name in sorted(sums)}
    count = sums.pop("")
    found: dict[str, Any] = {name: value / count for name, value in sums.items() if value.ndim == 0}
    found |= stage.summary(sums, float(count))
    if headline in live:
        gain = (averaged[headline] - live[headline]).float() * (1 if stage.higher_is_better else -1)
        weight = first.weight * (first.samples < _VALIDATION_BATCH)  # the same samples at any number of ranks
        each = torch.stack([weight, weight * gain, weight * gain.square()]).sum(1)
        n, mean, square = accelerator.reduce(each, reduction="sum").tolist()
        mean, square, n = mean / max(n, 1), square / max(n, 1), max(n, 1)
        found |= {"ema_gain": mean, "ema_gain_error": math.sqrt(max(0.0, square - mean**2) / n)}
    return {name: float(found[name]) for name in (*stage.metrics, *sorted(set(found) - set(stage.metrics)))}


def _sums(values: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """What a stage measured, added up over the samples by their weight (B,), and under "" that of the weights."""
    return {"": weight.sum()} | {name: torch.tensordot(weight, value.float(), 1) for name, value in values.items()}


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
