"""DALL-E: one autoregressive transformer over caption tokens, then image codes (Ramesh 2021, arXiv 2102.12092).

The defaults are the published 12-billion-parameter model (Section 2.2 and Appendix B). The stream of inputs is

    start, text_0 .. text_{T-1}, code_0 .. code_{N-2}

and the output at each place predicts what follows: the first T outputs go through the text head, the last N through
the image head, so neither kind can predict the other. The last text token predicts the first code.

B samples, T text tokens, N = h * w codes, n <= N codes given so far, D width, K number of codes.

It does not know losses, sampling, tokenizers or random draws.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import masks
from ..layers.attention import BlockCache, TransformerBlock, new_norm
from ..layers.embeddings import AxialPositionEmbedding, rotation

PAD = 0


class DALLE(nn.Module):
    """p(text) p(codes | text). Text id 0 is the pad; each text position learns its own embedding of it (Appendix B.1).

    attention: "sparse", the paper's masks by layer (`layer_masks`), "full", causal everywhere, or a list with the mask
    of each layer: "row", "column", "conv" or "causal". kernel: of the convolutional masks. rotary: queries and keys are
    turned by row and column too, text lying on the diagonal (Wang 2024, arXiv 2409.12191). mlp, norm, qk_norm,
    zero_init, shift: see `TransformerBlock`. The defaults are the paper's. Raises ValueError for values that do
    not fit each other.
    """

    sampling_methods = ("next_logits", "prefill", "step")  # what is called beside forward
    outer = ("text_head", "image_head")

    def __init__(
        self,
        text_vocab: int = 16384,
        text_length: int = 256,
        num_codes: int = 8192,
        grid: tuple[int, int] = (32, 32),
        width: int = 3968,
        depth: int = 64,
        num_heads: int = 62,
        attention: Literal["sparse", "full"] | Sequence[str] = "sparse",
        kernel: int = 11,
        mlp: Literal["gelu", "squared_relu"] = "gelu",
        qk_norm: bool = False,
        norm: Literal["layer", "rms"] = "layer",
        zero_init: bool = False,
        rotary: bool = False,
        shift: Sequence[int] = (),
    ) -> None:
        super().__init__()
        named = {"sparse": layer_masks(depth), "full": ["causal"] * depth}
        kinds = named.get(attention, []) if isinstance(attention, str) else list(attention)
        if len(kinds) != depth or not set(kinds) <= {"row", "column", "conv", "causal"}:
            raise ValueError(
                "DALLE: attention must be 'sparse', 'full', or one of row, column, conv, causal "
                f"for each of the {depth} layers, got {attention!r}"
            )
        self.text_vocab, self.text_length, self.num_codes = text_vocab, text_length, num_codes
        self.grid = (int(grid[0]), int(grid[1]))
        self.kernel = kernel
        self.mask_kinds = kinds
        self.rotary, self.head_width = rotary, width // num_heads
        if rotary and self.head_width % 4:
            raise ValueError(
                "DALLE: rotary positions turn pairs by row and by column, so 4 must divide the width of a head, "
                f"got {self.head_width}; choose another width or num_heads"
            )
        self.start = nn.Parameter(torch.empty(width))
        self.text_embedding = nn.Embedding(text_vocab + text_length, width)  # the last T are the pads
        self.text_position = nn.Embedding(text_length, width)
        self.code_embedding = nn.Embedding(num_codes, width)
        self.code_position = AxialPositionEmbedding(self.grid, width)
        out_std = 0.02 / (2 * depth) ** 0.5  # Radford 2019: the residual sum keeps its size at any depth
        blocks = [
            TransformerBlock(width, num_heads, mlp, norm, qk_norm, zero_init, shift, out_std=out_std)
            for _ in range(depth)
        ]
        stream = text_length + self.grid[0] * self.grid[1]
        if any(place >= stream for block in blocks[:1] for place in block.shift):
            raise ValueError(f"DALLE: shift must stay within the {stream} tokens of the stream, got {list(shift)}")
        self.blocks = nn.ModuleList(blocks)
        self.norm = new_norm(norm, width)
        self.text_head = nn.Linear(width, text_vocab)
        self.image_head = nn.Linear(width, num_codes)
        for weight in (self.start, *(m.weight for m in self.children() if isinstance(m, nn.Embedding | nn.Linear))):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.text_head.bias)
        nn.init.zeros_(self.image_head.bias)

    def null_text(self, batch: int) -> Tensor:
        """The null caption, int64 (batch, T) on the model's device: all pads, hence learned.

        The one such object: training replaces dropped captions by it, guided sampling conditions on it.
        """
        return torch.full((batch, self.text_length), PAD, dtype=torch.int64, device=self.start.device)

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """text: int64 (B, T) in [0, text_vocab), pad 0; codes: int64 (B, n), 1 <= n <= N, raster order, in [0, K).

        Returns text logits (B, T, text_vocab) and image logits (B, n, K); each predicts its token from all before it.
        Raises ValueError on other shapes.
        """
        self._check(text, codes, at_least=1)
        x = self._run(torch.cat([self._embed_text(text), self._embed_codes(codes[:, :-1], 0)], dim=1))
        return self.text_head(x[:, : self.text_length]), self.image_head(x[:, self.text_length :])

    def next_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits (B, K) of code n given the n codes before it, computed anew. codes: int64 (B, n), 0 <= n < N."""
        self._check(text, codes, at_least=0)
        x = self._run(torch.cat([self._embed_text(text), self._embed_codes(codes, 0)], dim=1))
        return self.image_head(x[:, -1])

    def prefill(self, text: Tensor) -> tuple[list[BlockCache], Tensor]:
        """Reads the captions, int64 (B, T). Returns a cache with room for the image and the logits (B, K) of code 0.

        Raises ValueError for ids outside [0, text_vocab): the ids above are the pads, and would pass in silence.
        """
        self._check(text, text[:, :0], at_least=0)
        low, high = (int(end) for end in text.aminmax())
        if low < 0 or high >= self.text_vocab:
            raise ValueError(
                f"DALLE: text ids must be in [0, {self.text_vocab}), got {low} .. {high}; "
                "encode captions with the tokenizer that the model was trained with"
            )
        length = self.text_length + self.grid[0] * self.grid[1]
        cache = [block.new_cache(len(text), length) for block in self.blocks]
        x = self._run(self._embed_text(text), cache)
        return cache, self.image_head(x[:, -1])

    def step(self, cache: list[BlockCache], code: Tensor, position: int) -> Tensor:
        """Reads code number `position` (0 .. N - 2), int64 (B,); extends `cache`. Returns logits (B, K) of the next."""
        last = self.grid[0] * self.grid[1] - 2
        if not 0 <= position <= last:
            raise ValueError(
                f"DALLE.step: position must be in 0 .. {last} (the last code is never read), got {position}"
            )
        x = self._embed_codes(code[:, None], position)
        return self.image_head(self._run(x, cache, self.text_length + 1 + position)[:, -1])

    def _run(self, x: Tensor, cache: list[BlockCache] | None = None, start: int = 0) -> Tensor:
        queries = torch.arange(start, start + x.shape[1], device=x.device)
        keys = torch.arange(start + x.shape[1], device=x.device)
        rotated = rotation(self._coordinates(queries), self.head_width) if self.rotary else None
        made = {kind: self._mask(kind, queries, keys) for kind in set(self.mask_kinds)}
        for i, (block, kind) in enumerate(zip(self.blocks, self.mask_kinds, strict=True)):
            x = block(x, made[kind], None if cache is None else cache[i], start, rotated)
        return self.norm(x)

    def _coordinates(self, queries: Tensor) -> Tensor:
        """(row, column) of each place, (Q, 2): text lies on the diagonal, the image behind it."""
        text, width = self.text_length + 1, self.grid[1]  # the start token counts as text
        image = (queries - text).clamp(min=0)
        on_grid = torch.stack([text + image // width, text + image % width], dim=1)
        return torch.where((queries < text)[:, None], queries[:, None], on_grid)

    def _mask(self, kind: str, queries: Tensor, keys: Tensor) -> Tensor | None:
        text, width = self.text_length + 1, self.grid[1]  # the start token counts as text
        if kind == "row":
            return masks.row(queries, keys, text, width)
        if kind == "column":
            return masks.column(queries, keys, text, width)
        if kind == "conv":
            return masks.conv(queries, keys, text, width, self.kernel)
        return None  # causal, which attention does without a mask

    def _embed_text(self, text: Tensor) -> Tensor:
        position = torch.arange(self.text_length, device=text.device)
        tokens = torch.where(text == PAD, self.text_vocab + position, text)  # (B, T)
        x = self.text_embedding(tokens) + self.text_position(position)
        return torch.cat([self.start.expand(len(text), 1, -1), x], dim=1)  # (B, 1 + T, D)

    def _embed_codes(self, codes: Tensor, first: int) -> Tensor:
        position = torch.arange(first, first + codes.shape[1], device=codes.device)
        return self.code_embedding(codes) + self.code_position(position)  # (B, n, D)

    def _check(self, text: Tensor, codes: Tensor, at_least: int) -> None:
        most = self.grid[0] * self.grid[1] - 1 + at_least
        if text.dim() != 2 or text.shape[1] != self.text_length:
            raise ValueError(
                f"DALLE: text must be (B, {self.text_length}), padded with {PAD}, got {tuple(text.shape)}; "
                "encode captions with the model's own context length"
            )
        if codes.dim() != 2 or len(codes) != len(text) or not at_least <= codes.shape[1] <= most:
            raise ValueError(
                f"DALLE: codes must be (B, n) with B = {len(text)} and {at_least} <= n <= {most}, "
                f"got {tuple(codes.shape)}; flatten the {self.grid} grid in raster order"
            )


def layer_masks(depth: int) -> list[str]:
    """The paper's masks by layer (Appendix B.1): "column" if (i - 2) mod 4 = 0, else "row", and "conv" at the end.

    Layers count from 1 here: i = 1 .. depth.
    """
    return ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, depth)] + ["conv"]
