"""Self-attention with a key/value cache, and the pre-norm transformer block (Vaswani 2017, arXiv 1706.03762); attention
over the positions of a feature map.

Optional: RMSNorm of queries and keys (Dehghani 2023, arXiv 2302.05442), rotary positions, the squared ReLU (So 2021,
arXiv 2109.08668), output projections that start at zero, so that a block starts as the identity, and channels taken
from tokens a few places before (token shift, Peng 2021, doi:10.5281/zenodo.5196578).

B samples, L tokens, S tokens that the cache can hold, D width, H heads, E = D / H.

It does not know which tokens may attend to which: a mask comes in, and no mask means causal. A shift takes from tokens
before whatever the mask says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import group_norm
from .embeddings import Rotation, rotate
from .precision import full, without_autocast

KVCache = tuple[Tensor, Tensor]  # keys and values, each (B, H, S, E)

_SHORT = 512
_short_in_float32 = False


@contextmanager
def short_in_float32(on: bool = True) -> Iterator[None]:
    """Within it, what needs a gradient attends in float32 if it has at most 512 places.

    For a CPU that trains in bfloat16: there torch's backward pass takes two to five times as long in bfloat16. From
    about 1,000 places on it is the faster one.
    """
    global _short_in_float32
    before, _short_in_float32 = _short_in_float32, on
    try:
        yield
    finally:
        _short_in_float32 = before


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(E)) v: q (B, H, L, E), k and v (B, H, S, E) -> (B, H, L, E), in the dtype of v.

    mask: True where a query may look, or numbers that are added to the scores.
    """
    if not (_short_in_float32 and q.requires_grad and max(q.shape[2], k.shape[2]) <= _SHORT):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with without_autocast(q):
        mask = mask if mask is None or mask.dtype == torch.bool else full(mask)
        return F.scaled_dot_product_attention(full(q), full(k), full(v), attn_mask=mask, is_causal=causal).to(v.dtype)


def _zeros(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """Whole, even where the weight is divided over devices, as its own `new_zeros` would not be."""
    return torch.zeros(shape, device=weight.device, dtype=weight.dtype)


class BlockCache(NamedTuple):
    """What a block keeps of the tokens before: keys and values, and the last `max(shift)` inputs of both branches."""

    attention: KVCache
    inputs: tuple[Tensor, Tensor] | None  # each (B, max(shift), D), zeros before the first token; None: no shift


class RMSNorm(nn.RMSNorm):
    """torch's, whose weight takes the dtype of what it normalises: its quick kernel knows no two dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention. Raises ValueError unless `num_heads` divides `width`."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        check_heads(num_heads, width)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens, on the device and in the dtype of the weights."""
        weight = self.out.weight
        shape = (batch, self.num_heads, length, weight.shape[0] // self.num_heads)
        return _zeros(shape, weight), _zeros(shape, weight)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        start: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x: (B, L, D), the tokens at positions start .. start + L - 1. Returns (B, L, D).

        mask: bool, of a shape that broadcasts to (B, H, L, start + L), True where a query may look; None is causal.
        rotation: of these L tokens' queries and keys, see `embeddings.rotation`; the cache keeps keys already turned.
        cache: filled up to `start` by earlier calls; this call writes its keys and values behind them, in place.
        Without a cache `start` must be 0.
        """
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, L, E)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            end = start + length
            cache[0][:, :, start:end] = k
            cache[1][:, :, start:end] = v
            k, v = (kept[:, :, :end].to(q.dtype) for kept in cache)  # (B, H, end, E)
        else:
            assert start == 0, "without a cache there is nothing before position 0"
        if mask is None and start > 0 and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        y = attention(q, k, v, mask, causal=mask is None and length > 1)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, piece: int | None = None) -> Tensor:
    """Attention of all queries to all keys: q (B, H, L, E), k and v (B, H, S, E) -> (B, H, L, E).

    mask: bool (B, 1, 1, S), True where a key may be looked at. piece: so many queries at a time, which where a device
    has no attention kernel keeps B * H * piece * S scores instead of B * H * L * S.
    """
    if piece is None or piece >= q.shape[2]:
        return attention(q, k, v, mask)
    parts = [attention(part, k, v, mask) for part in q.split(piece, dim=2)]
    return torch.cat(parts, dim=2)


class SpatialAttention(nn.Module):
    """x + out(attention(norm(x))) over all positions, 1x1 convolutions: (B, C, H, W) -> the same.

    With one head as in VQ-GAN (Esser 2021, arXiv:2012.09841, table 7), with the names of its published checkpoints.
    piece: see `attend`. Raises ValueError unless `num_heads` divides the channels.
    """

    def __init__(self, channels: int, norm_groups: int = 32, num_heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        check_heads(num_heads, channels)
        self.num_heads = num_heads
        self.piece: int | None = None
        self.norm = group_norm(channels, norm_groups, eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        heads = (f(normed).flatten(2).unflatten(1, (self.num_heads, -1)).mT for f in (self.q, self.k, self.v))
        # The kernels of attention want the numbers of a head side by side, as with channels last they are; else torch
        # takes the plain formula.
        q, k, v = (y if y.stride(-1) == 1 else y.contiguous() for y in heads)  # each (B, heads, H*W, E)
        y = attend(q, k, v, piece=self.piece).mT  # (B, heads, E, H*W)
        return x + self.proj_out(y.reshape(x.shape))


def check_heads(num_heads: int, width: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"attention: num_heads must divide the width, got width {width} and {num_heads} heads; change one of them"
        )


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is four times as wide.

    mlp: "gelu" or "squared_relu". norm: "layer" or "rms". zero_init: both output projections start at zero; otherwise
    all matrices start as normal(0, `std`), the output projections as normal(0, `out_std`). shift: see `shift_tokens`,
    which both branches read through.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp: Literal["gelu", "squared_relu"] = "gelu",
        norm: Literal["layer", "rms"] = "layer",
        qk_norm: bool = False,
        zero_init: bool = False,
        shift: Sequence[int] = (),
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__()
        if mlp not in ("gelu", "squared_relu"):
            raise ValueError(f"transformer block: mlp must be 'gelu' or 'squared_relu', got {mlp!r}")
        places = list(shift) if isinstance(shift, Sequence) and not isinstance(shift, str) else [None]
        if any(type(place) is not int or place < 1 for place in places) or 2 * len(places) > width:
            raise ValueError(
                "transformer block: shift must be a list of whole numbers >= 1, at most one for two channels "
                f"of width {width}, got {str(shift)[:80]}; write e.g. shift: [1]"
            )
        self.mlp, self.shift = mlp, places
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

    def new_cache(self, batch: int, length: int) -> BlockCache:
        """An empty cache for `length` tokens, on the device and in the dtype of the weights."""
        kept = None
        if self.shift:
            weight = self.attention.out.weight
            shape = (batch, max(self.shift), weight.shape[0])
            kept = _zeros(shape, weight), _zeros(shape, weight)
        return BlockCache(self.attention.new_cache(batch, length), kept)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: BlockCache | None = None,
        start: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x: (B, L, D). Returns (B, L, D). Arguments as in `Attention.forward`, the cache this block's own.

        With a cache each token comes once, in order.
        """
        kept = (None, None) if cache is None or cache.inputs is None else cache.inputs
        y = self._shifted(self.attention_norm(x), kept[0])
        x = x + self.attention(y, mask, None if cache is None else cache.attention, start, rotation)
        y = self.mlp_in(self._shifted(self.mlp_norm(x), kept[1]))  # (B, L, 4D)
        y = F.gelu(y) if self.mlp == "gelu" else squared_relu(y)
        return x + self.mlp_out(y)

    def _shifted(self, x: Tensor, kept: Tensor | None) -> Tensor:
        if not self.shift:
            return x
        if kept is None:
            return shift_tokens(x, self.shift)
        before = kept.shape[1]
        seen = torch.cat([kept.to(x.dtype), x], dim=1)
        kept.copy_(seen[:, -before:])
        return shift_tokens(seen, self.shift)[:, before:]


def shift_tokens(x: Tensor, places: Sequence[int]) -> Tensor:
    """(B, L, D) -> the same; for each of n places, D // 2n channels are those of the token so many places before.

    Zeros where there is no such token; the other channels, half of them or a few more, stay the token's own. In a
    raster of width w, as seen from the token to predict, place 1 is the second to the left, w - 2, w - 1 and w are the
    one above to the right, above, and above to the left; at a border they wrap, and the first row sees what comes
    before the image. Several places at once are ours; Peng 2021 has place 1 and half of the channels.
    """
    channels, length = x.shape[-1] // (2 * len(places)), x.shape[1]
    moved = [
        F.pad(x[:, : max(0, length - place), i * channels : (i + 1) * channels], (0, 0, min(place, length), 0))
        for i, place in enumerate(places)
    ]
    return torch.cat([*moved, x[..., channels * len(places) :]], dim=-1)


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
        return RMSNorm(width, eps=1e-6)
    raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
