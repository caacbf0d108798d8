"""From captions to what the tokenizer decodes: how each kind of prior is sampled.

    DALL-E:     captions -> text tokens -> codes, one after another
    diffusion:  captions -> text tokens -> tokens of the text encoder -> a sampler over `denoise` -> latents, or pixels

B pictures of a micro-batch, T text tokens, h x w grid of codes or latents, C channels of latents, H x W pixels.

It does not know how parts are loaded, ranked or trained.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..priors.code_samplers import sample_codes
from ..priors.condition import Condition
from ..priors.denoiser import Clipped, Denoise, Guided
from ..priors.diffusers_schedulers import check_signal, find_sampler
from ..priors.diffusion_samplers import SAMPLERS, Walk
from ..tokenizers.captions import CaptionTokenizer
from .denoising import denoiser_of, schedule_of
from .memory import Progress
from .recipe import Recipe, RecipeError, sampling_knobs

_LEFT = 0.02  # of the picture's variance at most, in the noisiest timestep; Stable Diffusion leaves 0.0047
_HARDLY = 1e-6  # of latents', at least, where eps is predicted; where pixels are, x_0 is clipped to their range


class Drawing(Protocol):
    """A prior with what it needs to be sampled. `problem` says what of the parts is not of one system, "" if nothing.

    Called with B captions, their seeds, knobs of `pipeline.recipe.SAMPLING`, and what is told of steps done and in all,
    it returns what the tokenizer decodes, or images (B, 3, H, W) where there is none. Raises ValueError for knobs that
    do not fit each other.
    """

    problem: str

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], knobs: dict[str, Any], progress: Progress | None
    ) -> Tensor: ...


def codes_problem(prior: Any, spec: Any) -> str:
    """Why a prior over codes and the tokenizer of this spec, or None, are not of one system, "" where they are."""
    if spec is None:
        return "the prior draws codes, and there is no tokenizer to read them"
    drawn, read = (tuple(prior.grid), prior.num_codes), (tuple(spec.shape), getattr(spec, "vocabulary", 0))
    return "" if drawn == read else f"the prior draws (grid, codes) {drawn}, the tokenizer reads {read}"


class CodeDrawing:
    """DALL-E's: codes int64 (B, h, w)."""

    def __init__(self, recipe: Recipe, parts: dict[str, Any], captions: CaptionTokenizer | None) -> None:
        assert captions is not None
        self.prior, self.encode = parts["prior"], captions.encode
        spec = parts["tokenizer"].spec if "tokenizer" in parts else None
        self.problem = codes_problem(self.prior, spec)

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], knobs: dict[str, Any], progress: Progress | None
    ) -> Tensor:
        """See `Drawing` and `sample_codes`."""
        text = self.encode(captions)[0].to(next(self.prior.parameters()).device)  # (B, T)
        return sample_codes(self.prior, text, seeds, progress=progress, **knobs)


def sampler_of(knobs: dict[str, Any]) -> Callable[..., Tensor]:
    """The sampler of the knobs of `pipeline.recipe.DiffusionSampling`; see `find_sampler`."""
    walk = {name: knobs[name] for name in ("num_steps", "spacing", "eta") if knobs[name] is not None}
    if "eta" in walk and knobs["sampler"] != "ddim":
        raise RecipeError(f"eta belongs to the sampler ddim, got {knobs['sampler']}; leave it out, or take ddim")
    if "spacing" in walk and knobs["sampler"] not in SAMPLERS:
        raise RecipeError(
            f"a spacing belongs to one of {', '.join(SAMPLERS)}, got one for {knobs['sampler']} of diffusers, which "
            "has its own; leave it out"
        )
    return partial(find_sampler(knobs["sampler"]), **walk)


def check_sampling(recipe: Recipe, told: bool) -> None:
    """Raises ValueError for noise that samplers could not begin with, and where a recipe's `sampling` could paint
    nothing. told: whether the prior reads captions or classes.
    """
    schedule, knobs = schedule_of(recipe), sampling_knobs(recipe, {}, "sampling")
    left = float(schedule.alpha_bar[-1])
    if left > _LEFT:
        raise RecipeError(
            f"its noise leaves {left:.0%} of the picture's variance after {schedule.num_timesteps} timesteps, and "
            "samplers begin with noise alone; write in `diffusion` schedule: cosine, or a larger beta_end"
        )
    if left < _HARDLY and recipe.diffusion.prediction == "eps" and "tokenizer" in recipe.parts:
        raise RecipeError(
            f"its noise leaves {left:.1g} of the latents' variance, where eps hardly tells x_0: samplers would begin "
            "with its error, a thousandfold; write in `diffusion` prediction: v, or schedule: scaled_linear"
        )
    sampler_of(knobs)
    try:
        if knobs["sampler"] in SAMPLERS:
            schedule.levels(knobs["num_steps"], knobs["spacing"] or "trailing")
        else:
            check_signal(knobs["sampler"], schedule)
    except ValueError as error:
        raise RecipeError(f"sampling.num_steps {knobs['num_steps']} of {knobs['sampler']}: {error}") from None
    _check_guidance(recipe, knobs, told)


def _check_guidance(recipe: Recipe, knobs: dict[str, Any], told: bool) -> None:
    others = knobs["negative"] or knobs["guidance_rescale"] or knobs["guidance_low"]
    if knobs["guidance_scale"] != 1 and not told:
        raise RecipeError(f"{recipe.name} reads no captions to be guided by; leave guidance_scale at 1")
    if told and not knobs["guidance_scale"]:
        raise RecipeError(
            "a guidance_scale of 0 does not look at the caption; 1 is no guidance, for which others write 0"
        )
    if knobs["guidance_scale"] == 1 and (others or knobs["guidance_high"] is not None):
        raise RecipeError("a negative prompt and the other knobs of guidance need a guidance_scale other than 1")


class DiffusionDrawing:
    """A diffusion prior's: latents (B, C, h, w), or pixels where the recipe has no tokenizer.

    A prior of classes reads their numbers, as "7"; one that reads nothing draws anything, whatever the captions say. A
    negative prompt takes the null caption's place. One that reads 1 + C channels more than it draws `fills`: a mask,
    and the latents of a picture without what is masked, stand beside what it denoises (as in Stable Diffusion's
    inpainting).
    """

    def __init__(self, recipe: Recipe, parts: dict[str, Any], captions: CaptionTokenizer | None) -> None:
        self.recipe, self.prior = recipe, parts["prior"]
        self.text, self.tokenizer = parts.get("text"), parts.get("tokenizer")
        self.captions = getattr(self.text, "captions", captions)  # its own, where it comes with a tokenizer
        side, channels = recipe.image_size, self.prior.in_channels
        self.shape = (3, side, side) if self.tokenizer is None else tuple(self.tokenizer.spec.shape)
        wanted = self.shape[0]
        self.fills = channels == 2 * wanted + 1
        self.problem = (
            ""
            if channels == wanted or self.fills
            else f"the prior draws {channels} channels, the tokenizer reads {wanted}"
        )
        width = getattr(self.text, "width", None)
        if width != self.prior.context_dim:
            self.problem = (
                f"the prior looks at tokens of width {self.prior.context_dim}, its text encoder gives {width}"
            )
        if self.prior.embedding_dim or (self.prior.num_classes and self.prior.context_dim):
            self.problem = "the prior reads classes or embeddings beside captions, which nothing gives it here"

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], knobs: dict[str, Any], progress: Progress | None
    ) -> Tensor:
        """See `Drawing` and `priors.diffusion_samplers`."""
        return self.sample(self.condition(captions), seeds, knobs, progress=progress)

    def sample(self, condition: Condition, seeds: Sequence[int], knobs: dict[str, Any], **walk: Unpack[Walk]) -> Tensor:
        """What is drawn under a condition; walk: what the knobs do not hold, see `Walk`.

        Raises ValueError for knobs that do not fit each other, and where the numbers do not stay finite.
        """
        weight, sampler, denoise = next(self.prior.parameters()), sampler_of(knobs), self.denoiser(condition, knobs)
        numbers = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device=weight.device)
        z = sampler(denoise, condition, self.shape, numbers, **walk)
        if not z.isfinite().all():
            raise ValueError(
                f"{knobs['sampler']} of {knobs['num_steps']} steps must end in finite numbers, got NaN or infinity in "
                f"{str(weight.dtype).removeprefix('torch.')}; take float32, less guidance or another sampler"
            )
        return z.to(weight.dtype)

    def denoiser(self, condition: Condition, knobs: dict[str, Any] | None = None) -> Denoise:
        """The prior as samplers call it, guided under a condition as the knobs say, without them not at all.

        Pixels are clipped last: guidance leads beyond their range what lies within it.
        """
        denoise: Denoise = denoiser_of(self.recipe, self.prior)
        if knobs is not None:
            denoise = self._guided(denoise, condition, knobs)
        return Clipped(denoise) if self.tokenizer is None else denoise

    def _guided(self, denoise: Denoise, condition: Condition, knobs: dict[str, Any]) -> Denoise:
        told = condition.labels if condition.tokens is None else condition.tokens
        _check_guidance(self.recipe, knobs, told is not None)
        scale, rescale, negative = knobs["guidance_scale"], knobs["guidance_rescale"], knobs["negative"]
        low, high = knobs["guidance_low"], knobs["guidance_high"]
        if scale == 1 or told is None:
            return denoise
        batch = len(told)
        null = self.condition([negative] * batch) if negative else self.null(batch)
        null = null._replace(image=condition.image)
        interval = (low, math.inf if high is None else high)
        join = None if self.prior.sliced else Condition.beside  # where memory is spared, one after the other
        return Guided(denoise, null, scale, interval, rescale, join)

    def condition(self, captions: Sequence[str]) -> Condition:
        """What the prior reads of captions or numbers of classes; one that fills has the whole picture to fill."""
        image = self.beside(None, None).expand(len(captions), -1, -1, -1) if self.fills else None
        if self.text is None or self.captions is None:
            null = self.prior.null_condition(len(captions))._replace(image=image)
            return null if null.labels is None else null._replace(labels=self.labels(captions).to(null.labels))
        text = self.text.frame(*self.captions.encode(captions)).to(next(self.text.parameters()).device)  # (B, T)
        tokens, mask = self.text(text)
        return Condition(tokens=tokens, mask=mask, image=image)

    def labels(self, captions: Sequence[str]) -> Tensor:
        """The classes that captions name by number, int64 (B,)."""
        last, words = self.prior.num_classes - 1, [caption.strip() for caption in captions]
        for word in words:
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) > last:
                raise RecipeError(f"{self.recipe.name} paints classes: say a number from 0 to {last}, got {word!r:.40}")
        return torch.tensor([int(word) for word in words])

    def null(self, batch: int) -> Condition:
        """What it reads of no caption, as in training."""
        return self.prior.null_condition(batch, *(self.text(self.text.null_text(batch)) if self.text else ()))

    def encode(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what the prior draws, (B, C, h, w)."""
        image = image.to(next(self.prior.parameters()))
        return image if self.tokenizer is None else self.tokenizer.encode(image)

    def beside(self, image: Tensor | None, mask: Tensor | None) -> Tensor:
        """What a prior that fills reads of an image (B, 3, H, W) and the mask (B, 1, H, W), 1 where it is to be filled:
        (B, 1 + C, h, w). By default all is. What is masked is grey, 0.
        """
        side = self.recipe.image_size
        mask = torch.ones(1, 1, side, side) if mask is None else mask
        seen = self.encode(torch.zeros(1, 3, side, side) if image is None else image * (1 - mask))
        return torch.cat([self.shrink(mask).to(seen), seen], dim=1)

    def shrink(self, mask: Tensor) -> Tensor:
        """A mask (B, 1, H, W) over the grid of what is drawn, (B, 1, h, w): a place of which any pixel is masked is."""
        return F.adaptive_max_pool2d(mask, self.shape[1:])


DRAWINGS: dict[str, Callable[[Recipe, dict[str, Any], CaptionTokenizer | None], Drawing]] = {
    "dalle": CodeDrawing,
    "unet": DiffusionDrawing,
}
