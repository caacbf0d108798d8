"""Shards that lie elsewhere, mirrored in a folder: the index of each is here, a shard only while it is being read.

mirror.json says where each shard is from, its size and hash, and how many bytes of shards may lie here. One that is
read and is not here whole is fetched and checked; those that were read the longest ago make room for it. Every reader
of the folder, in whatever process, shares what is here. Addresses are opened by fsspec, of the protocols of a closed
list.

It does not know what a shard holds (`samples` does), nor who reads it.
"""

import contextlib
import functools
import glob
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from ..pipeline.checkpoint import file_hash, write_text
from ..pipeline.terminal import followed
from ..pipeline.whole_file import locked, replaced

FILE = "mirror.json"
FEWEST = 8  # shards that must find room: those of two windows of a stream
PROTOCOLS = ("https", "http", "s3", "gs", "az", "abfs", "hf", "file")
_FORMAT, _MOST = 1, 2**40  # most: bytes of a file
_PAUSES = (1.0, 5.0, 25.0)  # seconds
_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.tar")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """A shard: its name here, where it is from, and what it has to be."""

    name: str
    address: str
    bytes: int
    sha256: str


@functools.cache
def table(folder: Path) -> tuple[int, dict[str, Row]] | None:
    """The bytes that may lie in a mirror, and its shards by name; None for any other folder.

    Raises ValueError where mirror.json is damaged, or the mirror was not made to its end.
    """
    if (found := _read(folder)) is None:
        return None
    keep, rows, whole = found
    if not whole:
        raise ValueError(f"{folder} is a mirror that was not made to its end; run `kartina data mirror` again")
    return keep, rows


def row_of(shard: Path) -> Row | None:
    """What a shard of a mirror has to be, None for any other."""
    found = table(shard.parent)
    return None if found is None else found[1].get(shard.name)


def opened(shard: Path) -> BinaryIO:
    """A shard, open to be read; of a mirror, it is fetched where it is not here.

    Raises OSError where it cannot be read or fetched, after half a minute, and ValueError where it is not the one that
    was mirrored.
    """
    return open(shard, "rb") if row_of(shard) is None else _again(shard, lambda: _opened(shard))


def patiently(shard: Path, read: Callable[[BinaryIO], _T]) -> _T:
    """What `read` makes of an open shard, tried again after a while where the file system or the network fails.

    Raises like `opened`.
    """

    def once() -> _T:
        with _opened(shard) as file:
            return read(file)

    return _again(shard, once)


def make(address: str, folder: Path | str, keep: float) -> dict[str, Row]:
    """Makes the mirror of the shards at an address, or goes on with it; of them `keep` bytes at most will lie there.

    address: of a folder, or of shards with a range of numbers, as `https://host/x-{000000..000123}.tar`. An index that
    lies beside a shard is taken; without one the shard is fetched to make it. Returns the shards by name.

    Raises ValueError for an address that has no shards, or that fsspec cannot open, for shards of the same name, for
    less room than for FEWEST of them, for one that is no whole tar, and for a folder that holds anything else; OSError
    where a shard cannot be fetched. What was done is kept.
    """
    from .samples import index_path

    folder, addresses = Path(folder), {}
    if not 0 < keep < _MOST * 2**10:
        raise ValueError(f"a mirror needs room for some bytes, got {keep}")
    for one in _listed(address):
        name = _path_of(one).rpartition("/")[2]
        if not _NAME.fullmatch(name) or name in addresses:
            raise ValueError(f"{name!r} is no name of a shard, or that of two; expected names that end in .tar")
        addresses[name] = one
    folder.mkdir(parents=True, exist_ok=True)
    if (known := _read(folder)) is None and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something, and is no mirror; name a new folder")
    before = {} if known is None else known[1]
    rows = {name: row for name, row in before.items() if addresses.get(name) == row.address}
    with locked(folder):
        for name in before.keys() - rows.keys():  # of another address: neither it nor its index
            for path in (folder / name, index_path(folder / name)):
                path.unlink(missing_ok=True)
        whole = False
        try:
            _write(folder, keep, rows, whole)
            for name in followed(list(addresses), "looking at shards"):
                if name not in rows:
                    rows[name] = _look(folder, Row(name, addresses[name], 0, ""), keep, rows)
                _check_room(folder, keep, rows, len(addresses))
            _make_room(folder, keep, rows)
            whole = True
        finally:
            _write(folder, keep, rows, whole)
    return rows


def _look(folder: Path, row: Row, keep: float, rows: dict[str, Row]) -> Row:
    """A row with size and hash, whose index lies here from now on."""
    from .samples import build_index, index_path, read_index

    shard, base = folder / row.name, _path_of(row.address)
    beside = index_path(shard)
    try:
        _fetch(base.removesuffix(".tar") + ".index.json" + row.address.removeprefix(base), beside, 2**30)
        index = read_index(shard)
    except (OSError, ValueError):  # none, or none of ours
        _make_room(folder, keep - max((row.bytes for row in rows.values()), default=0), rows)
        _again(shard, lambda: _fetch(row.address, shard, min(_MOST, int(keep))))
        index = build_index(shard)
    if index.problem or not 0 < index.bytes < _MOST:
        for path in (shard, beside):
            path.unlink(missing_ok=True)
        raise ValueError(f"{row.address} is no shard to train from: {index.problem or f'{index.bytes} bytes'}")
    return Row(row.name, row.address, index.bytes, index.sha256)


def _opened(shard: Path) -> BinaryIO:
    row = row_of(shard)
    if row is None:
        return open(shard, "rb")
    with contextlib.suppress(FileNotFoundError):
        file = open(shard, "rb")  # noqa: SIM115
        if os.fstat(file.fileno()).st_size == row.bytes:
            _touch(shard)
            return file
        file.close()
    with locked(shard.parent):
        if not shard.is_file() or shard.stat().st_size != row.bytes:
            keep, rows = table(shard.parent) or (0, {})
            shard.unlink(missing_ok=True)
            for part in shard.parent.glob(f".{glob.escape(shard.name)}.[0-9]*"):  # of a process that was killed
                part.unlink()
            _make_room(shard.parent, keep - row.bytes, rows)
            _fetch(row.address, shard, row.bytes, row)
        _touch(shard)
        return open(shard, "rb")


def _again(shard: Path, act: Callable[[], _T]) -> _T:
    for pause in _PAUSES:
        try:
            return act()
        except OSError as error:
            warnings.warn(f"{shard} could not be read ({error}); trying again in {pause:.0f} s", stacklevel=3)
            time.sleep(pause)
    return act()


def _fetch(address: str, path: Path, most: int, row: Row | None = None) -> None:
    """Has a file of so many bytes at most lie here, whole or not at all.

    Raises OSError where it cannot be had, or has another size than the row says, and ValueError where it is another.
    """
    import fsspec

    class Bound(fsspec.callbacks.Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > most:
                raise OSError(f"it has more than {most} bytes")

    try:
        system, inside = fsspec.core.url_to_fs(address, **_patience_of(address))
        with replaced(path) as part:
            system.get_file(inside, str(part), callback=Bound())
            size = part.stat().st_size
            if size > most or (row is not None and size != row.bytes):
                raise OSError(f"it has {size} bytes, expected {most}")
            if row is not None and file_hash(part) != row.sha256:
                raise ValueError(f"{address} changed since it was mirrored; mirror it into a new folder, for a new run")
    except ImportError as error:
        raise ValueError(f"{address}: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # whatever a client of a network meets
        raise OSError(f"{address} could not be fetched into {path.parent}: {error!r:.200}") from error


def _patience_of(address: str) -> dict[str, Any]:
    """A large shard may take longer than the five minutes that aiohttp gives it, a silent server may not."""
    if urlsplit(address).scheme not in ("http", "https"):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}}


def _make_room(folder: Path, most: float, rows: dict[str, Row]) -> None:
    """Removes the mirrored shards that were read the longest ago until at most so many bytes of them are here."""
    here = []
    for name in rows:
        with contextlib.suppress(FileNotFoundError):
            here.append(((folder / name).stat(), folder / name))
    here.sort(key=lambda one: one[0].st_atime_ns)
    total = sum(stat.st_size for stat, _ in here)
    for stat, path in here:
        if total <= most:
            return
        path.unlink()  # who reads it has it open
        total -= stat.st_size


def _check_room(folder: Path, keep: float, rows: dict[str, Row], count: int) -> None:
    fewest = min(FEWEST, count)
    needed = fewest * max(row.bytes for row in rows.values())
    if keep < needed:
        raise ValueError(f"{folder} must have room for {fewest} shards, {needed / 1e9:.3g} GB, got {keep / 1e9:.3g}")


def _touch(shard: Path) -> None:
    """Notes that it was read now; a folder that cannot be written to needs no order, for nothing makes room there."""
    with contextlib.suppress(OSError):
        os.utime(shard, ns=(time.time_ns(), shard.stat().st_mtime_ns))


def _read(folder: Path) -> tuple[int, dict[str, Row], bool] | None:
    """What mirror.json says: bytes that may lie here, shards by name, and whether all are known. None without one."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"]: Row(**row) for row in content["shards"]}
        for row in rows.values():
            if type(row.bytes) is not int or not 0 < row.bytes < _MOST or not _NAME.fullmatch(row.name):
                raise ValueError(f"{row.name!r:.40} of {row.bytes!r:.40} bytes")
            _check_address(row.address)
        if content["format"] != _FORMAT:
            raise ValueError("of another format")
        return int(content["keep"]), rows, content["whole"] is True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); mirror the shards into a new folder") from None


def _write(folder: Path, keep: float, rows: dict[str, Row], whole: bool) -> None:
    content = {"format": _FORMAT, "keep": math.floor(keep), "whole": whole}
    write_text(folder / FILE, json.dumps(content | {"shards": [asdict(row) for row in rows.values()]}, indent=1))
    table.cache_clear()


def _check_address(address: str) -> None:
    scheme, found, _ = address.partition("://")
    if not found or scheme not in PROTOCOLS or "::" in address:
        raise ValueError(
            f"{address!r:.80} is no address; expected one of {', '.join(f'{one}://' for one in PROTOCOLS)}"
        )


def _path_of(address: str) -> str:
    """What names the file: without a query, which other protocols do not have."""
    return address.partition("?")[0] if address.startswith("http") else address


def _listed(address: str) -> list[str]:
    """The addresses of shards that an address stands for. Raises ValueError for none."""
    _check_address(address)
    if found := re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", address):
        before, first, last, after = found.groups()
        if int(last) < int(first):
            raise ValueError(f"{address}: expected a range of numbers that rises")
        return [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
    if _path_of(address).endswith(".tar"):
        return [address]
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address.rstrip("/"), **_patience_of(address))
        listed = [system.unstrip_protocol(one) for one in sorted(system.ls(path, detail=False))]
    except Exception as error:  # whatever a client of a network meets
        raise ValueError(
            f"{address} cannot be listed ({error!r:.200}); name its shards by a range of numbers"
        ) from error
    if not (shards := [one for one in listed if one.endswith(".tar")]):
        raise ValueError(f"{address} lists no .tar file; name its shards by a range of numbers")
    return shards
