"""What a run tells: a JSON-lines file that any notebook reads, trackers, and a line on the terminal.

A line of log.jsonl is {"stage", "step", "at", scalars...}, or with "event" and its facts for what is no scalar. `at`
counts steps of data, which only grows; `step` goes back where a run does, see `loop`.
The trackers are Accelerate's, so that each has its own ways of starting and of authenticating. One that fails is told
and left out from then on, and a line that cannot be written is lost: neither is worth a run.

It does not know what the numbers mean; `doctor` and `compare` read them.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..pipeline.checkpoint import write_text
from ..pipeline.recipe import RecipeError
from ..pipeline.terminal import printable
from .history import LOG, History, read

TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "trackio": "TrackioTracker"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises RecipeError for a tracker whose package is not installed. TensorBoard, the default, may be missing."""
    for name in names:
        if name != "tensorboard" and not _is_installed(name):
            raise RecipeError(
                f"training.trackers names {name}, which is not installed; `pip install {name}`, or leave it out"
            )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclass
class Log:
    """The log of one stage. at: where it starts or resumes; what an interrupted run logged beyond is taken out.

    enabled: false on all ranks but the first, where nothing is written. config: what trackers show as settings.
    """

    folder: Path
    stage: str
    enabled: bool
    at: int
    trackers: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.console = Console()
        self.path = self.folder / LOG
        self._own = json.dumps({"stage": self.stage}).encode()[:-1] + b","  # how its lines begin
        self._history: History | None = None
        self._step = 0  # of the last line
        self._started: dict[str, Any] = {}
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rewind()
            for name in self.trackers:
                if _is_installed(name):
                    self._attempt(name, self._start, name)
                else:
                    self.say(f"{name} is not installed: log.jsonl alone")

    @property
    def history(self) -> History:
        """What the stage's log tells by now: read from the file once, and followed from then on."""
        if self._history is None:
            found = read(self.folder) if self.path.exists() else {}
            self._history = found.get(self.stage, History(self.stage))
        return self._history

    def _start(self, name: str) -> None:
        kind = getattr(importlib.import_module("accelerate.tracking"), TRACKERS[name])
        run = f"{self.folder.name}-{self.stage}"
        if name == "tensorboard":
            tracker = kind(self.stage, self.folder / "tensorboard", purge_step=self.at + 1)
        elif name == "wandb":  # the same run goes on where this one resumes
            run_id = f"{self.stage}-{self._token()}"
            tracker = kind("kartina", name=run, id=run_id, resume="allow", dir=str(self.folder))
        else:  # goes on by name
            tracker = kind("kartina", name=f"{run}-{self._token()}", resume="allow")
        tracker.start()
        if name != "tensorboard":  # that one takes flat values only, and recipe.yaml lies beside it
            tracker.store_init_configuration(self.config)
        self._started[name] = tracker

    def _token(self) -> str:
        """By which trackers that keep the runs of many folders know this one; drawn once. Recipes share names."""
        path = self.folder / "tracker_id"
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()

    def _attempt(self, name: str, work: Callable[..., object], *given: Any, **more: Any) -> None:
        """What is asked of a tracker, which is left out from then on where it fails: on a full disk, or unreachable."""
        try:
            work(*given, **more)
        except Exception as error:  # each has its own
            self._started.pop(name, None)
            message = f"{name} failed ({error}): the run goes on without it, and log.jsonl has every curve"
            self.event(self._step, "tracker lost", message, tracker=name, error=str(error))

    def _rewind(self) -> None:
        """Takes out what lies ahead. Of a stage `at` only grows: what is older than a line that stays is not read."""
        if not self.path.exists():
            return
        text = self.path.read_bytes()
        newest = text.rfind(self._own)
        while newest >= 0 and self._is_ahead(text[newest : text.find(b"\n", newest) + 1]):
            newest = text.rfind(self._own, 0, newest)
        stays = text.find(b"\n", newest) + 1 if newest >= 0 else 0
        lines = text[stays:].splitlines(keepends=True)
        kept = [line for line in lines if not self._is_ahead(line)]  # of other stages
        if len(kept) == len(lines):
            return
        if kept:
            write_text(self.path, (text[:stays] + b"".join(kept)).decode())
        else:
            os.truncate(self.path, stays)

    def _is_ahead(self, line: bytes) -> bool:
        if line.startswith(b'{"stage": ') and line.endswith(b"}\n") and not line.startswith(self._own):
            return False  # another stage's, of which there may be many
        try:
            entry = json.loads(line)
        except ValueError:
            return True  # cut off as it was written
        return not line.endswith(b"\n") or entry["stage"] == self.stage and entry["at"] > self.at

    def _append(self, step: int, entry: dict[str, Any]) -> None:
        self._step, entry = step, {"stage": self.stage, "step": step, "at": self.at, **entry}
        if self._history is not None:
            self._history.add(entry)
        size = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write((json.dumps(entry) + "\n").encode())  # in ASCII: a name in a shard may be no Unicode
        except OSError as error:  # a full disk, which must not end what would go on once there is room
            self.say(f"{self.path}: a line is lost ({error})")
            if size is not None:
                os.truncate(self.path, size)  # half a line would spoil the next one

    def write(self, step: int, steps: int, scalars: dict[str, float]) -> None:
        """Scalars of a step; one that is not finite is null in the file."""
        if not self.enabled:
            return
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        self._append(step, {name: finite.get(name) for name in scalars})
        for name, tracker in list(self._started.items()):
            self._attempt(name, tracker.log, finite, step=self.at)  # some trackers take no step back
        self.say(f"{self.stage} {step}/{steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in scalars.items()))

    def event(self, step: int, event: str, message: str, **facts: Any) -> None:
        """What happened at a step, by name, with facts that JSON holds; the message is for the terminal."""
        if self.enabled:
            self._append(step, {"event": event, **facts})
            self.say(printable(f"{self.stage} {step}: {message}"))

    def say(self, text: str) -> None:
        """Shows a line on the terminal, which may be a file on a full disk."""
        with contextlib.suppress(OSError):
            self.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Ends the trackers."""
        for name, tracker in list(self._started.items()):
            self._attempt(name, tracker.finish)
