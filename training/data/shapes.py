"""The `shapes` source: endless captioned images of one to four flat shapes, drawn fresh from (seed, position).

Training draws evenly among the levels it is given, where one named twice counts twice (of S3 evenly between its two
parts), then evenly among the captions that the held-out rules leave, in a language drawn evenly, with fresh positions,
radii and a small colour jitter. None is stored.

B positions, S image side.

It does not know shuffling, ranks or resuming: the caller chooses the positions.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from ...layers import random
from ..stream import Batch
from .shapes_captions import LANGUAGES, canonical, parse_caption, wrong_captions
from .shapes_captions import caption as write_caption
from .shapes_many import DRAWS, place_many
from .shapes_scenes import (
    COLOURS,
    IMAGE_SIDES,
    MOST_OBJECTS,
    NARROW,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    WIDE,
    Facts,
    Rows,
    Scenes,
    place,
    placement_draws,
    render,
    sample_scenes,
)
from .shapes_splits import LEVELS, TEST_COUNTS, draw_rows, held_out, test_rows

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

JITTER = 0.02
_TRIES = 3  # draws of a wrong caption of each kind, until one is not held out


class ShapesSource:
    """A source of batches: `read(positions)` is a pure function of (seed, position).

    size: 32 or 64. levels: among "S1" (one object), "S2" (two), "S3" (three, or one to four alike); used by the split
    "train". split: "train" (endless) or a test set of shapes_splits (finite: position i is its i-th caption).
    languages: among "en", "ru". jitter: standard deviation of the shift of each colour, in units of the [0, 1] range.
    contrast: of "train", samples come in groups of so many; the others of a group are one fact away from its first, in
    its language.
    Raises ValueError for a value outside these.
    """

    def __init__(
        self,
        size: int = 32,
        seed: int = 0,
        levels: Sequence[str] = ("S1", "S2"),
        split: str = "train",
        languages: Sequence[str] = ("en", "ru"),
        jitter: float = JITTER,
        contrast: int = 1,
    ) -> None:
        if size not in IMAGE_SIDES:
            raise ValueError(f"shapes images have a side in {IMAGE_SIDES}, got {size}: set size to one of these")
        if split != "train" and split not in TEST_COUNTS:
            raise ValueError(f"shapes has the splits {('train', *TEST_COUNTS)}, got {split!r}: choose one of these")
        if not languages or not set(languages) <= set(LANGUAGES):
            raise ValueError(f"shapes captions exist in {LANGUAGES}, got {tuple(languages)}: name one or both")
        if not levels or not set(levels) <= set(LEVELS):
            raise ValueError(f"shapes has the levels {tuple(LEVELS)}, got {tuple(levels)}: name at least one of these")
        if jitter < 0:
            raise ValueError(f"the colour jitter is a standard deviation, at least 0, got {jitter}: use e.g. 0.02")
        self._side, self._seed, self._jitter = size, seed, jitter
        if contrast < 1 or (contrast > 1 and split != "train"):
            raise ValueError(f"contrast is at least 1, and 1 in a test set, got {contrast} in {split!r}: use e.g. 4")
        self._split, self._languages, self._levels = split, tuple(languages), tuple(levels)
        self._contrast = contrast
        self._tests = None if split == "train" else test_rows(split)
        self._wide = "S3" in levels if self._tests is None else self._tests.shape[1] == WIDE

    @property
    def size(self) -> int | None:
        """The number of positions, None where they never end."""
        return None if self._tests is None else len(self._tests)

    @property
    def fingerprint(self) -> str:
        """What the draws depend on, in words."""
        words = f"shapes {self._split} {self._side} px, {self._levels}, {self._languages}, {self._jitter}, {self._seed}"
        return words if self._contrast == 1 else f"{words}, groups of {self._contrast}"

    def scenes(self, positions: Sequence[int]) -> Scenes:
        """The scenes at the positions (B of them), as `read` draws them. IndexError outside the source."""
        wanted = np.asarray(positions, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or (self.size is not None and wanted.max() >= self.size)):
            raise IndexError(f"positions lie in [0, {self.size or 'endless'}), got {wanted.min()} to {wanted.max()}")
        samples = torch.from_numpy(wanted)
        rows = self._draw_groups(samples) if self._tests is None else self._tests[wanted]
        draws = placement_draws(self._seed, samples)
        if not self._wide:
            return place(rows, draws, self._side)
        more = random.uniform(self._seed, 0, samples, (DRAWS - draws.shape[1],), "shapes placement of many").numpy()
        return place_many(rows, np.concatenate([draws, more], axis=1), self._side)

    def _draw(self, samples: torch.Tensor) -> Rows:
        """A training row for each of samples (B,): (B, 8), or (B, 13) with the level S3."""
        pick, word = random.integers(self._seed, 0, samples, (2,), "shapes row", 1 << 40).numpy().T
        rows = np.full((len(samples), WIDE if self._wide else NARROW), -1, np.int64)
        number = len(self._levels)
        for i, level in enumerate(self._levels):
            for j, part in enumerate(LEVELS[level]):
                mine = (pick % number == i) & (pick // number % len(LEVELS[level]) == j)
                drawn = draw_rows(part, word[mine])
                rows[mine, : drawn.shape[1]] = drawn
        return rows

    def _draw_groups(self, samples: torch.Tensor) -> Rows:
        """As `_draw`, and where scenes come in groups, the others of a group are one fact away from its first."""
        rows, numbers = self._draw(samples // self._contrast), samples.tolist()
        drawn = zip(numbers, rows, strict=True)
        groups = {number // self._contrast: Facts.from_row(row) for number, row in drawn if number % self._contrast}
        false = dict(zip(groups, self._false(list(groups.values()), list(groups)), strict=True))
        for i, number in enumerate(numbers):
            group, member = divmod(number, self._contrast)
            if member:
                near = list(false[group].values())
                row = near[(member - 1) % len(near)].row()
                rows[i, : len(row)], rows[i, len(row) :] = row, -1
        return rows

    def facts(self, positions: Sequence[int]) -> list[Facts]:
        """What the captions at the positions say."""
        return self.scenes(positions).facts()

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch at the positions: image float32 (B, 3, S, S) in [-1, 1], captions, keys, samples, weight 1."""
        scenes = self.scenes(positions)
        samples = torch.as_tensor(np.asarray(positions, np.int64).reshape(-1))
        shift = random.normal(self._seed, 0, samples, (3, 3), "shapes jitter").numpy() * np.float32(self._jitter)
        if self._wide:
            more = random.normal(self._seed, 0, samples, (MOST_OBJECTS - 2, 3), "shapes jitter of many").numpy()
            shift = np.concatenate([shift, more * np.float32(self._jitter)], axis=1)  # (B, 5, 3)
        image = torch.from_numpy(render(scenes, shift).transpose(0, 3, 1, 2)).mul_(2).sub_(1)
        captions = self._write(scenes.facts(), samples)
        keys = [f"shapes-{self._split}-{self._seed}-{position}" for position in samples.tolist()]
        return Batch(image, captions, keys, samples, torch.ones(len(samples)))

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions at the positions."""
        return self._write(self.facts(positions), torch.as_tensor(np.asarray(positions, np.int64).reshape(-1)))

    def _write(self, facts: list[Facts], samples: torch.Tensor) -> list[str]:
        """The captions of facts in the languages that samples (B,) draw."""
        groups = samples // self._contrast
        tongue = random.integers(self._seed, 0, groups, (1,), "shapes language", len(self._languages))[:, 0].tolist()
        return [write_caption(f, self._languages[t]) for f, t in zip(facts, tongue, strict=True)]

    def meaning(self, caption: str) -> Hashable:
        """Equal for captions that say the same in either wording or language."""
        return canonical(parse_caption(caption))

    def canonical(self, caption: str) -> str:
        """The caption in the canonical wording of its meaning, in its own language."""
        return write_caption(canonical(parse_caption(caption)), _language(caption))

    def wrong(self, captions: Sequence[str], samples: Sequence[int]) -> list[list[str]]:
        """Minimal wrong captions, in the language of the true one; which and in what order is a draw of the sample.

        The opposite relation comes first, where there is one: it is learnt last. In training none is a held-out
        meaning: a CLIP that sees those as false only learns that they are.
        """
        false = self._false([parse_caption(caption) for caption in captions], samples)
        return [
            [write_caption(wrong, _language(caption)) for wrong in mine.values()]
            for caption, mine in zip(captions, false, strict=True)
        ]

    def _false(self, facts: Sequence[Facts], samples: Sequence[int]) -> list[dict[str, Facts]]:
        """Of each facts those one fact away by kind: the opposite relation first, the rest as its sample draws."""
        rngs = [np.random.default_rng([self._seed % 2**64, sample]) for sample in samples]
        found: list[dict[str, Facts]] = [{} for _ in facts]
        left = list(range(len(facts)))
        for _ in range(_TRIES):
            drawn = [
                (i, kind, wrong)
                for i in left
                for kind, wrong in wrong_captions(facts[i], rngs[i]).items()
                if kind not in found[i]
            ]
            hidden = held_out([wrong for *_, wrong in drawn]) if self._split == "train" else [False] * len(drawn)
            for (i, kind, wrong), bad in zip(drawn, hidden, strict=True):
                if not bad:
                    found[i][kind] = wrong
            left = sorted({i for (i, *_), bad in zip(drawn, hidden, strict=True) if bad})
        result = []
        for rng, mine in zip(rngs, found, strict=True):
            kinds = [list(mine)[i] for i in rng.permutation(len(mine))]
            kinds.sort(key=lambda kind: kind != "opposite relation")
            result.append({kind: mine[kind] for kind in kinds})
        return result


def _language(caption: str) -> str:
    return "en" if caption.isascii() else "ru"
