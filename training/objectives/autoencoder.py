"""Objectives of the plain autoencoder and of its kin: denoising (Vincent 2010, JMLR 11:3371), sparse (Ng 2011, CS294A
lecture notes, section 3) and adversarial (Makhzani 2015, arXiv:1511.05644).

B images of 3 x H x W pixels in [-1, 1]; C units: the channels of the latents.

It does not know the model, nor what the encoder saw pictures through.
"""

import torch
from torch import Tensor

from ...layers.precision import full
from .weighting import Average, check_images, pixel_error, weighted


def units(latents: Tensor) -> Tensor:
    """Latents (B, C) or (B, C, h, w) -> (B, C, positions), a unit being a channel at all its positions."""
    return full(latents).unflatten(1, (latents.shape[1], 1)) if latents.dim() == 2 else full(latents).flatten(2)


def sparsity_kl(latents: Tensor, weight: Tensor, rho: float, average: Average | None = None) -> Tensor:
    """Sum over units of KL(Bernoulli(rho) || Bernoulli(their mean activation)), (), in nats (Ng 2011, section 3).

    latents: activations in (0, 1), as a sigmoid gives them; a unit's mean is over positions and the batch, by weight,
    and by `average` over ranks; None is one.
    """
    share = weight.to(full(latents).dtype)
    share = share / share.sum().clamp(min=1e-12)
    active = torch.einsum("b,bcp->c", share, units(latents)) / units(latents).shape[2]
    active = active if average is None else average(active)
    # rho ln(rho / a) + (1 - rho) ln((1 - rho) / (1 - a)) = cross-entropy - entropy. That of torch refuses a mean
    # that is not finite, or above 1 when rounded.
    target = torch.full_like(active, rho)
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    on, off = active.clamp(min=1e-12).log(), (1 - active).clamp(min=1e-12).log()
    return -(target * on + (1 - target) * off + entropy).sum()


def autoencoder(
    reconstruction: Tensor,
    image: Tensor,
    weight: Tensor,
    latents: Tensor | None = None,
    error: str = "l2",
    sparsity: str = "none",
    sparsity_weight: float = 0.0,
    rho: float = 0.05,
    average: Average | None = None,
    adversary: Tensor | None = None,
    adversary_weight: float = 0.0,
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The error of the reconstruction, a mean over values, and sparsity and adversary by their weights.

    image: (B, 3, H, W), the clean one where the model saw it corrupted. weight: (B,). error: "l1" or "l2". latents:
    (B, C) or (B, C, h, w), needed for sparsity: "l1" is the sum over units of their mean absolute value; "kl" is
    `sparsity_kl` of latents in (0, 1) towards the mean activation rho, which couples the batch, that of all ranks by
    `average`; "none" is neither. adversary: (B,), what it costs that the discriminator tells an image's latents from
    draws of the prior (`gan.generator`), or None.

    Returns ((weighted loss sum, weight sum), scalars), the scalars detached weighted means: `error`, and `sparsity` and
    `adversary` before their weights. Raises ValueError when shapes or choices do not fit.
    """
    check_images("autoencoder", reconstruction, image, weight, *([] if adversary is None else [adversary]))
    if sparsity not in ("none", "l1", "kl") or not 0 < rho < 1:
        raise ValueError(
            f"autoencoder needs sparsity 'none', 'l1' or 'kl', and rho in (0, 1), got {sparsity!r:.40} and {rho}"
        )
    if sparsity != "none" and latents is None:
        raise ValueError(f"autoencoder needs the latents for sparsity {sparsity!r}; pass them")
    loss = pixel_error(reconstruction, image, error)  # (B,)
    shown = {"error": loss}
    if adversary is not None:
        shown["adversary"] = full(adversary)
        loss = loss + adversary_weight * shown["adversary"]
    if sparsity == "l1" and latents is not None:
        shown["sparsity"] = units(latents).abs().mean(dim=2).sum(dim=1)
        loss = loss + sparsity_weight * shown["sparsity"]
    (total, count), scalars = weighted(loss, weight, shown)
    if sparsity == "kl" and latents is not None:
        kl = sparsity_kl(latents, weight, rho, average)
        total = total + sparsity_weight * count * kl
        scalars["sparsity"] = kl.detach()
    return (total, count), scalars
