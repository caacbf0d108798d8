"""Level S3 of the shapes grammar: three objects in two relations, or one to four alike; their rows and placement.

A wide row is a row of shapes_scenes and (size, colour, shape, relation, count): the third object, the relation of the
first object to it, and how many there are of the first object where the caption counts; -1 where there is nothing.
The two relations lie on different axes ("above B and left of C", never "above B and below C"): three of the largest
shapes in a line do not fit. Nothing else is restricted, but large radii of S3 end at 0.18 of the image, where S1 and S2
go to 0.195: so three or four large shapes always fit, and placement is a closed formula without a second try.

N scenes, M scenes of one kind, S image side.

It does not know captions, held-out splits or batches.
"""

import numpy as np
from numpy.typing import NDArray

from .shapes_scenes import (
    EXTENTS,
    GAP,
    MARGIN,
    MOST_OBJECTS,
    NARROW,
    RADII,
    WIDE,
    Rows,
    Scenes,
    place,
    things,
)

DRAWS = 6 + 16  # uniform draws of a scene: those of `place`, then those of more objects
VARIANTS = 16  # sizes of three objects and which of the two clauses comes first
LARGEST = 0.18

Draws = NDArray[np.float64]


def count_rows(kinds: Rows) -> Rows:
    """Wide rows (4 N, 13) that count one to four of each one-object row (N, 8)."""
    rows = np.pad(np.repeat(kinds, MOST_OBJECTS, axis=0), ((0, 0), (0, WIDE - NARROW)), constant_values=-1)
    rows[:, 12] = np.tile(np.arange(1, MOST_OBJECTS + 1), len(kinds))
    return rows


def three_rows(kinds: Rows) -> Rows:
    """Wide rows (M, 13) of three objects, all small, from small one-object rows (N, 8) of one background.

    Every choice of three with differing colours; "above" or "below" is the first relation. `vary` gives each row its
    16 variants.
    """
    a, b, c, vertical, horizontal = np.indices((len(kinds),) * 3 + (2, 2)).reshape(5, -1)
    colours = kinds[:, 2]
    keep = (colours[a] != colours[b]) & (colours[a] != colours[c]) & (colours[b] != colours[c])
    a, b, c, vertical, horizontal = (v[keep] for v in (a, b, c, vertical, horizontal))
    second, third = (np.column_stack([kinds[i, 1:4], r]) for i, r in ((b, vertical), (c, 2 + horizontal)))
    return np.column_stack([kinds[a, :4], second, third, np.full(len(a), -1)])


def vary(rows: Rows, variant: NDArray[np.int64]) -> Rows:
    """Rows (N, 13) of three objects with the sizes and the order of clauses that variant (N,) in [0, 16) names."""
    rows = rows.copy()
    rows[:, [1, 4, 8]] = variant[:, None] >> np.arange(3) & 1
    other = variant >= 8
    rows[other, 4:12] = np.roll(rows[other, 4:12], 4, axis=1)
    return rows


def place_many(rows: Rows, draws: Draws, size: int = 32) -> Scenes:
    """Radii and centres for wide rows (N, 13) from uniform draws (N, 22) in (0, 1); K = 4 slots.

    One and two objects stand as `place` puts them. Of three, each related pair keeps the rule of `place`: GAP apart
    along the relation's axis and at most half as much across it. The boxes around any two objects are GAP apart.
    Raises ValueError for an image side other than 32 or 64.
    """
    radius, x, y = np.zeros((3, len(rows), MOST_OBJECTS))
    three, several = rows[:, 8] >= 0, rows[:, 12] > 1
    few = ~(three | several)
    pair = place(rows[few, :NARROW], draws[few, :6], size)
    x[few, :2], y[few, :2], radius[few, :2] = pair.x, pair.y, pair.radius
    kinds, more = things(rows), draws[:, 6:]
    low, high = RADII[kinds[..., 0], 0], np.minimum(RADII[kinds[..., 0], 1], LARGEST)
    spread = np.where(kinds[..., 0] >= 0, low + (high - low) * more[:, :4], 0.0) * size  # (N, 4)
    radius = np.where(few[:, None], radius, spread)
    reach = EXTENTS[kinds[..., 2]] * radius[..., None] + MARGIN  # (N, 4, 3): up, down, side
    box = np.stack([reach[..., [2, 2]], reach[..., :2]], axis=2)  # (N, 4, 2, 2): object, axis x y, before and after
    centres = np.stack([x, y], axis=2)
    centres[three, :3] = _place_three(rows[three][:, [7, 11]], box[three, :3], more[three, 4:], size)
    centres[several] = _place_grid(box[several], more[several, 4:], size)
    centres = np.where(kinds[..., :1] >= 0, centres, 0.0)
    return Scenes(rows, centres[..., 0], centres[..., 1], radius, size)


def _place_grid(box, draws, size):
    """Centres (M, 4, 2), each object anywhere in its own quarter of the image: box (M, 4, 2, 2), draws (M, 12)."""
    quarter = np.argsort(draws[:, 8:12], axis=1)
    corner = np.stack([quarter % 2, quarter // 2], axis=2) * (1 + GAP) * size / 2
    free = (1 - GAP) * size / 2 - box.sum(3)
    return corner + box[..., 0] + draws[:, :8].reshape(-1, MOST_OBJECTS, 2) * free


def _place_three(relations, box, draws, size):
    """Centres (M, 3, 2) of three objects: relations (M, 2) of the first, box (M, 3, 2, 2), draws (M, 12).

    Solved in a frame where B stands right of A, in a row with it, and C below both: a draw says which of the two
    relations makes the row, the axes are exchanged and turned to fit, and the centres are turned back.
    """
    index = np.arange(len(relations))[:, None]
    upright = draws[:, 0] < 0.5  # the row runs along y
    partner = np.where((relations[:, 0] < 2) == upright, 1, 2)  # the slot of B
    order = np.stack([np.zeros_like(partner), partner, 3 - partner], axis=1)
    turned = relations[index, order[:, 1:] - 1] % 2 == 1  # (M, 2): the frame's axes
    box = box[index, order]
    box = np.where(upright[:, None, None, None], box[:, :, ::-1], box)
    box = np.where(turned[:, None, :, None], box[..., ::-1], box)
    centres = _corner(box, draws[:, 1:], size)
    centres = np.where(turned[:, None], size - centres, centres)
    centres = np.where(upright[:, None, None], centres[..., ::-1], centres)
    result = np.empty_like(centres)
    result[index, order] = centres
    return result


def _corner(box, draws, size):
    """Centres (M, 3, 2) of A, B right of A, C below both: box (M, 3, 2, 2), draws (M, 6)."""
    (a_left, b_left, c_left), (a_right, b_right, c_right) = box[:, :, 0].transpose(2, 1, 0)
    (a_up, b_up, c_up), (a_down, b_down, c_down) = box[:, :, 1].transpose(2, 1, 0)
    between = a_right + GAP * size + b_left
    shift = np.sort(draws[:, :2], axis=1).T * (size - a_left - between - b_right)
    a_x, b_x = a_left + shift[0], a_left + between + shift[1]
    below = GAP * size + c_up + c_down
    room = size - np.maximum(a_up, b_up) - np.maximum(a_down, b_down) - below  # never negative; each pixel of drift
    drift = (2 * draws[:, 2] - 1) * np.minimum(room, 0.5 * (b_x - a_x))  # of B takes one of it at most
    up, down = np.maximum(a_up, b_up - drift), np.maximum(a_down, b_down + drift)
    shift = np.sort(draws[:, 3:5], axis=1).T * (size - up - down - below)
    a_y, c_y = up + shift[0], up + down + GAP * size + c_up + shift[1]
    limit = 0.5 * (c_y - a_y)
    c_x = np.clip(a_x + (2 * draws[:, 5] - 1) * limit, c_left, size - c_right)
    return np.stack([np.stack([a_x, b_x, c_x], axis=1), np.stack([a_y, a_y + drift, c_y], axis=1)], axis=2)
