"""Changing a picture with a diffusion prior, instead of painting one from nothing but noise.

    image-to-image   the picture is noised to the level of a strength, and denoised from there (SDEdit, Meng 2021,
                     arXiv:2108.01073, algorithm 1)
    inpainting       outside of a mask each step is given the picture again, with the noise of its level (Lugmayr 2022,
                     arXiv:2201.09865, equation 8, without resampling; in latents Avrahami 2022, arXiv:2206.02779); a
                     prior that reads a mask and the masked picture is conditioned on them instead
    inversion        the noise that DDIM would make the picture from under one caption is denoised under another (Song
                     2020, arXiv:2010.02502, section 4.3)

An edit is a system with another way to draw and to decode; all the rest is that of `TextToImage`.

B pictures of a micro-batch, S x S pixels of the model, C x h x w latents.

It does not know the prior's network, nor how pictures are read and written.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from ..priors.diffusion_samplers import Keep, Walk, ddim_invert
from .drawing import DiffusionDrawing
from .images import fit as centre
from .images import upright
from .memory import Progress

if TYPE_CHECKING:
    from .text_to_image import Painting, TextToImage

FITS = ("crop", "stretch")
STRENGTH = 0.8  # of image-to-image
_GREY, _MOST_GREY = (0.25, 0.75), 0.2  # a mask may have soft edges: so much of it may lie between


class EditDrawing:
    """A `Drawing` of one picture (1, 3, S, S) in [-1, 1]; see `edit` for the rest. mask: (1, 1, S, S), 1 to be painted.

    strength: 1 begins from noise alone; below, the last share `strength` of the steps is taken.
    """

    problem = ""

    def __init__(
        self, draw: DiffusionDrawing, image: Tensor, mask: Tensor | None, strength: float, invert: str | None
    ) -> None:
        self.draw, self.strength, self.invert = draw, strength, invert
        with torch.no_grad():
            self.x_0 = draw.encode(image)  # (1, C, h, w)
            self.beside = draw.beside(image, mask) if draw.fills else None  # (1, 1 + C, h, w)
        self.kept = None if mask is None or draw.fills else 1 - draw.shrink(mask).to(self.x_0)

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], knobs: dict[str, Any], progress: Progress | None
    ) -> Tensor:
        """See `Drawing`. Raises ValueError where so much strength is less than one step."""
        if not round(self.strength * knobs["num_steps"]):
            raise ValueError(
                f"strength must be one step at least, got {self.strength:g} of {knobs['num_steps']} steps; raise either"
            )
        if self.invert is not None and (knobs["sampler"] != "ddim" or knobs["eta"]):
            raise ValueError(
                f"an inversion is undone by the sampler ddim with eta 0, got {knobs['sampler']} with eta "
                f"{knobs['eta']}; leave both out"
            )
        x_0 = self._many(self.x_0, len(captions))
        walk = Walk(progress=progress)
        if self.strength < 1:
            walk |= Walk(start=x_0, strength=self.strength)
        if self.kept is not None:
            walk |= Walk(keep=Keep(x_0, self._many(self.kept, len(captions))))
        if self.invert is not None:
            walk |= Walk(noise=self._many(self._noise(self.invert, knobs), len(captions)))
        return self.draw.sample(self._condition(captions), seeds, knobs, **walk)

    def _noise(self, caption: str, knobs: dict[str, Any]) -> Tensor:
        """What the picture is made of under a caption, without guidance, (1, C, h, w)."""
        condition = self._condition([caption]) if caption else self._filled(self.draw.null(1))
        spacing = knobs["spacing"] or "trailing"
        return ddim_invert(
            self.draw.denoiser(condition), condition, self.x_0, knobs["num_steps"], spacing, strength=self.strength
        )

    def _condition(self, captions: Sequence[str]) -> Any:
        return self._filled(self.draw.condition(captions), len(captions))

    def _filled(self, condition: Any, count: int = 1) -> Any:
        return condition if self.beside is None else condition._replace(image=self._many(self.beside, count))

    @staticmethod
    def _many(one: Tensor, count: int) -> Tensor:
        return one.expand(count, -1, -1, -1)


def edit(
    system: "TextToImage",
    image: Image,
    prompts: str | Sequence[str],
    strength: float | None = None,
    mask: Image | None = None,
    invert: str | None = None,
    fit: str | None = None,
    **painting: Any,
) -> list["Painting"]:
    """Paints over a picture for each prompt; the result, seeds, candidates and knobs are those of `TextToImage`.

    strength: in (0, 1], how far from the picture: the share of the steps that is taken; 1 forgets it. By default 0.8,
    and 1 with a mask or an inversion. mask: of the picture's size, white where it is to be painted; every other pixel
    stays as it is. invert: a caption of the picture as it is, "" for none: the picture's own noise under it is taken,
    by DDIM, in place of a seed's. fit: "crop" takes the centre square and "stretch" all of a picture that has not the
    model's size.

    Raises ValueError for a strength, mask, size or knob that breaks these rules, for more candidates than one of an
    inversion, and for a model without a diffusion prior.
    """
    if not isinstance(system.draw, DiffusionDrawing):
        raise ValueError(f"{system.recipe.name} must have a diffusion prior to edit with, as shapes/stable-diffusion")
    strength = (STRENGTH if mask is None and invert is None else 1.0) if strength is None else strength
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], from nearly the picture to none of it, got {strength:g}")
    if invert is not None:
        painting = {"sampler": "ddim", "eta": 0.0} | painting
        if painting.get("candidates", 1) != 1:
            raise ValueError("an inversion has one candidate, for its noise is the picture's; leave candidates at 1")
    size, image = system.recipe.image_size, upright(image)
    pixels = square(image, size, fit)[None]  # (1, 3, S, S)
    painted = None if mask is None else mask_of(mask, image.size, size, fit)[None]  # (1, 1, S, S)
    edited = copy.copy(system)
    edited.draw = EditDrawing(system.draw, pixels, painted, strength, invert)
    if painted is not None:
        edited.decode = lambda z: torch.where(painted > 0, system.decode(z).float().cpu(), pixels)
    hashes = {"picture": _hash(pixels), "mask": None if painted is None else _hash(painted)}
    facts = {**hashes, "strength": strength, "invert": invert}
    return [replace(each, facts={**each.facts, "edit": facts}) for each in edited(prompts, **painting)]


def square(picture: Image, size: int, how: str | None = None) -> Tensor:
    """A picture at the model's size, (3, S, S) in [-1, 1]; how: see `edit`. Raises ValueError where it is needed."""
    if how is not None and how not in FITS:
        raise ValueError(f"a picture is fitted by one of {', '.join(FITS)}, got {how!r:.40}")
    picture = picture.convert("RGB")
    if picture.size != (size, size):
        if how is None:
            raise ValueError(
                f"a picture must have the model's size, {size} x {size}, got {picture.width} x {picture.height}; "
                "resize it, or fit it: crop takes the centre square, stretch all of it"
            )
        if how == "stretch":
            picture = picture.resize((size, size), Resampling.BICUBIC, reducing_gap=2.0)
    return centre(picture, size)


def mask_of(mask: Image, picture_size: tuple[int, int], size: int, how: str | None = None) -> Tensor:
    """A mask as (1, S, S), 1 where it is white and 0 where it is black or transparent; grey is decided at the middle.

    Raises ValueError for another size than the picture's, for more grey than soft edges have, and where nothing is
    white.
    """
    mask = upright(mask, under="black")
    if mask.size != picture_size:
        given, wanted = (f"{side[0]} x {side[1]}" for side in (mask.size, picture_size))
        raise ValueError(f"a mask must have the picture's size, {wanted}, got {given}; resize it")
    share = square(mask.convert("L"), size, how)[:1] / 2 + 0.5
    low, high = _GREY
    grey = ((share > low) & (share < high)).float().mean().item()
    if grey > _MOST_GREY:
        raise ValueError(f"a mask must be black and white, got {grey:.0%} of grey; set each pixel to 0 or 255")
    if not (share >= 0.5).any():
        drawn = any(mask.convert("L").histogram()[128:])
        how = "fit it by stretch, or draw its white larger" if drawn else "draw it, or none"
        raise ValueError(
            f"a mask must be white where the picture is to be painted, got black alone at {size} x {size} pixels; {how}"
        )
    return (share >= 0.5).float()


def _hash(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
