"""Pictures of Stable Diffusion 1.5, by our sampling path and by diffusers' `StableDiffusionPipeline`, in one run.

Run as `python -m kartina.benchmarks.stable_diffusion [--size small] [--compile]`, or by path with the package
installed; sizes are in `sizes.yaml`. From tokens of captions to 8-bit pictures: DDIM, classifier-free guidance of 7.5,
decoding. Ours as `kartina paint` does it; theirs as built, with channels last as their documentation advises, and with
--compile both also with a compiled U-Net. Both have the same weights, random ones, the same tokens and noise; that they
come to the same latents, and to the same pictures of the same latents, is checked first. A row has the best of three
rounds in which both take turns. Memory is a side's weights and what it takes beyond them: on a CPU, by Linux's count of
resident pages. `limit` is the share of what a large matrix product of the same dtype reaches, by FLOPs of products and
convolutions. `--json` prints one JSON line. On a GPU if there is one. Without other work on the machine only.
"""

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from PIL.Image import Image
from torch import Tensor, nn

from kartina.benchmarks._timing import flops, limit, turns
from kartina.layers.packed import pack, unpack
from kartina.layers.random import normal
from kartina.pipeline.convert import to_diffusers
from kartina.pipeline.convert_scheduler import scheduler_config
from kartina.pipeline.convert_unet import unet_to_diffusers
from kartina.pipeline.convert_unet_config import unet_config
from kartina.pipeline.drawing import DiffusionDrawing
from kartina.pipeline.images import to_pil
from kartina.pipeline.published import SCALING_FACTOR, autoencoder_layout
from kartina.pipeline.recipe import Diffusion, Recipe, defaults, sampling_knobs
from kartina.priors.condition import Condition
from kartina.priors.unet import UNet
from kartina.tokenizers.autoencoder_kl import AutoencoderKL

SIZES = yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text(encoding="utf-8"))["stable_diffusion"]
GUIDANCE = 7.5
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# How far the latents may be apart after two steps, as a share of their deviation: theirs are of the dtype, ours full.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.2}
Paint = Callable[[int, int], list[Image]]  # batch, steps


class NoCaptions:
    """In place of a text encoder: captions come as tokens, and this gives those of the null caption, (1, L, D)."""

    def __init__(self, null: Tensor) -> None:
        self.null, self.width = null, null.shape[2]

    def null_text(self, batch: int) -> int:
        return batch

    def __call__(self, batch: int) -> tuple[Tensor, None]:
        return self.null.expand(batch, -1, -1), None


class Ours:
    """The system that a folder of Stable Diffusion loads as, but for its text encoder."""

    def __init__(self, size: dict[str, Any], device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.arguments = size["unet"]
        with torch.device(device), torch.no_grad():
            self.unet, self.vae = UNet(**size["unet"]), AutoencoderKL(**size["autoencoder"])
            for parameter in self.unet.parameters():  # so that none is zero
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.vae.scale.std.fill_(1 / SCALING_FACTOR)
        self.networks = [each.to(dtype).eval().requires_grad_(False) for each in (self.unet, self.vae)]
        self.recipe = Recipe(
            name="random/stable-diffusion",
            paper="arXiv:2112.10752",
            image_size=size["autoencoder"]["image_size"],
            parts={
                "prior": {"kind": "unet", **size["unet"]},
                "tokenizer": {"kind": "autoencoder_kl", **size["autoencoder"]},
            },
            sampling={"sampler": "ddim", "guidance_scale": GUIDANCE},
            diffusion=Diffusion(schedule="scaled_linear"),
        )
        shape = max(size["batches"]), size["tokens"], self.unet.context_dim
        self.tokens, null = (torch.randn(n, *shape[1:], device=device).to(dtype) for n in (shape[0], 1))
        self.text = NoCaptions(null)
        parts = {"prior": self.unet, "tokenizer": self.vae, "text": self.text}
        for network in self.networks:
            pack(network)
        self.draw = DiffusionDrawing(self.recipe, parts, None)

    def compile(self) -> None:
        """As `TextToImage.compile` does."""
        unpack(self.unet)
        self.unet.compile(mode="reduce-overhead", dynamic=False)

    @torch.inference_mode()
    def latents(self, batch: int, steps: int) -> Tensor:
        """(B, C, h, w), of seeds 0, 1 and so on."""
        knobs = sampling_knobs(self.recipe, {"num_steps": steps}, "knobs")
        return self.draw.sample(Condition(tokens=self.tokens[:batch]), range(batch), knobs)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image]:
        return to_pil(self.vae.decode(latents).float())

    def paint(self, batch: int, steps: int) -> list[Image]:
        return self.decode(self.latents(batch, steps))

    def flops(self, batch: int, steps: int) -> int:
        """Of products and convolutions, of `paint`."""
        latents = self.latents(batch, 1)
        return steps * flops(lambda: self.latents(batch, 1)) + flops(lambda: self.decode(latents))


class Theirs:
    """Their pipeline with the weights of ours: of the U-Net the same memory, as long as the layout is left alone."""

    def __init__(self, ours: Ours) -> None:
        section = defaults("tokenizer", "autoencoder_kl") | ours.recipe.parts["tokenizer"]
        config = unet_config(ours.arguments, linear_projections=False)
        config.pop("_class_name")
        scheduler = scheduler_config(ours.recipe)
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**config)
            vae = diffusers.AutoencoderKL(**autoencoder_layout(section), scaling_factor=SCALING_FACTOR)
        unet.load_state_dict(unet_to_diffusers(ours.unet.state_dict(), linear_projections=False), assign=True)
        vae.load_state_dict(to_diffusers(ours.vae.state_dict()), assign=True)
        vae.to(memory_format=torch.contiguous_format)
        self.networks = [each.eval().requires_grad_(False) for each in (unet, vae)]
        self.pipeline = diffusers.StableDiffusionPipeline(
            vae=vae, unet=unet, scheduler=getattr(diffusers, scheduler.pop("_class_name"))(**scheduler),
            text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        self.ours = ours

    def channels_last(self) -> None:
        for network in self.networks:
            network.to(memory_format=torch.channels_last)

    def compile(self) -> None:
        """As their documentation has it, with one graph for each batch."""
        self.pipeline.unet = torch.compile(self.networks[0], mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run(self, batch: int, steps: int, output: str) -> Any:
        """output: "latent" or "pil"."""
        tokens, side = self.ours.tokens[:batch], self.ours.recipe.image_size
        seeds = torch.arange(batch, device=tokens.device)
        noise = normal(0, 0, seeds, self.ours.draw.shape, "sampler start").to(tokens.dtype)
        return self.pipeline(
            prompt_embeds=tokens, negative_prompt_embeds=self.ours.text(batch)[0], latents=noise, height=side,
            width=side, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type=output,
        ).images  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        image = self.pipeline.vae.decode(latents / SCALING_FACTOR).sample
        return self.pipeline.image_processor.postprocess(image, output_type="pil")

    def paint(self, batch: int, steps: int) -> list[Image]:
        return self.run(batch, steps, "pil")


def check(ours: Ours, theirs: Theirs, precision: str) -> float:
    """How far two steps lead apart, as a share of the latents' deviation. Raises SystemExit where it is too far."""
    found, expected = ours.latents(1, 2), theirs.run(1, 2, "latent")
    apart = float((found.float() - expected.float()).std() / expected.float().std())
    if not apart < TOLERANCE[precision]:  # NaN too
        raise SystemExit(f"{precision}: the latents differ by {apart:.2g} of their deviation")
    pictures = [np.asarray(decode(found)[0]).astype(float) for decode in (ours.decode, theirs.decode)]
    off = np.abs(pictures[0] - pictures[1]).mean()
    if pictures[1].std() < 1 or off > 255 * TOLERANCE[precision] / 10:
        raise SystemExit(f"{precision}: the pictures of one latent differ by {off:.2g} of 255 levels on average")
    return apart


def resident(which: str) -> int | None:
    """Bytes of the process, VmRSS now or VmHWM at most; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines[which].split()[0])
    except (OSError, KeyError):
        return None


def forget_peak() -> bool:
    """Gives what is free back to the system and starts VmHWM anew, and whether it could."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def memory(paint: Paint, networks: list[nn.Module], batch: int, steps: int, device: str) -> float | None:
    """Gibibytes: of the weights, and what a few steps take beside them."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held: int | None = torch.cuda.memory_allocated()
    else:
        paint(batch, 1)  # brings weights into another order, which happens once
        held = resident("VmRSS") if forget_peak() else None
    paint(batch, min(3, steps))  # what a graph is captured in is not seen when it is replayed
    most = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    if held is None or most is None:
        return None
    weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    return round((weights + most - held) / 2**30, 3)


def rows(
    name: str, precision: str, batches: list[int], steps: int, rounds: int, compiled: bool, device: str
) -> Iterator[dict[str, Any]]:
    """Of one dtype: each batch beside each setting of theirs."""
    ours = Ours(SIZES[name], device, DTYPES[precision])
    theirs = Theirs(ours)
    apart = check(ours, theirs, precision)
    top = limit(torch.device(device), DTYPES[precision])
    work = {batch: ours.flops(batch, steps) for batch in batches}
    settings: dict[str, Callable[[], None]] = {"eager": lambda: None, "channels last": theirs.channels_last}
    if compiled:
        settings["channels last, both compiled"] = theirs.compile
    for setting, prepare in settings.items():
        prepare()
        if prepare == theirs.compile:
            ours.compile()
            apart = check(ours, theirs, precision)
        for batch in batches:
            gib = [memory(side.paint, side.networks, batch, steps, device) for side in (ours, theirs)]
            works = {"ours": partial(ours.paint, batch, steps), "theirs": partial(theirs.paint, batch, steps)}
            own, other = turns(works, torch.device(device), rounds).values()
            yield {
                "size": name,
                "precision": precision,
                "device": torch.cuda.get_device_name() if device == "cuda" else device,
                "batch": batch,
                "steps": steps,
                "diffusers": setting,
                "seconds": round(own, 3),
                "diffusers_seconds": round(other, 3),
                "ratio": round(other / own, 2),
                "gib": gib[0],
                "diffusers_gib": gib[1],
                "limit": round(work[batch] / own / top, 3),
                "apart": float(f"{apart:.2g}"),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--size", choices=list(SIZES), help="by default 1.5 on a GPU, else small")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), help="by default fp16 and bf16 on a GPU")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="of each side, of which the best counts")
    parser.add_argument("--compile", action="store_true", help="both with a compiled U-Net too, which takes minutes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = options.size or ("1.5" if device == "cuda" else "small")
    precisions = options.precisions or (["fp16", "bf16"] if device == "cuda" else ["fp32", "bf16"])
    batches, steps = options.batches or SIZES[name]["batches"], options.steps or SIZES[name]["steps"]
    found = []
    for precision in precisions:
        for row in rows(name, precision, batches, steps, options.rounds, options.compile, device):
            found.append(row)
            if not options.json:
                print(
                    "{size}, {precision}, batch {batch}, {steps} steps, {device}: {ratio} times as fast as diffusers, "
                    "{diffusers} ({seconds} s and {diffusers_seconds} s; {limit:.0%} of the limit; {apart} apart after "
                    "two steps)".format(**row)
                    + ("" if row["gib"] is None else "; {gib} and {diffusers_gib} GiB".format(**row)),
                    flush=True,
                )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
