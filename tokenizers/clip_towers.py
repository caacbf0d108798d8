"""CLIP's two towers: an image and a caption become two embeddings of one space (Radford 2021, arXiv:2103.00020).

The weights have open_clip's names and layout, so a state dict of an open_clip `CLIP` (a vision transformer with a class
token, a causal text transformer, plain GELU) loads strictly and gives the same numbers; open_clip is not imported.

B images or captions, T text tokens, N patches, D embed_dim, W width of a tower.

It does not know the caption tokenizer (only that ids lie in [0, text_vocab)), the loss, or what the scores are for.
Weights trained with CLIP's quick GELU have the same names but another activation: they load and give other numbers.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.clip_transformer import CLIPTransformer, frame


class _VisionTower(nn.Module):
    """A vision transformer whose class token, after the last norm, is projected to the embedding."""

    outer = ("conv1", "positional_embedding", "proj")

    def __init__(self, embed_dim: int, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = CLIPTransformer(width, depth, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=scale)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).transpose(1, 2)  # (B, N, W)
        first = self.class_embedding.to(patches.dtype).expand(len(image), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)  # (B, 1+N, W)
        classes = self.transformer(self.ln_pre(x), only=torch.zeros(len(x), dtype=torch.int64, device=x.device))
        return self.ln_post(classes) @ self.proj  # (B, D)


class CLIP(nn.Module):
    """Two transformers and one temperature.

    `logit_scale` holds ln(1 / temperature), 1 / 0.07 at the start (section 2.5); `forward` returns its exponential.
    Raises ValueError if a patch does not divide the image or a head does not divide a width.
    """

    outer = ("positional_embedding", "text_projection")
    framing = 2  # ids that `frame` adds

    def __init__(
        self,
        embed_dim: int,
        image_size: int,
        patch_size: int,
        vision_width: int,
        vision_depth: int,
        vision_heads: int,
        text_vocab: int,
        text_length: int,
        text_width: int,
        text_depth: int,
        text_heads: int,
    ) -> None:
        super().__init__()
        _divides("image_size", image_size, "patch_size", patch_size)
        _divides("vision_width", vision_width, "vision_heads", vision_heads)
        _divides("text_width", text_width, "text_heads", text_heads)
        self.image_size, self.text_vocab, self.text_length = image_size, text_vocab, text_length
        self.visual = _VisionTower(embed_dim, image_size, patch_size, vision_width, vision_depth, vision_heads)
        self.transformer = CLIPTransformer(text_width, text_depth, text_heads)
        self.token_embedding = nn.Embedding(text_vocab, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(text_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.transformer.start_as_text(self.token_embedding, self.positional_embedding)
        nn.init.normal_(self.text_projection, std=text_width**-0.5)

    def frame(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Ids of captions, int64 (B, T - 2), of which lengths (B,) count -> int64 (B, T): start, caption, end, zeros.

        See `layers.clip_transformer.frame`; `encode_text` reads a caption's embedding at its end. Raises ValueError for
        other lengths, and for ids that are not below the start's, text_vocab - 2.
        """
        framed = frame(text, lengths, self.text_vocab, pad=0)
        if ((framed >= self.text_vocab - 2).sum(dim=1) > 2).any():
            raise ValueError(
                f"a caption's ids must lie below the start id {self.text_vocab - 2}, got {int(text.max())}; "
                "build the CLIP with text_vocab = the caption tokenizer's vocabulary + 2"
            )
        return framed

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """image (B, 3, S, S) in [-1, 1] with S = image_size -> embeddings (B, D), of length 1 if `normalize`.

        The network does no scaling of its own: a published open_clip checkpoint expects its own mean and deviation
        instead of [-1, 1]. Raises ValueError for another size.
        """
        expected = (3, self.image_size, self.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(f"CLIP reads images (B, {expected}), got {tuple(image.shape)}; resize them first")
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text (B, T) int64, T <= text_length -> embeddings (B, D), of length 1 if `normalize`.

        The embedding is read at the first place of the highest id, which is the end token's (open_clip's `argmax`
        pooling); see `frame`. Attention is causal, so what stands behind that place has no effect.
        Raises ValueError for more than text_length tokens.
        """
        if text.ndim != 2 or not 1 <= text.shape[1] <= self.text_length:
            raise ValueError(f"text must be (B, T) with 1 <= T <= {self.text_length}, got {tuple(text.shape)}; cut it")
        places = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:places]  # (B, T, W)
        pooled = self.transformer.read(x, only=text.argmax(dim=1))  # (B, W)
        features = self.ln_final(pooled) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> image embeddings (B, D) and text embeddings (B, D) of length 1, and the scale of their logits, > 0."""
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()


def _divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if part < 1 or whole < 1 or whole % part:
        raise ValueError(f"{part_name} must divide {whole_name}, got {part} and {whole}; change one of them")
