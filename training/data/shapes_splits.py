"""Held-out compositions of the shapes grammar: what training never shows, and the test captions made of it.

All rules read the canonical form (relation "above" or "left of", objects in that order):
(a) a colour-shape pair with (colour - 3 shape) mod 8 in {0, 1}: 12 of the 48 pairs;
(b) a triple "shape relation shape" whose SHA-256, read as a hexadecimal number, is divisible by 5;
(c) an object and a background with (colour - background) mod 8 = 1.
Training breaks none of them and also leaves out one in 16 of the remaining two-object meanings (by a hash of the
meaning), from which the test "S2none" is drawn: a model that composes should do as well on a, b, c as on it.

N rows of the grammar (see shapes_scenes).

It does not know images. Exactly one-sixteenth is not promised of the reserve: it is a hash.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .shapes_scenes import COLOURS, RELATIONS, SHAPES, Facts, Rows, grammar

LEVELS = ("S1", "S2")
TESTS = ("S1", "S2a", "S2b", "S2c", "S2none")
TEST_COUNTS = {"S1": 500, "S2a": 1000, "S2b": 1000, "S2c": 1000, "S2none": 1000}
RESERVE = 16
_RADIX = np.array([8, 2, 8, 6, 3, 9, 7, 5])  # with -1 stored as 0 in the last four columns
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
    """Which of the rules (a, b, c) each row breaks: bool (N, 3)."""
    rows = canonical_rows(rows)
    present = rows[:, [3, 6]] >= 0
    colours, shapes = rows[:, [2, 5]], rows[:, [3, 6]]
    pair = (((colours - 3 * shapes) % 8 < 2) & present).any(1)
    ground = (((colours - rows[:, :1]) % len(COLOURS) == 1) & present).any(1)
    triple = present[:, 1] & held_out_triples()[rows[:, 3], rows[:, 7], rows[:, 6]]
    return np.stack([pair, triple, ground], axis=1)


def meaning_hash(rows: Rows, salt: int = 0) -> NDArray[np.uint64]:
    """A 64-bit hash of the meaning of each row (the finaliser of splitmix64): equal for both wordings of a scene."""
    digits = canonical_rows(rows)
    digits[:, 4:] += 1
    code = np.zeros(len(rows), np.uint64)
    for column, radix in enumerate(_RADIX):
        code = code * np.uint64(radix) + digits[:, column].astype(np.uint64)
    z = (code ^ np.uint64(salt)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def reserved(rows: Rows) -> Mask:
    """Two-object meanings kept out of training although they break no rule (the pool of "S2none"): bool (N,)."""
    chosen = meaning_hash(rows) % np.uint64(RESERVE) == 0
    return (rows[:, 7] >= 0) & chosen & ~broken_rules(rows).any(1)


@lru_cache(maxsize=2)
def training_rows(level: str) -> Rows:
    """Rows (M, 8) that training may show at level "S1" (one object) or "S2" (two); read-only."""
    if level not in LEVELS:
        raise ValueError(f"shapes has the levels {LEVELS}, got {level!r}: choose among these")
    rows = grammar(LEVELS.index(level) + 1)
    rows = rows[~broken_rules(rows).any(1) & ~reserved(rows)]
    rows.setflags(write=False)
    return rows


def test_rows(name: str) -> Rows:
    """Rows of a test set (see `test_captions`), int64 (n, 8)."""
    if name not in TESTS:
        raise ValueError(f"shapes has the test sets {TESTS}, got {name!r}: choose one of these")
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
    rows = rows[(rows[:, 7] < 0) | ((rows[:, 7] % 2 == 1) == flipped)]
    order = np.argsort(meaning_hash(rows, _ORDER_SALT), kind="stable")
    return rows[order[: TEST_COUNTS[name]]]


def test_captions(name: str) -> list[Facts]:
    """The facts of a test set, always the same: distinct meanings, none of which occurs in training.

    "S2a", "S2b", "S2c": 1,000 each that break exactly that rule. "S2none": 1,000 that break none but are reserved.
    "S1": every one-object meaning that breaks (a) or (c), 240 of them (fewer than 500 exist; ask each in both
    languages or with several seeds for more samples). ValueError for another name.
    """
    return [Facts.from_row(row) for row in test_rows(name)]


# pytest would collect these by their names.
test_rows.__test__ = False  # type: ignore[attr-defined]
test_captions.__test__ = False  # type: ignore[attr-defined]
