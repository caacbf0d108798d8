"""Writes a cache of shards: what frozen parts of a model make of each sample, computed once (`cache` says what it is).

The work is divided by shards. A shard is written beside, fsynced and renamed, so that one that is there is whole, and
a killed run goes on with the next. Any number of processes may write one cache, on one machine or on several that share
the folder: each takes its own share first (shard i mod N), then what others left, and locks what it writes. On the CPU
a process computes with one thread, in batches that begin with each shard: neither processes nor breaks change a byte.

B samples of a batch, S image side, C x h x w latents, D features of an embedding, T caption tokens.

It does not know how a cache is read in training.
"""

import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..layers.precision import without_tf32
from ..pipeline import checkpoint
from ..pipeline.built import check_built
from ..pipeline.known_models import find_model
from ..pipeline.recipe import nearest
from ..pipeline.terminal import progress_bar
from ..pipeline.whole_file import held, locked
from ..tokenizers.captions import CaptionTokenizer
from .cache import FORMAT, PART, describe_source, differing, read_manifest
from .mirror import opened
from .samples import BadSample, Entry, Index, find_shards, is_marked_bad, load_index, read_encoded, read_sample
from .stream import ShardSource, fit

BATCH = 64
_COMPARED = ("arrays", "parts", "preprocessing", "source")


def _codes(tokenizer: Any, image: Tensor, text: Tensor) -> Tensor:
    """(B, h, w), of the narrowest type that holds the codebook."""
    _expect(tokenizer.spec.kind, "codes")
    return tokenizer.encode(image).to(torch.int16 if tokenizer.spec.vocabulary <= 2**15 else torch.int32)


def _latents(tokenizer: Any, image: Tensor, text: Tensor) -> Tensor:
    """(B, 2, C, h, w): mean and log-variance of the posterior, as its `posterior` gives them, without its scale."""
    _expect(tokenizer.spec.kind, "latents")
    if not hasattr(tokenizer, "posterior"):
        raise ValueError(f"latents need a tokenizer with a posterior, got {type(tokenizer).__name__}, which has none")
    return torch.stack(tokenizer.posterior(image), dim=1)


def _text_tokens(encoder: Any, image: Tensor, text: Tensor) -> Tensor:
    """(B, T, D), zeros where its mask has no token."""
    tokens, mask = encoder(text)
    return tokens if mask is None else tokens * mask[:, :, None]


def _expect(kind: str, wanted: str) -> None:
    if kind != wanted:
        raise ValueError(f"the model's tokenizer gives {kind}, not {wanted}; encode --what {kind}")


# Of each name of `cache.PART`, by its part: (part, image (B, 3, S, S), text (B, T)) -> (B, ...). Embeddings are (B, D),
# as the towers give them, not of length 1.
ENCODERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "codes": _codes,
    "latents": _latents,
    "image_embedding": lambda clip, image, text: clip.encode_image(image),
    "text_embedding": lambda clip, image, text: clip.encode_text(text),
    "text_tokens": _text_tokens,
}


@dataclass
class EncodeReport:
    """samples: in the whole cache. bad: shard/key -> reason. written, kept: how many shards came now, and were there.
    left: shards that another run is still writing.
    """

    samples: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    written: int = 0
    kept: int = 0
    left: list[str] = field(default_factory=list)


class _Encoder:
    """The frozen parts of a model folder that compute what is wanted."""

    def __init__(self, folder: Path, what: Sequence[str], device: str) -> None:
        for name in what:
            if name not in PART:
                raise ValueError(f"--what {name!r} is unknown; {nearest(name, list(PART))}")
        recipe, card = checkpoint.load_recipe(folder), checkpoint.read_card(folder)
        self.what, self.device, self.size = sorted(set(what)), device, recipe.image_size
        check_built(folder, card, recipe)
        names = sorted({PART[name] for name in what})
        self.parts = {part: checkpoint.load_part(folder, recipe, part, device) for part in names}
        self.hashes = {part: digest for part, digest in checkpoint.hashes(card, recipe).items() if part in self.parts}
        self.captions: Any = None
        if any(hasattr(part, "text_vocab") for part in self.parts.values()):
            self.captions = CaptionTokenizer.load(folder / "captions.json")
            self.hashes["captions"] = checkpoint.file_hash(folder / "captions.json")
        for part in self.parts.keys() & card["parts"]:
            for other, digest in card["parts"][part].get("trained_against", {}).items():
                if self.hashes.get(other, digest) != digest:
                    raise checkpoint.ModelError(f"{folder}: {part} was trained against another {other}; train it again")

    @torch.no_grad()
    def __call__(self, image: Tensor, captions: list[str]) -> dict[str, np.ndarray]:
        """image (B, 3, S, S) and B captions -> arrays (B, ...) by name."""
        image, text = image.to(self.device), {"tokenizer": torch.zeros(0)}
        if "clip" in self.parts:
            text["clip"] = self.parts["clip"].frame(*self.captions.encode(captions)).to(self.device)  # (B, T)
        if encoder := self.parts.get("text"):
            text["text"] = encoder.frame(*getattr(encoder, "captions", self.captions).encode(captions)).to(self.device)
        made = {name: ENCODERS[name](self.parts[PART[name]], image, text[PART[name]]) for name in self.what}
        return {name: array.cpu().numpy() for name, array in made.items()}

    def describe(self, shards: Sequence[Path]) -> dict[str, Any]:
        """The manifest of a cache of these shards. Raises ValueError where the parts cannot give what is wanted."""
        one = self(torch.zeros(1, 3, self.size, self.size), [""])
        source = ShardSource(shards, self.size, seed=0)
        if len({index.path.name for index in source.indexes}) < len(shards):
            raise ValueError("two of the shards have the same name, which a cache keeps; pack them with other names")
        return {
            "format": FORMAT,
            "arrays": {name: {"dtype": str(a.dtype), "shape": list(a.shape[1:])} for name, a in one.items()},
            "parts": self.hashes,
            "preprocessing": source.preprocessing,
            "source": describe_source(source.indexes),
        }


def encode(
    shards: Path | str | Sequence[Path | str],
    out: Path | str,
    model: Path | str,
    what: Sequence[str] = ("codes",),
    processes: int | None = None,
    device: str = "cpu",
) -> EncodeReport:
    """Writes the cache of `shards` into `out`, or goes on with it; names every sample that cannot be read.

    model: a folder or a known name. what: of `cache.PART`. processes: as many as cores on the CPU, or as GPUs, if None.
    Raises ValueError where `out` holds anything else, such as a cache made otherwise (its keys are named).
    """
    found, folder, target = find_shards(shards), find_model(str(model)), Path(out)
    _begin(target, manifest := _Encoder(folder, what, device).describe(found))
    before = _count(target, found)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # without: macOS
    many = processes or {"cpu": cores, "cuda": torch.cuda.device_count()}.get(device) or 1
    many = max(1, min(many, len(found) - before))
    with progress_bar("encoding") as progress:
        jobs = [(found, target, folder, list(what), _place(device, k), k, many) for k in range(many)]
        if before < len(found):
            _run(jobs, lambda: progress(_count(target, found), len(found)))
    report = _finish(target, manifest)
    report.kept, report.written = before, len(found) - before - len(report.left)
    return report


def _count(out: Path, shards: Sequence[Path]) -> int:
    return sum((out / shard.name).is_file() for shard in shards)


def _place(device: str, number: int) -> str:
    """The device of a process: with `cuda` they take turns."""
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


def _run(jobs: list[tuple[Any, ...]], report: Callable[[], None]) -> None:
    """Runs the jobs, one in this process or each in its own. Raises ValueError where one fails."""
    if len(jobs) == 1:
        _write_share(report, *jobs[0])
        return
    workers = [multiprocessing.get_context("spawn").Process(target=_worker, args=job) for job in jobs]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.5)
                report()
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    failed = [worker for worker in workers if worker.exitcode]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(workers)} processes failed, the first with exit code {failed[0].exitcode}; the "
            "shards that are there are whole: run the same command again to go on"
        )


def _worker(*job: Any) -> None:
    try:
        _write_share(lambda: None, *job)
    except (ValueError, OSError) as error:
        print(f"kartina: {error}", file=sys.stderr)
        sys.exit(2)


def _write_share(
    report: Callable[[], None], shards: Sequence[Path], out: Path, folder: Path, what: Sequence[str], device: str,
    number: int, many: int,
) -> None:  # fmt: skip
    """Writes every shard that no other process writes, those of its own number first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    without_tf32()
    try:
        encoder = _Encoder(folder, what, device)
        _begin(out, encoder.describe(shards))  # in a process of its own the folders may have changed
        for turn in range(number, number + many):
            for shard in shards[turn % many :: many]:
                _write_shard(load_index(shard), out / shard.name, encoder, report)
    finally:
        torch.set_num_threads(threads)


def _write_shard(source: Index, path: Path, encoder: _Encoder, report: Callable[[], None]) -> None:
    """Writes one shard whole, unless it is there or another process is at it."""
    if path.is_file():
        return
    beside = path.with_name(f".{path.name}.writing")
    with held(beside) as target:
        if target is None or path.is_file():
            return
        with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar, opened(source.path) as file:
            for start in range(0, len(source.entries), BATCH):
                for name, data in _members(file, source.entries[start : start + BATCH], encoder):
                    info = tarfile.TarInfo(name)  # times and owners stay zero: equal input, equal shards
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                report()
                _stop_alone()
        target.flush()
        os.fsync(target.fileno())
        os.replace(beside, path)
    load_index(path)  # written beside it
    report()


def _members(file: BinaryIO, entries: Sequence[Entry], encoder: _Encoder) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of what a cache has of these samples, in order."""
    image, captions, bad = torch.zeros(len(entries), 3, encoder.size, encoder.size), [[""]] * len(entries), {}
    for k, entry in enumerate(entries):
        try:
            picture, captions[k] = read_sample(file, entry)
            image[k] = fit(picture, encoder.size)
        except BadSample as error:
            bad[k] = str(error)
        if len(captions[k]) > 1 and any(name.startswith("text") for name in encoder.what):
            raise ValueError(f"{entry.key} has {len(captions[k])} captions, {encoder.what} keep one; leave text out")
    arrays = encoder(image, [each[0] for each in captions])
    for k, entry in enumerate(entries):
        if k in bad:
            yield f"{entry.key}.json", json.dumps({"bad": bad[k]}).encode()
            continue
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array[k])
            yield f"{entry.key}.{name}.npy", content.getvalue()
        kind, data = ("txt", "\n".join(captions[k]).encode()) if captions[k][0] else ("json", b'{"captionless": true}')
        yield f"{entry.key}.{kind}", data


def _stop_alone() -> None:
    """Ends a process whose parent was killed: nobody waits for it any more."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def _begin(out: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest into an empty folder. Raises ValueError where the folder holds anything but this cache."""
    out.mkdir(parents=True, exist_ok=True)
    held = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if held and read_manifest(out) is None:
        raise ValueError(f"{out} has content and no cache of this format; choose a new or empty folder")
    with locked(out):
        known = read_manifest(out)
        if known is None:
            checkpoint.write_text(out / "manifest.json", json.dumps(manifest, indent=1))
        elif keys := differing(known, manifest, _COMPARED):
            raise ValueError(f"{out} is a cache made otherwise: it differs in {keys}; choose a new folder for this one")
        elif lost := [row for row in known.get("shards", []) if not (out / row["name"]).is_file()]:
            here = [row for row in known["shards"] if row not in lost]  # another device may write those otherwise
            checkpoint.write_text(out / "manifest.json", json.dumps(known | {"shards": here}, indent=1))


def _finish(out: Path, manifest: dict[str, Any]) -> EncodeReport:
    """Counts what is there, and adds to the manifest of a whole cache the hash of each shard."""
    report, rows = EncodeReport(), []
    for name in manifest["source"]:
        if not (out / name).is_file():
            report.left.append(name)
            continue
        index = load_index(out / name)
        rows.append({"name": name, "samples": len(index.entries), "bytes": index.bytes, "sha256": index.sha256})
        with open(index.path, "rb") as file:
            for member, entry in enumerate(index.entries):
                try:
                    if is_marked_bad(entry):
                        read_encoded(file, entry, [])
                except BadSample as error:
                    report.bad[index.sample_name(member)] = str(error)
        report.samples += len(index.entries)
    with locked(out):
        known = {row["name"]: row for row in (read_manifest(out) or manifest).get("shards", [])}
        for row in rows:
            if not report.left and row != known.get(row["name"], row):
                raise ValueError(f"{out / row['name']} is not what was written; remove it and run the command again")
        if not report.left:
            checkpoint.write_text(out / "manifest.json", json.dumps(manifest | {"shards": rows}, indent=1))
    return report
