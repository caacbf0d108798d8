"""The state of a run, saved and resumed: all that a stage's training is, beside its data.

A checkpoint is a folder, written beside, fsynced with a manifest of hashes, renamed, and only then are older ones
removed. So a kill at any moment leaves the newest whole one. Everything is read back with weights_only.

It does not know what the networks are, nor the data.
"""

import errno
import itertools
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..pipeline.checkpoint import file_hash, write_text
from ..pipeline.whole_file import sync
from . import sharded
from .optim import EMA
from .parallel import any_rank, is_sharded

_OF_THE_DATA = ("at", "bad", "problems", "best", "ruler", "seconds")


@dataclass
class RunState:
    """All that a stage's run is.

    identity: see `training.run.identity`. step: optimizer steps of the weights. at: steps of data that were read; it
    only grows, and is ahead of `step` by what was given up after bad weather. bad: spans [first, last] of `at` whose
    steps were not finite, k in a row. problems: why samples could not be read, by key. best: the best headline metric
    that a checkpoint was kept of, its step, and its `at`. ruler: what that was measured on. seconds: trained.
    """

    identity: dict[str, Any]
    networks: dict[str, nn.Module]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    ema: EMA
    step: int = 0
    at: int = 0
    bad: list[list[int]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    best: tuple[float, int, int] | None = None
    ruler: str = ""
    seconds: float = 0.0

    def collect(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: [one.state_dict() for one in group] for name, group in self.optimizers.items()},
            "ema": self.ema.state(),
            **{name: getattr(self, name) for name in ("identity", "step", *_OF_THE_DATA)},
        }

    def restore(self, path: Path, data_too: bool = True) -> None:
        """Takes a checkpoint. Without `data_too` only what was learnt: the data goes on where it stands.

        Its tensors may have been divided over another number of devices, or not at all.
        """
        divided = sharded.is_divided(path) or any(is_sharded(network) for network in self.networks.values())
        if divided:
            for optimizer in itertools.chain.from_iterable(self.optimizers.values()):
                sharded.give_state(optimizer)
        saved = load(path)
        saved = sharded.read(path, saved, self.collect()) if divided else saved
        for name, network in self.networks.items():
            network.load_state_dict(saved["networks"][name])
            for optimizer, values in zip(self.optimizers[name], saved["optimizers"][name], strict=True):
                optimizer.load_state_dict(values)
                _lay_like_parameters(optimizer)
        self.ema.load(saved["ema"])
        self.step = saved["step"]
        if data_too:
            for name in _OF_THE_DATA:
                setattr(self, name, saved.get(name, "") if name == "ruler" else saved[name])  # of old ones: unknown


def _lay_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Loaded moments lie in memory as on the device that saved them, and the fused AdamW of a CPU reads over that."""
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save(folder: Path, content: dict[str, Any], keep: int = 2, together: Accelerator | None = None) -> Path:
    """Writes `folder/step-<at>` whole or not at all, then removes all but the newest `keep` and the best.

    content: of `RunState.collect`. together: where its tensors are divided over processes, which then all call this and
    each write their own. Returns its path. Raises OSError, with the earlier checkpoints untouched, where the disk has
    no room for it.
    """
    final, temporary = path_of(folder, content["at"]), folder / f".writing-{content['at']:08d}"
    first = together is None or together.is_main_process
    if any_rank(first and final in complete(folder), together):
        return final
    try:
        with sharded.agreed(together):
            if first:
                _make_room(folder, temporary, content)
        if together is not None:
            content = sharded.write(temporary, content, together)
        with sharded.agreed(together):
            if first:
                _finish(temporary, final, content)
                rotate(folder, keep, content["best"][2] if content.get("best") else None)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _make_room(folder: Path, temporary: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # of a run that was killed, which held the lock then
        shutil.rmtree(left)
    _require_room(folder, content)
    temporary.mkdir()


def _finish(temporary: Path, final: Path, content: dict[str, Any]) -> None:
    """The last file, the manifest, and the name under which the checkpoint is found."""
    with open(temporary / "state.pt", "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch's writer makes of a disk that is full
            raise OSError(errno.ENOSPC, f"state.pt could not be written: {error}") from error
        file.flush()
        os.fsync(file.fileno())
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    hashes = {str(path.relative_to(temporary)): file_hash(path) for path in files}
    write_text(temporary / "manifest.json", json.dumps({"identity": content.get("identity", {}), "files": hashes}))
    for folder in {path.parent for path in files} | {temporary}:
        sync(folder)
    shutil.rmtree(final, ignore_errors=True)  # one without a manifest
    os.rename(temporary, final)
    sync(final.parent)


def _require_room(folder: Path, content: dict[str, Any]) -> None:
    needed, free = int(1.05 * size(content)) + 2**20, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"a checkpoint takes {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f}; make room"
        )


def size(content: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(size(value) for value in content.values())
    return sum(size(value) for value in content) if isinstance(content, list | tuple) else 0


def rotate(folder: Path, keep: int, best: int | None = None) -> None:
    """Removes all checkpoints but the newest `keep` and the one of `at` best."""
    for old in complete(folder)[: -max(1, keep)]:
        if best is None or old != path_of(folder, best):
            shutil.rmtree(old)


def path_of(folder: Path, at: int) -> Path:
    """Where the checkpoint lies that was written when so many steps of data had been read."""
    return folder / f"step-{at:08d}"


def complete(folder: Path) -> list[Path]:
    """The checkpoints that have a manifest, oldest first. A half-written folder is not among them."""
    found = (path.parent for path in folder.glob("step-*/manifest.json"))
    return sorted(found, key=lambda path: (len(path.name), path.name))  # from 10 ** 8 on the numbers are longer


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        return "state.pt" in files and all(file_hash(path / name) == wanted for name, wanted in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def require_whole(path: Path) -> Path:
    """The path of a checkpoint, once its hashes agree with its manifest. Raises ValueError where they do not."""
    if not _is_whole(path):
        raise ValueError(f"{path}: the checkpoint is damaged or gone; leave out stages.*.export=best to take the last")
    return path


def identity_of(path: Path) -> dict[str, Any]:
    """The identity of the run that wrote a checkpoint."""
    return json.loads((path / "manifest.json").read_text())["identity"]


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that was found whole; what is divided is left out."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes agree with its manifest, or None where there is none at all.

    Newer ones that are damaged are put aside under another name, so that they do not count as ones to keep. One process
    of a job calls this. Raises ValueError where all are damaged: starting anew must be the user's choice.
    """
    found = complete(folder)
    whole = next((path for path in reversed(found) if _is_whole(path)), None)
    if found and whole is None:
        raise ValueError(f"{folder}: every checkpoint is damaged; move them away to start anew")
    for path in found[found.index(whole) + 1 :] if whole else []:
        shutil.rmtree(aside := path.with_name(f"damaged-{path.name}"), ignore_errors=True)
        path.rename(aside)
    return whole
