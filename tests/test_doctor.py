"""The run doctor: each fault is provoked in a real training of seconds and found; healthy runs report nothing."""

import json
import math
import shutil
import time
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from kartina import cli
from kartina.layers import random
from kartina.training import __main__ as trainer
from kartina.training import doctor, history, loop
from kartina.training import run as runs
from kartina.training.loop import train_stage
from kartina.training.objectives.gan import discriminator
from kartina.training.objectives.vqgan import hinge
from kartina.training.stages import contract
from kartina.training.stages.contract import frozen
from kartina.training.stopping import Stop
from kartina.training.stream import Batch


class Points:
    """Endless points of the plane, or of a larger space in which they fill three dimensions only."""

    size, fingerprint = None, "points"

    def __init__(self, kind="eight", sleep=0.0):
        self.kind, self.sleep = kind, sleep

    def read(self, positions):
        time.sleep(self.sleep)
        samples = torch.tensor(list(positions))
        if self.kind == "eight":  # Gaussians on a circle
            angle = random.integers(0, 0, samples, (1,), "mode", 8) * (math.pi / 4)
            points = torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * random.normal(0, 0, samples, (2,), "spread")
        else:
            mixing = random.normal(1, 0, torch.arange(3), (8,), "mixing")
            points = random.normal(0, 0, samples, (3,), "factors") @ mixing
            points = points + 0.1 * random.normal(0, 0, samples, (8,), "noise")
        return Batch(points, [""] * len(samples), [str(p) for p in positions], samples, torch.ones(len(samples)))


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class Tiny:
    """What the stages below share."""

    coupled, depends, knobs, restart_step, ramp_end, higher_is_better = False, (), {}, None, 0, False
    starts: ClassVar = {}

    def __init__(self, **networks):
        self.networks = networks
        self.forward = dict(networks)
        self.part = next(iter(networks))

    def summary(self, total, count):
        return {}

    def preview(self, batch):
        return None


def total_of(each, batch):
    return (each * batch.weight).sum(), batch.weight.sum()


class VAE(Tiny):
    """A VAE of eight latent units over data of three factors."""

    metrics = ("elbo_loss", "active_units")

    def __init__(self, beta):
        super().__init__(tokenizer=nn.ModuleDict({"encoder": mlp(8, 32, 16), "decoder": mlp(8, 32, 8)}))
        self.forward = {"tokenizer": self.networks["tokenizer"]}
        self.beta = beta

    def _terms(self, batch, step):
        network = self.networks["tokenizer"]
        mean, log_variance = network["encoder"](batch.image).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * random.normal(0, step, batch.samples, (8,), "posterior")
        error = (network["decoder"](z) - batch.image).square().sum(1) / 2
        return mean, error, (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2

    def updates(self, batch, step):
        _, error, kl = self._terms(batch, step)
        yield "tokenizer", total_of(error + self.beta * kl, batch), {"kl": kl.mean()}

    @torch.no_grad()
    def measure(self, batch):
        mean, error, kl = self._terms(batch, 0)
        return {"elbo_loss": error + self.beta * kl, "mean": mean, "square": mean.square()}

    def summary(self, total, count):
        variance = total["square"] / count - (total["mean"] / count).square()
        return {"active_units": (variance > 0.01).float().mean()}


class GAN(Tiny):
    """The non-saturating GAN of eight Gaussians."""

    metrics, higher_is_better = ("diversity",), True

    def __init__(self, trains=1.0, loss=discriminator, noise=1.0):
        super().__init__(prior=mlp(8, 64, 64, 2), discriminator=mlp(2, 64, 64, 1))
        self.trains, self.loss, self.noise = trains, loss, noise

    def _draw(self, batch, step, name="noise"):
        return self.networks["prior"](self.noise * random.normal(0, step, batch.samples, (8,), name))

    def updates(self, batch, step):
        fake = self._draw(batch, step)
        logits = (self.networks["discriminator"](x) for x in (batch.image, fake.detach()))
        yield "discriminator", *self.loss(*logits, batch.weight)
        with frozen(self.networks["discriminator"]) as judge:
            loss = self.trains * F.softplus(-judge(fake)[:, 0])
        yield "prior", total_of(loss, batch), {}

    @torch.no_grad()
    def measure(self, batch):
        fake = self._draw(batch, 0, "measured")
        return {"fake": fake, "fake2": fake.square(), "real": batch.image, "real2": batch.image.square()}

    def summary(self, total, count):
        fake, real = ((total[f"{k}2"] / count - (total[k] / count).square()).sum().sqrt() for k in ("fake", "real"))
        return {"diversity": fake / real}


class Denoiser(Tiny):
    """Learns the noise in latents that are multiplied by a scale."""

    metrics = ("error",)

    def __init__(self, scale=1.0):
        super().__init__(prior=mlp(3, 32, 2))
        self.scale = scale

    def _error(self, batch, step):
        latents = self.scale * batch.image
        t = random.uniform(0, step, batch.samples, (1,), "t")
        eps = random.normal(0, step, batch.samples, (2,), "eps")
        noised = (1 - t).sqrt() * latents + t.sqrt() * eps
        return (self.networks["prior"](torch.cat([noised, t], 1)) - eps).square().mean(1), latents

    def updates(self, batch, step):
        error, latents = self._error(batch, step)
        yield "prior", total_of(error, batch), {"latent_std": latents.std()}

    @torch.no_grad()
    def measure(self, batch):
        return {"error": self._error(batch, 0)[0]}


def fit(stage, folder, source=None, steps=200, batch=64, lr=3e-3, validated=True, **more):
    """Trains a tiny stage through the loop, and gives what the doctor finds."""
    source = source or Points()
    torch.manual_seed(0)
    for network in stage.networks.values():
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    optimizer = {"lr": lr, "warmup": 0, **more.pop("optimizer", {})}
    config = {"steps": steps, "global_batch": batch, "log_every": 2, "validate_every": steps // 5}
    config |= {"validate_samples": 128, "save_minutes": 60, "optimizer": optimizer, **more}
    recipe = {"precision": "fp32", "trackers": (), "data": {"kind": "shapes"}, "stages": {stage.part: config}}
    training = runs.Training.model_validate(recipe)
    held_out = Points(source.kind) if validated else None
    name = {"stage": stage.part, "data": source.fingerprint}
    train_stage(name, stage, training, source, held_out, folder, Accelerator(cpu=True), Stop())
    return doctor.examine(folder)


def named(findings):
    return {finding.name for finding in findings}


def test_posterior_collapse(tmp_path):
    found = fit(VAE(beta=100.0), tmp_path / "collapsed", Points("factors"))
    assert named(found) == {"posterior collapse"} and found[0].seen.startswith("0% of the latent units")
    assert fit(VAE(beta=0.1), tmp_path / "healthy", Points("factors")) == []
    assert history.read(tmp_path / "healthy")["tokenizer"].last("valid/active_units") >= 3 / 8


@pytest.mark.parametrize(
    ("loss", "seen"), [(discriminator, "it tells real from fake in"), (hinge, "its hinge loss is")]
)
def test_the_discriminator_wins_against_a_generator_that_does_not_learn(loss, seen, tmp_path):
    found = {finding.name: finding for finding in fit(GAN(0.0, loss), tmp_path, steps=400, batch=128)}
    assert found["the discriminator wins"].seen.startswith(seen)


def test_a_healthy_gan_reports_nothing(tmp_path):
    assert fit(GAN(), tmp_path, steps=600, batch=128, lr=1e-3, optimizer={"betas": (0.5, 0.9)}) == []
    healthy = history.read(tmp_path)["prior"]
    assert healthy.last("valid/diversity") > 0.8


def test_mode_collapse_of_a_generator_that_hardly_hears_its_noise(tmp_path):
    found = fit(GAN(noise=0.05), tmp_path, steps=300, batch=128, optimizer={"betas": (0.5, 0.9)})
    (collapse,) = [finding for finding in found if finding.name == "mode collapse"]
    assert "spread" in collapse.seen and history.read(tmp_path)["prior"].last("valid/diversity") < 0.1


def test_latent_scale_off(tmp_path):
    std = Points().read(range(512)).image.std().item()
    assert fit(Denoiser(1 / std), tmp_path / "measured") == []
    found = fit(Denoiser(0.18215 / std), tmp_path / "of another tokenizer")
    assert named(found) == {"latent scale off"} and "prior/latent_std is 0.18" in found[0].seen


def test_learning_rate_too_high(tmp_path):
    optimizer = {"decay": 0.0, "betas": (0.9, 0.99)}
    found = fit(Denoiser(1.4), tmp_path / "high", lr=0.003 * 1000, optimizer=optimizer)
    assert named(found) >= {"learning rate too high"}
    assert fit(Denoiser(1.4), tmp_path / "right", lr=0.003, optimizer=optimizer) == []


def test_as_many_samples_are_validated_as_the_recipe_says(tmp_path):
    scored = []

    class Watched(Denoiser):
        def measure(self, batch):
            scored.append(batch.keys)
            return super().measure(batch)

    fit(Watched(1.4), tmp_path, steps=5, validate_every=5, validate_samples=70)
    assert [len(keys) for keys in scored] == [64, 64, 6]  # the live weights, then the averaged ones
    assert scored[1] + scored[2] == [str(position) for position in range(70)]


def test_waiting_for_data(tmp_path):
    found = fit(Denoiser(1.4), tmp_path, Points(sleep=0.1), steps=24)
    assert named(found) == {"waiting for data"}


# --- the shipped systems, made small ----------------------------------------------------------------------------------

FEW = "validate_samples=128"  # seconds, not minutes
SMALL = [
    "captions.vocab_size=300",
    "parts.tokenizer={kind: patch_dvae, image_size: 32, num_codes: 64, patch: [4, 4], width: 16, depth: 1}",
    "parts.prior={kind: dalle, text_vocab: 300, text_length: 22, num_codes: 64, grid: [8, 8], width: 64, depth: 2,"
    " num_heads: 2, attention: full, rotary: true, qk_norm: true, norm: rms, zero_init: true}",
    "parts.clip.text_vocab=302",
    "parts.clip.vision_depth=2",
    "parts.clip.text_depth=1",
    *["training.precision=fp32", "training.trackers=[]", "training.data.levels=[S1]"],
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "prior", "clip") for key in ("log_every=2", FEW)],
    *["stages.tokenizer.steps=40", "stages.tokenizer.global_batch=16"],
    *["stages.prior.steps=150", "stages.prior.global_batch=16", "stages.prior.validate_every=50"],
    *["stages.clip.steps=80", "stages.clip.global_batch=32", "stages.clip.levels=[S1]", "stages.clip.objective={}"],
]


def train(folder, *more):
    assert trainer.main(["shapes/dalle", *SMALL, *more, "--run", str(folder)]) == 0
    return doctor.examine(folder)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, few_images):
    folder = tmp_path_factory.mktemp("healthy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "IMAGES", few_images)  # as many as the command takes
        return folder, train(folder)


def test_a_healthy_system_reports_nothing(healthy):
    folder, found = healthy
    assert found == []
    stages = history.read(folder)
    assert list(stages) == ["tokenizer", "prior", "clip"]
    assert stages["tokenizer"].last("valid/usage") > 0.8
    assert stages["prior"].last("valid/caption_gain") > 0.01
    assert not [event for stage in stages.values() for event in stage.events if event["event"] != "started"]


def test_codebook_collapse(tmp_path):
    """From random codes, in few steps, few of many codes are used: k-means was left out."""
    from kartina.training.stages.dvae import DVAEStage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DVAEStage, "restart", lambda self: None)
        found = train(tmp_path, "--stage", "tokenizer")
    assert "codebook collapse" in named(found)


def test_caption_ignored(healthy, tmp_path):
    found = train(continued(healthy, tmp_path), "--stage", "prior", "stages.prior.objective.caption_drop=1")
    assert named(found) == {"caption ignored"}


def test_loss_at_chance_level(healthy, tmp_path):
    rates = ["stages.clip.optimizer.lr=1e-9", "stages.clip.optimizer.muon=0"]
    found = train(continued(healthy, tmp_path), "--stage", "clip", "stages.clip.steps=30", *rates)
    assert named(found) == {"loss at chance level"}


def test_averaged_weights_too_young(healthy, tmp_path, monkeypatch):
    """An average that does not warm up still holds much of where training began."""
    monkeypatch.setattr(loop.EMA, "update", slow_update)
    rest = ["stages.prior.ema=0.995", "stages.prior.steps=60"]
    found = train(continued(healthy, tmp_path), "--stage", "prior", *rest)
    assert "averaged weights too young" in named(found)


def slow_update(self):
    self.updates += 1
    for name, value in self.live.items():
        self.average[name].lerp_(value.detach(), 1 - self.decay)


def continued(healthy, folder):
    """A run whose tokenizer is trained, and whose other stages have not begun."""
    shutil.copytree(healthy[0] / "model", folder / "model")
    shutil.copy(healthy[0] / "captions.origin.json", folder)
    card = json.loads((folder / "model" / "card.json").read_text())
    card["parts"] = {"tokenizer": card["parts"]["tokenizer"]}
    (folder / "model" / "card.json").write_text(json.dumps(card))
    return folder


def test_the_loop_warns_once_and_the_command_says_it_again(healthy, tmp_path):
    fit(Denoiser(0.1), tmp_path)
    (event,) = [event for event in history.read(tmp_path)["prior"].events if event["event"] == "finding"]
    assert event["finding"] == "latent scale off" and event["step"] == 40
    result = CliRunner().invoke(cli.app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1 and "latent scale off" in result.output
    assert "\n  do     train the tokenizer" in result.output
    result = CliRunner().invoke(cli.app, ["doctor", str(tmp_path), "--json"])
    assert result.exit_code == 1 and json.loads(result.output)["name"] == "latent scale off"
    result = CliRunner().invoke(cli.app, ["doctor", str(healthy[0])])
    assert result.exit_code == 0 and result.output.startswith("nothing found")
    with pytest.raises(ValueError, match=r"no log.jsonl in .*expected a run folder"):
        doctor.examine(tmp_path / "none")
