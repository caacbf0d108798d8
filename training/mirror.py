"""Shards that lie elsewhere, mirrored in a folder: the index of each is here, a shard only while it is being read.

mirror.json says where each shard is from (https://, s3://, gs:// and whatever else fsspec opens), its size and hash,
and how many bytes of shards may lie here. One that is read and is not here is fetched whole, and checked; those that
were read the longest ago make room for it. Every reader of the folder, in whatever process, shares what is here.

It does not know what a shard holds (`samples` does), nor who reads it.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..pipeline.checkpoint import write_text
from ..pipeline.terminal import followed

FILE = "mirror.json"
FEWEST = 8  # shards that must find room: those of two windows of a stream
_FORMAT = 1
_PAUSES = (1.0, 5.0, 25.0)  # seconds
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

    Raises ValueError where mirror.json is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content["shards"]]
        whole = content["format"] == _FORMAT and isinstance(content["keep"], int)
        if not whole or any(not _is_name(row.name) or type(row.bytes) is not int for row in rows):
            raise ValueError("of another format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); run `kartina data mirror` again") from None
    return content["keep"], {row.name: row for row in rows}


def is_mirrored(shard: Path) -> bool:
    """Whether a shard is of a mirror, here or not."""
    found = table(shard.parent)
    return found is not None and shard.name in found[1]


def present(shard: Path) -> Path:
    """A shard that is to be read: of a mirror, it is fetched where it is not here.

    Raises OSError where that fails, and ValueError where it is not the one that was mirrored.
    """
    if not is_mirrored(shard):
        return shard
    with contextlib.suppress(FileNotFoundError):
        os.utime(shard, ns=(time.time_ns(), shard.stat().st_mtime_ns))  # the order in which shards make room
        return shard
    with _alone(shard.parent):
        if not shard.is_file():
            keep, rows = table(shard.parent) or (0, {})
            row = rows[shard.name]
            _make_room(shard.parent, keep - row.bytes)
            _fetch(row.address, shard, row)
    return shard


def opened(shard: Path) -> BinaryIO:
    """A shard, open to be read; raises like `present`."""
    return open(present(shard), "rb")


def patiently(path: Path, read: Callable[[BinaryIO], _T]) -> _T:
    """What `read` makes of an open shard, tried again after a while where the file system or the network fails.

    Raises OSError where it still does after half a minute, and ValueError like `present`.
    """
    for pause in _PAUSES:
        try:
            with opened(path) as file:
                return read(file)
        except OSError as error:
            warnings.warn(f"{path} could not be read ({error}); trying again in {pause:.0f} s", stacklevel=2)
            time.sleep(pause)
    with opened(path) as file:
        return read(file)


def make(address: str, folder: Path | str, keep: float) -> dict[str, Row]:
    """Makes or completes the mirror of the shards at an address, of which `keep` bytes at most will lie in the folder.

    address: of a folder, or of shards with a range of numbers, as `https://host/x-{000000..000123}.tar`. An index that
    lies beside a shard is taken; without one the shard is fetched to make it. Returns the shards by name.

    Raises ValueError for an address that has no shards, or that fsspec cannot open, for shards of the same name, and
    for less room than for FEWEST of them; OSError where a shard cannot be fetched.
    """
    from .samples import index_path, read_index

    folder = Path(folder)
    addresses = _listed(address)
    names = [one.rpartition("/")[2] for one in addresses]
    if wrong := next((name for name in names if not _is_name(name) or names.count(name) > 1), None):
        raise ValueError(f"{wrong!r} is no name of a shard, or that of two; expected names that end in .tar, each once")
    folder.mkdir(parents=True, exist_ok=True)
    if table(folder) is None and any(path.suffix == ".tar" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds shards already, and is no mirror; name a new folder")
    rows: dict[str, Row] = {}
    for one, name in followed(list(zip(addresses, names, strict=True)), "looking at shards"):
        shard = folder / name
        _index(one, shard, keep)
        index = read_index(shard)
        rows[name] = Row(name, one, index.bytes, index.sha256)
    needed = min(FEWEST, len(rows)) * max(row.bytes for row in rows.values())
    if keep < needed:
        raise ValueError(
            f"{folder} must have room for {min(FEWEST, len(rows))} shards, {needed / 1e9:.3g} GB, got {keep / 1e9:.3g}"
        )
    with _alone(folder):
        _make_room(folder, keep)
    content = {"format": _FORMAT, "keep": int(keep), "shards": [asdict(row) for row in rows.values()]}
    write_text(folder / FILE, json.dumps(content, indent=1))
    table.cache_clear()
    for stale in set(folder.glob("*.index.json")) - {index_path(folder / name) for name in rows}:
        stale.unlink()
    return rows


def _index(address: str, shard: Path, keep: float) -> None:
    """Has the index of a shard lie beside its place here."""
    from .samples import build_index, index_path, read_index

    with contextlib.suppress(ValueError):
        read_index(shard)
        return
    beside = address.removesuffix(".tar") + ".index.json"
    with contextlib.suppress(OSError, ValueError):
        _fetch(beside, index_path(shard))
        read_index(shard)
        return
    _make_room(shard.parent, keep)
    _fetch(address, shard)
    build_index(shard)


def _listed(address: str) -> list[str]:
    """The addresses of shards that an address stands for. Raises ValueError for none."""
    if "://" not in address:
        raise ValueError(f"{address!r:.80} is no address; expected one as https://host/x-{{000000..000123}}.tar")
    if found := re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", address):
        before, first, last, after = found.groups()
        if int(last) < int(first) or not after.endswith(".tar"):
            raise ValueError(f"{address}: expected a range of numbers that rises, in the name of a .tar")
        return [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
    if address.endswith(".tar"):
        return [address]
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address.rstrip("/"))
        listed = [system.unstrip_protocol(one) for one in sorted(system.ls(path, detail=False))]
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{address} cannot be listed ({error}); name its shards by a range of numbers") from error
    if not (shards := [one for one in listed if one.endswith(".tar")]):
        raise ValueError(f"{address} lists no .tar file; name its shards by a range of numbers")
    return shards


def _fetch(address: str, path: Path, row: Row | None = None) -> None:
    """Has a file lie here, whole or not at all. Raises ValueError where it is not what the row says."""
    import fsspec

    part, digest = path.with_name(f".{path.name}.part"), hashlib.sha256()
    try:
        with fsspec.open(address, "rb") as source, open(part, "wb") as target:
            while block := source.read(2**20):
                digest.update(block)
                target.write(block)
    except ImportError as error:
        raise ValueError(f"{address}: {error}") from error
    except Exception as error:  # whatever a client of a network meets
        raise OSError(f"{address} could not be fetched: {error!r:.200}") from error
    if row is not None and (part.stat().st_size, digest.hexdigest()) != (row.bytes, row.sha256):
        part.unlink()
        raise ValueError(f"{address} changed since it was mirrored; mirror it into a new folder, for a new run")
    os.replace(part, path)


def _make_room(folder: Path, most: float) -> None:
    """Removes the shards that were read the longest ago until at most so many bytes of them are here."""
    here = sorted(((path.stat(), path) for path in folder.glob("*.tar")), key=lambda one: one[0].st_atime_ns)
    total = sum(stat.st_size for stat, _ in here)
    for stat, path in here:
        if total <= most:
            return
        path.unlink()  # who reads it has it open
        total -= stat.st_size


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    with open(folder / ".fetching", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[^/\\\x00.][^/\\\x00]*\.tar", name))
