"""Held-out compositions of the shapes grammar: what training never shows, and the test captions made of it.

All rules read the canonical form (relation "above" or "left of", objects in that order):
(a) a colour-shape pair with (colour - 3 shape) mod 8 in {0, 1}: 12 of the 48 pairs;
(b) a triple "shape relation shape" whose SHA-256, read as a hexadecimal number, is divisible by 5;
(c) an object and a background with (colour - background) mod 8 = 1.
Training breaks none of them and also leaves out one in 16 of the remaining two-object meanings (by a hash of the
meaning), from which the test "S2none" is drawn: a model that composes should do as well on a, b, c as on it.

Level S3 has two parts, drawn evenly: "S3objects" (three objects, every single object and each of the two relations
under the same rules) and "S3counts" (one to four alike). Each has a test of its name made of reserved meanings that
break no rule, so that it can be asked of a model that never saw S3 and of one that trained on it. Three objects are
reserved in all sizes at once; two fifths of the counts above one are reserved, since there are only 1,296.

N rows of the grammar (see shapes_scenes and, for S3, shapes_many).

It does not know images. Exactly one-sixteenth is not promised of the reserve: it is a hash.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .shapes_captions import canonical
from .shapes_many import VARIANTS, count_rows, three_rows, vary
from .shapes_scenes import COLOURS, NARROW, RELATIONS, SHAPES, Facts, Rows, grammar, things

LEVELS = {"S1": ("S1",), "S2": ("S2",), "S3": ("S3objects", "S3counts")}  # the parts of each, drawn evenly
TEST_COUNTS = {"S1": 500, "S2a": 1000, "S2b": 1000, "S2c": 1000, "S2none": 1000, "S3objects": 500, "S3counts": 500}
S3_TESTS = LEVELS["S3"]
TESTS = tuple(name for name in TEST_COUNTS if name not in S3_TESTS)
RESERVE = 16
_RADIX = np.array([8, 2, 8, 6, 3, 9, 7, 5, 3, 9, 7, 5, 6])  # -1 is stored as 0 from the fifth column on
_ORDER_SALT, _WORDING_SALT = 0x5368617065730001, 0x5368617065730002

Mask = NDArray[np.bool_]


def canonical_rows(rows: Rows) -> Rows:
    """Rows (N, 8) of equal meaning whose relation is "above" or "left of" (one-object rows unchanged)."""
    flip = (rows[:, 7] >= 0) & (rows[:, 7] % 2 == 1)
    result = rows.copy()
    result[flip] = rows[flip][:, [0, 4, 5, 6, 1, 2, 3, 7]]
    result[flip, 7] -= 1
    return result


@lru_cache(maxsize=1)
def held_out_triples() -> Mask:
    """Rule (b) as a table (6, 4, 6) over shape, relation, shape; only "above" and "left of" are ever looked up."""
    table = np.zeros((len(SHAPES), len(RELATIONS), len(SHAPES)), bool)
    for i, j, k in np.ndindex(table.shape):
        words = f"{SHAPES[i]} {RELATIONS[j]} {SHAPES[k]}"
        table[i, j, k] = int(hashlib.sha256(words.encode()).hexdigest(), 16) % 5 == 0
    return table


def broken_rules(rows: Rows) -> Mask:
    """Which of the rules (a, b, c) each row (N, 8) or (N, 13) breaks: bool (N, 3)."""
    slots = things(rows)
    present, colours, shapes = slots[..., 2] >= 0, slots[..., 1], slots[..., 2]
    pair = (((colours - 3 * shapes) % 8 < 2) & present).any(1)
    ground = (((colours - rows[:, :1]) % len(COLOURS) == 1) & present).any(1)
    triple = np.zeros(len(rows), bool)
    for slot, column in ((1, 7),) if rows.shape[1] == NARROW else ((1, 7), (2, 11)):
        relation = rows[:, column]
        flip = relation % 2
        first, second = np.where(flip, shapes[:, [slot, 0]].T, shapes[:, [0, slot]].T)
        triple |= (relation >= 0) & held_out_triples()[first, relation - flip, second]
    return np.stack([pair, triple, ground], axis=1)


def meaning_hash(rows: Rows, salt: int = 0) -> NDArray[np.uint64]:
    """A 64-bit hash of the meaning of each row (the finaliser of splitmix64): equal for both wordings of a scene.

    Wide rows are hashed as they stand: shapes_many makes one of each meaning.
    """
    digits = canonical_rows(rows) if rows.shape[1] == NARROW else rows.copy()
    digits[:, 4:] += 1
    code = np.zeros(len(rows), np.uint64)
    for column, radix in enumerate(_RADIX[: rows.shape[1]]):
        code = code * np.uint64(radix) + digits[:, column].astype(np.uint64)
    z = (code ^ np.uint64(salt)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def reserved(rows: Rows) -> Mask:
    """Two-object meanings kept out of training although they break no rule (the pool of "S2none"): bool (N,)."""
    chosen = meaning_hash(rows) % np.uint64(RESERVE) == 0
    return (rows[:, 7] >= 0) & chosen & ~broken_rules(rows).any(1)


def held_out(facts: Sequence[Facts]) -> list[bool]:
    """Of each facts, whether training must not speak of them, not even as false: they break a rule, or are reserved.

    Of three objects and of counts only the test meanings themselves are told apart, not all of the reserve.
    """
    rows = [f.row() for f in facts]
    found = [len(row) != NARROW and canonical(f) in _wide_tests() for f, row in zip(facts, rows, strict=True)]
    for width in {len(row) for row in rows}:
        places = [i for i, row in enumerate(rows) if len(row) == width]
        chosen = np.stack([rows[i] for i in places])
        hidden: Mask = np.asarray(broken_rules(chosen).any(1))
        if width == NARROW:
            hidden = hidden | reserved(chosen)
        for place, bad in zip(places, hidden.tolist(), strict=True):
            found[place] |= bad
    return found


@lru_cache(maxsize=1)
def _wide_tests() -> frozenset[Facts]:
    return frozenset(canonical(f) for name in S3_TESTS for f in test_captions(name))


@lru_cache(maxsize=4)
def training_rows(part: str) -> Rows:
    """Rows that training may show of a part of a level (LEVELS), (M, 8) or, of S3, (M, 13); read-only.

    Those of "S3objects" stand for their 16 variants each (see `draw_rows`).
    """
    known = [part for parts in LEVELS.values() for part in parts]
    if part not in known:
        raise ValueError(f"the levels of shapes have the parts {known}, got {part!r}: choose among these")
    if part in S3_TESTS:
        rows, kept = _many_rows(part)
        rows = rows[~kept]
    else:
        rows = grammar(1 if part == "S1" else 2)
        rows = rows[~broken_rules(rows).any(1) & ~reserved(rows)]
    rows.setflags(write=False)
    return rows


def draw_rows(part: str, words: NDArray[np.int64]) -> Rows:
    """A row of `training_rows` for each random word (N,), in [0, 2**40): evenly over the captions of the part."""
    rows = training_rows(part)
    chosen = rows[words % len(rows)]
    return vary(chosen, words // len(rows) % VARIANTS) if part == "S3objects" else chosen


def _many_rows(part: str) -> tuple[Rows, Mask]:
    """Rows (M, 13) of a part of S3 that break no rule, each once for all its variants, and which are reserved: (M,)."""
    kinds = training_rows("S1")
    if part == "S3counts":
        rows = count_rows(kinds)
        return rows, (rows[:, 12] > 1) & (meaning_hash(rows) % np.uint64(5) < 2)
    small = kinds[kinds[:, 1] == 0]
    every = (three_rows(small[small[:, 0] == ground]) for ground in range(len(COLOURS)))
    rows = np.concatenate([rows[~broken_rules(rows).any(1)] for rows in every])
    return rows, meaning_hash(rows) % np.uint64(RESERVE) == 0


@lru_cache(maxsize=len(TEST_COUNTS))
def test_rows(name: str) -> Rows:
    """Rows of a test set (see `test_captions`), int64 (n, 8) or, of S3, (n, 13); read-only."""
    rows = _test_rows(name)
    rows.setflags(write=False)
    return rows


def _test_rows(name: str) -> Rows:
    if name not in TEST_COUNTS:
        raise ValueError(f"shapes has the test sets {tuple(TEST_COUNTS)}, got {name!r}: choose one of these")
    if name in S3_TESTS:
        rows, kept = _many_rows(name)
        rows = _first(rows[kept], name)
        variant = (meaning_hash(rows, _WORDING_SALT) % np.uint64(VARIANTS)).astype(np.int64)
        return vary(rows, variant) if name == "S3objects" else rows
    rows = grammar(1 if name == "S1" else 2)
    broken = broken_rules(rows)
    if name == "S1":
        keep = broken.any(1)
    elif name == "S2none":
        keep = reserved(rows)
    else:
        keep = (broken.sum(1) == 1) & broken[:, "abc".index(name[-1])]
    rows = rows[keep]
    # One wording of each meaning: both wordings have the same hash, a bit of it says which stays.
    flipped = meaning_hash(rows, _WORDING_SALT) % np.uint64(2) == 1
    return _first(rows[(rows[:, 7] < 0) | ((rows[:, 7] % 2 == 1) == flipped)], name)


def _first(rows: Rows, name: str) -> Rows:
    order = np.argsort(meaning_hash(rows, _ORDER_SALT), kind="stable")
    return rows[order[: TEST_COUNTS[name]]]


def test_captions(name: str) -> list[Facts]:
    """The facts of a test set, always the same: distinct meanings, none of which occurs in training.

    "S2a", "S2b", "S2c": 1,000 each that break exactly that rule. "S2none": 1,000 that break none but are reserved.
    "S1": every one-object meaning that breaks (a) or (c), 240 of them (fewer than 500 exist; ask each in both
    languages or with several seeds for more samples). "S3objects" and "S3counts" (two to four alike): 500 each that
    break none but are reserved. ValueError for another name.
    """
    return [Facts.from_row(row) for row in test_rows(name)]


# pytest would collect these by their names.
test_rows.__test__ = False  # type: ignore[attr-defined]
test_captions.__test__ = False  # type: ignore[attr-defined]
