"""Whether the parts of a diffusion recipe fit each other, what they are trained on, and the objective.

It does not know how they are trained.
"""

from typing import Any

import torch

from ...pipeline.denoising import denoiser_of
from ...pipeline.drawing import check_sampling
from ...pipeline.recipe import Recipe, is_pretrained
from ..objectives import diffusion as objective
from ..run import Stage, training_of
from ..sources import classes_of
from .contract import ONE_WORDING, SPLIT_WORDS


def problem(recipe: Recipe, parts: dict[str, Any], config: Stage) -> str:
    """See `DiffusionStage.problem`; what is wrong and what to write, or ""."""
    prior, width = parts["prior"], getattr(parts.get("text"), "width", None)
    denoiser_of(recipe, prior)  # raises for the noise
    weights = error_weights(recipe, config)
    try:
        objective.snr_weight(torch.ones(1), **weights)
        check_sampling(recipe, "text" in parts or prior.num_classes is not None)
    except ValueError as error:
        return str(error)
    if recipe.diffusion.zero_terminal and weights["target"] == "eps" and weights["weighting"] != "none":
        return (
            f"weights {weights['weighting']} of an error of eps are divided by the SNR, which ends at 0 with "
            "zero_terminal; write target: x_0 or v in its objective"
        )
    if prior.num_classes is not None and (wrong := _classes(recipe, parts)):
        return wrong
    whole = config.word("loss", "simple") == "vlb"
    if config.number("logit_std", 0) and (whole or prior.conv_out.out_channels == 2 * prior.in_channels):
        return "the variational bound is taken from timesteps that are drawn uniformly; leave logit_std out"
    if whole and ("tokenizer" in parts or {"target", "weighting", "gamma", "bound_weight"} & set(config.objective)):
        return "loss: vlb is the bound of 8-bit pixels, without a tokenizer and without weights; leave these out"
    if prior.embedding_dim is not None:
        return "it has no image embeddings; leave parts.prior.embedding_dim out"
    if width != prior.context_dim:
        return (
            "parts.prior.context_dim must be the width of parts.text, or null where there is none, "
            f"got {prior.context_dim} and {width}"
        )
    if width is None and (otherwise := _read_otherwise(config)):
        return f"it reads no captions, and {otherwise[0]} is of these; leave it out of its objective"
    if config.number("bpe_dropout", 0) and is_pretrained(recipe, "text"):
        return "bpe_dropout is of a vocabulary of `captions`, and parts.text has its own; leave it out"
    spec = parts["tokenizer"].spec if "tokenizer" in parts else None
    if spec and (spec.kind != "latents" or len(spec.shape) != 3):
        return (
            f"diffusion needs latents (C, h, w), and the tokenizer gives {spec.kind} of shape {tuple(spec.shape)}; "
            "take an autoencoder_kl or vq_latents, or leave the tokenizer out to learn pixels"
        )
    channels, *places = spec.shape if spec else (3, recipe.image_size, recipe.image_size)
    read, given = prior.in_channels, prior.conv_out.out_channels
    if read != channels or given not in (channels, 2 * channels):
        return (
            f"{'the tokenizer gives' if spec else 'pictures have'} {channels} channels, the prior reads {read} and "
            f"gives {given}; write parts.prior.in_channels={channels}, and leave out_channels out, or write twice "
            "as many for learned variances"
        )
    if config.number("bound_weight", 0) and given == channels:
        return "bound_weight is of learned variances; write twice as many parts.prior.out_channels, or leave it out"
    if any(place % prior.factor for place in places):
        return f"the prior halves its grid to 1/{prior.factor}, which must divide {places}; shorten channel_mult"
    return ""


def _classes(recipe: Recipe, parts: dict[str, Any]) -> str:
    """Why the prior's classes are not those of the data's labels; one above them would stand for none at all."""
    given, data = parts["prior"].num_classes, training_of(recipe).data
    if "text" in parts:
        return "a prior is conditioned on captions or on classes; leave out parts.text, or parts.prior.num_classes"
    if given != classes_of(data):
        labels = f"labels of {classes_of(data)} classes" if classes_of(data) else "no labels"
        return f"the data, {data.kind}, have {labels}, got parts.prior.num_classes={given}; correct it, or leave it out"
    return ""


def error_weights(recipe: Recipe, config: Stage) -> dict[str, Any]:
    """How an error is weighted: see `objectives.diffusion.snr_weight`."""
    return {
        "target": config.word("target", recipe.diffusion.prediction),
        "weighting": config.word("weighting", "none"),
        "gamma": config.number("gamma", 0) if "gamma" in config.objective else None,
    }


def _read_otherwise(config: Stage) -> list[str]:
    """The knobs by which captions are read in training otherwise than as they are."""
    return [knob for knob in (*ONE_WORDING, *SPLIT_WORDS) if config.number(knob, 0)]
