"""Published tokenizers, read and written: OpenAI's discrete VAE, VQ-GAN and its Gumbel form of taming-transformers, the
autoencoders of latent diffusion and Stable Diffusion; in the folders of diffusers too.

What a file is of is told by the names of its tensors, the sizes by their shapes, or by a config.json beside it. A model
is then built on the meta device, and every tensor must be asked for and be there.

It does not know how a file is read, nor how a model folder is written.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tokenizers.dvae import openai_state_dict
from . import archive
from .checkpoint import misfits
from .convert import from_compvis, from_diffusers, to_diffusers
from .recipe import PARTS, Recipe, defaults
from .unpickle import StoredTensor, WeightsError
from .whole_file import save_tensors

HUB = "hf-hub:"
SCALING_FACTOR = 0.18215  # of KL-f8 in Stable Diffusion: 1 / the deviation of its latents
SCALING_FACTOR_XL = 0.13025
XL_READERS = "conditioner."  # before the names of its text encoders, in CompVis' files
_FULL = "model.diffusion_model.input_blocks.1.1."  # attention at full resolution, there
_CLASSES = {"VQModel": "vqgan", "AutoencoderKL": "autoencoder_kl"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_HALVES = ("encoder.pkl", "decoder.pkl")
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".safetensors")  # endings that no repository is told by
_OURS = ("card.json", "recipe.yaml")  # what tells a model folder of ours
_OWN = re.compile(r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\.")
_TRAINING = ("loss.", "model_ema.")
_OTHERS = {
    "model.diffusion_model.": "a latent diffusion model without its first stage",
    "transformer.": "a transformer over codes without its first stage",
    "time_embedding.": "a U-Net of diffusers",
    "text_model.": "a text encoder",
    "visual.": "a CLIP",
}
_EXPECTED = "a VQ-GAN, a KL autoencoder (of CompVis or diffusers) or a folder with OpenAI's encoder.pkl and decoder.pkl"


def is_repository(name: str) -> bool:
    """Whether a name is of the hub's: hf-hub:OWNER/NAME, or OWNER/NAME that is no path to a file of weights."""
    named = name.count("/") == 1 and not name.startswith(".") and Path(name).suffix.lower() not in _FILES
    return name.startswith(HUB) or named


def fetch(name: str) -> Path:
    """The folder of a hub repository, OWNER/NAME or hf-hub:OWNER/NAME: weights as safetensors, configs, vocabularies.

    A model folder of ours may hold no links, as the cache of the hub does: it gets a copy of its own beside that.
    Raises WeightsError where it cannot be had.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    homes = ("", "vae/", "vqvae/", "unet/")  # of a U-Net or a tokenizer; one alone lies at the top
    weights = [f"diffusion_pytorch_model{half}.safetensors" for half in ("", ".fp16")]
    wanted = ["model_index.json", *(f"{home}{file}" for home in homes for file in ("config.json", *weights))]
    wanted += ["text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"]
    captions = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    wanted += [*(f"tokenizer/{file}" for file in captions), "scheduler/scheduler_config.json", *_OURS]
    wanted += ["*/*.index.json"]  # by which weights in shards are told
    # By name: *.safetensors would take whatever checkpoint lies there.
    ours = [*_OURS, "captions.json", "attributes.json", "LICENSES/*"]
    ours += [f"{part}.safetensors" for part in (*PARTS, "attributes")]
    repository = name.removeprefix(HUB)
    with contextlib.suppress(Exception):  # without a network what was fetched before is taken
        there = set(HfApi().list_repo_files(repository))
        wanted = [name for name in wanted if ".fp16." not in name or name.replace(".fp16.", ".") not in there]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if all((folder / file).is_file() for file in _OURS):
            copy = Path(constants.HF_HOME, "kartina", repository)
            snapshot_download(repository, revision=folder.name, allow_patterns=ours, local_dir=copy)
            return copy
        return folder
    except Exception as error:  # whatever the client meets: no such repository, no network, a proxy
        raise WeightsError(f"{name!r} could not be fetched from the hub ({error!s:.200}); give a folder") from None


def load(path: Path, image_size: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published tokenizer -> its section of a recipe, and its weights, in the type that they are stored in.

    path: a `.ckpt`, `.pt`, `.bin` or `.safetensors` file of CompVis' names; a folder with encoder.pkl and decoder.pkl;
    one with config.json and weights of diffusers, or with that as its vae/ or vqvae/. image_size: H = W of the model,
    by default 256, or what config.json says. Raises WeightsError for anything else, naming what it is.
    """
    try:
        return _load(path, image_size)
    except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is no whole tokenizer ({reason:.80}); expected {_EXPECTED}") from None


def _load(path: Path, image_size: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise WeightsError(f"{path} is not there; give a file, a folder, or a hub repository as hf-hub:OWNER/NAME")
    homes = [path, path / "vae", path / "vqvae"] if path.is_dir() else []
    if path.is_dir() and all((path / name).is_file() for name in _HALVES):
        section, weights = _openai(path, image_size)
    elif home := next((home for home in homes if (home / "config.json").is_file()), None):
        section, weights = _diffusers(home, image_size)
    elif path.is_file():
        section, weights = _compvis(path, image_size)
    else:
        raise WeightsError(f"{path} holds no published tokenizer; expected {_EXPECTED}")
    _check(path, section, weights)
    return section, weights


def _openai(path: Path, image_size: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    halves = [archive.read(path / name, archive.module_tensors) for name in _HALVES]
    try:
        weights = openai_state_dict(*halves)
        stem, head = weights["encoder.stem.weight"], weights["encoder.head.weight"]
        groups, blocks = (_count(weights, rf"encoder\.groups\.{place}") for place in (r"(\d+)", r"0\.(\d+)"))
        init_width = weights["decoder.stem.weight"].shape[0]
    except (ValueError, KeyError, IndexError) as error:
        raise WeightsError(f"{path}: {error}; expected OpenAI's encoder.pkl and decoder.pkl") from None
    sizes = {"num_codes": head.shape[0], "width": stem.shape[0], "init_width": init_width}
    sizes |= {"num_groups": groups, "blocks_per_group": blocks}
    return {"kind": "dvae", "image_size": image_size or 256, **sizes}, weights


def _compvis(path: Path, image_size: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.suffix == ".safetensors":
        table: dict[str, Any] = archive.load(path)
        return from_names(path, _first_stage(table), image_size or 256, _usual_factor(table))
    table = {}

    def select(content: Any) -> dict[str, StoredTensor]:
        table.update(archive.state_dict(content))
        return _first_stage(table)

    stored = archive.read(path, select)
    return from_names(path, stored, image_size or 256, _usual_factor(table))


def is_xl(table: Iterable[Any]) -> bool:
    """Whether tensors of these names, as CompVis has them, are those of Stable Diffusion XL.

    Its text encoders are named as in SD-Turbo, a Stable Diffusion 2; at full resolution its U-Net has no attention.
    """
    names = {str(name) for name in table}
    return any(name.startswith(XL_READERS) for name in names) and not any(name.startswith(_FULL) for name in names)


def _usual_factor(table: dict[Any, Any]) -> float:
    """What the latents of KL-f8 are multiplied by in the system whose tensors these are, whose file does not say it."""
    return SCALING_FACTOR_XL if is_xl(table) else SCALING_FACTOR


def from_names(
    path: Path, stored: dict[str, Tensor], image_size: int, usual_factor: float = SCALING_FACTOR
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The section and the weights of an autoencoder with CompVis' names, and its scale_factor if there is one.

    path: where they are from, for errors. usual_factor: of KL-f8 if there is none. Raises WeightsError where they are
    of no autoencoder.
    """
    stored = dict(stored)
    factor = stored.pop("scale_factor", None)
    section = _sizes(path, stored, image_size)
    if section["kind"] == "autoencoder_kl" and factor is None:
        known = section["latent_channels"] == 4 and len(section["channel_mult"]) == 4
        factor = torch.tensor(usual_factor if known else 1.0, dtype=torch.float64)
    if section["kind"] == "vqgan":
        return section, from_compvis(stored, None)
    if factor.numel() != 1:
        raise WeightsError(f"{path}: scale_factor must be one number, got {factor.numel()}; download it again")
    return section, from_compvis(stored, _factor(path, float(factor)))


def _factor(path: Path, factor: float) -> float:
    """What latents are multiplied by. Raises WeightsError for what would make nothing of them."""
    if not (math.isfinite(factor) and factor > 0):
        raise WeightsError(f"{path}: the factor of its latents must be finite and above 0, got {factor}")
    return factor


def _first_stage(table: dict[Any, Any]) -> dict[str, Any]:
    """The tokenizer of a checkpoint, without prefix and without what belongs to the training."""
    prefix = "first_stage_model."
    inside = {
        n.removeprefix(prefix): value for n, value in table.items() if isinstance(n, str) and n.startswith(prefix)
    }
    if inside and "scale_factor" in table:
        inside["scale_factor"] = table["scale_factor"]
    found = inside or dict(table)
    found = {name: value for name, value in found.items() if not str(name).startswith(_TRAINING)}
    if not any(_OWN.match(str(name)) for name in found):
        is_of = next((what for start, what in _OTHERS.items() if any(str(n).startswith(start) for n in table)), None)
        raise WeightsError(f"it is {is_of or 'of no model known here'}; expected {_EXPECTED}")
    return found


def _diffusers(home: Path, image_size: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _config(home / "config.json")
    weights = _renamed(home, archive.load(archive.find(home, "diffusion_pytorch_model")))
    section = _sizes(home, weights, image_size or config.get("sample_size") or 256)
    section["norm_groups"] = config.get("norm_num_groups", 32)
    if section["kind"] != _CLASSES[config["_class_name"]]:
        raise WeightsError(f"{home}: config.json says {config['_class_name']}, the weights are of {section['kind']}")
    if section["kind"] == "autoencoder_kl":
        channels, factor = section["latent_channels"], _factor(home, config.get("scaling_factor") or SCALING_FACTOR)
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
        std = config.get("latents_std") or [1.0] * channels
        weights["scale.mean"] = torch.tensor(mean, dtype=torch.float64).float()
        weights["scale.std"] = (torch.tensor(std, dtype=torch.float64) / factor).float()
    return section, weights


def _renamed(home: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`from_diffusers`, whose errors say which folder they are of."""
    try:
        return from_diffusers(weights)
    except ValueError as error:
        raise WeightsError(f"{home}: {error}") from None


def _config(path: Path) -> dict[str, Any]:
    config = archive.table(path)
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise WeightsError(f"{path} is of {name!r:.60}; expected one of {', '.join(_CLASSES)}")
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_type": "group"}
    wrong = [key for key, value in fixed.items() if config.get(key, value) != value]
    if wrong:
        raise WeightsError(f"{path}: {wrong[0]} is {config[wrong[0]]!r:.60}, expected {fixed[wrong[0]]!r}")
    return config


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """How many there are of what a pattern numbers. Raises WeightsError where a number is left out."""
    numbers = {int(match[1]) for name in weights if (match := re.match(rf"{pattern}\.", name))}
    if numbers and max(numbers) >= len(numbers):
        raise WeightsError(f"its names count {pattern!r} up to {max(numbers)}, but there are {len(numbers)}")
    return len(numbers)


def _sizes(path: Path, weights: dict[str, Tensor], image_size: int) -> dict[str, Any]:
    """The section of an autoencoder with CompVis' names, from its shapes. Its GroupNorm always has 32 groups."""
    try:
        width, levels = weights["encoder.conv_in.weight"].shape[0], _count(weights, r"encoder\.down\.(\d+)")
        channels = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        latent_channels, code_dim = weights["decoder.conv_in.weight"].shape[1], weights["quant_conv.weight"].shape[0]
        attends = [level for level in range(levels) if _count(weights, rf"encoder\.down\.{level}\.attn\.(\d+)")]
        layout = {
            "width": width,
            "norm_groups": 32,
            "channel_mult": [value // width for value in channels],
            "blocks_per_level": _count(weights, r"encoder\.down\.0\.block\.(\d+)"),
            "attn_resolutions": [image_size >> level for level in attends],
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: an autoencoder without {error}; expected {_EXPECTED}") from None
    head = {"image_size": image_size, "latent_channels": latent_channels}
    for name, quantizer in (("embedding", "vector"), ("embed", "gumbel")):
        if f"quantize.{name}.weight" in weights:
            codes = {"num_codes": len(weights[f"quantize.{name}.weight"]), "code_dim": code_dim}
            return {"kind": "vqgan", "quantizer": quantizer, **head, **codes, **layout}
    return {"kind": "autoencoder_kl", **head, **layout}


def recipe_of(name: str, section: dict[str, Any], licence: str) -> Recipe:
    """A recipe of the tokenizer alone."""
    papers = {"dvae": "arXiv:2102.12092", "vqgan": "arXiv:2012.09841", "autoencoder_kl": "arXiv:2112.10752"}
    facts = {"paper": papers[section["kind"]], "image_size": section["image_size"], "licence": licence}
    return Recipe(name=name, parts={"tokenizer": section}, **facts)


def _check(path: Path, section: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises WeightsError unless the model that the sizes make asks for exactly these tensors."""
    try:
        wrong = misfits(recipe_of("imported/check", section, ""), "tokenizer", weights)
    except ValueError as error:
        raise WeightsError(f"{path}: a model of its sizes cannot be built: {error}") from None
    if wrong:
        first, asked, held = wrong[0]
        raise WeightsError(
            f"{path}: {len(wrong)} tensors do not fit a {section['kind']}, first {first:.80}: expected "
            f"{asked}, got {held}; the file must hold one whole tokenizer"
        )


def save_diffusers(out: Path, section: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Writes a folder that diffusers' `VQModel` or `AutoencoderKL` loads with `from_pretrained`.

    Raises WeightsError for a tokenizer that diffusers has no class for.
    """
    kind = section["kind"]
    name = next((name for name, ours in _CLASSES.items() if ours == kind), None)
    if name is None or section.get("quantizer", "vector") != "vector" or section.get("cosine"):
        raise WeightsError(
            f"diffusers has no class for this {kind}; expected an autoencoder_kl, or a vqgan with quantizer 'vector' "
            "compared by distance"
        )
    weights = {key: value for key, value in weights.items() if not key.startswith("quantize.ema_")}
    section = defaults("tokenizer", kind) | section
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / _WEIGHTS, to_diffusers(weights))
    config = autoencoder_layout(section) | {"_class_name": name}
    if kind == "vqgan":
        config |= {"num_vq_embeddings": section["num_codes"], "vq_embed_dim": section["code_dim"]}
    else:
        config |= _scaling(weights["scale.mean"], weights["scale.std"])
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def autoencoder_layout(section: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a tokenizer, all of them given, in the words of diffusers' AutoencoderKL and VQModel."""
    size, mult = section["image_size"], list(section["channel_mult"])
    attends = [size >> level in section["attn_resolutions"] for level in range(len(mult))]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "sample_size": size,
        "latent_channels": section["latent_channels"],
        "block_out_channels": [section["width"] * value for value in mult],
        "layers_per_block": section["blocks_per_level"],
        "norm_num_groups": section["norm_groups"],
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attends)],
    }


def _scaling(mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Diffusers' words for the latent scale: one factor where the channels share it, else the two lists."""
    if bool((mean != 0).any()) or bool((std != std[0]).any()):
        return {"scaling_factor": 1.0, "latents_mean": mean.tolist(), "latents_std": std.tolist()}
    exact = 1 / std[0].double().item()
    shortest = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
    return {"scaling_factor": next(f for f in shortest if torch.tensor(1 / f, dtype=torch.float64).float() == std[0])}
