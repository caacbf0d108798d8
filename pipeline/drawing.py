"""From captions to what the tokenizer decodes: how each kind of prior is sampled.

    DALL-E:     captions -> text tokens -> codes, one after another
    diffusion:  captions -> text tokens -> tokens of the text encoder -> a sampler over `denoise` -> latents, or pixels

B pictures of a micro-batch, T text tokens, h x w grid of codes, C channels of latents.

It does not know how parts are loaded, ranked or trained.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..priors.code_samplers import sample_codes
from ..priors.condition import Condition
from ..priors.denoiser import Clipped, Denoise, Guided
from ..priors.diffusers_schedulers import find_sampler
from ..tokenizers.captions import CaptionTokenizer
from .denoising import denoiser_of
from .recipe import Recipe, RecipeError

Progress = Callable[[int, int], None]


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


class CodeDrawing:
    """DALL-E's: codes int64 (B, h, w)."""

    def __init__(self, recipe: Recipe, parts: dict[str, Any], captions: CaptionTokenizer | None) -> None:
        assert captions is not None
        self.prior, self.encode = parts["prior"], captions.encode
        spec = parts["tokenizer"].spec
        drawn, read = (
            (tuple(self.prior.grid), self.prior.num_codes),
            (tuple(spec.shape), getattr(spec, "vocabulary", 0)),
        )
        self.problem = "" if drawn == read else f"the prior draws (grid, codes) {drawn}, the tokenizer reads {read}"

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], knobs: dict[str, Any], progress: Progress | None
    ) -> Tensor:
        """See `Drawing` and `sample_codes`."""
        text = self.encode(captions)[0].to(next(self.prior.parameters()).device)  # (B, T)
        return sample_codes(self.prior, text, seeds, progress=progress, **knobs)


class DiffusionDrawing:
    """A diffusion prior's: latents (B, C, h, w), or pixels where the recipe has no tokenizer.

    A prior of classes reads their numbers, as "7"; one that reads nothing draws anything, whatever the captions say. A
    negative prompt takes the null caption's place.
    """

    def __init__(self, recipe: Recipe, parts: dict[str, Any], captions: CaptionTokenizer | None) -> None:
        self.recipe, self.prior = recipe, parts["prior"]
        self.text, self.tokenizer = parts.get("text"), parts.get("tokenizer")
        self.captions = getattr(self.text, "captions", captions)  # its own, where it comes with a tokenizer
        side, channels = recipe.image_size, self.prior.in_channels
        self.shape = (channels, side, side) if self.tokenizer is None else tuple(self.tokenizer.spec.shape)
        wanted = 3 if self.tokenizer is None else self.shape[0]
        self.problem = (
            "" if channels == wanted else f"the prior draws {channels} channels, the tokenizer reads {wanted}"
        )
        width = getattr(self.text, "width", None)
        if width != self.prior.context_dim:
            self.problem = (
                f"the prior looks at tokens of width {self.prior.context_dim}, its text encoder gives {width}"
            )

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], knobs: dict[str, Any], progress: Progress | None
    ) -> Tensor:
        """See `Drawing` and `priors.diffusion_samplers`."""
        walk = dict(knobs)
        scale, negative, rescale = walk.pop("guidance_scale"), walk.pop("negative"), walk.pop("guidance_rescale")
        low, high = walk.pop("guidance_low"), walk.pop("guidance_high")
        sampler, eta = find_sampler(walk.pop("sampler")), walk.pop("eta")
        walk = {name: value for name, value in walk.items() if value is not None}
        if eta is not None:
            if knobs["sampler"] != "ddim":
                raise RecipeError(
                    f"eta belongs to the sampler ddim, got {knobs['sampler']}; leave it out, or take ddim"
                )
            walk["eta"] = eta
        if scale == 1 and (negative or rescale or low or high is not None):
            raise RecipeError("a negative prompt and the other knobs of guidance need a guidance_scale other than 1")
        if scale != 1 and self.text is None and self.prior.num_classes is None:
            raise RecipeError(f"{self.recipe.name} reads no captions to be guided by; leave guidance_scale at 1")
        weight = next(self.prior.parameters())
        denoise: Denoise = denoiser_of(self.recipe, self.prior)
        if self.tokenizer is None:
            denoise = Clipped(denoise)
        if scale != 1:
            null = self.condition([negative] * len(captions)) if negative else self.null(len(captions))
            denoise = Guided(denoise, null, scale, (low, math.inf if high is None else high), rescale)
        numbers = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device=weight.device)
        z = sampler(denoise, self.condition(captions), self.shape, numbers, progress=progress, **walk)
        return z.to(weight.dtype)

    def condition(self, captions: Sequence[str]) -> Condition:
        """What the prior reads of captions, or of the numbers of classes."""
        if self.text is None or self.captions is None:
            null = self.prior.null_condition(len(captions))
            return null if null.labels is None else null._replace(labels=self.labels(captions).to(null.labels))
        text = self.text.frame(*self.captions.encode(captions)).to(next(self.text.parameters()).device)  # (B, T)
        tokens, mask = self.text(text)
        return Condition(tokens=tokens, mask=mask)

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


DRAWINGS: dict[str, Callable[[Recipe, dict[str, Any], CaptionTokenizer | None], Drawing]] = {
    "dalle": CodeDrawing,
    "unet": DiffusionDrawing,
}
