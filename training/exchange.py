"""What micro-batches and ranks put together in a step: gradients, losses, scalars, and metrics.

It does not know optimizers, nor what is trained.
"""

import contextlib
import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size as is_out_of_memory
from torch import Tensor

from . import parallel, state
from .objectives.dvae import codebook_use
from .optim import EMA
from .stages import TrainingStage, Update, told
from .stream import Batch, Source

CHUNK = 64  # samples that validation reads at once


class TrainingError(ValueError):
    """A run that must not go on, as all of its processes find alike; the message says why and what to do."""

    agreed = True


def advance(
    generators: list[Iterator[Update]], networks: Collection[Any], accelerator: Accelerator, due: bool
) -> list[Update]:
    """Every generator to its next yield, with its backward pass; gradients are exchanged on the last one.

    due: whether a line is; else scalars are left out but `codes`, (K,) counts of codes, and nothing that they are made
    of outlives the backward pass.
    """
    updates: list[Update] = []
    for k, generator in enumerate(generators):
        with contextlib.ExitStack() as stack:
            if k < len(generators) - 1:
                for network in networks:
                    stack.enter_context(parallel.no_sync(network, accelerator))
            update = next(generator, None)
            if update is not None:
                name, sums, scalars = update
                scalars = told(scalars if due else {key: scalars[key] for key in scalars.keys() & {"codes"}})
                del update
                accelerator.backward(sums[0])
                updates.append((name, sums, scalars))
    if len({update[0] for update in updates}) > 1 or len(updates) not in (0, len(generators)):
        raise RuntimeError(f"micro-batches of one step disagree on what they train: {[u[0] for u in updates]}")
    return updates


def divide(network: torch.nn.Module, updates: list[Update], accelerator: Accelerator) -> Tensor:
    """Turns gradients of sums, averaged over ranks by DDP, into that of the global mean, which no count of 0 has.

    Returns the loss and the count, (2,), on the device: the host does not wait for them here.
    """
    sums = [
        torch.stack([torch.as_tensor(x, device=accelerator.device, dtype=torch.float32) for x in u[1]]) for u in updates
    ]
    total = accelerator.reduce(torch.stack(sums).sum(0).detach(), reduction="sum")
    scale = accelerator.num_processes / total[1]
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale)  # all at once: on a GPU each alone takes longer to launch
    return total


class Line:
    """What a line of the log says: the means of its step, and the codes of all steps since the line before.

    Where a run went on after a stop, of those since then: the counts are in no checkpoint.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.codes: dict[str, Tensor] = {}  # by network, (K,) of this rank: one batch says little of many codes

    def count(self, updates: list[Update]) -> None:
        """Adds the codes of a step that was taken."""
        for name, _, scalars in updates:
            if "codes" in scalars:
                counts: Any = scalars["codes"]
                self.codes[name] = self.codes[name] + counts if name in self.codes else counts

    def of(self, updates: list[Update]) -> dict[str, float]:
        """The scalars of one step, averaged over micro-batches and ranks by the weight of their samples.

        `total` among them is the loss itself, whatever it is made of. In place of `codes` stands what those that were
        counted say together, see `codebook_use`; their count begins anew.
        """
        name = updates[0][0]
        names = sorted(updates[0][2].keys() - {"codes"})
        rows = []
        for _, (loss, count), scalars in updates:
            weight, loss, *values = (
                torch.as_tensor(x, dtype=torch.float32, device=self.accelerator.device).detach()
                for x in (count, loss, *(scalars[name] for name in names))
            )
            rows.append(torch.stack([weight, loss, *(weight * value for value in values)]))
        total = self.accelerator.reduce(torch.stack(rows).sum(0), reduction="sum")
        mean = (total[1:] / total[0].clamp(min=1e-12)).tolist()
        found = dict(zip(["total", *names], mean, strict=True))
        if name in self.codes:
            counts = self.accelerator.reduce(self.codes.pop(name), reduction="sum")
            use = codebook_use(counts) | {"counts_per_code": counts.mean()}
            found |= {key: float(value) for key, value in use.items()}
        return {f"{name}/{key}": value for key, value in found.items()}


def of_all_ranks(found: dict[str, str], accelerator: Accelerator) -> dict[str, str]:
    """The entries that any rank has found, on all of them."""
    anything = parallel.any_rank(bool(found), accelerator)  # mostly there is none, and nothing is sent
    return dict(gather_object(list(found.items()))) if anything else {}


def named(problems: dict[str, str]) -> str:
    """Samples that cannot be read, and why, as a log says it."""
    some = "; ".join(f"{key}: {reason}" for key, reason in list(problems.items())[:5])
    return f"{len(problems)} samples cannot be read: {some}"


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Path | None:
    """The newest whole one, chosen by the first rank for all. Raises TrainingError where there are only spoilt ones."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = state.newest(folder)
        except ValueError as error:
            found[1] = str(error)
    path, problem = broadcast_object_list(found)
    if problem:
        raise TrainingError(problem)
    return path


def validate(
    stage: TrainingStage, ema: EMA, source: Source, samples: int, accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, str]]:
    """The stage's metrics on the first samples of another source, each scored once, with the averaged weights.

    Returns them, and why samples could not be read, by key: these are not measured on.

    samples: at most so many. They lie in the same chunks on any number of ranks, since some metrics compare those of a
    chunk. `ema_gain` is by how much the headline is better with averaged weights than with the live ones, over the
    first chunk, and `ema_gain_error` its standard error.
    """
    total, world = samples if source.size is None else min(samples, source.size), accelerator.num_processes
    chunks = [range(start, min(total, start + CHUNK)) for start in range(0, total, CHUNK)]

    problems: dict[str, str] = {}

    def read(turn: int) -> Batch:
        at = turn + accelerator.process_index
        batch = to_device(source.read(chunks[at if at < len(chunks) else 0]), accelerator.device)
        problems.update(batch.problems)
        batch.weight *= at < len(chunks)  # a rank without a chunk still takes part
        return batch

    first = read(0)
    live = measure(stage, first)
    with ema.applied():
        averaged = measure(stage, first)
        sums = _sums(averaged, first.weight)
        for turn in range(world, len(chunks), world):
            batch = read(turn)
            more = _sums(measure(stage, batch), batch.weight)
            sums = {name: value + more[name] for name, value in sums.items()}
    sums = {name: accelerator.reduce(sums[name], reduction="sum") for name in sorted(sums)}
    count = sums.pop("")
    found: dict[str, Any] = {name: value / count for name, value in sums.items() if value.ndim == 0}
    found |= stage.summary(sums, float(count))
    headline = stage.metrics[0]
    if headline in live:
        gain = (averaged[headline] - live[headline]).float() * (1 if stage.higher_is_better else -1)
        weight = first.weight * accelerator.is_main_process  # the first chunk is there, on any number of ranks
        n, mean, square = _moments(gain, weight, accelerator)
        found |= {"ema_gain": mean, "ema_gain_error": math.sqrt(max(0.0, square - mean**2) / n)}
    names = (*stage.metrics, *sorted(set(found) - set(stage.metrics)))
    return {name: float(found[name]) for name in names}, of_all_ranks(problems, accelerator)


def save_preview(
    stage: TrainingStage, ema: EMA, shown: Batch, path: Path, accelerator: Accelerator, together: Any
) -> str:
    """Writes the stage's picture of these samples, with the averaged weights. Returns why it could not, or "".

    together: whether the networks are divided, so that all processes have to call this.
    """
    try:
        with ema.applied():
            picture = stage.preview(to_device(shown, accelerator.device))
        if picture is not None and accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    except (OSError, ValueError, RuntimeError) as error:  # a picture is not worth a run
        if isinstance(error, RuntimeError) and (together or not is_out_of_memory(error)):
            raise
        return str(error) or type(error).__name__
    return ""


def measure(stage: TrainingStage, batch: Batch) -> dict[str, Tensor]:
    """What the stage measures of a batch; of its halves where memory does not suffice and these say the same."""
    try:
        return stage.measure(batch)
    except RuntimeError as error:
        count, divided = len(batch.keys), any(map(parallel.is_sharded, stage.networks.values()))
        if not is_out_of_memory(error) or divided or stage.fewest is None or count < 2 * stage.fewest:
            raise
    warnings.warn(f"out of memory while measuring {count} samples: going on with {-(-count // 2)}", stacklevel=2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # outside of the handler, which held on to what had been allocated
    halves = [measure(stage, part_of(batch, half)) for half in (slice(0, count // 2), slice(count // 2, count))]
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def part_of(batch: Batch, some: slice) -> Batch:
    """Some samples of a batch."""
    return replace(
        batch,
        image=batch.image[some],
        captions=batch.captions[some],
        keys=batch.keys[some],
        samples=batch.samples[some],
        weight=batch.weight[some],
        encoded={name: array[some] for name, array in batch.encoded.items()},
        labels=None if batch.labels is None else batch.labels[some],
    )


def _sums(values: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """What a stage measured, added up over the samples by their weight (B,), and under "" that of the weights.

    A sample without weight may have measured anything, infinity too.
    """
    sums = {"": weight.sum()}
    for name, value in values.items():
        counted = value.float().masked_fill((weight == 0).view(-1, *[1] * (value.ndim - 1)), 0.0)
        sums[name] = torch.tensordot(weight, counted, 1)
    return sums


def _moments(value: Tensor, weight: Tensor, accelerator: Accelerator) -> tuple[float, float, float]:
    """The weight of the samples (B,) of all ranks, at least 1, and the means of a value and of its square."""
    each = _sums({"value": value, "square": value.square()}, weight)
    three = torch.stack([each[name] for name in ("", "value", "square")])
    n, mean, square = accelerator.reduce(three, reduction="sum").tolist()
    n = max(n, 1.0)
    return n, mean / n, square / n


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        image=batch.image.to(device),
        captions=batch.captions,
        keys=batch.keys,
        samples=batch.samples.to(device),
        weight=batch.weight.to(device),
        problems=batch.problems,
        encoded={name: array.to(device) for name, array in batch.encoded.items()},
        labels=None if batch.labels is None else batch.labels.to(device),
        told=batch.told,
    )
