"""Pictures with captions, from wherever they lie, packed into shards: a folder, or a data set of Hugging Face.

In a folder captions lie beside the pictures, `x.txt` beside `x.jpg`, or in a table: metadata.jsonl, metadata.csv or
metadata.parquet, whose rows name a picture in the column `file_name` (the package datasets calls that an imagefolder).
A data set is a Parquet file, a folder of them, or OWNER/NAME of the hub; its pictures and captions are columns.

It does not know what shards are made of (`shards` does), nor what they train.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..pipeline.images import PHOTOS
from ..pipeline.terminal import followed
from .samples import MEMBER_LIMIT, PICTURES, BadSample, decode, lines
from .shards import ShardWriter

CAPTION_COLUMNS = ("text", "caption")  # what is read where none is named
_MEMBERS = {"PNG": "png", "WEBP": "webp"}  # anything else that is decoded is a JPEG


@dataclass
class PackReport:
    """What packing did with each picture, text and row, by relative name."""

    packed: int = 0
    captionless: int = 0  # of these
    several: int = 0  # of these, with several captions
    no_caption: list[str] = field(default_factory=list)
    no_picture: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


@dataclass
class _Offer:
    """A picture that may be packed, and the text whose lines are its captions, if it has one; neither is read yet."""

    name: str
    picture: Callable[[], bytes]  # both raise BadSample or OSError
    text: Callable[[], bytes] | None


def pack(
    source: Path | str,
    out: Path | str,
    samples_per_shard: int = 1000,
    captionless: bool = False,
    caption: str | None = None,
    picture: str | None = None,
    split: str = "train",
) -> PackReport:
    """Packs a folder with pictures (`pack_folder`), or else a data set of Hugging Face (`pack_dataset`).

    Raises ValueError where it is neither, or nothing can be packed.
    """
    path = Path(source)
    if path.is_dir() and any(_extension(file) in PICTURES for file in path.rglob("*")):
        return pack_folder(path, out, samples_per_shard, captionless, caption)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise ValueError(f"nothing to pack in {path}: it holds no pictures ({', '.join(PICTURES)}), and no .parquet")
    if not path.is_dir() and not _is_table(path) and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise ValueError(f"{source} is no folder, no .parquet file, and no OWNER/NAME of a data set of the hub")
    return pack_dataset(source, out, samples_per_shard, captionless, caption, picture, split)


def pack_folder(
    folder: Path | str,
    out: Path | str,
    samples_per_shard: int = 1000,
    captionless: bool = False,
    caption: str | None = None,
) -> PackReport:
    """Packs the pictures of a folder and its subfolders, bytes untouched, with their captions, into shards under `out`.

    Each line of a `.txt` is a caption of the picture, and so is each row of a table; the stream draws one of them. A
    picture that a table has a caption for needs no text.
    captionless: packs a picture without a caption too, and says in its json that it has none. caption: the column of
    the tables, by default text or caption.
    Every file and row that is not packed is named in the report. Duplicates are packed and named. Raises ValueError
    where nothing can be packed, or a table cannot be read.
    """
    folder, report = Path(folder), PackReport()
    out_path = Path(out).resolve()
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and out_path not in p.resolve().parents]
    pictures = {p for p in files if _extension(p) in PICTURES}
    told = _captions_of_tables(folder, [p for p in files if p.name in _TABLES], pictures, caption, report)
    texts = {p.with_suffix(""): p for p in files if _extension(p) == "txt"}
    report.ignored = [
        p.relative_to(folder).as_posix()
        for p in files
        if _extension(p) not in (*PICTURES, "txt") and p.name not in _TABLES
    ]
    used: set[Path] = set()

    def offers() -> Iterator[_Offer]:
        for path in followed(sorted(pictures), "packing"):
            text: Callable[[], bytes] | None = None
            if rows := told.get(path):
                text = partial("\n".join(rows).encode, errors="surrogatepass")
            elif beside := texts.get(path.with_suffix("")):
                used.add(beside)
                text = beside.read_bytes
            yield _Offer(path.relative_to(folder).as_posix(), partial(_read_file, path), text)

    wanted = f"pictures ({', '.join(PICTURES)}) with a .txt of the same name beside each, or a {' or '.join(_TABLES)}"
    _write(offers(), out, samples_per_shard, captionless, report, f"{folder}: expected {wanted}")
    report.no_picture += [text.relative_to(folder).as_posix() for text in texts.values() if text not in used]
    return report


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

    source: a .parquet file, a folder of them, or OWNER/NAME of the hub, which is fetched into its cache.
    caption: a column of strings, of lists of strings (several captions of one picture), or of classes, by default text
    or caption. picture: the column of pictures, by default the only one. captionless: as in `pack_folder`.
    Samples are named after the split and their row. Raises ValueError where datasets cannot read it, lacks these
    columns, or nothing can be packed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("data sets are read by the package datasets: pip install 'kartina[data]'") from None
    report, where = PackReport(), f"{source}, split {split}"
    try:
        if _is_table(Path(source)):
            rows = datasets.load_dataset("parquet", data_files={split: str(source)}, split=split)
        else:
            rows = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # whatever it meets: no such data set, no network, no such split, a torn file
        raise ValueError(f"{where}: datasets cannot read it ({error!s:.300})") from error
    shown, told = _picture_column(rows.features, picture, where), None
    if not captionless or caption is not None or {*CAPTION_COLUMNS} & {*rows.features}:
        told = _caption_column(list(rows.features), caption, where)
    names = getattr(rows.features[told], "names", None) if told else None  # of classes
    rows = rows.select_columns([shown, told] if told else [shown]).cast_column(shown, datasets.Image(decode=False))
    homes = [Path(home).resolve() for home in (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE)]

    def offers() -> Iterator[_Offer]:
        for number in followed(range(len(rows)), "packing"):
            row = rows[number]
            value = row[told] if told else None
            captions = _captions(names[value] if names and isinstance(value, int) and value >= 0 else value)
            text = partial("\n".join(captions).encode, errors="surrogatepass") if captions else None
            yield _Offer(f"{split}/{number:09d}", partial(_read_cell, row[shown], homes), text)

    _write(offers(), out, samples_per_shard, captionless, report, f"{where}, column {shown}")
    return report


def _write(
    offers: Iterable[_Offer], out: Path | str, per_shard: int, captionless: bool, report: PackReport, where: str
) -> None:
    """Writes what is offered and says in the report what became of each. Raises ValueError where nothing is packed."""
    seen: dict[bytes, str] = {}
    with ShardWriter(out, per_shard) as writer:
        for offer in offers:
            if offer.text is None and not captionless:
                report.no_caption.append(offer.name)
                continue
            captions: list[str] = []
            try:
                data = offer.picture()
                members = {_member_of(data): data}
                if offer.text is not None:
                    members["txt"] = offer.text()
                    if not (captions := lines(decode("txt", members["txt"]))):
                        raise BadSample("empty .txt")
            except (BadSample, OSError) as error:
                report.bad[offer.name] = str(error)
                continue
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                report.duplicates.append(offer.name)
            first = seen.setdefault(digest, offer.name)  # a split into training and validation keeps equals together
            facts = {"same_as": first} if first != offer.name else {}
            writer.write(members, name=offer.name, **facts, **({"captionless": True} if offer.text is None else {}))
            report.captionless += offer.text is None
            report.several += len(captions) > 1
        report.packed = writer.count
        if not report.packed:
            raise ValueError(
                f"nothing to pack in {where}; {len(report.no_caption)} without caption, which --no-captions packs, "
                f"{len(report.bad)} broken{''.join(f' ({why})' for why in [*report.bad.values()][:1])}"
            )


def _extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _is_table(path: Path) -> bool:
    return path.suffix == ".parquet" and path.is_file()


def _member_of(data: bytes) -> str:
    """The member that holds a picture, by what its bytes are. Raises BadSample for none that can be decoded."""
    decode("png", data)
    with Image.open(io.BytesIO(data), formats=PHOTOS) as opened:
        return _MEMBERS.get(str(opened.format), "jpg")


def _read_file(path: Path) -> bytes:
    if path.stat().st_size > MEMBER_LIMIT:
        raise BadSample(f"too large: {path.stat().st_size} bytes, over {MEMBER_LIMIT}")
    return path.read_bytes()


def _read_cell(cell: dict[str, Any] | None, homes: Sequence[Path]) -> bytes:
    """A picture of a data set: its bytes, or those of a file that datasets fetched; no other file is read."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadSample("no picture")
    if cell["bytes"] is None:
        path = Path(cell["path"])
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise BadSample(f"names the file {path} in place of the bytes of a picture")
        return _read_file(path)
    if len(cell["bytes"]) > MEMBER_LIMIT:
        raise BadSample(f"too large: {len(cell['bytes'])} bytes, over {MEMBER_LIMIT}")
    return bytes(cell["bytes"])


def _picture_column(features: Any, wanted: str | None, where: str) -> str:
    """The column of pictures. Raises ValueError where it is none, or not the only one."""
    held = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    found = [wanted] if wanted is not None else held if len(held) == 1 else [n for n in ("image",) if n in features]
    if len(found) != 1 or found[0] not in features:
        raise ValueError(f"{where} has the columns {', '.join(features)}; name that of the pictures with --picture")
    if getattr(features[found[0]], "dtype", None) in ("string", "large_string"):
        raise ValueError(
            f"{where}: the column {found[0]} holds addresses of pictures, not pictures; fetch them first (img2dataset "
            "writes shards that train as they are)"
        )
    return found[0]


def _caption_column(columns: Sequence[str], wanted: str | None, where: str) -> str:
    for name in (wanted,) if wanted is not None else CAPTION_COLUMNS:
        if name in columns:
            return name
    raise ValueError(f"{where} has the columns {', '.join(columns)}; name that of the captions with --caption")


def _captions(value: Any) -> list[str]:
    """The captions of a cell, each without line breaks. Raises BadSample for what is neither text nor a list of it."""
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in values):
        raise BadSample(f"expected a caption, or a list of them, got {value!r:.60}")
    return [words for one in values if (words := " ".join(one.split()))]


def _captions_of_tables(
    folder: Path, tables: Sequence[Path], pictures: set[Path], caption: str | None, report: PackReport
) -> dict[Path, list[str]]:
    """What the tables of a folder say of its pictures. Rows that say nothing are named in the report."""
    told: dict[Path, list[str]] = {}
    for table in tables:
        place, column = table.relative_to(folder).as_posix(), None
        try:
            for number, row in enumerate(_TABLES[table.name](table), 1):
                if isinstance(row, BadSample):
                    report.bad[f"{place}, row {number}"] = str(row)
                    continue
                if "file_name" not in row:
                    raise ValueError(f"a row has the columns {', '.join(map(str, row))}, and no file_name")
                column = column or _caption_column([*row], caption, "a row")
                path = Path(os.path.normpath(table.parent / str(row["file_name"])))
                if path not in pictures:
                    report.no_picture.append(f"{place}, row {number}: {row['file_name']}")
                    continue
                try:
                    told.setdefault(path, []).extend(_captions(row.get(column)))
                except BadSample as error:
                    report.bad[f"{place}, row {number}"] = str(error)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{table}: {error}; mend it, or take it out of the folder") from error
    return told


def _rows_of_jsonl(path: Path) -> Iterator[dict[str, Any] | BadSample]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = str(error)
                yield row if isinstance(row, dict) else BadSample(f"not a JSON object: {row!s:.80}")


def _rows_of_csv(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet is read by the package pyarrow: pip install 'kartina[data]'") from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


_TABLES: dict[str, Callable[[Path], Iterator[dict[str, Any] | BadSample]]] = {
    "metadata.jsonl": _rows_of_jsonl,
    "metadata.csv": _rows_of_csv,
    "metadata.parquet": _rows_of_parquet,
}
