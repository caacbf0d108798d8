"""Scenes of flat shapes: the grammar as rows of integers, placement of one or two objects, an anti-aliased renderer.

A row is (background, size, colour, shape, size, colour, shape, relation), indices into the word tuples below, -1 where
a one-object scene has nothing. All colours of a row differ. `grammar` lists every row: 672 with one object, 193,536
with two. Shapes are signed distance functions of near-equal area per squared radius: size does not tell the shape.
A wide row (of more objects: see shapes_many) appends size, colour, shape of a third object, its relation and a count.

N scenes, K object slots (2, or 4 where rows are wide), S image side.

It does not know captions, held-out splits or batches.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from ...layers import random

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
PALETTE = np.array(
    [
        (220, 40, 40),
        (245, 145, 30),
        (245, 225, 60),
        (40, 160, 70),
        (45, 80, 210),
        (140, 60, 170),
        (245, 245, 245),
        (25, 25, 25),
    ],
    np.float32,
) / np.float32(255)
AREAS = np.pi * np.array([1.0, 1.0, 0.7, 0.9, 0.8, 0.75])  # in units of the squared radius
RADII = np.array([(0.105, 0.125), (0.170, 0.195)])  # range of the radius for each size, in image sides
GAP = 0.03  # least free space between two objects along the relation's axis, in image sides
MARGIN = 0.6  # pixels kept around each object for its anti-aliased rim
# Reach of each shape up, down and to a side from its centre, in radii.
EXTENTS = np.array(
    [(1.0, 1.0, 1.0), (0.89, 0.89, 0.89), (1.31, 0.66, 1.13), (1.19, 1.19, 1.19), (1.07, 1.07, 1.07), (1.0, 1.0, 1.0)]
)
IMAGE_SIDES = (32, 64)
NARROW, WIDE = 8, 13  # columns of a row of S1 and S2, and of a row that may hold more
MOST_OBJECTS = 4
_CHUNK = 128  # scenes rendered together, so that the arrays stay in cache

Array = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Facts:
    """What a caption says. background: colour index; objects: (size, colour, shape) each.

    relations: indices; the first object stands in the k-th of them to the object k + 1. counted: the caption says how
    many ("three small red circles"): all objects are alike and none is related.
    """

    background: int
    objects: tuple[tuple[int, int, int], ...]
    relations: tuple[int, ...] = ()
    counted: bool = False

    @staticmethod
    def from_row(row: Rows) -> "Facts":
        """Facts of one row (8,) or (13,) of the grammar."""
        values = [int(v) for v in row]
        if len(values) == WIDE and values[12] >= 0:
            return Facts(values[0], (tuple(values[1:4]),) * values[12], (), True)  # type: ignore[arg-type]
        slots = [first for first in (1, 4, 8)[: 2 if len(values) == NARROW else 3] if values[first] >= 0]
        objects = tuple(tuple(values[first : first + 3]) for first in slots)
        return Facts(values[0], objects, tuple(values[first + 3] for first in slots[1:]))  # type: ignore[arg-type]

    def row(self) -> Rows:
        """The row of these facts: (8,), or (13,) of counted facts and of three objects; -1 where there is nothing."""
        flat = [self.background, *self.objects[0]]
        if not self.counted:
            for thing, relation in zip(self.objects[1:], self.relations, strict=True):
                flat += [*thing, relation]
        wide = self.counted or len(self.objects) > 2
        flat += [-1] * ((WIDE if wide else NARROW) - len(flat))
        if self.counted:
            flat[12] = len(self.objects)
        return np.array(flat, np.int64)


@dataclass(frozen=True)
class Scenes:
    """Placed scenes. rows (N, 8 or 13); centres x, y and radius (N, K) in pixels, radius 0 where absent; size: side."""

    rows: Rows
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]
    size: int

    def facts(self) -> list[Facts]:
        """The facts of every scene, N of them."""
        return [Facts.from_row(row) for row in self.rows]


def things(rows: Rows) -> Rows:
    """Size, colour and shape of every object slot of rows (N, 8) or (N, 13): (N, K, 3), -1 where it is empty."""
    if rows.shape[1] == NARROW:
        return rows[:, 1:7].reshape(-1, 2, 3)
    slots = np.full((len(rows), MOST_OBJECTS, 3), -1, np.int64)
    slots[:, :2], slots[:, 2] = rows[:, 1:7].reshape(-1, 2, 3), rows[:, 8:11]
    counted = np.arange(MOST_OBJECTS) < rows[:, 12:]  # (N, K)
    return np.where(counted[..., None], rows[:, None, 1:4], slots)


@lru_cache(maxsize=2)
def grammar(objects: int) -> Rows:
    """Every row with `objects` (1 or 2) objects, in lexicographic order: int64 (672, 8) or (193536, 8), read-only."""
    if objects not in (1, 2):
        raise ValueError(f"the shapes grammar has scenes of 1 or 2 objects, got {objects}: ask for 1 or 2")
    thing = (len(SIZES), len(COLOURS), len(SHAPES))
    ranges = (len(COLOURS), *thing) if objects == 1 else (len(COLOURS), *thing, *thing, len(RELATIONS))
    rows = np.indices(ranges).reshape(len(ranges), -1).T
    different = rows[:, 0] != rows[:, 2]
    if objects == 1:
        rows = np.pad(rows, ((0, 0), (0, 4)), constant_values=-1)
    else:
        different &= (rows[:, 0] != rows[:, 5]) & (rows[:, 2] != rows[:, 5])
    rows = np.ascontiguousarray(rows[different])
    rows.setflags(write=False)
    return rows


def place(rows: Rows, draws: NDArray[np.float64], size: int = 32) -> Scenes:
    """Radii and centres for rows (N, 8) from uniform draws (N, 6) in (0, 1).

    Every object lies inside the image. Two objects stand GAP apart along the relation's axis and differ across it by
    at most half as much, so the relation is never in doubt. Raises ValueError for an image side other than 32 or 64.
    """
    if size not in IMAGE_SIDES:
        raise ValueError(f"shapes images have a side of 32 or 64 pixels, got {size}: set size to one of these")
    sizes, shapes = rows[:, [1, 4]], rows[:, [3, 6]]
    low, high = RADII[sizes, 0], RADII[sizes, 1]
    radius = np.where(shapes >= 0, low + (high - low) * draws[:, :2], 0.0) * size  # (N, 2)
    reach = EXTENTS[shapes] * radius[..., None] + MARGIN  # (N, 2, 3): up, down, side
    x, y = np.zeros_like(radius), np.zeros_like(radius)
    one = rows[:, 7] < 0
    up, down, side = (reach[one, 0, j] for j in range(3))
    x[one, 0] = side + draws[one, 2] * (size - 2 * side)
    y[one, 0] = up + draws[one, 3] * (size - up - down)
    two = ~one
    if two.any():
        x[two], y[two] = _place_pair(rows[two, 7], reach[two], draws[two, 2:], size)
    return Scenes(rows, x, y, radius, size)


def _place_pair(relation, reach, draws, size):
    """Centres x, y (M, 2) of two objects: relation (M,), reach (M, 2, 3), draws (M, 4)."""
    vertical = relation < 2
    upright = vertical[:, None]
    up, down, side = (reach[..., j] for j in range(3))
    before, after = np.where(upright, up, side), np.where(upright, down, side)  # reach along the relation's axis
    across_low, across_high = np.where(upright, side, up), np.where(upright, side, down)
    index = np.arange(len(relation))
    first = relation % 2  # slot of the upper or left object
    second = 1 - first
    lead = before[index, first]
    taken = before.sum(axis=1) + after.sum(axis=1)
    gap = np.minimum(GAP * size, size - taken)  # of two large triangles, one above the other, it is a little less
    between = after[index, first] + gap + before[index, second]
    slack = size - taken - gap
    shift = np.sort(draws[:, :2], axis=1) * slack[:, None]
    along = np.empty_like(side)
    along[index, first] = lead + shift[:, 0]
    along[index, second] = lead + between + shift[:, 1]
    limit = 0.5 * np.abs(along[:, 1] - along[:, 0])
    a = across_low[:, 0] + draws[:, 2] * (size - across_high[:, 0] - across_low[:, 0])
    b = np.clip(a + (2 * draws[:, 3] - 1) * limit, across_low[:, 1], size - across_high[:, 1])
    across = np.stack([np.clip(a, b - limit, b + limit), b], axis=1)
    return np.where(upright, across, along), np.where(upright, along, across)


def sample_scenes(seed: int, positions: NDArray[np.int64], rows: Rows, size: int = 32) -> Scenes:
    """One scene per position (N,), its row drawn evenly from rows (M, 8): a pure function of (seed, position)."""
    samples = torch.as_tensor(np.asarray(positions, np.int64))
    pick = random.integers(seed, 0, samples, (1,), "shapes row", len(rows)).numpy()[:, 0]
    return place(rows[pick], placement_draws(seed, samples), size)


def placement_draws(seed: int, samples: torch.Tensor) -> NDArray[np.float64]:
    """The uniform draws (N, 6) that `place` needs, for samples int64 (N,)."""
    return random.uniform(seed, 0, samples, (6,), "shapes placement").numpy().astype(np.float64)


def distance(shape: int, x, y, radius):
    """Signed distance in pixels (negative inside) from the outline of a shape centred at 0; arguments broadcast."""
    name, area = SHAPES[shape], AREAS[shape]
    if name == "circle":
        return np.sqrt(x * x + y * y) - radius
    if name == "ring":
        return np.abs(np.sqrt(x * x + y * y) - radius * 0.75) - radius * 0.25
    ax = np.abs(x)
    if name == "triangle":  # equilateral, apex up, centred on its centroid
        inner = float(np.sqrt(4 * area / np.sqrt(3)) / (2 * np.sqrt(3))) * radius
        return np.maximum(y - inner, ax * 0.8660254 - y * 0.5 - inner)
    ay = np.abs(y)
    if name == "square":
        return np.maximum(ax, ay) - float(np.sqrt(area) / 2) * radius
    if name == "diamond":
        return (ax + ay - float(np.sqrt(area / 2)) * radius) * 0.70710678
    arm = float(np.sqrt(area * 9 / 20)) * radius  # cross: arms three times as long as half as wide
    return np.minimum(np.maximum(ax - arm, ay - arm / 3), np.maximum(ay - arm, ax - arm / 3))


def coverage(shape: int, x, y, radius):
    """Share of each pixel inside the shape, in [0, 1], by a 1-pixel ramp over the signed distance."""
    return np.clip(0.5 - distance(shape, x, y, radius), 0, 1)


def render(scenes: Scenes, colour_shift: Array | None = None) -> Array:
    """Images float32 (N, S, S, 3) in [0, 1] (a view of a channel-first array).

    colour_shift: (N, 1 + K, 3), added to the colours (background, then each object) before clipping to [0, 1].
    """
    slots = things(scenes.rows)  # (N, K, 3)
    colours = PALETTE[np.concatenate([scenes.rows[:, :1], slots[..., 1]], axis=1)]  # (N, 1 + K, 3); absent: never seen
    if colour_shift is not None:
        colours = np.clip(colours + colour_shift, 0, 1)
    side = scenes.size
    images = np.empty((len(scenes.rows), 3, side, side), np.float32)
    for start in range(0, len(images), _CHUNK):
        _render_chunk(scenes, slots[..., 2], colours, slice(start, start + _CHUNK), images)
    return images.transpose(0, 2, 3, 1)


def _render_chunk(scenes: Scenes, kinds: Rows, colours: Array, part: slice, images: Array) -> None:
    grid = np.arange(scenes.size, dtype=np.float32) + np.float32(0.5)
    image = images[part]
    image[:] = colours[part, 0, :, None, None]
    for slot in range(kinds.shape[1]):
        shapes = kinds[part, slot]
        x, y, radius = (v[part, slot].astype(np.float32) for v in (scenes.x, scenes.y, scenes.radius))
        contrast = colours[part, slot + 1] - colours[part, 0]  # objects never overlap, so each is over the background
        for shape in range(len(SHAPES)):
            group = np.flatnonzero(shapes == shape)
            if not len(group):
                continue
            dx = grid[None, None, :] - x[group, None, None]
            dy = grid[None, :, None] - y[group, None, None]
            alpha = coverage(shape, dx, dy, radius[group, None, None])  # (n, S, S)
            image[group] += alpha[:, None] * contrast[group, :, None, None]
