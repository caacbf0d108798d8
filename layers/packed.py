"""Layers whose weights lie as the kernels of a CPU read them, for inference.

oneDNN brings a weight into an order of its own at every call, which for few pictures of few places takes longer than
the product (benchmarks/stable_diffusion.py has whole pictures). Here that is done once, until another shape comes. What
is computed is the same but for rounding.

It does not know which network is packed, or what for.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .conv import SameConv2d, Up
from .linear import GEGLU

_ops = torch.ops.mkldnn
_PLAIN: tuple[Any, ...] = "none", [], ""  # nothing is done to a product


class Packed(nn.Module):
    """A layer that orders its weights anew when it is called with another shape than before."""

    weight: Any
    plain: type[nn.Module]  # the layer that it was
    shape: torch.Size | None  # what the weights are ordered for, if that was not broken off

    def forward(self, x: Tensor) -> Tensor:
        if x.shape != self.shape:
            self.shape = None
            self.restore()
            self.order(x.shape)
            self.shape = x.shape
        return self.compute(x)

    def order(self, shape: torch.Size) -> None:
        """From the weights of `plain`."""
        raise NotImplementedError

    def restore(self) -> None:
        """To the weights of `plain`, from those or others."""
        if self.weight.is_mkldnn:
            self.weight = _frozen(self.weight.to_dense())

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def pack(network: nn.Module) -> None:
    """From now on `network` computes without gradients, one call at a time, and `unpack` must come before it is saved,
    copied, moved or cast.

    In place: convolutions of float32 and bfloat16, linear maps of bfloat16, for in float32 they gain nothing, and the
    fused `GEGLU` of both. What lies elsewhere than on a CPU with these kernels stays as it is; Arm's do not fuse.
    """
    for module in network.modules():
        if (kind := _kind(module)) is not None:
            module.__class__, module.plain, module.shape = kind, type(module), None  # type: ignore[assignment]


def unpack(network: nn.Module) -> None:
    """The inverse of `pack`, in place, but that weights with channels last become contiguous."""
    for module in network.modules():
        if isinstance(module, Packed):
            module.restore()
            module.__class__ = module.plain  # type: ignore[assignment]
            del module.plain, module.shape


def known() -> bool:
    """Whether this build of torch has the kernels, and may use them."""
    there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
    return there and not _ops._is_mkldnn_acl_supported()


def _kind(module: nn.Module) -> type[Packed] | None:
    """What a layer becomes, None where it stays as it is."""
    layer, kind = module.conv if isinstance(module, Up) else module, _KINDS.get(type(module))
    if kind is None or layer.weight.device.type != "cpu" or not known():
        return None
    if isinstance(layer, _ConvNd) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return None
    half = layer.weight.dtype == torch.bfloat16 and _ops._is_mkldnn_bf16_supported()
    return kind if half or layer.weight.dtype == torch.float32 and kind is not PackedLinear else None


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


class PackedConv2d(Packed, nn.Conv2d):
    """`torch.nn.Conv2d`."""

    def order(self, shape: torch.Size) -> None:
        weight = self.weight.detach().contiguous().to_mkldnn()
        self.weight = _frozen(torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self._how, list(shape)))

    def compute(self, x: Tensor) -> Tensor:
        return _ops._convolution_pointwise(x, self.weight, self.bias, *self._how, *_PLAIN)

    @property
    def _how(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups


class PackedUp(Packed, Up):
    """`Up`, always as a transposed convolution, whose weight is kept beside the one that it is made of."""

    _how = [1, 1], [0, 0], [2, 2], [1, 1], 1  # padding, output's padding, stride, dilation, groups

    def order(self, shape: torch.Size) -> None:
        kernel = self.transposed().contiguous()
        self.ordered = _frozen(_ops._reorder_convolution_transpose_weight(kernel, *self._how, list(shape)))

    def compute(self, x: Tensor) -> Tensor:
        return _ops._convolution_transpose_pointwise(x, self.ordered, self.conv.bias, *self._how, *_PLAIN)

    def restore(self) -> None:
        self._parameters.pop("ordered", None)


class PackedLinear(Packed, nn.Linear):
    """`torch.nn.Linear`."""

    def order(self, shape: torch.Size) -> None:
        self.weight = _frozen(_rows(self.weight, shape))

    def compute(self, x: Tensor) -> Tensor:
        return _ops._linear_pointwise(x, self.weight, self.bias, *_PLAIN)


class PackedGEGLU(Packed, GEGLU):
    """`GEGLU`, as two products: the gate's, and the value's, which multiplies what it gives by the gate as it goes."""

    value: nn.Parameter
    gate: nn.Parameter

    def order(self, shape: torch.Size) -> None:
        value, gate = (_frozen(_rows(half, shape)) for half in self.weight.chunk(2))
        self.value, self.gate, self.weight = value, gate, None

    def restore(self) -> None:
        if self.weight is None:
            self.weight = _frozen(torch.cat([self.value.to_dense(), self.gate.to_dense()]))
        for half in ("value", "gate"):
            self._parameters.pop(half, None)

    def compute(self, x: Tensor) -> Tensor:
        value_bias, gate_bias = self.bias.chunk(2)
        gate = _ops._linear_pointwise(x, self.gate, gate_bias, "gelu", [], "none")
        return _ops._linear_pointwise.binary(x, gate, self.value, value_bias, "mul")


def _rows(weight: Tensor, shape: torch.Size) -> Tensor:
    """A weight (O, I) for a product of x (..., I) of this shape."""
    return _ops._reorder_linear_weight(weight.detach().contiguous(), shape[:-1].numel())


_KINDS: dict[type[nn.Module], type[Packed]] = {
    nn.Conv2d: PackedConv2d, SameConv2d: PackedConv2d, Up: PackedUp, nn.Linear: PackedLinear, GEGLU: PackedGEGLU
}  # fmt: skip
