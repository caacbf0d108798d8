"""What objectives share: weighted sums over the samples of a batch, errors of pixels, and a check.

B samples.

It does not know what is summed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...layers.precision import full

ERRORS = ("l1", "l2")

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


def pixel_error(reconstruction: Tensor, image: Tensor, error: str) -> Tensor:
    """Of each image (B, C, H, W) the mean absolute ("l1") or squared ("l2") error of its values, (B,)."""
    if error not in ERRORS:
        raise ValueError(f"an error of pixels is one of {', '.join(ERRORS)}, got {error!r:.40}; correct the recipe")
    difference = full(reconstruction) - full(image)
    return (difference.abs() if error == "l1" else difference.square()).mean(dim=(1, 2, 3))
