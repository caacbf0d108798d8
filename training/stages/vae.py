"""The stage of the VAE.

B images of 3 x H x W pixels, D latents.
"""

from pathlib import Path
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from ...layers import random
from ...layers.precision import full
from ...pipeline.recipe import Recipe, build
from ...priors import gaussian
from ...tokenizers.vae import reparameterise
from ..objectives import vae as objective
from ..objectives.dvae import anneal
from ..run import Stage
from ..stream import Batch, Source
from .contract import Knob, Loss, TrainingStage, Updates, contact_sheet, over_ranks, psnr, reconstruct

_ACTIVE = 0.01


class VAEStage(TrainingStage):
    """Fits the VAE (arXiv:1312.6114): one draw of the latents, a likelihood of the pixels, a KL to N(0, 1).

    likelihood: see the objective. beta: the weight of the KL, which rises to it in a line over the first share
    `beta_share` of the steps. free_bits: nats of each latent that cost nothing more. iwae_draws: so many draws of the
    latents for the importance-weighted bound in validation; 0 leaves it out.
    """

    part = "tokenizer"
    metrics = ("bits_per_dim", "elbo", "psnr", "active_units")
    higher_is_better = False
    knobs: ClassVar = {
        "likelihood": Knob(choices=("gaussian", "logistic")),
        "beta": Knob(),
        "beta_share": Knob(high=1),
        "free_bits": Knob(),
        "iwae_draws": Knob(high=5000, whole=True),
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.hold(build(recipe, self.part))
        self.seed, self.device = seed, device
        self.likelihood, self.free_bits = config.word("likelihood", "gaussian"), config.number("free_bits", 0)
        self.draws = round(config.number("iwae_draws", 0))
        self.metrics = (*type(self).metrics, *(("iwae", "iwae_bits_per_dim") if self.draws else ()))
        self.beta, self.rise = config.number("beta", 1), round(config.number("beta_share", 0) * config.steps)
        self.ramp_end = self.rise if self.beta else 0

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """With free bits, which are of the batch's mean."""
        return "its free bits are of a step's mean" if config.number("free_bits", 0) else ""

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        out = self.forward[self.part](batch.image, self._noise(batch, step, "posterior"))
        beta = anneal(step, 0.0, self.beta, self.rise, "linear")
        names = ("reconstruction", "log_scale", "mean", "log_variance")
        reconstruction, log_scale, mean, log_variance = (out[name] for name in names)
        return objective.vae(
            reconstruction, log_scale, batch.image, mean, log_variance, batch.weight,
            likelihood=self.likelihood, beta=beta, free_bits=self.free_bits, average=over_ranks(batch.weight),
        )  # fmt: skip

    def _noise(self, batch: Batch, step: int, use: str) -> Tensor:
        return random.normal(self.seed, step, batch.samples, self.network.spec.shape, use)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`bits_per_dim` and `elbo` with one draw; `psnr`: dB of what the posterior's mean gives back; `iwae` and
        `iwae_bits_per_dim`: a bound nearer to ln p(x), of so many draws (Burda 2015, arXiv:1509.00519, equation 8).

        `mean` and `square`: of the posterior's mean of each latent.
        """
        mean, log_variance = self.network.posterior(batch.image)  # not as in a step, which may be in bfloat16
        latents = reparameterise(mean, log_variance, self._noise(batch, 0, "validation"))
        reconstruction, log_scale = self.network.likelihood(latents)
        terms = objective.elbo_terms(reconstruction, log_scale, batch.image, mean, log_variance, self.likelihood)
        elbo = -(terms[0] + terms[1].sum(dim=1))
        bits = objective.bits_per_dim(elbo, batch.image[0].numel(), self.likelihood)
        again = psnr(full(self.network.likelihood(mean)[0]).clamp(-1, 1), batch.image)
        found = {"bits_per_dim": bits, "elbo": elbo, "psnr": again, "mean": mean, "square": mean.square()}
        if self.draws:
            bound = self._importance_weighted(batch, mean, log_variance)
            bits = objective.bits_per_dim(bound, batch.image[0].numel(), self.likelihood)
            found |= {"iwae": bound, "iwae_bits_per_dim": bits}
        return found

    def _importance_weighted(self, batch: Batch, mean: Tensor, log_variance: Tensor) -> Tensor:
        latents, likelihoods = [], []
        for draw in range(self.draws):
            latents.append(reparameterise(mean, log_variance, self._noise(batch, draw, "importance")))
            again, log_scale = self.network.likelihood(latents[-1])
            nll, _ = objective.elbo_terms(again, log_scale, batch.image, mean, log_variance, self.likelihood)
            likelihoods.append(-nll)
        return objective.iwae(torch.stack(likelihoods), torch.stack(latents), mean, log_variance)

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """`active_units`: the share of the latents whose posterior mean varies by more than 0.01 over the images.

        Burda 2015, arXiv:1509.00519, section 5.2.
        """
        variance = total["square"] / count - (total["mean"] / count).square()
        return {"active_units": (variance > _ACTIVE).float().mean()}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Image | None:
        """Eight pairs of a picture and what it becomes, then 16 pictures of latents drawn from N(0, 1)."""
        image = batch.image[:8]
        shown = torch.stack([image, reconstruct(self.network, image)], 1).flatten(0, 1)
        prior = gaussian.Standard(self.network.spec.shape[0])
        drawn = prior.draw(self.seed, 0, torch.arange(16, device=image.device), "preview")
        return contact_sheet(torch.cat([shown, self.network.decode(drawn).float()]))
