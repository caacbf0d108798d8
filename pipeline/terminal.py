"""What a person sees in a terminal: a progress bar for work over two seconds, and text that cannot steer it.

It does not know what the work is, and imports rich only for a bar that is shown.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

PATIENCE = 2.0  # seconds
T = TypeVar("T")


def printable(text: str) -> str:
    """Untrusted text, as of a file's name: each character that would steer the terminal becomes a question mark."""
    return "".join(character if character.isprintable() else "?" for character in text)


def tell(findings: Mapping[str, Sequence[str] | Mapping[str, str]]) -> None:
    """One line for each finding, a name or name -> reason; it comes from a file and is not believed."""
    for finding, names in findings.items():
        for name in names:
            reason = f": {names[name]}" if isinstance(names, Mapping) else ""
            print(f"  {finding}: {printable(name + reason)}")


@contextmanager
def progress_bar(label: str, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows a bar once two seconds have gone by. transient: it goes away at the end."""
    begin = time.monotonic()
    bars: list[Any] = []

    def report(done: int, total: int) -> None:
        if not bars and time.monotonic() - begin > PATIENCE:
            from rich.console import Console
            from rich.progress import Progress

            bars.append(Progress(console=Console(stderr=True), transient=transient))
            bars[0].add_task(label)
            bars[0].start()
        for bar in bars:
            bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        for bar in bars:
            bar.stop()


def speaks() -> bool:
    """Whether this process tells what all processes of a job find alike: the first of several, and no worker."""
    return os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None


def followed(items: Sequence[T], label: str) -> Iterator[T]:
    """The items, one after the other, with a bar that goes away at the end; of several processes the first shows it."""
    if not speaks():
        yield from items
        return
    with progress_bar(label, transient=True) as report:
        for done, item in enumerate(items, 1):
            yield item
            report(done, len(items))
