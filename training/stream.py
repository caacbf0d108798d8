"""The stream of samples: what stands at a position is a pure function of (seed, pass, position).

Pass p holds the positions p * total ... (p + 1) * total - 1. Shards are permuted by (seed, pass) and taken in windows
of W; the members of a window are permuted together. So reading stays near one place, a position is found in O(window),
and neither ranks nor workers nor a restart change what stands where: a rank simply reads its own positions.
Permutations sort the raw words of Philox (Salmon 2011, doi:10.1145/2063384.2063405), which numpy keeps fixed across
versions.

B samples, S image side, W shards in a window.

It does not know devices, the model or the objective.
"""

import contextlib
import hashlib
import logging
import signal
from collections import OrderedDict, deque
from collections.abc import Generator, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..layers import random
from ..pipeline.images import fit as fit
from ..pipeline.terminal import followed, speaks
from .mirror import patiently
from .samples import BadSample, Index, find_shards, load_index, read_captions, read_sample
from .shards import check_whole
from .stopping import ends_with_parent

_log = logging.getLogger(__name__)
_SHARDS, _MEMBERS = 0, 1  # the two uses of Philox, kept apart by its counter
FIT = "upright RGB over white, centre square, box to about twice the side, bicubic"  # what `fit` reads and does
_WORD = 2**64 - 1
NO_CAPTION = (
    "captions are read here, and {} packed without one; put a .txt beside each picture and pack again, or train "
    "a recipe that reads none, as shapes/vqvae"
)


@dataclass
class Batch:
    """image float32 (B, 3, S, S) in [-1, 1]; captions, keys; samples int64 (B,), the positions; weight float32 (B,).

    A weight is 1, or 0 for a sample that could not be read; problems says why, by key. encoded: what a cache holds in
    the picture's place, by name (see `samples.ARRAYS`), integers as int64; the image is then (B, 3, 0, 0). labels:
    int64 (B,), the class of each, or None where the source knows no classes. told: all captions that are true of each,
    or empty where a source knows the drawn ones alone.
    """

    image: Tensor
    captions: list[str]
    keys: list[str]
    samples: Tensor
    weight: Tensor
    problems: dict[str, str] = field(default_factory=dict)
    encoded: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    told: list[Sequence[str]] = field(default_factory=list)


class Source(Protocol):
    """Anything that batches are read from: `size` is the number of samples in a pass, None where there is no end."""

    @property
    def size(self) -> int | None:
        """Samples in a pass."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data in equal order; a run resumes only on data of the same fingerprint."""

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch that stands at these positions: equal for equal arguments, on every rank and after a restart."""

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions at these positions, without those of samples that cannot be read; no picture is decoded."""

    def meaning(self, caption: str) -> Hashable:
        """Equal for captions that say the same, so that a contrastive loss does not tell them apart."""

    def canonical(self, caption: str) -> str:
        """The one wording of all captions of its language that mean the same; ValueError where none is known."""

    def wrong(self, captions: Sequence[str], samples: Sequence[int]) -> list[list[str]]:
        """For each true caption those one fact away, so false of its image: the hardest first, the rest as drawn.

        At least one each; ValueError where none is known.
        """


def permutation(seed: int, pass_: int, use: int, part: int, count: int) -> np.ndarray:
    """A permutation of range(count), int64 (count,): a pure function of its arguments, in every numpy version."""
    philox = np.random.Philox(key=[seed & _WORD, pass_], counter=[0, 0, use, part])
    return np.argsort(philox.random_raw(count), kind="stable")


class ShardSource:
    """Reads tar shards by position.

    shards: a folder, or a list of files. size: the image side. window: shards whose members are mixed. A sample that
    cannot be read keeps its position with weight 0, an image of zeros and no caption, and is named in the batch's
    `problems`. Of several captions, one a line, one is drawn at each position.

    part: None for all samples; "validation" for about `share` of them, "train" for the rest. A hash of what a sample is
    called in its json, or of its picture, says where it belongs: however it is packed, it stays there. Only a
    validation part may be empty.

    captioned: whether captions are read of it; then a sample that was packed without one counts as unreadable.
    """

    captioned = False

    def __init__(
        self,
        shards: Path | str | Sequence[Path | str],
        size: int,
        seed: int,
        window: int = 4,
        part: Literal["train", "validation"] | None = None,
        share: float = 0.0,
    ):
        if size < 1 or window < 1:
            raise ValueError(f"image side and window must be at least 1, got {size} and {window}")
        self.indexes: list[Index] = [load_index(path) for path in followed(find_shards(shards), "looking at shards")]
        self.side, self.seed, self.window, self.part, self.share = size, seed, window, part, share
        self._members = [
            np.array([i for i, e in enumerate(index.entries) if self._holds(e.origin)], np.int64)
            for index in self.indexes
        ]
        self._counts = np.array([len(members) for members in self._members], dtype=np.int64)
        self._total = int(self._counts.sum())
        self._last_pass = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        check_whole(shards, self.indexes)
        for index in self.indexes:
            if index.problem and speaks():
                _log.warning("shard %s: %s", index.path.name, index.problem)
        if not self._total and part != "validation":
            held = f", or all are held out (validation_share {share:g})" if part else ""
            raise ValueError(
                f"no samples in {len(self.indexes)} shards{held}; `kartina data check FOLDER` says what is wrong"
            )

    def _holds(self, origin: str) -> bool:
        """Whether a sample of this origin (64 bits, hexadecimal) belongs to the part."""
        return self.part is None or (self.part == "validation") == (int(origin, 16) < self.share * 2**64)

    @property
    def size(self) -> int:
        """Samples in a pass."""
        return self._total

    @property
    def fingerprint(self) -> str:
        """A hash over the shards and what orders them: a run that resumes compares it."""
        part = [] if self.part is None else [f"{self.part} {self.share}"]
        words = [f"{self.seed} {self.window}", *part, *(index.sha256 for index in self.indexes)]
        return hashlib.sha256(" ".join(words).encode()).hexdigest()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to a picture before anything reads it: a cache was made with the same, or is refused.

        A random augmentation belongs here, by name, so that no cache is made of one of its draws.
        """
        return {"image_size": self.side, "fit": FIT}

    def place(self, position: int) -> tuple[int, int]:
        """(shard, member) at a position."""
        pass_, offset = divmod(position, self._total)
        order, starts = self._pass(pass_)
        part = int(np.searchsorted(starts, offset, side="right")) - 1
        chosen = order[part * self.window : (part + 1) * self.window]
        shards, members = self._window(pass_, part, chosen)
        at = offset - int(starts[part])
        return int(shards[at]), int(members[at])

    def _pass(self, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in a pass, and the offset at which each window begins; the last one is remembered."""
        known, order, starts = self._last_pass
        if known != pass_:
            order = permutation(self.seed, pass_, _SHARDS, 0, len(self._counts))
            starts = np.concatenate([[0], np.cumsum(self._counts[order])])[:: self.window]
            self._last_pass = pass_, order, starts  # one assignment: a reader in another thread sees a whole one
        return order, starts

    def _window(self, pass_: int, part: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and member of each sample of a window, in reading order; the last few windows are remembered."""
        known = self._windows.get((pass_, part))
        if known is not None:
            return known
        counts = self._counts[chosen]
        mixed = permutation(self.seed, pass_, _MEMBERS, part, int(counts.sum()))
        shards = np.repeat(chosen, counts)[mixed]
        members = np.concatenate([self._members[shard] for shard in chosen])[mixed]
        self._windows[pass_, part] = shards, members
        while len(self._windows) > 4:
            self._windows.popitem(last=False)
        return shards, members

    def _read_one(self, position: int) -> tuple[Tensor, str, str, str | None, Sequence[str]]:
        shard, member = self.place(position)
        index = self.indexes[shard]
        key = index.sample_name(member)
        try:
            picture, captions = patiently(index.path, partial(read_sample, entry=index.entries[member]))
            self.check_captions(captions)
            return fit(picture, self.side), self.drawn(captions, position), key, None, captions
        except BadSample as error:
            return torch.zeros(3, self.side, self.side), "", key, str(error), ()

    def check_captions(self, captions: Sequence[str]) -> None:
        """Raises BadSample for a sample without a caption where captions are read."""
        if self.captioned and not captions[0]:
            raise BadSample(NO_CAPTION.format("it was"))

    def drawn(self, captions: Sequence[str], position: int) -> str:
        """That of a sample's captions which stands at a position: another pass draws anew."""
        if len(captions) == 1:
            return captions[0]
        return captions[int(random.integers(self.seed, 0, torch.tensor([position]), (), "caption", len(captions)))]

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions. Raises ValueError for a negative position."""
        if not len(positions) or min(positions) < 0:
            raise ValueError(f"positions must be a non-empty sequence of numbers >= 0, got {list(positions)}")
        images, captions, keys, reasons, told = zip(*(self._read_one(int(p)) for p in positions), strict=True)
        samples = torch.tensor([int(p) for p in positions], dtype=torch.int64)
        problems = {key: reason for key, reason in zip(keys, reasons, strict=True) if reason is not None}
        weight = torch.tensor([0.0 if key in problems else 1.0 for key in keys])
        return Batch(torch.stack(images), list(captions), list(keys), samples, weight, problems, told=list(told))

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions at these positions, without those that cannot be read. Raises ValueError where all samples were
        packed without.
        """
        found, without = [], 0
        for position in positions:
            shard, member = self.place(int(position))
            index = self.indexes[shard]
            with contextlib.suppress(BadSample):
                told = patiently(index.path, partial(read_captions, entry=index.entries[member]))
                without += not told[0]
                found += [self.drawn(told, int(position))] if told[0] else []
        if without and not found:
            raise ValueError(NO_CAPTION.format("the samples were"))
        return found

    def meaning(self, caption: str) -> Hashable:
        """Captions mean the same if they are the same but for case and outer space."""
        return caption.strip().lower()

    def canonical(self, caption: str) -> str:
        """Nobody knows another wording of these captions: ValueError."""
        raise ValueError("the captions of shards have no canonical wording; set canonical=0 in the stage's objective")

    def wrong(self, captions: Sequence[str], samples: Sequence[int]) -> list[list[str]]:
        """Nobody knows what is false of these pictures: ValueError."""
        raise ValueError("shards have no minimal wrong captions; set stages.clip.objective.wrong_captions=0")


def rank_positions(step: int, global_batch: int, rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """Positions of one rank in one optimizer step, a list for each micro-batch.

    Step s holds the positions s * global_batch ... (s + 1) * global_batch - 1 for any division over ranks and
    micro-batches. Raises ValueError where world * micro_batch does not divide global_batch.
    """
    if not 0 <= rank < world or micro_batch < 1 or global_batch % (world * micro_batch):
        raise ValueError(
            f"global_batch must be a multiple of world * micro_batch and 0 <= rank < world, got global_batch "
            f"{global_batch}, world {world}, micro_batch {micro_batch}, rank {rank}"
        )
    share = global_batch // world
    start = step * global_batch + rank * share
    return [list(range(at, at + micro_batch)) for at in range(start, start + share, micro_batch)]


def prefetch(source: Source, positions: Iterable[Sequence[int]], ahead: int = 2, workers: int = 0) -> Generator[Batch]:
    """Batches at each list of positions, in order, read up to `ahead` batches early (by each worker).

    workers: processes that read; 0 is one thread of this process. An error of the source is raised here, at its turn.
    """
    return _by_workers(source, positions, ahead, workers) if workers else _by_thread(source, positions, ahead)


def _by_thread(source: Source, positions: Iterable[Sequence[int]], ahead: int) -> Generator[Batch]:
    # One core, for this thread alone: a second pool of workers would wait beside the one that trains, and slow it.
    pool = ThreadPoolExecutor(1, "stream", initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Batch]] = deque()
    try:
        for wanted in positions:
            pending.append(pool.submit(source.read, wanted))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Reads(torch.utils.data.Dataset):
    """A source as torch's DataLoader wants it: indexed by a whole list of positions."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitems__(self, positions: list[int]) -> Batch:
        return self.source.read(positions)

    def __getitem__(self, position: int) -> Batch:
        return self.source.read([position])


def _whole(batch: Batch) -> Batch:
    return batch


def _end_with_trainer(worker: int) -> None:
    """A signal to the whole group asks the trainer to save, which needs no dead workers; they end with it, at once
    where it is killed: they hold its run folder's lock.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if (begin := ends_with_parent(signal.SIGKILL)) is not None:
        begin()


def _by_workers(source: Source, positions: Iterable[Sequence[int]], ahead: int, workers: int) -> Generator[Batch]:
    loader = torch.utils.data.DataLoader(
        _Reads(source), batch_sampler=positions, num_workers=workers, prefetch_factor=ahead, collate_fn=_whole,
        worker_init_fn=_end_with_trainer,
    )  # fmt: skip
    read = iter(loader)
    try:
        yield from read
    finally:
        read._shutdown_workers()  # now, not whenever the iterator is collected
