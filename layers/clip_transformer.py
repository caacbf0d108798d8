"""The transformer of CLIP's towers (Radford 2021, arXiv:2103.00020, section 2.4), whose weights have open_clip's names.

B images or captions, T text tokens, L places, W width.

It does not know whether patches or captions pass through it.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attention


def frame(text: Tensor, lengths: Tensor, vocab: int, pad: int) -> Tensor:
    """Captions as CLIP reads them: start, the caption, end, and pads; the start is vocab - 2, the end vocab - 1.

    text int64 (B, T), of which lengths (B,) in [0, T] count -> int64 (B, T + 2). Raises ValueError for other lengths.
    """
    places = text.shape[1]
    if lengths.shape != text.shape[:1] or ((lengths < 0) | (lengths > places)).any():
        raise ValueError(
            f"lengths must be (B,) in [0, T={places}] for text {tuple(text.shape)}, "
            f"got {tuple(lengths.shape)}: {lengths.tolist()[:8]}; pass each caption's token count"
        )
    place, length = torch.arange(places + 2, device=text.device), lengths.to(text.device)[:, None]  # (T + 2,), (B, 1)
    framed = F.pad(text, (1, 1)).masked_fill(place > length, pad)
    return framed.masked_fill(place == length + 1, vocab - 1).masked_fill(place == 0, vocab - 2)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """The one place of each, (B, L, W) and int64 (B,) -> (B, 1, W)."""
    return x[torch.arange(len(x), device=x.device), places][:, None]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) (Hendrycks 2016, arXiv:1606.08415, section 2), with which OpenAI trained CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.MultiheadAttention):
    """Multi-head self-attention: (B, L, W) -> the same, with the names of the published weights."""

    def forward(self, x: Tensor, mask: Tensor | None, only: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """mask: (L, L), added to the scores. only: int64 (B,), the one place of each that asks; returns (B, 1, W)."""
        width = x.shape[-1]
        if only is None:
            q, k, v = map(self._heads, F.linear(x, self.in_proj_weight, self.in_proj_bias).split(width, dim=-1))
        else:
            ask, answer = self.in_proj_weight.split([width, 2 * width])
            ask_bias, answer_bias = self.in_proj_bias.split([width, 2 * width])
            q = self._heads(F.linear(_at(x, only), ask, ask_bias))  # (B, H, 1, E)
            k, v = map(self._heads, F.linear(x, answer, answer_bias).split(width, dim=-1))
            mask = None if mask is None else mask[only][:, None, None]  # (B, 1, 1, L)
        return self.out_proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, E)


class CLIPBlock(nn.Module):
    """Pre-norm residual block: attention, then a perceptron of four times the width."""

    def __init__(self, width: int, heads: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CLIPAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        perceptron = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU() if quick_gelu else nn.GELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(perceptron))

    def forward(self, x: Tensor, mask: Tensor | None, only: Tensor | None = None) -> Tensor:
        y = self.attn(self.ln_1(x), mask, only)
        x = y + (x if only is None else _at(x, only))
        return x + self.mlp(self.ln_2(x))


class CLIPTransformer(nn.Module):
    """Blocks one after the other: (B, L, W) -> the same. mask: (L, L), added to the scores.

    only: int64 (B,), the place of each that is read, where no other is; then the last block computes what this one
    needs alone, and the answer is (B, W). Raises ValueError for a depth below 1.
    """

    def __init__(self, width: int, depth: int, heads: int, quick_gelu: bool = False) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"CLIP's transformer needs a depth of at least 1, got {depth}; correct the recipe")
        self.resblocks = nn.ModuleList(CLIPBlock(width, heads, quick_gelu) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None, only: Tensor | None = None) -> Tensor:
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            x = block(x, mask, only if i == last else None)
        return x if only is None else x[:, 0]

    def start_as_text(self, token_embedding: nn.Embedding, positional_embedding: nn.Parameter) -> None:
        """A text tower's starting weights, as published with the paper."""
        width, depth = positional_embedding.shape[1], len(self.resblocks)
        nn.init.normal_(token_embedding.weight, std=0.02)
        nn.init.normal_(positional_embedding, std=0.01)
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def read(self, x: Tensor, only: Tensor | None = None) -> Tensor:
        """Embedded captions (B, T, W) -> (B, T, W), where each token looks at those before it and at itself.

        only: see the class; then (B, W).
        """
        places = x.shape[1]
        return self(x, torch.full((places, places), -math.inf, device=x.device, dtype=x.dtype).triu(1), only)
