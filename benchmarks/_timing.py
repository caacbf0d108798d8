"""What the benchmarks against peers share: seconds, FLOPs, the limit of a machine, and two sides that take turns.

It does not know what is measured.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kartina.layers import packed
from kartina.training.footprint import ATTENTION

Work = Callable[[], Any]
Shape = tuple[int, ...]


def seconds(work: Work, device: torch.device) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _convolution(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Of `kartina.layers.packed`, like the two that follow; none of them has groups."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _transposed(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * math.prod(weight[1:])


def _linear(x: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def _packed() -> dict[Any, Callable[..., int]]:
    ops = torch.ops.mkldnn
    return {
        ops._convolution_pointwise: _convolution,
        ops._convolution_transpose_pointwise: _transposed,
        ops._linear_pointwise: _linear,
    }


def flops(work: Work) -> int:
    """Of products and convolutions, of one call, of all that it computes."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION | (_packed() if packed.known() else {})) as counter:
        work()
    return counter.get_total_flops()


def product(device: torch.device, dtype: torch.dtype) -> Work:
    """Of large square matrices: what it reaches is called the limit of the machine."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of `product`, the best of five."""
    work = product(device, dtype)
    return flops(work) / min(seconds(work, device) for _ in range(5))


def turns(works: dict[str, Work], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of each side's best round; they take turns."""
    times: dict[str, list[float]] = {side: [] for side in works}
    for _ in range(rounds):
        for side, work in works.items():
            times[side].append(seconds(work, device))
    return {side: min(each) for side, each in times.items()}


def compare(
    name: str, ours: Work, peers: dict[str, Work], device: torch.device, dtype: torch.dtype, rounds: int, **facts: Any
) -> dict[str, Any]:
    """The best of rounds in which both take turns, and with them `product`; of the peer, in its best setting."""
    works = {"ours": ours, **peers, "limit": product(device, dtype)}
    counted = {side: flops(work) for side, work in works.items()}  # and warms up
    best = turns(works, device, rounds)
    setting, speed = min(peers, key=best.__getitem__), {side: counted[side] / best[side] for side in works}
    return {
        "what": name,
        "ratio": round(best[setting] / best["ours"], 2),
        "ours_ms": round(1000 * best["ours"], 1),
        "peer_ms": round(1000 * best[setting], 1),
        "peer": setting,
        "ours_gflop": round(counted["ours"] / 1e9, 2),
        "peer_gflop": round(counted[setting] / 1e9, 2),
        "limit_gflops": round(speed["limit"] / 1e9, 1),
        "ours_limit": round(speed["ours"] / speed["limit"], 3),
        "peer_limit": round(speed[setting] / speed["limit"], 3),
        **facts,
    }


def told(row: dict[str, Any]) -> str:
    """A row of `compare` in words."""
    return (
        "{what}: {ratio} times as fast as {peer}: {ours_ms} ms and {peer_ms} ms; {ours_gflop} and {peer_gflop} GFLOP, "
        "{ours_limit:.0%} and {peer_limit:.0%} of the limit, {limit_gflops} GFLOP/s".format(**row)
    )


def training_step(network: nn.Module, loss: Callable[[], Tensor], device: torch.device, bf16: bool = False) -> Work:
    """Forward, backward and Adam, with autocast if asked for."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            total = loss()
        total.backward()
        optimizer.step()

    return work


def layouts(network: nn.Module, work: Callable[[nn.Module, torch.memory_format], Work], label: str) -> dict[str, Work]:
    """The work of a network in both layouts of its weights, as two copies."""
    formats = {"": torch.contiguous_format, ", channels last": torch.channels_last}
    return {f"{label}{n}": work(copy.deepcopy(network).to(memory_format=f), f) for n, f in formats.items()}
