"""The stage of the VQ-VAE.

B images, K codes on a grid of h x w.
"""

from pathlib import Path
from typing import ClassVar

import torch

from ...pipeline.recipe import Recipe, build
from ..objectives import vqvae as objective
from ..run import Stage
from ..stream import Batch, Source
from .codebook import Codebook, CodesStage
from .contract import Knob, Updates, last_read, read_images


class VQVAEStage(CodesStage):
    """Fits the VQ-VAE (arXiv:1711.00937, equation 3). data_variance: see the objective; the other knobs: `Codebook`."""

    knobs: ClassVar = {**Codebook.knobs, "data_variance": Knob(low=1e-6)}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.hold(build(recipe, self.part))
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

    def finish(self) -> None:
        """See `Codebook.finish`."""
        self.codebook.finish()
