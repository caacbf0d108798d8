"""A discrete VAE whose codes are patches of pixels: for pictures of a few thousand pixels, learned in a minute.

The paper's codes (`dvae`) tell of their surroundings too, so that few of them cannot tell what is there, and a prior
has more to learn. Here a code is chosen from its own pixels alone, as in vector quantisation of blocks (Linde 1980,
doi:10.1109/TCOM.1980.1094577); the decoder lays the patches side by side, and convolutions mend what the seams show.
Relaxation, likelihood and stage are the dVAE's.

B images of 3 x H x W pixels in [-1, 1], K codes on a grid of h x w, each of P x Q pixels, C channels.

It does not know its loss, its schedules or where the Gumbel noise comes from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.conv import BottleneckBlock, SameConv2d
from ..layers.precision import full, without_autocast
from .dvae import GumbelAutoencoder, code_scale, map_pixels
from .kmeans import kmeans
from .spec import CodesSpec

_FLAT = 0.01  # added to a patch's variance, summed over the colours, lest flat ones weigh without bound
_KERNELS = (3, 3, 3, 1)  # the encoder's order, for these blocks read what patches show


class PatchEncoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, K, h, w): one convolution, whose kernel and stride are the patch."""

    outer = ("head",)

    def __init__(self, num_codes: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, num_codes, patch, stride=patch)

    def forward(self, mapped: Tensor) -> Tensor:
        with without_autocast(mapped):
            return F.conv2d(full(mapped), full(self.head.weight), full(self.head.bias), self.head.stride)


class PatchDecoder(nn.Module):
    """Weights over codes (B, K, h, w) -> parameters (B, 6, H, W): patches side by side, plus what blocks add to them.

    The parameters are those of `dvae.Decoder`. Each code has a patch of C = `channels` >= 6 channels, of which the
    first six are parameters; the blocks, `depth` of them, read all C at full resolution.
    """

    outer = ("patch_embedding", "stem", "head")

    def __init__(self, num_codes: int, patch: tuple[int, int], width: int, channels: int, depth: int) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.patch_embedding = nn.Parameter(torch.empty(num_codes, channels * patch[0] * patch[1]))
        nn.init.normal_(self.patch_embedding, std=0.02)
        self.stem = SameConv2d(channels, width, 3)
        self.blocks = nn.Sequential(*(BottleneckBlock(width, width, _KERNELS, 1.0) for _ in range(depth)))
        self.head = SameConv2d(width, 6, 1)

    def forward(self, soft: Tensor) -> Tensor:
        with without_autocast(soft):
            flat = full(soft).permute(0, 2, 3, 1) @ full(self.patch_embedding)  # (B, h, w, C * P * Q)
        return self._refine(flat.to(self.patch_embedding.dtype))

    def from_codes(self, codes: Tensor) -> Tensor:
        """The same for one-hot weights, given as codes (B, h, w)."""
        return self._refine(F.embedding(codes, self.patch_embedding))

    def _refine(self, flat: Tensor) -> Tensor:
        batch, h, w, _ = flat.shape
        high, wide = self.patch
        x = flat.view(batch, h, w, self.channels, high, wide).permute(0, 1, 4, 2, 5, 3)  # (B, h, P, w, Q, C)
        x = x.reshape(batch, h * high, w * wide, self.channels).permute(0, 3, 1, 2)  # channels last, in one copy
        return x[:, :6] + self.head(F.relu(self.blocks(self.stem(x))))


class PatchDVAE(GumbelAutoencoder):
    """Images in [-1, 1] to a grid of codes and back; each code stands for a patch of (P, Q) pixels.

    image_size: H = W, a multiple of P and of Q. width, depth: of the decoder's blocks; a multiple of 4, and how many.
    channels: of a code's patch in the decoder, at least 6. Raises ValueError for sizes that do not fit.
    """

    encoder: PatchEncoder
    decoder: PatchDecoder
    codes_from_pixels = True

    def __init__(
        self,
        image_size: int = 32,
        num_codes: int = 1024,
        patch: Sequence[int] = (4, 4),
        width: int = 64,
        channels: int = 16,
        depth: int = 2,
    ) -> None:
        if not isinstance(patch, list | tuple) or [type(side) for side in patch] != [int, int]:
            raise ValueError(f"PatchDVAE needs patch as two whole numbers, got {patch!r}; write e.g. patch: [4, 4]")
        high, wide = patch
        if min(image_size, num_codes, high, wide, width, depth) < 1 or channels < 6:
            raise ValueError(
                "PatchDVAE needs every size to be at least 1 and channels at least 6, got image_size "
                f"{image_size}, num_codes {num_codes}, patch {high, wide}, width {width}, channels {channels}, "
                f"depth {depth}; correct the recipe"
            )
        if image_size % high or image_size % wide:
            raise ValueError(
                f"PatchDVAE needs image_size to be a multiple of both sides of the patch {high, wide}, "
                f"got {image_size}; change image_size or patch"
            )
        super().__init__(
            image_size,
            CodesSpec("codes", (image_size // high, image_size // wide), num_codes),
            PatchEncoder(num_codes, (high, wide)),
            PatchDecoder(num_codes, (high, wide), width, channels, depth),
        )

    @torch.no_grad()
    def start_codes(self, images: Sequence[Tensor], seed: int, evenness: float = 0.0) -> None:
        """Makes the codes k-means centres of different patches, in place, and the decoder paste those centres.

        The argmax of the logits is then the centre nearest to a patch. It counts each patch once, to 1 / 255 of the
        mapped range: as they come, backgrounds would take most of the codes. It divides the squared distance of a patch
        by the variance of its pixels to the power of `evenness`, in [0, 1]: at 0, edges between near colours, as yellow
        on orange, have a sixth of the codes of other edges, at 1 half as many, at the expense of these. images: batches
        of (B, 3, H, W) in [-1, 1]. Raises ValueError when they hold fewer different patches than there are codes.
        """
        head, (high, wide) = self.encoder.head, self.decoder.patch
        found = torch.cat(
            [F.unfold(map_pixels(image).cpu(), (high, wide), stride=(high, wide)).mT.flatten(0, 1) for image in images]
        )
        different = (found * 255).round().unique(dim=0) / 255
        variance = different.view(len(different), 3, high * wide).var(2, correction=0).sum(1)
        weight = (variance + _FLAT).pow(-evenness)
        centres = kmeans(different, self.spec.vocabulary, seed, weight=weight)[0]  # (K, 3 * P * Q)
        scale = code_scale(centres, 50.0)
        bias = -scale / 2 * centres.square().sum(1)
        head.weight.copy_((scale * (centres - centres.mean(0))).view_as(head.weight))
        head.bias.copy_(bias - bias.mean())
        table = self.decoder.patch_embedding  # (K, C * P * Q)
        mu = torch.logit(centres).to(table.device)
        table[:, : mu.shape[1]] = mu
        table[:, mu.shape[1] : 2 * mu.shape[1]] = -2.0  # ln b
        self.decoder.head.weight.zero_()  # at first the blocks add nothing
        self.decoder.head.bias.zero_()
