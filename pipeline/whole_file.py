"""Files that are written whole or not at all, and stay after a power cut, with the rights of any other new file.

They know nothing of what stands in them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Within it a temporary neighbour is written, which then takes the file's place; after an error nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors would let nobody else read what it writes
        yield temporary
        temporary.chmod(mode & 0o777)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Until it returns, a file's content, or the names in a folder, may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, for what several processes or threads write in it one after the other; waits for it."""
    import fcntl

    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. facts: its metadata."""
    with replaced(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, facts)
