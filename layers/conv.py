"""Convolutional blocks: a padded convolution with its own start and the scaled bottleneck block of the discrete VAE
(Ramesh 2021, arXiv:2102.12092, appendix A; residual form of He 2016, arXiv:1603.05027); the residual block with
normalisation, and the halving and doubling of H and W, of VQ-GAN and latent diffusion (Esser 2021, arXiv:2012.09841,
appendix B; Rombach 2022, arXiv:2112.10752; as in Ho 2020, arXiv:2006.11239). The latter keep the names that the tensors
have in the published checkpoints.

B images, C channels, H x W pixels, M the width of an embedding that modulates a block.

It does not know which model the blocks stand in or at which resolution.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import full, without_autocast


class SameConv2d(nn.Conv2d):
    """Convolution that keeps H and W: odd kernel, zero padding, weights N(0, 1 / fan-in), bias 0.

    (B, n_in, H, W) -> (B, n_out, H, W). Raises ValueError for an even kernel, which cannot be padded evenly.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"SameConv2d needs an odd kernel, got {kernel}; take {kernel + 1}")
        super().__init__(n_in, n_out, kernel, padding=kernel // 2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_channels * self.kernel_size[0] ** 2))
        nn.init.zeros_(self.bias)


class BottleneckBlock(nn.Module):
    """Pre-activation residual block: skip(x) + gain * branch(x), the branch `inner_width` channels wide inside.

    (B, n_in, H, W) -> (B, n_out, H, W). kernels: the odd kernel sizes of the branch's convolutions, each after a ReLU.
    gain: 1 / (number of blocks) ** 2 in the paper, so that a deep stack starts near the skip path. The skip is the
    identity, or a 1x1 convolution when the channels change. upsample: the block reads its input at twice the size,
    (B, n_in, H, W) -> (B, n_out, 2H, 2W), nearest. inner_width: None is n_out / 4, of which n_out must be a multiple,
    or a ValueError says so.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernels: Sequence[int],
        gain: float,
        upsample: bool = False,
        inner_width: int | None = None,
    ) -> None:
        super().__init__()
        if (inner_width is None and n_out % 4) or len(kernels) < 2:
            raise ValueError(
                "BottleneckBlock needs n_out to be a multiple of 4 and at least two kernels, "
                f"got n_out {n_out} and kernels {tuple(kernels)}"
            )
        widths = [n_in] + [inner_width or n_out // 4] * (len(kernels) - 1) + [n_out]
        self.gain, self.upsample = gain, upsample
        self.skip = SameConv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.branch = nn.ModuleList(
            SameConv2d(a, b, kernel) for a, b, kernel in zip(widths[:-1], widths[1:], kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        y, skip, small = x, self.skip(x), self.upsample
        if self.upsample:
            skip = F.interpolate(skip, scale_factor=2, mode="nearest")
        for conv in self.branch:
            # A 1x1 convolution commutes with nearest upsampling, and costs a quarter before it.
            if small and conv.kernel_size[0] > 1:
                y, small = F.interpolate(y, scale_factor=2, mode="nearest"), False
            y = conv(F.relu(y))
        if small:
            y = F.interpolate(y, scale_factor=2, mode="nearest")
        return torch.add(skip, y, alpha=self.gain)


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu 2018, arXiv:1803.08494), which on a CPU reads small pictures in bfloat16 channel by channel.

    Where channels come last and there are fewer than 1,024 places, torch takes another kernel than for more: with this
    copy, norm, swish and a convolution take 0.3 to 1.0 of the time, from few channels to many. With more places they
    would take 1.1 to 3 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[2:].numel() < 1024:
            x = x.contiguous()
        return super().forward(x)


def group_norm(channels: int, groups: int, eps: float = 1e-6) -> GroupNorm:
    """`GroupNorm`, by default with the eps of the published autoencoders.

    Raises ValueError unless `groups` divides `channels`.
    """
    if groups < 1 or channels % groups:
        raise ValueError(
            f"GroupNorm needs groups that divide the channels, got {channels} channels and {groups} groups; "
            "change width, channel_mult or norm_groups"
        )
    return GroupNorm(groups, channels, eps=eps)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), both convolutions 3x3: (B, n_in, H, W) -> (B, n_out, H, W).

    The skip is the identity, or a 1x1 convolution when the channels change. modulation: M, of an embedding (B, M), of
    which a projection is added before the second norm; scale_shift: instead, two of them scale and shift what that norm
    gives (Dhariwal 2021, arXiv:2105.05233, equation 6: AdaGN). Without M the block is that of the autoencoders.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        norm_groups: int = 32,
        modulation: int | None = None,
        scale_shift: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(n_in, norm_groups, eps)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.scale_shift = scale_shift
        self.temb_proj = None if modulation is None else nn.Linear(modulation, n_out * (1 + scale_shift))
        self.norm2 = group_norm(n_out, norm_groups, eps)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, dropout: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x: (B, n_in, H, W); embedding: (B, M), after its nonlinearity. dropout: applied before the last convolution.

        Returns (B, n_out, H, W).
        """
        y = self.conv1(F.silu(self.norm1(x)))
        if self.temb_proj is None:
            y = self.norm2(y)
        else:
            assert embedding is not None, "a modulated block needs the embedding"
            change = self.temb_proj(embedding)[:, :, None, None]  # (B, n_out or 2 n_out, 1, 1)
            if self.scale_shift:
                scale, shift = change.chunk(2, dim=1)
                y = torch.addcmul(shift, self.norm2(y), 1 + scale)
            else:
                y = self.norm2(y + change)
        y = F.silu(y)
        return self.nin_shortcut(x) + self.conv2(y if dropout is None else dropout(y))


class Down(nn.Module):
    """3x3 convolution with stride 2: (B, C, H, W) -> (B, C, H/2, W/2), for even H and W.

    symmetric: zeros on all four sides, as in Dhariwal 2021 and the U-Net of latent diffusion; else to the right and
    below only, as in Ho 2020 and the autoencoders.
    """

    def __init__(self, channels: int, symmetric: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=int(symmetric))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest upsampling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    Computed as the transposed convolution that the two are together, whose 4x4 kernel is the 3x3 one summed over 2x2
    boxes: it multiplies 16 times for each pixel before it, and not 36 times. To sample at most 256 pixels, of all
    images of the batch, making that kernel would cost more than it saves.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x[:, 0].numel() <= 256:
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return F.conv_transpose2d(x, self.transposed(), self.conv.bias, stride=2, padding=1)

    def transposed(self) -> Tensor:
        """The kernel (n_in, n_out, 4, 4) of the transposed convolution."""
        weight = self.conv.weight
        with without_autocast(weight):
            kernel = full(weight).flatten(2)  # (n_out, n_in, 9)
            return (kernel @ _boxes(kernel)).to(weight.dtype).unflatten(2, (4, 4)).transpose(0, 1)


def _boxes(like: Tensor) -> Tensor:
    """(9, 16): which values of a 3x3 kernel, read backwards, each of the 4x4 sums of 2x2 boxes holds."""
    line = F.pad(torch.eye(3, dtype=like.dtype, device=like.device), (1, 1)).flip(0)  # (3, 5)
    line = line[:, 1:] + line[:, :-1]  # (3, 4)
    return torch.kron(line, line)
