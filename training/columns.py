"""Data sets of Hugging Face, whose pictures and captions are columns, packed into shards.

A data set is a Parquet file, a folder of them, or hf-hub:OWNER/NAME. It does not know folders of pictures (`packing`
does).
"""

import re
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..pipeline.published import HUB
from ..pipeline.terminal import followed
from .offers import (
    CAPTION_COLUMNS,
    CAPTION_TABLES,
    Offer,
    PackReport,
    as_text,
    captions_in,
    check_size,
    mixed,
    read_file,
    write,
)
from .samples import BadSample

_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def pack_dataset(
    source: Path | str,
    out: Path | str,
    samples_per_shard: int = 1000,
    captionless: bool = False,
    caption: str | None = None,
    picture: str | None = None,
    split: str = "train",
) -> PackReport:
    """Packs a split of a data set that the package datasets reads, bytes of the pictures untouched, into shards.

    source: a .parquet file, a folder of them (with several splits each file is named after its own, or lies in a folder
    that is), or hf-hub:OWNER/NAME. What datasets reads, it copies into its cache. caption: a column of strings, of
    lists of strings (several captions of one picture), or of classes, by default text or caption. picture: the column
    of pictures, by default the only one. captionless: as in `pack_folder`.
    Samples are named after the split and their row. Raises ValueError where datasets cannot read it, it lacks these
    columns, or nothing can be packed.
    """
    from huggingface_hub import constants

    try:
        import datasets
    except ImportError:
        raise ValueError("data sets are read by the package datasets: pip install 'kartina[data]'") from None
    report, where = PackReport(), f"{source}, split {split}"
    hub, homes = str(source).startswith(HUB), []
    files = [] if hub else _of_split(tables_in(Path(source)), Path(source), split)
    try:
        if hub:
            rows = datasets.load_dataset(str(source).removeprefix(HUB), split=split)
            homes = [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
        else:  # file by file: a folder's README may name others
            rows = datasets.load_dataset("parquet", data_files={split: [*map(str, files)]}, split=split)
    except Exception as error:  # whatever it meets: no such data set, no network, no such split, a torn file
        raise ValueError(f"{where}: datasets cannot read it ({error!s:.300})") from error
    shown, told = _picture_column(rows.features, picture, where), None
    if not captionless or caption is not None or {*CAPTION_COLUMNS} & {*rows.features}:
        told = _caption_column(rows.features, caption, where)
    names = getattr(_inner(rows.features[told]), "names", None) if told else None  # of classes
    rows = rows.select_columns([shown, told] if told else [shown]).cast_column(shown, datasets.Image(decode=False))
    name_of = f"{split}/{{:09d}}".format
    inside = [Path(home).resolve() for home in homes]

    def offers() -> Iterator[Offer]:
        for number in followed(mixed(range(len(rows)), name_of), "packing"):
            row = rows[number]
            text = partial(_text_of_cell, row[told] if told else None, names)
            yield Offer(name_of(number), partial(_read_cell, row[shown], inside), text)

    write(offers(), out, samples_per_shard, captionless, report, f"{where}, column {shown}")
    return report


def tables_in(path: Path) -> list[Path]:
    """The Parquet files of a data set, sorted; a table of captions beside pictures is none."""
    found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return [file for file in found if file.suffix == ".parquet" and file.name not in CAPTION_TABLES]


def _of_split(files: Sequence[Path], home: Path, split: str) -> list[Path]:
    """The files with the split's name in theirs, or in their folder's; all where there is but train, and none is named.

    Raises ValueError where no file is of the split, or some are of none.
    """
    if home.is_file():
        return list(files)
    named = {file: _split_of(file.relative_to(home).as_posix().lower(), split) for file in files}
    if split == "train" and not any(named.values()):
        return list(files)
    if missing := next((file for file, found in named.items() if found is None), None):
        raise ValueError(f"{home}: {missing.name} names no split ({', '.join(_SPLITS)}); name the file that is meant")
    if split not in named.values():
        known = ", ".join(sorted({str(found) for found in named.values()}))
        raise ValueError(f"{home} has no split {split}; its files are of {known}: name one with --split")
    return [file for file, found in named.items() if found == split]


def _split_of(path: str, wanted: str) -> str | None:
    """The split that a path names, the last one between other signs than letters and numbers."""
    words = "|".join(re.escape(word) for word in sorted({wanted, *_SPLITS}, key=len, reverse=True))
    found = re.findall(rf"(?<![a-z0-9])({words})(?![a-z0-9])", path)
    return found[-1] if found else None


def _read_cell(cell: dict[str, Any] | None, homes: Sequence[Path]) -> bytes:
    """A picture of a data set: its bytes, or those of a file that datasets fetched; no other file is read."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadSample("no picture")
    if cell["bytes"] is not None:
        check_size(len(cell["bytes"]))
        return bytes(cell["bytes"])
    inner, _, path = str(cell["path"]).rpartition("::")  # zip://INNER::ARCHIVE
    try:
        inside = any(Path(path).resolve().is_relative_to(home) for home in homes)
        if not inside or not re.fullmatch(r"(zip://[^:]+)?", inner):
            raise BadSample(f"names the file {cell['path']:.80} in place of the bytes of a picture")
        if not inner:
            return read_file(Path(path))
        with zipfile.ZipFile(path) as archive:
            check_size(archive.getinfo(inner[6:]).file_size)
            return archive.read(inner[6:])
    except BadSample:
        raise
    except Exception as error:  # a damaged archive raises anything
        raise BadSample(f"{cell['path']:.80} cannot be read: {error!r:.80}") from error


def _picture_column(features: Any, wanted: str | None, where: str) -> str:
    """The column of pictures. Raises ValueError where it is none, or not the only one."""
    held = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    found = [wanted] if wanted is not None else held if len(held) == 1 else [n for n in ("image",) if n in features]
    if len(found) != 1 or found[0] not in features:
        raise ValueError(f"{where} has the columns {', '.join(features)}; name that of the pictures with --picture")
    feature = features[found[0]]
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        raise ValueError(
            f"{where}: the column {found[0]} holds addresses of pictures, not pictures; fetch them first (img2dataset "
            "writes shards that train as they are)"
        )
    pair = isinstance(feature, dict) and {*feature} == {"bytes", "path"}
    if found[0] not in held and not pair and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise ValueError(f"{where}: the column {found[0]} holds {feature}, not pictures; name another with --picture")
    return found[0]


def _inner(feature: Any) -> Any:
    """What a list holds, or the feature itself."""
    return getattr(feature, "feature", feature)


def _caption_column(features: Any, wanted: str | None, where: str) -> str:
    """The column of captions. Raises ValueError where it is none, or holds no text."""
    for name in (wanted,) if wanted is not None else CAPTION_COLUMNS:
        if name in features:
            inner = _inner(features[name])
            if getattr(inner, "dtype", None) in ("string", "large_string") or type(inner).__name__ == "ClassLabel":
                return name
            raise ValueError(
                f"{where}: the column {name} holds {features[name]}, not text; name another with --caption"
            )
    raise ValueError(f"{where} has the columns {', '.join(features)}; name that of the captions with --caption")


def _text_of_cell(value: Any, names: Sequence[str] | None) -> bytes | None:
    """The captions of a cell; names: of classes, of which -1 is none."""
    if names is not None:
        classes = [one for one in (value if isinstance(value, list) else [value]) if one is not None and one != -1]
        if not all(0 <= one < len(names) for one in classes):
            raise BadSample(f"of the classes 0 to {len(names) - 1} there is no {value!r:.40}")
        value = [names[one] for one in classes]
    return as_text(captions_in(value))
