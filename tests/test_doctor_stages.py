"""The doctor beside the stages that are shipped: whatever a rule reads, one of them logs, and diffusion's faults are
found in a real training.
"""

import json
import math
import shutil

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer
from kartina.training import doctor, history

_SIZES = "image_size: 32, width: 8, channel_mult: [1, 2], blocks_per_level: 1, norm_groups: 4"
LATENT = [
    *["shapes/stable-diffusion", "frozen=[]"],
    *["captions.vocab_size=300", "training.precision=fp32", "training.trackers=[]", "training.data.levels=[S1]"],
    f"parts.tokenizer={{kind: autoencoder_kl, {_SIZES}, latent_channels: 4, attn_resolutions: []}}",
    "parts.text={kind: clip_text, text_vocab: 302, text_length: 24, width: 16, depth: 1, num_heads: 2}",
    "parts.prior={kind: unet, in_channels: 4, width: 8, channel_mult: [1, 2], blocks_per_level: 1, norm_groups: 4,"
    " attn_levels: [1], num_heads: 2, context_dim: 16}",
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "prior") for key in ("log_every=1", "global_batch=8")],
    *["stages.tokenizer.steps=20", "stages.prior.steps=20", "stages.prior.validate_every=20"],
    *["stages.tokenizer.validate_samples=64", "stages.prior.validate_samples=64", "sampling.num_steps=2"],
]


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """A run of latent diffusion that never shows a caption to its prior."""
    folder = tmp_path_factory.mktemp("latent")
    for stage in ("tokenizer", "prior"):
        deaf = "stages.prior.objective={condition_drop: 1}"
        assert trainer.main([*LATENT, deaf, "--stage", stage, "--run", str(folder)]) == 0
    return folder


def test_diffusion_that_ignores_captions(latent):
    found = {finding.name: finding for finding in doctor.examine(latent)}
    assert "valid/caption_error of" in found["caption ignored"].seen
    log = history.read(latent)["prior"]
    assert log.last("valid/latent_std") == pytest.approx(1, abs=0.1) and "latent scale off" not in found


def test_latents_of_another_scale(latent, tmp_path):
    """The tokenizer was exchanged for one whose scale was measured elsewhere."""
    shutil.copytree(latent / "model", tmp_path / "model")
    shutil.copy(latent / "captions.origin.json", tmp_path)
    recipe = checkpoint.load_recipe(latent / "model")
    network = checkpoint.load_part(latent / "model", recipe, "tokenizer", "cpu", torch.float32)
    network.scale.std.mul_(5)
    card = checkpoint.read_card(latent / "model")
    (tmp_path / "model" / "card.json").write_text(json.dumps(card | {"parts": {}}))
    checkpoint.save_part(tmp_path / "model", recipe, "tokenizer", checkpoint.export(network, torch.float32))
    assert trainer.main([*LATENT, "--stage", "prior", "--run", str(tmp_path)]) == 0
    (found,) = [finding for finding in doctor.examine(tmp_path) if finding.name == "latent scale off"]
    assert found.seen.startswith("valid/latent_std is 0.2")


class Asked(history.History):
    """A log that has whatever it is asked for, and remembers it."""

    def __init__(self, value):
        facts = {"metrics": ["error"], "networks": ["prior"], "clip": 1.0, "steps": 100}
        there = ("valid/error", "valid/caption_error", "prior/chance")  # what they look for before they read it
        super().__init__("prior", facts, {name: {100: 1.0} for name in there}, step=100)
        self.value, self.asked = value, set()

    def curve(self, name, since=0):
        self.asked.add(name)
        return [(step, self.value * step) for step in range(1, 101)]

    def ending(self, name):
        return [f"valid/{name}"]


def test_whatever_a_rule_reads_some_stage_logs(latent, tiny, trained_tokenizer, tmp_path):
    asked = set()
    for value in (0.0, 1.0):
        log = Asked(value)
        doctor.judge(log)
        asked |= log.asked
    assert len(asked) > 15
    logged = set()
    for kind in ("vae", "autoencoder, adversarial", "vqgan", "dalle", "clip"):
        if tiny[kind][0] != "tokenizer":
            shutil.copytree(trained_tokenizer, tmp_path / kind)
        assert trainer.main([*tiny[kind][1], "--run", str(tmp_path / kind)]) == 0
    for run in (latent, *tmp_path.iterdir()):
        for log in history.read(run).values():
            logged |= set(log.curves) | {name.replace("clip/", "prior/") for name in log.curves}
    assert asked <= logged, asked - logged


def test_a_run_that_went_back_once_has_healed_after_a_while():
    events = [{"event": "returned", "reached": 1000}]
    facts = {"steps": 10_000, "networks": ["prior"]}
    of = {step: history.History("prior", facts, {}, events, step) for step in (2500, 3500)}
    (found,) = doctor.judge(of[2500])
    assert found.name == "learning rate too high" and "went back, 1 times, last at step 1000" in found.seen
    assert not doctor.judge(of[3500])


def test_a_discriminator_whose_weights_decay_as_fast_as_they_learn_says_nothing(tiny, tmp_path):
    """What the tokenizer hears of it is then made as large as the adaptive weight allows."""
    for name, decay in (("decays", 900), ("learns", 0)):
        words = [f"stages.tokenizer.optimizers={{discriminator: {{lr: 0.001, weight_decay: {decay}}}}}"]
        words += ["stages.tokenizer.steps=60", "stages.tokenizer.validate_every=60", "--run", str(tmp_path / name)]
        assert trainer.main([*tiny["autoencoder_kl"][1], *words]) == 0
        found = [finding.name for finding in doctor.examine(tmp_path / name)]
        assert found == (["the discriminator says nothing"] if decay else [])


def test_latents_that_lie_closer_than_draws_of_the_prior_are_a_mode_collapse(tiny, tmp_path):
    """Of a mixture on a ring; latents of an encoder at its start lie together."""
    words = [*tiny["autoencoder, adversarial"][1], "stages.tokenizer.steps=40", "--run", str(tmp_path)]
    assert trainer.main(words) == 0
    log = history.read(tmp_path)["tokenizer"]
    assert log.facts["ramp_end"] == 20 and 0 < log.last("valid/diversity") < 1
    (found,) = [finding for finding in doctor.judge(log) if finding.name == "mode collapse"]
    assert found.seen.startswith(f"what is generated is spread {log.last('valid/diversity'):.2g} times as far")
    log.facts["ramp_end"] = log.step - 10  # heard only just now: it could not have spread them yet
    assert "mode collapse" not in [finding.name for finding in doctor.judge(log)]


@pytest.mark.parametrize(("adaptive", "since", "wrong"), [(1e4, 500, True), (1200.0, 500, False), (1e4, 810, False)])
def test_a_discriminator_whose_gradient_is_amplified_to_the_end_says_nothing(adaptive, since, wrong):
    """But not in the first fifth of the stage from when it is heard."""
    found = history.History("tokenizer", {"networks": ["tokenizer", "discriminator"], "clip": 1.0, "steps": 1000})
    for step in range(0, 1001, 20):
        found.add(
            {"step": step, "discriminator/hinge": 1.0, **({"tokenizer/adaptive": adaptive} if step > since else {})}
        )
    assert [finding.name for finding in doctor.judge(found)] == ["the discriminator says nothing"] * wrong


def test_trained_weights_whose_loss_is_flat_from_its_start_have_no_rate_too_high():
    found = history.History("prior", {"networks": ["prior"], "clip": 1.0, "steps": 1000})
    for step in range(1000):
        found.add({"step": step, "prior/total": 0.52 + 0.02 * math.sin(step**2) if step else 0.5, "prior/norm": 0.1})
    assert not list(doctor.learning_rate(found))
    found.curves["prior/total"] |= dict.fromkeys(range(500, 1000), 0.8)
    assert list(doctor.learning_rate(found))


def test_a_loss_that_rises_because_its_weights_do_has_no_rate_too_high():
    """A dVAE whose KL gets its weight from step 250 to 350."""
    found = history.History("tokenizer", {"networks": ["tokenizer"], "clip": 1.0, "steps": 1000, "restart_step": 250})
    for step in range(0, 1001, 20):
        risen = min(1.0, max(0.0, (step - 250) / 100))
        loss = 14.0 - step / 500 + 8.0 * risen + 0.2 * math.sin(step**2)
        found.add({"step": step, "tokenizer/total": loss, "tokenizer/norm": 100.0})
    assert [finding.name for finding in doctor.judge(found)] == ["learning rate too high"]
    found.facts["ramp_end"] = 350
    assert not doctor.judge(found)
    for step in range(360, 1001, 20):  # level from there on
        found.curves["tokenizer/total"][step] = 21.5 + 0.2 * math.sin(step**2)
    assert not doctor.judge(found)


@pytest.mark.parametrize("of", ["valid", "tokenizer"])
@pytest.mark.parametrize(
    ("counts", "usage", "wrong"), [(3.1, 0.4, True), (3.1, 0.5, False), (1.0, 0.33, False), (0.5, 0.01, False)]
)
def test_codes_may_be_left_out_by_chance_where_few_are_drawn(counts, usage, wrong, of):
    """Of even codes with c counts each 1 - exp(-c) are met; half of that is asked for. Of the steps of a line where
    nothing is validated."""
    curves = {f"{of}/usage": usage, f"{of}/perplexity": 9.0, f"{of}/counts_per_code": counts}
    log = history.History("tokenizer", {"steps": 100}, {name: {100: value} for name, value in curves.items()}, step=100)
    assert [finding.name for finding in doctor.judge(log)] == ["codebook collapse"] * wrong


def test_of_an_older_log_that_tells_no_counts_a_line_says_nothing_and_a_validation_does():
    for of in ("valid", "tokenizer"):
        log = history.History("tokenizer", {"steps": 100}, {f"{of}/usage": {100: 0.1}}, step=100)
        assert [finding.name for finding in doctor.judge(log)] == ["codebook collapse"] * (of == "valid")


@pytest.mark.parametrize(("last", "wrong"), [(99.0, True), (101.0, False)])
def test_codes_that_come_less_and_less_evenly_collapse_too(last, wrong):
    """All are in use, but their perplexity has fallen below a third of what it was."""
    perplexity = {20: 300.0, 60: 200.0, 100: last}
    log = history.History(
        "tokenizer", {"steps": 100}, {"valid/usage": {100: 0.9}, "valid/perplexity": perplexity}, step=100
    )
    found = doctor.judge(log)
    assert [finding.name for finding in found] == ["codebook collapse"] * wrong
    assert not wrong or "which was 300.0 before" in found[0].seen
