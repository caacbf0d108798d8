"""Checks images against facts of the shapes grammar: reads the scene back from the pixels and says which facts fail.

Analysis by synthesis. A fast pass over the whole batch explains clean images: blobs, their colour, soft coverage, area
and centroid, then one template per shape; it is believed only if the picture it predicts is the image, pixel by pixel.
Every other image is searched alone: blobs are split by colour and fitted with shapes of several radii and blurs.
An image that is not clearly right is rejected: a score is a lower bound.

N images, S image side, P foreground pixels of a batch, M blobs of a batch.

It does not know how the image was made. Faint ghosts near the background colour may pass unseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from scipy import ndimage

from ..data.shapes_scenes import AREAS, COLOURS, PALETTE, SHAPES, Array, Facts, coverage

FAILURES = ("background", "count", "colour", "shape", "size", "relation", "malformed")
SIZE_CUT = 0.146  # radius between small and large, in image sides
MALFORMED = 0.35  # template error per unit of area above which a blob is no shape
SLOPE = 1.1  # how much the distance along a relation's axis must exceed the one across it
_LEAST_AREA = 0.004  # of the image; smaller blobs are specks
_COLOUR_REACH = 0.30  # RGB distance within which a pixel has a palette colour
_BLURS = (0.0, 0.7, 1.1, 1.5)
_RADIUS_FACTORS = (0.88, 1.0, 1.12)
_MOST_BLOBS = 24
_MOST_MATCHED = 6  # objects seen that are tried where three or more are wanted: the orders to try are bounded
_CLEAN_ERROR, _CLEAN_MARGIN, _CLEAN_PIXEL, _CLEAN_MEAN = 0.01, 0.015, 0.25, 1e-3
_CHUNK = 64
_TOUCHING = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Found:
    """An object read from an image: indices, centre and radius in image sides, template error per unit of area."""

    size: int
    colour: int
    shape: int
    x: float
    y: float
    radius: float
    error: float


@dataclass(frozen=True)
class Parsed:
    """What an image shows: the index of its background colour and its objects."""

    background: int
    objects: tuple[Found, ...]


def check(images: np.ndarray, facts: Sequence[Facts]) -> list[set[str]]:
    """For each image the set of what fails among FAILURES, empty where the facts hold.

    images: (N, S, S, 3), uint8 or float in [0, 1]. Raises ValueError for another shape, range or number of facts.
    """
    if len(images) != len(facts):
        raise ValueError(f"check needs one facts for each image, got {len(images)} images and {len(facts)} facts")
    return [compare(seen, wanted) for seen, wanted in zip(parse(images), facts, strict=True)]


def parse(images: np.ndarray) -> list[Parsed]:
    """Reads each image (N, S, S, 3), uint8 or float in [0, 1]; ValueError as in `check`."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images must have the shape (N, S, S, 3), got {images.shape}: put the channels last")
    pixels = images.astype(np.float32)
    if images.dtype == np.uint8:
        pixels /= 255
    if pixels.size and not (pixels.min() >= -1e-4 and pixels.max() <= 1.0001):
        raise ValueError(
            f"float images must lie in [0, 1], got {pixels.min():.3g} to {pixels.max():.3g}: map and clamp first"
        )
    result: list[Parsed] = []
    for start in range(0, len(pixels), _CHUNK):
        part = np.ascontiguousarray(pixels[start : start + _CHUNK])
        labels = _labels(part)
        grounds = _backgrounds(labels)
        fast = _parse_clean(part, labels, grounds)
        result += [f or _parse_one(part[i], labels[i], int(grounds[i])) for i, f in enumerate(fast)]
    return result


def compare(seen: Parsed, wanted: Facts) -> set[str]:
    """What of the facts fails in the scene seen, under the matching of objects that fails least."""
    failures = set()
    if seen.background != wanted.background:
        failures.add("background")
    if len(seen.objects) != len(wanted.objects):
        failures.add("count")
    if any(thing.error > MALFORMED for thing in seen.objects):
        failures.add("malformed")
    things = seen.objects
    if len(wanted.objects) > 2:
        things = tuple(sorted(things, key=lambda thing: -thing.radius)[:_MOST_MATCHED])
    matched = min(len(things), len(wanted.objects))
    matchings = [
        _mismatches(dict(zip(places, order, strict=True)), wanted)
        for places in combinations(range(len(wanted.objects)), matched)
        for order in permutations(things, matched)
    ]
    fewest: list[str] = min(matchings, key=len)
    return failures | set(fewest)


def _mismatches(things: dict[int, Found], wanted: Facts) -> list[str]:
    """What fails where these things are the wanted objects of these places; of a missing one nothing else is said."""
    failures = []
    for place, thing in things.items():
        size, colour, shape = wanted.objects[place]
        pairs = (("size", thing.size, size), ("colour", thing.colour, colour), ("shape", thing.shape, shape))
        failures += [name for name, got, expected in pairs if got != expected]
    for place, relation in enumerate(wanted.relations, 1):
        if not {0, place} <= things.keys():
            continue
        dx, dy = things[place].x - things[0].x, things[place].y - things[0].y
        along, across = (dy, dx) if relation < 2 else (dx, dy)
        if relation % 2:
            along = -along
        if not along > SLOPE * abs(across):
            failures.append("relation")
    return failures


def _labels(images: Array) -> np.ndarray:
    """The nearest palette colour of each pixel: (N, S, S)."""
    nearness = images.reshape(-1, 3) @ (2 * PALETTE.T) - (PALETTE**2).sum(1)
    return nearness.argmax(1).reshape(images.shape[:3])


def _border(values: np.ndarray) -> np.ndarray:
    """The outermost pixels of (N, S, S, ...) as (N, 4 S - 4, ...)."""
    return np.concatenate([values[:, 0], values[:, -1], values[:, 1:-1, 0], values[:, 1:-1, -1]], axis=1)


def _backgrounds(labels: np.ndarray) -> np.ndarray:
    """The colour that fills the border, helped a little by the whole image: (N,)."""
    border = _border(labels)
    votes = [(border == c).sum(1) + 0.2 * (labels == c).sum((1, 2)) / labels.shape[1] for c in range(len(COLOURS))]
    return np.argmax(votes, axis=0)


def _parse_clean(images: Array, labels: np.ndarray, grounds: np.ndarray) -> list[Parsed | None]:
    """The fast pass: a parse for each image that it explains completely, None for the rest."""
    count, side = images.shape[0], images.shape[1]
    border, is_ground = _border(images), _border(labels) == grounds[:, None]
    ground = np.einsum("npc,np->nc", border, is_ground) / np.maximum(is_ground.sum(1), 1)[:, None]  # (N, 3)
    away = images - ground[:, None, None].astype(np.float32)
    structure = np.stack([np.zeros_like(_TOUCHING), _TOUCHING, np.zeros_like(_TOUCHING)])
    blobs, number = ndimage.label(labels != grounds[:, None, None], structure)
    zones = ndimage.maximum_filter(blobs, (1, 3, 3))  # each blob with its anti-aliased rim
    outside = np.where(zones == 0, np.abs(away).max(-1), 0).max((1, 2))  # (N,)
    clean = outside < _CLEAN_PIXEL
    if number == 0:
        return [Parsed(int(g), ()) if ok else None for g, ok in zip(grounds, clean, strict=True)]
    image_of, ys, xs = np.nonzero(zones)
    blob = zones[image_of, ys, xs] - 1  # (P,)
    owner = np.zeros(number, np.int64)
    owner[blob] = image_of
    shift = away[image_of, ys, xs]  # (P, 3)
    vector = _blob_colours(shift, blob, number)  # (M, 3)
    colour = ((ground[owner] + vector)[:, None] - PALETTE) ** 2
    squared = np.maximum((vector**2).sum(1), 1e-6)
    alpha = (shift * vector[blob]).sum(1) / squared[blob]
    area = np.bincount(blob, alpha, number)
    safe = np.maximum(area, 1e-6)
    x = np.bincount(blob, alpha * (xs + 0.5), number) / safe
    y = np.bincount(blob, alpha * (ys + 0.5), number) / safe
    dx, dy = (xs + 0.5 - x[blob]).astype(np.float32), (ys + 0.5 - y[blob]).astype(np.float32)
    templates = [coverage(s, dx, dy, np.sqrt(safe / AREAS[s]).astype(np.float32)[blob]) for s in range(len(SHAPES))]
    errors = np.stack([np.bincount(blob, (alpha - t) ** 2, number) for t in templates], 1) / safe[:, None]  # (M, 6)
    shape, ranked = errors.argmin(1), np.sort(errors, 1)
    best = np.stack(templates)[shape[blob], np.arange(len(blob))]
    residual = ((shift - best[:, None] * vector[blob]) ** 2).sum(1)
    mean = np.bincount(image_of, residual, count) / side**2
    certain = (ranked[:, 0] < _CLEAN_ERROR) & (ranked[:, 1] - ranked[:, 0] > _CLEAN_MARGIN)
    certain &= (area > _LEAST_AREA * side**2) & (colour.sum(2).min(1) < _COLOUR_REACH**2)
    clean &= (np.bincount(owner, ~certain, count) == 0) & (mean < _CLEAN_MEAN)
    radius = np.sqrt(safe / AREAS[shape]) / side
    named = colour.sum(2).argmin(1)
    objects: list[list[Found]] = [[] for _ in range(count)]
    for i in np.flatnonzero(clean[owner]):
        where = (float(x[i]) / side, float(y[i]) / side, float(radius[i]), float(ranked[i, 0]))
        objects[owner[i]].append(Found(int(radius[i] > SIZE_CUT), int(named[i]), int(shape[i]), *where))
    return [Parsed(int(grounds[i]), tuple(objects[i])) if clean[i] else None for i in range(count)]


def _blob_colours(shift: Array, blob: np.ndarray, number: int) -> np.ndarray:
    """The colour of each blob less its background, (M, 3): the mean of its pixels farthest from the background."""
    depth = (shift**2).sum(1)
    deepest = np.zeros(number, np.float32)
    np.maximum.at(deepest, blob, depth)
    pure = depth >= 0.96 * deepest[blob]
    share = np.bincount(blob, pure, number)
    return np.stack([np.bincount(blob, shift[:, c] * pure, number) for c in range(3)], 1) / share[:, None]


def _parse_one(image: Array, labels: np.ndarray, background: int) -> Parsed:
    """The careful search of one image (S, S, 3)."""
    ground = np.median(image[labels == background], axis=0)
    near = ((image - PALETTE[labels]) ** 2).sum(-1) < _COLOUR_REACH**2
    blobs, _ = ndimage.label(labels != background, _TOUCHING)
    sizes = np.bincount(blobs.ravel())
    sizes[0] = 0
    objects = []
    for number in np.argsort(-sizes)[:_MOST_BLOBS]:
        if sizes[number] >= max(_LEAST_AREA * labels.size, 1):
            blob = blobs == number
            parts = _colour_parts(image, ground, labels, near, blob, background)
            zones = [blob] if len(parts) == 1 else [core for _, core in parts]
            reach = ndimage.binary_dilation(blob, _TOUCHING, iterations=2).astype(np.int8)
            rows, columns = ndimage.find_objects(reach)[0]
            found = [
                _fit(image, ground, c, core, z, (rows, columns)) for (c, core), z in zip(parts, zones, strict=True)
            ]
            objects += [f for f in found if f is not None]
    return Parsed(background, tuple(objects))


def _colour_parts(image, ground, labels, near, blob, background) -> list[tuple[int, np.ndarray]]:
    """The objects of a blob as (colour, core): each colour with a compact core; mixing rims have none."""
    weights = np.bincount(labels[blob], ((image[blob] - ground) ** 2).sum(-1), len(COLOURS))
    weights[background] = 0
    whole = int(blob.sum())
    parts = []
    for colour in np.argsort(-weights):
        mask = blob & (labels == colour) & near
        area = int(mask.sum())
        if weights[colour] <= 0 or area < 0.10 * whole or area < 0.6 * _LEAST_AREA * labels.size:
            continue
        core = mask & (ndimage.uniform_filter(mask.astype(np.float32), 3, mode="constant") >= 0.60)
        if core.sum() >= max(1.0, 0.25 * area):
            parts.append((int(colour), core))
    colour = int(weights.argmax())
    return parts or [(colour, blob & (labels == colour))]


def _fit(
    image: Array, ground: Array, colour: int, core: np.ndarray, zone: np.ndarray, window: tuple[slice, slice]
) -> Found | None:
    """The best template for the object of a core inside a zone, both (S, S); None if it covers too little.

    window: the rows and columns compared; it holds the whole blob, so that a template wider than its core is punished.
    """
    side = len(image)
    rows, columns = window
    vector = (np.median(image[core], axis=0) if core.any() else PALETTE[colour]) - ground
    alpha = ((image[window] - ground) @ vector) / (float((vector**2).sum()) + 1e-9)
    alpha = np.clip(alpha, 0, 1.25) * ndimage.binary_dilation(zone[window], iterations=2)
    area = float(alpha.sum())
    if area < _LEAST_AREA * side * side:
        return None
    ys, xs = np.arange(rows.start, rows.stop) + 0.5, np.arange(columns.start, columns.stop) + 0.5
    x, y = float((alpha.sum(0) * xs).sum() / area), float((alpha.sum(1) * ys).sum() / area)
    dx, dy = (xs - x).astype(np.float32)[None, :], (ys - y).astype(np.float32)[:, None]
    errors, radii = _template_errors(alpha, dx, dy, area, (1.0,), free_contrast=False)
    ranked = np.sort(errors)
    if ranked[0] > 0.03 or ranked[1] - ranked[0] < 0.015:  # soft or small: a second look with free size and contrast
        errors, radii = _template_errors(alpha, dx, dy, area, _RADIUS_FACTORS, free_contrast=True)
    shape = int(errors.argmin())
    radius = float(radii[shape]) / side
    return Found(int(radius > SIZE_CUT), colour, shape, x / side, y / side, radius, float(errors[shape]))


def _template_errors(alpha, dx, dy, area, factors, free_contrast):
    """The least squared error per area of each shape over radii and blurs, and its radius: (6,) each."""
    radii = np.sqrt(area / AREAS)[:, None] * np.array(factors)  # (6, F)
    sharp = [[coverage(s, dx, dy, np.float32(r)) for r in radii[s]] for s in range(len(SHAPES))]
    stack = np.asarray(sharp, np.float32)  # (6, F, h, w)
    templates = np.stack([ndimage.gaussian_filter(stack, (0, 0, b, b)) if b else stack for b in _BLURS], axis=2)
    contrast: np.ndarray | float = 1.0
    if free_contrast:
        power = np.maximum((templates**2).sum((-2, -1), keepdims=True), 1e-6)
        contrast = np.clip((templates * alpha).sum((-2, -1), keepdims=True) / power, 0.75, 1.25)
    errors = ((alpha - contrast * templates) ** 2).sum((-2, -1)).min(2) / area  # (6, F)
    best = errors.argmin(1)
    index = np.arange(len(SHAPES))
    return errors[index, best], radii[index, best]
