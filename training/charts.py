"""Curves as a picture of small panels, and as one line of a terminal.

It does not know what the numbers mean, nor where they come from.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from ..pipeline.images import load_font

Points = Sequence[tuple[int, float]]

# Told apart by people who see few colours too (Okabe and Ito 2008); grey is the reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, _BAND, _GRID = "#888888", "#E4E4E4", "#EEEEEE"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 240, 52, 12, 28, 26  # of a panel, and what its axes leave free
_FINE = 3  # lines are drawn so much larger, and made smaller
_LEGEND = 30
_MANY = 60  # points, from which on their running median is drawn over them
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Panel:
    """One chart. lines: those of each run, in the same order in all panels; a run without this curve has no points.

    reference: a grey line. band: (step, low, high) of what is normal, shaded. log: the scale of the values.
    """

    title: str
    lines: list[Points]
    reference: Points = ()
    band: list[tuple[int, float, float]] = field(default_factory=list)
    log: bool = False


def smooth(points: Points) -> Points:
    """The running median of many points, over a thirtieth of them; few as they are."""
    if len(points) < _MANY:
        return points
    half = max(2, len(points) // 60)
    values = [value for _, value in points]
    return [(step, statistics.median(values[max(0, i - half) : i + half + 1])) for i, (step, _) in enumerate(points)]


def sparkline(points: Points, span: tuple[int, int], low: float, high: float, log: bool, width: int = 32) -> str:
    """points as blocks of eight heights, between low and high, over the steps of span."""
    cells: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        cells[min(width - 1, int(width * (step - span[0]) / max(1, span[1] - span[0])))].append(value)
    place = _scale(low, high, log)
    text, last = "", " "
    for cell in cells:
        last = _BLOCKS[min(7, int(8 * place(statistics.median(cell))))] if cell else last
        text += last
    end = max((i for i, cell in enumerate(cells) if cell), default=-1)
    return text[: end + 1].ljust(width)


def limits(lines: Sequence[Points]) -> tuple[float, float]:
    """Lowest and highest value of all lines, without the hundredth of most extreme ones on either side."""
    values = sorted(value for line in lines for _, value in line)
    cut = len(values) // 100
    return values[cut], values[-1 - cut]


def draw(panels: Sequence[Panel], labels: Sequence[str], columns: int = 3) -> Image.Image:
    """The panels row by row, under a legend that gives each run's label its colour."""
    columns = min(columns, len(panels))
    size = (columns * _WIDTH, _LEGEND + -(-len(panels) // columns) * _HEIGHT)
    fine = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
    corners = [(i % columns * _WIDTH, _LEGEND + i // columns * _HEIGHT) for i in range(len(panels))]
    frames = [_Frame(panel, *corner) for panel, corner in zip(panels, corners, strict=True)]
    for frame in frames:
        frame.draw_lines(fine)
    canvas = fine.resize(size, Image.Resampling.LANCZOS)
    for frame in frames:
        frame.write(ImageDraw.Draw(canvas))
    shown = [*zip(labels, _colours(len(labels)), strict=True)]
    if any(panel.reference for panel in panels):
        shown.append(("reference, and what is normal", GREY))
    _write_legend(ImageDraw.Draw(canvas), shown)
    return canvas


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _write_legend(brush: ImageDraw.ImageDraw, shown: Sequence[tuple[str, str]]) -> None:
    font, x = load_font(13), _LEFT
    for label, colour in shown:
        brush.rectangle((x, 14, x + 16, 17), fill=colour)
        brush.text((x + 22, 7), label, fill="black", font=font)
        x += 48 + round(font.getlength(label))


class _Frame:
    """Where a panel's axes lie on the canvas; corner: its upper left pixel."""

    def __init__(self, panel: Panel, x: int, y: int) -> None:
        self.panel, self.x, self.y = panel, x, y
        every = [line for line in [*panel.lines, panel.reference] if line]
        steps = [step for line in every for step, _ in line]
        self.span = min(steps), max(max(steps), min(steps) + 1)
        low, high = limits(every)
        if not panel.log:
            room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
            low, high = low - room, high + room
        elif high <= low:
            low, high = low / 2, high * 2
        self.low, self.high = low, high
        self.place = _scale(low, high, panel.log)

    def at(self, step: float, value: float) -> tuple[float, float]:
        """The pixel of a point, held inside the axes."""
        right = (step - self.span[0]) / (self.span[1] - self.span[0])
        x = self.x + _LEFT + right * (_WIDTH - _LEFT - _RIGHT)
        return x, self.y + _HEIGHT - _BOTTOM - self.place(value) * (_HEIGHT - _TOP - _BOTTOM)

    def draw_lines(self, canvas: Image.Image) -> None:
        brush = ImageDraw.Draw(canvas)

        def line(points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
            pixels = [(_FINE * x, _FINE * y) for x, y in (self.at(*point) for point in points)]
            if len(pixels) == 1:
                (x, y), r = pixels[0], 2 * _FINE
                brush.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            else:
                brush.line(pixels, fill=colour, width=width, joint="curve")

        for value in ticks(self.low, self.high, self.panel.log):
            line([(self.span[0], value), (self.span[1], value)], _GRID, _FINE)
        if len(self.panel.band) > 1:
            edge = [(step, high) for step, _, high in self.panel.band]
            edge += [(step, low) for step, low, _ in reversed(self.panel.band)]
            brush.polygon([(_FINE * x, _FINE * y) for x, y in (self.at(*point) for point in edge)], fill=_BAND)
        if self.panel.reference:
            line(self.panel.reference, GREY, 2 * _FINE)
        for points, colour in zip(self.panel.lines, _colours(len(self.panel.lines)), strict=True):
            if len(points) >= _MANY:
                line(points, _pale(colour), _FINE)
        for points, colour in zip(self.panel.lines, _colours(len(self.panel.lines)), strict=True):
            if points:
                line(smooth(points), colour, 2 * _FINE)
        line([(self.span[0], self.high), (self.span[0], self.low), (self.span[1], self.low)], "black", _FINE)

    def write(self, brush: ImageDraw.ImageDraw) -> None:
        small, font = load_font(11), load_font(13)
        brush.text((self.x + _LEFT, self.y + 6), self.panel.title, fill="black", font=font)
        for value in ticks(self.low, self.high, self.panel.log):
            x, y = self.at(self.span[0], value)
            brush.text((x - 5, y), f"{value:.4g}", fill="black", font=small, anchor="rm")
        for step in ticks(*self.span, False):
            x, y = self.at(step, self.low)
            brush.text((x, y + 5), _short(step), fill="black", font=small, anchor="mt")
        brush.text((self.x + _LEFT - 16, self.y + _HEIGHT - _BOTTOM + 5), "step", fill=GREY, font=small, anchor="rt")


def _pale(colour: str) -> str:
    """Three parts of white, one of the colour."""
    return "#" + "".join(f"{(3 * 255 + int(colour[i : i + 2], 16)) // 4:02x}" for i in (1, 3, 5))


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"


def _scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """Values to [0, 1]; those beyond low and high to its ends."""
    turn = (lambda value: math.log(max(value, low))) if log else float
    wide = turn(high) - turn(low) or 1.0
    return lambda value: min(1.0, max(0.0, (turn(value) - turn(low)) / wide))


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between low and high: three to six, of 1, 2 and 5 times powers of ten."""
    if log and high > 3 * low:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 6)]
        return found
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
