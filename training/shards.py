"""WebDataset tar shards: writing and checking.

WebDataset ends a sample's key at the first dot of a file name, so the writer makes the keys itself (numbers, no dots)
and keeps the original name in the sample's json: `000000012.jpg`, `000000012.txt`, `000000012.json`. A folder of shards
has a manifest.json (samples and sha256 of each shard) and an index beside each shard. The format: Aizman 2019,
arXiv 2001.01858.

It does not know where pictures come from (`packing` does), nor the order in which samples are read (`stream` does).
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipeline.checkpoint import write_text
from ..pipeline.recipe import RecipeError
from ..pipeline.terminal import followed
from ..pipeline.whole_file import appearing
from .mirror import opened, row_of
from .samples import DECODERS, EMPTY, BadSample, Index, find_shards, load_index, read_encoded, read_sample
from .samples import build_index as build_index

_FORMAT = 1  # of the manifest
_CHANGED = "changed since it was packed: its sha256 is not the manifest's"


def free_folder(out: Path | str) -> Path:
    """Where a folder is to appear whole, links followed. Raises ValueError where something is there, or a mount."""
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already has content; choose a new or empty folder")
    if out.is_mount():
        raise ValueError(f"{out} is where a file system is mounted, and cannot be replaced; name a folder inside it")
    return out


class ShardWriter:
    """Writes samples into a new folder of shards, which appears whole at the end or not at all.

    `with ShardWriter(out, 1000) as writer: writer.write({"jpg": data, "txt": caption.encode()}, name="a.b.jpg")`.
    Raises ValueError where `out` is not empty, or another process writes it, or for a member outside the table of
    decoders.
    """

    def __init__(self, out: Path | str, samples_per_shard: int = 1000, prefix: str = "shard"):
        self.prefix, self.per_shard = prefix, samples_per_shard
        if samples_per_shard < 1 or "." in prefix or "/" in prefix:
            raise ValueError(f"samples_per_shard >= 1 and a prefix without . or /, got {samples_per_shard}, {prefix!r}")
        self.out = free_folder(out)
        self._held = contextlib.ExitStack()
        self._folder = self._held.enter_context(appearing(self.out))
        self._tar: tarfile.TarFile | None = None
        self._shards: list[dict[str, Any]] = []
        self._in_shard = self.count = 0

    def write(self, fields: Mapping[str, bytes], name: str | None = None, **facts: Any) -> str:
        """Adds one sample; `name` and `facts` go into its json. Returns the key."""
        unknown = set(fields) - set(DECODERS)
        if unknown:
            raise ValueError(f"members may be {', '.join(DECODERS)}; got {', '.join(sorted(unknown))}")
        members = dict(fields)
        if name is not None or facts:
            known = json.loads(members.get("json", b"{}"))
            text = json.dumps({**known, "name": name, **facts}, ensure_ascii=False)
            members["json"] = text.encode(errors="surrogatepass")  # of file names that are not UTF-8
        if self._in_shard == self.per_shard:
            self._finish_shard()
        if self._tar is None:
            path = self._folder / f"{self.prefix}-{len(self._shards):06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key = f"{self.count:09d}"
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # times and owners stay zero: equal input, equal shards
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.count, self._in_shard = self.count + 1, self._in_shard + 1
        return key

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = Path(str(self._tar.name))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        index = build_index(path)
        self._shards.append(
            {"name": path.name, "samples": self._in_shard, "bytes": index.bytes, "sha256": index.sha256}
        )
        self._tar, self._in_shard = None, 0

    def _finish(self) -> None:
        """The last shard, and manifest.json."""
        self._finish_shard()
        manifest = {"format": _FORMAT, "samples": self.count, "shards": self._shards}
        write_text(self._folder / "manifest.json", json.dumps(manifest, indent=1))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            with self._held:
                self._finish()
            return
        try:
            if self._tar is not None:
                self._tar.close()
        finally:
            self._held.__exit__(kind, error, trace)


@dataclass
class CheckReport:
    """How many samples were read, and what is wrong: `bad` by `shard/key`, `shards` by file name."""

    samples: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)


def _promised(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What a folder's manifest says, or nothing: the sha256 of each shard by name, and the arrays of a cache."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return {str(row["name"]): row["sha256"] for row in manifest["shards"]}, [*manifest.get("arrays", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return {}, []


def check_whole(where: Path | str | Sequence[Path | str], indexes: Sequence[Index]) -> None:
    """Raises RecipeError for shards that were cut off, and for those of a folder's manifest that are gone or others."""
    found = {index.path.name: index.problem for index in indexes if index.problem not in (None, EMPTY)}
    for folder in map(Path, [where] if isinstance(where, (str, Path)) else where):
        hashes, here = _promised(folder)[0], {i.path.name: i.sha256 for i in indexes if i.path.parent == folder}
        for name, digest in hashes.items():
            if not (folder / name).is_file():
                found[name] = "missing, though the manifest lists it"
            elif here.get(name, digest) != digest:
                found.setdefault(name, _CHANGED)
    if found:
        raise RecipeError(
            f"the data is not whole: {'; '.join(f'{name}: {why}' for name, why in [*found.items()][:5])}"
            f"{f'; and {len(found) - 5} more' if len(found) > 5 else ''}. Copy or pack it again; another run "
            "can do without these, once they and manifest.json are removed"
        )


def check_shards(paths: Path | str | Iterable[Path | str]) -> CheckReport:
    """Reads and decodes every sample of the shards, and names each that training would not use, with its reason.

    A shard that the manifest of a named folder promises and that is not there is a finding too. Raises ValueError where
    there are no shards.
    """
    report = CheckReport()
    where = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    shards = find_shards(where)
    promised = {folder: _promised(folder) for folder in {*where, *(shard.parent for shard in shards)}}
    for folder in where:
        for name in promised[folder][0]:
            if not (folder / name).is_file():
                report.shards[name] = "missing: the manifest lists it, and it is not in the folder"
    for shard in shards:
        (hashes, arrays), problem = promised[shard.parent], None
        index = build_index(shard) if row_of(shard) is None else load_index(shard)  # a mirrored one keeps its index
        if hashes.get(shard.name, index.sha256) != index.sha256:
            problem = _CHANGED
        if problem := index.problem or problem:
            report.shards[shard.name] = problem
        with opened(shard) as file:
            for entry in followed(index.entries, shard.name):
                report.samples += 1
                try:
                    read_encoded(file, entry, arrays) if arrays else read_sample(file, entry)
                except BadSample as error:
                    report.bad[f"{shard.name.removesuffix('.tar')}/{entry.key}"] = str(error)
    return report
