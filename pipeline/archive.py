"""Tensors out of what torch.save wrote (`.ckpt`, `.pt`, `.pkl`, `.bin`): the zip archive, and the format before torch
1.6.

The texts and tables of JSON that lie beside them are read here too, within a limit.

Tensors are read last, and only those asked for, so that the autoencoder of a large system takes no more memory than
itself. What the pickle inside says is read by `unpickle`, which runs nothing of it.

It does not know which model the tensors are of.
"""

import io
import json
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .unpickle import Record, Storage, StoredTensor, WeightsError, run

_PICKLE_LIMIT = 2**23  # bytes; names and shapes of the largest published systems take less than 1 MiB
_FACTS_LIMIT = 2**12  # bytes of each pickle before the first tensor, which torch writes in 200
_TEXT_LIMIT = 2**26  # bytes of one file; those of CLIP take 4 MiB
_DEPTH, _MOST, _NAME_LIMIT = 32, 100_000, 512  # of modules in modules, of their number, and letters of a path
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_DAMAGE = (ValueError, LookupError, TypeError, EOFError, AttributeError, OverflowError, RuntimeError, struct.error)


def read(path: Path, select: Callable[[Any], dict[str, StoredTensor]]) -> dict[str, Tensor]:
    """The tensors that `select` takes from what a file holds: dicts, lists, tuples, numbers, words, `StoredTensor`s and
    `Record`s.

    Raises WeightsError for a file that is damaged, of no known format, or larger inside than outside.
    """
    try:
        with open(path, "rb") as file:
            return _from_zip(file, path, select) if zipfile.is_zipfile(file) else _from_legacy(file, select)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (*_DAMAGE, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is damaged ({type(error).__name__}); copy or download it again") from None


def load(path: Path) -> dict[str, Tensor]:
    """The state dict that one file holds: safetensors, or what torch.save wrote. Raises WeightsError, see `read`."""
    if path.suffix != ".safetensors":
        return read(path, state_dict)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); download it again") from None


def names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file. Raises WeightsError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); download it again") from None


def text(path: Path) -> str:
    """What a text file holds. Raises WeightsError for one that is too large to be of a published model."""
    if path.stat().st_size > _TEXT_LIMIT:
        raise WeightsError(
            f"{path}: expected at most {_TEXT_LIMIT} bytes, got {path.stat().st_size}; download it again"
        )
    return path.read_text(encoding="utf-8")


def table(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; of no file, nothing. Raises WeightsError for what is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(text(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable as JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is no JSON object; download it again")
    return found


def find(folder: Path, *stems: str) -> Path:
    """The weights in a folder of diffusers or transformers: safetensors before pickles, a whole file before its half.

    stems: what such a file may be called, as "diffusion_pytorch_model". Raises WeightsError where there is none.
    """
    names = [f"{stem}{half}.{kind}" for kind in ("safetensors", "bin") for half in ("", ".fp16") for stem in stems]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        if next(folder.glob("*.index.json"), None) is not None:
            raise WeightsError(f"the weights in {folder} are in shards, which are not read; save them as one file")
        raise WeightsError(f"{folder / names[0]} is missing; download the whole folder, with safetensors")
    return found


def state_dict(content: Any) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name, or of one under that key, as Lightning writes it; what else lies there is
    left out.
    """
    table = content.get("state_dict", content) if isinstance(content, dict) else None
    if isinstance(content, Record) or not isinstance(table, dict):
        raise WeightsError("it holds no state dict; expected tensors by name")
    return {name: value for name, value in table.items() if isinstance(name, str) and isinstance(value, StoredTensor)}


def module_tensors(module: Any) -> dict[str, StoredTensor]:
    """The state dict of a module that was pickled whole, from its record: parameters and buffers by their paths."""
    found: dict[str, StoredTensor] = {}
    waiting = [("", module, 0)]
    for count in range(_MOST + 1):
        if not waiting:
            return found
        prefix, record, depth = waiting.pop()
        if (
            count == _MOST
            or depth > _DEPTH
            or len(found) > _MOST
            or not isinstance(record, Record)
            or not isinstance(record.state, dict)
        ):
            break
        tables = [record.state.get(table) or {} for table in ("_parameters", "_buffers", "_modules")]
        if any(len(prefix) + len(str(name)) > _NAME_LIMIT for table in tables for name in table):
            break
        *tensors, inner = tables
        for table in tensors:
            found |= {f"{prefix}{name}": value for name, value in table.items() if isinstance(value, StoredTensor)}
        if len(waiting) + len(inner) > _MOST:
            break
        waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in inner.items() if value is not None]
    raise WeightsError("it holds no module of finite depth; expected a state dict or a pickled torch module")


def _from_zip(file: BinaryIO, path: Path, select: Callable[[Any], dict[str, StoredTensor]]) -> dict[str, Tensor]:
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise WeightsError("its entries are compressed, which torch never does; save it again with torch.save")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise WeightsError(f"its entries claim more than the {size} bytes of the file; download it again")
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise WeightsError(f"expected one data.pkl in the archive, got {len(roots)}; save it again with torch.save")
        order = f"{roots[0]}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise WeightsError("its numbers are not little-endian; save it again on another machine")
        if entries[f"{roots[0]}data.pkl"].file_size > _PICKLE_LIMIT:
            raise WeightsError(f"its data.pkl has more than {_PICKLE_LIMIT} bytes; save the state dict alone")

        def numbers(storage: Storage) -> Tensor:
            return _numbers(archive.read(f"{roots[0]}data/{storage.key}"), storage)

        content = run(io.BytesIO(archive.read(f"{roots[0]}data.pkl")), _PICKLE_LIMIT)
        return _tensors(select(content), numbers)


def _from_legacy(file: BinaryIO, select: Callable[[Any], dict[str, StoredTensor]]) -> dict[str, Tensor]:
    """A magic number, a version, facts of the machine, the object, the keys; then a count and numbers for each key."""
    file.seek(0)
    if file.read(2) != b"\x80\x02":
        raise WeightsError("it is no checkpoint of torch; expected what torch.save writes, or a name in .safetensors")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:  # no read goes further than the file
        if run(data, _FACTS_LIMIT) != _MAGIC or run(data, _FACTS_LIMIT) != _VERSION:
            raise WeightsError("it is a pickle, but not of torch.save; save the state dict with torch.save")
        if run(data, _FACTS_LIMIT).get("little_endian") is not True:
            raise WeightsError("its numbers are not little-endian; save it again on another machine")
        content, keys = run(data, _PICKLE_LIMIT), run(data, _PICKLE_LIMIT)
        widths = {storage.key: storage.dtype.itemsize for storage in _storages(content)}
        places = {}
        for key in keys:
            (count,) = struct.unpack("<q", data.read(8))
            places[key] = data.tell(), count
            data.seek(count * widths[key] if count >= 0 else -1 - len(data), 1)

        def numbers(storage: Storage) -> Tensor:
            place, count = places[storage.key]
            return _numbers(data[place : place + count * storage.dtype.itemsize], storage)

        return _tensors(select(content), numbers)


def _storages(content: Any) -> Iterator[Storage]:
    """Every storage that the content names, each object looked at once."""
    seen, waiting = set(), [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        match value:
            case StoredTensor():
                yield value.storage
            case Storage():
                yield value
            case dict():
                waiting += value.values()
            case list() | tuple():
                waiting += value
            case Record():
                waiting += [value.arguments, value.state, *value.items]


def _tensors(wanted: dict[str, StoredTensor], numbers: Callable[[Storage], Tensor]) -> dict[str, Tensor]:
    for name, tensor in wanted.items():
        if not isinstance(tensor, StoredTensor):
            raise WeightsError(f"{name!r:.60} is no tensor; expected a state dict")
    storages = {tensor.storage for tensor in wanted.values()}
    if len({storage.key for storage in storages}) < len(storages):
        raise WeightsError("one of its storages is read as two kinds of numbers; download it again")
    if sum(math.prod(tensor.shape) for tensor in wanted.values()) > 4 * sum(storage.numel for storage in storages):
        raise WeightsError("its tensors are many views of few numbers; save them as copies")
    views: dict[Storage, list[str]] = {}
    for name, tensor in wanted.items():
        views.setdefault(tensor.storage, []).append(name)
    found: dict[str, Tensor] = {}
    for storage, names_of in views.items():
        whole = numbers(storage)  # once, however many look into it
        found |= {name: wanted[name].of(whole) for name in names_of}
    return {name: found[name] for name in wanted}


def _numbers(data: bytes, storage: Storage) -> Tensor:
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise WeightsError(
            f"storage {storage.key!r:.20} has {len(data)} bytes, expected {storage.numel} of {storage.dtype}; "
            "copy or download it again"
        )
    return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
