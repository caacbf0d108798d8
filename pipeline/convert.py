"""Published weights of autoencoders, to ours and back: the names of CompVis (taming-transformers, latent-diffusion),
which ours are, and those of diffusers' `AutoencoderKL` and `VQModel`.

It knows names and shapes only. A file comes from anyone: `load_state_dict` of the model to fill checks what it holds.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

# Ours and theirs, below "encoder." or "decoder."; {} stands for a number. The same in both directions.
_PLACES = (
    ("conv_in", "conv_in"),
    ("conv_out", "conv_out"),
    ("norm_out", "conv_norm_out"),
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1", "mid_block.attentions.0"),
    ("down.{}.block.{}", "down_blocks.{}.resnets.{}"),
    ("down.{}.attn.{}", "down_blocks.{}.attentions.{}"),
    ("down.{}.downsample.conv", "down_blocks.{}.downsamplers.0.conv"),
    ("up.{}.block.{}", "up_blocks.{}.resnets.{}"),
    ("up.{}.attn.{}", "up_blocks.{}.attentions.{}"),
    ("up.{}.upsample.conv", "up_blocks.{}.upsamplers.0.conv"),
)
_LAYERS = (
    *((name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    ("nin_shortcut", "conv_shortcut"),
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)
# What diffusers called the same layers before version 0.15; files of that time are still about.
_FORMERLY = (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn"))
_ATTENTION = {"q", "k", "v", "proj_out"}
_SAME = re.compile(r"(quant_conv|post_quant_conv|quantize\.embedding)\.(weight|bias)")


def from_compvis(weights: dict[str, Tensor], scaling_factor: float | None = None) -> dict[str, Tensor]:
    """A CompVis checkpoint's state dict -> one of `VQGAN`, or of `AutoencoderKL` if its scaling factor is given.

    What belongs to the training (the loss with its networks) is left out. scaling_factor: 0.18215 of KL-f8 as Stable
    Diffusion uses it; our `scale` divides by the standard deviation, which is 1 / scaling_factor.
    """
    ours = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
    return ours | _scale(ours, scaling_factor)


def from_diffusers(weights: dict[str, Tensor], scaling_factor: float | None = None) -> dict[str, Tensor]:
    """The state dict of diffusers' `VQModel` or `AutoencoderKL` -> one of `VQGAN` or of ours.

    scaling_factor: see `from_compvis`; that of an `AutoencoderKL` is in its config. Raises ValueError for a tensor
    whose name neither model has.
    """
    levels = _levels(weights, "up_blocks")
    ours = {}
    for name, tensor in weights.items():
        renamed, layer = _rename(name, levels, theirs=True)
        ours[renamed] = tensor[:, :, None, None] if layer in _ATTENTION and tensor.dim() == 2 else tensor
    return ours | _scale(ours, scaling_factor)


def to_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`; the latent scale is left out, for diffusers keeps it in the config.

    Raises ValueError for a tensor that diffusers has no name for.
    """
    levels = _levels(weights, "up")
    theirs = {}
    for name, tensor in weights.items():
        if not name.startswith("scale."):
            renamed, layer = _rename(name, levels, theirs=False)
            theirs[renamed] = tensor.flatten(1) if layer in _ATTENTION and tensor.dim() == 4 else tensor
    return theirs


def _scale(ours: dict[str, Tensor], scaling_factor: float | None) -> dict[str, Tensor]:
    if scaling_factor is None:
        return {}
    channels = ours["post_quant_conv.weight"].shape[1]
    return {"scale.mean": torch.zeros(channels), "scale.std": torch.full((channels,), 1 / scaling_factor)}


def _levels(weights: dict[str, Tensor], word: str) -> int:
    found = [re.match(rf"decoder\.{word}\.(\d+)\.", name) for name in weights]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _rename(name: str, levels: int, theirs: bool) -> tuple[str, str]:
    """A tensor's name in the other scheme, and what our scheme calls its layer. theirs: the name is of diffusers."""
    if _SAME.fullmatch(name):
        return name, ""
    half, _, rest = name.partition(".")
    path, _, leaf = rest.rpartition(".")
    for ours, other in _PLACES:
        place, target = (other, ours) if theirs else (ours, other)
        match = re.match(re.escape(place).replace(r"\{\}", r"(\d+)") + r"(?:\.(.+))?$", path)
        layer = None if match is None else _layer(match.groups()[-1], theirs)
        if match is None or layer is None or half not in ("encoder", "decoder"):
            continue
        numbers = [int(number) for number in match.groups()[:-1]]
        if target.startswith("up"):
            numbers[0] = levels - 1 - numbers[0]  # diffusers counts from the smallest resolution
        words = [half, target.format(*numbers), layer[0 if theirs else 1], leaf]
        return ".".join(word for word in words if word), layer[0]
    raise ValueError(f"{name!r} is no tensor of an autoencoder that diffusers has; expected those of VQModel or KL")


def _layer(name: str | None, theirs: bool) -> tuple[str, str] | None:
    """(ours, theirs) of a layer inside a block; of none, two empty names; None if it is unknown."""
    if name is None:
        return "", ""
    side: Callable[[tuple[str, str]], str] = (lambda pair: pair[1]) if theirs else (lambda pair: pair[0])
    known = (*_LAYERS, *_FORMERLY) if theirs else _LAYERS
    return next((pair for pair in known if side(pair) == name), None)
