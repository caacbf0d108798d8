"""The contrastive loss of CLIP, for batches in which captions repeat (Radford 2021, arXiv:2103.00020, figure 3).

Small worlds have few captions, so one batch holds the same caption, or two of equal meaning, more than once: such
samples are not negatives of each other. Minimal wrong captions (one word changed) may stand beside the batch as hard
negatives, as in NegCLIP (Yuksekgonul 2023, arXiv:2210.01936), here only for the image that they belong to: a caption
that is wrong for one image may be right for another.

B samples, W wrong captions per sample, D embedding width.

It does not know the towers, the captions or the optimizer. It sees the samples it is given: gathering them over devices
is the caller's work.
"""

import math

import torch
from torch import Tensor

from ...layers.precision import full, without_autocast
from .weighting import weighted


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    groups: Tensor,
    wrong_text_features: Tensor | None,
    weight: Tensor,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Half the cross-entropy of finding each image's caption, and half that of finding each caption's image.

    image_features, text_features (B, D), of length 1; logit_scale () > 0, the factor itself and not its logarithm;
    groups (B, G) int64, numbers that are equal for captions that mean the same: first that of the sample's own, then of
    others that are true of its image, or own ones again; wrong_text_features (B, W, D) of length 1 or None, further
    candidates for the image of their own row; weight (B,) >= 0, where 0 also takes a sample out of the candidates.

    Returns ((sum of weight * loss, sum of weight), scalars), the scalars detached weighted means: `loss`; `chance`, the
    loss of a model that cannot tell candidates apart, ln(B) if all groups differ and nothing is wrong or weightless;
    `accuracy`, how often an image's own caption beats every other candidate (a tie does not).
    Computed in float32 at least. With distinct groups, no wrong captions and weight 1 it is open_clip's `ClipLoss`.
    Raises ValueError if shapes disagree.
    """
    _check(image_features, text_features, groups, wrong_text_features, weight)
    with without_autocast(image_features):
        image, text = full(image_features), full(text_features)
        scale = logit_scale.to(image.dtype)
        logits = scale * image @ text.T  # (B, B), a row per image
        true = _true(groups)
        by_image = logits.masked_fill(_barred(true, weight), -math.inf)
        by_text = logits.T.masked_fill(_barred(true.T, weight), -math.inf)
        if wrong_text_features is not None:
            wrong = scale * torch.einsum("bd,bwd->bw", image, full(wrong_text_features))
            by_image = torch.cat([by_image, wrong], dim=1)  # (B, B+W)
        right = logits.diagonal()
        loss = (by_image.logsumexp(1) + by_text.logsumexp(1)) / 2 - right  # (B,)
    with torch.no_grad():
        chance = (_ln_candidates(by_image) + _ln_candidates(by_text)) / 2
        own = torch.eye(by_image.shape[0], by_image.shape[1], dtype=torch.bool, device=loss.device)
        found = right > by_image.masked_fill(own, -math.inf).amax(1)
    return weighted(loss, weight, {"loss": loss, "chance": chance, "accuracy": found.to(loss.dtype)})


@torch.no_grad()
def clamp_logit_scale(log_scale: Tensor, maximum: float = 100.0) -> None:
    """Keep exp(log_scale) <= maximum, in place: call it on the model's `logit_scale` after each step (section 2.5)."""
    log_scale.clamp_(max=math.log(maximum))


def _true(groups: Tensor) -> Tensor:
    """(B, B) bool: the caption of sample j is true of the image of sample i."""
    own, found = groups[:, 0], torch.zeros(len(groups), len(groups), dtype=torch.bool, device=groups.device)
    for told in groups.unbind(1):  # one at a time: together they would take as many times the memory
        found |= told[:, None] == own[None, :]
    return found


def _barred(true: Tensor, weight: Tensor) -> Tensor:
    """(B, B) bool: column j is no candidate for row i. The diagonal always is one."""
    own = torch.eye(len(true), dtype=torch.bool, device=true.device)
    return (true | (weight == 0)[None, :]) & ~own


def _ln_candidates(logits: Tensor) -> Tensor:
    return (logits > -math.inf).sum(1).to(logits.dtype).log()


def _check(image: Tensor, text: Tensor, groups: Tensor, wrong: Tensor | None, weight: Tensor) -> None:
    batch = image.shape[:1]
    fits = image.ndim == 2 and text.shape == image.shape and groups.shape[:1] == batch and weight.shape == batch
    fits = fits and groups.ndim == 2 and groups.shape[1] > 0
    if fits and wrong is not None:
        fits = wrong.ndim == 3 and (wrong.shape[0], wrong.shape[2]) == tuple(image.shape)
    if not fits:
        shapes = [None if x is None else tuple(x.shape) for x in (image, text, groups, wrong, weight)]
        raise ValueError(
            "clip needs image (B, D), text (B, D), groups (B, G), wrong captions (B, W, D) or None and weight (B,), "
            f"got {shapes}; pass one row per sample"
        )
