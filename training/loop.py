"""The one loop: it steps the optimizer of whatever a stage yields, then resumes the stage.

A stage is a generator of (name, (loss_sum, count), scalars). With k micro-batches the loop holds k generators: all
advance to the first yield (gradients are exchanged on the last only), the optimizer steps once, and so on. Sums are
divided by the global count, so the gradient does not depend on how a batch is split. Accelerate gives the device, DDP
and autocast; positions, accumulation, learning rate, EMA and checkpoints are ours.

It does not know what a stage trains, nor how its loss is made.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console

from ..pipeline import checkpoint
from . import state
from .optim import EMA, build_optimizers, rate
from .run import Stage, differences, division
from .stages import Update
from .stream import Batch, Source, prefetch, rank_positions, validation_positions

_VALIDATION_BATCH = 64


class TrainingError(ValueError):
    """A run that must not go on; the message says why and what to do."""


@dataclass
class Log:
    """A JSON-lines file that any notebook reads, TensorBoard where it is installed, and a line on the terminal.

    step: where the stage starts or resumes; what an interrupted run logged of it beyond that is taken out.
    """

    folder: Path
    stage: str
    enabled: bool
    step: int

    def __post_init__(self) -> None:
        self.console = Console()
        self.board: Any = None
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rewind(self.folder / "log.jsonl")
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard" / self.stage), purge_step=self.step + 1)

    def _rewind(self, path: Path) -> None:
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not self._is_ahead(line)]
        if len(kept) < len(lines):
            checkpoint.write_text(path, "".join(kept))

    def _is_ahead(self, line: str) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return True  # cut off as it was written
        return not line.endswith("\n") or entry["stage"] == self.stage and entry["step"] > self.step

    def write(self, step: int, steps: int, scalars: dict[str, float]) -> None:
        if not self.enabled:
            return
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            file.write(json.dumps({"stage": self.stage, "step": step, **finite}) + "\n")
        for name, value in scalars.items():
            if self.board:
                self.board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        self.console.print(f"{self.stage} {step}/{steps}  {shown}", highlight=False)


def _advance(generators: list[Iterator[Update]], network: Any, accelerator: Accelerator) -> list[Update]:
    """Every generator to its next yield, with its backward pass; gradients are exchanged on the last one."""
    updates = []
    for k, generator in enumerate(generators):
        last = k == len(generators) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(network):
            update = next(generator, None)
            if update is not None:
                accelerator.backward(update[1][0])
                updates.append(update)
    if len({update[0] for update in updates}) > 1 or len(updates) not in (0, len(generators)):
        raise TrainingError(f"micro-batches of one step disagree on what they train: {[u[0] for u in updates]}")
    return updates


def _divide_gradients(network: torch.nn.Module, updates: list[Update], accelerator: Accelerator) -> torch.Tensor:
    """Turns gradients of sums, averaged over ranks by DDP, into the gradient of the global mean. Returns the count."""
    local = torch.stack([torch.as_tensor(u[1][1], device=accelerator.device, dtype=torch.float32) for u in updates])
    count = accelerator.reduce(local.sum(), reduction="sum")
    if count > 0:
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(accelerator.num_processes / count)
    return count


def _mean_scalars(updates: list[Update], accelerator: Accelerator) -> dict[str, float]:
    """The scalars of one step, averaged over micro-batches and ranks by the weight of their samples."""
    names = sorted(updates[0][2])
    rows = []
    for _, (_, count), scalars in updates:
        weight = torch.as_tensor(count, dtype=torch.float32, device=accelerator.device)
        rows.append(torch.stack([weight, *(weight * scalars[name].detach().float() for name in names)]))
    total = accelerator.reduce(torch.stack(rows).sum(0), reduction="sum")
    mean = (total[1:] / total[0].clamp(min=1e-12)).tolist()
    return {f"{updates[0][0]}/{name}": value for name, value in zip(names, mean, strict=True)}


def train_stage(
    identity: dict[str, Any],
    stage: Any,
    config: Stage,
    source: Source,
    validation: Source | None,
    folder: Path,
    accelerator: Accelerator,
) -> EMA:
    """Trains a stage to its last step, resuming from the newest whole checkpoint; returns the averaged weights.

    identity: see `training.run.identity`. stage: an object of `kartina.training.stages`. folder: the run folder.
    validation: where the stage's headline metric is measured, with the averaged weights.
    Raises TrainingError on a changed recipe or a gradient that stays non-finite.
    """
    name = identity["stage"]
    micro, passes = division(config, accelerator.num_processes)
    network = accelerator.prepare_model(stage.network)
    stage.forward = network
    optimizers = build_optimizers(stage.network, config.optimizer)
    ema = EMA(stage.network, config.ema)
    checkpoints = folder / "state" / name
    first, trained_seconds = _resume(checkpoints, identity, stage, optimizers, ema)
    log = Log(folder, name, accelerator.is_main_process, first)
    started = saved = time.monotonic()
    skipped = 0
    rank, world = accelerator.process_index, accelerator.num_processes
    positions = (rank_positions(s, config.global_batch, rank, world, micro) for s in range(first, config.steps))
    stream = prefetch(source, chain.from_iterable(positions))

    for step in range(first, config.steps):
        if step == stage.restart_step:
            ema.copy_to_network()
            stage.restart()
            for tensor in stage.network.state_dict().values():
                broadcast(tensor)  # ranks may round differently
            optimizers, ema = build_optimizers(stage.network, config.optimizer), EMA(stage.network, config.ema)
        restart = stage.restart_step if stage.restart_step is not None and step >= stage.restart_step else 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, config.steps, config.optimizer, restart)
        waited = time.monotonic()
        batches = [_to_device(next(stream), accelerator.device) for _ in range(passes)]
        waited = time.monotonic() - waited
        generators = [stage.updates(batch, step) for batch in batches]
        while updates := _advance(generators, network, accelerator):
            count = _divide_gradients(stage.network, updates, accelerator)
            norm = torch.nn.utils.clip_grad_norm_(stage.network.parameters(), config.optimizer.clip)
            # After the exchange both numbers, and so the choice, are the same on every rank.
            if count > 0 and torch.isfinite(norm):
                for optimizer in optimizers:
                    optimizer.step()
                ema.update()
                skipped = 0
            else:
                skipped += 1
                log.console.print(
                    f"step {step}: no good sample or a non-finite gradient, skipped; samples {batches[0].keys[:8]}"
                )
                if skipped == 10:
                    raise TrainingError(f"{name}: 10 steps in a row had a non-finite gradient, up to step {step}")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                seconds = trained_seconds + time.monotonic() - started
                facts = {"norm": float(norm), "wait": waited, "seconds": seconds}
                log.write(step + 1, config.steps, _mean_scalars(updates, accelerator) | facts)
        if validation is not None and ((step + 1) % config.validate_every == 0 or step + 1 == config.steps):
            log.write(step + 1, config.steps, _validate(stage, ema, validation, accelerator))
        preview = (step + 1) % config.preview_every == 0 or step + 1 == config.steps
        if preview and accelerator.is_main_process:
            stage.preview(batches[0], folder / "previews" / f"{name}-{step + 1:06d}.png")
        due = time.monotonic() - saved > 60 * config.save_minutes or step + 1 == config.steps
        if due and accelerator.is_main_process:
            seconds = trained_seconds + time.monotonic() - started
            state.save(checkpoints, step + 1, _collect(step + 1, seconds, identity, stage, optimizers, ema))
            saved = time.monotonic()
    accelerator.wait_for_everyone()
    return ema


def _validate(stage: Any, ema: EMA, source: Source, accelerator: Accelerator, most: int = 512) -> dict[str, float]:
    """The stage's metrics on the first samples of another source, each scored once, with the averaged weights."""
    total = most if source.size is None else min(most, source.size)
    mine = validation_positions(total, accelerator.process_index, accelerator.num_processes)
    count = torch.zeros((), device=accelerator.device)
    sums = dict.fromkeys(stage.metrics, count)  # all of them on every rank, for one may have no samples
    with ema.applied():  # no autocast here: codes must be those that training reads and painting makes
        for start in range(0, len(mine), _VALIDATION_BATCH):
            batch = _to_device(source.read(mine[start : start + _VALIDATION_BATCH]), accelerator.device)
            for name, value in stage.measure(batch).items():
                sums[name] = sums[name] + (value.float() * batch.weight).sum()
            count = count + batch.weight.sum()
    count = accelerator.reduce(count, reduction="sum")
    return {f"valid/{name}": float(accelerator.reduce(value, reduction="sum") / count) for name, value in sums.items()}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        image=batch.image.to(device),
        captions=batch.captions,
        keys=batch.keys,
        samples=batch.samples.to(device),
        weight=batch.weight.to(device),
    )


def _collect(step: int, seconds: float, identity: dict[str, Any], stage: Any, optimizers: Any, ema: EMA) -> dict:
    return {
        "step": step,
        "seconds": seconds,
        "identity": identity,
        "network": stage.network.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "ema": ema.state(),
    }


def _resume(folder: Path, identity: dict, stage: Any, optimizers: Any, ema: EMA) -> tuple[int, float]:
    """Restores the newest whole checkpoint. Returns (step, seconds trained so far)."""
    saved = state.load_newest(folder)
    if saved is None:
        return 0, 0.0
    if keys := differences(saved["identity"], identity):
        raise TrainingError(f"{folder.parent.parent}: the recipe changed since this run began ({keys}); "
                            "put it back, or start another run with --run FOLDER")  # fmt: skip
    stage.network.load_state_dict(saved["network"])
    for optimizer, weights in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(weights)
    ema.load(saved["ema"])
    return saved["step"], saved["seconds"]
