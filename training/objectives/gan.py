"""Objectives of a generative adversarial network (Goodfellow 2014, arXiv:1406.2661): the logistic loss of the
discriminator (equation 1) and the generator's that does not saturate (section 3).

B samples; logits (B, 1), or (B, 1, h, w) of patches, over which means are taken.

It does not know the networks, nor what they judge.
"""

from torch import Tensor
from torch.nn import functional as F

from ...layers.precision import full
from .weighting import weighted


def discriminator(
    real_logits: Tensor, fake_logits: Tensor, weight: Tensor
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """-ln D(real) - ln(1 - D(fake)), in nats, D being the sigmoid of a logit. weight: (B,). Separable.

    Returns ((weighted loss sum, weight sum), scalars), the scalars detached weighted means: `logistic`, the mean logits
    `real_logits` and `fake_logits`, and `accuracy`, the share of both that are told apart. Raises ValueError when
    shapes disagree.
    """
    if real_logits.shape != fake_logits.shape or weight.shape != real_logits.shape[:1]:
        shapes = [tuple(x.shape) for x in (real_logits, fake_logits, weight)]
        raise ValueError(f"the logistic loss needs logits (B, 1, ...) of one shape twice and weight (B,), got {shapes}")
    real, fake = full(real_logits).flatten(1), full(fake_logits).flatten(1)
    loss = (F.softplus(-real) + F.softplus(fake)).mean(dim=1)
    shown = {"logistic": loss, "real_logits": real.mean(dim=1), "fake_logits": fake.mean(dim=1)}
    shown["accuracy"] = ((real > 0).to(loss) + (fake < 0).to(loss)).mean(dim=1) / 2
    return weighted(loss, weight, shown)


def generator(fake_logits: Tensor) -> Tensor:
    """-ln D(fake) of each sample, in nats: (B, 1, ...) -> (B,)."""
    return F.softplus(-full(fake_logits)).flatten(1).mean(dim=1)
