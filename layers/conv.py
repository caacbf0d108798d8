"""Convolutions of the discrete VAE: a padded convolution with its own start and the scaled bottleneck block
(Ramesh 2021, arXiv:2102.12092, appendix A; residual form of He 2016, arXiv:1603.05027).

B images, C channels, H x W pixels.

It does not know which model the blocks stand in or at which resolution.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """Pre-activation residual block: skip(x) + gain * branch(x), the branch n_out / 4 channels wide inside.

    (B, n_in, H, W) -> (B, n_out, H, W). kernels: the odd kernel sizes of the branch's convolutions, each after a ReLU.
    gain: 1 / (number of blocks) ** 2 in the paper, so that a deep stack starts near the skip path. The skip is the
    identity, or a 1x1 convolution when the channels change. upsample: the block reads its input at twice the size,
    (B, n_in, H, W) -> (B, n_out, 2H, 2W), nearest. Raises ValueError when n_out is not a multiple of 4.
    """

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float, upsample: bool = False) -> None:
        super().__init__()
        if n_out % 4 or len(kernels) < 2:
            raise ValueError(
                "BottleneckBlock needs n_out to be a multiple of 4 and at least two kernels, "
                f"got n_out {n_out} and kernels {tuple(kernels)}"
            )
        widths = [n_in] + [n_out // 4] * (len(kernels) - 1) + [n_out]
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
