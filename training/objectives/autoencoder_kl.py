"""Objective of latent diffusion's autoencoder (Rombach 2022, arXiv:2112.10752, section 3.1 and appendix G): VQ-GAN's,
with a slight KL in place of the codebook.

B images of D = 3 * H * W values.

It does not know the networks, see `vqgan`. The reconstruction is a sum over values as the KL is one over latents, so
that the published weight 1e-6 is between them. Latents may also be held to smaller pictures (EQ-VAE: Kouzelis 2025,
arXiv:2502.09509, for changes of scale): what averages of neighbouring latents give back is the picture made as small.
Coarse structure then lies in coarse latents, which diffusion models learn much sooner.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ...layers.precision import full
from .vae import gaussian_kl
from .vqgan import generator
from .weighting import Average, check_images, pixel_error, weighted


def autoencoder_kl(
    reconstruction: Tensor,
    image: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    weight: Tensor,
    fake_logits: Tensor | None = None,
    last_layer: Tensor | None = None,
    ramp: float = 0.0,
    kl_weight: float = 1e-6,
    error: str = "l1",
    perceptual: Tensor | None = None,
    perceptual_weight: float = 1.0,
    average: Average | None = None,
    shrunk: Sequence[Tensor] = (),
    equivariance: float = 0.0,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """D * (error + perceptual + equivariance * shrunk) + kl_weight * KL + ramp * adaptive weight * fooling, per image.

    mean, log_variance: of the posterior, (B, C, h, w); its KL is summed over all three. error: "l1" as published, or
    "l2", which learns edges sooner. shrunk: what shrunk latents give back, (B, 3, H / n, W / n) each; their errors are
    added up, and the adaptive weight does not see them. ramp: 0.5 from step 50,001 on as published for KL-f8. The other
    arguments, and when it is coupled: see `vqgan.vqgan`.

    Returns ((weighted loss sum, weight sum), scalars), the scalars detached weighted means: `l1` or `l2`, `perceptual`
    and `shrunk_n` per value, `nll` and `kl` per image, `fooling`, `adaptive`. Raises ValueError when shapes disagree.
    """
    check_images("autoencoder_kl", reconstruction, image, weight, *([] if perceptual is None else [perceptual]))
    nll = pixel_error(reconstruction, image, error)
    kl = gaussian_kl(mean, log_variance).flatten(1).sum(dim=1)
    shown = {error: nll, "kl": kl} | ({} if perceptual is None else {"perceptual": perceptual})
    nll = image[0].numel() * (nll if perceptual is None else nll + perceptual_weight * full(perceptual))
    regular = kl_weight * kl
    for small in shrunk:
        times = image.shape[-1] // small.shape[-1]
        apart = pixel_error(small, F.avg_pool2d(image, times), error)
        regular = regular + equivariance * image[0].numel() * apart
        shown[f"shrunk_{times}"] = apart
    total, scalars = generator(nll, regular, weight, fake_logits, last_layer, ramp, average)
    return total, scalars | weighted(nll, weight, shown)[1]
