"""A training step of denoising diffusion on pixels against denoising-diffusion-pytorch, in one run.

    pip install --no-deps --target build/bench/ddpm -r benchmarks/ddpm.txt    (in `make bench`)
    PYTHONPATH=build/bench/ddpm python benchmarks/ddpm.py [--sizes small] [--device cuda] [--threads N] [--json]

Draws of timesteps and noise, forward, the error of eps, backward and Adam. The networks differ: theirs as its README
builds it, with `flash_attn`, and without, ours with as many weights (no fewer, and at most 5 % more) and attention at
the smaller sizes, where theirs has linear attention at every size but the smallest; FLOPs of both are told. In float32
and, where the device is fast in it, under bfloat16 autocast. Both sides take turns, the peer in both layouts, of all
which the fastest counts, and with them a large matrix product of the same dtype; of each the best round. `limit` is the
share of what the product reaches. Both are measured with the memory that the trainer keeps (`keep_memory`). Without
other work on the machine only. Sizes: sizes.yaml.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kartina.benchmarks._timing import Work, compare, layouts, told, training_step
from kartina.layers import random
from kartina.layers.attention import short_in_float32
from kartina.priors.condition import Condition
from kartina.priors.denoiser import Denoiser
from kartina.priors.schedules import new_schedule
from kartina.priors.unet import UNet
from kartina.training.__main__ import keep_memory
from kartina.training.objectives.diffusion import diffusion
from kartina.training.optim import fast_bf16
from kartina.training.parallel import lay_out

SIZES = yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text(encoding="utf-8"))["ddpm"]


def measure(name: str, bf16: bool, device: torch.device) -> dict[str, Any]:
    """One row: ours beside theirs."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    size = SIZES[name]
    batch, side = size["batch"], size["image"]
    torch.manual_seed(0)
    ours = UNet(**size["ours"]).to(device)
    theirs = {flash: Unet(**size["peer"], flash_attn=flash).to(device) for flash in (False, True)}
    weights = [sum(weight.numel() for weight in network.parameters()) for network in (ours, theirs[True])]
    if not weights[1] <= weights[0] <= 1.05 * weights[1]:
        raise SystemExit(f"ours must have as many weights as the peer, got {weights}; correct sizes.yaml")
    image, samples = torch.rand(batch, 3, side, side, device=device), torch.arange(batch, device=device)
    denoise, weight = Denoiser(ours, new_schedule()), torch.ones(batch, device=device)

    def our_loss() -> Tensor:
        x_0, draws = 2 * image - 1, random.Draws(0, 0, samples)
        t = (random.uniform(*draws, (), "timestep") * 1000).long()
        eps = random.normal(*draws, (3, side, side), "noise")
        with short_in_float32(bf16 and device.type == "cpu"):  # as the trainer does
            found = denoise(denoise.schedule.diffuse(x_0, t, eps), t, Condition())
        (total, count), _ = diffusion(found, x_0, eps, *denoise.schedule.at(t, x_0), weight)
        return total / count

    def their_step(network: Any, layout: torch.memory_format) -> Work:
        loss = GaussianDiffusion(network, image_size=side, objective="pred_noise", beta_schedule="linear").to(device)
        laid = image.contiguous(memory_format=layout)
        return training_step(network, lambda: loss(laid), device, bf16)

    dtype = torch.bfloat16 if bf16 else torch.float32
    word = str(dtype).removeprefix("torch.")
    peers = {}
    for flash, network in theirs.items():
        peers |= layouts(network, their_step, f"denoising-diffusion-pytorch{', flash_attn' if flash else ''}")
    facts = {"ours_weights": weights[0], "peer_weights": weights[1], "batch": batch, "size": name}
    lay_out(ours, device, bf16)  # as the trainer does
    step = training_step(ours, our_loss, device, bf16)
    return compare(f"DDPM, training step, {name}, {word}", step, peers, device, dtype, SIZES["rounds"], **facts)


def main() -> None:
    names = [name for name in SIZES if name != "rounds"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--sizes", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        raise SystemExit(f"denoising-diffusion-pytorch is not installed; see the first lines of {__file__}")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    keep_memory()  # as the trainer does, for both sides
    device, rows = torch.device(options.device), []
    for bf16 in (False, True) if fast_bf16(device) else (False,):
        for name in options.sizes:
            rows.append(measure(name, bf16, device))
            if not options.json:
                print(told(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
