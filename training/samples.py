"""One sample of a tar shard: where it lies (the index), how it is read, and the closed table of decoders.

A shard is a plain tar in which members of one sample share a key: `000000012.jpg`, `000000012.txt`, `000000012.json`.
Beside each shard lies an index: where each member begins and ends, and the shard's hash. Members are read by offset and
decoded by our own table; nothing in a shard is ever executed. The format is WebDataset's (Aizman 2019,
arXiv 2001.01858).

It does not know how shards are written (`shards` does), nor the order in which samples are read (`stream` does).
"""

import contextlib
import hashlib
import io
import json
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..pipeline.checkpoint import file_hash, write_text
from ..pipeline.images import PHOTOS, upright
from ..pipeline.terminal import speaks
from . import mirror, tar_scan

_FORMAT = 4  # of the index
EMPTY = "the shard holds no samples"
PICTURES = ("jpg", "jpeg", "png", "webp")
ARRAYS = (
    "codes",
    "latents",
    "image_embedding",
    "text_embedding",
    "text_tokens",
)  # members NAME.npy of a cache, see `cache`
MEMBER_LIMIT = 64 * 2**20  # bytes of one member
PIXEL_LIMIT = 64_000_000  # below Pillow's own limit, which stays on


class BadSample(ValueError):
    """One sample cannot be used; the message is the reason."""


def decode_picture(data: bytes) -> Image.Image:
    """The picture of a file's bytes, see `pipeline.images.upright`. Raises BadSample with the reason."""
    try:
        with Image.open(io.BytesIO(data), formats=PHOTOS) as opened:
            if opened.width * opened.height > PIXEL_LIMIT:
                raise BadSample(f"too large: {opened.width}x{opened.height} is over {PIXEL_LIMIT} pixels")
            return upright(opened)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(f"too large: {error}") from error
    except UnidentifiedImageError as error:
        raise BadSample("undecodable picture: neither JPEG, PNG nor WebP") from error
    except Exception as error:  # decoders of hostile bytes raise anything: SyntaxError, struct.error, EOFError...
        raise BadSample(f"undecodable picture: {error}") from error


def _decode_text(data: bytes) -> str:
    return data.decode("utf-8-sig").strip()


def _decode_array(data: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise BadSample(f"expected one array of numbers, got {getattr(array, 'dtype', 'an archive')}")
    return array


DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(PICTURES, decode_picture),
    "txt": _decode_text,
    "json": json.loads,
    "npy": _decode_array,
    **{f"{name}.npy": _decode_array for name in ARRAYS},
}


def decode(extension: str, data: bytes) -> Any:
    """Decodes one member by its extension: picture (PIL, RGB), txt (str), json, npy (no pickles). Raises BadSample."""
    if extension not in DECODERS:
        raise BadSample(f"unknown kind of member .{extension}; known: {', '.join(DECODERS)}")
    if not data:
        raise BadSample(f"empty .{extension}")
    try:
        return DECODERS[extension](data)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"undecodable .{extension}: {error}") from error


@dataclass
class Entry:
    """One sample of a shard: its key, (offset, bytes) of each member, and what names and sizes tell is wrong.

    origin: a hash that stays the same when the sample is packed again, see `_origin`.
    """

    key: str
    members: dict[str, tuple[int, int]]
    problem: str | None = None
    origin: str = ""


@dataclass
class Index:
    """What lies where in one shard."""

    path: Path
    bytes: int
    sha256: str
    entries: list[Entry]
    problem: str | None = None

    def sample_name(self, member: int) -> str:
        """The name by which a sample is told of: shard/key."""
        return f"{self.path.name.removesuffix('.tar')}/{self.entries[member].key}"


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: `x.tar` -> `x.index.json`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.json")


def _scan(shard: Path, size: int) -> tuple[list[Entry], str | None]:
    entries: dict[str, Entry] = {}
    foreign: dict[str, str] = {}
    try:
        for info in tar_scan.files(shard):
            folder, _, name = info.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
            entry = entries.setdefault(key, Entry(key, {}))
            if extension not in DECODERS:
                foreign[key] = info.name
                continue
            if extension in entry.members:
                entry.problem = f"two members .{extension} under one key"
            if info.offset_data + info.size > size:
                entry.problem = f"truncated: the shard ends inside {info.name}"
            entry.members[extension] = (info.offset_data, info.size)
    except ValueError as error:
        return list(entries.values()), f"torn shard, or not an uncompressed tar: {error}"
    for key, name in foreign.items():
        if "." in name.rpartition("/")[2].partition(".")[2] and not set(PICTURES) & set(entries[key].members):
            entries[
                key
            ].problem = (
                f"dotted name {name!r}: WebDataset ends the key at the first dot; pack the files again with pack_folder"
            )
    return list(entries.values()), None if entries else EMPTY


def _origin(file: BinaryIO, entry: Entry) -> str:
    """64 bits, hexadecimal, of what a sample was before it was packed.

    Keys are running numbers here and elsewhere, so it is the json's `name` (`same_as` where an equal picture was packed
    before it), without one the picture's bytes, and the key only where neither can be read.
    """
    word = entry.key.encode(errors="surrogatepass")
    for extension in [one for one in PICTURES if one in entry.members][:1]:
        with contextlib.suppress(BadSample):
            word = read_member(file, entry, extension)
    with contextlib.suppress(BadSample):
        facts = decode("json", read_member(file, entry, "json")) if "json" in entry.members else {}
        name = (facts.get("same_as") or facts.get("name")) if isinstance(facts, dict) else None
        word = name.encode(errors="surrogatepass") if isinstance(name, str) and name else word
    return hashlib.blake2b(word, digest_size=8).hexdigest()


def build_index(shard: Path | str) -> Index:
    """Reads a shard's headers and hash and writes the index beside it (only in memory for read-only folders).

    Raises ValueError where there is no shard.
    """
    shard = Path(shard)
    if not shard.is_file():
        raise ValueError(f"no shard at {shard}: expected a .tar file, as `kartina data pack` or WebDataset writes it")
    stat = shard.stat()
    size = stat.st_size
    entries, problem = _scan(shard, size)
    with open(shard, "rb") as file:
        for entry in entries:
            entry.origin = _origin(file, entry)
    index = Index(shard, size, file_hash(shard), entries, problem)
    rows = [[e.key, e.members, e.problem, e.origin] for e in entries]
    content = {"format": _FORMAT, "bytes": size, "mtime_ns": stat.st_mtime_ns, "sha256": index.sha256}
    content |= {"problem": problem, "samples": rows}
    try:
        write_text(index_path(shard), json.dumps(content))
    except OSError:
        if speaks():
            warnings.warn(
                f"{shard.parent} cannot be written to, so that its shards are read whole at each start; where it holds "
                "their indexes, copy both with their times (cp -p, rsync -t)",
                stacklevel=2,
            )
    return index


_loaded: weakref.WeakValueDictionary[tuple[Path, int, int], Index] = weakref.WeakValueDictionary()


def load_index(shard: Path | str) -> Index:
    """The index of a shard; built where it is missing, of another format, or of a shard of another size or time.

    An index that is younger than its shard says nothing: `cp -p` brings back an older shard, and tar pads to one size.
    Sources of one process share it while the shard stays the same: where it cannot be written, it is built once.
    """
    shard = Path(shard)
    row = mirror.row_of(shard)
    if row is None and not shard.is_file():
        return build_index(shard)  # which says so
    stat = (shard if row is None else index_path(shard)).stat()
    key = (shard.absolute(), stat.st_size, stat.st_mtime_ns)
    index = _loaded.get(key)
    if index is None:
        index = _loaded[key] = _load_index(shard) if row is None else read_index(shard)
    if row is not None and (index.bytes, index.sha256) != (row.bytes, row.sha256):
        raise ValueError(f"{index_path(shard)} is not the mirrored shard's; mirror the shards into a new folder")
    return index


def _load_index(shard: Path) -> Index:
    here = shard.stat()
    with contextlib.suppress(ValueError):  # whatever is wrong with it, a new one is right
        index, then = _parse_index(shard)
        if here.st_mtime_ns % 10**9 == 0:  # so archives and some file systems keep times
            then = then // 10**9 * 10**9
        if (index.bytes, then) == (here.st_size, here.st_mtime_ns):
            return index
    return build_index(shard)


def read_index(shard: Path) -> Index:
    """The index beside a shard's place, whether or not the shard is there. Raises ValueError for no whole one."""
    return _parse_index(shard)[0]


def _parse_index(shard: Path) -> tuple[Index, int]:
    """The index that lies beside a shard, and the shard's time in it. Raises ValueError for none, or no whole one."""
    try:
        content = json.loads(index_path(shard).read_text(encoding="utf-8"))
        rows = [
            Entry(key, {e: (int(at), int(n)) for e, (at, n) in members.items()}, problem, f"{int(origin, 16):016x}")
            for key, members, problem, origin in content["samples"]
        ]
        if content["format"] != _FORMAT or any(at < 0 or n < 0 for row in rows for at, n in row.members.values()):
            raise ValueError("of another format, or with a place before the shard")
        index = Index(shard, int(content["bytes"]), str(content["sha256"]), rows, content["problem"])
        return index, int(content["mtime_ns"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{index_path(shard)} is no whole index: {error}; mirror the shards into a new folder"
        ) from error


def find_shards(where: Path | str | Sequence[Path | str]) -> list[Path]:
    """Shards of a folder, a file, or a list of either, sorted by name. Raises ValueError where there are none."""
    wanted = [where] if isinstance(where, (str, Path)) else list(where)
    found = [shard for one in map(Path, wanted) for shard in (_shards_in(one) if one.is_dir() else [one])]
    if not found:
        raise ValueError(f"no shards in {where}: expected a folder with .tar files; `kartina data pack` writes one")
    if len({shard.resolve() for shard in found}) < len(found):
        raise ValueError(f"a shard is named twice in {where}; each sample would be read twice a pass")
    return sorted(found, key=lambda shard: (shard.name, str(shard)))


def _shards_in(folder: Path) -> Iterable[Path]:
    mirrored = mirror.table(folder)
    return folder.glob("*.tar") if mirrored is None else [folder / name for name in mirrored[1]]


def read_member(file: BinaryIO, entry: Entry, extension: str) -> bytes:
    """The bytes of one member, by offset. Raises BadSample for one that is empty, too large or cut off."""
    offset, size = entry.members[extension]
    if size == 0:
        raise BadSample(f"empty .{extension}")
    if size > MEMBER_LIMIT:
        raise BadSample(f"too large: .{extension} has {size} bytes, over {MEMBER_LIMIT}")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise BadSample(f"truncated: .{extension} has {len(data)} of {size} bytes")
    return data


def read_sample(file: BinaryIO, entry: Entry) -> tuple[Image.Image, list[str]]:
    """Picture (RGB) and captions of one sample, see `read_captions`. Raises BadSample with the reason."""
    if entry.problem:
        raise BadSample(entry.problem)
    pictures = [extension for extension in PICTURES if extension in entry.members]
    if len(pictures) != 1:
        raise BadSample(f"expected one picture ({', '.join(PICTURES)}), got {len(pictures)}")
    captions = read_captions(file, entry)
    return decode(pictures[0], read_member(file, entry, pictures[0])), captions


def read_captions(file: BinaryIO, entry: Entry) -> list[str]:
    """The captions of one sample: the lines of its txt, or of `caption` of the json; one "" where that says that it was
    packed without any. Raises BadSample with the reason.
    """
    caption: Any = None
    if "txt" in entry.members:
        caption = decode("txt", read_member(file, entry, "txt"))
    elif "json" in entry.members:
        content = decode("json", read_member(file, entry, "json"))
        caption = content.get("caption") if isinstance(content, dict) else None
        if caption is None and isinstance(content, dict) and content.get("captionless") is True:
            return [""]
    if not isinstance(caption, str) or not (found := lines(caption)):
        raise BadSample("no caption: expected a .txt, or `caption` in the .json")
    if caption.encode(errors="ignore").decode() != caption:
        raise BadSample("the caption is not Unicode: it has half of a surrogate pair")
    return found


_ENDS = re.compile("\r\n|\r|\n")  # those of files: str.splitlines also ends lines within captions from the web


def lines(text: str) -> list[str]:
    """Its lines, without empty ones and outer space: each is a caption."""
    return [line.strip() for line in _ENDS.split(text) if line.strip()]


def read_encoded(file: BinaryIO, entry: Entry, names: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """The arrays of one sample of a cache, as named, and its captions. Raises BadSample with the reason."""
    if entry.problem:
        raise BadSample(entry.problem)
    if is_marked_bad(entry):
        content = decode("json", read_member(file, entry, "json"))
        raise BadSample(str(content.get("bad")) if isinstance(content, dict) else "unreadable .json")
    for name in names:
        if f"{name}.npy" not in entry.members:
            raise BadSample(f"no {name}.npy: encode the shards again")
    arrays = [decode(f"{name}.npy", read_member(file, entry, f"{name}.npy")) for name in names]
    return arrays, read_captions(file, entry)


def is_marked_bad(entry: Entry) -> bool:
    """Whether a sample of a cache only keeps the place of one that could not be read."""
    return set(entry.members) == {"json"}
