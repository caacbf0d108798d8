"""Stable Diffusion 1 and 2 as published (Rombach 2022, arXiv:2112.10752), read: the folders of diffusers, with unet/,
vae/, text_encoder/, tokenizer/ and scheduler/, and the single file of CompVis.

All parts are known and checked against a recipe before any is built, so a file can ask for no more memory than it has.
A safety checker and what else lies there is left out.

It does not know how tensors are renamed, nor how the system is sampled.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..priors.schedules import new_schedule
from ..tokenizers.captions import CaptionTokenizer
from . import archive, caption_files, checkpoint, convert_unet, published
from .convert_scheduler import noise_of, sampling_of
from .convert_unet_config import clip_text_arguments, unet_arguments
from .denoising import denoiser_of
from .recipe import Captions, Diffusion, Recipe, check_name
from .unpickle import StoredTensor, WeightsError
from .whole_file import replaced

Weights = dict[str, Tensor]

_FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_UNET, _READERS = "model.diffusion_model.", ("cond_stage_model.", published.XL_READERS)  # the latter read text
_READ: dict[str, tuple[str, ...]] = {"tokenizer": (), "text": ("captions",), "prior": ("tokenizer", "text", "captions")}
_SAMPLING = {"num_steps": 25, "guidance_scale": 7.5}
_DAMAGE = (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError, ValueError, RuntimeError)


class _Found(NamedTuple):
    """What a folder or a file holds: sections of a recipe, and tensors by the names that they have there."""

    sections: dict[str, dict[str, Any]]
    weights: dict[str, Weights]
    diffusion: dict[str, Any]
    captions: CaptionTokenizer
    sampling: dict[str, Any]


@dataclass(frozen=True)
class System:
    """A recipe, the weights of its parts in the type that they were stored in, and the tokenizer of its captions."""

    recipe: Recipe
    weights: dict[str, Weights]
    captions: CaptionTokenizer

    @property
    def card(self) -> dict[str, Any]:
        """The parts' hashes, as the card of a model folder has them."""
        return {"parts": {part: {"hash": checkpoint.part_hash(found)} for part, found in self.weights.items()}}

    def build(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The parts, in evaluation mode, gradients off; where the type is the stored one, the weights themselves."""
        parts = {}
        for part, weights in self.weights.items():
            module = checkpoint.outline(self.recipe, part, len(weights))
            laid = {name: _laid(weights[name], like) for name, like in module.state_dict().items()}
            module.load_state_dict(laid, strict=True, assign=True)
            parts[part] = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return parts

    def save(self, folder: Path, source: str) -> None:
        """Makes a model folder. source: where the weights are from, for the card."""
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / "captions.json") as temporary:
            self.captions.save(temporary)
        noise = {"diffusion": self.recipe.diffusion.model_dump()}
        hashes = {"captions": checkpoint.file_hash(folder / "captions.json")}
        for part, read in _READ.items():
            identity = {"part": self.recipe.parts[part]} | (noise if part == "prior" else {})
            facts = {"source": source, "identity": identity}
            facts["trained_against"] = {other: hashes[other] for other in read}
            hashes[part] = checkpoint.save_part(folder, self.recipe, part, self.weights[part], **facts)


def _laid(value: Tensor, like: Tensor) -> Tensor:
    """A value in the layout of memory that the module was built with, which for convolutions may be channels last."""
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def is_system(path: Path) -> bool:
    """Whether a folder or a file looks like a whole system, neither a model folder of ours nor a tokenizer alone."""
    if path.is_dir():
        return not (path / "card.json").exists() and ((path / "model_index.json").is_file() or (path / "unet").is_dir())
    if path.suffix == ".safetensors":
        names = archive.names(path)
    else:
        names = set()

        def look(content: Any) -> dict[str, StoredTensor]:
            names.update(archive.state_dict(content))
            return {}

        archive.read(path, look)
    return all(any(name.startswith(heads) for name in names) for heads in (_UNET, _READERS))


def load(
    path: Path,
    name: str = "imported/stable-diffusion",
    licence: str = "not stated",
    image_size: int | None = None,
    prediction: str | None = None,
    tokenizer: Path | None = None,
) -> System:
    """A published system, from a folder of diffusers or a single file of CompVis.

    image_size: H = W, by default what the U-Net was trained at (a file: 512 for eps, 768 for v). prediction: "eps" or
    "v", which a file does not say; needed for one of Stable Diffusion 2, eps for one of 1. tokenizer: a folder with
    CLIP's tokenizer for a file, by default that of open_clip. Raises WeightsError for what is missing or of another
    model.
    """
    if path.is_dir() and (prediction is not None or tokenizer is not None):
        raise ValueError(
            f"{path} says itself what it predicts and has a tokenizer; leave --prediction and --tokenizer out"
        )
    check_name(name)
    try:
        found = _folder(path, image_size) if path.is_dir() else _file(path, image_size, prediction, tokenizer)
        text = found.sections["text"]
        recipe = Recipe(
            name=name,
            paper="arXiv:2112.10752",
            image_size=found.sections["tokenizer"]["image_size"],
            captions=Captions(vocab_size=text["text_vocab"] - 2, context_length=text["text_length"] - 2),
            parts=found.sections,
            frozen=["text"],  # as when it was trained
            licence=licence,
            sampling={**_SAMPLING, **found.sampling},
            diffusion=Diffusion(**found.diffusion),
        )
        weights = {part: _renamed(recipe, part, given) for part, given in found.weights.items()}
        _check(recipe, weights, found.captions)
    except _DAMAGE as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise WeightsError(f"{path} is no Stable Diffusion that can be read: {kind}{error!s:.400}") from None
    return System(recipe, weights, found.captions)


def _check(recipe: Recipe, weights: dict[str, Weights], captions: CaptionTokenizer) -> None:
    """Raises ValueError unless all is of one system."""
    denoiser_of(recipe, lambda x_t, t, condition: x_t)
    halvings = sum(len(recipe.parts[part]["channel_mult"]) - 1 for part in ("tokenizer", "prior"))
    if recipe.image_size % 2**halvings:
        raise WeightsError(f"its image size must be a multiple of {2**halvings}, got {recipe.image_size}; give another")
    read, given = recipe.parts["prior"]["context_dim"], recipe.parts["text"]["width"]
    if read != given:
        raise WeightsError(f"its prior looks at tokens of width {read}, its text encoder gives {given}")
    for part, tensors in weights.items():
        for tensor, asked, held in checkpoint.misfits(recipe, part, tensors)[:1]:
            raise WeightsError(f"its {part} does not fit: {tensor:.80}: expected {asked}, got {held}")
        for tensor, value in tensors.items():
            if not value.is_floating_point():
                raise WeightsError(
                    f"its {part} must have weights of floating point, got {value.dtype} for {tensor:.80}"
                )
    known, given = captions.vocab_size, recipe.captions.vocab_size
    if known > given or (known < given and not captions.padded):  # start and end follow at once
        raise WeightsError(
            f"its tokenizer has {known} ids and its text encoder {given}, start and end aside; take those of one model"
        )


def _renamed(recipe: Recipe, part: str, weights: Weights) -> Weights:
    """The tensors of a part by our names, from whichever they have. The tokenizer has got them already."""
    network = checkpoint.outline(recipe, part, len(weights))
    if part == "prior":
        compvis = "input_blocks.0.0.weight" in weights
        rename = convert_unet.unet_from_compvis if compvis else convert_unet.unet_from_diffusers
        return rename(weights, network)
    if part == "text":
        openclip = "positional_embedding" in weights
        rename = convert_unet.clip_text_from_openclip if openclip else convert_unet.clip_text_from_transformers
        return rename(weights, network)
    return weights


def _folder(path: Path, image_size: int | None) -> _Found:
    index = _json(path / "model_index.json")
    if index["_class_name"] not in _PIPELINES:
        alone = any((path / part).is_dir() for part in ("vae", "vqvae"))
        raise WeightsError(
            f"model_index.json is of {index['_class_name']!r:.60}; expected {', '.join(_PIPELINES)}"
            + ("; its autoencoder may be read alone, by kartina convert --part tokenizer" if alone else "")
        )
    missing = [name for name in _FOLDERS if not (path / name).is_dir()]
    if missing:
        raise WeightsError(f"it has no {', no '.join(missing)}, of {', '.join(_FOLDERS)}; download the whole folder")
    config, text = (_json(path / part / "config.json") for part in ("unet", "text_encoder"))
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    levels = len(_json(path / "vae" / "config.json")["block_out_channels"])
    vae, tokenizer = published.load(path / "vae", image_size or _places(config) * 2 ** (levels - 1))
    arguments = clip_text_arguments(text)
    captions, pad = caption_files.read(path / "tokenizer", arguments["text_length"] - 2)
    sections = {
        "tokenizer": vae,
        "text": {"kind": "clip_text", **arguments, "pad": _pad(arguments, pad)},
        "prior": {"kind": "unet", **_plain(unet_arguments(config))},
    }
    weights = {
        "tokenizer": tokenizer,
        "text": archive.load(archive.find(path / "text_encoder", "model", "pytorch_model")),
        "prior": archive.load(archive.find(path / "unet", "diffusion_pytorch_model")),
    }
    return _Found(sections, weights, noise_of(scheduler), captions, sampling_of(scheduler))


def _places(config: Mapping[str, Any]) -> int:
    """Places a side that a U-Net was trained at.

    Folders that were made before diffusers 0.9 may say 32, as LDM's configs do, where no smaller model than one of 64
    was published: diffusers reads them so too.
    """
    made = [int(number) for number in re.findall(r"\d+", str(config.get("_diffusers_version", "")))[:2]]
    size: int = config["sample_size"]
    return max(size, 64) if made and made < [0, 9] else size


def _file(path: Path, image_size: int | None, prediction: str | None, tokenizer: Path | None) -> _Found:
    stored = archive.load(path) if path.suffix == ".safetensors" else archive.read(path, _without_average)
    if published.is_xl(stored):
        raise WeightsError(
            "it is of Stable Diffusion XL, of which the autoencoder alone is read, by kartina convert --part tokenizer"
        )
    weights = convert_unet.split_single_file(stored)
    missing = [part for part, found in weights.items() if not found]
    if missing:
        raise WeightsError(f"it has no {' and no '.join(missing)}; give a file with the whole system")
    first = "embeddings.token_embedding.weight" in {n.removeprefix("text_model.") for n in weights["text"]}
    if prediction not in ("eps", "v", *((None,) if first else ())):
        raise WeightsError(
            f"a file of Stable Diffusion 2 does not say what it predicts, got {prediction!r:.20}; give eps (models of "
            "512 pixels) or v (of 768), as in `kartina convert FILE OUT --prediction v`"
        )
    prediction = prediction or "eps"
    betas = stored.get("betas", torch.empty(0))
    near = 4 * torch.finfo(betas.dtype).eps if betas.is_floating_point() else 0.0  # they may be stored as halves
    known = new_schedule("scaled_linear").betas
    if "betas" in stored and not (betas.shape == known.shape and torch.allclose(betas.double(), known, near)):
        raise WeightsError("its betas are not those of Stable Diffusion, linear in their roots from 0.00085 to 0.012")
    first_stage = weights["tokenizer"] | ({"scale_factor": stored["scale_factor"]} if "scale_factor" in stored else {})
    vae, first_stage = published.from_names(path, first_stage, image_size or (512 if prediction == "eps" else 768))
    text = _text_sizes(weights["text"], first)
    length = text["text_length"] - 2
    captions = caption_files.of_open_clip(length) if tokenizer is None else caption_files.read(tokenizer, length)[0]
    sections = {"tokenizer": vae, "text": text, "prior": _prior_sizes(weights["prior"], first)}
    noise = {"schedule": "scaled_linear", "prediction": prediction}
    return _Found(sections, weights | {"tokenizer": first_stage}, noise, captions, sampling_of({}))


def _prior_sizes(weights: Weights, first: bool) -> dict[str, Any]:
    """The section of a U-Net with CompVis' names, from its shapes; heads are 8 (Stable Diffusion 1) or 64 wide (2)."""
    step = min(_numbers(weights, r"input_blocks\.(\d+)\.0\.op\."))  # the first change of size ends the first level
    levels = (max(_numbers(weights, r"input_blocks\.(\d+)\.")) + 1) // step
    width, in_channels = weights["input_blocks.0.0.weight"].shape[:2]
    starts = [f"input_blocks.{level * step + 1}" for level in range(levels)]
    channels = [weights[f"{start}.0.out_layers.3.weight"].shape[0] for start in starts]
    middle = "middle_block.1.transformer_blocks"
    return {
        "kind": "unet",
        "in_channels": in_channels,
        "out_channels": weights["out.2.weight"].shape[0],
        "width": width,
        "channel_mult": [channel // width for channel in channels],
        "blocks_per_level": step - 1,
        "attn_levels": [level for level, start in enumerate(starts) if f"{start}.1.norm.weight" in weights],
        "num_heads": [8 if first else channel // 64 for channel in channels],
        "context_dim": weights[f"{middle}.0.attn2.to_k.weight"].shape[1],
        "depth": len(_numbers(weights, rf"{middle}\.(\d+)\.")),
    }


def _text_sizes(weights: Weights, first: bool) -> dict[str, Any]:
    """The section of a text encoder from its shapes: CLIP's (Stable Diffusion 1), or OpenCLIP's without a block (2)."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    words = "embeddings.token_embedding.weight" if first else "token_embedding.weight"
    places = "embeddings.position_embedding.weight" if first else "positional_embedding"
    blocks = _numbers(plain, r"encoder\.layers\.(\d+)\." if first else r"transformer\.resblocks\.(\d+)\.")
    vocab, width = plain[words].shape
    if not first and not {"text_projection", "logit_scale"} & plain.keys():
        raise WeightsError(
            "its text encoder has neither text_projection nor logit_scale, so it was changed, and whether it still has "
            "the last block, which Stable Diffusion 2 does not read, cannot be told; take the file as published"
        )
    return {
        "kind": "clip_text",
        "text_vocab": vocab,
        "text_length": plain[places].shape[0],
        "width": width,
        "depth": len(blocks) if first else len(blocks) - 1,
        "num_heads": width // 64,
        "quick_gelu": first,
        "pad": None if first else 0,
    }


def _numbers(weights: Weights, pattern: str) -> set[int]:
    return {int(found[1]) for name in weights if (found := re.match(pattern, name))}


def _without_average(content: Any) -> dict[str, StoredTensor]:
    """The tensors of a file but the running average, which is as large as the U-Net."""
    return {name: value for name, value in archive.state_dict(content).items() if not name.startswith("model_ema.")}


def _pad(arguments: dict[str, Any], pad: int) -> int | None:
    return None if pad == arguments["text_vocab"] - 1 else pad


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """As YAML gives it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path.parent.name}/{path.name} is missing; download the whole folder")
    return archive.table(path)
