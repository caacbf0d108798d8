"""What the stages of tokenizers with a codebook share: where it starts, how it follows the latents, and what becomes of
codes that no latent is near.

B images on a grid of h x w, K codes of D channels.

It does not know the tokenizer around the codebook.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from accelerate.utils import gather, reduce
from PIL.Image import Image
from torch import Tensor

from ...layers import random
from ...layers.precision import full
from ...tokenizers.quantize import VectorQuantizer, as_vectors
from ..objectives.dvae import codebook_use, counts_by_image
from ..objectives.vqvae import quantization
from ..run import Stage
from ..stream import Batch
from .contract import Knob, TrainingStage, pairs, psnr, reconstruct

_LAST = 0.2  # the share of the steps at the end in which no code begins anew


class CodesStage(TrainingStage):
    """A stage of a tokenizer whose `encode` gives codes: how they are measured and shown."""

    part = "tokenizer"
    metrics = ("psnr", "usage", "perplexity")
    higher_is_better = True

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`psnr`: dB of the pictures that the codes give back, within their range; `codes`: how often each stands."""
        codes = self.network.encode(batch.image)
        again = full(self.network.decode(codes)).clamp(-1, 1)
        return self._measured(batch, again, codes)

    def _measured(self, batch: Batch, again: Tensor, codes: Tensor) -> dict[str, Tensor]:
        counts = counts_by_image(codes, self.vocabulary)
        return {"psnr": psnr(again, batch.image), "codes": counts}

    @property
    def vocabulary(self) -> int:
        """K."""
        return self.network.spec.vocabulary

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """`usage` and `perplexity` of the codebook over all images, and `counts_per_code`, how much they rest on."""
        return codebook_use(total["codes"]) | {"counts_per_code": total["codes"].mean()}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture and what its codes give back."""
        return pairs(batch.image[:16], reconstruct(self.network, batch.image[:16]))


class Codebook:
    """The codebook of one stage.

    kmeans: at this share of the steps the codes become k-means centres of latents; without it they stay as built.
    restart_every: after so many steps, codes that no latent of these steps was nearest to become latents drawn from the
    step of all ranks, 0 is never. codebook_weight: of the codebook's term in the loss, where gradients train it; a
    codebook with ema_decay follows the means of its latents instead.
    """

    knobs: ClassVar = {
        "commitment_weight": Knob(),
        "codebook_weight": Knob(),
        "kmeans": Knob(high=1, anew=True),
        "restart_every": Knob(whole=True),
    }

    def __init__(self, quantizer: VectorQuantizer, config: Stage, seed: int) -> None:
        self.quantizer, self.seed = quantizer, seed
        self.moves = quantizer.ema_decay is not None
        if self.moves and config.number("codebook_weight", 0):
            raise ValueError(
                "a codebook with ema_decay follows its latents without a gradient; leave out "
                "stages.tokenizer.objective.codebook_weight, or ema_decay"
            )
        self.weight = config.number("codebook_weight", 0 if self.moves else 1)
        self.commitment_weight = config.number("commitment_weight", 0.25)
        self.restart_step = round(config.number("kmeans", 0) * config.steps) if "kmeans" in config.objective else None
        self.every, self.until = int(config.number("restart_every", 0)), round((1 - _LAST) * config.steps)
        if self.every:  # a buffer, so that it outlives a stop
            codebook = quantizer.embedding.weight
            quantizer.register_buffer("met", torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device))

    @staticmethod
    def coupled(part: dict[str, Any], config: Stage) -> str:
        """Where the codebook is changed by what all latents of a step are."""
        if part.get("ema_decay") is not None:
            return "its codebook follows the latents of a step"
        return "its codes begin anew among the latents of a step" if config.number("restart_every", 0) else ""

    def regular(self, out: dict[str, Tensor]) -> Tensor:
        """The codebook's and the encoder's term of each image, weighted, (B,); see `objectives.vqvae`."""
        codebook, commitment = quantization(out["latents"], out["codewords"])
        return self.weight * codebook + self.commitment_weight * commitment

    @torch.no_grad()
    def follow(self, out: dict[str, Tensor], batch: Batch, step: int) -> None:
        """What happens to the codebook once the step is taken; equal on all ranks. out: of the tokenizer."""
        if not self.moves and not self.every:
            return
        counts, sums = self.quantizer.statistics(out["latents"], out["codes"], batch.weight)
        counts = reduce(counts, "sum")
        if self.moves:
            self.quantizer.update(counts, reduce(sums, "sum"))
        if self.every and step < self.until:
            met: Any = self.quantizer.met
            met += counts > 0
            if (step + 1) % self.every == 0:
                self.quantizer.restart(met == 0, self._candidates(out, batch, step, int((met == 0).sum())))
                met.zero_()

    def _candidates(self, out: dict[str, Tensor], batch: Batch, step: int, count: int) -> Tensor:
        """At most so many latents (M, D) of the readable images of all ranks, drawn without repetition.

        In proportion to their squared distance from their codes, as k-means++ draws: most latents of a flat background
        are equal, and codes at one place are one code. The first to come of exponential draws at these rates.
        """
        grid = tuple(out["codes"].shape[1:])
        rate = (out["latents"] - out["codewords"]).square().sum(dim=1) * (batch.weight > 0)[:, None, None]  # (B, h, w)
        arrival = -torch.log(random.uniform(self.seed, step, batch.samples, grid, "codebook restart")) / rate
        arrival, latents = gather((arrival.flatten(), as_vectors(out["latents"]).contiguous()))
        return latents[arrival.argsort(stable=True)[: min(count, int(arrival.isfinite().sum()))]]

    def start(self, images: Iterable[Tensor], network: Any) -> None:
        """See kmeans; images: batches of (B, 3, H, W)."""
        network.start_codes(images, self.seed)
        if self.every:
            self.quantizer.met.zero_()  # what was met is of other codes

    def finish(self) -> None:
        """Takes out of the codebook what only training needs."""
        if self.every:
            del self.quantizer.met
