"""Pictures with captions packed into shards: a folder of them, or a data set of Hugging Face (`columns`).

They are packed in an order that a hash of their names gives: the stream mixes a few shards at a time, and a folder or a
table that is sorted by class would show it few classes at once.

In a folder captions lie beside the pictures, `x.txt` beside `x.jpg`, or in a table: metadata.jsonl, metadata.csv or
metadata.parquet, whose rows name a picture in the column `file_name` (the package datasets calls that an imagefolder).

It does not know what shards are made of (`shards` does), nor what they train.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..pipeline.checkpoint import write_text
from ..pipeline.published import HUB
from ..pipeline.terminal import followed
from .columns import pack_dataset, tables_in
from .offers import CAPTION_COLUMNS, CAPTION_TABLES, Offer, PackReport, as_text, captions_in, mixed, read_file, write
from .samples import PICTURES, BadSample, decode, lines


def pack(
    source: Path | str,
    out: Path | str,
    samples_per_shard: int = 1000,
    captionless: bool = False,
    caption: str | None = None,
    picture: str | None = None,
    split: str | None = None,
    licence: str | None = None,
) -> PackReport:
    """Packs a folder with pictures (`pack_folder`), or else a data set of Hugging Face (`pack_dataset`).

    licence: of the pictures, which the manifest then names: a recipe that is trained on them must name it too.

    Raises ValueError where it is neither or both, where picture or split are given for a folder, and where nothing can
    be packed.
    """
    path, hub = Path(source), str(source).startswith(HUB)
    if not hub and not path.exists():
        raise ValueError(f"there is no file or folder {str(source)!r:.80}; for the hub write {HUB}OWNER/NAME")
    tables = [] if hub else tables_in(path)
    if hub or not path.is_dir() or not any(_extension(file) in PICTURES for file in path.rglob("*")):
        if not hub and not tables:
            raise ValueError(f"nothing to pack in {path}: no picture ({', '.join(PICTURES)}), and no .parquet file")
        report = pack_dataset(source, out, samples_per_shard, captionless, caption, picture, split or "train")
        return _licensed(report, out, licence, str(source))
    if tables:
        raise ValueError(
            f"{path} holds pictures and Parquet files, first {tables[0]}; name the folder of those that are meant"
        )
    if split is not None or picture is not None:
        raise ValueError(f"--split and --picture are of data sets in columns, {path} is a folder; name a folder in it")
    return _licensed(pack_folder(path, out, samples_per_shard, captionless, caption), out, licence, path.name)


def _licensed(report: PackReport, out: Path | str, licence: str | None, source: str) -> PackReport:
    """The same, with the licence in the manifest, where there is one."""
    if licence is not None:
        manifest = json.loads((Path(out) / "manifest.json").read_text(encoding="utf-8"))
        manifest["licences"] = [{"name": source, "licence": licence}]
        write_text(Path(out) / "manifest.json", json.dumps(manifest, indent=1))
    return report


def pack_folder(
    folder: Path | str,
    out: Path | str,
    samples_per_shard: int = 1000,
    captionless: bool = False,
    caption: str | None = None,
) -> PackReport:
    """Packs the pictures of a folder and its subfolders, bytes untouched, with their captions, into shards under `out`.

    Each line of a `.txt` is a caption of the picture, and so is each row of a table; the stream draws one of them.
    captionless: packs a picture without a caption too, and says in its json that it has none. caption: the column of
    the tables, by default text or caption.
    Every file and row that is not packed is named in the report. Duplicates are packed and named. Raises ValueError
    where nothing can be packed, or a table cannot be read.
    """
    folder, report = Path(folder), PackReport()
    out_path = Path(out).resolve()
    files = [path for path in sorted(_walk(folder, report)) if out_path not in path.resolve().parents]
    pictures = [p for p in files if _extension(p) in PICTURES]
    tables = [p for p in files if p.name in CAPTION_TABLES]
    rows = _Rows(folder, pictures, caption, captionless, report)
    used = {table for table in tables if rows.read(table)}
    texts = {p.with_suffix(""): p for p in files if _extension(p) == "txt"}

    def offers() -> Iterator[Offer]:
        for path in followed(mixed(pictures, lambda path: path.relative_to(folder).as_posix()), "packing"):
            beside = texts.get(path.with_suffix(""))
            used.update({beside} if beside else ())
            text = partial(_text_of, beside, rows.captions.get(path, []))
            yield Offer(path.relative_to(folder).as_posix(), partial(read_file, path), text)

    wanted = (
        f"pictures ({', '.join(PICTURES)}) with a .txt of the same name beside each, or a {' or '.join(CAPTION_TABLES)}"
    )
    write(offers(), out, samples_per_shard, captionless, report, f"{folder}: expected {wanted}")
    left = [path for path in files if path not in used and _extension(path) not in PICTURES]
    for path in left:
        kind = report.no_picture if _extension(path) == "txt" else report.ignored
        kind.append(path.relative_to(folder).as_posix())
    return report


def _walk(folder: Path, report: PackReport) -> Iterator[Path]:
    """The files of a folder and its subfolders; what is there and cannot be had is reported."""

    def lost(path: Path | str, why: str) -> None:
        report.bad[Path(path).relative_to(folder).as_posix()] = why

    for place, folders, names in os.walk(folder, onerror=lambda error: lost(error.filename, f"cannot read: {error}")):
        for name in folders:
            if (path := Path(place, name)).is_symlink():
                lost(path, "a link to a folder, which is not followed; pack that one on its own, or copy it here")
        for name in names:
            if (path := Path(place, name)).is_file():
                yield path
            else:
                lost(path, "a link to nothing" if path.is_symlink() else "no file of bytes")


def _extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _text_of(beside: Path | None, rows: Sequence[str]) -> bytes | None:
    """The text beside a picture, as it is, or with the captions that tables add to it."""
    text = None if beside is None else read_file(beside)
    if not rows:
        return text
    return as_text([*([] if text is None else lines(decode("txt", text))), *rows])


class _Rows:
    """What the tables of a folder say of its pictures: `captions` by picture. Rows that say nothing are reported."""

    def __init__(
        self, folder: Path, pictures: Sequence[Path], caption: str | None, captionless: bool, report: PackReport
    ) -> None:
        self.folder, self.report = folder, report
        self.columns = CAPTION_COLUMNS if caption is None else (caption,)
        self.needed = caption is not None or not captionless
        self._pictures = {os.path.normpath(path): path for path in pictures}
        self.captions: dict[Path, list[str]] = {}

    def read(self, table: Path) -> bool:
        """Whether the table is of pictures. Raises ValueError where it cannot be read, or has no captions at all."""
        place, columns, told = table.relative_to(self.folder).as_posix(), [], False
        try:
            for number, row in enumerate(_READERS[table.name](table), 1):
                if isinstance(row, BadSample):
                    self.report.bad[f"{place}, row {number}"] = str(row)
                    continue
                columns += [key for key in row if key not in columns]
                if "file_name" in row:
                    told |= any(column in row for column in self.columns)
                    self._take(table, row, f"{place}, row {number}")
            if columns and self.needed and "file_name" in columns and not told:
                raise ValueError(f"it has the columns {', '.join(columns)}; name that of the captions with --caption")
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{table}: {error}; mend it, or take it out of the folder") from error
        return "file_name" in columns

    def _take(self, table: Path, row: dict[str, Any], where: str) -> None:
        path = self._pictures.get(os.path.normpath(table.parent / str(row["file_name"])))
        if path is None:
            self.report.no_picture.append(f"{where}: {row['file_name']}")
            return
        try:
            found = (captions_in(row[column]) for column in self.columns if row.get(column) is not None)
            self.captions.setdefault(path, []).extend(next(filter(None, found), []))
        except BadSample as error:
            self.report.bad[where] = str(error)


def _rows_of_jsonl(path: Path) -> Iterator[dict[str, Any] | BadSample]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = str(error)
                yield row if isinstance(row, dict) else BadSample(f"not a JSON object: {row!s:.80}")


def _rows_of_csv(path: Path) -> Iterator[dict[str, Any] | BadSample]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            yield BadSample("more cells than columns; is a comma not quoted?") if None in row else row


def _rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet is read by the package pyarrow: pip install 'kartina[data]'") from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any] | BadSample]]] = dict(
    zip(CAPTION_TABLES, (_rows_of_jsonl, _rows_of_csv, _rows_of_parquet), strict=True)
)
