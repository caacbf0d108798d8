"""A linear map with very many inputs or outputs, and one that is gated.

N rows of I numbers, O outputs.

It does not know what they map.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_COLUMNS = 1024


class GEGLU(nn.Linear):
    """(N, ..., I) -> (N, ..., O), value * GELU(gate), both linear in x (Shazeer 2020, arXiv:2002.05202, equation 6).

    weight: (2 O, I), first the value's, then the gate's, as diffusers has them.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, 2 * n_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = super().forward(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, ..., I), weight (O, I), bias (O,) -> (N, ..., O), as `torch.nn.functional.linear`.

    On a CPU its wide products are made `_COLUMNS` columns at a time: a training step of the dVAE with 8,192 codes takes
    3 % less (benchmarks/image_tokenizers.py). The gradients cannot be differentiated again there.
    """
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" for tensor in (x, weight))
    if not plain or max(weight.shape) < 2 * _COLUMNS:  # on a GPU, divided, or without values
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


def _product(a: Tensor, b: Tensor) -> Tensor:
    found = a.new_empty(len(a), b.shape[1])
    for first in range(0, b.shape[1], _COLUMNS):
        part = slice(first, first + _COLUMNS)
        torch.mm(a, b[:, part], out=found[:, part])
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.T).add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (to_x, to_weight, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _product(grad, weight) if to_x else None,
            _product(grad.T, x) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )
