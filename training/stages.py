"""The stages: what each trains, against what, and with which losses.

A stage is a plain object with `network` (trained), `forward` (its wrapped form, set by the loop), `depends` (what
must be trained before), `knobs` (the keys its objective takes), `coupled` (its loss compares the samples of a step, so
that it gathers them over ranks and cannot be split in passes),
`updates(batch, step)`, `measure(batch)` (values (B,) by name), `metrics` (those names), `preview(batch, path)`, and
`restart_step` (None, or the step at which `restart()` changes the weights and the optimizers begin anew). Every draw
comes from `kartina.layers.random`, keyed by the run's seed, the step and the sample's global position.

B batch, H x W image, h x w grid of codes, K codebook, T caption tokens.

It does not know optimizers or checkpoints, and of other devices only where a loss compares their samples.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
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
    """Fits the dVAE (arXiv:2102.12092, section 2.1): Gumbel-softmax relaxation, logit-Laplace likelihood, KL.

    In the first share `autoencoder` of its steps it trains as a plain autoencoder, whose k-means centres then become
    the codes; where the codes are patches, k-means comes first. From random codes, small runs keep few of them.
    """

    part = "tokenizer"
    metrics = ("psnr",)
    coupled = False
    depends: tuple[str, ...] = ()
    knobs = frozenset(
        {"autoencoder", "temperature", "temperature_end", "temperature_share", "kl_weight", "kl_share", "squared"}
    )

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.network: nn.Module = build(recipe, self.part).to(device)
        self.forward: Callable[..., Any] = self.network
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
        images = (self.source.read(chunk).image.to(self.device) for chunk in chunks)
        self.network.start_codes(images, self.seed)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        spec, noise, age = self.network.spec, None, step - self.start
        if age >= 0:
            noise = random.gumbel(self.seed, step, batch.samples, (*spec.shape, spec.vocabulary), "dvae gumbel")
            noise = noise.permute(0, 3, 1, 2)  # (B, K, h, w), laid out as the logits are
        beta = dvae_objective.kl_weight(age, **self.kl_weight) if age >= 0 else 0.0
        out = self.forward(batch.image, noise, dvae_objective.temperature(age, **self.temperature))
        squared = self.config.objective.get("squared", 0.0)
        loss, scalars = dvae_objective.dvae(out["parameters"], out["logits"], batch.image, beta, batch.weight, squared)
        yield self.part, loss, scalars

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`psnr`: dB of the pictures that the codes give back, in the range of the pixels."""
        again = self.network.decode(self.network.encode(batch.image)).float().clamp(-1, 1)
        return {"psnr": -10 * torch.log10((again - batch.image).square().mean(dim=(1, 2, 3)) / 4)}

    @torch.no_grad()
    def preview(self, batch: Batch, path: Path) -> None:
        image = batch.image[:16]
        both = torch.stack([image, self.network.decode(self.network.encode(image))], 1).flatten(0, 1)  # (2B, 3, H, W)
        _save(both, path)


class PriorStage:
    """Fits the DALL-E transformer on (caption, codes), with captions dropped for guidance (section 2.2)."""

    part = "prior"
    metrics = ("nats_per_code",)
    coupled = False
    depends = ("tokenizer", "captions")
    restart_step = None
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
        text, codes = self._read(batch)
        drop = random.uniform(self.seed, step, batch.samples, (1,), "caption drop")
        text = torch.where(
            drop < self.config.objective.get("caption_drop", 0.1), self.network.null_text(len(text)), text
        )
        text_logits, image_logits = self.forward(text, codes)
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
    def preview(self, batch: Batch, path: Path) -> None:
        from ..priors.samplers import sample_codes

        captions = batch.captions[:8]
        text = self.captions.encode(captions)[0].to(batch.image.device)
        was_training = self.network.training
        codes = sample_codes(self.network.eval(), text, list(range(len(captions))))
        self.network.train(was_training)
        _save(self.tokenizer.decode(codes), path, captions)


class CLIPStage:
    """Fits CLIP (arXiv:2103.00020); captions of equal meaning are no negatives.

    In the first share `canonical` of its steps every caption is read in the one wording of its meaning, beside its
    first wrong caption only; from there to the share `canonical_end` fewer and fewer are. With "A above B" and "B below
    A" equally often from the start, neither the order of the words nor the relation alone tells where A is, and both
    towers stay blind to it for long; with one wording the order alone tells, and the other wording is an exception.
    """

    part = "clip"
    metrics = ("accuracy",)
    coupled = True
    depends = ("captions",)
    restart_step = None
    knobs = frozenset({"wrong_captions", "canonical", "canonical_end"})

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.captions = CaptionTokenizer.load(model / "captions.json")
        self.network: nn.Module = build(recipe, self.part).to(device)
        self.forward: Callable[..., Any] = self.network
        self.config, self.source, self.seed = config, source, seed

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        clip_objective.clamp_logit_scale(self.network.logit_scale)
        image_features, text_features, scale, wrong = self._features(self.forward, batch, step)
        meanings = [_number(self.source.meaning(caption)) for caption in batch.captions]
        groups = torch.tensor(meanings, device=batch.image.device)
        groups, weight = gather((groups, batch.weight))
        image_features, text_features = _gather(image_features), _gather(text_features)
        wrong = None if wrong is None else _gather(wrong)
        loss, scalars = clip_objective.clip(image_features, text_features, scale, groups, wrong, weight)
        yield self.part, loss, scalars

    def _features(
        self, towers: Callable[..., Any], batch: Batch, step: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features of images (B, D) and captions (B, D), the scale, features of wrong captions (B, W, D) or None.

        step: of training, for the share of canonical wordings; None reads all captions as they are.
        """
        share = 0.0 if step is None else self._canonical_share(step)
        wanted = int(self.config.objective.get("wrong_captions", 0))
        wanted = min(wanted, 1) if share == 1 else wanted
        count, captions = len(batch.captions), [*batch.captions, *self._wrong(batch, wanted)]
        if share and step is not None:
            drawn = (random.uniform(self.seed, step, batch.samples, (1,), "canonical wording")[:, 0] < share).tolist()
            rewrite = drawn + [draw for draw in drawn for _ in range(wanted)]
            captions = [self.source.canonical(c) if r else c for c, r in zip(captions, rewrite, strict=True)]
        tokens, lengths = self.captions.encode(captions)
        text = self.network.with_end(tokens, lengths)[:, : int(lengths.max()) + 1]  # what follows the end is not read
        image_features, text_features, scale = towers(batch.image, text.to(batch.image.device))
        own, wrong = text_features[:count], text_features[count:]
        return image_features, own, scale, wrong.view(count, -1, own.shape[1]) if len(wrong) else None

    def _canonical_share(self, step: int) -> float:
        """1 at first, then falling in a line to 0."""
        knobs, steps = self.config.objective, self.config.steps
        start = knobs.get("canonical", 0) * steps
        end = max(start, knobs.get("canonical_end", 0) * steps)
        return 1.0 if step < start else max(0.0, (end - step) / max(1.0, end - start))

    def _wrong(self, batch: Batch, wanted: int) -> list[str]:
        """As many minimal wrong captions of each sample as wanted, one sample after the other."""
        if not wanted:
            return []
        found = self.source.wrong(batch.captions, batch.samples.tolist())
        return [wrong[i % len(wrong)] for wrong in found for i in range(wanted)]

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`accuracy`: how often an image's caption beats those of the batch that mean another thing, and wrong ones."""
        image_features, text_features, _, wrong = self._features(self.network, batch)
        similarity = image_features.float() @ text_features.float().T  # (B, B)
        right = similarity.diagonal().clone()
        meanings = [self.source.meaning(caption) for caption in batch.captions]
        same = torch.tensor([[a == b for b in meanings] for a in meanings], device=right.device)
        best = similarity.masked_fill(same, -1.0).amax(dim=1)
        if wrong is not None:
            best = best.maximum(torch.einsum("bd,bwd->bw", image_features.float(), wrong.float()).amax(dim=1))
        return {"accuracy": (right > best).float()}

    def preview(self, batch: Batch, path: Path) -> None:
        """CLIP draws nothing."""


def _number(meaning: Hashable) -> int:
    """A number of 64 bits that is equal on all ranks for equal meanings."""
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _gather(local: Tensor) -> Tensor:
    """Rows of all ranks, in order of rank, for a loss that every rank computes whole.

    Gradients reach the own rows only, times the number of ranks: the sum of what all ranks would send back.
    """
    fixed, here = local.detach(), PartialState()
    rows = list(gather(fixed).chunk(here.num_processes))
    rows[here.process_index] = fixed + here.num_processes * (local - fixed)
    return torch.cat(rows)


STAGES: dict[str, Any] = {stage.part: stage for stage in (TokenizerStage, PriorStage, CLIPStage)}


def _save(images: Tensor, path: Path, captions: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = to_pil(images)
    scale = max(1, 128 // pictures[0].width)
    save_png(grid(pictures, columns=8, captions=captions, scale=scale), path, {})
