"""What a run tells: a JSON-lines file that any notebook reads, trackers, and a line on the terminal.

A line of log.jsonl is {"stage", "step", "at", scalars...}, or with "event" and its facts for what is no scalar. `at`
counts steps of data, which only grows; `step` goes back where a run does, see `loop`.
The trackers are Accelerate's, so that each has its own ways of starting and of authenticating.

It does not know what the numbers mean; `doctor` and `compare` read them.
"""

import importlib
import importlib.util
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..pipeline.checkpoint import write_text
from ..pipeline.recipe import RecipeError
from ..pipeline.terminal import printable
from .history import LOG

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
        self._started: list[Any] = []
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rewind()
            for name in self.trackers:
                if _is_installed(name):
                    self._started.append(self._start(name))
                else:
                    self.console.print(f"{name} is not installed: log.jsonl alone")

    def _start(self, name: str) -> Any:
        kind = getattr(importlib.import_module("accelerate.tracking"), TRACKERS[name])
        run = f"{self.folder.name}-{self.stage}"
        if name == "tensorboard":
            tracker = kind(self.stage, self.folder / "tensorboard", purge_step=self.at + 1)
        elif name == "wandb":  # the same run goes on where this one resumes
            tracker = kind("kartina", name=run, id=run, resume="allow", dir=str(self.folder))
        else:
            tracker = kind("kartina", name=run, resume="allow")
        tracker.start()
        if name != "tensorboard":  # that one takes flat values only, and recipe.yaml lies beside it
            tracker.store_init_configuration(self.config)
        return tracker

    def _rewind(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not self._is_ahead(line)]
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))

    def _is_ahead(self, line: str) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return True  # cut off as it was written
        return not line.endswith("\n") or entry["stage"] == self.stage and entry["at"] > self.at

    def _append(self, step: int, entry: dict[str, Any]) -> None:
        entry = {"stage": self.stage, "step": step, "at": self.at, **entry}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk, which must not end what would go on once there is room
            self.console.print(f"{self.path}: a line is lost ({error})", markup=False)

    def write(self, step: int, steps: int, scalars: dict[str, float]) -> None:
        """Scalars of a step; one that is not finite is null in the file."""
        if not self.enabled:
            return
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        self._append(step, {name: finite.get(name) for name in scalars})
        for tracker in self._started:
            tracker.log(finite, step=self.at)  # some trackers take no step back
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        self.console.print(f"{self.stage} {step}/{steps}  {shown}", highlight=False)

    def event(self, step: int, event: str, message: str, **facts: Any) -> None:
        """What happened at a step, by name, with facts that JSON holds; the message is for the terminal."""
        if self.enabled:
            self._append(step, {"event": event, **facts})
            self.console.print(printable(f"{self.stage} {step}: {message}"), highlight=False, markup=False)

    def close(self) -> None:
        """Ends the trackers."""
        for tracker in self._started:
            tracker.finish()
