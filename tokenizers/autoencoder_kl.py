"""The autoencoder of latent diffusion, regularised by a slight KL (Rombach 2022, arXiv:2112.10752, section 3.1 and
appendix G). The defaults are KL-f8, whose names its tensors have.

B images of 3 x H x W pixels in [-1, 1]; C channels of latents on a grid of h x w.

It does not know its loss, nor where the noise comes from.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import Decoder, Encoder, LatentScale, Layout
from .spec import LatentsSpec, check_image
from .tiles import decode_tiles
from .vae import moments, reparameterise


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to Gaussian posteriors over latents (B, C, h, w) and back.

    latent_channels: C, of the latents and of what encoder and decoder hand over. The other sizes: see
    `autoencoder.Layout`. `scale` holds the measured mean and standard deviation of the latents: what `encode` gives and
    `decode` takes is scaled by it. `tile`: so many places a side are decoded at a time, None for all; see `tiles`.
    """

    outer = ("quant_conv", "post_quant_conv")

    def __init__(
        self,
        image_size: int = 256,
        latent_channels: int = 4,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        blocks_per_level: int = 2,
        attn_resolutions: Sequence[int] = (),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        layout = Layout(image_size, width, channel_mult, blocks_per_level, attn_resolutions, norm_groups)
        self.image_size = image_size
        self.spec = LatentsSpec("latents", layout.features(latent_channels))
        self.encoder, self.decoder = Encoder(layout, 2 * latent_channels), Decoder(layout, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.scale = LatentScale(latent_channels)
        self.tile: int | None = None

    @property
    def last_layer(self) -> Tensor:
        """The weights at which the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w): a draw with noise, the mean without.

        noise: standard normal (B, C, h, w). Raises ValueError for images or noise of another shape.
        """
        check_image(image, self.image_size, type(self).__name__)
        return self.scale(reparameterise(*self.posterior(image), noise))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> image (B, 3, H, W), unclamped. Raises ValueError for another shape."""
        self.spec.check(latents, type(self).__name__)
        z = self.scale.inverse(latents)
        return self._image(z) if self.tile is None else decode_tiles(self._image, z, self.tile, self.tile // 4)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> mean and logarithm of the variance, each (B, C, h, w), unscaled."""
        return moments(self.quant_conv(self.encoder(image)))

    def forward(self, image: Tensor, noise: Tensor | None = None, shrink: Sequence[int] = ()) -> dict[str, Tensor]:
        """Image (B, 3, H, W), noise (B, C, h, w) or None for the mean -> what the objective needs.

        `reconstruction` (B, 3, H, W); `mean`, `log_variance` and `latents` (B, C, h, w), unscaled; for each n of
        `shrink`, which divides h and w, `shrunk_n` (B, 3, H / n, W / n), what the latents' averages over n x n give.
        """
        check_image(image, self.image_size, type(self).__name__, values=False)
        mean, log_variance = self.posterior(image)
        latents = reparameterise(mean, log_variance, noise)
        found = {"mean": mean, "log_variance": log_variance, "latents": latents}
        found |= {f"shrunk_{n}": self._image(F.avg_pool2d(latents, n)) for n in shrink}
        return found | {"reconstruction": self._image(latents)}

    def _image(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))
