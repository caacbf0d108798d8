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
from collections import OrderedDict, deque
from collections.abc import Generator, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .samples import BadSample, Index, find_shards, load_index, read_caption, read_sample

_log = logging.getLogger(__name__)
_SHARDS, _MEMBERS = 0, 1  # the two uses of Philox, kept apart by its counter
_WORD = 2**64 - 1


@dataclass
class Batch:
    """image float32 (B, 3, S, S) in [-1, 1]; captions, keys; samples int64 (B,), the positions; weight float32 (B,).

    A weight is 1, or 0 for a sample that could not be read.
    """

    image: Tensor
    captions: list[str]
    keys: list[str]
    samples: Tensor
    weight: Tensor


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


def fit(picture: Image.Image, size: int) -> Tensor:
    """The centre square of an RGB picture, float32 (3, S, S) in [-1, 1]: BOX to about twice S, then BICUBIC."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))  # first, or the resize looks past the crop's edge
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    pixels = torch.from_numpy(np.array(picture))  # (S, S, 3) uint8
    return pixels.permute(2, 0, 1).float() / 127.5 - 1  # (3, S, S)


def _is_held_out(origin: str, share: float) -> bool:
    """Whether a sample of this origin (64 bits, hexadecimal) is among the share that training never sees."""
    return int(origin, 16) < share * 2**64


class ShardSource:
    """Reads tar shards by position.

    shards: a folder, or a list of files. size: the image side. window: shards whose members are mixed. A sample that
    cannot be read keeps its position with weight 0, an image of zeros and no caption, and is named in `bad`
    (shard/key -> reason); when more than `bad_limit` of all samples are bad, `read` raises ValueError.

    part: None for all samples; "validation" for about `share` of them, "train" for the rest. A hash of what a sample is
    called in its json, or of its picture, says where it belongs: however it is packed, it stays there. Only a
    validation part may be empty.
    """

    def __init__(
        self,
        shards: Path | str | Sequence[Path | str],
        size: int,
        seed: int,
        window: int = 4,
        bad_limit: float = 0.05,
        part: Literal["train", "validation"] | None = None,
        share: float = 0.0,
    ):
        if size < 1 or window < 1:
            raise ValueError(f"image side and window must be at least 1, got {size} and {window}")
        self.indexes: list[Index] = [load_index(path) for path in find_shards(shards)]
        self.part, self.share = part, share
        if part is not None:
            for index in self.indexes:
                index.entries = [e for e in index.entries if (part == "validation") == _is_held_out(e.origin, share)]
        self.side, self.seed, self.window, self.bad_limit = size, seed, window, bad_limit
        self.bad: dict[str, str] = {}
        self._bad_places: set[tuple[int, int]] = set()
        self._counts = np.array([len(index.entries) for index in self.indexes], dtype=np.int64)
        self._total = int(self._counts.sum())
        self._last_pass = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        for index in self.indexes:
            if index.problem:
                _log.warning("shard %s: %s", index.path.name, index.problem)
        if not self._total and part != "validation":
            raise ValueError(f"no samples in {len(self.indexes)} shards; check_shards names what is wrong with each")

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

    def _place(self, position: int) -> tuple[int, int]:
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
        members = np.concatenate([np.arange(count) for count in counts])[mixed]
        self._windows[pass_, part] = shards, members
        while len(self._windows) > 4:
            self._windows.popitem(last=False)
        return shards, members

    def _read_one(self, position: int) -> tuple[Tensor, str, str, float]:
        shard, member = self._place(position)
        index = self.indexes[shard]
        entry = index.entries[member]
        key = f"{index.path.name.removesuffix('.tar')}/{entry.key}"
        try:
            with open(index.path, "rb") as file:
                picture, caption = read_sample(file, entry)
            return fit(picture, self.side), caption, key, 1.0
        except BadSample as error:
            self._count_bad((shard, member), key, str(error))
            return torch.zeros(3, self.side, self.side), "", key, 0.0

    def _count_bad(self, place: tuple[int, int], key: str, reason: str) -> None:
        if place not in self._bad_places:
            _log.warning("bad sample %s: %s", key, reason)
            self._bad_places.add(place)
            self.bad[key] = reason
        if len(self._bad_places) > self.bad_limit * self._total:
            named = "; ".join(f"{k}: {r}" for k, r in list(self.bad.items())[:5])
            raise ValueError(
                f"at most {self.bad_limit:.1%} of the samples may be bad, got {len(self._bad_places)} of {self._total} "
                f"({named}); run check_shards and pack again, or raise bad_limit"
            )

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions. Raises ValueError for a negative position or too many bad samples."""
        if not len(positions) or min(positions) < 0:
            raise ValueError(f"positions must be a non-empty sequence of numbers >= 0, got {list(positions)}")
        images, captions, keys, weights = zip(*(self._read_one(int(p)) for p in positions), strict=True)
        samples = torch.tensor([int(p) for p in positions], dtype=torch.int64)
        return Batch(torch.stack(images), list(captions), list(keys), samples, torch.tensor(weights))

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions at these positions, without those that cannot be read."""
        found = []
        for position in positions:
            shard, member = self._place(int(position))
            index = self.indexes[shard]
            with open(index.path, "rb") as file, contextlib.suppress(BadSample):
                found.append(read_caption(file, index.entries[member]))
        return found

    def meaning(self, caption: str) -> Hashable:
        """Captions mean the same if they are the same but for case and outer space."""
        return caption.strip().lower()

    def canonical(self, caption: str) -> str:
        """Nobody knows another wording of these captions: ValueError."""
        raise ValueError("the captions of shards have no canonical wording; set stages.clip.objective.canonical=0")

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


def validation_positions(total: int, rank: int, world: int) -> list[int]:
    """One rank's slice of range(total): together the ranks hold each position once; lengths differ by at most one."""
    if not 0 <= rank < world:
        raise ValueError(f"0 <= rank < world is needed, got rank {rank} of {world}")
    return list(range(total * rank // world, total * (rank + 1) // world))


def prefetch(source: Source, positions: Iterable[Sequence[int]], ahead: int = 2) -> Generator[Batch]:
    """Batches at each list of positions, in order, read up to `ahead` batches early by one background thread.

    An error of the source is raised here, at its own turn.
    """
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
