"""Panels of a picture that explains: points of the plane, how densely they lie, bars; and the page that they stand on.

N points, K bars.

It does not know what the numbers mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ...pipeline.images import load_font
from ..charts import COLOURS, GREY, ticks

CLASSES = (*COLOURS, "#8C6D31", "#999999", "#7B2CBF")  # as many as there are digits
WIDTH = 440  # of a panel: six pictures of 32 pixels in a row, at twice their size
_DARK = (0, 72, 140)
_FINE = 3  # dots are drawn so much larger, and made smaller
_GAP, _LINE, _BINS = 24, 20, 55


@dataclass
class Dots:
    """Points (N, 2) and their colours, one for each or one for all; radius: in pixels."""

    points: Tensor
    colours: Sequence[str] | str
    radius: float = 1.5


@dataclass
class Column:
    """What stands under one title: lines of text, then pictures, each below its heading."""

    title: str
    lines: Sequence[str]
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)


def scatter(dots: Sequence[Dots], span: float, ground: Image.Image | None = None) -> Image.Image:
    """Dots between -span and span on both axes, later ones above; ground: what lies below them, instead of white."""
    side = WIDTH * _FINE
    canvas = Image.new("RGB", (side, side), "white") if ground is None else ground.resize((side, side))
    brush = ImageDraw.Draw(canvas)
    for some in dots:
        pixels = _pixels(some.points, span) * _FINE
        colours = [some.colours] * len(pixels) if isinstance(some.colours, str) else some.colours
        r = some.radius * _FINE
        for (x, y), colour in zip(pixels, colours, strict=True):
            brush.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    canvas = canvas.resize((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    brush, font = ImageDraw.Draw(canvas), load_font(12)
    brush.rectangle((0, 0, WIDTH - 1, WIDTH - 1), outline=GREY)
    for value in ticks(-span, span, False):
        at = (value + span) / (2 * span) * WIDTH
        if 16 < at < WIDTH - 16:
            brush.line((at, WIDTH - 5, at, WIDTH), fill="black")
            brush.text((at, WIDTH - 6), f"{value:g}", fill="black", font=font, anchor="mb")
            brush.line((0, WIDTH - at, 5, WIDTH - at), fill="black")
            brush.text((7, WIDTH - at), f"{value:g}", fill="black", font=font, anchor="lm")
    return canvas


def density(points: Tensor, span: float) -> Image.Image:
    """How densely points (N, 2) lie between -span and span: white where there is none."""
    counts = np.zeros((_BINS, _BINS))
    cells = (_pixels(points, span) * _BINS / WIDTH).astype(int)
    inside = ((cells >= 0) & (cells < _BINS)).all(axis=1)
    np.add.at(counts, (cells[inside, 1], cells[inside, 0]), 1)
    share = np.sqrt(counts / max(1.0, counts.max()))[..., None]
    colours = 255 + share * (np.array(_DARK) - 255)
    return Image.fromarray(colours.round().astype(np.uint8)).resize((WIDTH, WIDTH), Image.Resampling.NEAREST)


def _pixels(points: Tensor, span: float) -> np.ndarray:
    """(N, 2) -> x to the right and y downwards, in pixels of a panel."""
    flat = points.detach().cpu().double().numpy() / (2 * span) * (1, -1) + 0.5
    return flat * WIDTH


def bars(
    values: Sequence[float], names: Sequence[str] = (), size: tuple[int, int] = (WIDTH, 160), log: bool = False
) -> Image.Image:
    """K bars from 0 to 1 with their names below; or on a scale of logarithms, from the least above 0 to the largest."""
    width, height = size
    canvas, font = Image.new("RGB", size, "white"), load_font(12)
    brush, foot, step = ImageDraw.Draw(canvas), height - (20 if names else 4), width / len(values)
    least, most = min(value for value in values if value > 0), max(values)
    gap = 0.15 * step if names else 0.0
    for i, value in enumerate(values):
        share = (1 + math.log(value / least)) / (1 + math.log(most / least)) if log and value > 0 else value
        left = round(i * step + gap)
        right = max(left, round((i + 1) * step - gap) - 1)
        brush.rectangle((left, foot - (foot - 16) * share, right, foot), fill=COLOURS[0])
        if names:
            brush.text(((i + 0.5) * step, foot + 4), names[i], fill="black", font=font, anchor="mt")
            brush.text(((i + 0.5) * step, foot - (foot - 16) * share - 2), f"{value:.2f}", GREY, font, anchor="mb")
    brush.line((0, foot, width, foot), fill="black")
    if log:
        brush.text((width - 2, 2), f"from {most:.2g} to {least:.2g}", fill=GREY, font=font, anchor="rt")
    return canvas


def page(title: str, columns: Sequence[Column], legend: Sequence[tuple[str, str]] = ()) -> Image.Image:
    """Columns side by side below a title and a legend of (name, colour); pictures of a row should be of one height."""
    large, font, small = load_font(20), load_font(15), load_font(13)
    widths = []
    for column in columns:
        texts = [font.getlength(column.title), *(small.getlength(line) for line in column.lines)]
        texts += [small.getlength(heading) for heading, _ in column.pictures]
        widths.append(math.ceil(max([*texts, *(picture.width for _, picture in column.pictures)])))
    head = _GAP + 34 + (_LINE + 6 if legend else 0)
    lines = max(len(column.lines) for column in columns)
    heights = [
        head + 26 + _LINE * lines + sum(picture.height + _LINE + 14 for _, picture in column.pictures)
        for column in columns
    ]
    canvas = Image.new("RGB", (sum(widths) + _GAP * (len(columns) + 1), max(heights) + _GAP), "white")
    brush = ImageDraw.Draw(canvas)
    brush.text((_GAP, _GAP), title, fill="black", font=large)
    x = _GAP
    for name, colour in legend:
        brush.ellipse((x, _GAP + 38, x + 10, _GAP + 48), fill=colour)
        brush.text((x + 16, _GAP + 35), name, fill="black", font=small)
        x += 40 + round(small.getlength(name))
    left = _GAP
    for column, width in zip(columns, widths, strict=True):
        brush.text((left, head), column.title, fill="black", font=font)
        for i, line in enumerate(column.lines):
            brush.text((left, head + 24 + _LINE * i), line, fill="black", font=small)
        top = head + 26 + _LINE * lines
        for heading, picture in column.pictures:
            brush.text((left, top + 8), heading, fill="dimgrey", font=small)
            canvas.paste(picture, (left, top + _LINE + 8))
            top += picture.height + _LINE + 14
        left += width + _GAP
    return canvas
