"""What training a recipe takes, before anything is trained: FLOPs, memory per device, time.

A stage's step is `passes` forward and backward passes of `micro_batch` samples on every device, then one update; then
the same of a discriminator, if there is one:

- weights, gradients, the optimizers' state (AdamW two values a weight, Muon one) and the moving average are float32.
  With training.shard=fsdp all four are divided over the devices, where there are blocks, and each gathers two blocks
  and what lies in none at a time; without it, several devices keep DDP's buckets too, as large as the gradients.
- peak: the most that is alive at once. In a single pass gradients grow as activations shrink, so it may lie below the
  sum of the lines. AdamW's update takes nothing more, for it is fused; Muon's takes its matrices' size once more, and
  what it makes of them. A device is full at 90 %, for CUDA's context, the kernels' workspace and the allocator's gaps
  are not counted.
- time: FLOPs over the peak rate times the utilisation, which is an assumption and stands for all that is no matrix
  product, exchange between devices included; then the update, which reads and writes its state once at full bandwidth.
  Frozen parts compute in float32; so does everything on a device without bfloat16. Muon's products are shared out over
  the devices, or where these hold parts of the network, all are computed on every one.
  A small network takes longer than that: its kernels are over before the next one is launched.

It does not know what a pass costs (`footprint` counts it), nor the speed of a network between devices.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

from ..pipeline.recipe import Recipe, RecipeError, count_halves, count_parameters, is_frozen, nearest
from . import run as runs

FULL = 0.9  # of a device's memory
_GIB, _DAY = 2**30, 86_400


@dataclass(frozen=True)
class Device:
    """Peak rates in FLOP/s, dense; memory in bytes, bandwidth in bytes/s. source: whose figures these are."""

    name: str
    bf16: float | None  # with float32 accumulation; None: no such arithmetic
    fp32: float  # without TF32, as PyTorch multiplies by default
    memory: int
    bandwidth: float
    source: str


DEVICES: dict[str, Device] = {
    "h100": Device("H100 SXM 80 GB", 989e12, 67e12, 80 * _GIB, 3.35e12, "NVIDIA H100 data sheet"),
    "h200": Device("H200 SXM 141 GB", 989e12, 67e12, 141 * _GIB, 4.8e12, "NVIDIA H200 data sheet"),
    "a100": Device("A100 SXM 80 GB", 312e12, 19.5e12, 80 * _GIB, 2.039e12, "NVIDIA A100 data sheet"),
    "a100-40gb": Device("A100 SXM 40 GB", 312e12, 19.5e12, 40 * _GIB, 1.555e12, "NVIDIA A100 data sheet"),
    "l40s": Device("L40S 48 GB", 362e12, 91.6e12, 48 * _GIB, 0.864e12, "NVIDIA L40S data sheet"),
    "rtx4090": Device("RTX 4090 24 GB", 165.2e12, 82.6e12, 24 * _GIB, 1.008e12, "NVIDIA Ada architecture whitepaper"),
    "v100": Device("V100 SXM2 16 GB", None, 15.7e12, 16 * _GIB, 0.9e12, "NVIDIA V100 data sheet"),
    "v100-32gb": Device("V100 SXM2 32 GB", None, 15.7e12, 32 * _GIB, 0.9e12, "NVIDIA V100 data sheet"),
}
DEVICES["a100-80gb"] = DEVICES["a100"]


def plan(
    recipe: Recipe,
    training: runs.Training | None,
    device: str = "h100",
    devices: int = 1,
    utilisation: float = 0.4,
    stage: str | None = None,
) -> dict[str, Any]:
    """The plan as plain values, under "stages" by stage. stage: plan only this one.

    Bytes and seconds. Without a training section: every part that has a stage, a text encoder with its prior and a
    discriminator with its tokenizer; one sample a device, AdamW, no perceptual network; no steps, no days.
    Raises RecipeError for an unknown device or stage, a utilisation that is none, and as `run.division`.
    """
    if device not in DEVICES:
        raise RecipeError(f"--device {device!r} is unknown; {nearest(device, list(DEVICES))}")
    if devices < 1 or not 0 < utilisation <= 1:
        raise RecipeError(
            f"a plan needs at least one device and a utilisation above 0 and at most 1, got {devices} and {utilisation}"
        )
    stages = training.stages if training else {part: _unstated(devices) for part in _trained_alone(recipe)}
    if stage is not None and stage not in stages:
        raise RecipeError(f"no stage {stage!r}; {nearest(stage, list(stages))}")
    card = DEVICES[device]
    precision = training.precision if training else "bf16"
    shard = training.shard if training else "none"
    bf16 = precision == "bf16" and card.bf16 is not None
    setting = _Setting(recipe, card, devices, utilisation, shard == "fsdp", bf16)
    return {
        "recipe": recipe.name,
        "parameters": count_parameters(recipe),
        "halves": count_halves(recipe),
        "device": {"name": card.name, "source": card.source, "memory": card.memory, "peak_flops": setting.rate},
        "devices": devices,
        "shard": shard,
        "utilisation": utilisation,
        "precision": "bf16" if setting.bf16 else "fp32",
        "states_training": training is not None,
        "stages": {
            name: _stage(setting, name, config, training is not None)
            for name, config in stages.items()
            if stage in (None, name)
        },
    }


def _trained_alone(recipe: Recipe) -> list[str]:
    from .passes import PASSES

    return [part for part, section in recipe.parts.items() if section["kind"] in PASSES and not is_frozen(recipe, part)]


def _unstated(devices: int) -> runs.Stage:
    return runs.Stage(steps=1, global_batch=devices, micro_batch=1, optimizer=runs.Optimizer(lr=1e-3))


@dataclass(frozen=True)
class _Setting:
    recipe: Recipe
    device: Device
    devices: int
    utilisation: float
    fsdp: bool
    bf16: bool

    @property
    def rate(self) -> float:
        """The peak FLOP/s of what is trained."""
        return self.device.bf16 if self.bf16 and self.device.bf16 else self.device.fp32


def _stage(setting: _Setting, name: str, config: runs.Stage, stated: bool) -> dict[str, Any]:
    from .footprint import fake, measure, prepare_fake
    from .parallel import blocks_of, recompute_blocks
    from .passes import trained_along

    try:
        micro, passes = runs.division(config, setting.devices)
    except RecipeError as error:
        raise RecipeError(f"stage {name}: {error}; or plan one stage with --stage") from None
    with fake():
        prepared = prepare_fake(setting.recipe, name, config, setting.devices, setting.bf16)
        network = prepared.network
        divided = setting.fsdp and setting.devices > 1 and bool(blocks_of(network))
        if config.recompute:
            recompute_blocks(network)
        share = setting.devices if divided else 1
        held = {
            part: _held(each, config.optimizer_of(part), share if part == name else 1, setting)
            for part, each in prepared.networks.items()
        }
        average = sum(value.nbytes for value in network.state_dict().values()) / share
        if divided and setting.bf16:
            _halve(network)
        gathered = _gathered(network) if divided else 0
        costs = [(len(steps), measure(prepared, micro, steps[-1])) for steps in prepared.phases()]
        frozen = sum(tensor.nbytes for each in prepared.frozen.values() for tensor in each.parameters())
    cost = costs[-1][1]
    exchange = sum(each.weights for each in held.values()) if setting.devices > 1 and not divided else 0
    state = sum(each.weights + each.optimizer for each in held.values()) + average + frozen + exchange
    whole_pass = divided or passes > 1  # gradients are there, whole, from its start
    most, peak, largest = FULL * setting.device.memory, 0.0, float("inf")
    for part, found in cost.items():
        at_update = state + held[part].weights + held[part].temporary
        in_pass = state + (held[part].weights + gathered + found.working if whole_pass else found.alive)
        peak = max(peak, in_pass, at_update)
        constant = found.saved - micro * found.saved_a_sample
        a_sample = (found.working - constant) / micro  # with what backward passes take for a moment
        room = most - (in_pass - micro * a_sample)
        largest = min(largest, 0 if at_update > most else max(0, int(room // a_sample)))
    seconds = [(count, _seconds_of(setting, found, held, average, passes)) for count, found in costs]
    compute, update = seconds[-1][1]
    days = sum(count * sum(each) for count, each in seconds) / _DAY
    own, found = held[name], cost[name]
    return {
        "parts": [name, *trained_along(setting.recipe, name), *(part for part in held if part != name)],
        "parameters": own.parameters,
        "beside": {
            part: {
                "parameters": each.parameters,
                "flops_per_sample": cost[part].flops / micro,
                "weights": each.weights,
                "gradients": each.weights,
                "optimizer": each.optimizer,
                "activations": cost[part].saved,
            }
            for part, each in held.items()
            if part != name
        },
        "flops_per_sample": {"trained": found.flops / micro, "frozen": found.frozen_flops / micro},
        "flops_per_update": sum(each.flops for each in held.values()),
        "micro_batch": micro,
        "passes": passes,
        "global_batch": micro * passes * setting.devices,
        "memory": {
            "weights": own.weights,
            "gradients": own.weights,
            "optimizer": own.optimizer,
            "ema": average,
            "activations": found.saved,
            "beside": sum(each.weights + each.optimizer for part, each in held.items() if part != name),
            "frozen": frozen,
            "buckets": exchange,
            "gathered": gathered,
            "peak": peak,
        },
        "activations_per_sample": found.saved_a_sample,
        "activations_constant": found.saved - micro * found.saved_a_sample,
        "fits": peak <= most,
        "largest_micro_batch": int(largest),
        "step_seconds": compute + update,
        "compute_seconds": compute,
        "update_seconds": update,
        "steps": config.steps if stated else None,
        "samples": config.steps * config.global_batch if stated else None,
        "days": days if stated else None,
        "device_hours": 24 * days * setting.devices if stated else None,
    }


@dataclass(frozen=True)
class _Held:
    """What a network takes besides its passes, in bytes on each device; gradients take what weights do."""

    parameters: int  # their number
    weights: float
    optimizer: float
    temporary: float  # for a moment in Muon's update
    flops: int  # of an update, on the device that has most of them


def _held(network: Any, config: runs.Optimizer, share: int, setting: _Setting) -> _Held:
    """share: the number of devices that the network is divided over; where it is whole, all share its update."""
    from .optim import Muon, build_optimizers

    flops, state, temporary = 0, 0.0, 0.0
    for optimizer in build_optimizers(network, config):
        muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            state += sum(parameter.nbytes for parameter in group["params"]) * (1 if muon else 2)
            if muon:
                shapes = [parameter.flatten(1).shape for parameter in group["params"]]
                flops += _muon_load(shapes, 1 if share > 1 else setting.devices)
                temporary += _muon_bytes(shapes, share, setting)
    count = sum(parameter.numel() for parameter in network.parameters())
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return _Held(count, weights / share, state / share, temporary, flops)


def _muon_load(shapes: list[Any], devices: int) -> int:
    """FLOPs of one update on the device that has most of them, where so many share it."""
    from .optim import shares, stacks

    load, sizes = [0] * devices, [(len(places), *shapes[places[0]]) for places in stacks(shapes)]
    for (count, *shape), owner in zip(sizes, shares(sizes, devices), strict=True):
        load[owner] += count * _muon_flops((shape[0], shape[1]))
    return max(load)


def _muon_bytes(shapes: list[Any], share: int, setting: _Setting) -> float:
    """What one update takes besides its state and the gradients, in whose place it works: what it makes of these.

    That is all matrices at once, in the recipe's precision, and twice what each device sends to the others;
    of a divided network one whole matrix at a time. And the products of one, or of a stack: what is gathered or
    stacked, its next state, and two squares.
    """
    from .optim import stacks

    width, sizes = 2 if setting.bf16 else 4, [rows * columns for rows, columns in shapes]
    places = stacks(shapes) if share == 1 else [[place] for place in range(len(shapes))]
    together = [(len(stack), shapes[stack[0]]) for stack in places]
    most = max(
        n * ((width if n == share == 1 else 4 + width) * math.prod(shape) + 2 * width * min(shape) ** 2)
        for n, shape in together
    )
    if share > 1:
        return most + width * max(sizes)
    sent = 2 * width * sum(sizes) / setting.devices if setting.devices > 1 else 0.0
    return width * sum(sizes) + max(most, sent)


def _seconds_of(
    setting: _Setting, cost: dict[str, Any], held: dict[str, _Held], average: float, passes: int
) -> tuple[float, float]:
    """Seconds of a step that takes these updates: of its products, and of reading and writing its state."""
    trained = sum(found.flops * passes + held[part].flops for part, found in cost.items()) / setting.rate
    frozen = sum(found.frozen_flops * passes for found in cost.values()) / setting.device.fp32
    touched = 2 * (sum(2 * held[part].weights + held[part].optimizer for part in cost) + average)
    return (trained + frozen) / setting.utilisation, touched / setting.device.bandwidth


@functools.cache
def _muon_flops(shape: tuple[int, int]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .optim import orthogonalise

    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.empty(shape, device="meta"))  # as on a GPU
    return counter.get_total_flops()


def _halve(network: Any) -> None:
    """The blocks of a network as they are gathered under bfloat16, see `parallel.matrices_of`."""
    from torch import nn

    from .parallel import blocks_of, matrices_of

    for matrix in itertools.chain.from_iterable(map(matrices_of, blocks_of(network))):
        for name, parameter in list(matrix.named_parameters(recurse=False)):
            setattr(matrix, name, nn.Parameter(parameter.detach().bfloat16()))


def _gathered(network: Any) -> int:
    """Bytes that a sharded network holds whole at a time: two blocks, and one's gradients, also in float32 to be added
    up; and what lies in no block.
    """
    from .parallel import blocks_of

    def size(module: Any) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    def in_turn(block: Any) -> int:
        again = sum(4 * parameter.numel() for parameter in block.parameters() if parameter.itemsize < 4)
        return 3 * size(block) + again

    blocks = blocks_of(network)
    return max(map(in_turn, blocks), default=0) + size(network) - sum(map(size, blocks))
