"""What the training loop costs beside the work itself, how long it waits for data, and what a second process brings.

    python benchmarks/loop.py [MODEL:STAGE ...]

- loop: the time of a step in `train_stage` against the same forward pass, backward pass, clipping, optimizers and
  moving average in a bare `for`. Steps of both alternate, and what one reads ahead is read during the other's step: the
  median of the pairs' ratios, and their quartiles; then all steps together, of which the loop logs every twentieth.
  Where codes begin anew in the midst of a training, both begin them anew, which is not counted.
- wait: the share of the time that the log calls waiting, with two processes that read.
- two processes: samples a second of two that share the recipe's steps, one thread each, against one with one thread;
  beside it of two that have the recipe's batch each, and what the machine itself leaves to two that run at once and
  have nothing to do with each other. Rounds of the four alternate; medians of the rounds' ratios.

On an idle machine; of shipped models, each stage as the recipe that lies beside its weights has it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from itertools import chain, count
from pathlib import Path

import torch
from accelerate import Accelerator

from kartina.layers.attention import short_in_float32
from kartina.pipeline import checkpoint
from kartina.pipeline.known_models import SHIPPED
from kartina.training import cache, exchange, parallel
from kartina.training import run as runs
from kartina.training.__main__ import hashes_of, keep_memory
from kartina.training.loop import train_stage
from kartina.training.optim import EMA, build_optimizers, fast_bf16, rate
from kartina.training.run import division
from kartina.training.sources import source_of
from kartina.training.stages import STAGES
from kartina.training.stopping import Stop
from kartina.training.stream import prefetch, rank_positions

STEPS, WARM = 44, 4  # of which the log tells of 20 and 40
COUNTED, ROUNDS = 20, 3
QUIET = ["preview_every=100000", "validate_every=100000", "save_minutes=1000"]


def build(model, name, workers=0):
    """Recipe's training half, the stage and its source, as the trainer makes them."""
    overrides = [f"stages.{name}.{word}" for word in (*QUIET, f"steps={STEPS}")]
    recipe, training = runs.load(recipe_of(model), [*overrides, f"training.data.workers={workers}"])
    source = source_of(recipe, training.data_of(name))
    kind = STAGES[recipe.parts[name]["kind"]]
    torch.manual_seed(0)
    stage = kind(recipe, training.stages[name], source, SHIPPED / model, 0, torch.device("cpu"))
    against = hashes_of(recipe, SHIPPED / model, kind.needs(recipe))
    return training, stage, cache.source_for(stage, source, training.data, against, SHIPPED / model)


def recipe_of(model):
    return str(SHIPPED / model / "recipe.yaml")


def in_the_loop(model, name, accelerator, workers=0, between=lambda: None):
    """(seconds of each step but the last, share of waiting, the step before which codes begin anew or None); `between`
    is called before each step, and not counted.
    """
    training, stage, source = build(model, name, workers)
    updates, begun, ended = stage.updates, [], []

    def noted(batch, step):
        ended.append(time.perf_counter())
        between()
        begun.append(time.perf_counter())
        return updates(batch, step)

    stage.updates = noted
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            {"stage": name, "data": source.fingerprint},
            stage,
            training,
            source,
            None,
            Path(folder),
            accelerator,
            Stop(),
        )
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    waited = [line["wait"] for line in lines if "wait" in line and 1 < line["step"] < STEPS]
    times = [end - begin for begin, end in zip(begun[:-1], ended[1:], strict=True)]
    return times, statistics.fmean(waited), stage.restart_step


def bare(model, name, accelerator):
    """Takes a step of the work alone, and gives its seconds, each time it is asked."""
    training, stage, source = build(model, name)
    config = training.stages[name]
    assert division(config, 1)[1] == 1 and list(stage.networks) == [name], f"{name}: a step of one pass and one network"
    network = stage.networks[name]
    stage.forward[name] = parallel.prepare(network, accelerator, shard=False, recompute=False)
    optimizers = build_optimizers(network, config.optimizer, training.precision == "bf16")
    ema = EMA(network, config.ema)
    batch_size = config.global_batch
    positions = chain.from_iterable(rank_positions(at, batch_size, 0, 1, batch_size) for at in count())
    with closing(prefetch(source, positions)) as stream:
        batch = next(stream)
        for step in count():
            if step == stage.restart_step:  # else it would compute with other numbers, which take another time
                stage.restart()
            begun = time.perf_counter()
            _, (loss, total), _ = next(stage.updates(exchange.to_device(batch, accelerator.device), step))
            (loss / total).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, STEPS, config.optimizer)
                optimizer.step()
            ema.update()
            network.zero_grad(set_to_none=True)
            batch = next(stream)
            yield time.perf_counter() - begun


def side_by_side(model, name, accelerator):
    """Seconds of the steps of both, in pairs that were taken one after the other."""
    other, alone = bare(model, name, accelerator), []
    looped, _, anew = in_the_loop(model, name, accelerator, between=lambda: alone.append(next(other)))
    other.close()
    pairs = enumerate(zip(looped, alone[:-1], strict=True))
    return [pair for step, pair in pairs if step >= WARM and step + 1 != anew]  # at the end of the step before


def samples_a_second(model, name, runs_at_once, processes, batches=1):
    """Of so many runs of `kartina train` at once, in all; each of so many processes with one thread each.

    batches: of the recipe, that a step has.
    """
    with ExitStack() as homes:
        folders = [Path(homes.enter_context(tempfile.TemporaryDirectory())) for _ in range(runs_at_once)]
        for folder in folders:
            lay_out(folder / "model", model, name)
        batch = batches * runs.load(recipe_of(model), [])[1].stages[name].global_batch
        own = *QUIET, f"steps={2 * COUNTED}", f"log_every={COUNTED}", f"global_batch={batch}"
        words = [f"stages.{name}.{word}" for word in own]
        command = [sys.executable, "-m", "kartina.cli", "train", recipe_of(model), "--stage", name, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        started: list[subprocess.Popen] = []
        homes.callback(lambda: [end(process) for process in started])  # what still runs where one has failed
        for folder in folders:
            full = [*command, f"--processes={processes}", f"--run={folder}"]
            with (folder / "said").open("wb") as said:
                started.append(subprocess.Popen(full, env=environment, stdout=said, stderr=said))
        for process, folder in zip(started, folders, strict=True):
            assert process.wait() == 0, (folder / "said").read_text()
        return sum(map(rate_of, folders))


def end(process):
    """A trainer saves before it ends."""
    process.terminate()
    process.wait(timeout=60)


def lay_out(folder, model, name):
    """A model folder with all that the stage reads: the other parts of the shipped model."""
    folder.mkdir()
    shutil.copy(SHIPPED / model / "captions.json", folder)
    recipe = checkpoint.load_recipe(SHIPPED / model)
    for part in recipe.parts:
        if part != name:
            checkpoint.save_part(folder, recipe, part, checkpoint.load_weights(SHIPPED / model, part))


def rate_of(run):
    """Samples a second of the second half of a run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first, last = [line for line in lines if "samples" in line][-2:]
    return (last["samples"] - first["samples"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    torch.set_flush_denormal(True)
    keep_memory()  # as the trainer does
    accelerator = Accelerator(mixed_precision="bf16" if fast_bf16(torch.device("cpu")) else "no", cpu=True)
    words = sys.argv[1:] or ["shapes/dalle:tokenizer", "shapes/dalle:prior", "shapes/dalle:clip"]
    for word in words:
        model, name = word.split(":")
        with short_in_float32(accelerator.mixed_precision == "bf16"):  # as the loop does
            pairs = side_by_side(model, name, accelerator)
        looped, alone = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
        low, ratio, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        together = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
        print(
            f"{word}: a step {looped:.0f} ms in the loop, {alone:.0f} ms bare: {ratio:.3f} [{low:.3f}, {high:.3f}],",
            end=" ",
        )
        print(f"{together:.3f} with those that log")
        wait = in_the_loop(model, name, accelerator, workers=2)[1]
        print(f"{word}: waiting for data with two workers {100 * wait:.2f} % of the time", flush=True)
    for word in words:
        model, name = word.split(":")
        ways = (1, 1), (1, 2), (1, 2, 2), (2, 1)
        found = [[samples_a_second(model, name, *how) for how in ways] for _ in range(ROUNDS)]
        one, two, *_ = (statistics.median(each) for each in zip(*found, strict=True))
        shares = [statistics.median(rounds[i] / rounds[0] / 2 for rounds in found) for i in (1, 2, 3)]
        print(f"{word}: {one:.1f} samples/s on one process, {two:.1f} on two: {shares[0]:.2f} of twice,", end=" ")
        print(f"with the batch of one each {shares[1]:.2f}; two that run apart bring {shares[2]:.2f}", flush=True)


if __name__ == "__main__":
    main()
