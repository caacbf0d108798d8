"""The convolutional encoder and decoder of VQ-GAN and latent diffusion (Esser 2021, arXiv:2012.09841, table 7; Rombach
2022, arXiv:2112.10752, appendix G), and the plain autoencoder (Hinton 2006, doi:10.1126/science.1127647) made of them.

The tensors have the names of the published checkpoints.

B images of 3 x H x W pixels in [-1, 1]; C channels of latents on a grid of h x w, 2 ** (levels - 1) times smaller than
the image; D the width of a flat latent.

It does not know its loss, nor what corrupts an image before it.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.attention import SpatialAttention
from ..layers.conv import Down, ResBlock, Up, group_norm
from ..layers.precision import full
from .spec import LatentsSpec, check_image


@dataclass(frozen=True)
class Layout:
    """The sizes that an encoder and its decoder share.

    image_size: H = W. width: channels before the first level; level i has width * channel_mult[i] at image_size / 2**i
    pixels a side. blocks_per_level: of the encoder, the decoder has one more. attn_resolutions: the H of levels whose
    blocks are each followed by attention; the middle always has it. norm_groups: of every GroupNorm.
    Raises ValueError for sizes that do not fit.
    """

    image_size: int
    width: int
    channel_mult: Sequence[int]
    blocks_per_level: int
    attn_resolutions: Sequence[int]
    norm_groups: int

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions"):
            if not isinstance(getattr(self, name), list | tuple):
                raise ValueError(f"{name} must be a list, got {getattr(self, name)!r}; write e.g. {name}: [1, 2, 4]")
        sizes = (self.image_size, self.width, *self.channel_mult, self.blocks_per_level, self.norm_groups)
        if not self.channel_mult or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(
                "an autoencoder needs image_size, width, channel_mult, blocks_per_level and norm_groups as whole "
                f"numbers of at least 1, got {sizes}; correct the recipe"
            )
        if self.image_size % self.factor:
            raise ValueError(
                f"an autoencoder of {len(self.channel_mult)} levels needs image_size to be a multiple of "
                f"{self.factor}, got {self.image_size}; change image_size or the length of channel_mult"
            )
        resolutions = [self.image_size >> level for level in range(len(self.channel_mult))]
        if not set(self.attn_resolutions) <= set(resolutions):
            raise ValueError(
                f"attn_resolutions must be among the resolutions of the levels, {resolutions}, "
                f"got {list(self.attn_resolutions)}; correct the recipe"
            )

    @property
    def factor(self) -> int:
        """How much smaller the grid is than the image."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> int:
        """h = w."""
        return self.image_size // self.factor

    def features(self, channels: int) -> tuple[int, int, int]:
        """(C, h, w) of what encoder and decoder hand over. Raises ValueError for no channels."""
        if channels < 1:
            raise ValueError(f"an autoencoder needs latent_channels of at least 1, got {channels}; correct the recipe")
        return channels, self.grid, self.grid

    @property
    def widths(self) -> list[int]:
        """The channels of each level."""
        return [self.width * mult for mult in self.channel_mult]

    def level(self, index: int, n_in: int, blocks: int, resample: str = "") -> "Level":
        """Level `index` with the blocks of one side; resample: "down", "up" or neither, at its end."""
        attends = self.image_size >> index in self.attn_resolutions
        return Level(n_in, self.widths[index], blocks, attends, resample, self.norm_groups)

    def middle(self) -> nn.Sequential:
        """Block, attention, block at the smallest resolution."""
        width, groups = self.widths[-1], self.norm_groups
        layers = ("block_1", ResBlock(width, width, groups)), ("attn_1", SpatialAttention(width, groups))
        return nn.Sequential(OrderedDict([*layers, ("block_2", ResBlock(width, width, groups))]))


class Level(nn.Module):
    """Residual blocks, each followed by attention if the level has it, then a change of resolution if it has one."""

    def __init__(self, n_in: int, n_out: int, blocks: int, attends: bool, resample: str, norm_groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(n_out if j else n_in, n_out, norm_groups) for j in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(n_out, norm_groups) for _ in range(blocks if attends else 0))
        self.downsample = Down(n_out) if resample == "down" else nn.Identity()
        self.upsample = Up(n_out) if resample == "up" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, n_out, h, w)."""

    outer = ("conv_in", "conv_out")
    layout_by_precision = True  # see `training.parallel.lay_out`

    def __init__(self, layout: Layout, n_out: int) -> None:
        super().__init__()
        widths, last = [layout.width, *layout.widths], len(layout.widths) - 1
        self.conv_in = nn.Conv2d(3, layout.width, 3, padding=1)
        self.down = nn.ModuleList(
            layout.level(i, widths[i], layout.blocks_per_level, "down" if i < last else "") for i in range(last + 1)
        )
        self.mid = layout.middle()
        self.norm_out = group_norm(widths[-1], layout.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], n_out, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPU

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image.to(self.conv_in.weight.dtype))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, n_in, h, w) -> (B, n_out, H, W), of which the first three channels are the image."""

    outer = ("conv_in", "conv_out")
    layout_by_precision = True

    def __init__(self, layout: Layout, n_in: int, n_out: int = 3) -> None:
        super().__init__()
        widths, last = layout.widths, len(layout.widths) - 1
        self.conv_in = nn.Conv2d(n_in, widths[-1], 3, padding=1)
        self.mid = layout.middle()
        # Counted like the encoder's levels, so the last one comes first.
        self.up = nn.ModuleList(
            layout.level(i, widths[min(i + 1, last)], layout.blocks_per_level + 1, "up" if i else "")
            for i in range(last + 1)
        )
        self.norm_out = group_norm(widths[0], layout.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], n_out, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPU

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features.to(self.conv_in.weight.dtype)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class FlatBottleneck(nn.Module):
    """Two linear maps: features (B, C, h, w) -> (B, n_out), and a flat latent (B, D) -> features (B, C, h, w)."""

    outer = ("inward", "outward")

    def __init__(self, shape: tuple[int, int, int], n_out: int, latent_dim: int) -> None:
        super().__init__()
        self.shape = shape
        self.inward = nn.Linear(math.prod(shape), n_out)
        self.outward = nn.Linear(latent_dim, math.prod(shape))

    def flatten(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, n_out)."""
        return self.inward(features.flatten(1))

    def unflatten(self, latents: Tensor) -> Tensor:
        """(B, D) -> (B, C, h, w)."""
        return self.outward(latents.to(self.outward.weight.dtype)).unflatten(1, self.shape)


class LatentScale(nn.Module):
    """Mean and standard deviation of each channel of the latents, measured when training ends and kept with them.

    Latents are (B, C, ...); as built, it changes nothing, and is not `measured`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def measured(self) -> bool:
        """Whether the latents have mean 0 and deviation 1: a prior over them asks before it is trained."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    def forward(self, latents: Tensor) -> Tensor:
        """Latents as they come -> with mean 0 and standard deviation 1."""
        return (latents - self._wide(self.mean, latents)) / self._wide(self.std, latents)

    def inverse(self, scaled: Tensor) -> Tensor:
        """What `forward` gives -> the latents as they came."""
        return scaled * self._wide(self.std, scaled) + self._wide(self.mean, scaled)

    @torch.no_grad()
    def measure(self, count: Tensor, sums: Tensor, squares: Tensor) -> None:
        """Sets both, in place, from `latent_sums` added up over all batches and ranks.

        Raises ValueError when there are fewer than two values or a channel does not vary.
        """
        mean = sums / count
        variance = squares / count - mean.square()
        if not (count >= 2 and bool((variance > 1e-12).all())):
            raise ValueError(
                f"the latent scale needs two values of each channel or more, that vary, got {int(count)} values with "
                f"variances from {float(variance.min()):g}; measure over more images, or train longer"
            )
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt())

    @torch.no_grad()
    def forget(self) -> None:
        """Makes it change nothing, as built."""
        self.mean.zero_()
        self.std.fill_(1)

    @staticmethod
    def _wide(values: Tensor, latents: Tensor) -> Tensor:
        return values.to(latents.dtype).view(-1, *[1] * (latents.dim() - 2))


def latent_sums(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, C, ...) -> how many values a channel has (), their sums (C,) and sums of squares (C,), in float64."""
    values = latents.detach().double().transpose(0, 1).flatten(1)  # (C, N)
    count = torch.tensor(values.shape[1], dtype=torch.float64, device=values.device)
    return count, values.sum(1), values.square().sum(1)


class Autoencoder(nn.Module):
    """Images in [-1, 1] to latents and back, without a distribution over the latents.

    latent_channels: C at the bottleneck. latent_dim: None for latents (B, C, h, w), or D for flat ones (B, D), which
    two linear maps make and read. activation: "none", or "sigmoid" for latents in (0, 1), which a sparse autoencoder's
    KL asks for (Ng 2011, section 3). The other sizes: see `Layout`. Raises ValueError for another activation.
    """

    def __init__(
        self,
        image_size: int = 32,
        latent_channels: int = 4,
        latent_dim: int | None = None,
        activation: Literal["none", "sigmoid"] = "none",
        width: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
        blocks_per_level: int = 2,
        attn_resolutions: Sequence[int] = (),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if activation not in ("none", "sigmoid"):
            raise ValueError(f"Autoencoder needs activation 'none' or 'sigmoid', got {activation!r:.40}")
        self.activation = activation
        layout = Layout(image_size, width, channel_mult, blocks_per_level, attn_resolutions, norm_groups)
        shape = layout.features(latent_channels)
        self.image_size = image_size
        self.spec = LatentsSpec("latents", shape if latent_dim is None else (latent_dim,))
        self.encoder, self.decoder = Encoder(layout, latent_channels), Decoder(layout, latent_channels)
        self.flat = None if latent_dim is None else FlatBottleneck(shape, latent_dim, latent_dim)
        self.scale = LatentScale(self.spec.shape[0])

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> scaled latents, (B, C, h, w) or (B, D). Raises ValueError for others."""
        check_image(image, self.image_size, type(self).__name__)
        return self.scale(self._latents(image))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> image (B, 3, H, W), unclamped. Raises ValueError for latents of another shape."""
        self.spec.check(latents, type(self).__name__)
        return self._image(self.scale.inverse(latents))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (B, 3, H, W), corrupted or not -> its reconstruction, and the latents as they come, unscaled."""
        check_image(image, self.image_size, type(self).__name__, values=False)
        latents = self._latents(image)
        return {"reconstruction": self._image(latents), "latents": latents}

    def _latents(self, image: Tensor) -> Tensor:
        features = self.encoder(image)
        latents = full(features if self.flat is None else self.flat.flatten(features))
        return latents.sigmoid() if self.activation == "sigmoid" else latents

    def _image(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.flat is None else self.flat.unflatten(latents))
