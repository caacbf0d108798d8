"""Tokenizers against their peers: a training step of the discrete VAE, a step of the quantizer, encoding and decoding.

    pip install --no-deps --target build/bench/image_tokenizers -r benchmarks/image_tokenizers.txt    (in `make bench`)
    PYTHONPATH=build/bench/image_tokenizers python benchmarks/image_tokenizers.py [--device cuda] [--threads N] [--json]

- encode, decode: `AutoencoderKL` and diffusers' with the same weights, ours packed as a loaded system's are; outputs
  must be equal. In float32, and in bfloat16 where the device is fast in it.
- dvae: forward, backward and Adam of `DiscreteVAE` and dalle-pytorch's, noise included, as in a step that writes no
  line, in which ours counts its codes all the same. Without a weight of the KL, which theirs computes nevertheless, and
  with one. The networks differ, so that weights and FLOPs of both are told.
- quantizer: latents that require gradients to nearest codes, straight through, commitment, backward, and the moving
  averages; vector-quantize-pytorch without its rotation of gradients, which is another method.

Sizes: sizes.yaml. Both sides take turns, the peer in both layouts, and diffusers' compiled too, of which the fastest
counts, and with them a large matrix product of the same dtype; of each the best round. `limit` is the share of what the
product reaches, by FLOPs of products and convolutions that the framework counts. Steps of training are measured with
the memory that the trainer keeps (`keep_memory`), on both sides. Without other work on the machine only. It does not
know trained weights: they do not change the time.
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from kartina.benchmarks._timing import Work, compare, layouts, told, training_step
from kartina.layers import random
from kartina.layers.packed import pack
from kartina.pipeline.convert import to_diffusers
from kartina.tokenizers.autoencoder_kl import AutoencoderKL
from kartina.tokenizers.dvae import DiscreteVAE
from kartina.tokenizers.quantize import VectorQuantizer
from kartina.training.__main__ import keep_memory
from kartina.training.objectives.dvae import dvae as dvae_objective
from kartina.training.objectives.vqvae import quantization
from kartina.training.optim import fast_bf16

SIZES = yaml.safe_load((Path(__file__).parent / "sizes.yaml").read_text())["tokenizers"]


def discrete_vae(device: torch.device, kl_weight: float) -> dict:
    """Training steps in float32. kl_weight: of the mean KL of a position, as dalle-pytorch has it."""
    sizes = SIZES["dvae"]
    count, side = sizes["batch"], sizes["ours"]["image_size"]
    image = torch.rand(count, 3, side, side, device=device)  # theirs in [0, 1], ours in [-1, 1]
    samples, weight = torch.arange(count, device=device), torch.ones(count, device=device)

    network = DiscreteVAE(**sizes["ours"]).to(device)

    def our_loss() -> Tensor:
        noise = random.gumbel(0, 0, samples, (*network.spec.shape, network.spec.vocabulary), "dvae gumbel")
        out = network(2 * image - 1, noise.permute(0, 3, 1, 2), 0.9)
        beta = kl_weight * image[0].numel() / math.prod(network.spec.shape)
        (total, number), scalars = dvae_objective(out["parameters"], out["logits"], 2 * image - 1, beta, weight)
        scalars["codes"]()  # type: ignore[operator]  # which every step counts
        return total / number

    def theirs(peer: nn.Module, layout: torch.memory_format) -> Work:
        laid = image.contiguous(memory_format=layout)
        return training_step(peer, lambda: peer(laid, return_loss=True), device)

    peer = peer_vae()(**sizes["peer"], temperature=0.9, kl_div_loss_weight=kl_weight).to(device)
    weights = [sum(w.numel() for w in each.parameters()) for each in (network, peer)]
    if weights[0] < weights[1]:
        raise SystemExit(f"ours must have no fewer weights than the peer, got {weights}; correct sizes.yaml")
    facts = {"ours_weights": weights[0], "peer_weights": weights[1]}
    peers = layouts(peer, theirs, "dalle-pytorch")
    ours = training_step(network, our_loss, device)
    name = f"dVAE, training step, float32, {'with' if kl_weight else 'without'} a weight of the KL"
    return compare(name, ours, peers, device, torch.float32, SIZES["rounds"], **facts)


@cache
def peer_vae() -> type[nn.Module]:
    """dalle-pytorch's class. Its package imports what downloads published weights, which is left out here."""
    spec = importlib.util.find_spec("dalle_pytorch")
    assert spec is not None and spec.submodule_search_locations
    package, published = types.ModuleType("dalle_pytorch"), types.ModuleType("dalle_pytorch.vae")
    package.__path__ = list(spec.submodule_search_locations)
    published.OpenAIDiscreteVAE = published.VQGanVAE = object  # type: ignore[attr-defined]
    sys.modules |= {"dalle_pytorch": package, "dalle_pytorch.vae": published}
    from dalle_pytorch.dalle_pytorch import DiscreteVAE as Peer

    return Peer


def quantizer(device: torch.device) -> dict:
    """Training steps in float32."""
    from vector_quantize_pytorch import VectorQuantize

    sizes = SIZES["quantizer"]
    vectors, codes, width = sizes["vectors"], sizes["num_codes"], sizes["code_dim"]
    latents = torch.randn(1, width, 1, vectors, device=device)
    ours = VectorQuantizer(codes, width, ema_decay=sizes["decay"]).to(device)
    peer = VectorQuantize(
        dim=width, codebook_size=codes, decay=sizes["decay"], commitment_weight=0.25, rotation_trick=False
    ).to(device)
    codebook = torch.randn(codes, width, device=device)
    ours.embedding.weight.copy_(codebook)
    peer.codebook = codebook
    rows = latents[0, :, 0].T[None].contiguous()  # (1, N, D), what the peer reads without a copy
    found = ours.encode(latents).flatten()
    if not torch.equal(found, peer.eval()(rows)[1].flatten()):
        raise SystemExit("the quantizers find other codes")
    peer.train()
    latents = rows.mT[:, :, None]  # (1, D, 1, N) of the same memory, as a network with channels last gives it

    def our_step() -> None:
        x = latents.detach().requires_grad_()
        out = ours(x)
        loss = 0.25 * quantization(out["latents"], out["codewords"])[1].mean()
        (out["quantized"].square().mean() + loss).backward()
        ours.update(*ours.statistics(out["latents"].detach(), out["codes"], torch.ones(1, device=device)))

    def peer_step() -> None:
        x = rows.detach().requires_grad_()
        quantized, _, loss = peer(x)
        (quantized.square().mean() + loss.sum()).backward()

    peers = {"vector-quantize-pytorch": peer_step}
    return compare("quantizer, training step, float32", our_step, peers, device, torch.float32, SIZES["rounds"])


@torch.inference_mode()
def autoencoder(device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Encoding and decoding."""
    from diffusers import AutoencoderKL as Peer

    sizes = dict(SIZES["autoencoder"])
    batch, levels = sizes.pop("batch"), len(sizes["channel_mult"])
    ours = AutoencoderKL(**sizes).eval()
    peer = Peer(
        block_out_channels=[sizes["width"] * mult for mult in sizes["channel_mult"]],
        layers_per_block=sizes["blocks_per_level"], sample_size=sizes["image_size"], latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()  # fmt: skip
    peer.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    ours, peer = ours.to(device, dtype), peer.to(device, dtype)
    pack(ours)
    image = (torch.rand(batch, 3, sizes["image_size"], sizes["image_size"], device=device) * 2 - 1).to(dtype)
    latents = torch.randn(batch, *ours.spec.shape, device=device, dtype=dtype)
    error = (ours.decode(latents) - peer.decode(latents).sample).abs().max()
    error = max(error, (ours.encode(image) - peer.encode(image).latent_dist.mode()).abs().max())
    if error > (1e-4 if dtype == torch.float32 else 0.1):
        raise SystemExit(f"the autoencoders differ by {error:.2g}")
    word = str(dtype).removeprefix("torch.")
    rows = []
    for name, x, own, other in (
        ("encode", image, ours.encode, lambda net, x: net.encode(x).latent_dist.mode()),
        ("decode", latents, ours.decode, lambda net, x: net.decode(x).sample),
    ):
        ways = layouts(
            peer, lambda net, layout, x=x, f=other: lambda: f(net, x.contiguous(memory_format=layout)), "diffusers"
        )
        ways["diffusers, channels last, compiled"] = compiled(peer, other, x)
        rows.append(compare(f"{name}, {word}", lambda f=own, x=x: f(x), ways, device, dtype, SIZES["rounds"]))
    return rows


def compiled(network: nn.Module, method: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Work:
    """By `torch.compile` with its defaults, as diffusers' documentation advises; needs a C++ compiler on a CPU."""
    laid = copy.deepcopy(network).to(memory_format=torch.channels_last)
    # No full graph, so that FLOPs can be counted, which is done by what is not compiled.
    work = torch.compile(partial(method, laid), dynamic=False)
    x = x.contiguous(memory_format=torch.channels_last)
    if (work(x) - method(network, x)).abs().max() > (1e-3 if x.dtype == torch.float32 else 0.1):
        raise SystemExit("what is compiled differs")
    return partial(work, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    missing = [name for name in ("dalle_pytorch", "vector_quantize_pytorch") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the peers {', '.join(missing)} are not installed; see the first lines of {__file__}")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtypes = [torch.float32, *([torch.bfloat16] if fast_bf16(device) else [])]
    rows = [row for dtype in dtypes for row in autoencoder(device, dtype)]
    keep_memory()  # as the trainer does, for both sides
    rows += [discrete_vae(device, 0.0), discrete_vae(device, 0.1), quantizer(device)]
    if options.json:
        print(json.dumps({"device": str(device), "threads": options.threads, "rows": rows}))
        return
    for row in rows:
        print(told(row))


if __name__ == "__main__":
    main()
