"""The stage of the plain autoencoder and of its kin, denoising and sparse.

B images of 3 x H x W pixels.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from ...layers import random
from ...pipeline.recipe import Recipe, build
from ..objectives import autoencoder as objective
from ..run import Stage
from ..stream import Batch, Source
from .contract import Knob, Loss, Updates, over_ranks, pairs
from .latents import LatentsStage, latent_std


class AutoencoderStage(LatentsStage):
    """Fits an autoencoder (Hinton 2006, doi:10.1126/science.1127647), and measures the scale of its latents.

    corruption: what the encoder sees the picture through, which it is to give back clean (Vincent 2010, JMLR 11:3371);
    corruption_level is the noise's deviation, or the share of pixels that are lost. sparsity: see the objective.
    """

    knobs: ClassVar = {
        "error": Knob(choices=("l1", "l2")),
        "corruption": Knob(choices=("none", "gaussian", "mask", "salt_and_pepper")),
        "corruption_level": Knob(),
        "sparsity": Knob(choices=("none", "l1", "kl")),
        "sparsity_weight": Knob(),
        "rho": Knob(high=1),
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.hold(build(recipe, self.part))
        self.source, self.seed, self.device = source, seed, device
        self.corruption, self.level = config.word("corruption", "none"), config.number("corruption_level", 0)
        sparsity, weight = config.word("sparsity", "none"), config.number("sparsity_weight", 0)
        self.knob: dict[str, Any] = {"error": config.word("error", "l2"), "sparsity": sparsity}
        self.knob |= {"sparsity_weight": weight, "rho": config.number("rho", 0.05)}
        if (self.corruption == "none") != (self.level == 0) or (sparsity == "none") != (weight == 0):
            raise ValueError(
                "stages.tokenizer.objective: corruption goes with a corruption_level, and sparsity with a "
                f"sparsity_weight above 0, got {dict(config.objective)}; set both of a pair or neither"
            )
        if self.corruption in ("mask", "salt_and_pepper") and self.level > 1:
            raise ValueError(f"corruption_level is a share of the pixels, at most 1, got {self.level}; lower it")

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Where the mean activation is asked for, which is the batch's."""
        return "the KL of its sparsity is of a step's mean" if config.word("sparsity", "none") == "kl" else ""

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        out = self.forward[self.part](self.corrupt(batch, step))
        latents, average = out["latents"], over_ranks(batch.weight)
        loss, scalars = objective.autoencoder(
            out["reconstruction"], batch.image, batch.weight, latents, average=average, **self.knob
        )
        return loss, scalars | {"unscaled_std": latent_std(latents, batch.weight)}

    def corrupt(self, batch: Batch, step: int) -> Tensor:
        """The images as the encoder sees them; masks and salt and pepper take whole pixels."""
        image, samples = batch.image, batch.samples
        if self.corruption == "gaussian":
            noise = random.normal(self.seed, step, samples, tuple(image.shape[1:]), "corruption")
            return objective.add_gaussian(image, noise, self.level)
        if self.corruption == "none":
            return image
        draws = random.uniform(self.seed, step, samples, (1, *image.shape[2:]), "corruption")
        lose = objective.mask if self.corruption == "mask" else objective.salt_and_pepper
        return lose(image, draws, self.level)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture, as the encoder sees it, and what it becomes."""
        seen = self.corrupt(batch, 0)[:16]
        return pairs(seen, self.network(seen)["reconstruction"])
