"""The `shapes` source: endless captioned images of one or two flat shapes, drawn fresh from (seed, position).

Training draws evenly among the levels, then evenly among the captions that the held-out rules leave to that level, in a
language drawn evenly, with fresh positions, radii and a small colour jitter. Nothing is stored.

B positions, S image side.

It does not know shuffling, ranks or resuming: the caller chooses the positions.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from ...layers import random
from ..stream import Batch
from .shapes_captions import LANGUAGES, canonical, caption, parse_caption
from .shapes_scenes import (
    COLOURS,
    IMAGE_SIDES,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    Facts,
    Scenes,
    place,
    placement_draws,
    render,
    sample_scenes,
)
from .shapes_splits import TESTS, test_rows, training_rows

__all__ = [
    "COLOURS",
    "PALETTE",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Facts",
    "Scenes",
    "ShapesSource",
    "place",
    "render",
    "sample_scenes",
]


class ShapesSource:
    """A source of batches: `read(positions)` is a pure function of (seed, position).

    size: 32 or 64. levels: among "S1" (one object), "S2" (two); used by the split "train". split: "train" (endless) or
    a test set of shapes_splits (finite: position i is its i-th caption). languages: among "en", "ru".
    jitter: standard deviation of the shift of each colour, in units of the [0, 1] range.
    Raises ValueError for a value outside these.
    """

    def __init__(
        self,
        size: int = 32,
        seed: int = 0,
        levels: Sequence[str] = ("S1", "S2"),
        split: str = "train",
        languages: Sequence[str] = ("en", "ru"),
        jitter: float = 0.02,
    ) -> None:
        if size not in IMAGE_SIDES:
            raise ValueError(f"shapes images have a side in {IMAGE_SIDES}, got {size}: set size to one of these")
        if split != "train" and split not in TESTS:
            raise ValueError(f"shapes has the splits {('train', *TESTS)}, got {split!r}: choose one of these")
        if not languages or not set(languages) <= set(LANGUAGES):
            raise ValueError(f"shapes captions exist in {LANGUAGES}, got {tuple(languages)}: name one or both")
        if not levels:
            raise ValueError("shapes needs at least one level, got none: name S1, S2 or both")
        if jitter < 0:
            raise ValueError(f"the colour jitter is a standard deviation, at least 0, got {jitter}: use e.g. 0.02")
        self._side, self._seed, self._jitter = size, seed, jitter
        self._split, self._languages, self._levels = split, tuple(languages), tuple(levels)
        self._pools = [training_rows(level) for level in levels] if split == "train" else [test_rows(split)]

    @property
    def size(self) -> int | None:
        """The number of positions, None where they never end."""
        return None if self._split == "train" else len(self._pools[0])

    @property
    def fingerprint(self) -> str:
        """What the draws depend on, in words."""
        return f"shapes {self._split} {self._side} px, {self._levels}, {self._languages}, {self._jitter}, {self._seed}"

    def scenes(self, positions: Sequence[int]) -> Scenes:
        """The scenes at the positions (B of them), as `read` draws them. IndexError outside the source."""
        wanted = np.asarray(positions, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or (self.size is not None and wanted.max() >= self.size)):
            raise IndexError(f"positions lie in [0, {self.size or 'endless'}), got {wanted.min()} to {wanted.max()}")
        samples = torch.from_numpy(wanted)
        if self._split == "train":
            level, word = random.integers(self._seed, 0, samples, (2,), "shapes row", 1 << 40).numpy().T
            level = level % len(self._pools)
            rows = np.empty((len(wanted), 8), np.int64)
            for i, pool in enumerate(self._pools):
                rows[level == i] = pool[word[level == i] % len(pool)]
        else:
            rows = self._pools[0][wanted]
        return place(rows, placement_draws(self._seed, samples), self._side)

    def facts(self, positions: Sequence[int]) -> list[Facts]:
        """What the captions at the positions say."""
        return self.scenes(positions).facts()

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch at the positions: image float32 (B, 3, S, S) in [-1, 1], captions, keys, samples, weight 1."""
        scenes = self.scenes(positions)
        samples = torch.as_tensor(np.asarray(positions, np.int64).reshape(-1))
        shift = random.normal(self._seed, 0, samples, (3, 3), "shapes jitter").numpy() * np.float32(self._jitter)
        image = torch.from_numpy(render(scenes, shift).transpose(0, 3, 1, 2)).mul_(2).sub_(1)
        tongue = random.integers(self._seed, 0, samples, (1,), "shapes language", len(self._languages))[:, 0].tolist()
        captions = [caption(f, self._languages[t]) for f, t in zip(scenes.facts(), tongue, strict=True)]
        keys = [f"shapes-{self._split}-{self._seed}-{position}" for position in samples.tolist()]
        return Batch(image, captions, keys, samples, torch.ones(len(samples)))

    def meaning(self, caption: str) -> Hashable:
        """Equal for captions that say the same in either wording or language."""
        return canonical(parse_caption(caption))
