"""The discriminator begins to be heard in the midst of a training, and what was learned of reconstruction stays."""

from pathlib import Path

import pytest
import torch
from test_tokenizer_stages import knob, log

from kartina.training import __main__ as trainer
from kartina.training.objectives import vqgan

HEARD = 80  # from this step of 160 on
LARGER = [  # than what is tiny elsewhere, and at full rates: so that there is something to lose
    "parts.tokenizer.width=8", "parts.tokenizer.channel_mult=[1, 2]", "parts.tokenizer.norm_groups=4",
    "stages.tokenizer.optimizer={lr: 0.01, muon: 0.02, betas: [0.9, 0.99], decay: 0.5, clip: 1.0}",
    "stages.tokenizer.steps=160", "stages.tokenizer.validate_every=10", "stages.tokenizer.ema=0.8",
    "training.data.levels=[S1]", knob("discriminator_start", 0.4),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "autoencoder_kl"])
def test_reconstruction_survives_that_the_discriminator_is_heard(kind, tiny, tmp_path, monkeypatch):
    """No validation from then on has half a decibel less than the last before; with a weight that is not adapted, it
    loses more than two."""
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
