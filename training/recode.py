"""A DALL-E transformer over another tokenizer: what it knows of codes goes over to those that stand in their places.

Both tokenizers read the same pictures. A new code k stands where old codes j stood, for the share P(j | k) of its
places, and in these takes the share P(k | j) of what j had. So the new rows of the embedding and of the head are the
means of the old ones by P(j | k), and the bias of the head is the mean of b_j + ln P(k | j), by Jensen's inequality a
lower bound of the logit that would give k its share of what each j has.

It does not know how either was trained. What it makes is to be trained further, with `kartina train --from`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipeline import checkpoint, notices
from ..pipeline.checkpoint import ModelError
from ..pipeline.recipe import Recipe, build
from ..pipeline.terminal import followed
from .run import training_of
from .sources import source_of
from .stages.contract import read_images
from .warm_start import copy_part

_BATCH = 128


@torch.no_grad()
def recode(model: Path, tokenizer: Path, out: Path, pictures: int, shards: Path | None, device: str) -> tuple[int, int]:
    """Writes to the folder `out` the model with the tokenizer of another folder, and the prior over its codes.

    pictures: at most so many of the prior's training data, or of `shards`, are read. Returns how many of the new codes
    were seen, and of how many; the others begin at the mean of all, and are hardly drawn. Raises ModelError for a prior
    that is no DALL-E transformer, for tokenizers of other pictures or grids, for a folder that is there, and where no
    picture can be read.
    """
    if out.exists():
        raise ModelError(f"{out} is there already; name a new folder")
    recipe, theirs = checkpoint.load_recipe(model), checkpoint.load_recipe(tokenizer)
    if recipe.parts.get("prior", {}).get("kind") != "dalle":
        raise ModelError(f"{model}: only a prior of kind dalle has rows for codes; name such a model")
    old, new = (checkpoint.load_tokenizer(folder, device)[1] for folder in (model, tokenizer))
    if new.spec.kind != "codes" or (recipe.image_size, old.spec.shape) != (theirs.image_size, new.spec.shape):
        raise ModelError(
            f"{tokenizer}: expected codes on a grid of {old.spec.shape} for pictures of {recipe.image_size}, "
            f"got {new.spec.kind} of {new.spec.shape} for {theirs.image_size}; train one of that size"
        )
    ours = _joined(recipe, theirs, new.spec.vocabulary)
    cards = checkpoint.read_card(model), checkpoint.read_card(tokenizer)
    ours = ours.model_copy(
        update={"licence": notices.joined(name for card in cards for name in notices.of_model(card))}
    )
    data = training_of(recipe).data_of("prior")
    if shards is not None:
        data = data.model_copy(update={"kind": "shards", "shards": str(shards), "cache": None})
    counts = _counted(source_of(recipe, data), old, new, pictures, torch.device(device))
    prior = build(ours, "prior")
    weights = checkpoint.load_weights(model, "prior")
    own = ("code_embedding.weight", "image_head.weight", "image_head.bias")
    embedding, head, bias = (weights[name].float() for name in own)
    rows = dict(zip(own, _rows(counts, embedding, head, bias), strict=True))
    prior.load_state_dict({name: value.float() for name, value in weights.items()} | rows)
    for folder in (model, tokenizer):
        notices.copy(folder / "LICENSES", out)
    for part in cards[0]["parts"]:
        if part not in ("tokenizer", "prior"):
            copy_part(model, ours, part, out)
    digest = copy_part(tokenizer, ours, "tokenizer", out)
    entry = cards[0]["parts"]["prior"]
    against = entry.get("trained_against", {})
    was = {"prior": entry["hash"], "tokenizer": against.get("tokenizer")}
    checkpoint.write_text(out / "captions.json", (model / "captions.json").read_text(encoding="utf-8"))
    checkpoint.save_part(
        out, ours, "prior", checkpoint.export(prior), trained_against=against | {"tokenizer": digest}, recoded_from=was
    )
    return int((counts.sum(1) > 0).sum()), len(counts)


def _joined(recipe: Recipe, theirs: Recipe, vocabulary: int) -> Recipe:
    parts = recipe.parts | {"tokenizer": theirs.parts["tokenizer"]}
    parts["prior"] = recipe.parts["prior"] | {"num_codes": vocabulary}
    return Recipe.model_validate(recipe.model_dump() | {"parts": parts})


def _counted(source: Any, old: Any, new: Any, pictures: int, device: torch.device) -> Tensor:
    """How often each new code stands where each old one does, float32 (new codes, old codes)."""
    total = min(pictures, source.size or pictures)
    shape = new.spec.vocabulary, old.spec.vocabulary
    counts = torch.zeros(shape[0] * shape[1])
    for start in followed(range(0, total, _BATCH), "reading codes"):
        for images in read_images(source, range(start, min(start + _BATCH, total)), device):
            pairs = (new.encode(images).flatten() * shape[1] + old.encode(images).flatten()).cpu()
            counts.index_add_(0, pairs, torch.ones(len(pairs)))
    if not counts.any():
        raise ModelError("none of the pictures could be read; name shards with --data, and see `kartina data check`")
    return counts.view(shape)


def _rows(counts: Tensor, embedding: Tensor, head: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new rows of the embedding (new, D), of the head (new, D), and its bias (new,)."""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # P(old | new)
    given = counts / counts.sum(0, keepdim=True).clamp(min=1)  # P(new | old)
    rows = [share @ embedding, share @ head, share @ bias + torch.special.xlogy(share, given.clamp(min=1e-9)).sum(1)]
    unseen = counts.sum(1) == 0
    for row, fallback in zip(rows, (embedding.mean(0), head.mean(0), bias.min()), strict=True):
        row[unseen] = fallback
    return rows[0], rows[1], rows[2]
