"""What stages of tokenizers with real-valued latents share: how the latents are watched, and scaled at the end.

B images, C channels of latents, L of all latents of an image.

It does not know any stage.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from ...layers.precision import full
from ...pipeline import checkpoint
from ...tokenizers.autoencoder import latent_sums
from ..stream import Batch, ShardSource, Source
from . import contract
from .contract import TrainingStage, psnr, read_images, reconstruct


class LatentsStage(TrainingStage):
    """A stage of a tokenizer whose latents are scaled at the end."""

    part = "tokenizer"
    metrics = ("psnr",)
    higher_is_better = True
    source: Source
    device: torch.device

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`psnr`: dB of what the latents without noise give back."""
        return {"psnr": psnr(reconstruct(self.network, batch.image), batch.image)}

    def finish(self) -> None:
        """The scale of the latents; a discriminator is left behind."""
        measure_scale(self.network, self.source, self.device)


@torch.no_grad()
def scale_imported(folder: Path, shards: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Measures the scale of a tokenizer that was imported without one, and writes it into the model folder.

    Returns mean and deviation of each channel, (C,). Raises ModelError for a tokenizer of codes, for one that was
    trained here (its scale is of its own data), and where a prior was trained for the scale that it has.
    """
    recipe, tokenizer = checkpoint.load_tokenizer(folder, device)
    entries = checkpoint.read_card(folder)["parts"]
    if tokenizer.spec.kind != "latents":
        raise checkpoint.ModelError(f"{folder}: its tokenizer gives codes, which have no scale; name a KL autoencoder")
    if len(entries) > 1 or "identity" in entries["tokenizer"]:
        raise checkpoint.ModelError(
            f"{folder}: the scale of its latents belongs to what was trained with it; name a tokenizer alone that "
            "`kartina convert` wrote (of a whole system with --part tokenizer)"
        )
    measure_scale(tokenizer, ShardSource(shards, recipe.image_size, seed=0), device)
    found = {f"scale.{name}": getattr(tokenizer.scale, name).cpu() for name in ("mean", "std")}
    facts = {key: value for key, value in entries["tokenizer"].items() if key != "hash"}
    checkpoint.save_part(folder, recipe, "tokenizer", checkpoint.load_weights(folder, "tokenizer") | found, **facts)
    return found["scale.mean"], found["scale.std"]


@torch.no_grad()
def latent_std(latents: Tensor, weight: Tensor) -> Tensor:
    """The deviation of an image's latents (B, C, ...), averaged over images by weight (B,)."""
    each = full(latents).flatten(1).std(dim=1, unbiased=False)
    return (weight * each).sum() / weight.sum().clamp(min=1e-12)


@torch.no_grad()
def measure_scale(network: Any, source: Source, device: torch.device) -> None:
    """Sets the scale of a tokenizer from the first images of its training data, on all ranks at once.

    Each rank encodes its share of the images. Raises ValueError, on all of them, where a channel does not vary.
    """
    here, channels = PartialState(), network.spec.shape[0]
    total, rank, world = min(contract.IMAGES, source.size or contract.IMAGES), here.process_index, here.num_processes
    sums = torch.zeros(1 + 2 * channels, dtype=torch.float64)  # on the CPU, for not every device has float64
    for image in read_images(source, range(total * rank // world, total * (rank + 1) // world), device):
        count, first, second = latent_sums(network.scale.inverse(network.encode(image)).cpu())
        sums += torch.cat([count[None], first, second])
    whole = sums if world == 1 else reduce(sums.to(device), "sum").cpu()
    count, first, second = whole.split([1, channels, channels])
    network.scale.measure(count[0], first, second)
