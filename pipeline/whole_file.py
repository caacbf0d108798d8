"""Files that are written whole or not at all, and stay after a power cut, with the rights of any other new file.

They know nothing of what stands in them.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Within it a temporary neighbour is written, which then takes the file's place; after an error nothing is left."""
    # The number of a process is its own only within a machine, and a folder may be shared by several.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
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
    with open(folder / ".lock", "w") as file:
        lock(file, folder, wait=True)
        yield


def lock(file: IO[Any], what: Path, wait: bool = False) -> bool:
    """Whether an open file could be locked, until it is closed. Where there are no locks it says so, and goes on.

    what: the lock is of.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems
        print(f"kartina: {what} cannot be locked ({error}); let no other process write there", file=sys.stderr)
    return True


@contextmanager
def held(path: Path) -> Iterator[BinaryIO | None]:
    """An empty file that this process alone writes; None where another does. What is not renamed is removed."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        ours, here = lock(file, path), os.fstat(file.fileno())
        if not (ours and path.exists() and os.path.samestat(here, path.stat())):  # or renamed before it was ours
            yield None
            return
        try:
            file.truncate(0)
            yield file
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new folder that is filled within it and then takes the place of `out`; after an error nothing is left.

    Raises ValueError where another process fills one.
    """
    folder = out.with_name(f".{out.name}.writing")
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out.with_name(f".{out.name}.lock")) as file:
        if file is None:
            raise ValueError(f"{out} is being written by another process; wait for it, or name another folder")
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        folder.mkdir()
        try:
            yield folder
            os.replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. facts: its metadata."""
    with replaced(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, facts)
