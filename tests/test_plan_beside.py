"""Plans of what stands beside a tokenizer: discriminators and perceptual networks, against the profiler."""

import pytest
import torch
from planned_tokenizers import BATCH, JUDGED, OBJECTIVES, PLAIN

from kartina.layers.attention import SpatialAttention
from kartina.training import features, plan
from kartina.training import run as runs
from kartina.training.plan_report import report


def planned(*overrides: str, **options) -> dict:
    recipe, training = runs.load("shapes/dalle", list(overrides))
    return plan.plan(recipe, training, stage="tokenizer", **options)


@pytest.mark.parametrize("kind", JUDGED)
def test_flops_of_a_discriminator_and_a_perceptual_network_against_the_profiler(kind, counted, real, flops):
    """Forward passes of each network alone say what a step takes of them; backward is twice forward, of which half is
    the weights'. The adaptive weight takes one more pass back to the last layer, of both.
    """
    overrides = [*JUDGED[kind], OBJECTIVES[kind]]
    setting, found = real(overrides, "tokenizer"), counted(overrides, "tokenizer")
    network, judge, image = setting.network, setting.networks["discriminator"], torch.zeros(BATCH, 3, 32, 32)
    given = (torch.zeros(BATCH, 2), torch.zeros(BATCH, dtype=torch.int64)) if kind == "aae" else (image,)
    noise = [torch.zeros(BATCH, *network.spec.shape)] if kind == "autoencoder_kl" else []
    through, judged, first = (
        flops(work)
        for work in (
            lambda: network(image, *noise),
            lambda: judge(*given),
            lambda: judge.main[0](torch.zeros(BATCH, 12) if kind == "aae" else image),
        )
    )
    attending = sum(isinstance(module, SpatialAttention) for module in network.modules())
    attention = attending * BATCH * 4 * (16 * 16) ** 2 * 32  # which the profiler passes by
    if kind == "aae":
        assert found["discriminator"].flops == pytest.approx(3 * 2 * judged - 2 * first, rel=0.01)  # and of a draw
        assert found["tokenizer"].flops == pytest.approx(3 * through + 3.5 * attention + 2 * judged, rel=0.1)
        return
    seen = flops(lambda: setting.frozen["perceptual"].network(image))
    last = flops(lambda: torch.nn.functional.conv2d(torch.zeros(BATCH, 16, 32, 32), network.last_layer, padding=1))
    assert found["tokenizer"].frozen_flops == pytest.approx((2 + 2) * seen, rel=0.01)
    assert found["tokenizer"].flops == pytest.approx(
        3 * through + 3.5 * attention + (1 + 2) * judged + 2 * last, rel=0.1
    )
    assert found["discriminator"].flops == pytest.approx(through + attention + 3 * 2 * judged - 2 * first, rel=0.1)


@pytest.mark.slow
def test_a_discriminator_costs_from_the_step_on_at_which_it_learns_and_is_heard():
    words = [*JUDGED["vqgan"], "stages.tokenizer.steps=100"]
    late = "{discriminator_start: 0.5, discriminator_warmup: 0.25"

    def tokenizer(*overrides: str) -> dict:
        return planned(*words, *overrides)["stages"]["tokenizer"]

    whole, parted = tokenizer(PLAIN.replace("}", "discriminator_warmup: 0}")), tokenizer(f"{PLAIN[:-2]}{late}}}")
    unheard = tokenizer(f"{PLAIN[:-2]}{{discriminator_weight: 0}}")
    alone = planned(words[0], words[2], PLAIN)["stages"]["tokenizer"]
    assert parted["step_seconds"] == whole["step_seconds"] and parted["memory"] == whole["memory"]
    assert alone["step_seconds"] < unheard["step_seconds"] < whole["step_seconds"]
    assert 86400 * whole["days"] == pytest.approx(100 * whole["step_seconds"])
    spent = 50 * alone["step_seconds"] + 25 * unheard["step_seconds"] + 25 * whole["step_seconds"]
    assert 86400 * parted["days"] == pytest.approx(spent)


def test_what_stands_beside_is_listed_by_itself(monkeypatch):
    """LPIPS too, which comes in no package: a plan reads no file of a perceptual network."""
    monkeypatch.delenv(features.LPIPS_FOLDER, raising=False)
    knobs = PLAIN.replace("}", "perceptual: lpips-vgg}")
    adamw = "stages.tokenizer.optimizers={discriminator: {lr: 0.001}}"
    found = planned(*JUDGED["vqgan"], knobs, adamw, devices=2)
    stage = found["stages"]["tokenizer"]
    judge, memory = stage["beside"]["discriminator"], stage["memory"]
    assert judge["parameters"] == found["parameters"]["discriminator"]
    assert judge["weights"] == judge["gradients"] == judge["optimizer"] / 2 == 4 * judge["parameters"]
    assert memory["beside"] == 3 * judge["weights"] and memory["buckets"] == memory["weights"] + judge["weights"]
    assert memory["frozen"] == 4 * 14_714_688  # of VGG16, its convolutions
    table = report(found)
    assert all(word in table for word in ("of the discriminator, besides", f"{judge['parameters']:,d}", "frozen parts"))
    assert "not planned: discriminator" not in table
