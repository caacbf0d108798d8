"""The discriminator is heard from the midst of a training on, and what was learned of reconstruction stays; a published
one has BatchNorm."""

from pathlib import Path

import pytest
import torch
from test_tokenizer_stages import knob, log, stage_of

from kartina.training import __main__ as trainer
from kartina.training import history
from kartina.training.objectives import vqgan

HEARD = 80  # from this step of 160 on
LARGER = [  # than what is tiny elsewhere, and at full rates: so that there is something to lose
    "parts.tokenizer.width=8", "parts.tokenizer.channel_mult=[1, 2]", "parts.tokenizer.norm_groups=4",
    "stages.tokenizer.optimizer={lr: 0.01, muon: 0.02, betas: [0.9, 0.99], decay: 0.5, clip: 1.0}",
    "stages.tokenizer.steps=160", "stages.tokenizer.validate_every=10", "stages.tokenizer.ema=0.8",
    "training.data.levels=[S1]", "stages.tokenizer.validate_samples=96", knob("discriminator_start", 0.4),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "autoencoder_kl"])
def test_reconstruction_survives_that_the_discriminator_is_heard(kind, tiny, tmp_path, monkeypatch, all_images):
    """No validation from then on has half a decibel less than the last before; with 100,000 in
    place of the adaptive weight it loses more than two."""
    before, after = psnr([*tiny[kind][1], *LARGER, "--run", str(tmp_path / "adapted")])
    assert min(after) > before - 0.5 and after[-1] > before
    monkeypatch.setattr(vqgan, "adaptive_weight", lambda *given, **named: torch.tensor(1e5))
    same, after = psnr([*tiny[kind][1], *LARGER, "--run", str(tmp_path / "not-adapted")])
    assert same == before and min(after) < before - 2


def psnr(argv):
    """In dB, of the last validation before the discriminator is heard, and of all after it."""
    assert trainer.main(argv) == 0
    values = [line["valid/psnr"] for line in log(Path(argv[-1])) if "valid/psnr" in line]
    assert len(values) == 16
    return values[HEARD // 10 - 1], values[HEARD // 10 :]


PUBLISHED = "parts.discriminator={kind: patch, width: 8, depth: 2}"  # with BatchNorm


def test_what_is_real_has_no_part_in_the_statistics_of_what_is_not(tiny):
    stage, batch = stage_of(tiny, "vqgan", PUBLISHED)
    fake, calls = batch.image.flip(0) / 2, []

    def judge(*given):
        calls.append(len(given))
        return stage.forward["discriminator"](*given)

    found = [stage.adversary.update(judge, real, fake, batch.weight)[2] for real in (batch.image, -batch.image)]
    assert found[0]["real_logits"] != found[1]["real_logits"]
    assert found[0]["fake_logits"] == found[1]["fake_logits"]
    assert calls == [1, 1]  # of DDP one call a step: between two it would copy buffers, which not every torch bears


def test_two_processes_train_a_published_discriminator(tiny, tmp_path, work):
    """Each judges its own pictures, twice before the gradients of both are exchanged."""
    results = work([{"name": "batch", "argv": [*tiny["vqgan"][1], PUBLISHED, "--run", str(tmp_path)]}], 2)
    assert [rank["status"] for rank in results["batch"]] == [0, 0]
    hinges = [value for _, value in history.read(tmp_path)["tokenizer"].curve("discriminator/hinge")]
    assert len(hinges) == 18 and all(0.5 < hinge < 1.5 for hinge in hinges)
