"""What stages of tokenizers with real-valued latents share: how the latents are watched, and scaled at the end.

B images, C channels of latents, L of all latents of an image.

It does not know any stage.
"""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from ...layers.precision import full
from ...tokenizers.autoencoder import latent_sums
from ..stream import Batch, Source
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
    sums = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=device)
    for image in read_images(source, range(total * rank // world, total * (rank + 1) // world), device):
        count, first, second = latent_sums(network.scale.inverse(network.encode(image)))
        sums += torch.cat([count[None], first, second])
    count, first, second = reduce(sums, "sum").split([1, channels, channels])
    network.scale.measure(count[0], first, second)
