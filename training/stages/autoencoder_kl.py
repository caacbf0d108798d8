"""The stage of latent diffusion's autoencoder.

B images of 3 x H x W pixels, C channels of latents on a grid of h x w.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ...layers import random
from ...pipeline.recipe import Recipe, build
from ..objectives import autoencoder_kl as objective
from ..run import Stage
from ..stream import Batch, Source
from .adversary import Adversary
from .contract import Knob, Updates, over_ranks, pairs, psnr, reconstruct
from .latents import latent_std, measure_scale


class AutoencoderKLStage:
    """Fits the autoencoder of latent diffusion (arXiv:2112.10752, appendix G), and measures the scale of its latents.

    kl_weight: of the KL to N(0, 1), summed over latents. The other knobs: `Adversary`. There is no perceptual distance
    yet.
    """

    part = "tokenizer"
    beside: tuple[str, ...] = (Adversary.part,)
    metrics = ("psnr",)
    higher_is_better = True
    depends: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    restart_step: int | None = None
    knobs: ClassVar = {"kl_weight": Knob(), **Adversary.knobs}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.network: Any = build(recipe, self.part).to(device)
        self.adversary = Adversary(recipe, config, 0.5, device)
        self.networks: dict[str, nn.Module] = {self.part: self.network, **self.adversary.networks()}
        self.forward: dict[str, Callable[..., Any]] = dict(self.networks)
        self.source, self.seed, self.device = source, seed, device
        self.kl_weight = config.number("kl_weight", 1e-6)

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Where the adaptive weight is."""
        return Adversary.coupled(recipe, config)

    def updates(self, batch: Batch, step: int) -> Updates:
        ramp = self.adversary.ramp(step)
        noise = random.normal(self.seed, step, batch.samples, self.network.spec.shape, "posterior")
        out = self.forward[self.part](batch.image, noise)
        again, mean = out["reconstruction"], out["mean"]
        loss, scalars = objective.autoencoder_kl(
            again, batch.image, mean, out["log_variance"], batch.weight,
            fake_logits=self.adversary.judge(again) if ramp else None, last_layer=self.network.last_layer, ramp=ramp,
            kl_weight=self.kl_weight, average=over_ranks(batch.weight),
        )  # fmt: skip
        yield self.part, loss, scalars | {"unscaled_std": latent_std(mean, batch.weight)}
        if self.adversary.learns(step):
            with torch.no_grad():  # with the weights of now
                again = self.network(batch.image, noise)["reconstruction"]
            yield self.adversary.update(self.forward[Adversary.part], batch.image, again, batch.weight)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`psnr`: dB of what the posterior's mean gives back."""
        return {"psnr": psnr(reconstruct(self.network, batch.image), batch.image)}

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """Nothing more."""
        return {}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture and what the posterior's mean gives back."""
        return pairs(batch.image[:16], reconstruct(self.network, batch.image[:16]))

    def restart(self) -> None:
        """It never does."""

    def finish(self) -> None:
        """The scale of the latents; the discriminator is left behind."""
        measure_scale(self.network, self.source, self.device)
