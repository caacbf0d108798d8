"""The VQ-VAE (van den Oord 2017, arXiv:1711.00937, section 4.1): strided convolutions and a few residual blocks around
a codebook.

B images of 3 x H x W pixels in [-1, 1]; K codes of D channels on a grid of h x w.

It does not know its loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.conv import BottleneckBlock, SameConv2d
from .quantize import VectorQuantizer, as_vectors
from .spec import CodesSpec, check_image


class VQVAE(nn.Module):
    """Images in [-1, 1] to a grid of codes and back.

    num_codes, code_dim: K and D. width: channels throughout, residual_width: inside the residual blocks. depth: how
    many blocks on each side. num_downs: convolutions of 4x4 and stride 2, so that h = H / 2**num_downs. cosine,
    ema_decay: see `quantize.VectorQuantizer`. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_codes: int = 512,
        code_dim: int = 64,
        width: int = 256,
        residual_width: int = 256,
        depth: int = 2,
        num_downs: int = 2,
        cosine: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        if min(image_size, width, residual_width, num_downs) < 1 or depth < 0:
            raise ValueError("VQVAE needs every size to be at least 1; correct the recipe")
        if image_size % 2**num_downs:
            raise ValueError(
                f"VQVAE needs image_size to be a multiple of 2 ** num_downs = {2**num_downs}, got {image_size}; "
                "change image_size or num_downs"
            )
        super().__init__()
        grid = image_size >> num_downs
        self.image_size, self.spec = image_size, CodesSpec("codes", (grid, grid), num_codes)
        layers: list[nn.Module] = []
        for i in range(num_downs):
            layers += [nn.Conv2d(width if i else 3, width, 4, stride=2, padding=1), nn.ReLU()]
        layers[-1:] = [*_blocks(width, residual_width, depth), nn.ReLU(), SameConv2d(width, code_dim, 1)]
        self.encoder = nn.Sequential(*layers)
        self.quantize = VectorQuantizer(num_codes, code_dim, cosine, ema_decay)
        layers = [SameConv2d(code_dim, width, 3), *_blocks(width, residual_width, depth)]
        for i in range(num_downs):
            n_out = width if i < num_downs - 1 else 3
            layers += [nn.ReLU(), nn.ConvTranspose2d(width, n_out, 4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*layers)
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        self.outer = tuple(f"{name}.{i}" for name, half in halves.items() for i in (0, len(half) - 1))

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> codes int64 (B, h, w). Raises ValueError for other images."""
        check_image(image, self.image_size, type(self).__name__)
        return self.quantize.encode(self._latents(image))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w) -> image (B, 3, H, W), unclamped. Raises ValueError for other codes."""
        self.spec.check(codes, type(self).__name__)
        return self._image(self.quantize.lookup(codes))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (B, 3, H, W) -> `reconstruction` (B, 3, H, W), and `codes`, `latents` and `codewords` for the loss."""
        check_image(image, self.image_size, type(self).__name__, values=False)
        out = self.quantize(self._latents(image))
        return {"reconstruction": self._image(out["quantized"]), **out}

    @torch.no_grad()
    def start_codes(self, images: Sequence[Tensor], seed: int) -> None:
        """Makes the codewords k-means centres of the latents of images, batches of (B, 3, H, W), in place.

        Raises ValueError when there are fewer latents than codes.
        """
        self.quantize.start(torch.cat([as_vectors(self._latents(image)).cpu() for image in images]), seed)

    def _latents(self, image: Tensor) -> Tensor:
        return self.encoder(image.to(self.encoder[0].weight.dtype))

    def _image(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized.to(self.decoder[0].weight.dtype))


def _blocks(width: int, residual_width: int, depth: int) -> list[nn.Module]:
    """ReLU, 3x3 convolution, ReLU, 1x1 convolution, added to what came in; `depth` times."""
    return [BottleneckBlock(width, width, (3, 1), 1.0, inner_width=residual_width) for _ in range(depth)]
