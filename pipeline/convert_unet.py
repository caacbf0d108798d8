"""Published weights of U-Nets and of their text encoders, to ours and back: the names of diffusers (`UNet2DModel`,
`UNet2DConditionModel`), CompVis (latent-diffusion, Stable Diffusion), transformers (`CLIPTextModel`) and OpenCLIP.

Every scheme is one function from our names to theirs, of which both directions are made. It knows names and shapes
only. A file comes from anyone: what the network to fill lacks, or has no place for, is one error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
Rules = Sequence[tuple[str, str]]  # pattern and replacement, each applied to what the ones before it left

_TRANSFORMER: Rules = (
    (r"\.blocks\.(\d+)\.(?=norm|attn|mlp)", r".transformer_blocks.\1."),
    (r"\.(attn\d)\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn\d)\.out\.", r".\1.to_out.0."),
    (r"\.mlp_in\.", ".ff.net.0.proj."),
    (r"\.mlp_out\.", ".ff.net.2."),
)
_DIFFUSERS: Rules = (
    (r"^time_embed\.0", "time_embedding.linear_1"),
    (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^(label_embedding|embedding_in)\.", "class_embedding."),
    (r"^norm_out", "conv_norm_out"),
    (r"^mid\.(\d+)\.res\.", r"mid_block.resnets.\1."),
    (r"^mid\.(\d+)\.attn\.", r"mid_block.attentions.\1."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.res\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.attn\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_SELF_ATTENTION: Rules = (
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
# As in files of diffusers before version 0.15.
_FORMERLY: Rules = (
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_COMPVIS: Rules = (
    (r"^label_embedding\.", "label_emb."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid\.0\.res\.", "middle_block.0."),
    (r"^mid\.0\.attn\.", "middle_block.1."),
    (r"^mid\.1\.res\.", "middle_block.2."),
)
_COMPVIS_RES: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.temb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.nin_shortcut\.", ".skip_connection."),
)
_CLIP: Rules = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def unet_from_diffusers(weights: Weights, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of diffusers' `UNet2DModel` or `UNet2DConditionModel` -> one of `network`, a `UNet`.

    Raises ValueError for tensors that are missing, too many, or of another shape.
    """
    weights = {_changed(name, _FORMERLY): tensor for name, tensor in weights.items()}
    return _filled(weights, diffusers_names(network.state_dict()), network)


def unet_to_diffusers(weights: Weights, linear_projections: bool = True) -> dict[str, Tensor]:
    """The inverse of `unet_from_diffusers`. linear_projections: as their `use_linear_projection`; False for SD 1.

    Raises ValueError for a tensor that diffusers has no name for.
    """
    return _renamed(weights, diffusers_names(weights), linear_projections)


def unet_from_compvis(weights: Weights, network: nn.Module) -> dict[str, Tensor]:
    """What stands below `model.diffusion_model.` in a CompVis file -> a state dict of `network`, a `UNet`.

    Raises ValueError for tensors that are missing, too many, or of another shape, and for a network without captions.
    """
    return _filled(weights, compvis_names(network.state_dict()), network)


def unet_to_compvis(weights: Weights, linear_projections: bool = True) -> dict[str, Tensor]:
    """The inverse of `unet_from_compvis`; linear_projections: see `unet_to_diffusers`."""
    return _renamed(weights, compvis_names(weights), linear_projections)


def clip_text_from_transformers(weights: Weights, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of transformers' `CLIPTextModel`, of any version -> one of `network`, a `CLIPText`.

    What that class does not read either is left out: blocks beyond the network's depth (in folders that were made to
    skip the last), projections, an image tower. Raises ValueError for tensors that are missing, too many, or of another
    shape.
    """
    given = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    split = _split(network.state_dict())
    depth = len({name.split(".")[2] for name in network.state_dict() if name.startswith("transformer.resblocks.")})
    given = {name: tensor for name, tensor in given.items() if not _beyond(name, depth)}
    found = _filled(given, {name: _changed(name, _CLIP) for name in split}, split)
    return {name: found[name] if name in found else torch.cat([found[part] for part in _parts(name)])
            for name in network.state_dict()}  # fmt: skip


def _beyond(name: str, depth: int) -> bool:
    """Whether a tensor of transformers' CLIP is none that a text encoder of `depth` blocks reads."""
    block = re.match(r"encoder\.layers\.(\d+)\.", name)
    if block is not None:
        return int(block[1]) >= depth
    others = "text_projection.", "vision_model.", "visual_projection."
    return name in ("embeddings.position_ids", "logit_scale") or name.startswith(others)


def clip_text_to_transformers(weights: Weights) -> dict[str, Tensor]:
    """The inverse of `clip_text_from_transformers`, named as in published files."""
    return {f"text_model.{_changed(name, _CLIP)}": tensor for name, tensor in _split(weights).items()}


def clip_text_from_openclip(weights: Weights, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of an OpenCLIP model -> one of `network`, a `CLIPText` of as many blocks, or of one less.

    The image tower and both projections are left out; of the last block, which Stable Diffusion 2 does not read, see
    `CLIPText`. Raises ValueError for tensors that are missing, too many, or of another shape.
    """
    names = {name: name for name in network.state_dict()}
    depth = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("transformer.resblocks."))
    left = re.compile(rf"(visual|transformer\.resblocks\.{depth})\..*|text_projection|logit_scale|attn_mask")
    return _filled({name: tensor for name, tensor in weights.items() if not left.fullmatch(name)}, names, network)


def split_single_file(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """A single file of Stable Diffusion -> the tensors of "prior", "text" and "tokenizer", each as CompVis names them.

    "text" holds the names of transformers (SD 1) or of OpenCLIP (SD 2). Schedules, which are computed, the running
    average that some files hold beside the weights, and what training of added words left are left out. Raises
    ValueError for any other tensor.
    """
    heads = {
        "model.diffusion_model.": "prior",
        "cond_stage_model.transformer.": "text",
        "cond_stage_model.model.": "text",
        "conditioner.embedders.0.model.": "text",
        "first_stage_model.": "tokenizer",
    }
    schedule = re.compile(
        r"(sqrt_|log_)?(recip_|recipm1_|one_minus_)?(betas|alphas_cumprod|alphas_cumprod_prev)|lvlb_weights|logvar|"
        r"posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor|model_ema\..*|embedding_manager\..*|"
        r"denoiser\.sigmas|cond_stage_model\.logit_scale"
    )
    found: dict[str, dict[str, Tensor]] = {part: {} for part in heads.values()}
    for name, tensor in weights.items():
        head = next((head for head in heads if name.startswith(head)), None)
        if head is not None:
            found[heads[head]][name.removeprefix(head)] = tensor
        elif not schedule.fullmatch(name):
            raise ValueError(
                f"{name!r:.100} is no tensor of a Stable Diffusion file; expected names that begin with "
                f"{', '.join(heads)}, or a schedule; is it the file of another model? Its autoencoder may be read "
                "alone, by kartina convert --part tokenizer"
            )
    return found


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """Our names of a `UNet`'s tensors -> those of diffusers. Raises ValueError where it has none."""
    names = list(names)
    top = max((int(name.split(".")[1]) for name in names if name.startswith("up.")), default=0)
    inside = _TRANSFORMER if any(".attn.proj_in." in name for name in names) else _SELF_ATTENTION
    made = {}
    for name in names:
        counted = re.sub(r"^up\.(\d+)", lambda found: f"up.{top - int(found[1])}", name)  # from the smallest resolution
        made[name] = _changed(counted, (*_DIFFUSERS, *inside))
    if any(name.startswith("tokens_in.") for name in names) or len(set(made.values())) < len(made):
        raise ValueError(
            "diffusers has no U-Net with tokens made of an image embedding, nor with both classes and embeddings; "
            "export one without embedding_tokens, and with num_classes or embedding_dim alone"
        )
    return made


def compvis_names(names: Iterable[str]) -> dict[str, str]:
    """Our names of a `UNet`'s tensors -> those of CompVis, where blocks count through all levels."""
    names = list(names)
    places = {
        tuple(map(int, found.groups())) for name in names if (found := re.match(r"up\.(\d+)\.blocks\.(\d+)", name))
    }
    top, per_level = max(places, default=(0, 0))[0], 1 + max((place[1] for place in places), default=0)
    attended = {int(found[1]) for name in names if (found := re.match(r"up\.(\d+)\.blocks\.\d+\.attn\.", name))}

    def block(found: re.Match[str]) -> str:
        way, level, number, kind = found[1], int(found[2]), int(found[3]), ".0" if found[4] == "res" else ".1"
        if way == "down":
            return f"input_blocks.{level * per_level + number + 1}{kind}."
        return f"output_blocks.{(top - level) * per_level + number}{kind}."

    def resample(found: re.Match[str]) -> str:
        level = int(found[2])
        if found[1] == "down":
            return f"input_blocks.{(level + 1) * per_level}.0.op."
        return f"output_blocks.{(top - level + 1) * per_level - 1}.{1 + (level in attended)}.conv."

    made = {}
    for name in names:
        if name.startswith(("embedding_in.", "tokens_in.")) or re.search(r"\.attn\.[qkv]\.", name):
            raise ValueError(
                f"{name!r} has no name in a CompVis U-Net: it looks at captions in every attention, and reads no image "
                "embeddings; use the names of diffusers"
            )
        theirs = re.sub(r"^(down|up)\.(\d+)\.blocks\.(\d+)\.(res|attn)\.", block, name)
        theirs = re.sub(r"^(down|up)\.(\d+)\.resample\.conv\.", resample, theirs)
        made[name] = _changed(theirs, (*_COMPVIS, *(_TRANSFORMER if ".attn." in name else _COMPVIS_RES)))
    return made


def _changed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _renamed(weights: Weights, names: Mapping[str, str], linear_projections: bool) -> dict[str, Tensor]:
    """Tensors by their names there; attention's projections are matrices there, but in SD 1's transformers kernels."""
    found = {}
    for name, tensor in weights.items():
        if re.search(r"\.attn\.([qkv]|proj_out)\.weight$", name) and tensor.dim() == 4:
            tensor = tensor.flatten(1)
        elif re.search(r"\.attn\.proj_(in|out)\.weight$", name) and not linear_projections:
            tensor = tensor[:, :, None, None]
        found[names[name]] = tensor
    return found


def _filled(weights: Weights, names: Mapping[str, str], network: nn.Module | Weights) -> dict[str, Tensor]:
    """The tensors that a network needs, by our names, in its shapes: matrices and 1x1 kernels are the same."""
    wanted = network.state_dict() if isinstance(network, nn.Module) else network
    missing, surplus = sorted(set(names.values()) - set(weights)), sorted(set(weights) - set(names.values()))
    if missing or surplus:
        raise ValueError(
            f"the weights must hold exactly the network's {len(names)} tensors, got {len(weights)}: "
            f"{len(missing)} are missing{_some(missing)} and {len(surplus)} have no place{_some(surplus)}; "
            "build the network with the sizes that the weights were published with"
        )
    found = {}
    for ours, theirs in names.items():
        tensor, shape = weights[theirs], wanted[ours].shape
        if _matrix(tensor.shape) != _matrix(shape):
            raise ValueError(
                f"{theirs}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}; "
                "build the network with the sizes that the weights were published with"
            )
        found[ours] = tensor.reshape(shape)
    return found


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def _parts(name: str) -> list[str]:
    """ "...attn.in_proj_weight" -> the names of its three parts."""
    head, _, leaf = name.rpartition("in_proj_")
    return [f"{head}{letter}_proj.{leaf}" for letter in "qkv"]


def _split(weights: Weights) -> dict[str, Tensor]:
    """The joint projections of queries, keys and values as three."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        joint = ".attn.in_proj_" in name
        found |= dict(zip(_parts(name), tensor.chunk(3), strict=True)) if joint else {name: tensor}
    return found
