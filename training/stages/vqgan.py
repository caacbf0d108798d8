"""The stage of VQ-GAN's tokenizer.

B images of 3 x H x W pixels, K codes on a grid of h x w.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...layers import random
from ...layers.precision import full
from ...pipeline.recipe import Recipe, build
from ..objectives import vqgan as objective
from ..objectives.dvae import temperature, uniform_kl
from ..objectives.vqgan import hinge
from ..run import Stage
from ..stream import Batch, Source
from .adversary import Adversary
from .codebook import Codebook, CodesStage
from .contract import Knob, Updates, last_read, over_ranks, read_images
from .latents import measure_scale
from .likeness import Likeness

_COLD = Knob(low=1e-6)
_GUMBEL = {"kl_weight": Knob(), "temperature": _COLD, "temperature_end": _COLD, "temperature_share": Knob(high=1)}


class VQGANStage(CodesStage):
    """Fits VQ-GAN's tokenizer (arXiv:2012.09841, section 3.1), against a discriminator where the recipe has one.

    `Codebook`, `Adversary` and `Likeness` say what their knobs mean; the first's are of quantizer "vector". Of
    quantizer "gumbel" are kl_weight, of the KL to the uniform distribution, and the temperature, which falls from
    `temperature` to `temperature_end` over the share `temperature_share` of the steps.
    """

    beside: tuple[str, ...] = (Adversary.part,)
    knobs: ClassVar = {**Codebook.knobs, **Adversary.knobs, **Likeness.knobs, **_GUMBEL}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.quantizer = recipe.parts[self.part].get("quantizer", "vector")
        own = {"vector": Codebook.knobs, "gumbel": _GUMBEL}.get(self.quantizer, {})
        if wrong := config.objective.keys() - own.keys() - Adversary.knobs.keys() - Likeness.knobs.keys():
            raise ValueError(
                f"stages.tokenizer.objective: {', '.join(sorted(wrong))} has no meaning for quantizer "
                f"{self.quantizer!r}; leave it out"
            )
        network = build(recipe, self.part)  # first, so that its weights do not depend on who judges it
        self.adversary = Adversary(recipe, config, 0.8, device, hinge)
        self.likeness = Likeness(config, device)
        self.adversary.join(self, network)
        self.source, self.config, self.seed, self.device = source, config, seed, device
        self.codebook = Codebook(self.network.quantize, config, seed) if self.quantizer == "vector" else None
        self.restart_step = None if self.codebook is None else self.codebook.restart_step

    @staticmethod
    def problem(recipe: Recipe, parts: dict[str, Any], config: Stage, model: Path) -> str:
        """A discriminator that cannot judge its images."""
        return Adversary.problem(parts)

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Where the codebook is, or the adaptive weight."""
        return Codebook.coupled(recipe.parts["tokenizer"], config) or Adversary.coupled(recipe, config)

    @torch.no_grad()
    def restart(self) -> None:
        """The codes become k-means centres, over the 2,048 images that were read last, or that come first."""
        assert self.codebook is not None
        positions = last_read(self.source, (self.restart_step or 0) * self.config.global_batch)
        self.codebook.start(read_images(self.source, positions, self.device), self.network)

    def updates(self, batch: Batch, step: int) -> Updates:
        ramp, beside = self.adversary.ramp(step), self.adversary.condition(batch.image)
        given = (batch.image, *self._relaxation(batch, step))
        out = self.forward[self.part](*given)
        again = out["reconstruction"]
        fooling = self.adversary.judge(again, *beside) if ramp else None
        loss, scalars = objective.vqgan(
            again, batch.image, self._regular(out), out["codes"], self.vocabulary, batch.weight,
            fake_logits=fooling, last_layer=self.network.last_layer, ramp=ramp,
            average=over_ranks(batch.weight), **self.likeness.terms(again, batch.image),
        )  # fmt: skip
        yield self.part, loss, scalars
        if self.codebook is not None:
            self.codebook.follow(out, batch, step)
        if self.adversary.learns(step):
            with torch.no_grad():  # with the weights of now
                again = self.network(*given)["reconstruction"]
            yield self.adversary.update(self.forward[Adversary.part], batch.image, again, batch.weight, *beside)

    def _relaxation(self, batch: Batch, step: int) -> tuple[Tensor, float] | tuple[()]:
        """Noise (B, K, h, w) and temperature of quantizer "gumbel"."""
        if self.quantizer != "gumbel":
            return ()
        spec, number = self.network.codes, self.config.number
        noise = random.gumbel(self.seed, step, batch.samples, (spec.vocabulary, *spec.shape), "vqgan gumbel")
        steps = round(number("temperature_share", 0.75) * self.config.steps)
        return noise, temperature(step, number("temperature", 0.9), number("temperature_end", 1e-6), steps)

    def _regular(self, out: dict[str, Tensor]) -> Tensor:
        """What the quantizer adds to the loss of each image, (B,)."""
        if self.codebook is not None:
            return self.codebook.regular(out)
        if self.quantizer == "gumbel":
            return self.config.number("kl_weight", 1e-8) * uniform_kl(out["logits"]).mean(dim=(1, 2))
        return out["reconstruction"].new_zeros(len(out["codes"]))

    @property
    def vocabulary(self) -> int:
        return self.network.codes.vocabulary

    def finish(self) -> None:
        """See `Codebook.finish`; the discriminator is left behind."""
        if self.codebook is not None:
            self.codebook.finish()


class VQLatentsStage(VQGANStage):
    """The same for a prior that reads what is quantized (arXiv:2112.10752, section 3.1), whose scale it measures."""

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """As of codes: `psnr` is of what these give back."""
        z = self.network.encode(batch.image)
        return self._measured(batch, full(self.network.decode(z)).clamp(-1, 1), self.network.nearest(z))

    def finish(self) -> None:
        """The scale of the latents too."""
        super().finish()
        measure_scale(self.network, self.source, self.device)
