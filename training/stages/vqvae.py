"""The stage of the VQ-VAE.

B images, K codes on a grid of h x w.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ...pipeline.recipe import Recipe, build
from ..objectives import vqvae as objective
from ..run import Stage
from ..stream import Batch, Source
from .codebook import CODES_METRICS, Codebook, measure_codes, summarise_codes
from .contract import Knob, Updates, last_read, pairs, read_images, reconstruct


class VQVAEStage:
    """Fits the VQ-VAE (arXiv:1711.00937, equation 3). data_variance: see the objective; the other knobs: `Codebook`."""

    part = "tokenizer"
    beside: tuple[str, ...] = ()
    metrics = CODES_METRICS
    higher_is_better = True
    depends: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    knobs: ClassVar = {**Codebook.knobs, "data_variance": Knob(low=1e-6)}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.network: Any = build(recipe, self.part).to(device)
        self.networks: dict[str, nn.Module] = {self.part: self.network}
        self.forward: dict[str, Callable[..., Any]] = dict(self.networks)
        self.source, self.device, self.batch = source, device, config.global_batch
        self.codebook = Codebook(self.network.quantize, config, seed)
        self.restart_step = self.codebook.restart_step
        self.data_variance = config.number("data_variance", 1)

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Where the codebook is."""
        return Codebook.coupled(recipe.parts["tokenizer"], config)

    @torch.no_grad()
    def restart(self) -> None:
        """The codes become k-means centres, over the 2,048 images that were read last, or that come first."""
        positions = last_read(self.source, (self.restart_step or 0) * self.batch)
        self.codebook.start(read_images(self.source, positions, self.device), self.network)

    def updates(self, batch: Batch, step: int) -> Updates:
        out = self.forward[self.part](batch.image)
        loss, scalars = objective.vqvae(
            out["reconstruction"], batch.image, out["latents"], out["codewords"], out["codes"],
            self.network.spec.vocabulary, batch.weight, self.codebook.commitment_weight, self.codebook.weight,
            self.data_variance,
        )  # fmt: skip
        yield self.part, loss, scalars
        self.codebook.follow(out, batch, step)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """See `measure_codes`."""
        return measure_codes(self.network, batch)

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """See `summarise_codes`."""
        return summarise_codes(total)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture and what its codes give back."""
        return pairs(batch.image[:16], reconstruct(self.network, batch.image[:16]))

    def finish(self) -> None:
        """See `Codebook.finish`."""
        self.codebook.finish()
