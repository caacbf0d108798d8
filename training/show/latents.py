"""Latent spaces side by side: a VAE with its reconstruction alone, with its KL alone and with both, an autoencoder and
an adversarial one, of the same networks, data and number of steps, each with two latents, so that all can be seen.

The first three are the panels by which the VAE is explained: without the KL the posteriors lie anywhere and the prior
has holes, without the reconstruction they lie on the prior and tell nothing.

B images, N points of the plane of latents.

It does not know how the picture is drawn (`latents_picture` does).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...layers import random
from ...pipeline.recipe import Recipe, nearest
from ...priors import gaussian
from ...tokenizers.vae import reparameterise
from .. import run as runs
from ..exchange import to_device
from ..objectives.vae import gaussian_kl
from ..objectives.weighting import weighted
from ..optim import build_optimizers, rate
from ..sources import source_of, validation_of
from ..stages import STAGES
from ..stages.contract import Loss, psnr
from ..stages.vae import VAEStage
from ..stream import Batch

DATA: dict[str, dict[str, Any]] = {
    "digits": {"kind": "digits", "validation_share": 0.2},
    "shapes": {"kind": "shapes", "levels": ["S1"], "jitter": 0.0},
}
_SIZE, BATCH, _POINTS, _SAMPLES = 32, 32, 2000, 256
_LAYOUT = {"image_size": _SIZE, "latent_dim": 2, "latent_channels": 16, "width": 8, "channel_mult": [1, 1, 2, 4]}
_LAYOUT |= {"blocks_per_level": 1, "norm_groups": 2}
_OPTIMIZER = {"lr": 0.002, "muon": 0.01, "betas": [0.9, 0.99], "warmup": 20, "decay": 0.5}
_JUDGE = {"lr": 0.001, "betas": [0.5, 0.9], "warmup": 0, "decay": 0.5}
_FAR = 0.99  # of draws of the prior are nearer than this to one of as many others

Report = Callable[[int, int], object]


class KLOnly(VAEStage):
    """The VAE without its likelihood: nothing but the KL to the prior is made small."""

    def _loss(self, batch: Batch, step: int) -> Loss:
        out = self.forward[self.part](batch.image)
        kl = gaussian_kl(out["mean"], out["log_variance"]).sum(dim=1)
        return weighted(kl, batch.weight, {"kl": kl})


@dataclass(frozen=True)
class Model:
    """One of those that are compared. kind: of the tokenizer; prior: what its samples are drawn from."""

    name: str
    kind: str
    objective: dict[str, Any]
    prior: gaussian.Distribution
    stage: Any


@dataclass
class Found:
    """What became of a model. means, draws: of the posteriors of N images, (N, 2), the same where they have no noise.

    labels: of the images, int64 (N,), digits or backgrounds. prior: draws of it, (N, 2); holes: which of them no
    posterior is near, bool (N,). pairs: images and their reconstructions in turns; between: rows of six along a line
    between the means of two images; samples: decoded draws; all (B, 3, H, W). numbers: see `measure`.
    """

    model: Model
    means: Tensor
    draws: Tensor
    labels: Tensor
    prior: Tensor
    holes: Tensor
    pairs: Tensor
    between: Tensor
    samples: Tensor
    numbers: dict[str, float]


def models(prior: str = "standard") -> list[Model]:
    """The five. prior: the adversarial one's, see `priors.gaussian`; that of the others is N(0, 1)."""
    normal, other = gaussian.Standard(2), gaussian.distribution(prior, 2)
    adversarial = {"prior": prior, "discriminator_weight": 0.02, "discriminator_warmup": 0.02}
    return [
        Model("VAE, reconstruction alone", "vae", {"beta": 0.0}, normal, VAEStage),
        Model("VAE, KL alone", "vae", {}, normal, KLOnly),
        Model("VAE, both", "vae", {"beta": 1.0}, normal, VAEStage),
        Model("autoencoder", "autoencoder", {}, normal, STAGES["autoencoder"]),
        Model("adversarial autoencoder", "autoencoder", adversarial, other, STAGES["autoencoder"]),
    ]


def compare(data: str, steps: int, seed: int, prior: str, device: torch.device, report: Report) -> list[Found]:
    """Trains the five models on so many batches, the same for all, and looks at each over unseen pictures.

    Raises ValueError for other data or another prior than there are.
    """
    if data not in DATA:
        raise ValueError(f"--data {data!r} is unknown; {nearest(data, list(DATA))}")
    torch.set_flush_denormal(True)  # see `training.__main__`
    recipes = [_recipe(model, data, steps) for model in models(prior)]
    config = runs.training_of(recipes[0]).data
    source = source_of(recipes[0], config)
    trained = [
        _Trained(model, recipe, source, seed, device) for model, recipe in zip(models(prior), recipes, strict=True)
    ]
    for step in range(steps):
        batch = to_device(source.read(range(step * BATCH, (step + 1) * BATCH)), device)
        for one in trained:
            one.step(batch, step)
        report(step + 1, steps)
    endless = source.size is None
    held_out, first = (source, steps * BATCH) if endless else (validation_of(recipes[0], config), 0)
    positions = range(first, first + (_POINTS if endless else min(_POINTS, held_out.size)))
    return [measure(one.model, one.stage.network, held_out, positions, seed, device) for one in trained]


def _recipe(model: Model, data: str, steps: int) -> Recipe:
    """The recipe of a model; each has the networks of the others."""
    parts: dict[str, Any] = {"tokenizer": {"kind": model.kind, **_LAYOUT}}
    if model.kind == "vae":
        parts["tokenizer"]["scale"] = "shared"
    if "prior" in model.objective:
        parts["discriminator"] = {"kind": "latent", "latent_dim": 2, "width": 128}
    stage = {"steps": steps, "global_batch": BATCH, "optimizer": _OPTIMIZER, "objective": model.objective}
    stage["optimizers"] = {"discriminator": _JUDGE}
    training = {"data": DATA[data], "stages": {"tokenizer": stage}}
    return Recipe(name="show/latents", paper="none", image_size=_SIZE, parts=parts, training=training)


class _Trained:
    """One model as it is trained: the loop's step, without what a long run needs."""

    def __init__(self, model: Model, recipe: Recipe, source: Any, seed: int, device: torch.device) -> None:
        self.model, self.config = model, runs.training_of(recipe).stages["tokenizer"]
        torch.manual_seed(seed)
        self.stage = model.stage(recipe, self.config, source, Path(), seed, device)
        self.stage.network.to(device)
        self.optimizers = {
            name: build_optimizers(network, self.config.optimizer_of(name))
            for name, network in self.stage.networks.items()
        }

    def step(self, batch: Batch, step: int) -> None:
        for name, (loss, count), _ in self.stage.updates(batch, step):
            (loss / count).backward()
            config = self.config.optimizer_of(name)
            torch.nn.utils.clip_grad_norm_(self.stage.networks[name].parameters(), config.clip)
            for optimizer in self.optimizers[name]:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, self.config.steps, config)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def measure(
    model: Model, network: Any, source: Any, positions: Sequence[int], seed: int, device: torch.device
) -> Found:
    """Looks at a model over N images.

    Its numbers: `psnr`, dB of reconstructions. `holes`: the share of draws of the prior that are far from every
    posterior's draw; `outside`: that of posteriors' draws which are far from every draw of the prior. Far is what one
    draw of the prior in a hundred is from as many others: both are about 0.01 where the posteriors together are the
    prior. `sample_psnr`: dB of decoded draws of the prior, against the nearest of the images.
    """
    batch = to_device(source.read(positions), device)
    image, samples = batch.image, batch.samples
    outs = [network(part) for part in image.split(256)]
    means = torch.cat([out["mean" if "mean" in out else "latents"] for out in outs])
    noise = random.normal(seed, 0, samples, (2,), "latent draws")
    log_variance = torch.cat([out["log_variance"] for out in outs]) if "log_variance" in outs[0] else None
    draws = means if log_variance is None else reparameterise(means, log_variance, noise)
    prior, others = (model.prior.draw(seed, step, samples, "latent prior") for step in (0, 1))
    near = torch.cdist(others, prior).amin(dim=1).quantile(_FAR)
    holes = torch.cdist(prior, draws).amin(dim=1) > near
    painted = _decode(network, prior[:_SAMPLES])
    nearest = torch.cdist(painted.flatten(1), image.flatten(1)).amin(dim=1).square() / image[0].numel()
    numbers = {
        "psnr": psnr(_decode(network, means), image).mean(),
        "holes": holes.float().mean(),
        "outside": (torch.cdist(draws, prior).amin(dim=1) > near).float().mean(),
        "sample_psnr": (-10 * torch.log10(nearest.clamp(min=1e-12) / 4)).mean(),
    }
    ends = means[:8].view(4, 2, 1, 2)
    share = torch.linspace(0, 1, 6, device=device)[:, None]
    between = _decode(network, (ends[:, 0] * (1 - share) + ends[:, 1] * share).flatten(0, 1))
    pairs = torch.stack([image[:9], _decode(network, means[:9])], 1).flatten(0, 1)
    labels = batch.labels
    if labels is None:  # of shapes: two latents hardly tell more than the background
        labels = torch.tensor([facts.background for facts in source.facts(positions)])
    found = {name: float(value) for name, value in numbers.items()}
    assert all(math.isfinite(value) for value in found.values()), found
    return Found(model, means, draws, labels, prior, holes, pairs, between, painted[:24], found)


def _decode(network: Any, latents: Tensor) -> Tensor:
    return torch.cat([network.decode(part) for part in latents.split(256)]).clamp(-1, 1)
