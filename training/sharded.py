"""Checkpoints of what is divided over processes: each writes its own parts, and any number of them reads all again.

The parts go through torch.distributed.checkpoint, as safetensors, so that reading them runs no code. What is whole on
every process stays in the one file of `state`, with a name in place of each divided tensor.

It does not know what the tensors are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from .parallel import any_rank, like

_FOLDER, _NAME = "shards", "divided tensor "


def is_divided(path: Path) -> bool:
    """Whether a checkpoint holds divided tensors."""
    return (path / _FOLDER).is_dir()


@contextmanager
def agreed(together: Accelerator | None) -> Iterator[None]:
    """An OSError of any process becomes one of all of them, so that none waits for the others."""
    problem: OSError | None = None
    try:
        yield
    except OSError as error:
        problem = error
    if any_rank(problem is not None, together) and problem is None:
        problem = OSError("another process could not write the checkpoint; its message says why")
    if problem is not None:
        raise problem


def write(folder: Path, content: dict[str, Any], together: Accelerator) -> dict[str, Any]:
    """Writes the divided tensors of nested dictionaries and lists. Returns the content with names in their place."""
    divided: dict[str, Tensor] = {}
    named = _replaced(content, "", lambda key, value: _take(divided, key, value))
    writer = HuggingFaceStorageWriter(str(folder / _FOLDER), save_distributed=True)
    with agreed(together):
        try:
            dcp.save(divided, storage_writer=writer)
        except CheckpointException as error:  # a BaseException, of whatever went wrong on any process
            raise OSError(f"parts of the checkpoint could not be written: {error}") from error
    return named


def _take(divided: dict[str, Tensor], key: str, value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    divided[key] = value
    return _NAME + key


def read(path: Path, content: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint with all its tensors, each divided as it is in `live`, which has the same keys.

    Each process reads the parts that it needs, of divided tensors into those of `live`: the two would not fit beside
    each other. A tensor that was whole is divided where `live` divides it.
    """
    wanted: dict[str, Tensor] = {}
    flat = dict(_leaves(live, ""))

    def find(key: str, value: Any) -> Any:
        model = flat.get(key)
        if isinstance(value, str) and value == _NAME + key:
            assert isinstance(model, Tensor)
            wanted[key] = model
            return model
        if isinstance(value, Tensor) and isinstance(model, DTensor):
            return like(value.to(model.device), model)
        return value

    whole = _replaced(content, "", find)
    if wanted:
        reader = HuggingFaceStorageReader(str(path / _FOLDER))
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    return whole


def _replaced(content: Any, key: str, change: Any) -> Any:
    """Nested dictionaries and lists with each leaf changed by change(key, leaf)."""
    if isinstance(content, dict):
        return {name: _replaced(value, f"{key}/{name}", change) for name, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, f"{key}/{i}", change) for i, value in enumerate(content)]
    return change(key, content)


def _leaves(content: Any, key: str) -> Iterator[tuple[str, Any]]:
    rows = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if rows is None:
        yield key, content
        return
    for name, value in rows:
        yield from _leaves(value, f"{key}/{name}")


def give_state(optimizer: torch.optim.Optimizer) -> None:
    """A new optimizer gets the tensors that its first step would make, without moving anything."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
