"""The `config.json` of a published U-Net or text encoder to the arguments of ours, and back: diffusers' `UNet2DModel`
and `UNet2DConditionModel`, transformers' `CLIPTextModel`.

A config comes from anyone: a setting that ours does not compute is an error, never passed over. It knows no weights.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from ..priors.caption_encoder import CLIPText
from ..priors.unet import UNet

Config = Mapping[str, Any]

# By convention of `UNet`: flip_sin_to_cos, freq_shift, downsample_padding, norm_eps.
_CONVENTIONS = {"ddpm": (False, 1, 0, 1e-6), "adm": (True, 0, 1, 1e-5)}
# What must have one value, where a config holds it; None stands for itself. Any other key must be None or False.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "time_embedding_type": ("positional",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "resnet_out_scale_factor": (1.0,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embed_type": (None, "simple_projection"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_dim": (None,),
}
# What does not change the network: sizes it was trained at, arithmetic, and settings of what _FIXED excludes.
_IGNORED = {
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "sample_size",
    "num_train_timesteps",
    "upcast_attention",
}
_IGNORED |= {"addition_embed_type_num_heads", "use_linear_projection"}
# Of a running average of the weights, where that was saved as a U-Net.
_IGNORED |= {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
_READ = {"in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types"}
_READ |= {"attention_head_dim", "num_attention_heads", "cross_attention_dim", "transformer_layers_per_block", "dropout"}
_READ |= {"num_class_embeds", "projection_class_embeddings_input_dim", "norm_num_groups", "attn_norm_num_groups"}
_READ |= {"flip_sin_to_cos", "freq_shift", "downsample_padding", "norm_eps", "add_attention"}
_NEEDED = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types")


def unet_arguments(config: Config) -> dict[str, Any]:
    """The config of diffusers' `UNet2DModel` or `UNet2DConditionModel` -> the arguments of `UNet`.

    Its last class becomes the null one. Raises ValueError for a missing key, or a setting that ours does not compute.
    """
    _check(config)
    channels, down = list(config["block_out_channels"]), list(config["down_block_types"])
    context_dim = config.get("cross_attention_dim")
    attending = "AttnDownBlock2D" if context_dim is None else "CrossAttnDownBlock2D"
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    width = channels[0]
    if not set(down) <= {"DownBlock2D", attending} or list(config.get("up_block_types", up)) != up:
        raise _refused("down_block_types", down, f"DownBlock2D and {attending}, and the same in up_block_types")
    if len(channels) != len(down) or any(width < 1 or other % width for other in channels):
        raise _refused("block_out_channels", channels, "multiples of the first, one for each level")
    keys = ("flip_sin_to_cos", "freq_shift", "downsample_padding", "norm_eps")
    found = tuple(config.get(key, default) for key, default in zip(keys, _CONVENTIONS["adm"], strict=True))
    if found not in _CONVENTIONS.values():
        raise _refused(", ".join(keys), found, " or ".join(map(str, _CONVENTIONS.values())))
    projected = config.get("class_embed_type") == "simple_projection"
    classes = config.get("num_class_embeds")
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "width": width,
        "channel_mult": tuple(other // width for other in channels),
        "blocks_per_level": config["layers_per_block"],
        "attn_levels": tuple(level for level, kind in enumerate(down) if kind == attending),
        "num_heads": _heads(config, channels),
        "mid_attention": config.get("add_attention", True),
        "context_dim": context_dim,
        "depth": config.get("transformer_layers_per_block", 1),
        "num_classes": None if classes is None else classes - 1,
        "embedding_dim": config["projection_class_embeddings_input_dim"] if projected else None,
        "scale_shift": config.get("resnet_time_scale_shift") == "scale_shift",
        "dropout": config.get("dropout", 0.0),
        "norm_groups": config.get("norm_num_groups", 32),
        "convention": next(name for name, values in _CONVENTIONS.items() if values == found),
    }


def unet_config(arguments: Mapping[str, Any], linear_projections: bool = True) -> dict[str, Any]:
    """The inverse of `unet_arguments`; what `arguments` leaves out has the default of `UNet`.

    linear_projections: as those of the weights, see `convert_unet.unet_to_diffusers`. Raises ValueError for a network
    that diffusers has no class for.
    """
    given = {name: value.default for name, value in inspect.signature(UNet).parameters.items()} | dict(arguments)
    captioned, levels = given["context_dim"] is not None, len(given["channel_mult"])
    channels = [given["width"] * mult for mult in given["channel_mult"]]
    heads = given["num_heads"]
    heads = [heads] * levels if isinstance(heads, int) else list(heads)
    if given["embedding_tokens"] or (captioned and not given["mid_attention"]) or (
        given["embedding_dim"] is not None and (not captioned or given["num_classes"] is not None)
    ):  # fmt: skip
        raise ValueError(
            "diffusers has a U-Net with image embeddings for captions only and without classes, with attention in the "
            "middle and no tokens made of an embedding; this network cannot be exported to it"
        )
    attended = {*given["attn_levels"], *([levels - 1] if given["mid_attention"] else [])}
    head_widths = {channels[level] // heads[level] for level in attended}
    if not captioned and len(head_widths) > 1 and set(heads) != {1}:
        raise ValueError(
            f"diffusers' UNet2DModel needs heads of one width, got {sorted(head_widths)}; change num_heads"
        )
    attending = "CrossAttnDownBlock2D" if captioned else "AttnDownBlock2D"
    down = [attending if level in given["attn_levels"] else "DownBlock2D" for level in range(levels)]
    flip, shift, padding, eps = _CONVENTIONS[given["convention"]]
    config = {
        "_class_name": "UNet2DConditionModel" if captioned else "UNet2DModel",
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"] or given["in_channels"],
        "block_out_channels": channels,
        "layers_per_block": given["blocks_per_level"],
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "num_class_embeds": None if given["num_classes"] is None else given["num_classes"] + 1,
        "resnet_time_scale_shift": "scale_shift" if given["scale_shift"] else "default",
        "dropout": given["dropout"],
        "norm_num_groups": given["norm_groups"],
        "flip_sin_to_cos": flip,
        "freq_shift": shift,
        "downsample_padding": padding,
        "norm_eps": eps,
    }
    if not captioned:
        alone = None if set(heads) == {1} or not head_widths else min(head_widths)
        return config | {
            "attention_head_dim": alone,
            "add_attention": given["mid_attention"],
            "attn_norm_num_groups": given["norm_groups"],
        }
    return config | {
        "attention_head_dim": heads,  # the number of heads, whatever its name
        "cross_attention_dim": given["context_dim"],
        "transformer_layers_per_block": given["depth"],
        "use_linear_projection": linear_projections,
        "class_embed_type": None if given["embedding_dim"] is None else "simple_projection",
        "projection_class_embeddings_input_dim": given["embedding_dim"],
    }


_CLIP = {
    "vocab_size": "text_vocab",
    "max_position_embeddings": "text_length",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
}


def clip_text_arguments(config: Config) -> dict[str, Any]:
    """The config of transformers' `CLIPTextModel` -> the arguments of `CLIPText`, but for its pad, the tokenizer's.

    Raises ValueError for a missing key, or a setting that ours does not compute.
    """
    _present(config, (*_CLIP, "intermediate_size", "hidden_act"))
    if config["hidden_act"] not in ("gelu", "quick_gelu"):
        raise _refused("hidden_act", config["hidden_act"], "gelu or quick_gelu")
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise _refused("intermediate_size", config["intermediate_size"], "four times hidden_size")
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise _refused("layer_norm_eps", config["layer_norm_eps"], "1e-5")
    if config.get("use_attention_mask"):
        raise _refused("use_attention_mask", config["use_attention_mask"], "none: pads are looked at")
    return {ours: config[key] for key, ours in _CLIP.items()} | {"quick_gelu": config["hidden_act"] == "quick_gelu"}


def clip_text_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `clip_text_arguments`; what `arguments` leaves out has the default of `CLIPText`."""
    given = {name: value.default for name, value in inspect.signature(CLIPText).parameters.items()} | dict(arguments)
    return {key: given[ours] for key, ours in _CLIP.items()} | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "intermediate_size": 4 * given["width"],
        "hidden_act": "quick_gelu" if given["quick_gelu"] else "gelu",
        "bos_token_id": given["text_vocab"] - 2,
        "eos_token_id": given["text_vocab"] - 1,
        "pad_token_id": given["text_vocab"] - 1 if given["pad"] is None else given["pad"],
    }


def _heads(config: Config, channels: list[int]) -> tuple[int, ...]:
    """The number of heads of each level; the key of it that says width means number where there are captions."""
    given = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if config.get("cross_attention_dim") is None:
        return tuple(1 if given is None else channel // given for channel in channels)
    return (given,) * len(channels) if isinstance(given, int) else tuple(given)


def _check(config: Config) -> None:
    _present(config, _NEEDED)
    for key, value in config.items():
        allowed = _FIXED.get(key, (None, False))
        if not key.startswith("_") and key not in _READ | _IGNORED and value not in allowed:
            raise _refused(key, value, " or ".join(map(repr, allowed)))
    groups = config.get("attn_norm_num_groups")
    if not isinstance(config.get("transformer_layers_per_block", 1), int):
        raise _refused("transformer_layers_per_block", config["transformer_layers_per_block"], "one number")
    scaled = config.get("resnet_time_scale_shift") == "scale_shift" and config.get("cross_attention_dim") is None
    if groups != config.get("norm_num_groups", 32) and (groups is not None or scaled):
        raise _refused("attn_norm_num_groups", groups, "that of norm_num_groups")


def _present(config: Config, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}; is it the config.json of another model?")


def _refused(key: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{key} of the config must be {expected}, got {value!r:.100}: kartina does not compute it")
