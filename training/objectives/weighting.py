"""What the objectives of the tokenizers share: weighted sums over the images of a batch, and one check of shapes.

B images.

It does not know what is summed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Average = Callable[[Tensor], Tensor]  # a mean over a rank's samples -> the mean over those of all ranks


def weighted(loss: Tensor, weight: Tensor, shown: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """((sum of weight * loss, sum of weight), weighted means of what is shown, detached); everything (B,)."""
    weight = weight.to(loss.dtype)
    count = weight.sum()
    mean = weight / count.clamp(min=1e-12)
    with torch.no_grad():
        means = {name: (mean * each.detach()).sum() for name, each in shown.items()}
    return ((weight * loss).sum(), count), means


def check_images(owner: str, reconstruction: Tensor, image: Tensor, *each: Tensor) -> None:
    """Raises ValueError unless both are (B, C, H, W) of one shape and all others are (B,)."""
    if image.dim() != 4 or reconstruction.shape != image.shape or any(x.shape != image.shape[:1] for x in each):
        shapes = [tuple(x.shape) for x in (reconstruction, image, *each)]
        raise ValueError(
            f"{owner} needs reconstruction and image (B, C, H, W) of one shape, and one value (B,) for each image in "
            f"all that weighs or adds, got {shapes}; pass the batch as the tokenizer gave it"
        )
