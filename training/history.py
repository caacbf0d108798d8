"""What log.jsonl tells, stage by stage: curves, events, and what a stage was when it started.

It does not know which numbers are good: `doctor` and `compare` say that.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Stage
    from .stages import TrainingStage

LOG = "log.jsonl"
_WHERE = ("stage", "step", "at")


@dataclass
class History:
    """The log of one stage.

    facts: those of its last start, see `facts_of`; empty in logs that have none. curves: name -> {step: value}, without
    what was not finite; a step that was trained again counts as it was the last time. events: as logged.
    """

    stage: str
    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """Takes in one line of the log."""
        step = line["step"]
        self.step = max(self.step, step)
        if "event" in line:
            self.events.append(line)
            if line["event"] == "started":
                self.facts = {name: value for name, value in line.items() if name not in (*_WHERE, "event")}
            return
        for name, value in line.items():
            if name not in _WHERE and isinstance(value, int | float):
                self.curves.setdefault(name, {})[step] = float(value)

    @property
    def steps(self) -> int:
        """To how many steps the stage is trained; where that was not logged, to where it stands."""
        return int(self.facts.get("steps", self.step))

    @property
    def headline(self) -> str | None:
        """The name of the curve by which the stage is judged, or None where it was not logged."""
        metrics = self.facts.get("metrics")
        name = f"valid/{metrics[0]}" if metrics else ""
        return name if name in self.curves else None

    def curve(self, name: str, since: int = 0) -> list[tuple[int, float]]:
        """(step, value) from a step on, in order; empty where there are none."""
        return [(step, value) for step, value in sorted(self.curves.get(name, {}).items()) if step >= since]

    def last(self, name: str, since: int = 0) -> float | None:
        """The newest value of a curve, or None."""
        points = self.curve(name, since)
        return points[-1][1] if points else None

    def ending(self, name: str) -> list[str]:
        """The curves of any network, or of validation, that have this name."""
        return [key for key in sorted(self.curves) if key.rpartition("/")[2] == name]


def facts_of(stage: "TrainingStage", config: "Stage", data: str) -> dict[str, Any]:
    """What a log says of a stage when it starts. data: the fingerprint of what it reads."""
    return {
        "steps": config.steps,
        "global_batch": config.global_batch,
        "metrics": list(stage.metrics),
        "higher_is_better": stage.higher_is_better,
        "networks": list(stage.networks),
        "clip": config.optimizer.clip,
        "ema": config.ema,
        "restart_step": stage.restart_step,
        "ramp_end": stage.ramp_end,
        "data": data,
    }


def read(run: Path) -> dict[str, History]:
    """The stages of a run folder, or of its log file, in the order in which they were trained.

    A line that was cut off as it was written is left out. Raises ValueError where there is no log, or another file.
    """
    path = run / LOG if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"no {LOG} in {run}: expected a run folder, such as runs/shapes/dalle; is the path right?")
    found: dict[str, History] = {}
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # splitlines would know others
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            stage = str(line["stage"])
            found.setdefault(stage, History(stage)).add({**line, "step": int(line["step"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines):
                raise ValueError(
                    f'{path}: line {number} is no line of a log; expected {{"stage", "step", ...}}, got {text:.60}'
                ) from None
    return found
