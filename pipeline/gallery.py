"""Paintings to files: where they go, one by one or as one labelled grid, and the captions of the demo.

It does not know how a painting was made. It imports no torch before something is saved, so that a place that cannot be
written is refused at once.
"""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .text_to_image import Painting

CELL = 192  # pixels a side of a picture in a grid
SAME = 40  # dB from which on two pictures differ by rounding only
_OTHER_KINDS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".svg", ".pdf"}
_SCENES = (
    "a large yellow circle on a purple background",
    "маленькое красное кольцо на синем фоне",
    "a small white cross above a large red square on a black background",
    "большой зелёный треугольник слева от маленького жёлтого ромба на белом фоне",
    "a small red ring right of a large blue square on an orange background",
    "большое белое кольцо под маленьким чёрным квадратом на красном фоне",
    "a large black diamond left of a small orange circle on a white background",
    "маленький синий крест над большим фиолетовым кругом на жёлтом фоне",
)
_EMOJI = (
    "grinning cat",
    "red apple",
    "an emoji of rocket on a white background",
    "an emoji of sunflower on a blue background",
    "ракета",
    "морда кошки",
    "красное яблоко на чёрном фоне",
    "полумесяц на синем фоне",
)
DEMO = {
    "shapes/dalle": _SCENES,
    "shapes/stable-diffusion": _SCENES,
    "emoji/dalle": _EMOJI,
    "emoji/stable-diffusion": _EMOJI,
}


def captions(given: Sequence[str], file: Path | None) -> list[str]:
    """Captions that were given, then those of a text file, one a line. Raises ValueError where one is empty."""
    texts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines also ends lines within captions
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ValueError(f"cannot read {str(file)!r}: {reason}; name a text file with one caption a line") from None
        texts += [line.strip() for line in lines if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("a caption is missing or empty; expected one such as 'a small red ring on a blue background'")
    return texts


def check_target(out: Path) -> None:
    """Makes the folder of pictures to come, at need; asked before they are painted.

    Raises ValueError for another kind of picture than PNG, and OSError where nothing can be written.
    """
    if out.suffix.lower() in _OTHER_KINDS:
        raise ValueError(f"pictures are written as PNG, got {str(out)!r}; name a .png file or a folder")
    try_writing(out.parent if _is_file(out) else out)


def targets(out: Path, count: int, grid: bool = False) -> list[Path]:
    """Where `count` pictures, or one grid of them, go: a .png file, numbered if there are several, or a folder.

    In a folder the numbers go on from what lies there, so that nothing is painted over; an empty file keeps each place
    from others who paint into the folder at the same time, so ask when the pictures are there: what is not written
    then stays empty. Raises as `check_target`.
    """
    check_target(out)
    if not _is_file(out):
        stem = "grid-" if grid else ""
        taken = [path.stem.removeprefix(stem) for path in out.glob(f"{stem}[0-9]*.png")]
        first = max((int(name) for name in taken if name.isdecimal()), default=-1) + 1
        free = (path for k in itertools.count(first) if _claim(path := out / f"{stem}{k:04d}.png"))
        return list(itertools.islice(free, 1 if grid else count))
    if grid:
        return [out]
    return [out.with_name(f"{out.stem}-{k}.png") if k else out for k in range(count)]


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".png" and not out.is_dir()


def _claim(path: Path) -> bool:
    """Whether the file was made by this call, and not there before."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def try_writing(folder: Path) -> None:
    """Raises OSError unless files can be written in the folder, which is made at need."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write in {str(folder)!r}: {error.strerror}; name a place that you may write") from None


def save(paintings: Sequence["Painting"], paths: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Writes each painting to its path; returns the paths with what the files carry."""
    from .images import save_png
    from .text_to_image import metadata

    for painting, path in zip(paintings, paths, strict=True):
        save_png(painting.image, path, metadata(painting))
    return [(path, metadata(painting)) for painting, path in zip(paintings, paths, strict=True)]


def save_grid(paintings: Sequence["Painting"], path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Writes one picture of all paintings with their captions and scores, and with the models where there are several;
    returns its path with what it carries.
    """
    from . import images
    from .text_to_image import metadata

    captions, scores = [p.prompt for p in paintings], [p.clip_score for p in paintings]
    if len({p.facts["model"] for p in paintings}) > 1:
        captions = [f"{p.facts['model']}: {p.prompt}" for p in paintings]
    scale = max(1, CELL // max(p.image.width for p in paintings))
    drawn = None if None in scores else scores
    picture = images.grid([p.image for p in paintings], columns=4, captions=captions, scores=drawn, scale=scale)
    entry = {"paintings": [metadata(p) for p in paintings]}
    images.save_png(picture, path, entry)
    return [(path, entry)]
