"""A diffusion model of ours as a folder of which diffusers makes a `StableDiffusionPipeline`, or for a prior that fills
a mask its inpainting form, that paints the same; of a model without captions a `DDPMPipeline` (pixels) or an
`LDMPipeline` (latents).

It does not know how such a folder is read, see `stable_diffusion`. Guidance and the number of steps are arguments of
their pipeline, which such a folder cannot hold.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tokenizers.captions import CaptionTokenizer
from . import caption_files, checkpoint, published
from .built import check_whole
from .convert_scheduler import scheduler_config
from .convert_unet import clip_text_to_transformers, unet_to_diffusers
from .convert_unet_config import clip_text_config, unet_config
from .recipe import Recipe, RecipeError, defaults
from .whole_file import save_tensors


def save(model: Path, out: Path) -> None:
    """Writes the parts of a model folder to `out`, which is there already or not. Raises ModelError for parts that were
    not trained against each other, ValueError for a system that their pipelines cannot hold.
    """
    card, recipe = checkpoint.read_card(model), checkpoint.load_recipe(model)
    if "text" not in recipe.parts:
        check_whole(model, card, recipe)
        (_save_latents if "tokenizer" in recipe.parts else _save_pixels)(model, recipe, out)
        return
    kinds = {part: recipe.parts.get(part, {}).get("kind") for part in ("tokenizer", "text", "prior")}
    if kinds != {"tokenizer": "autoencoder_kl", "text": "clip_text", "prior": "unet"}:
        raise RecipeError(
            "diffusers' StableDiffusionPipeline needs a tokenizer autoencoder_kl, a text clip_text and a prior unet, "
            f"{recipe.name} has {', '.join(f'{part} {kind}' for part, kind in kinds.items())}; export another model"
        )
    scheduler = scheduler_config(recipe)  # before anything is written: not every recipe has one
    sizes = {part: {key: value for key, value in recipe.parts[part].items() if key != "kind"} for part in kinds}
    drawn = unet_config(sizes["prior"])["out_channels"]
    latent = (defaults("tokenizer", "autoencoder_kl") | sizes["tokenizer"])["latent_channels"]
    if drawn != latent:
        raise RecipeError(
            f"diffusers' StableDiffusionPipeline has no learned variances: its U-Net gives {latent} channels, those of "
            f"the latents, {recipe.name} gives {drawn}; export another model"
        )
    check_whole(model, card, recipe)
    weights = {part: checkpoint.load_weights(model, part) for part in kinds}
    text = checkpoint.outline(recipe, "text", len(weights["text"]))
    prior = unet_config(sizes["prior"]) | {"sample_size": recipe.image_size >> (len(_mult(recipe)) - 1)}
    published.save_diffusers(out / "vae", recipe.parts["tokenizer"], _one_factor(weights["tokenizer"]))
    _write(out / "unet", prior, "diffusion_pytorch_model", unet_to_diffusers(weights["prior"]))
    # Else transformers would keep the type that is stored, and diffusers makes the other parts float32.
    reading = clip_text_config(sizes["text"]) | {"dtype": "float32"}
    _write(out / "text_encoder", reading, "model", clip_text_to_transformers(weights["text"]))
    captions = CaptionTokenizer.load(model / "captions.json")
    reader = caption_files.write(out / "tokenizer", captions, text.text_vocab, text.pad)
    _json(out / "scheduler" / "scheduler_config.json", scheduler)
    fills = prior["in_channels"] > 2 * latent  # a mask and a picture stand beside the latents
    index = {
        "_class_name": "StableDiffusionInpaintPipeline" if fills else "StableDiffusionPipeline",
        "_diffusers_version": version("diffusers"),  # without it that for inpainting is not read
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", prior["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", reader],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    _json(out / "model_index.json", index)


def _save_pixels(model: Path, recipe: Recipe, out: Path) -> None:
    scheduler, prior = scheduler_config(recipe), _alone(recipe, "DDPMPipeline", 3, recipe.image_size)
    scheduler |= _clipping(recipe, scheduler["_class_name"])
    _save_alone(model, out, prior, scheduler, {"_class_name": "DDPMPipeline"})


def _save_latents(model: Path, recipe: Recipe, out: Path) -> None:
    section = recipe.parts["tokenizer"]
    if section["kind"] != "autoencoder_kl":
        raise RecipeError(
            f"diffusers' LDMPipeline takes a tokenizer autoencoder_kl here, {recipe.name} has {section['kind']}; export"
            " another model, or with --part tokenizer that alone"
        )
    latent = (defaults("tokenizer", "autoencoder_kl") | section)["latent_channels"]
    scheduler = scheduler_config(recipe)
    prior = _alone(recipe, "LDMPipeline", latent, recipe.image_size >> (len(_mult(recipe)) - 1))
    published.save_diffusers(out / "vqvae", section, _one_factor(checkpoint.load_weights(model, "tokenizer")))
    index = {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "AutoencoderKL"]}  # so they name it, of either kind
    _save_alone(model, out, prior, scheduler, index)


def _alone(recipe: Recipe, pipeline: str, channels: int, side: int) -> dict[str, Any]:
    """The config of a U-Net that nothing conditions. Raises RecipeError for another."""
    sizes = {key: value for key, value in recipe.parts["prior"].items() if key != "kind"}
    prior = unet_config(sizes) | {"sample_size": side}
    read, drawn, classes = prior["in_channels"], prior["out_channels"], sizes.get("num_classes")
    if classes is not None or (read, drawn) != (channels, channels):
        raise RecipeError(
            f"diffusers' {pipeline} draws {channels} channels without classes or learned variances, {recipe.name} reads"
            f" {read} channels, gives {drawn} and has {classes or 'no'} classes; export another, or --part tokenizer"
        )
    return prior


def _save_alone(
    model: Path, out: Path, prior: dict[str, Any], scheduler: dict[str, Any], index: dict[str, Any]
) -> None:
    _write(out / "unet", prior, "diffusion_pytorch_model", unet_to_diffusers(checkpoint.load_weights(model, "prior")))
    _json(out / "scheduler" / "scheduler_config.json", scheduler)
    parts = {"unet": ["diffusers", prior["_class_name"]], "scheduler": ["diffusers", scheduler["_class_name"]]}
    _json(out / "model_index.json", index | parts)


def _clipping(recipe: Recipe, scheduler: str) -> dict[str, Any]:
    """What makes a scheduler keep x_0 in [-1, 1], as ours does with pixels. Raises RecipeError where nothing does."""
    if scheduler == "DDPMScheduler":
        return {"clip_sample": True}
    if scheduler == "DPMSolverMultistepScheduler":
        return {"thresholding": True, "sample_max_value": 1.0}
    raise RecipeError(
        f"{recipe.name}: in diffusers' DDPMPipeline {scheduler} does not keep pixels in [-1, 1] as ours does, or is "
        "not called as it has to be; set sampling.sampler to ddpm, dpmpp_2m or dpmpp_2m_sde"
    )


def _mult(recipe: Recipe) -> tuple[int, ...]:
    section = recipe.parts["tokenizer"]
    return tuple(section.get("channel_mult", defaults("tokenizer", section["kind"])["channel_mult"]))


def _one_factor(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with one scale for all channels and no mean, all that their pipeline knows.

    A scale of its own for each channel goes into the two convolutions beside the latents: (m - mean) / std of a mean
    m, and of a logarithm of the variance l - 2 ln std.
    """
    mean, std = weights["scale.mean"].double(), weights["scale.std"].double()
    if not mean.any() and bool((std == std[0]).all()):
        return weights
    gain, still = torch.cat([1 / std, torch.ones_like(std)]), torch.zeros_like(std)
    shift = torch.cat([-mean / std, -2 * std.log()])
    into, back = weights["quant_conv.weight"].double(), weights["post_quant_conv.weight"].double()
    made = {
        "quant_conv.weight": into * gain.view(-1, 1, 1, 1),
        "quant_conv.bias": weights["quant_conv.bias"].double() * gain + shift,
        "post_quant_conv.weight": back * std.view(1, -1, 1, 1),
        "post_quant_conv.bias": weights["post_quant_conv.bias"].double() + back[:, :, 0, 0] @ mean,
        "scale.mean": still,
        "scale.std": still + 1,
    }
    return weights | {name: value.float() for name, value in made.items()}


def _write(folder: Path, config: dict[str, Any], stem: str, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_tensors(folder / f"{stem}.safetensors", weights)
    _json(folder / "config.json", config)


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
