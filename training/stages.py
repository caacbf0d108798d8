"""The stages: what each trains, against what, and with which losses.

A stage is a plain object with `network` (trained), `forward` (its wrapped form, set by the loop), `depends` (what
must be trained before), `knobs` (the keys its objective takes), `coupled` (its loss compares samples of a batch),
`updates(batch, step)` and `preview(batch, path)`. Every draw comes from `kartina.layers.random`, keyed by the run's
seed, the step and the sample's global position.

B batch, H x W image, h x w grid of codes, K codebook, T caption tokens.

It does not know optimizers, devices or checkpoints.
"""

from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import random
from ..pipeline import checkpoint
from ..pipeline.images import grid, save_png, to_pil
from ..pipeline.recipe import Recipe, build
from ..tokenizers.captions import CaptionTokenizer
from .objectives import clip as clip_objective
from .objectives import dalle as dalle_objective
from .objectives import dvae as dvae_objective
from .run import Stage
from .stream import Batch, Source

Update = tuple[str, tuple[Tensor, Tensor], dict[str, Tensor]]


class TokenizerStage:
    """Fits the dVAE (arXiv:2102.12092, section 2.1): Gumbel-softmax relaxation, logit-Laplace likelihood, KL."""

    part = "tokenizer"
    coupled = False
    depends: tuple[str, ...] = ()
    knobs = frozenset({"temperature_steps", "kl_steps", "kl_weight"})

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.network: nn.Module = build(recipe, self.part).to(device)
        self.forward: Callable[..., Any] = self.network
        self.config, self.source, self.seed = config, source, seed

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        spec, knobs, steps = self.network.spec, self.config.objective, self.config.steps
        noise = random.gumbel(self.seed, step, batch.samples, (spec.vocabulary, *spec.shape), "dvae gumbel")
        temperature = dvae_objective.temperature(step, steps=int(knobs.get("temperature_steps", 0.75 * steps)))
        beta = dvae_objective.kl_weight(
            step, end=knobs.get("kl_weight", 6.6), steps=int(knobs.get("kl_steps", 0.1 * steps))
        )
        out = self.forward(batch.image, noise, temperature)
        loss, scalars = dvae_objective.dvae(out["parameters"], out["logits"], batch.image, beta, batch.weight)
        yield self.part, loss, scalars

    @torch.no_grad()
    def preview(self, batch: Batch, path: Path) -> None:
        image = batch.image[:16]
        both = torch.stack([image, self.network.decode(self.network.encode(image))], 1).flatten(0, 1)  # (2B, 3, H, W)
        _save(both, path)


class PriorStage:
    """Fits the DALL-E transformer on (caption, codes), with captions dropped for guidance (section 2.2)."""

    part = "prior"
    coupled = False
    depends = ("tokenizer", "captions")
    knobs = frozenset({"caption_drop"})

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.tokenizer = checkpoint.load_part(model, recipe, "tokenizer", device)
        self.captions = CaptionTokenizer.load(model / "captions.json")
        self.network: nn.Module = build(recipe, self.part).to(device)
        self.forward: Callable[..., Any] = self.network
        self.config, self.source, self.seed = config, source, seed

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        with torch.no_grad():
            codes = self.tokenizer.encode(batch.image).flatten(1)  # (B, h*w)
        text = self.captions.encode(batch.captions)[0].to(codes.device)  # (B, T)
        drop = random.uniform(self.seed, step, batch.samples, (1,), "caption drop")
        text = torch.where(
            drop < self.config.objective.get("caption_drop", 0.1), self.network.null_text(len(text)), text
        )
        text_logits, image_logits = self.forward(text, codes)
        loss, scalars = dalle_objective.dalle(text_logits, image_logits, text, codes, batch.weight)
        yield self.part, loss, scalars

    @torch.no_grad()
    def preview(self, batch: Batch, path: Path) -> None:
        from ..priors.samplers import sample_codes

        captions = batch.captions[:8]
        text = self.captions.encode(captions)[0].to(batch.image.device)
        was_training = self.network.training
        codes = sample_codes(self.network.eval(), text, list(range(len(captions))))
        self.network.train(was_training)
        _save(self.tokenizer.decode(codes), path, captions)


class CLIPStage:
    """Fits CLIP (arXiv:2103.00020); captions of equal meaning are no negatives."""

    part = "clip"
    coupled = True
    depends = ("captions",)
    knobs: frozenset[str] = frozenset()

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.captions = CaptionTokenizer.load(model / "captions.json")
        self.network: nn.Module = build(recipe, self.part).to(device)
        self.forward: Callable[..., Any] = self.network
        self.config, self.source, self.seed = config, source, seed

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        clip_objective.clamp_logit_scale(self.network.logit_scale)
        text = self.network.with_end(*self.captions.encode(batch.captions)).to(batch.image.device)
        image_features, text_features, scale = self.forward(batch.image, text)
        known: dict[Hashable, int] = {}
        meanings = [self.source.meaning(caption) for caption in batch.captions]
        groups = torch.tensor([known.setdefault(m, len(known)) for m in meanings], device=text.device)
        loss, scalars = clip_objective.clip(image_features, text_features, scale, groups, None, batch.weight)
        yield self.part, loss, scalars

    def preview(self, batch: Batch, path: Path) -> None:
        """CLIP draws nothing."""


STAGES: dict[str, Any] = {stage.part: stage for stage in (TokenizerStage, PriorStage, CLIPStage)}


def _save(images: Tensor, path: Path, captions: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = to_pil(images)
    scale = max(1, 128 // pictures[0].width)
    save_png(grid(pictures, columns=8, captions=captions, scale=scale), path, {})
