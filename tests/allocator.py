"""What a CPU's allocator gives out while something is computed."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def alive_in(work: Callable[[], Any], trace: Path) -> tuple[list[int], Any]:
    """The bytes alive after each allocation and release, beside what was alive before, and the result.

    trace: a file to be written.
    """
    gc.collect()
    gc.disable()  # else what earlier tests left may be released meanwhile, and count against what is measured
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            result = work()
    finally:
        gc.enable()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    alive = [0]
    for event in sorted(events, key=lambda event: event["ts"]):
        alive.append(alive[-1] + event["args"]["Bytes"])
    return alive, result
