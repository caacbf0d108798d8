"""Encoders of captions for priors that look at them: a small transformer, which is trained with its prior (as in
Rombach 2022, arXiv:2112.10752, section 4.3.1), and the text tower of CLIP (Radford 2021, arXiv:2103.00020), which
Stable Diffusion takes as trained.

Both: encoder(text) -> (tokens, mask or None), the fields of those names of a `Condition`; encoder.frame(text, lengths),
what it reads of the ids of captions; and encoder.null_text(batch), the null caption.

B captions, T text tokens, D width.

They do not know what reads their output, nor how captions become numbers.
"""

import torch
from torch import Tensor, nn

from ..layers.attention import TransformerBlock
from ..layers.clip_transformer import CLIPTransformer, frame
from ..layers.random import Draws
from .condition import Condition

PAD = 0


class CaptionEncoder(nn.Module):
    """A transformer over captions of the own BPE, in which every token looks at every other one.

    A learned start token stands before each caption, and alone for the null caption; pads are looked at by nobody, so
    the number of them changes nothing. Raises ValueError unless `num_heads` divides `width`.
    """

    outer = ("start", "positions")
    framing = 0  # ids that `frame` adds

    def __init__(
        self, text_vocab: int = 16384, text_length: int = 77, width: int = 512, depth: int = 6, num_heads: int = 8
    ) -> None:
        super().__init__()
        self.text_vocab, self.text_length, self.width = text_vocab, text_length, width
        self.start = nn.Parameter(torch.empty(width))
        self.token_embedding = nn.Embedding(text_vocab, width)
        self.positions = nn.Parameter(torch.empty(text_length, width))
        out_std = 0.02 / (2 * max(depth, 1)) ** 0.5  # Radford 2019: the residual sum keeps its size at any depth
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads, out_std=out_std) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for weight in (self.start, self.token_embedding.weight, self.positions):
            nn.init.normal_(weight, std=0.02)

    def frame(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Ids padded with 0, (B, T), as they are."""
        return text

    def null_text(self, batch: int) -> Tensor:
        """The null caption, int64 (batch, T): pads alone."""
        return torch.full((batch, self.text_length), PAD, dtype=torch.int64, device=self.start.device)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text: int64 (B, t) in [0, text_vocab), t <= T, pad 0. Returns tokens (B, 1 + t, D), mask bool (B, 1 + t).

        Raises ValueError for more than T tokens.
        """
        _check(text, self.text_length, type(self).__name__)
        x = self.token_embedding(text) + self.positions[: text.shape[1]]
        x = torch.cat([self.start.expand(len(text), 1, -1), x], dim=1)  # (B, 1 + t, D)
        mask = torch.cat([text.new_ones(len(text), 1), text], dim=1) != PAD
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        return self.norm(x), mask


class CLIPText(nn.Module):
    """The text tower of CLIP up to its last norm, for every token; the defaults are ViT-L/14's, of Stable Diffusion 1.

    Stable Diffusion 2 reads OpenCLIP's ViT-H/14, of 24 blocks, behind the last block but one, to which it applies the
    last norm: width 1024, depth 23, num_heads 16, without quick_gelu, pad 0. pad: what fills a caption up, None for the
    end token. Raises ValueError unless `num_heads` divides `width`.
    """

    outer = ("positional_embedding",)
    framing = 2

    def __init__(
        self,
        text_vocab: int = 49408,
        text_length: int = 77,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        quick_gelu: bool = True,
        pad: int | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"CLIPText: num_heads must divide the width, got {num_heads} and {width}; change one")
        self.text_vocab, self.text_length, self.width = text_vocab, text_length, width
        self.pad = text_vocab - 1 if pad is None else pad
        self.transformer = CLIPTransformer(width, depth, num_heads, quick_gelu)
        self.token_embedding = nn.Embedding(text_vocab, width)
        self.positional_embedding = nn.Parameter(torch.empty(text_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.transformer.start_as_text(self.token_embedding, self.positional_embedding)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they compute."""
        return list(self.transformer.resblocks)

    def frame(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Ids of captions, int64 (B, T - 2), of which lengths (B,) count -> int64 (B, T): start, caption, end, pads.

        See `layers.clip_transformer.frame`.
        """
        return frame(text, lengths, self.text_vocab, self.pad)

    def null_text(self, batch: int) -> Tensor:
        """The null caption, int64 (batch, T): framed, as CLIP's own tokenizer encodes an empty string."""
        nothing = torch.zeros(batch, self.text_length - 2, dtype=torch.int64, device=self.positional_embedding.device)
        return self.frame(nothing, nothing.new_zeros(batch))

    def forward(self, text: Tensor) -> tuple[Tensor, None]:
        """text: int64 (B, t) in [0, text_vocab), t <= T. Returns tokens (B, t, D), and no mask: pads are looked at.

        Each token is made of those before it and itself. Raises ValueError for more than T tokens.
        """
        _check(text, self.text_length, type(self).__name__)
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        return self.ln_final(self.transformer.read(x)), None


def _check(text: Tensor, length: int, who: str) -> None:
    if text.dim() != 2 or not 1 <= text.shape[1] <= length:
        raise ValueError(f"{who}: text must be (B, t) with 1 <= t <= {length}, got {tuple(text.shape)}; cut it")


class Captioned(nn.Module):
    """A prior and the encoder of the captions that it looks at, trained as one network."""

    def __init__(self, prior: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.prior, self.text = prior, text

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of both, in the order in which they compute."""
        return [*self.text.blocks, *self.prior.blocks]

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, draws: Draws | None = None) -> Tensor:
        """text: int64 (B, T), framed. The rest as the prior has it."""
        tokens, mask = self.text(text)
        return self.prior(x_t, t, Condition(tokens=tokens, mask=mask), draws)
