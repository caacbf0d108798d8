"""SIGTERM and SIGINT: the first asks a run to save and stop, a later one stops it at once. No process outlives its run.

It does not know what is saved.
"""

import ctypes
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1
SAME = 2.0  # seconds in which a launcher, a scheduler and a terminal may all pass on one wish


class Stopped(Exception):
    """The run was asked to stop, and its newest checkpoint is where it goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """Whether this process was asked to stop: `signum`, 0 where not."""

    def __init__(self) -> None:
        self.signum, self._first = 0, 0.0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        now = time.monotonic()
        if self.signum and now - self._first > SAME:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if not self.signum:
            self.signum, self._first = signum, now


@contextmanager
def watched() -> Iterator[Stop]:
    """Within it the two signals only set a Stop; only in the main thread, where Python has signals."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ends_with_parent(number: int) -> Callable[[], None] | None:
    """What a child calls first on Linux: the signal reaches it when its parent dies, by SIGKILL too.

    More exactly the thread that started it, which must live as long.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, number) and None
