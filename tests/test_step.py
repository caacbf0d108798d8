"""Steps of the loop: gradients are clipped, what decays, the moving average is of the weights after the step; and what
the scale of latents is measured with after the last.
"""

import math

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer
from kartina.training import run as runs
from kartina.training import state
from kartina.training.optim import build_optimizers, rate
from kartina.training.run import Optimizer
from kartina.training.stages import contract, latents


def test_the_rate_falls_by_half_a_cosine():
    config = Optimizer(lr=1, warmup=0, decay=0.5, shape="cosine")
    found = [rate(step, 100, config) for step in (0, 49, 50, 60, 75, 90)]
    expected = [0.5 * (1 + math.cos(math.pi * (step - 50) / 50)) for step in (60, 75, 90)]
    assert found[:3] == [1, 1, 1] and found[3:] == pytest.approx(expected)
    assert found[4] == pytest.approx(0.5)


def test_matrices_and_kernels_decay_and_nothing_else():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 2))
    (adamw,) = build_optimizers(network, Optimizer(lr=1e-3, weight_decay=0.3, betas=(0.5, 0.7)))
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in network.parameters()] == [0.3, 0, 0, 0, 0.3, 0]
    assert all(group["betas"] == (0.5, 0.7) for group in adamw.param_groups)


def trained(tiny, tmp_path, kind, *more):
    stage, argv = tiny[kind]
    steps = [f"stages.{stage}.{word}" for word in ("steps=2", "save_every=1", "optimizer.muon=0")]
    assert trainer.main([*argv, *steps, *(f"stages.{stage}.{word}" for word in more), "--run", str(tmp_path)]) == 0
    return tmp_path / "state" / stage


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_optimizers_see_clipped_gradients(tiny, tmp_path, monkeypatch, clip):
    seen, step = [], torch.optim.AdamW.step

    def recorded(self, *given):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    trained(tiny, tmp_path, "vae", f"optimizer.clip={clip}")
    assert len(seen) == 2
    if clip < 1:
        assert seen == pytest.approx([clip] * 2, rel=1e-3)
    else:
        assert min(seen) > 1e-3


def test_the_average_is_of_the_weights_after_each_step(tiny, tmp_path):
    """Its decay warms up as (1 + n) / (10 + n)."""
    folder = trained(tiny, tmp_path, "vae", "keep=3")
    saved = [state.load(path) for path in sorted(folder.glob("step-*"))]
    assert [each["step"] for each in saved] == [0, 1, 2]
    average = saved[0]["networks"]["tokenizer"]
    for n, each in enumerate(saved[1:]):
        decay, live = (1 + n) / (10 + n), each["networks"]["tokenizer"]
        moving = {name: value for name, value in live.items() if f"average.{name}" in each["ema"]}
        average = {name: decay * average[name] + (1 - decay) * value for name, value in moving.items()}
        assert any(not torch.equal(value, saved[0]["networks"]["tokenizer"][name]) for name, value in moving.items())
        for name, value in average.items():
            torch.testing.assert_close(each["ema"][f"average.{name}"], value, rtol=1e-5, atol=1e-6)


def test_codes_that_begin_anew_do_so_in_the_average_too(tiny, tmp_path):
    folder = trained(tiny, tmp_path, "vqvae", "keep=3", "objective.restart_every=1")
    before, after = (state.load(folder / f"step-{step:08d}") for step in (0, 1))
    name = "quantize.embedding.weight"
    live, average = after["networks"]["tokenizer"][name], after["ema"][f"average.{name}"]
    moved = (live - before["networks"]["tokenizer"][name]).abs().amax(dim=1) > 0.01  # a step of the rate is less
    assert 0 < moved.sum() < len(live)
    assert torch.equal(average[moved], live[moved])


def test_the_scale_is_of_the_very_weights_that_are_shipped(tiny, tmp_path, monkeypatch):
    """They are rounded first, and the scale is measured with what was rounded."""
    monkeypatch.setattr(contract, "IMAGES", 64)
    stage, argv = tiny["autoencoder_kl"]
    assert trainer.main([*argv, "stages.tokenizer.steps=4", "--run", str(tmp_path)]) == 0
    recipe = checkpoint.load_recipe(tmp_path / "model")
    stored = checkpoint.load_weights(tmp_path / "model", "tokenizer")
    part = checkpoint.load_part(tmp_path / "model", recipe, "tokenizer")
    assert any(value.dtype != torch.float32 for value in stored.values())
    part.scale.forget()
    given = trainer._arguments(argv)
    recipe, training = runs.load(given.recipe, given.overrides)
    latents.measure_scale(part, trainer.source_of(recipe, training.data_of("tokenizer")), torch.device("cpu"))
    for name in ("mean", "std"):
        torch.testing.assert_close(getattr(part.scale, name), stored[f"scale.{name}"], rtol=1e-5, atol=1e-6)
