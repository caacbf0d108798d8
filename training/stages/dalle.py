"""The stage of the DALL-E transformer.

B batch, h x w grid of codes, T caption tokens.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from ...layers import random
from ...pipeline import checkpoint
from ...pipeline.drawing import CodeDrawing, codes_problem
from ...pipeline.recipe import Recipe, build, sampling_knobs
from ...tokenizers.captions import CaptionTokenizer
from ..objectives import dalle as dalle_objective
from ..run import Stage
from ..stream import Batch, Source
from .contract import (
    SPLIT_WORDS,
    Knob,
    Loss,
    TrainingStage,
    Updates,
    captions_of,
    contact_sheet,
    evaluating,
    read_captions,
)


class DALLEStage(TrainingStage):
    """Fits the DALL-E transformer on (caption, codes) (section 2.2).

    caption_drop: the share of samples that are shown no caption, for guidance. bpe_dropout, bpe_dropout_start: as
    in `CLIPStage`.
    """

    part = "prior"
    metrics = ("nats_per_code", "caption_gain")
    higher_is_better = False
    fewest = 2
    steady = True
    depends: tuple[str, ...] = ("tokenizer", "captions")
    cached: tuple[str, ...] = ("codes",)
    knobs: ClassVar = {"caption_drop": Knob(high=1), **SPLIT_WORDS}

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.tokenizer = checkpoint.load_part(model, recipe, "tokenizer", device)
        self.captions = CaptionTokenizer.load(model / "captions.json")
        self.hold(build(recipe, self.part))
        checkpoint.check_captions(model, recipe, self.part, self.network)
        self.recipe, self.config, self.source, self.seed = recipe, config, source, seed

    @staticmethod
    def problem(recipe: Recipe, parts: dict[str, Any], config: Stage, model: Path) -> str:
        """Another grid or codebook than the tokenizer's."""
        found = codes_problem(parts["prior"], parts["tokenizer"].spec)
        return found and f"{found}; correct parts.prior.grid and num_codes"

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        text, codes = self._read(batch, step)
        drop = random.uniform(self.seed, step, batch.samples, (1,), "caption drop")
        text = torch.where(drop < self.config.number("caption_drop", 0.1), self.network.null_text(len(text)), text)
        text_logits, image_logits = self.forward[self.part](text, codes)
        loss, scalars = dalle_objective.dalle(text_logits, image_logits, text, codes, batch.weight)
        return loss, scalars | {"image_chance": torch.tensor(math.log(image_logits.shape[-1]))}

    @torch.no_grad()
    def _read(self, batch: Batch, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Caption tokens (B, T) and image codes (B, h*w). step: of training, for its draws."""
        codes = batch.encoded["codes"] if batch.encoded else self.tokenizer.encode(batch.image)
        text, _ = read_captions(self.captions, captions_of(batch), self.config, self.seed, step, batch.samples)
        return text.to(codes.device), codes.flatten(1)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`nats_per_code`: the negative log-likelihood of the image's codes, given the caption.

        `caption_gain`: by how much the caption of the sample half a batch on is worse, near 0 where none is heard.
        """
        text, codes = self._read(batch)
        own, other = (
            dalle_objective.nats(self.network(given, codes)[1], codes) for given in (text, text.roll(len(text) // 2, 0))
        )
        return {"nats_per_code": own, "caption_gain": other - own}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """What is painted for the captions, as users paint."""
        captions = batch.captions[:8]
        knobs = sampling_knobs(self.recipe, {}, "sampling")
        draw = CodeDrawing(self.recipe, {"prior": self.network, "tokenizer": self.tokenizer}, self.captions)
        with evaluating(self.network):
            codes = draw(captions, range(len(captions)), knobs, None)
        return contact_sheet(self.tokenizer.decode(codes), captions)
