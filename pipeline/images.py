"""From tensors to pictures and back: 8-bit conversion, labelled grids, and PNG files that remember how they were made.

B pictures, H height, W width.

It does not know what a caption means; it draws it. This is the one place where values are clamped.
"""

import importlib.util
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from .whole_file import replaced

PHOTOS = ("PNG", "JPEG", "WEBP")  # what is read of pictures that kartina did not make
_KEY = "kartina"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
_MARGIN, _GAP = 8, 3  # pixels around a picture, and between a picture and its label
# Pillow's own font has no Cyrillic, so a font of the system or of matplotlib goes first.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
_CYRILLIC = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_LATIN = "a,b,v,g,d,e,yo,zh,z,i,y,k,l,m,n,o,p,r,s,t,u,f,kh,ts,ch,sh,shch,',y,',e,yu,ya"
_TRANSLITERATION = dict(zip(_CYRILLIC, _LATIN.split(","), strict=True))


def to_uint8(image: Tensor) -> Tensor:
    """image (B, 3, H, W), nominally in [-1, 1] -> (B, H, W, 3) uint8 on the CPU, clamped and rounded to nearest.

    -1 becomes 0 and 1 becomes 255. Raises ValueError for another shape or for NaN.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(image.shape)}; add the batch or the colour axis")
    image = image.detach().float().cpu()
    if image.isnan().any():
        raise ValueError("pictures must be numbers in [-1, 1], got NaN; look at the model that made them")
    return ((image + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(image: Tensor) -> list[Image.Image]:
    """image (B, 3, H, W), nominally in [-1, 1] -> B RGB pictures. Raises like `to_uint8`."""
    return [Image.fromarray(picture.numpy()) for picture in to_uint8(image)]


def fit(picture: Image.Image, size: int) -> Tensor:
    """The centre square of an RGB picture, float32 (3, S, S) in [-1, 1]: BOX to about twice S, then BICUBIC."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))  # first, or the resize looks past the crop's edge
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    pixels = torch.from_numpy(np.array(picture))  # (S, S, 3) uint8
    return pixels.permute(2, 0, 1).float() / 127.5 - 1  # (3, S, S)


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures in dB, infinite where all pixels are equal.

    Raises ValueError for pictures of unequal size.
    """
    if first.size != second.size:
        raise ValueError(f"psnr compares pictures of one size, got {first.size} and {second.size}")
    both = [np.asarray(picture.convert("RGB"), np.float64) for picture in (first, second)]
    error = float(np.square(both[0] - both[1]).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def grid(
    images: Tensor | Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    scores: Sequence[float] | Tensor | None = None,
    scale: int = 1,
) -> Image.Image:
    """Pictures row by row on white, each above its caption and CLIP score.

    images (B, 3, H, W) in [-1, 1], or B pictures; captions and scores of B entries or None. Each pixel of the largest
    picture is drawn as scale x scale; a smaller one is enlarged by the largest whole number that fits, and centred.
    Captions are wrapped to the cell's width; Cyrillic is transliterated only where the machine has no font for it.
    Raises ValueError for no pictures, unequal counts, or columns or scale below 1.
    """
    pictures = to_pil(images) if isinstance(images, Tensor) else [picture.convert("RGB") for picture in images]
    _check_grid(pictures, columns, captions, scores, scale)
    width, height = (scale * max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    font = load_font(min(14, max(9, width // 8)))
    labels = _labels(len(pictures), captions, scores, font, width)
    line = sum(font.getmetrics())
    columns = min(columns, len(pictures))
    lines = [max(map(len, labels[i : i + columns])) for i in range(0, len(pictures), columns)]
    heights = [height + _MARGIN + (_GAP + line * count if count else 0) for count in lines]
    canvas = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(i, columns)
        x, y = _MARGIN + column * (width + _MARGIN), _MARGIN + sum(heights[:row])
        drawn = _enlarged(picture, width, height)
        canvas.paste(drawn, (x + (width - drawn.width) // 2, y + (height - drawn.height) // 2))
        for j, words in enumerate(label):
            grey = scores is not None and j == len(label) - 1
            draw.text((x, y + height + _GAP + j * line), words, fill="dimgrey" if grey else "black", font=font)
    return canvas


def _enlarged(picture: Image.Image, width: int, height: int) -> Image.Image:
    factor = min(width // picture.width, height // picture.height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_png(image: Image.Image, path: str | Path, metadata: dict[str, Any]) -> None:
    """Write a PNG with `metadata` as JSON in a text chunk (iTXt, key "kartina"); the file appears whole or not at all.

    Raises ValueError if the path does not end in .png or the metadata is not a dict that JSON can hold, and OSError if
    the path cannot be written. `read_metadata` gives the dict back.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a picture's path must end in .png, got {str(path)!r}; rename it")
    try:
        text = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"metadata must be a dict that JSON can hold, got {error}; use str, int, float, list"
        ) from error
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_KEY, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    try:
        with replaced(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write {str(path)!r}: {reason}; name a file in an existing, writable folder") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The dict that `save_png` stored. Raises OSError for an unreadable file, ValueError if it holds no such dict."""
    with _opened(path) as image:
        text = image.info.get(_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{str(path)!r} holds no text under the key {_KEY!r}; only pictures written by kartina do")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the text of {str(path)!r} under {_KEY!r} must be JSON, got {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"the text of {str(path)!r} under {_KEY!r} must be a dict, got {type(metadata).__name__}")
    return metadata


def read_picture(path: str | Path, formats: tuple[str, ...] = ("PNG",), under: str = "white") -> Image.Image:
    """The picture of a file, see `upright`. Raises OSError for an unreadable or cut file, ValueError for one of another
    format.
    """
    with _opened(path, formats) as image:
        return upright(image, under)


def upright(picture: Image.Image, under: str = "white") -> Image.Image:
    """A picture in RGB, as training reads it and users give it: turned as its EXIF says where that is legible,
    transparency laid over a colour, 16-bit grey scaled to 8 bits. Raises what Pillow does where it cannot be decoded.

    What it returns is upright already, and stays as it is: it has no EXIF.
    """
    picture.load()
    turn = None
    with suppress(Exception):  # damaged EXIF raises anything, and says nothing of the pixels
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    picture = picture if turn is None else picture.transpose(turn)
    if picture.mode.startswith("I"):
        levels, clear = np.asarray(picture).astype(np.int64).clip(0, 65535), picture.info.get("transparency")
        picture = Image.fromarray((levels // 257).astype(np.uint8))
        if isinstance(clear, int):
            picture.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, under), picture)
    found = picture.convert("RGB")
    found.info = {}  # Pillow copies what the file said, also of how it is to be turned
    return found


@contextmanager
def _opened(path: str | Path, formats: tuple[str, ...] = ("PNG",)) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no picture {str(path)!r}") from error
    except Image.DecompressionBombError:
        most = (Image.MAX_IMAGE_PIXELS or 0) * 2
        raise ValueError(f"{str(path)!r} has more pixels than the {most:,} that are read; make it smaller") from None
    except (Image.UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} must be a {' or '.join(formats)}, got {error}") from error
    except OSError as error:
        raise OSError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _check_grid(pictures: list[Image.Image], columns: int, captions: Any, scores: Any, scale: int) -> None:
    if not pictures:
        raise ValueError("a grid needs at least one picture, got none")
    if columns < 1 or scale < 1:
        raise ValueError(f"a grid needs columns >= 1 and scale >= 1, got {columns} and {scale}")
    for name, entries in (("captions", captions), ("scores", scores)):
        if entries is not None and len(entries) != len(pictures):
            raise ValueError(f"a grid needs one entry of {name} per picture, got {len(entries)} for {len(pictures)}")


def _labels(count: int, captions: Any, scores: Any, font: ImageFont.FreeTypeFont, width: int) -> list[list[str]]:
    labels: list[list[str]] = [[] for _ in range(count)]
    for i, label in enumerate(labels):
        if captions is not None:
            label.extend(_wrap(_drawable(captions[i], font), font, width))
        if scores is not None:
            label.append(f"CLIP {float(scores[i]):.3f}")
    return labels


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width`; a word that does not fit alone is broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


@lru_cache(maxsize=8)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The first font of this machine that draws Cyrillic, or else Pillow's own."""
    found = importlib.util.find_spec("matplotlib")  # found, not imported
    folders = found.submodule_search_locations or [] if found else []
    carried = [os.path.join(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf") for folder in folders]
    for name in (*_FONTS, *carried):
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if _covers(font, "ж"):
            return font
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return own


@lru_cache(maxsize=4096)
def _covers(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws the character as something else than its box for a missing one."""
    drawn, missing = font.getmask(character), font.getmask("\U0010fffe")
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text in characters that the font has: others are transliterated, or drawn as a question mark."""
    out = []
    for character in text:
        if character.isspace() or _covers(font, character):
            out.append(character)
            continue
        latin = _TRANSLITERATION.get(character.lower(), "?")
        out.append(latin.capitalize() if character.isupper() else latin)
    return "".join(out)
