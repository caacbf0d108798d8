"""Self-attention with a key/value cache, and the pre-norm transformer block (Vaswani 2017, arXiv 1706.03762).

Optional: RMSNorm of queries and keys (Dehghani 2023, arXiv 2302.05442), the squared ReLU (So 2021, arXiv 2109.08668)
and output projections that start at zero, so that a block starts as the identity.

B samples, L tokens, S tokens that the cache can hold, D width, H heads, E = D / H.

It does not know which tokens may see which: a mask comes in, and no mask means causal.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KVCache = tuple[Tensor, Tensor]  # keys and values, each (B, H, S, E)


class Attention(nn.Module):
    """Multi-head self-attention. Raises ValueError unless `num_heads` divides `width`."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"attention: num_heads must divide the width, got width {width} and {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens, on the device and in the dtype of the weights."""
        weight = self.out.weight
        shape = (batch, self.num_heads, length, weight.shape[0] // self.num_heads)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x: (B, L, D), the tokens at positions start .. start + L - 1. Returns (B, L, D).

        mask: bool (L, start + L), True where a query may look; None is causal.
        cache: filled up to `start` by earlier calls; this call writes its keys and values behind them, in place.
        Without a cache `start` must be 0.
        """
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, L, E)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            end = start + length
            cache[0][:, :, start:end] = k
            cache[1][:, :, start:end] = v
            k, v = (kept[:, :, :end].to(q.dtype) for kept in cache)  # (B, H, end, E)
        else:
            assert start == 0, "without a cache there is nothing before position 0"
        if mask is None and start > 0 and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is four times as wide.

    mlp: "gelu" or "squared_relu". norm: "layer" or "rms". zero_init: both output projections start at zero; otherwise
    all matrices start as normal(0, `std`), the output projections as normal(0, `out_std`).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp: Literal["gelu", "squared_relu"] = "gelu",
        norm: Literal["layer", "rms"] = "layer",
        qk_norm: bool = False,
        zero_init: bool = False,
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__()
        if mlp not in ("gelu", "squared_relu"):
            raise ValueError(f"transformer block: mlp must be 'gelu' or 'squared_relu', got {mlp!r}")
        self.mlp = mlp
        self.attention_norm = new_norm(norm, width)
        self.attention = Attention(width, num_heads, qk_norm)
        self.mlp_norm = new_norm(norm, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        for layer in (self.attention.qkv, self.mlp_in):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        for layer in (self.attention.out, self.mlp_out):
            nn.init.normal_(layer.weight, std=0.0 if zero_init else out_std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x: (B, L, D). Returns (B, L, D). Arguments as in `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), mask, cache, start)
        y = self.mlp_in(self.mlp_norm(x))  # (B, L, 4D)
        y = F.gelu(y) if self.mlp == "gelu" else squared_relu(y)
        return x + self.mlp_out(y)


class _SquaredReLU(torch.autograd.Function):
    """Keeps one tensor for the backward pass and makes one there; as two operations it is bound by memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * ctx.saved_tensors[0]).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) ** 2 of any shape (So 2021, arXiv 2109.08668); its gradient cannot be differentiated again."""
    return _SquaredReLU.apply(x)


def new_norm(norm: str, width: int) -> nn.Module:
    """The normalisation "layer" or "rms" over the last axis; anything else is a ValueError."""
    if norm == "layer":
        return nn.LayerNorm(width)
    if norm == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
