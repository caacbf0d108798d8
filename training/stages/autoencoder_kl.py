"""The stage of latent diffusion's autoencoder.

B images of 3 x H x W pixels, C channels of latents on a grid of h x w.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image

from ...layers import random
from ...pipeline.recipe import Recipe, build
from ..objectives import autoencoder_kl as objective
from ..objectives.vqgan import hinge
from ..run import Stage
from ..stream import Batch, Source
from .adversary import Adversary
from .contract import Knob, Updates, over_ranks, pairs, reconstruct
from .latents import LatentsStage, latent_std
from .likeness import Likeness

_SHRINK = (2, 4)  # how many times smaller the pictures are that latents are also held to


class AutoencoderKLStage(LatentsStage):
    """Fits the autoencoder of latent diffusion (arXiv:2112.10752, appendix G), and measures the scale of its latents.

    kl_weight: of the KL to N(0, 1), summed over latents. equivariance: of the errors of pictures 2 and 4 times smaller
    that shrunk latents give back, see the objective; 0 does without. The other knobs: `Adversary` and `Likeness`.
    """

    beside: tuple[str, ...] = (Adversary.part,)
    knobs: ClassVar = {"kl_weight": Knob(), "equivariance": Knob(), **Adversary.knobs, **Likeness.knobs}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        network = build(recipe, self.part)  # first, so that its weights do not depend on who judges it
        self.adversary = Adversary(recipe, config, 0.5, device, hinge)
        self.likeness = Likeness(config, device)
        self.adversary.join(self, network)
        self.source, self.seed, self.device = source, seed, device
        self.kl_weight = config.number("kl_weight", 1e-6)
        self.equivariance = config.number("equivariance", 0)
        self.shrink = _SHRINK if self.equivariance else ()

    @staticmethod
    def problem(recipe: Recipe, parts: dict[str, Any], config: Stage, model: Path) -> str:
        """A discriminator that cannot judge its images, or latents that cannot be shrunk, where they are held to be."""
        side, found = parts["tokenizer"].spec.shape[-1], Adversary.problem(parts)
        if found or not config.number("equivariance", 0) or side % max(_SHRINK) == 0:
            return found
        return (
            f"its objective's equivariance shrinks latents {_SHRINK} times, got sides of {side}; choose an image_size "
            "and a channel_mult whose latents these divide, or leave equivariance out"
        )

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Where the adaptive weight is."""
        return Adversary.coupled(recipe, config)

    def updates(self, batch: Batch, step: int) -> Updates:
        ramp, beside = self.adversary.ramp(step), self.adversary.condition(batch.image)
        noise = random.normal(self.seed, step, batch.samples, self.network.spec.shape, "posterior")
        out = self.forward[self.part](batch.image, noise, self.shrink)
        again, mean = out["reconstruction"], out["mean"]
        fooling = self.adversary.judge(again, *beside) if ramp else None
        loss, scalars = objective.autoencoder_kl(
            again, batch.image, mean, out["log_variance"], batch.weight,
            fake_logits=fooling, last_layer=self.network.last_layer, ramp=ramp,
            kl_weight=self.kl_weight, average=over_ranks(batch.weight), equivariance=self.equivariance,
            shrunk=[out[f"shrunk_{n}"] for n in self.shrink], **self.likeness.terms(again, batch.image),
        )  # fmt: skip
        yield self.part, loss, scalars | {"unscaled_std": latent_std(mean, batch.weight)}
        if self.adversary.learns(step):
            with torch.no_grad():  # with the weights of now
                again = self.network(batch.image, noise)["reconstruction"]
            yield self.adversary.update(self.forward[Adversary.part], batch.image, again, batch.weight, *beside)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture and what the posterior's mean gives back."""
        return pairs(batch.image[:16], reconstruct(self.network, batch.image[:16]))
