"""A cache: what frozen parts make of the samples of shards, computed once and read in training in the pictures' place.

It is a folder that mirrors the shards: for each one a tar of the same name with the same keys in the same order, so
that what stands at a position is the same with it and without. A sample has its arrays (`000000012.codes.npy`) and all
its captions, of which one is drawn as without a cache: what is made of a caption needs samples that have but one. A
sample that could not be read has a json with the reason, and keeps its position with weight 0. manifest.json says what
the arrays were computed with, and no stage reads a cache that was made otherwise.

The pictures of a validation set, and of stages that read pictures, come from shards as ever. A cache has one copy of
each sample: an augmentation that is drawn anew in each pass has no place in it.

B samples of a batch.

It does not know how the arrays are computed: `encode` writes them.
"""

import json
import shlex
import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pipeline.recipe import RecipeError
from ..pipeline.terminal import speaks
from .mirror import patiently
from .run import Data
from .samples import BadSample, Index, load_index, read_encoded
from .stream import Batch, ShardSource, Source

FORMAT = 1
PART = {
    "codes": "tokenizer", "latents": "tokenizer", "image_embedding": "clip", "text_embedding": "clip",
    "text_tokens": "text",
}  # fmt: skip
_OF_CAPTIONS = ("text_tokens",)  # a stage can make them itself of the captions, which every cache has


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache, or None where the folder has none of this format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    keys = ("arrays", "parts", "preprocessing", "source")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return manifest if all(isinstance(manifest.get(key), dict) for key in keys) else None


def describe_source(indexes: Sequence[Index]) -> dict[str, Any]:
    """The shards that a cache mirrors: sha256 and number of samples by name."""
    return {index.path.name: {"sha256": index.sha256, "samples": len(index.entries)} for index in indexes}


def differing(old: dict[str, Any], new: dict[str, Any], keys: Sequence[str]) -> str:
    """Where two manifests differ in the tables under `keys`, as key.name, the first few; empty where they agree."""
    names = [(key, name) for key in keys for name in {**new[key], **old[key]}]
    found = [f"{key}.{name}" for key, name in names if old[key].get(name) != new[key].get(name)]
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


class CachedSource:
    """A source of shards whose pictures are replaced by arrays of a cache; captions and positions are the same.

    arrays: the names to read -> shape. indexes: of the cache's shards, in the order of the source's.
    """

    def __init__(self, source: ShardSource, indexes: Sequence[Index], arrays: dict[str, tuple[int, ...]]) -> None:
        self.source, self.indexes, self.arrays = source, list(indexes), arrays

    @property
    def size(self) -> int:
        """Samples in a pass."""
        return self.source.size

    @property
    def fingerprint(self) -> str:
        """That of the shards: a run may go over to a cache of them, and back."""
        return self.source.fingerprint

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions, with `encoded` in place of the image; raises what the shards raise."""
        if not len(positions) or min(positions) < 0:
            raise ValueError(f"positions must be a non-empty sequence of numbers >= 0, got {list(positions)}")
        rows, captions, keys, reasons = zip(*(self._read_one(int(p)) for p in positions), strict=True)
        encoded = {}
        for name, column in zip(self.arrays, zip(*rows, strict=True), strict=True):
            stacked = torch.from_numpy(np.stack(column))
            encoded[name] = stacked.float() if stacked.is_floating_point() else stacked.long()
        samples = torch.tensor([int(p) for p in positions], dtype=torch.int64)
        none = torch.zeros(len(samples), 3, 0, 0)
        problems = {key: reason for key, reason in zip(keys, reasons, strict=True) if reason is not None}
        weight = torch.tensor([0.0 if key in problems else 1.0 for key in keys])
        return Batch(none, list(captions), list(keys), samples, weight, problems, encoded)

    def _read_one(self, position: int) -> tuple[list[np.ndarray], str, str, str | None]:
        shard, member = self.source.place(position)
        index = self.indexes[shard]
        key, shapes = index.sample_name(member), self.arrays.values()
        try:
            read = partial(read_encoded, entry=index.entries[member], names=list(self.arrays))
            arrays, captions = patiently(index.path, read)
            self.source.check_captions(captions)
            if [array.shape for array in arrays] != list(shapes):
                raise BadSample(f"arrays of another shape than {list(shapes)}")
            return arrays, self.source.drawn(captions, position), key, None
        except BadSample as error:
            return [np.zeros(shape, np.int8) for shape in shapes], "", key, str(error)

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions at these positions, without those that cannot be read."""
        return self.source.captions(positions)

    def meaning(self, caption: str) -> Hashable:
        """As the shards have it."""
        return self.source.meaning(caption)

    def canonical(self, caption: str) -> str:
        """As the shards have it."""
        return self.source.canonical(caption)

    def wrong(self, captions: Sequence[str], samples: Sequence[int]) -> list[list[str]]:
        """As the shards have it."""
        return self.source.wrong(captions, samples)


def source_for(stage: Any, source: Source, data: Data, against: dict[str, str], model: Path) -> Source:
    """What a stage reads: the source, or the recipe's cache of it where there is one and the stage can read it.

    against: hashes of what the stage depends on. model: the folder of those parts. A cache without `text_tokens` fits,
    for the stage makes these of the captions, which a warning says; records of several captions have no others. Raises
    RecipeError, with the keys that differ and the command that makes it anew, for a cache of other parts,
    preprocessing, captions or shards, or one that is not whole.
    """
    names = [name for name in stage.cached if PART[name] in against]
    if data.cache is None or not names or names[0] != stage.cached[0]:
        return source
    assert isinstance(source, ShardSource)  # `check_data` refuses a cache of anything else
    folder = Path(data.cache)
    manifest = read_manifest(folder)
    words = ["data", "encode", str(data.shards), "FOLDER", "--model", str(model), *(f"--what={n}" for n in names)]
    anew = f"make it with `kartina {shlex.join(words)}` and set training.data.cache=FOLDER"
    if manifest is None:
        raise RecipeError(f"training.data.cache: {folder} is no cache of this format; {anew}")
    made = [name for name in names if name in _OF_CAPTIONS and name not in manifest["arrays"]]
    names = [name for name in names if name not in made]
    parts = {part: digest for part, digest in against.items() if part in manifest["parts"]}
    needed = {PART[name]: against.get(PART[name]) for name in names}
    wanted = {"parts": needed | parts, "preprocessing": source.preprocessing, "source": describe_source(source.indexes)}
    held = manifest | {"parts": {part: manifest["parts"].get(part) for part in wanted["parts"]}}
    keys = differing(held, wanted, list(wanted))
    lacking = [name for name in names if name not in manifest["arrays"]]
    if keys or lacking:
        found = f"differs in {keys}" if keys else f"has no {', '.join(lacking)}, but {', '.join(manifest['arrays'])}"
        raise RecipeError(f"training.data.cache: {folder} does not fit the stage {stage.part}: it {found}; {anew}")
    if made and speaks():
        warnings.warn(
            f"training.data.cache: {folder} has no {', '.join(made)}, which the stage {stage.part} then makes of the "
            f"captions at each step; where samples have one caption each, {anew}",
            stacklevel=2,
        )
    return CachedSource(source, _indexes(folder, manifest, source), {n: _shape(manifest, n) for n in names})


def _shape(manifest: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(manifest["arrays"][name]["shape"])


def _indexes(folder: Path, manifest: dict[str, Any], source: ShardSource) -> list[Index]:
    """The indexes of a whole cache, in the source's order. Raises RecipeError for one that is not whole or changed."""
    if "shards" not in manifest:
        raise RecipeError(f"training.data.cache: {folder} is not finished; run its `kartina data encode` again")
    rows, found = {row["name"]: row for row in manifest["shards"]}, []
    if lost := [origin.path.name for origin in source.indexes if origin.path.name not in rows]:
        raise RecipeError(
            f"training.data.cache: {folder / lost[0]} is missing or not finished; run its `kartina data encode` again"
        )
    for origin in source.indexes:
        path = folder / origin.path.name
        index = load_index(path) if path.is_file() else None
        if index is None or index.sha256 != rows[path.name]["sha256"]:
            state = "missing" if index is None else "not what was written"
            raise RecipeError(
                f"training.data.cache: {path} is {state}; remove it and run its `kartina data encode` again"
            )
        found.append(index)
    return found


def check_data(data: Data) -> None:
    """Raises RecipeError for shards, or a cache of them, beside data of another kind, where nothing would read them."""
    for name in ("shards", "validation", "cache"):
        if data.kind != "shards" and getattr(data, name) is not None:
            raise RecipeError(
                f"training.data.{name} is of shards, and data of the kind {data.kind!r} has none; set "
                "training.data.kind=shards, or leave it out"
            )
