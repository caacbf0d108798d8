"""Discriminators: PatchGAN of images (Isola 2017, arXiv:1611.07004, section 3.2.2 and appendix 6.1.2), the 70 x 70 one
by default, with the layout and the tensor names of CycleGAN's and VQ-GAN's published checkpoints; and the perceptron
that judges flat latents in an adversarial autoencoder (Makhzani 2015, arXiv:1511.05644, appendix A.1).

B images, C channels, H x W pixels, h x w patches that overlap; D the width of a flat latent, K classes.

They do not know what is real, nor any loss.
"""

from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .conv import group_norm


class _Discriminator(nn.Module):
    """What both share: of a tuple each is judged by itself, in one call, between whose passes DDP copies no buffers."""

    def forward(self, given: Tensor | tuple[Tensor, ...], *beside: Tensor) -> Any:
        """What `judge` says: logits (B, 1, ...) of a tensor, a tuple of them of a tuple."""
        if isinstance(given, tuple):
            return tuple(self.judge(each, *beside) for each in given)
        return self.judge(given, *beside)

    def judge(self, given: Tensor, *beside: Tensor) -> Tensor:
        """Logits (B, 1, ...)."""
        raise NotImplementedError


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe 2015, arXiv:1502.03167), in training by what all processes have together, of which
    each has as many: a step is the same on any number of devices. `nn.SyncBatchNorm` is so on GPUs alone.
    """

    def forward(self, image: Tensor) -> Tensor:
        alone = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1
        if alone or not self.training:
            return super().forward(image)
        given = image.float()
        mean = _of_all(given.mean((0, 2, 3)))
        given = given - mean[:, None, None]
        variance = _of_all(given.square().mean((0, 2, 3)))
        count = given.numel() // len(mean) * distributed.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (given * scale[:, None, None] + self.bias[:, None, None]).to(image.dtype)


class _Sum(torch.autograd.Function):
    """A value's sum over processes, each of which has the gradients of all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(ctx, gradient)


def _of_all(value: Tensor) -> Tensor:
    return _Sum.apply(value) / distributed.get_world_size()


class PatchDiscriminator(_Discriminator):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), one for each patch: high where it looks real.

    4x4 convolutions with stride 2, `depth` of them, whose widths double from `width` to at most 8 * width, and two with
    stride 1; leaky ReLU 0.2. norm: "batch" as published, of all processes' images, or "group", whose values hang on no
    other image; no norm follows the first and the last. Weights start as normal(0, 0.02). in_channels: 3, or 6 where an
    image is judged beside its condition, another image of its size (section 3.1). Raises ValueError for sizes that do
    not fit.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        depth: int = 3,
        norm: Literal["batch", "group"] = "batch",
        norm_groups: int = 32,
    ) -> None:
        if min(in_channels, width, depth) < 1 or norm not in ("batch", "group"):
            raise ValueError(
                "PatchDiscriminator needs in_channels, width and depth of at least 1 and norm 'batch' or 'group', got "
                f"{in_channels}, {width}, {depth} and {norm!r}; correct the recipe"
            )
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(depth):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=2 if i < depth - 1 else 1, padding=1, bias=False),
                BatchNorm(widths[i + 1]) if norm == "batch" else group_norm(widths[i + 1], norm_groups),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.outer = ("main.0", f"main.{len(self.main) - 1}")
        self.in_channels, self.depth = in_channels, depth
        self.apply(_start)

    @property
    def smallest(self) -> int:
        """The least H and W: those whose patches are one."""
        return 3 * 2**self.depth

    def judge(self, image: Tensor, condition: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if condition is not None:
            image = torch.cat([image, condition], dim=1)
        if image.dim() != 4 or image.shape[1] != self.in_channels or min(image.shape[2:]) < self.smallest:
            raise ValueError(
                f"PatchDiscriminator needs images (B, {self.in_channels}, H, W) with H and W of at least "
                f"{self.smallest}, got {tuple(image.shape)}; enlarge them, or build it with a smaller depth or other "
                "in_channels"
            )
        return self.main(image)


class LatentDiscriminator(_Discriminator):
    """Flat latents (B, D), and their labels (B,) where it is built for classes -> logits (B, 1): high where drawn.

    latent_dim: D. num_classes: 0, or K, of which one is given beside each latent as a one-hot vector (section 2.3).
    width, depth: of the hidden layers, with ReLU; two of 1,000 as published. Raises ValueError for sizes below these.
    """

    def __init__(self, latent_dim: int = 8, num_classes: int = 0, width: int = 1000, depth: int = 2) -> None:
        if min(latent_dim, width, depth) < 1 or num_classes < 0:
            raise ValueError(
                "LatentDiscriminator needs latent_dim, width and depth of at least 1 and num_classes of at least 0, "
                f"got {latent_dim}, {width}, {depth} and {num_classes}; correct the recipe"
            )
        super().__init__()
        widths = [latent_dim + num_classes, *[width] * depth]
        layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.main = nn.Sequential(*layers, nn.Linear(width, 1))
        self.outer = ("main.0", f"main.{len(self.main) - 1}")
        self.latent_dim, self.num_classes = latent_dim, num_classes

    def judge(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim or (labels is None) != (self.num_classes == 0):
            raise ValueError(
                f"LatentDiscriminator needs latents (B, {self.latent_dim}) and "
                f"{'labels (B,)' if self.num_classes else 'no labels'}, got {tuple(latents.shape)} and "
                f"{None if labels is None else tuple(labels.shape)}; give the tokenizer that latent_dim"
            )
        if labels is not None:
            latents = torch.cat([latents, F.one_hot(labels, self.num_classes).to(latents.dtype)], dim=1)
        return self.main(latents)


def _start(module: nn.Module) -> None:
    """Normal(0, 0.02) weights, normal(1, 0.02) gains of BatchNorm, biases 0, as in the published code."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
    if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
