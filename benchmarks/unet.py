"""A training step of our U-Net against diffusers' `UNet2DConditionModel` of the same sizes and weights, in one run.

Run as `python -m kartina.benchmarks.unet`, or by path with the package installed; sizes are in `sizes.yaml`. Both take
turns, forward and backward, in float32 and, where the device has arithmetic for it, under bfloat16 autocast; it checks
that both predict the same. `--json` prints one JSON line. On a GPU if there is one. Without other work on the machine
only.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import Tensor

from kartina.layers.attention import short_in_float32
from kartina.pipeline.convert_unet import unet_to_diffusers
from kartina.pipeline.convert_unet_config import unet_config
from kartina.priors.condition import Condition
from kartina.priors.unet import UNet
from kartina.training.optim import fast_bf16
from kartina.training.parallel import lay_out

SIZES = yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text(encoding="utf-8"))["unet"]


def both(size: dict[str, Any], device: str) -> tuple[UNet, UNet2DConditionModel]:
    """Ours and theirs with the same weights, none of them zero."""
    torch.manual_seed(0)
    ours = UNet(**size["model"])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    config = unet_config(size["model"])
    config.pop("_class_name")
    theirs = UNet2DConditionModel(**config)
    theirs.load_state_dict(unet_to_diffusers(ours.state_dict()))
    return ours.to(device), theirs.to(device)


def seconds(forward: Callable[[], Tensor], network: torch.nn.Module, device: str, bf16: bool) -> float:
    """Of one forward and backward pass."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    network.zero_grad(set_to_none=True)
    wait()
    begin = time.perf_counter()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        out = forward()
    out.float().square().mean().backward()
    wait()
    return time.perf_counter() - begin


def measure(name: str, bf16: bool, rounds: int, device: str) -> dict[str, Any]:
    """The best of the rounds of each after one to warm up, and how many times as fast ours is."""
    size = SIZES[name]
    ours, theirs = both(size, device)
    batch, image = size["batch"], size["image"]
    x_t = torch.randn(batch, size["model"]["in_channels"], image, image, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    tokens = torch.randn(batch, size["tokens"], size["model"]["context_dim"], device=device)

    def our_pass() -> Tensor:
        with short_in_float32(bf16 and device == "cpu"):  # as the trainer does
            return ours(x_t, t, Condition(tokens=tokens))

    ways: list[tuple[Callable[[], Tensor], torch.nn.Module]] = [
        (our_pass, ours),
        (lambda: theirs(x_t, t, tokens).sample, theirs),
    ]
    lay_out(ours, torch.device(device), bf16)  # as the trainer does
    with torch.no_grad():
        found, expected = (forward() for forward, _ in ways)
    if (found - expected).abs().max() > 1e-3 * expected.abs().max():
        raise SystemExit(f"the networks differ by {(found - expected).abs().max():g} of {expected.abs().max():g}")
    taken: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for times, (forward, network) in zip(taken, ways, strict=True):
            times.append(seconds(forward, network, device, bf16))
    own, other = (min(times[1:]) for times in taken)
    return {
        "size": name,
        "precision": "bf16" if bf16 else "fp32",
        "device": device,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "batch": batch,
        "seconds": round(own, 4),
        "diffusers_seconds": round(other, 4),
        "ratio": round(other / own, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5, help="of each network; the best one counts")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = (False, True) if fast_bf16(torch.device(device)) else (False,)
    rows = [measure(name, bf16, options.rounds, device) for name in options.sizes for bf16 in precisions]
    if options.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(
                "{size}, {precision}, {device}: {ratio} times as fast as diffusers ({seconds} s a step, "
                "{diffusers_seconds} s)".format(**row)
            )


if __name__ == "__main__":
    main()
