"""The stage of the plain autoencoder and of its kin: denoising, sparse and adversarial.

B images of 3 x H x W pixels, D values of flat latents.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from ...layers.precision import full
from ...pipeline.recipe import Recipe, build
from ...priors import gaussian
from .. import corruptions
from ..objectives import autoencoder as objective
from ..objectives import gan
from ..objectives.weighting import ERRORS
from ..run import Stage
from ..stream import Batch, Source
from .adversary import Adversary
from .contract import Knob, Updates, contact_sheet, over_ranks, psnr
from .latents import LatentsStage, latent_std

_ADVERSARIAL = {"prior": Knob(choices=gaussian.KINDS), "pieces": Knob(low=1, whole=True)}


class AutoencoderStage(LatentsStage):
    """Fits an autoencoder (Hinton 2006, doi:10.1126/science.1127647), and measures the scale of its latents.

    corruption: what the encoder sees the picture through, which it is to give back clean (Vincent 2010, JMLR 11:3371);
    corruption_level is the noise's deviation, or the share of pixels that are lost. sparsity: see the objective.

    With a discriminator of latents in the recipe it is adversarial (Makhzani 2015, arXiv:1511.05644): flat latents are
    to lie as draws of `prior` do, of so many `pieces` (see `priors.gaussian`). A discriminator that is built for
    classes judges with the label beside, to whose piece the latents then go (section 2.3). Other knobs: `Adversary`.
    """

    beside: tuple[str, ...] = (Adversary.part,)
    knobs: ClassVar = {
        "error": Knob(choices=ERRORS),
        "corruption": Knob(choices=("none", *corruptions.KINDS)),
        "corruption_level": Knob(),
        "sparsity": Knob(choices=("none", "l1", "kl")),
        "sparsity_weight": Knob(),
        "rho": Knob(high=1, of="sparsity"),
        **_ADVERSARIAL,
        **Adversary.knobs,
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        network = build(recipe, self.part)  # first, so that its weights do not depend on who judges it
        self.adversary = Adversary(recipe, config, 0.01, device, gan.discriminator)
        self.adversary.join(self, network)
        self.source, self.seed, self.device = source, seed, device
        self.corruption, self.level = config.word("corruption", "none"), config.number("corruption_level", 0)
        sparsity, weight = config.word("sparsity", "none"), config.number("sparsity_weight", 0)
        self.knob: dict[str, Any] = {"error": config.word("error", "l2"), "sparsity": sparsity}
        self.knob |= {"sparsity_weight": weight, "rho": config.number("rho", 0.05)}
        if (self.corruption == "none") != (self.level == 0) or (sparsity == "none") != (weight == 0):
            raise ValueError(
                "stages.tokenizer.objective: corruption goes with a corruption_level, and sparsity with a "
                f"sparsity_weight above 0, got {dict(config.objective)}; set both of a pair or neither"
            )
        if self.corruption != "none" and (wrong := corruptions.problem(self.corruption, self.level)):
            raise ValueError(f"stages.tokenizer.objective: {wrong}")
        if sparsity == "kl" and network.activation != "sigmoid":
            raise ValueError(
                "stages.tokenizer.objective: sparsity kl is of latents between 0 and 1; write "
                "parts.tokenizer.activation: sigmoid, or take sparsity l1"
            )
        self.prior = self._prior(config)

    def _prior(self, config: Stage) -> gaussian.Distribution | None:
        """What the latents are to lie like, where there is a discriminator; raises ValueError where it does not fit."""
        judge: Any = self.adversary.network
        if judge is None:
            if wrong := config.objective.keys() & _ADVERSARIAL.keys():
                raise ValueError(
                    f"stages.tokenizer.objective has {', '.join(sorted(wrong))}, but the recipe no part "
                    "'discriminator'; add one of kind latent, or leave them out"
                )
            return None
        shape = self.network.spec.shape
        if shape != (getattr(judge, "latent_dim", None),):
            raise ValueError(
                "the discriminator of an autoencoder judges its latents: expected parts.discriminator of kind latent, "
                f"and its latent_dim for flat latents {shape}; set latent_dim in both parts"
            )
        labels = self.source.read(range(256)).labels if judge.num_classes else None
        if judge.num_classes and (labels is None or int(labels.max()) >= judge.num_classes):
            found = "none" if labels is None else f"labels up to {int(labels.max())}"
            raise ValueError(
                f"a discriminator with classes needs data with labels below num_classes, such as digits, got "
                f"{judge.num_classes} and {found}; correct parts.discriminator.num_classes, 0 is for no labels"
            )
        pieces = int(config.number("pieces", judge.num_classes or 10))
        prior = gaussian.distribution(config.word("prior", "standard"), shape[0], pieces)
        if judge.num_classes and getattr(prior, "num_pieces", 0) != judge.num_classes:
            raise ValueError(
                "a discriminator with classes needs a prior with a piece for each: expected prior mixture or "
                f"swiss_roll with pieces {judge.num_classes}, got {dict(config.objective)}"
            )
        return prior

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Where the mean activation is asked for, which is the batch's."""
        return "the KL of its sparsity is of a step's mean" if config.word("sparsity", "none") == "kl" else ""

    def updates(self, batch: Batch, step: int) -> Updates:
        out = self.forward[self.part](self.corrupt(batch, step))
        latents, ramp, labels = out["latents"], self.adversary.ramp(step), self._labels(batch)
        loss, scalars = objective.autoencoder(
            out["reconstruction"], batch.image, batch.weight, latents, average=over_ranks(batch.weight),
            adversary=gan.generator(self.adversary.judge(latents, *labels)) if ramp else None, adversary_weight=ramp,
            **self.knob,
        )  # fmt: skip
        yield self.part, loss, scalars | {"unscaled_std": latent_std(latents, batch.weight)}
        if self.adversary.learns(step):
            drawn = self._draw(step, batch.samples, *labels)
            yield self.adversary.update(self.forward[Adversary.part], drawn, latents, batch.weight, *labels)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Of an adversarial one also what `diversity` is made of: latents and draws of the prior, and their squares.

        With classes also `own_piece`, the share of latents that lie in their label's piece of the prior.
        """
        if self.prior is None:
            return super().measure(batch)
        scaled, labels = self.network.encode(batch.image), self._labels(batch)  # not in bfloat16, as a step may be
        found = {"psnr": psnr(full(self.network.decode(scaled)).clamp(-1, 1), batch.image)}
        latents, drawn = self.network.scale.inverse(scaled), full(self._draw(0, batch.samples, *labels))
        if labels:
            assert not isinstance(self.prior, gaussian.Standard)  # which has no pieces, and was refused
            found["own_piece"] = (self.prior.piece(latents) == labels[0]).float()
        return found | {"latents": latents, "latents2": latents.square(), "drawn": drawn, "drawn2": drawn.square()}

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """Of an adversarial one: `diversity`, how far the latents are spread, where draws of the prior are by 1."""
        if self.prior is None:
            return {}
        latents, drawn = (
            (total[f"{name}2"] / count - (total[name] / count).square()).sum().clamp(min=0).sqrt()  # 0 may be rounded
            for name in ("latents", "drawn")
        )
        return {"diversity": latents / drawn.clamp(min=1e-12)}  # a single sample is not spread

    def _labels(self, batch: Batch) -> tuple[Tensor, ...]:
        """The labels (B,) of the images, where the discriminator sees them."""
        judge: Any = self.adversary.network
        if judge is None or not judge.num_classes:
            return ()
        assert batch.labels is not None  # refused at the beginning
        return (batch.labels,)

    def _draw(self, step: int, samples: Tensor, *labels: Tensor) -> Tensor:
        """Draws of the prior (B, D)."""
        assert self.prior is not None
        return self.prior.draw(self.seed, step, samples, "adversarial prior", *labels)

    def corrupt(self, batch: Batch, step: int) -> Tensor:
        """The images as the encoder sees them."""
        if self.corruption == "none":
            return batch.image
        return corruptions.corrupt(batch.image, self.corruption, self.level, self.seed, step, batch.samples)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Pairs of a picture, as the encoder sees it, and what it becomes; then 16 pictures of draws of the prior."""
        seen = self.corrupt(batch, 0)[:16]
        shown = torch.stack([seen, self.network(seen)["reconstruction"]], 1).flatten(0, 1)
        if self.prior is not None:  # the latents are not scaled yet
            drawn = self.network.decode(self._draw(0, torch.arange(16, device=seen.device)))
            shown = torch.cat([shown, drawn.to(shown.dtype)])
        return contact_sheet(shown)
