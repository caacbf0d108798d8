"""Objective of VQ-GAN (Esser 2021, arXiv:2012.09841, equations 4 to 7): reconstruction, codebook, and a discriminator
whose share is balanced against the reconstruction at the decoder's last layer.

B images of 3 x H x W pixels, h x w patches that the discriminator judges.

It does not know the networks: the discriminator's logits and the perceptual distances come in. The perceptual distance
is part of the reconstruction, and the discriminator's loss is the hinge (Lim 2017, arXiv:1705.02894), as published.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers.precision import full
from .dvae import codebook_counts
from .weighting import Average, check_images, pixel_error, weighted


def hinge(real_logits: Tensor, fake_logits: Tensor, weight: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The discriminator's loss: half of max(0, 1 - real) + max(0, 1 + fake), means over patches. Separable.

    real_logits, fake_logits: (B, 1, h, w), of images and of their reconstructions, detached. weight: (B,). Returns
    ((weighted loss sum, weight sum), scalars), the scalars detached weighted means: `hinge`, and the mean logits
    `real_logits` and `fake_logits`.
    """
    if real_logits.shape != fake_logits.shape or weight.shape != real_logits.shape[:1]:
        shapes = [tuple(x.shape) for x in (real_logits, fake_logits, weight)]
        raise ValueError(f"hinge needs logits (B, 1, h, w) of one shape twice and weight (B,), got {shapes}")
    real, fake = full(real_logits).flatten(1), full(fake_logits).flatten(1)
    loss = (F.relu(1 - real).mean(dim=1) + F.relu(1 + fake).mean(dim=1)) / 2
    shown = {"hinge": loss, "real_logits": real.mean(dim=1), "fake_logits": fake.mean(dim=1)}
    return weighted(loss, weight, shown)


def fooling(fake_logits: Tensor) -> Tensor:
    """The generator's loss: minus the mean logit of each image's patches, (B, 1, h, w) -> (B,)."""
    return -full(fake_logits).flatten(1).mean(dim=1)


def adaptive_weight(nll: Tensor, adversary: Tensor, last_layer: Tensor, average: Average | None = None) -> Tensor:
    """|grad of nll| / (|grad of adversary| + 1e-6) at the last layer (equation 7), clamped to [0, 1e4], detached.

    nll, adversary: () losses of the same batch. last_layer: the decoder's last weights, which require gradients.
    average: of a gradient over ranks, None for one; without it each rank would have a weight of its own.
    """
    norms = []
    for loss in (nll, adversary):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append((gradient if average is None else average(gradient)).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(0.0, 1e4).detach()


def generator(
    nll: Tensor,
    regular: Tensor,
    weight: Tensor,
    fake_logits: Tensor | None,
    last_layer: Tensor | None,
    ramp: float,
    average: Average | None = None,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """nll + regular + ramp * adaptive weight * fooling; the first two and weight are (B,), for the rest see `vqgan`.

    Returns ((weighted loss sum, weight sum), scalars `nll`, and `fooling` and `adaptive` where the ramp is not 0).
    """
    if ramp == 0:
        return weighted(nll + regular, weight, {"nll": nll})
    if fake_logits is None or last_layer is None:
        raise ValueError("where the ramp is not 0 the generator needs fake_logits and last_layer; pass both")
    adversary = fooling(fake_logits)
    share = weight.to(nll.dtype) / weight.sum().clamp(min=1e-12)
    adaptive = adaptive_weight((share * nll).sum(), (share * adversary).sum(), last_layer, average)
    total, scalars = weighted(nll + regular + ramp * adaptive * adversary, weight, {"nll": nll, "fooling": adversary})
    return total, scalars | {"adaptive": adaptive}


def vqgan(
    reconstruction: Tensor,
    image: Tensor,
    regular: Tensor,
    codes: Tensor,
    num_codes: int,
    weight: Tensor,
    fake_logits: Tensor | None = None,
    last_layer: Tensor | None = None,
    ramp: float = 0.0,
    error: str = "l1",
    perceptual: Tensor | None = None,
    perceptual_weight: float = 1.0,
    average: Average | None = None,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The tokenizer's loss: error + perceptual + regular + ramp * adaptive weight * fooling.

    reconstruction, image: (B, 3, H, W). error: of values, "l1" as in the published code or "l2" as in equation 4; see
    `weighting.pixel_error`. regular: (B,), what the quantizer
    adds: codebook's + 0.25 * encoder's term of `vqvae.quantization`; 1e-8 * sum over codes, mean over positions, of the
    KL (`dvae.uniform_kl`) for Gumbel-softmax; zeros for FSQ. codes: (B, h, w) in [0, num_codes). weight: (B,).
    ramp: what the adaptive weight is multiplied by; where it is not 0, fake_logits, the frozen discriminator's of the
    reconstruction, with gradients, and last_layer are needed. perceptual: (B,) distances or None. average: see
    `adaptive_weight`.

    Coupled where ramp is not 0: the adaptive weight is the whole batch's. Returns ((weighted loss sum, weight sum),
    scalars), the scalars detached weighted means: `l1` or `l2`, `perceptual`, `nll` (both), `regular`, `fooling`,
    `adaptive`; and `codes`, the counts (K,) of the codes. Raises ValueError when shapes disagree.
    """
    check_images("vqgan", reconstruction, image, regular, weight, *([] if perceptual is None else [perceptual]))
    nll = pixel_error(reconstruction, image, error)
    shown = {error: nll, "regular": regular} | ({} if perceptual is None else {"perceptual": perceptual})
    nll = nll if perceptual is None else nll + perceptual_weight * full(perceptual)
    total, scalars = generator(nll, full(regular), weight, fake_logits, last_layer, ramp, average)
    counts = codebook_counts(codes, num_codes, weight)
    return total, scalars | weighted(nll, weight, shown)[1] | {"codes": counts}
