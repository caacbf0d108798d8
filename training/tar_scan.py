"""The files of a tar that may be cut, damaged or forged: all up to the first fault, and the fault.

tarfile ends without a word where a header that is not the first is damaged, or the tar cut between two members, and
reads a header that leads backwards again and again.

It does not know what the files hold.
"""

import contextlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

_BLOCK = tarfile.BLOCKSIZE
_ANEW = "copy or download it again, or pack it again"


def files(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, in their order.

    Raises ValueError where the tar is not whole, after all that lies before, and OSError where it cannot be read.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.size < 0 or tar.offset < info.offset_data:
                    raise ValueError(f"the header of {info.name!r:.60} leads backwards")
                if info.isfile() and not info.issparse():
                    yield info
                if tar.offset > size:
                    raise ValueError(f"cut off inside {info.name!r:.60}; {_ANEW}")
            _check_end(path, tar.offset)
    except OSError:
        raise
    except Exception as error:  # of a damaged header tarfile makes anything: IndexError, RecursionError, MemoryError
        raise ValueError(str(error) or type(error).__name__) from error


def _check_end(path: Path, place: int) -> None:
    """After the last member comes a block of zeros, and no header any more."""
    with open(path, "rb") as file:
        file.seek(place)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"no member and no end mark at byte {place}; {_ANEW}")
        while block := file.read(_BLOCK):
            with contextlib.suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
                raise ValueError(f"more comes after its end mark at byte {place}, as of tars joined by cat; {_ANEW}")
