"""The DALL-E loss: cross-entropy of text and of codes, weighted 1/8 and 7/8 (arXiv 2102.12092, Section 2.2).

Each kind is averaged over its own tokens before weighting. Pads are predicted too, as id 0: the published model
learns where a caption ends.

B samples, T text tokens, V text vocabulary, N codes, K number of codes.

It does not know the network, nor where the codes came from.
"""

import torch.nn.functional as F
from torch import Tensor

from ...layers.precision import full
from .weighting import weighted


def dalle(
    text_logits: Tensor,
    image_logits: Tensor,
    text: Tensor,
    codes: Tensor,
    weight: Tensor,
    text_weight: float = 1 / 8,
    image_weight: float = 7 / 8,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Nats per token. Separable: returns ((loss sum, count), {"text_loss", "image_loss"}), computed in float32.

    text_logits: (B, T, V); image_logits: (B, N, K); text: int64 (B, T); codes: int64 (B, N) or (B, h, w).
    weight: (B,), 0 for a sample that does not count; count is its sum. The named losses are weighted means, detached.
    """
    text_loss = nats(text_logits, text)  # (B,)
    image_loss = nats(image_logits, codes.flatten(1))
    loss = text_weight * text_loss + image_weight * image_loss
    return weighted(loss, weight, {"text_loss": text_loss, "image_loss": image_loss})


def nats(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of a sample's tokens, in nats and float32: logits (B, L, K), target int64 (B, L) -> (B,)."""
    # Flattened: over a transposed axis the softmax strides through memory, and was a fifth of a training step on CPU.
    each = F.cross_entropy(full(logits).flatten(0, 1), target.flatten(), reduction="none")
    return each.view(target.shape).mean(dim=1)
