"""The stage of the DALL-E transformer.

B batch, h x w grid of codes, T caption tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ...layers import random
from ...pipeline import checkpoint
from ...pipeline.recipe import Recipe, build
from ...tokenizers.captions import CaptionTokenizer
from ..objectives import dalle as dalle_objective
from ..run import Stage
from ..stream import Batch, Source
from .contract import Knob, Updates, contact_sheet


class DALLEStage:
    """Fits the DALL-E transformer on (caption, codes), with captions dropped for guidance (section 2.2)."""

    part = "prior"
    metrics = ("nats_per_code",)
    higher_is_better = False
    depends: tuple[str, ...] = ("tokenizer", "captions")
    beside: tuple[str, ...] = ()
    restart_step: int | None = None
    knobs: ClassVar = {"caption_drop": Knob(high=1)}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.tokenizer = checkpoint.load_part(model, recipe, "tokenizer", device)
        self.captions = CaptionTokenizer.load(model / "captions.json")
        self.network: Any = build(recipe, self.part).to(device)
        self.networks: dict[str, nn.Module] = {self.part: self.network}
        self.forward: dict[str, Callable[..., Any]] = dict(self.networks)
        self.config, self.source, self.seed = config, source, seed

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Never."""
        return ""

    def updates(self, batch: Batch, step: int) -> Updates:
        text, codes = self._read(batch)
        drop = random.uniform(self.seed, step, batch.samples, (1,), "caption drop")
        text = torch.where(drop < self.config.number("caption_drop", 0.1), self.network.null_text(len(text)), text)
        text_logits, image_logits = self.forward[self.part](text, codes)
        loss, scalars = dalle_objective.dalle(text_logits, image_logits, text, codes, batch.weight)
        yield self.part, loss, scalars

    @torch.no_grad()
    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Caption tokens (B, T) and image codes (B, h*w)."""
        codes = self.tokenizer.encode(batch.image).flatten(1)
        return self.captions.encode(batch.captions)[0].to(codes.device), codes

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`nats_per_code`: the negative log-likelihood of the image's codes, given the caption."""
        text, codes = self._read(batch)
        return {"nats_per_code": dalle_objective.nats(self.network(text, codes)[1], codes)}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """What is painted for the captions."""
        from ...priors.samplers import sample_codes

        captions = batch.captions[:8]
        text = self.captions.encode(captions)[0].to(batch.image.device)
        was_training = self.network.training
        codes = sample_codes(self.network.eval(), text, list(range(len(captions))))
        self.network.train(was_training)
        return contact_sheet(self.tokenizer.decode(codes), captions)

    def restart(self) -> None:
        """It never does."""

    def finish(self) -> None:
        """Nothing is measured."""
