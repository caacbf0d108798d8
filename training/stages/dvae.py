"""The stage of the dVAE.

B batch, H x W image, h x w grid of codes, K codebook.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ...layers import random
from ...pipeline.recipe import Recipe, build
from ..objectives import dvae as dvae_objective
from ..run import Stage
from ..stream import Batch, Source
from .contract import Knob, Loss, Updates, contact_sheet


class DVAEStage:
    """Fits the dVAE (arXiv:2102.12092, section 2.1): Gumbel-softmax relaxation, logit-Laplace likelihood, KL.

    In the first share `autoencoder` of its steps it trains as a plain autoencoder, whose k-means centres then become
    the codes; where the codes are patches, k-means comes first. From random codes, small runs keep few of them.
    """

    part = "tokenizer"
    metrics = ("psnr", "usage", "perplexity")
    higher_is_better = True
    coupled = False
    depends: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    knobs: ClassVar = {
        "autoencoder": Knob(high=1),
        "temperature": Knob(),
        "temperature_end": Knob(),
        "temperature_share": Knob(high=1),
        "kl_weight": Knob(),
        "kl_share": Knob(high=1),
        "squared": Knob(),
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.network: Any = build(recipe, self.part)
        self.networks: dict[str, nn.Module] = {self.part: self.network}
        self.forward: dict[str, Callable[..., Any]] = dict(self.networks)
        self.config, self.source, self.seed, self.device = config, source, seed, device
        knobs, steps = config.objective, config.steps
        self.start = round(knobs.get("autoencoder", 0) * steps)
        at_once = self.network.codes_from_pixels
        if at_once and self.start:
            raise ValueError("codes of patches start from k-means; set stages.tokenizer.objective.autoencoder=0")
        self.restart_step = 0 if at_once else self.start or None
        names = {"temperature": "start", "temperature_end": "end"}
        self.temperature: dict[str, Any] = {names[knob]: value for knob, value in knobs.items() if knob in names}
        self.temperature["steps"] = round(knobs.get("temperature_share", 0.75) * (steps - self.start))
        self.kl_weight: dict[str, Any] = {"end": knobs["kl_weight"]} if "kl_weight" in knobs else {}
        self.kl_weight["steps"] = round(knobs.get("kl_share", 0.1) * steps)

    @torch.no_grad()
    def restart(self) -> None:
        """The codes become k-means centres, over the 2,048 images that were read last, or that come first."""
        end = self.start * self.config.global_batch or min(2048, self.source.size or 2048)
        positions = range(max(0, end - 2048), end)
        chunks = [positions[i : i + 128] for i in range(0, len(positions), 128)]
        batches = (self.source.read(chunk) for chunk in chunks)
        images = (batch.image[batch.weight > 0].to(self.device) for batch in batches)
        self.network.start_codes(images, self.seed)

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        spec, noise, age = self.network.spec, None, step - self.start
        if age >= 0:
            noise = random.gumbel(self.seed, step, batch.samples, (*spec.shape, spec.vocabulary), "dvae gumbel")
            noise = noise.permute(0, 3, 1, 2)  # (B, K, h, w), laid out as the logits are
        beta = dvae_objective.kl_weight(age, **self.kl_weight) if age >= 0 else 0.0
        out = self.forward[self.part](batch.image, noise, dvae_objective.temperature(age, **self.temperature))
        squared = self.config.objective.get("squared", 0.0)
        return dvae_objective.dvae(out["parameters"], out["logits"], batch.image, beta, batch.weight, squared)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`psnr`: dB of the pictures that the codes give back, in the range of the pixels. `codes`: how often each."""
        codes = self.network.encode(batch.image)
        again = self.network.decode(codes).float().clamp(-1, 1)
        psnr = -10 * torch.log10((again - batch.image).square().mean(dim=(1, 2, 3)) / 4)
        return {"psnr": psnr, "codes": dvae_objective.counts_by_image(codes, self.network.spec.vocabulary)}

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """`usage` and `perplexity` of the codebook over all images, and `counts_per_code`, how much they rest on."""
        return dvae_objective.codebook_use(total["codes"]) | {"counts_per_code": total["codes"].mean()}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture and what its codes give back."""
        image = batch.image[:16]
        again = self.network.decode(self.network.encode(image))
        return contact_sheet(torch.stack([image, again], 1).flatten(0, 1))  # (2B, 3, H, W)
