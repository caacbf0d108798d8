"""A plan of `training.plan` as a table.

It does not know how the figures were found.
"""

import io
import shutil
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_GIB = 2**30


def report(plan: dict[str, Any], of_device: bool = True) -> str:
    """A plan as a table with a column for each stage, and what the numbers rest on.

    of_device: also whether it fits, steps and times; else the sizes alone, in the precision that the heading names.
    """
    stages = plan["stages"]
    table = Table("per device" if plan["devices"] > 1 else "", *stages, box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for line, value in (*_SIZES, *(_ON_DEVICE if of_device else [])):
        cells = [value(stage) for stage in stages.values()]
        if any(cell is not None for cell in cells):
            table.add_row(line, *("-" if cell is None else cell for cell in cells))
    text = io.StringIO()
    width = shutil.get_terminal_size((120, 24)).columns
    console = Console(file=text, width=width, markup=False, highlight=False)
    device, devices = plan["device"], plan["devices"]
    how = {"none": ", each holds the whole state", "fsdp": ", the state divided over them (fsdp)"}[plan["shard"]]
    on = f"{devices} x {device['name']}" if of_device else f"{devices} device{'s' if devices > 1 else ''}"
    rate = f" at {device['peak_flops'] / 1e12:g} TFLOP/s ({device['source']}), of which "
    rate += f"{100 * plan['utilisation']:g} % are assumed to be used"
    precision = plan["precision"] + (rate if of_device else "")
    console.print(f"{plan['recipe']} on {on}{how if devices > 1 else ''}: {precision}")
    planned = {part for stage in stages.values() for part in stage["parts"]}
    others = [f"{part} {count:,d}" for part, count in plan["parameters"].items() if part not in planned]
    if others:
        console.print(f"parameters of parts that are not planned: {', '.join(others)}")
    for part, halves in plan["halves"].items():
        console.print(f"of the {part}: {', '.join(f'{half} {count:,d}' for half, count in halves.items())}")
    console.print(table)
    if not plan["states_training"]:
        console.print("the recipe states no training: one sample a device, AdamW, no perceptual network; no steps")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _bytes(size: float) -> str | None:
    """None for nothing, which a line leaves out."""
    gib = size / _GIB
    return None if size < 1 else f"{gib:,.1f} GiB" if gib >= 1 else f"{1024 * gib:,.1f} MiB"


def _memory(key: str) -> Any:
    return lambda stage: _bytes(stage["memory"][key])


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _beside(stage: dict[str, Any], key: str, show: Any) -> str | None:
    """A figure of what is trained beside, of which there is at most one."""
    return next((show(each[key]) for each in stage["beside"].values()), None)


_SIZES: list[tuple[str, Any]] = [
    ("parameters", lambda s: f"{s['parameters']:,d}"),
    ("  of the discriminator, besides", lambda s: _beside(s, "parameters", "{:,d}".format)),
    ("GFLOP a sample", lambda s: _figure(s["flops_per_sample"]["trained"] / 1e9)),
    ("  of the discriminator's update", lambda s: _beside(s, "flops_per_sample", lambda flops: _figure(flops / 1e9))),
    ("  of frozen parts, besides", lambda s: _figure(s["flops_per_sample"]["frozen"] / 1e9 or None)),
    ("GFLOP of Muon a step", lambda s: _figure(s["flops_per_update"] / 1e9 or None)),
    ("samples a step", lambda s: f"{s['global_batch']:,d}"),
    ("  in a pass x passes", lambda s: f"{s['micro_batch']:,d} x {s['passes']:,d}"),
    ("weights", _memory("weights")),
    ("gradients", _memory("gradients")),
    ("optimizer", _memory("optimizer")),
    ("moving average", _memory("ema")),
    ("activations", _memory("activations")),
    ("  of them for each sample", lambda s: _bytes(s["activations_per_sample"])),
    ("  of them at any batch", lambda s: _bytes(s["activations_constant"])),
    ("discriminator, its optimizer", _memory("beside")),
    ("frozen parts", _memory("frozen")),
    ("DDP's buckets", _memory("buckets")),
    ("gathered blocks", _memory("gathered")),
    ("peak", _memory("peak")),
]
_ON_DEVICE: list[tuple[str, Any]] = [
    ("fits", lambda s: "yes" if s["fits"] else "no"),
    ("  largest micro-batch", lambda s: f"{s['largest_micro_batch']:,d}"),
    ("time of a step", lambda s: _seconds(s["step_seconds"])),
    ("steps", lambda s: None if s["steps"] is None else f"{s['steps']:,d}"),
    ("samples", lambda s: None if s["samples"] is None else f"{s['samples']:,d}"),
    ("days", lambda s: _figure(s["days"])),
    ("device-hours", lambda s: _figure(s["device_hours"])),
]
