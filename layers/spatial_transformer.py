"""The spatial transformer of latent diffusion: the positions of a feature map look at each other, then at a context
such as the tokens of a caption (Rombach 2022, arXiv:2112.10752, section 3.3 and appendix E.2.1); its MLP is gated.

B images, C channels, H x W pixels, N = H * W positions, S tokens of context of width D.

It does not know what the context is.
"""

from torch import Tensor, nn

from .attention import attend, check_heads
from .conv import group_norm
from .linear import GEGLU


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, width) to a context (B, S, context_dim); without context_dim, to x itself.

    piece: see `attend`. Raises ValueError unless `num_heads` divides `width`.
    """

    def __init__(self, width: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        check_heads(num_heads, width)
        self.num_heads = num_heads
        self.piece: int | None = None
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context_dim or width, width, bias=False)
        self.v = nn.Linear(context_dim or width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """mask: bool (B, S), True where the context holds a token; at least one in each row. Returns (B, N, width)."""
        seen = x if context is None else context
        made = self.q(x), self.k(seen), self.v(seen)
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in made)  # (B, heads, N or S, E)
        y = attend(q, k, v, None if mask is None else mask[:, None, None], self.piece)  # (B, heads, N, E)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttentionBlock(nn.Module):
    """x + attention(norm(x)), x + attention(norm(x), context), then x + mlp(norm(x)): (B, N, width) -> the same."""

    def __init__(self, width: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = CrossAttention(width, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.mlp_in = GEGLU(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.mlp_out(self.mlp_in(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """x + out(blocks(in(norm(x)), context)) over all positions: (B, C, H, W) -> the same.

    Both projections are linear maps over the channels, which Stable Diffusion 1 has as 1x1 convolutions.
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int, depth: int = 1, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(CrossAttentionBlock(channels, num_heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """context: (B, S, D); mask: bool (B, S), True where it holds a token, at least one in each row."""
        y = self.proj_in(self.norm(x).flatten(2).mT)  # (B, N, C)
        for block in self.blocks:
            y = block(y, context, mask)
        return x + self.proj_out(y).mT.unflatten(2, x.shape[2:])
