"""How much a cache saves: samples/s of training steps of a DALL-E, with codes from a cache and computed on the fly.

Run as `python -m kartina.benchmarks.encode`, or by path with the package installed. Pictures of shapes are packed, the
recipe's tokenizer (with fresh weights: they do not change the time) encodes them, and both ways take turns in one run.
It checks that both have the same losses. `--json` prints one JSON line. Without other work on the machine only.
"""

import argparse
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.images import to_pil
from kartina.pipeline.recipe import Recipe, build
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training import run as runs
from kartina.training.cache import CachedSource, source_for
from kartina.training.data.shapes import ShapesSource
from kartina.training.encode import encode
from kartina.training.optim import build_optimizers
from kartina.training.shards import ShardWriter
from kartina.training.stages.dalle import DALLEStage
from kartina.training.stream import ShardSource, Source, prefetch


def prepare(recipe: Recipe, folder: Path, count: int) -> tuple[ShardSource, Source, float]:
    """Packed pictures, their cache, and how many samples a second were encoded by one process."""
    batch = ShapesSource(size=recipe.image_size).read(range(count))
    with ShardWriter(folder / "shards") as writer:
        for picture, caption in zip(to_pil(batch.image), batch.captions, strict=True):
            data = io.BytesIO()
            picture.save(data, "PNG")
            writer.write({"png": data.getvalue(), "txt": caption.encode()})
    torch.manual_seed(0)
    checkpoint.save_part(folder / "model", recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    captions = CaptionTokenizer.train(batch.captions, recipe.captions.vocab_size, recipe.captions.context_length)
    captions.save(folder / "model" / "captions.json")
    begin = time.perf_counter()
    encode(folder / "shards", folder / "cache", folder / "model", processes=1)
    speed = count / (time.perf_counter() - begin)
    against = {"tokenizer": checkpoint.read_card(folder / "model")["parts"]["tokenizer"]["hash"]}
    against["captions"] = checkpoint.file_hash(folder / "model" / "captions.json")
    data = runs.Data(kind="shards", shards=str(folder / "shards"), cache=str(folder / "cache"))
    pictures = ShardSource(folder / "shards", recipe.image_size, seed=0)
    return pictures, source_for(DALLEStage, pictures, data, against, folder / "model"), speed


class Steps:
    """Training steps on one source, from the same start."""

    def __init__(self, recipe: Recipe, config: runs.Stage, source: Source, model: Path) -> None:
        torch.manual_seed(0)
        self.stage = DALLEStage(recipe, config, source, model, 0, torch.device("cpu"))
        self.optimizers = build_optimizers(self.stage.network, config.optimizer)
        self.source = source
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def take(self, first: int, count: int, batch_size: int) -> None:
        """Some steps; their mean time is one entry of `seconds`."""
        positions = [range(step * batch_size, (step + 1) * batch_size) for step in range(first, first + count)]
        begin = time.perf_counter()
        for step, batch in enumerate(prefetch(self.source, positions), first):
            for _, (loss, number), _ in self.stage.updates(batch, step):
                (loss / number).backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                self.losses.append(float(loss.detach()))
        self.seconds.append((time.perf_counter() - begin) / count)


def measure(name: str, batch_size: int, rounds: int, steps: int) -> dict[str, Any]:
    """Both speeds, each the best of its rounds after one to warm up, and their ratio."""
    recipe, training = runs.load(name, [])
    assert training is not None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures, cached, speed = prepare(recipe, folder, 4 * batch_size)
        assert isinstance(cached, CachedSource)
        ways = [Steps(recipe, training.stages["prior"], source, folder / "model") for source in (pictures, cached)]
        for number in range(rounds + 1):
            for way in ways:
                way.take(number * steps, steps, batch_size)
    if not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ways[0].losses, ways[1].losses, strict=True)):
        raise SystemExit(f"the cache trains otherwise: {ways[0].losses} and {ways[1].losses}")
    fly, cache = (batch_size / min(way.seconds[1:]) for way in ways)
    return {
        "recipe": name,
        "batch": batch_size,
        "threads": torch.get_num_threads(),
        "encoded_per_second": round(speed, 1),
        "on_the_fly_per_second": round(fly, 1),
        "cached_per_second": round(cache, 1),
        "ratio": round(cache / fly, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--recipe", default="emoji/dalle", help="one with a DALL-E and a tokenizer of codes")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=3, help="of each way; the best one counts")
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    options = parser.parse_args()
    result = measure(options.recipe, options.batch, options.rounds, options.steps)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            "{ratio} times as fast: {cached_per_second} samples/s from the cache, {on_the_fly_per_second} on the fly; "
            "{encoded_per_second} samples/s encoded".format(**result)
        )


if __name__ == "__main__":
    main()
