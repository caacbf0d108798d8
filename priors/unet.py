"""The U-Net of diffusion models: of pixels (Ho 2020, arXiv:2006.11239, appendix B), guided (Dhariwal 2021,
arXiv:2105.05233), of latents with captions (Rombach 2022, arXiv:2112.10752, appendix E), and the decoder of image
embeddings with its upsamplers (Ramesh 2022, arXiv:2204.06125, section 2.1). The defaults are Stable Diffusion 1.

B samples, C channels of x_t on h x w positions, M = 4 * width, the embedding that modulates the blocks; L tokens of
context of width D; E the width of an image embedding.

It does not know what it predicts, the noise schedule, the loss, or who made the condition.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.attention import SpatialAttention
from ..layers.conv import Down, ResBlock, Up, group_norm
from ..layers.embeddings import timestep_embedding
from ..layers.random import Draws, dropout
from ..layers.spatial_transformer import CrossAttention, SpatialTransformer
from .condition import Condition

_LANES = 16


class UNetBlock(nn.Module):
    """A residual block, then attention where there is some: (B, n_in, h, w) -> (B, n_out, h, w)."""

    def __init__(self, res: ResBlock, attn: SpatialAttention | SpatialTransformer | None) -> None:
        super().__init__()
        self.res, self.attn = res, attn

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | None, mask: Tensor | None,
        drop: partial[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        x = self.res(x, embedding, drop)
        if isinstance(self.attn, SpatialTransformer):
            return self.attn(x, context, mask)
        return x if self.attn is None else self.attn(x)


class UNetLevel(nn.Module):
    """The blocks of one resolution, and the change to the next one if there is one."""

    def __init__(self, blocks: list[UNetBlock], resample: Down | Up | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(nn.Module):
    """network(x_t, t, condition) -> what the objective says, of out_channels: eps, x_0 or v, and a variance or none.

    in_channels: of x_t and of the condition's image together. out_channels: as many if None. Level i has
    width * channel_mult[i] channels, blocks_per_level blocks on the way down and one more on the way up, and lies at
    1 / 2**i of the size; in attn_levels each block is followed by attention of num_heads heads, one number or one a
    level. mid_attention: at the smallest size too.

    What it is conditioned on: context_dim, D, of tokens that every attention looks at, in `depth` blocks each;
    num_classes; embedding_dim, E, of image embeddings, which are added to the timestep's, and of which embedding_tokens
    more tokens are made (4 in Ramesh 2022). None: not.

    scale_shift: see `ResBlock`. dropout: its rate, see `forward`. convention: "ddpm" for Ho 2020's timestep embedding,
    padding and eps, "adm" for Dhariwal 2021's, which latent diffusion took over. Raises ValueError for values that do
    not fit each other.
    """

    outer = ("conv_in", "conv_out", "embedding_in", "tokens_in")
    layout_by_precision = True  # see `training.parallel.lay_out`

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int | None = None,
        width: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        blocks_per_level: int = 2,
        attn_levels: Sequence[int] = (0, 1, 2),
        num_heads: int | Sequence[int] = 8,
        mid_attention: bool = True,
        context_dim: int | None = 768,
        depth: int = 1,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        embedding_tokens: int = 0,
        scale_shift: bool = False,
        dropout: float = 0.0,
        norm_groups: int = 32,
        convention: Literal["ddpm", "adm"] = "adm",
    ) -> None:
        super().__init__()
        widths, last = [width * mult for mult in channel_mult], len(channel_mult) - 1
        heads = [num_heads] * len(widths) if isinstance(num_heads, int) else list(num_heads)
        if not widths or len(heads) != len(widths) or not set(attn_levels) <= set(range(len(widths))):
            raise ValueError(
                f"UNet: attn_levels must be among the levels 0 .. {last} of channel_mult, and num_heads one number or "
                f"one a level, got attn_levels {list(attn_levels)} and num_heads {num_heads}; correct the recipe"
            )
        if convention not in ("ddpm", "adm") or (embedding_tokens and not (embedding_dim and context_dim)):
            raise ValueError(
                "UNet: convention must be 'ddpm' or 'adm', and embedding_tokens need embedding_dim and context_dim, "
                f"got {convention!r}, {embedding_tokens}, {embedding_dim} and {context_dim}; correct the recipe"
            )
        self.in_channels, self.width, self.factor = in_channels, width, 2**last
        self.context_dim, self.num_classes, self.embedding_dim = context_dim, num_classes, embedding_dim
        self.dropout, self.ddpm, self.sliced = dropout, convention == "ddpm", False
        eps, modulation = (1e-6 if self.ddpm else 1e-5), 4 * width

        def block(n_in: int, level: int, attends: bool) -> UNetBlock:
            res = ResBlock(n_in, widths[level], norm_groups, modulation, scale_shift, eps)
            if not attends:
                return UNetBlock(res, None)
            if context_dim is None:
                return UNetBlock(res, SpatialAttention(widths[level], norm_groups, heads[level], eps))
            return UNetBlock(res, SpatialTransformer(widths[level], heads[level], context_dim, depth, norm_groups))

        self.time_embed = nn.Sequential(nn.Linear(width, modulation), nn.SiLU(), nn.Linear(modulation, modulation))
        # The last class is the null one.
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, modulation)
        self.embedding_in = None if embedding_dim is None else nn.Linear(embedding_dim, modulation)
        made = embedding_tokens * (context_dim or 0)
        self.tokens_in = nn.Linear(embedding_dim or 0, made) if made else None
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        kept, now = [width], width  # channels of what the way up will read
        self.down = nn.ModuleList()
        for level, n_out in enumerate(widths):
            attends = level in attn_levels
            blocks = [block(now if j == 0 else n_out, level, attends) for j in range(blocks_per_level)]
            self.down.append(UNetLevel(blocks, Down(n_out, not self.ddpm) if level < last else None))
            kept += [n_out] * (blocks_per_level + (level < last))
            now = n_out
        self.mid = nn.ModuleList([block(now, last, mid_attention), block(now, last, False)])
        levels = []
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(blocks_per_level + 1):
                blocks.append(block(now + kept.pop(), level, level in attn_levels))
                now = widths[level]
            levels.append(UNetLevel(blocks, Up(now) if level else None))
        self.up = nn.ModuleList(reversed(levels))  # counted like the way down, so the last one comes first
        self.norm_out = group_norm(width, norm_groups, eps)
        self.conv_out = nn.Conv2d(width, out_channels or in_channels, 3, padding=1)
        self._start()

    def _start(self) -> None:
        """Every branch, and the output, starts at zero (Ho 2020, as in its code; Dhariwal 2021)."""
        ends = [block.res.conv2 for block in self.blocks]
        ends += [block.attn.proj_out for block in self.blocks if block.attn is not None]
        for layer in (*ends, self.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def blocks(self) -> list[UNetBlock]:
        """All blocks in the order in which they compute."""
        down = [block for level in self.down for block in level.blocks]
        return [*down, *self.mid, *(block for level in reversed(self.up) for block in level.blocks)]

    def slice_attention(self, piece: int | None) -> None:
        """Attention takes so many queries at a time from now on, or all (None); see `layers.attention.attend`."""
        self.sliced = piece is not None
        for module in self.modules():
            if isinstance(module, SpatialAttention | CrossAttention):
                module.piece = piece

    def null_condition(self, batch: int, tokens: Tensor | None = None, mask: Tensor | None = None) -> Condition:
        """The null condition: the class behind the last, tokens of the empty caption, and an embedding of zeros.

        The one such object: training puts it in the place of dropped conditions, guided sampling conditions on it.
        tokens (batch, L, D) and mask: what the text encoder makes of its null caption, if this network reads tokens.
        """
        device = self.conv_in.weight.device
        labels = embedding = None
        if self.num_classes is not None:
            labels = torch.full((batch,), self.num_classes, dtype=torch.int64, device=device)
        if self.embedding_dim is not None:
            embedding = torch.zeros(batch, self.embedding_dim, device=device)
        return Condition(labels=labels, tokens=tokens, mask=mask, embedding=embedding)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """x_t: (B, C, h, w), t: (B,), whole or not, the steps of the schedule. Returns (B, out_channels, h, w).

        draws: of the dropout masks; without them nothing is dropped. Raises ValueError for other shapes, for h or w
        that `factor` does not divide, and for a condition that lacks what this network reads or holds what it does not.
        """
        condition = Condition() if condition is None else condition
        self._check(x_t, t, condition)
        x = x_t if condition.image is None else torch.cat([x_t, condition.image.to(x_t.dtype)], dim=1)
        embedding = self._embed(t, condition)
        context, mask = self._context(condition)
        number = 0

        def run(block: UNetBlock, x: Tensor) -> Tensor:
            nonlocal number
            number += 1
            drop = None
            if self.dropout and draws is not None:
                drop = partial(dropout, rate=self.dropout, draws=draws, stream=f"unet.{number}")
            return block(x, embedding, context, mask, drop)

        x = self.conv_in(x.to(self.conv_in.weight.dtype))  # (B, width, h, w)
        kept = [x]
        for level in self.down:
            for block in level.blocks:
                kept.append(x := run(block, x))
            if level.resample is not None:
                kept.append(x := level.resample(x))  # (B, n_out, h / 2, w / 2)
        for block in self.mid:
            x = run(block, x)
        for level in reversed(self.up):
            for block in level.blocks:
                x = run(block, torch.cat([x, kept.pop()], dim=1))
            if level.resample is not None:
                x = level.resample(x)  # (B, n_out, 2 h, 2 w)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _embed(self, t: Tensor, condition: Condition) -> Tensor:
        """(B, M), after the nonlinearity with which every block would begin."""
        waves = timestep_embedding(t, self.width, last=int(self.ddpm), cosine_first=not self.ddpm)
        embedding = self.time_embed(waves.to(self.conv_in.weight.dtype))
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(condition.labels)
        if self.embedding_in is not None and condition.embedding is not None:
            embedding = embedding + self.embedding_in(condition.embedding.to(embedding.dtype))
        return F.silu(embedding)

    def _context(self, condition: Condition) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (B, S, D) to look at, those made of an image embedding behind the caption's, and their mask."""
        tokens, mask = condition.tokens, condition.mask
        tokens = None if tokens is None else tokens.to(self.conv_in.weight.dtype)
        if self.tokens_in is None or condition.embedding is None:
            return _whole_lanes(tokens, mask)
        made = self.tokens_in(condition.embedding.to(self.conv_in.weight.dtype)).unflatten(1, (-1, self.context_dim))
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(made.shape[:2])], dim=1)
        return _whole_lanes(made if tokens is None else torch.cat([tokens, made], dim=1), mask)

    def _check(self, x_t: Tensor, t: Tensor, condition: Condition) -> None:
        if not isinstance(condition, Condition):
            raise ValueError(f"UNet: the condition must be a Condition or None, got {type(condition).__name__}")
        beside = 0 if condition.image is None else condition.image.shape[1]
        if x_t.dim() != 4 or x_t.shape[1] + beside != self.in_channels or t.shape != x_t.shape[:1]:
            raise ValueError(
                f"UNet: x_t must be (B, C, h, w), C with the channels of the condition's image {self.in_channels}, and "
                f"t (B,), got {tuple(x_t.shape)} with {beside} channels beside it, and t {tuple(t.shape)}; "
                "change in_channels or what is given"
            )
        if x_t.shape[2] % self.factor or x_t.shape[3] % self.factor:
            raise ValueError(
                f"UNet: h and w must be multiples of {self.factor}, for it halves them at each of its levels but one, "
                f"got {tuple(x_t.shape[2:])}; resize or pad"
            )
        batch, length = len(x_t), 0 if condition.tokens is None else condition.tokens.shape[1]
        wanted = {
            "labels": None if self.num_classes is None else (batch,),
            "tokens": None if self.context_dim is None else (batch, length, self.context_dim),
            "embedding": None if self.embedding_dim is None else (batch, self.embedding_dim),
        }
        for name, shape in wanted.items():
            given = getattr(condition, name)
            if given is None and name == "tokens" and self.tokens_in is not None:
                continue
            if (None if given is None else tuple(given.shape)) != shape:
                raise ValueError(
                    f"UNet: {name} of the condition must be {shape or 'left out'}, as the network was built, "
                    f"got {None if given is None else tuple(given.shape)}; see Condition, and null_condition for none"
                )
        if condition.mask is not None and tuple(condition.mask.shape) != (batch, length):
            raise ValueError(f"UNet: mask must be {(batch, length)}, as tokens are, got {tuple(condition.mask.shape)}")


def _whole_lanes(tokens: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """On a CPU, tokens up to a multiple of 16, masked: its attention takes those beyond 16, 32 ... one by one."""
    # Nor for a plan, whose tensors are shapes alone: it is for GPUs too.
    if tokens is None or type(tokens) is not Tensor or tokens.device.type != "cpu" or not tokens.shape[1] % _LANES:
        return tokens, mask
    lacking = -tokens.shape[1] % _LANES
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
    return F.pad(tokens, (0, 0, 0, lacking)), F.pad(mask, (0, lacking))
