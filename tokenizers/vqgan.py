"""VQ-GAN's tokenizer (Esser 2021, arXiv:2012.09841, section 3.1 and table 7), and the same as latent diffusion reads
it. The defaults are the model with f = 16 and 1,024 codes, whose names its tensors have; Gumbel-softmax and FSQ may
stand in place of the codebook.

B images of 3 x H x W pixels in [-1, 1]; C channels of latents on a grid of h x w; K codes of D channels.

It does not know its loss, its discriminator, or where noise comes from.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers.precision import full
from .autoencoder import Decoder, Encoder, LatentScale, Layout
from .quantize import FSQ, GumbelQuantizer, VectorQuantizer, as_vectors
from .spec import CodesSpec, LatentsSpec, check_image

_NARROW = -30.0  # as narrow as the KL autoencoder lets a posterior be


class VQGAN(nn.Module):
    """Images in [-1, 1] to a grid of codes and back.

    num_codes, code_dim: K and D. latent_channels: C, what encoder and decoder hand over, before and after the 1x1
    convolutions around the quantizer. quantizer: "vector" (see `quantize.VectorQuantizer` for cosine and ema_decay),
    "gumbel", or "fsq" with its levels, of which num_codes is the product and code_dim the number. The other sizes: see
    `autoencoder.Layout`. Raises ValueError for sizes that do not fit.
    """

    outer = ("quant_conv", "post_quant_conv")

    def __init__(
        self,
        image_size: int = 256,
        num_codes: int = 1024,
        code_dim: int = 256,
        latent_channels: int = 256,
        quantizer: Literal["vector", "gumbel", "fsq"] = "vector",
        levels: Sequence[int] = (),
        cosine: bool = False,
        ema_decay: float | None = None,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        blocks_per_level: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        layout = Layout(image_size, width, channel_mult, blocks_per_level, attn_resolutions, norm_groups)
        if code_dim < 1:
            raise ValueError(f"VQGAN needs code_dim of at least 1, got {code_dim}; correct the recipe")
        if quantizer != "vector" and (cosine or ema_decay is not None):
            raise ValueError(
                f"VQGAN: cosine and ema_decay are of quantizer 'vector', got {quantizer!r}; leave them out"
            )
        self.image_size, self.codes = image_size, CodesSpec("codes", layout.features(latent_channels)[1:], num_codes)
        self._expose(code_dim)
        self.encoder, self.decoder = Encoder(layout, latent_channels), Decoder(layout, latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        self.quantize: nn.Module
        if quantizer == "vector":
            self.quantize = VectorQuantizer(num_codes, code_dim, cosine, ema_decay)
        elif quantizer == "gumbel":
            self.quantize = GumbelQuantizer(code_dim, num_codes, code_dim)
        elif quantizer == "fsq":
            self.quantize = FSQ(levels)
        else:
            raise ValueError(
                f"VQGAN needs quantizer 'vector', 'gumbel' or 'fsq', got {quantizer!r}; correct the recipe"
            )
        fsq = isinstance(self.quantize, FSQ)
        if fsq and (self.quantize.num_codes, len(levels)) != (num_codes, code_dim) or levels and not fsq:
            raise ValueError(
                "VQGAN needs levels with quantizer 'fsq' alone, num_codes their product and code_dim their number, got "
                f"levels {tuple(levels)}, num_codes {num_codes} and code_dim {code_dim}; correct the recipe"
            )

    def _expose(self, code_dim: int) -> None:
        """Sets what a prior reads."""
        self.spec: CodesSpec | LatentsSpec = self.codes

    @property
    def last_layer(self) -> Tensor:
        """The weights at which the adaptive weight compares gradients (equation 7)."""
        return self.decoder.conv_out.weight

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> codes int64 (B, h, w), without noise. Raises ValueError for other images."""
        check_image(image, self.image_size, type(self).__name__)
        return self.quantize.encode(self.latents(image))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w) -> image (B, 3, H, W), unclamped. Raises ValueError for other codes."""
        self.codes.check(codes, type(self).__name__)
        return self._image(self.quantize.lookup(codes))

    def latents(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) -> what is quantized, (B, D, h, w)."""
        return self.quant_conv(self.encoder(image))

    def forward(self, image: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> dict[str, Tensor]:
        """Image (B, 3, H, W) -> `reconstruction` (B, 3, H, W) and what the quantizer says, see `quantize`.

        noise, temperature: of quantizer "gumbel" alone. Raises ValueError where another gets noise.
        """
        check_image(image, self.image_size, type(self).__name__, values=False)
        latents = self.latents(image)
        if isinstance(self.quantize, GumbelQuantizer):
            out = self.quantize(latents, noise, temperature)
        elif noise is None:
            out = self.quantize(latents)
        else:
            raise ValueError("VQGAN takes noise with quantizer 'gumbel' alone; pass none")
        return {"reconstruction": self._image(out["quantized"]), **out}

    @torch.no_grad()
    def start_codes(self, images: Sequence[Tensor], seed: int) -> None:
        """Makes the codewords k-means centres of the latents of images, batches of (B, 3, H, W), in place.

        Raises ValueError where there is no codebook, or fewer latents than codes.
        """
        if not isinstance(self.quantize, VectorQuantizer):
            raise ValueError("only quantizer 'vector' has a codebook that k-means can start")
        self.quantize.start(torch.cat([as_vectors(self.latents(image)).cpu() for image in images]), seed)

    def _image(self, quantized: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype)))


class VQLatents(VQGAN):
    """VQ-GAN's tokenizer of which a prior reads what is to be quantized: the quantizer is then part of the decoder
    (VQ-reg of Rombach 2022, arXiv:2112.10752, section 3.1). The sizes are those of `VQGAN`.
    """

    def _expose(self, code_dim: int) -> None:
        self.spec, self.scale = LatentsSpec("latents", (code_dim, *self.codes.shape)), LatentScale(code_dim)

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> scaled latents (B, D, h, w), before the quantizer. Raises ValueError for
        other images.
        """
        check_image(image, self.image_size, type(self).__name__)
        return self.scale(full(self.latents(image)))

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> latents without their scale, and the logarithm of a variance that is next to none."""
        latents = full(self.latents(image))
        return latents, torch.full_like(latents, _NARROW)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, D, h, w), a prior's -> the image of the codes nearest to them, (B, 3, H, W), unclamped.

        Raises ValueError for latents of another shape.
        """
        return self._image(self.quantize.lookup(self.nearest(latents)))

    def nearest(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, D, h, w) -> codes int64 (B, h, w). Raises ValueError for latents of another shape."""
        self.spec.check(latents, type(self).__name__)
        return self.quantize.encode(self.scale.inverse(latents))
