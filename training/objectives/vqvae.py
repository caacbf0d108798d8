"""Objective of the VQ-VAE (van den Oord 2017, arXiv:1711.00937, equation 3), and of a codebook in any tokenizer.

B images, K codes of D channels on a grid of h x w.

It does not know the model. Terms are means over values where the paper has sums, as in the authors' example.
"""

from torch import Tensor

from ...layers.precision import full
from .dvae import codebook_counts
from .weighting import check_images, weighted


def quantization(latents: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """|sg[z] - e|^2, the codebook's term, and |z - sg[e]|^2, the encoder's: (B, D, h, w) twice -> (B,) twice.

    Means over D, h and w. Raises ValueError when the shapes differ.
    """
    if latents.shape != codewords.shape or latents.dim() != 4:
        raise ValueError(
            "quantization needs latents and codewords of one shape (B, D, h, w), "
            f"got {tuple(latents.shape)} and {tuple(codewords.shape)}"
        )
    latents, codewords = full(latents), full(codewords)
    codebook = (latents.detach() - codewords).square().mean(dim=(1, 2, 3))
    commitment = (latents - codewords.detach()).square().mean(dim=(1, 2, 3))
    return codebook, commitment


def vqvae(
    reconstruction: Tensor,
    image: Tensor,
    latents: Tensor,
    codewords: Tensor,
    codes: Tensor,
    num_codes: int,
    weight: Tensor,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    data_variance: float = 1.0,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Squared error / variance of the data + codebook's term + commitment_weight * encoder's term. Separable.

    reconstruction, image: (B, 3, H, W). latents, codewords: (B, D, h, w), codes: (B, h, w), as the quantizer gives
    them. weight: (B,), 0 leaves an image out. codebook_weight: 1 in the paper, 0 where the codebook follows the latents
    by itself. data_variance: of the pixels; with it the first term is a share of what is to be explained, so that the
    commitment weight means the same for any data.

    Returns ((weighted loss sum, weight sum), scalars), the scalars detached weighted means: `squared`, `codebook` and
    `commitment`, each before its weight; and `codes`, the counts (K,) of the codes. Raises ValueError when shapes
    disagree.
    """
    check_images("vqvae", reconstruction, image, weight)
    squared = (full(reconstruction) - full(image)).square().mean(dim=(1, 2, 3))
    codebook, commitment = quantization(latents, codewords)
    loss = squared / data_variance + codebook_weight * codebook + commitment_weight * commitment  # (B,)
    total, scalars = weighted(loss, weight, {"squared": squared, "codebook": codebook, "commitment": commitment})
    return total, scalars | {"codes": codebook_counts(codes, num_codes, weight)}
