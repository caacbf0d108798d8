"""The page of `kartina show latents`, and its table.

It does not know how the models were trained.
"""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ...pipeline.images import grid
from ..data.shapes import COLOURS, PALETTE
from .latents import Found
from .panels import CLASSES, WIDTH, Column, Dots, density, page, scatter

_PRIOR, _HOLE = "#D8D8D8", "#D55E00"
_WHITE = "#A8A8A8"  # of white backgrounds, to be seen on white
_SHOWN = 800  # draws of the prior below the latents


def picture(found: Sequence[Found], data: str, title: str) -> Image.Image:
    """A column for each model: its latents, the holes between them, reconstructions, ways between, samples."""
    legend = _classes(data)
    colours = [colour for _, colour in legend]
    return page(title, [_column(one, colours) for one in found], [*legend, ("draws of the prior", _PRIOR)])


def _classes(data: str) -> list[tuple[str, str]]:
    """The names and colours of what the labels of a data set tell apart."""
    if data == "digits":
        return [(str(digit), CLASSES[digit]) for digit in range(10)]
    own = ["#" + "".join(f"{round(255 * float(value)):02x}" for value in colour) for colour in PALETTE]
    return [(name, _WHITE if name == "white" else colour) for name, colour in zip(COLOURS, own, strict=True)]


def _column(found: Found, classes: Sequence[str]) -> Column:
    numbers = found.numbers
    lines = [
        f"reconstructions {numbers['psnr']:.1f} dB; samples {numbers['sample_psnr']:.1f} dB from the nearest picture",
        f"{numbers['holes']:.0%} of the prior in holes, {numbers['outside']:.0%} of the latents outside the prior",
    ]
    shown = torch.cat([found.draws, found.prior[:_SHOWN]]).abs().amax(dim=1)
    span = 1.05 * float(shown.quantile(0.995))
    colours = [classes[label] for label in found.labels.tolist()]
    below = Dots(found.prior[:_SHOWN], _PRIOR)
    latents = scatter([below, Dots(found.means, colours)], span)
    holes = scatter([Dots(found.prior[found.holes], _HOLE, 2)], span, density(found.draws, span))
    pictures = [
        ("means of the posteriors, by label", latents),
        ("draws of all posteriors; orange: of the prior, in holes", holes),
        ("pictures and what their latents give back", grid(found.pairs, 6, scale=_scale(found))),
        ("along lines between the latents of two pictures", grid(found.between, 6, scale=_scale(found))),
        ("pictures of draws of the prior", grid(found.samples, 6, scale=_scale(found))),
    ]
    return Column(found.model.name, lines, pictures)


def _scale(found: Found) -> int:
    return max(1, WIDTH // 6 // (found.pairs.shape[-1] + 4))


def report(found: Sequence[Found]) -> str:
    """A line for each model."""
    table = Table("model", "dB", "holes", "outside", "dB of samples", box=box.SIMPLE)
    for one in found:
        n = one.numbers
        figures = f"{n['psnr']:.1f}", f"{n['holes']:.1%}", f"{n['outside']:.1%}", f"{n['sample_psnr']:.1f}"
        table.add_row(one.model.name, *figures)
    text = io.StringIO()
    Console(file=text, width=110).print(table)
    return text.getvalue()
