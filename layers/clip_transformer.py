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


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) (Hendrycks 2016, arXiv:1606.08415, section 2), with which OpenAI trained CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.MultiheadAttention):
    """Multi-head self-attention: (B, L, W) -> the same, with the names of the published weights."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """mask: (L, L), added to the scores."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, E)
        y = attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, width))


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

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class CLIPTransformer(nn.Module):
    """Blocks one after the other: (B, L, W) -> the same. mask: (L, L), added to the scores."""

    def __init__(self, width: int, depth: int, heads: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(CLIPBlock(width, heads, quick_gelu) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x

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

    def read(self, x: Tensor) -> Tensor:
        """Embedded captions (B, T, W) -> (B, T, W), where each token looks at those before it and at itself."""
        places = x.shape[1]
        return self(x, torch.full((places, places), -math.inf, device=x.device, dtype=x.dtype).triu(1))
