"""The stage of the dVAE.

B batch, H x W image, h x w grid of codes, K codebook.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch

from ...layers import random
from ...pipeline.recipe import Recipe, build
from ..objectives import dvae as dvae_objective
from ..run import Stage
from ..stream import Batch, Source
from .codebook import CodesStage
from .contract import Knob, Loss, Updates, last_read, read_images


class DVAEStage(CodesStage):
    """Fits the dVAE (arXiv:2102.12092, section 2.1): Gumbel-softmax relaxation, logit-Laplace likelihood, KL.

    In the first share `autoencoder` of its steps it trains as a plain autoencoder, whose k-means centres then become
    the codes; where the codes are patches, k-means comes first. From random codes, small runs keep few of them.
    """

    knobs: ClassVar = {
        "autoencoder": Knob(high=1, anew=True),
        "temperature": Knob(low=1e-6),
        "temperature_end": Knob(low=1e-6),
        "temperature_share": Knob(high=1),
        "kl_weight": Knob(),
        "kl_share": Knob(high=1),
        "squared": Knob(),
        "evenness": Knob(high=1),
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.hold(build(recipe, self.part))
        self.config, self.source, self.seed, self.device = config, source, seed, device
        knobs, steps = config.objective, config.steps
        self.start = round(config.number("autoencoder", 0) * steps)
        at_once = self.network.codes_from_pixels
        if at_once and self.start:
            raise ValueError("codes of patches start from k-means; set stages.tokenizer.objective.autoencoder=0")
        if config.number("evenness", 0) and not at_once:
            raise ValueError("evenness is of codes that are patches; set stages.tokenizer.objective.evenness=0")
        self.restart_step = 0 if at_once else self.start or None
        names = {"temperature": "start", "temperature_end": "end"}
        self.temperature: dict[str, Any] = {names[knob]: value for knob, value in knobs.items() if knob in names}
        self.temperature["steps"] = round(config.number("temperature_share", 0.75) * (steps - self.start))
        self.kl_weight: dict[str, Any] = {"end": knobs["kl_weight"]} if "kl_weight" in knobs else {}
        self.kl_weight["steps"] = round(config.number("kl_share", 0.1) * steps)
        self.ramp_end = self.start + self.kl_weight["steps"] if self.kl_weight.get("end", 1) else 0

    @torch.no_grad()
    def restart(self) -> None:
        """The codes become k-means centres, over the 2,048 images that were read last, or that come first."""
        positions = last_read(self.source, self.start * self.config.global_batch)
        evenness = {"evenness": self.config.number("evenness", 0.0)} if self.network.codes_from_pixels else {}
        self.network.start_codes(read_images(self.source, positions, self.device), self.seed, **evenness)

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        spec, noise, age = self.network.spec, None, step - self.start
        if age >= 0:
            noise = random.gumbel(self.seed, step, batch.samples, (*spec.shape, spec.vocabulary), "dvae gumbel")
            noise = noise.permute(0, 3, 1, 2)  # (B, K, h, w), laid out as the logits are
        beta = dvae_objective.kl_weight(age, **self.kl_weight) if age >= 0 else 0.0
        out = self.forward[self.part](batch.image, noise, dvae_objective.temperature(age, **self.temperature))
        squared = self.config.number("squared", 0.0)
        return dvae_objective.dvae(out["parameters"], out["logits"], batch.image, beta, batch.weight, squared)
