"""The one loop: it steps the optimizer of whatever a stage yields, then resumes the stage.

A stage is a generator of (name, (loss_sum, count), scalars). With k micro-batches the loop holds k generators: all
advance to the first yield (gradients are exchanged on the last only), that network's optimizers step once, and so on.
Sums are divided by the global count, so the gradient does not depend on how a batch is split. Accelerate gives the
device, DDP and autocast; positions, accumulation, learning rate, EMA and checkpoints are ours.

A step whose loss or gradient is not finite is left out on every rank, from the network on whose it is. After so many
in a row (`patience`) the run goes back to its last checkpoint, but not in the data, which would do the same again.

It does not know what a stage trains, nor how its loss is made.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from ..layers.attention import short_in_float32
from . import doctor, exchange, history, parallel, state
from .exchange import TrainingError
from .log import Log
from .optim import EMA, build_optimizers, rate
from .run import Stage, Training, completed, differences, division
from .stages import TrainingStage
from .state import RunState
from .stopping import Stop, Stopped
from .stream import Batch, Source, prefetch, rank_positions

_RETURNS, _WITHIN = 2, 1000  # going back so often within so many steps ends a run


def train_stage(
    identity: dict[str, Any],
    stage: TrainingStage,
    training: Training,
    source: Source,
    validation: Source | None,
    folder: Path,
    accelerator: Accelerator,
    stop: Stop,
    extend: bool = False,
) -> EMA:
    """Trains a stage to its last step, resuming from the newest whole checkpoint; returns the averaged weights.

    identity: see `training.run.identity`. folder: the run folder. validation: where the stage's metrics are measured,
    with the averaged weights. extend: more steps than the run began with are no other recipe. Raises TrainingError on
    a changed recipe or a loss that stays non-finite, Stopped where a signal asked for it.
    """
    run = _Run(identity, stage, training, source, validation, folder, accelerator, stop, extend)
    try:
        with short_in_float32(accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"):
            return run.train()
    finally:
        run.stream.close()
        run.log.close()


@dataclass
class _Run:
    """One stage on its way: see `train_stage`."""

    identity: dict[str, Any]
    stage: TrainingStage
    training: Training
    source: Source
    validation: Source | None
    folder: Path
    accelerator: Accelerator
    stop: Stop
    extend: bool

    def __post_init__(self) -> None:
        name, stage, training, accelerator = self.identity["stage"], self.stage, self.training, self.accelerator
        self.config: Stage = training.stages[name]
        self.allowed = training.data.bad_limit * (self.source.size or math.inf)  # samples that cannot be read
        micro, self.passes = division(self.config, accelerator.num_processes)
        for part, network in stage.networks.items():
            how = training.shard == "fsdp", self.config.recompute, self.config.compile
            stage.forward[part] = parallel.prepare(network, accelerator, *how)
        divided = any(parallel.is_sharded(network) for network in stage.networks.values())
        self.together = accelerator if divided else None  # what all processes then have to do at once
        if training.shard == "fsdp" and not divided:
            accelerator.print(f"{name}: it has no blocks to divide, or one process has it alone: kept whole")
        self.checkpoints = self.folder / "state" / name
        self.state = RunState(self.identity, stage.networks, *self._fresh())
        self._resume()
        settings = training.model_dump(mode="json")
        self.log = Log(self.folder, name, accelerator.is_main_process, self.state.at, training.trackers, settings)
        message = f"{self.config.steps} steps of {self.config.global_batch} samples"
        facts = history.facts_of(stage, self.config, self.identity["data"])
        self.log.event(self.state.step, "started", message, **facts)
        self._measure_alike()
        self.stream = prefetch(self.source, self._positions(micro), workers=training.data.workers)
        self.streak, self.line = 0, exchange.Line(accelerator)
        self.problems: dict[str, str] = {}  # met since the last line
        self.unmeasured: dict[str, str] = {}  # of the validation data
        self.shown = (self.validation or self.source).read(range(16))  # previews always show the same samples
        self.saved = time.monotonic()
        self.earlier = self.state.seconds - time.monotonic()  # so that now + earlier are the seconds trained
        self.lap, self.waited, self.bad = time.monotonic(), 0.0, 0.0

    def _positions(self, micro: int) -> Iterator[list[int]]:
        """Of every micro-batch of this rank, from where the run stands, without end: going back leaves out some."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for at in itertools.count(self.state.at):
            yield from rank_positions(at, self.config.global_batch, rank, world, micro)

    def _fresh(self) -> tuple[dict[str, list[torch.optim.Optimizer]], EMA]:
        networks, of, bf16 = self.stage.networks, self.config.optimizer_of, self.training.precision == "bf16"
        optimizers = {name: build_optimizers(network, of(name), bf16) for name, network in networks.items()}
        return optimizers, EMA(networks[self.stage.part], self.config.ema)

    def _resume(self) -> None:
        path = exchange.newest_checkpoint(self.checkpoints, self.accelerator)
        if path is None:
            return
        known = completed(state.identity_of(path)) | {"export": self.identity["export"]}  # chosen when a stage ends
        keys = differences(known, self.identity, self.extend)
        if keys:
            raise TrainingError(
                f"{self.folder}: what this run began with changed ({keys}); put it back, or start another run with "
                "--run FOLDER; more steps alone are taken with --extend STAGE=STEPS"
            )
        self.state.restore(path)
        again = self.stage.replayed(self.config, known["steps"], self.state.step)
        if self.extend and again is not None:
            raise TrainingError(
                f"{self.folder}: with {self.config.steps} steps the phase that ends at step {again} would begin again "
                f"at step {self.state.step}; name fewer steps with --extend, or start another run with --run FOLDER"
            )

    def _measure_alike(self) -> None:
        """Forgets the best metric where it was not measured on what metrics are measured on now."""
        run, measured = self.state, self.validation
        ruler = "" if measured is None else f"{self.config.validate_samples} of {measured.fingerprint}"
        if run.best is not None and run.ruler not in ("", ruler) and run.step < self.config.steps:
            message = f"the best metric, of step {run.best[1]}, was measured on other data: a new one from here on"
            self.log.event(run.step, "other ruler", message)
            run.best = None
        run.ruler = ruler

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> EMA:
        run, steps = self.state, self.config.steps
        if run.at == 0:
            self._save()  # where bad weather at the very start goes back to
        while run.step < steps:
            self._restart_if_due()
            self._set_rates()
            batches = self._read()
            scalars = self._update(batches)
            run.ema.leap()
            run.step, run.at = run.step + 1, run.at + 1
            self.log.at, reached = run.at, run.step
            if scalars is None:
                self._skip(batches)
            else:
                self.streak = 0
                if scalars:
                    self._report(scalars)
            if run.step == reached:  # it did not go back
                self._look()
            self._save_if_due()
        if self.config.export == "best" and run.best is not None:
            run.restore(state.require_whole(state.path_of(self.checkpoints, run.best[2])), data_too=False)
        elif self.config.export == "best":
            self.log.event(run.step, "no best", "there is no best metric: the last weights are exported")
        self.accelerator.wait_for_everyone()
        return run.ema

    def _restart_if_due(self) -> None:
        if self.state.step != self.stage.restart_step:
            return
        self.state.ema.copy_to_network()
        self.stage.restart()
        assert self.together is None  # no stage of blocks begins anew
        for tensor in itertools.chain.from_iterable(n.state_dict().values() for n in self.stage.networks.values()):
            broadcast(tensor)  # ranks may round differently
        self.state.optimizers, self.state.ema = self._fresh()
        self.line = exchange.Line(self.accelerator)  # what was counted is of other codes

    def _set_rates(self) -> None:
        step, begun = self.state.step, self.stage.restart_step
        restart = begun if begun is not None and step >= begun else 0
        for name, optimizers in self.state.optimizers.items():
            config, restart_of = self.config.optimizer_of(name), max(restart, self.stage.starts.get(name, 0))
            for group in itertools.chain.from_iterable(one.param_groups for one in optimizers):
                group["lr"] = group["peak"] * rate(step, self.config.steps, config, restart_of)

    def _read(self) -> list[Batch]:
        begin = time.monotonic()
        batches = [exchange.to_device(next(self.stream), self.accelerator.device) for _ in range(self.passes)]
        self.waited += time.monotonic() - begin
        found = {key: reason for batch in batches for key, reason in batch.problems.items()}
        self.problems |= found
        self.bad += len(found)
        return batches

    def _update(self, batches: list[Batch]) -> dict[str, float] | None:
        """One step of every network. Its scalars, empty where no line is due; None where one was not finite."""
        run, scalars = self.state, dict[str, float]()
        due = (run.step + 1) % self.config.log_every == 0 or run.step + 1 in (1, self.config.steps)
        generators = [iter(self.stage.updates(batch, run.step)) for batch in batches]
        while updates := exchange.advance(generators, self.stage.forward.values(), self.accelerator, due):
            name = updates[0][0]
            network, clip = run.networks[name], self.config.optimizer_of(name).clip
            total = exchange.divide(network, updates, self.accelerator)
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(network.parameters(), clip))
            # After the exchange the three are the same on every rank, and so is the choice.
            loss, count, norm = torch.stack([*total, norm.to(total)]).tolist()
            finite = count > 0 and math.isfinite(loss) and math.isfinite(norm)
            if finite:
                for optimizer in run.optimizers[name]:
                    optimizer.step()
                if name == self.stage.part:
                    run.ema.update()
                self.line.count(updates)
            for optimizer in itertools.chain.from_iterable(run.optimizers.values()):
                optimizer.zero_grad(set_to_none=True)
            if not finite:
                return None
            if due:
                scalars |= self.line.of(updates) | {f"{name}/norm": norm}
        return scalars

    # --- bad weather --------------------------------------------------------------------------------------------------

    def _skip(self, batches: list[Batch]) -> None:
        """A step that was not finite: its samples are named, and after so many in a row the run goes back."""
        self.streak += 1
        self._name_problems()
        run, keys = self.state, gather_object([key for batch in batches for key in batch.keys])
        message = f"no good sample, or a loss or gradient that is not finite: skipped; samples {', '.join(keys[:8])}"
        self.log.event(run.step, "skipped", message + (" ..." if len(keys) > 8 else ""), keys=keys)
        if self.streak < self.config.patience:
            return
        span = [run.at - self.streak, run.at - 1]
        if len([first for first, _ in run.bad if first > span[0] - _WITHIN]) == _RETURNS:
            raise TrainingError(
                f"{run.identity['stage']}: {self.streak} steps in a row were not finite for the third time within "
                f"{_WITHIN} steps, last at samples {', '.join(keys[:8])}; log.jsonl names all of them. "
                "Look at these samples, or lower the learning rate, in a new run: --run FOLDER"
            )
        reached = run.step
        path = exchange.newest_checkpoint(self.checkpoints, self.accelerator)
        assert path is not None  # one was written before the first step
        run.restore(path, data_too=False)
        run.bad.append(span)
        self.streak, self.line = 0, exchange.Line(self.accelerator)
        message = f"{self.config.patience} such steps in a row: back to the weights of step {run.step}, on in the data"
        self.log.event(run.step, "returned", message, reached=reached, bad=span)
        self._save()

    # --- telling and keeping ------------------------------------------------------------------------------------------

    def _report(self, scalars: dict[str, float]) -> None:
        run, wait = self.state, self.waited / max(1e-9, time.monotonic() - self.lap)
        each = self.accelerator.gather(torch.tensor([[self.bad, wait]], device=self.accelerator.device))
        facts = {
            "lr": run.optimizers[self.stage.part][0].param_groups[0]["lr"],
            "wait": float(each[:, 1].max()),  # share of the time since the last line, where it was most
            "bad": float(each[:, 0].sum()),  # samples that could not be read since then
            "samples": float(run.at * self.config.global_batch),
            "seconds": self.earlier + time.monotonic(),
        }
        self.log.write(run.step, self.config.steps, scalars | facts)
        self._name_problems()
        self.lap, self.waited, self.bad = time.monotonic(), 0.0, 0.0

    def _name_problems(self) -> None:
        """Samples that no rank had met before are named; too many end the run."""
        run, known = self.state, set(self.state.problems)
        run.problems |= exchange.of_all_ranks(self.problems, self.accelerator)
        self.problems = {}
        new = {key: reason for key, reason in run.problems.items() if key not in known}
        if new:
            self.log.event(run.step, "unreadable", exchange.named(new), problems=new)
        if len(run.problems) > self.allowed:
            raise TrainingError(
                f"at most {math.floor(self.allowed)} samples may be unreadable, got {len(run.problems)}; log.jsonl "
                "names each. Raise training.data.bad_limit, or mend them (`kartina data check`) for a new run"
            )

    def _look(self) -> None:
        """Validation and a preview, where they are due."""
        run, config, last = self.state, self.config, self.state.step == self.config.steps
        if self.validation is not None and (run.step % config.validate_every == 0 or last):
            where = self.validation, config.validate_samples, self.accelerator
            found, problems = exchange.validate(self.stage, run.ema, *where)
            self.log.write(run.step, config.steps, {f"valid/{name}": value for name, value in found.items()})
            if new := {key: reason for key, reason in problems.items() if key not in self.unmeasured}:
                self.log.event(run.step, "unreadable", f"of validation, {exchange.named(new)}", problems=new)
            self.unmeasured |= problems
            value, before = found[self.stage.metrics[0]], run.best
            sign = 1 if self.stage.higher_is_better else -1
            good = math.isfinite(value) and (self.streak == 0 or last)  # a run never goes back into a bad streak
            if good and (before is None or sign * value > sign * before[0]):
                run.best = (value, run.step, run.at)
                if not self._save():
                    run.best = before
        if run.step % config.validate_every == 0 or last:
            doctor.watch(self.log, run.step)
        if run.step % config.preview_every == 0 or last:
            self._preview()

    def _preview(self) -> None:
        path = self.folder / "previews" / f"{self.identity['stage']}-{self.state.step:06d}.png"
        if self.accelerator.is_main_process or self.together:
            how = self.accelerator, self.together
            if problem := exchange.save_preview(self.stage, self.state.ema, self.shown, path, *how):
                self.log.say(f"{path} is not saved ({problem})")

    def _save_if_due(self) -> None:
        """By steps, by the first rank's clock, or asked to stop, none of it amid bad steps; and at the end."""
        last = self.state.step == self.config.steps
        due = last or self.state.step % (self.config.save_every or self.config.steps) == 0
        late = self.accelerator.is_main_process and time.monotonic() - self.saved > 60 * self.config.save_minutes
        wishes = torch.tensor([self.stop.signum, int(late)], device=self.accelerator.device)
        signum, late = (self.accelerator.gather(wishes[None]).amax(0)).tolist()
        if (due or late or signum) and (self.streak == 0 or last):
            self._save(must=last or bool(signum))
        if signum:
            saved = "saved and stopped" if self.streak == 0 or last else "stopped amid bad steps"
            self.log.event(self.state.step, "stopped", f"{saved}; the same command goes on from the last checkpoint")
            raise Stopped(int(signum))

    def _save(self, must: bool = False) -> bool:
        """Writes a checkpoint, and whether it could. Without `must` a failure is told and the run goes on."""
        run, problem = self.state, None
        self._name_problems()
        if self.accelerator.is_main_process or self.together:
            content = run.collect() | {"seconds": self.earlier + time.monotonic()}
            try:
                state.save(self.checkpoints, content, self.config.keep, self.together)
            except OSError as error:
                if must or run.at == 0:
                    raise
                self.log.event(run.step, "not saved", f"could not save ({error}); the last checkpoint is whole")
                problem = error
        self.saved = time.monotonic()
        return not parallel.any_rank(problem is not None, self.accelerator)
