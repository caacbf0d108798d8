"""The stage of a diffusion prior: of pixels where the recipe has no tokenizer, else of a frozen tokenizer's latents.

B images, C channels on h x w positions: 3 of pixels, or those of the latents.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ...layers import random
from ...layers.precision import full
from ...pipeline import checkpoint
from ...pipeline.denoising import denoiser_of
from ...pipeline.drawing import DiffusionDrawing
from ...pipeline.recipe import Recipe, RecipeError, build, is_frozen, is_pretrained, sampling_knobs
from ...priors.caption_encoder import Captioned
from ...priors.condition import Condition
from ...priors.denoiser import Denoise
from ...tokenizers.captions import CaptionTokenizer
from ..objectives import diffusion as objective
from ..parallel import is_sharded
from ..run import Stage
from ..stream import Batch, Source
from .contract import (
    ONE_WORDING,
    SPLIT_WORDS,
    Knob,
    Loss,
    TrainingStage,
    Updates,
    captions_of,
    contact_sheet,
    evaluating,
    falling_share,
    in_one_wording,
    read_captions,
)
from .diffusion_fit import error_weights, problem

_LOOKS = 4  # timesteps that each sample is validated at
_HEARD = 2  # the look at which captions tell most: what is where is decided in the noisier half, and not at its end
_PREVIEW_STEPS = 50


class DiffusionStage(TrainingStage):
    """Fits a network that denoises (arXiv:2006.11239, algorithm 1), with conditions dropped for guidance.

    A recipe's text encoder trains along, as one network with it (arXiv:2112.10752, section 4.3.1), unless it is frozen.

    target: in which terms the error is taken, by default what the network predicts. weighting, gamma: see
    `objectives.diffusion.snr_weight`. bound_weight: of the variational bound in bits per dimension, where variances are
    learned. loss: "simple", or of pixels "vlb", that bound alone, by which the mean learns too. logit_std, logit_mean:
    timesteps are drawn by the logit-normal of these, see `objectives.diffusion.logit_normal`; up to the share `uniform`
    of the steps all of them uniformly instead, from there to the share `uniform_end` fewer and fewer, and
    `uniform_least` of them to the end. Only in nearly pure noise do captions alone tell what is where; once that is
    learned, the rest needs more samples, but that its ends too.
    condition_drop: the share of samples that are shown the null condition. canonical, canonical_end, bpe_dropout,
    bpe_dropout_start: as in `CLIPStage`, where captions are read.
    """

    part = "prior"
    higher_is_better = False
    fewest, steady = 2, True  # one has no sample before it
    depends: tuple[str, ...] = ("tokenizer", "captions", "text")
    beside: tuple[str, ...] = ("text",)
    joined = True
    cached: tuple[str, ...] = ("latents", "text_tokens")
    knobs: ClassVar = {
        "loss": Knob(choices=("simple", "vlb")),
        "target": Knob(choices=("eps", "x_0", "v")),
        "weighting": Knob(choices=objective.WEIGHTINGS),
        "gamma": Knob(of="weighting"),
        "bound_weight": Knob(),
        "logit_std": Knob(),
        "logit_mean": Knob(low=-math.inf, of="logit_std"),
        "uniform": Knob(high=1, phase=True, of="logit_std"),
        "uniform_end": Knob(high=1, phase=True, of="logit_std"),
        "uniform_least": Knob(high=1, of="logit_std"),
        "condition_drop": Knob(high=1),
        **SPLIT_WORDS,
        **ONE_WORDING,
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        encodes = "tokenizer" in recipe.parts
        self.tokenizer: Any = checkpoint.load_part(model, recipe, "tokenizer", device) if encodes else None
        if self.tokenizer is not None and not self.tokenizer.scale.measured:
            raise RecipeError(
                f"{recipe.name}: the scale of the tokenizer's latents was not measured; train its stage to the end, or "
                "of an imported one measure it: kartina scale SHARDS --model FOLDER"
            )
        self.prior = build(recipe, self.part)
        self.text: Any = None
        if "text" in recipe.parts:
            self.text = _text(recipe, model, device)
            own = getattr(self.text, "captions", None)
            self.captions = own or CaptionTokenizer.load(model / "captions.json")
        self.along = self.text is not None and not is_frozen(recipe, "text")
        if config.number("bpe_dropout", 0):
            if not self.captions.padded:
                raise RecipeError(f"{recipe.name}: bpe_dropout cannot split words of CLIP's captions; leave it out")
            self.cached = self.cached[:1]  # for captions are read anew at each step
        self.hold(Captioned(self.prior, self.text) if self.along else self.prior)
        self.recipe, self.config, self.source, self.seed = recipe, config, source, seed
        self.schedule = self._denoiser().schedule
        self.metrics: tuple[str, ...] = ("error",) if self.tokenizer else ("error", "bits_per_dim")
        self.metrics += ("caption_gain",) if self.text else ()

    @classmethod
    def needs(cls, recipe: Recipe) -> tuple[str, ...]:
        """A tokenizer where the recipe has one, captions where it reads them, and a text encoder that is frozen."""
        read = {
            "tokenizer": "tokenizer" in recipe.parts,
            "captions": "text" in recipe.parts and not is_pretrained(recipe, "text"),
            "text": "text" in recipe.parts and is_frozen(recipe, "text"),
        }
        return tuple(name for name in cls.depends if read[name])

    @staticmethod
    def problem(recipe: Recipe, parts: dict[str, Any], config: Stage, model: Path) -> str:
        """Noise that cannot be, a weight that has no end, or a prior that does not fit what it denoises or reads."""
        return problem(recipe, parts, config)

    def exported(self) -> dict[str, nn.Module]:
        """The text encoder too, where it trained along."""
        return ({"text": self.text} if self.along else {}) | {self.part: self.prior}

    def _denoiser(self, draws: random.Draws | None = None) -> Denoise:
        """The network that trains, dropping out by `draws`; without them the network as it is."""
        if draws is None:
            return denoiser_of(self.recipe, self.network)
        return denoiser_of(self.recipe, lambda x_t, t, condition: self.forward[self.part](x_t, t, condition, draws))

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        config, total, unread = self.config, self.schedule.num_timesteps, batch.weight == 0
        x_0 = self._read(batch).masked_fill(unread[:, None, None, None], 0.0)
        draws = random.Draws(self.seed, step, batch.samples)
        # One from each of as many parts as the step has samples (Kingma 2021, arXiv:2107.00630, appendix I.1).
        place = batch.samples % config.global_batch + random.uniform(*draws, (), "timestep")
        place = place / config.global_batch
        if std := config.number("logit_std", 0):
            least, drawn = config.number("uniform_least", 0), random.uniform(*draws, (), "uniform timestep")
            uniform = drawn < least + (1 - least) * falling_share(config, "uniform", step)
            place = torch.where(uniform, place, objective.logit_normal(place, std, config.number("logit_mean", 0)))
        t = (place * total).long().clamp(max=total - 1)
        eps = random.normal(*draws, tuple(x_0.shape[1:]), "noise")
        drop = random.uniform(*draws, (), "condition drop") < config.number("condition_drop", 0.1)
        condition = self._dropped(self._condition(batch, step), drop | unread)  # alike from pictures and from a cache
        x_t = self.schedule.diffuse(x_0, t, eps)
        found = self._denoiser(draws)(x_t, t, condition)
        share = found.variance_share
        vlb = config.word("loss", "simple") == "vlb"
        bounded = vlb or share is not None
        bound = total * self._bits(x_0, found.x_0 if vlb else found.x_0.detach(), share, t) if bounded else None
        return objective.diffusion(
            found, x_0, eps, *self.schedule.at(t, x_0), batch.weight,
            **error_weights(self.recipe, config), bound=bound,
            bound_weight=1.0 if vlb else config.number("bound_weight", 0.001), simple=not vlb,
        )  # fmt: skip

    @torch.no_grad()
    def _read(self, batch: Batch) -> Tensor:
        """Pixels or latents, (B, C, h, w)."""
        if batch.encoded:
            return self.tokenizer.scale(batch.encoded["latents"][:, 0])  # the posterior's mean, as `encode` gives it
        return batch.image if self.tokenizer is None else self.tokenizer.encode(batch.image)

    def _condition(self, batch: Batch, step: int | None = None) -> Any:
        """What the network is conditioned on: framed captions, int64 (B, T), of an encoder that trains along, what a
        frozen one makes of them, or classes, or nothing. step: of training, in which captions may be read otherwise.
        """
        if "text_tokens" in batch.encoded:
            tokens = batch.encoded["text_tokens"]
            mask = (tokens != 0).any(dim=2)
            mask[:, 0] = True  # of a sample that could not be read too
            return Condition(tokens=tokens, mask=mask)
        if self.text is not None:
            drawn = self.config, self.seed, step, batch.samples
            captions = in_one_wording(self.source, captions_of(batch), *drawn)
            text = self.text.frame(*read_captions(self.captions, captions, *drawn)).to(batch.image.device)
            return text if self.along else self._encoded(text)
        if self.prior.num_classes is None:
            return Condition()
        return Condition(labels=batch.labels)

    def _dropped(self, condition: Any, drop: Tensor) -> Any:
        """The same with the null one in the place of samples where `drop`, bool (B,)."""
        if self.along:
            return torch.where(drop[:, None], self.text.null_text(len(drop)), condition)
        null = Condition() if self.text is None else self._encoded(self.text.null_text(1))
        tokens, mask = (None if each is None else each.expand(len(drop), *each.shape[1:]) for each in null[1:3])
        return condition.dropped(drop, self.prior.null_condition(len(drop), tokens, mask))

    @torch.no_grad()
    def _encoded(self, text: Tensor) -> Condition:
        """What a frozen encoder makes of framed captions, int64 (B, T)."""
        tokens, mask = self.text(text)
        return Condition(tokens=tokens, mask=mask)

    def _bits(self, x_0: Tensor, guess: Tensor, share: Tensor | None, t: Tensor) -> Tensor:
        """The term of the bound at t, in bits per dimension, (B,); variances that are not learned are beta_tilde."""
        log_variance = self.schedule.log_variance(t, 0.0 if share is None else share, x_0)
        coefficient, _, variance = self.schedule.posterior_terms(t, x_0)
        nats = objective.step_nats(x_0, guess, log_variance, coefficient, variance)
        return objective.bits_per_dim(nats, x_0)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`error`: the squared error of what the network predicts, at timesteps spread over all; a sample has the same
        ones each time. (That of eps says nothing of a network that predicts x_0: it has no bound where noise ends.)

        `bits_per_dim`, of pixels: the variational bound, from these timesteps, the first one and the prior's term, with
        x_0 clipped. `caption_gain`, where captions are read: by how much that of the sample before makes the error
        worse at one of these timesteps, beside `caption_error`, the error there. `moments`, of latents.
        """
        x_0, total, denoise = self._read(batch), self.schedule.num_timesteps, self._denoiser()
        own, shape = self._condition(batch), tuple(x_0.shape[1:])

        def look(t: Tensor, number: int, condition: Any = own) -> tuple[Tensor, Tensor]:
            eps = random.normal(self.seed, number, batch.samples, shape, "validation noise")
            found = denoise(self.schedule.diffuse(x_0, t, eps), t, condition)
            pixels = self.tokenizer is None
            bits = self._bits(x_0, found.x_0.clamp(-1, 1), found.variance_share, t) if pixels else t.new_zeros(())
            alpha, sigma = self.schedule.at(t, x_0)
            return objective.squared_error(found, x_0, eps, alpha, sigma, self.recipe.diffusion.prediction), bits

        place = random.uniform(self.seed, 0, batch.samples, (_LOOKS,), "validation timestep")
        place = (place + torch.arange(_LOOKS, device=place.device)) / _LOOKS  # one in each part, (B, _LOOKS)
        times = 1 + (place * (total - 1)).long().clamp(max=total - 2)
        errors, bits = zip(*(look(times[:, i], i) for i in range(_LOOKS)), strict=True)
        found = {"error": torch.stack(errors).mean(dim=0)}
        if self.text is not None:
            other = Condition(*map(_before, own)) if isinstance(own, Condition) else _before(own)
            worse, _ = look(times[:, _HEARD], _HEARD, other)
            found |= {"caption_error": errors[_HEARD], "caption_gain": worse - errors[_HEARD]}
        if self.tokenizer is not None:
            values = full(x_0).flatten(1)
            found["moments"] = torch.stack([values.mean(dim=1), values.square().mean(dim=1)], dim=1)
        else:
            _, first = look(torch.zeros_like(times[:, 0]), _LOOKS)
            end = objective.prior_nats(x_0, *self.schedule.at(torch.full_like(times[:, 0], total - 1), x_0))
            between = (total - 1) * torch.stack(bits).mean(dim=0)
            found["bits_per_dim"] = first + between + objective.bits_per_dim(end, x_0)
        return found

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """`latent_std`: the deviation of all latents, as the network reads them."""
        if "moments" not in total:
            return {}
        mean, square = total["moments"] / count
        return {"latent_std": (square - mean.square()).clamp(min=0).sqrt()}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Sixteen samples, of the batch's captions or classes if it reads them, as users paint, in at most 50 steps."""
        if self.along and is_sharded(self.network):
            return None  # divided as one network, of which neither half can be called alone
        captions = batch.captions[:16]
        if self.prior.num_classes is not None and batch.labels is not None:
            captions = [str(label) for label in batch.labels[:16].tolist()]
        knobs = sampling_knobs(self.recipe, {}, "sampling")
        knobs["num_steps"] = min(knobs["num_steps"], _PREVIEW_STEPS, self.schedule.num_timesteps)
        parts = {"prior": self.prior, "text": self.text, "tokenizer": self.tokenizer}
        draw = DiffusionDrawing(self.recipe, parts, getattr(self, "captions", None))
        with evaluating(self.network):
            z = draw(captions, range(len(captions)), knobs, None)
        images = z if self.tokenizer is None else self.tokenizer.decode(z).float()
        return contact_sheet(images, captions if self.text is not None else None)


def _before(each: Tensor | None) -> Tensor | None:
    """What the sample before has, in the place of each (B, ...); the first one has the last one's."""
    return None if each is None else each.roll(1, 0)


def _text(recipe: Recipe, model: Path, device: torch.device) -> Any:
    """The recipe's text encoder: fresh, or the trained one where it is frozen."""
    if is_frozen(recipe, "text"):
        return checkpoint.load_part(model, recipe, "text", device)
    text = build(recipe, "text")
    checkpoint.check_captions(model, recipe, "text", text)
    return text
