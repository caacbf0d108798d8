"""The variational autoencoder (Kingma 2013, arXiv:1312.6114) with flat latents, so that a standard normal is its prior.

The paper's networks are perceptrons with one hidden layer; here they are the convolutions of `autoencoder`.

B images of 3 x H x W pixels in [-1, 1], D latents.

It does not know its likelihood or its loss, nor where the noise comes from.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers.precision import full
from .autoencoder import Decoder, Encoder, FlatBottleneck, Layout
from .spec import LatentsSpec, check_image


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, ...) -> mean and logarithm of the variance of a Gaussian posterior, each float32 (B, C, ...).

    The logarithm is clamped to [-30, 20], as in latent diffusion: beyond that its exponential is of no use.
    """
    mean, log_variance = full(features).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def reparameterise(mean: Tensor, log_variance: Tensor, noise: Tensor | None) -> Tensor:
    """mean + std * noise (Kingma 2013, section 2.4), all of one shape; without noise, the mean.

    Raises ValueError when the noise has another shape.
    """
    if noise is None:
        return mean
    if noise.shape != mean.shape:
        raise ValueError(f"the posterior needs noise of shape {tuple(mean.shape)}, got {tuple(noise.shape)}")
    return mean + (log_variance / 2).exp() * noise


class VAE(nn.Module):
    """Images in [-1, 1] to Gaussian posteriors over flat latents (B, D) and back.

    latent_dim: D. latent_channels: channels between the convolutions and the linear maps. scale: "pixel" where the
    decoder gives the logarithm of each value's scale (appendix C.2), "shared" for one that is learned for each of the
    three channels, which is the safer choice for images. The other sizes: see `autoencoder.Layout`.
    """

    def __init__(
        self,
        image_size: int = 32,
        latent_dim: int = 64,
        latent_channels: int = 16,
        scale: Literal["pixel", "shared"] = "pixel",
        width: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
        blocks_per_level: int = 2,
        attn_resolutions: Sequence[int] = (),
        norm_groups: int = 32,
    ) -> None:
        if scale not in ("pixel", "shared"):
            raise ValueError(f"VAE needs scale to be 'pixel' or 'shared', got {scale!r}; correct the recipe")
        super().__init__()
        layout = Layout(image_size, width, channel_mult, blocks_per_level, attn_resolutions, norm_groups)
        shape = layout.features(latent_channels)
        self.image_size, self.spec = image_size, LatentsSpec("latents", (latent_dim,))
        self.encoder = Encoder(layout, latent_channels)
        self.decoder = Decoder(layout, latent_channels, 6 if scale == "pixel" else 3)
        self.flat = FlatBottleneck(shape, 2 * latent_dim, latent_dim)
        self.log_scale = nn.Parameter(torch.zeros(3)) if scale == "shared" else None

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> latents (B, D): a draw with noise (B, D), the posterior's mean without."""
        check_image(image, self.image_size, type(self).__name__)
        return reparameterise(*self.posterior(image), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D) -> the mean image (B, 3, H, W), unclamped. Raises ValueError for another shape."""
        self.spec.check(latents, type(self).__name__)
        return self.likelihood(latents)[0]

    def likelihood(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D) -> location (B, 3, H, W) and logarithm of the scale, (B, 3, H, W) or (1, 3, 1, 1)."""
        out = self.decoder(self.flat.unflatten(latents))
        if self.log_scale is not None:
            return out, self.log_scale[None, :, None, None]
        mean, log_scale = out.chunk(2, dim=1)
        return mean, log_scale

    def forward(self, image: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Image (B, 3, H, W), noise (B, D) or None for the mean -> what the objective needs.

        `mean`, `log_variance` and `latents` (B, D); `reconstruction` (B, 3, H, W) and its `log_scale`.
        """
        check_image(image, self.image_size, type(self).__name__, values=False)
        mean, log_variance = self.posterior(image)
        latents = reparameterise(mean, log_variance, noise)
        reconstruction, log_scale = self.likelihood(latents)
        found = {"reconstruction": reconstruction, "log_scale": log_scale}
        return found | {"mean": mean, "log_variance": log_variance, "latents": latents}

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> mean and log_variance (B, D) of q(latents | image)."""
        return moments(self.flat.flatten(self.encoder(image)))
