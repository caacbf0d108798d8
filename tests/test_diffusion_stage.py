"""The stage of diffusion priors: what it refuses, that it learns, and that its draws are a sample's own."""

import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.denoising import denoiser_of, schedule_of
from kartina.pipeline.images import to_pil
from kartina.pipeline.known_models import SHIPPED
from kartina.pipeline.recipe import RecipeError, build
from kartina.pipeline.text_to_image import TextToImage
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training import __main__ as trainer
from kartina.training import checks
from kartina.training import run as runs
from kartina.training.sources import source_of
from kartina.training.stages.diffusion import DiffusionStage

SMALL = """parts={prior: {kind: unet, in_channels: 3, width: 16, channel_mult: [1, 2], blocks_per_level: 1,
    attn_levels: [], mid_attention: false, context_dim: null, num_classes: NONE, norm_groups: 4}}"""


def stage_of(tmp_path, *overrides: str, name: str = "shapes/ddpm", classes: str = "null"):
    overrides = (SMALL.replace("NONE", classes), *overrides)
    recipe, training = runs.load(name, list(overrides))
    source = source_of(recipe, training.data)
    stage = DiffusionStage(recipe, training.stages["prior"], source, tmp_path, 0, torch.device("cpu"))
    return stage, source


@pytest.mark.parametrize(("objective", "share"), [("weighting: none", 0.8), ("loss: vlb", 0.95)])
def test_it_learns(tmp_path, objective, share):
    torch.manual_seed(0)
    few = (f"stages.prior.objective={{{objective}}}", "sampling.num_steps=2")
    stage, source = stage_of(tmp_path, *few, name="digits/ddpm", classes="10")
    held_out = source.read(range(1000, 1016))
    before = stage.measure(held_out)
    optimizer = torch.optim.Adam(stage.network.parameters(), lr=3e-3)
    for step in range(40):
        for _, (total, count), _ in stage.updates(source.read(range(8 * step, 8 * step + 8)), step):
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
    after = stage.measure(held_out)
    assert set(before) == set(stage.metrics) and before["error"].shape == (16,)
    assert after["error"].mean() < share * before["error"].mean()
    assert 0 < after["bits_per_dim"].mean() < before["bits_per_dim"].mean()
    assert torch.equal(after["error"], stage.measure(held_out)["error"])
    assert stage.preview(held_out).width >= 128


def test_a_samples_draws_are_its_own(tmp_path):
    torch.manual_seed(0)
    stage, source = stage_of(tmp_path)
    torch.nn.init.normal_(stage.network.conv_out.weight, std=0.1)

    def losses(positions) -> torch.Tensor:
        ((_, (total, _), _),) = stage.updates(source.read(positions), 3)
        return total.detach()

    torch.testing.assert_close(losses([5, 6, 7]), losses([5]) + losses([6]) + losses([7]))


def test_captions_are_read_in_one_wording_first_and_less_and_less():
    """A share of the samples, which falls in a line; validation reads captions as they are."""
    overrides = ["frozen=[]", "stages.prior.steps=8", "stages.prior.objective={canonical: 0.25, canonical_end: 0.75}"]
    recipe, training = runs.load("shapes/stable-diffusion", overrides)
    source = source_of(recipe, training.data_of("prior"))
    model = SHIPPED / "shapes/stable-diffusion"
    stage = DiffusionStage(recipe, training.stages["prior"], source, model, 0, torch.device("cpu"))
    read, encode, batch = [], stage.captions.encode, source.read(range(48))
    stage.captions.encode = lambda captions: (read.append(list(captions)), encode(captions))[1]
    rewritten = [source.canonical(caption) for caption in batch.captions]
    for step, share in ((1, 1.0), (4, 0.5), (6, 0.0)):
        next(stage.updates(batch, step))
        told = [a == b for a, b, own in zip(read[-1], rewritten, batch.captions, strict=True) if b != own]
        assert set(read[-1]) <= {*rewritten, *batch.captions} and abs(sum(told) / len(told) - share) < 0.25
        assert share not in (0, 1) or sum(told) == share * len(told)
    stage.measure(batch)
    assert read[-1] == batch.captions != rewritten


@pytest.mark.parametrize("least", [0.0, 0.25])
def test_timesteps_are_drawn_uniformly_first_and_then_by_the_logit_normal(least, tmp_path):
    drawn, normal, bounds = {}, NormalDist(), torch.linspace(0, 1000, 65)
    knobs = f"{{logit_std: 1.5, logit_mean: -0.5, uniform: 0.25, uniform_end: 0.75, uniform_least: {least}}}"
    stage, source = stage_of(
        tmp_path, f"stages.prior.objective={knobs}", "stages.prior.global_batch=64", "stages.prior.steps=8"
    )
    stage.forward["prior"] = lambda x_t, t, condition, draws: drawn.update({step: t}) or torch.zeros_like(x_t)
    for step in (1, 4, 6):
        list(stage.updates(source.read(range(64)), step))
    uniform = {step: (bounds[:-1].long() <= t) & (t <= bounds[1:]) for step, t in drawn.items()}  # of its 64th
    assert bool(uniform[1].all()) and 20 < uniform[4].sum() < 60
    by_law = torch.tensor([normal.cdf((math.log(t / (1000 - t)) + 0.5) / 1.5) for t in range(1, 1000)])
    quantiles = torch.arange(64) / 64
    first, last = (1 + torch.searchsorted(by_law, quantiles + end / 64) for end in (0, 1))
    of_the_law = (first - 2 <= drawn[6]) & (drawn[6] <= last)
    assert bool(of_the_law.all()) if least == 0 else bool((of_the_law | uniform[6]).all()) and 6 < uniform[6].sum() < 40


def test_classes_are_dropped_for_the_null_one(tmp_path):
    torch.manual_seed(0)
    stage, source = stage_of(tmp_path, "stages.prior.objective={condition_drop: 0.5}", name="digits/ddpm", classes="10")
    seen = []
    stage.forward["prior"] = lambda x_t, t, condition, draws: seen.append(condition.labels) or torch.zeros_like(x_t)
    batch = source.read(range(64))
    list(stage.updates(batch, 0))
    null = seen[0] == 10
    assert 16 < null.sum() < 48 and torch.equal(seen[0][~null], batch.labels[~null])


def reading_stage(tmp_path, *overrides: str):
    """A stage that reads the tokens of a frozen text encoder of the folder, its source, and that encoder."""
    reading = SMALL.replace("attn_levels: []", "attn_levels: [1]").replace("context_dim: null", "context_dim: 16")
    text = "parts.text={kind: clip_text, text_vocab: 302, text_length: 14, width: 16, depth: 1, num_heads: 2}"
    words = ["captions={vocab_size: 300, context_length: 12}", text, "frozen=[text]", *overrides]
    recipe, training = runs.load("shapes/ddpm", [reading.replace("NONE", "null"), *words])
    source, encoder = source_of(recipe, training.data), build(recipe, "text")
    checkpoint.save_part(tmp_path, recipe, "text", checkpoint.export(encoder, torch.float32))
    CaptionTokenizer.train(source.captions(range(50)), 300, 12).save(tmp_path / "captions.json")
    return DiffusionStage(recipe, training.stages["prior"], source, tmp_path, 0, torch.device("cpu")), source, encoder


def test_a_frozen_text_encoder_is_the_folders_and_does_not_train(tmp_path):
    stage, source, encoder = reading_stage(tmp_path, "stages.prior.objective={condition_drop: 0}")
    assert stage.network is stage.prior and list(stage.exported()) == ["prior"]
    assert stage.needs(stage.recipe) == ("captions", "text")
    batch, seen = source.read(range(4)), []
    stage.forward["prior"] = lambda x_t, t, condition, draws: seen.append(condition) or torch.zeros_like(x_t)
    list(stage.updates(batch, 0))
    tokens, _ = encoder.eval()(stage.text.frame(*stage.captions.encode(batch.captions)))
    same = (seen[0].tokens - tokens).abs().amax(dim=(1, 2)) < 1e-5
    assert same.all() and not seen[0].tokens.requires_grad


def test_the_timesteps_of_a_step_lie_one_in_each_part_on_any_number_of_processes(tmp_path):
    stage, source, _ = reading_stage(tmp_path, "stages.prior.global_batch=8")
    total, seen = stage.schedule.num_timesteps, []
    stage.forward["prior"] = lambda x_t, t, condition, draws: seen.append(t) or torch.zeros_like(x_t)
    for step in (0, 3):
        first = 8 * step
        for half in (range(first, first + 4), range(first + 4, first + 8), range(first, first + 8)):
            list(stage.updates(source.read(half), step))
        *halves, whole = seen[-3:]
        assert torch.equal(torch.cat(halves), whole)
        assert (whole * 8 // total).tolist() == list(range(8))
    assert not torch.equal(seen[2], seen[5])


def test_what_a_caption_brings_is_measured_against_that_of_the_sample_before(tmp_path):
    stage, source, _ = reading_stage(tmp_path)
    batch, seen = source.read(range(4)), []

    def network(x_t, t, condition):
        seen.append((x_t, t, condition.tokens))
        return condition.tokens[:, :, 0].mean(dim=1).view(-1, 1, 1, 1).expand_as(x_t)

    stage.network = network
    found = stage.measure(batch)
    again = [k for k, look in enumerate(seen) if not torch.equal(look[2], seen[0][2])]
    (other,) = again
    assert torch.equal(seen[other][2], seen[0][2].roll(1, 0))
    (own,) = [k for k, look in enumerate(seen) if k != other and torch.equal(look[0], seen[other][0])]
    assert len(seen) == 6 and torch.equal(seen[own][1], seen[other][1])
    assert set(found) == {*stage.metrics, "caption_error"} and (found["caption_gain"] != 0).all()
    stage.network = lambda x_t, t, condition: torch.zeros_like(x_t)
    assert (stage.measure(batch)["caption_gain"] == 0).all()


def test_a_preview_is_what_users_paint(tmp_path, monkeypatch):
    """By the recipe's sampler, steps and guidance, from the seeds 0, 1, ... and the captions of the batch."""
    knobs = "sampling={sampler: ddim, num_steps: 3, eta: 1.0, guidance_scale: 4.0, negative: a blue ring}"
    stage, source, _ = reading_stage(tmp_path, knobs, "diffusion={prediction: v, zero_terminal: true}")
    for parameter in stage.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch, shown = source.read(range(4)), []
    monkeypatch.setattr("kartina.training.stages.diffusion.contact_sheet", lambda images, words: shown.append(images))
    stage.network.train()
    stage.preview(batch)
    assert stage.network.training
    system = TextToImage(stage.recipe, {"prior": stage.prior.eval(), "text": stage.text}, stage.captions, "")
    painted = system(batch.captions, seed=[0, 1, 2, 3])
    assert [picture.tobytes() for picture in to_pil(shown[0])] == [painting.image.tobytes() for painting in painted]
    assert len({painting.image.tobytes() for painting in painted}) == 4


def test_a_frozen_text_encoder_is_the_tower_of_the_clip_trained_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "validation_of", lambda *_: None)  # most of the time, and beside the point
    unet = SMALL.replace("attn_levels: []", "attn_levels: [1]").replace("context_dim: null", "context_dim: 16")
    clip = "clip: {kind: clip, embed_dim: 8, image_size: 32, patch_size: 16, vision_width: 16, vision_depth: 1,"
    clip += " vision_heads: 2, text_vocab: 302, text_length: 14, text_width: 16, text_depth: 2, text_heads: 2}"
    text = "text: {kind: clip_text, text_vocab: 302, text_length: 14, width: 16, depth: 2, num_heads: 2,"
    parts = unet.replace("NONE", "null")[:-1] + f", {clip}, {text} quick_gelu: GELU}}}}"
    step = "{steps: 2, global_batch: 4, optimizer: {lr: 0.001}}"
    command = ["shapes/ddpm", "captions={vocab_size: 300, context_length: 12}", "frozen=[text]", "training.trackers=[]"]
    command += [f"training.stages={{clip: {step}, prior: {step}}}", "--run", str(tmp_path)]
    assert trainer.main([*command, parts.replace("GELU", "true")]) == 2
    assert "becomes the text tower of parts.clip; write quick_gelu: False" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    command.append(parts.replace("GELU", "false"))
    assert trainer.main([*command[:-2], str(tmp_path / "b"), command[-1]]) == 0
    weights = {part: checkpoint.load_weights(tmp_path / "b/model", part) for part in ("clip", "text")}
    for name, tensor in weights["text"].items():
        assert torch.equal(tensor, weights["clip"][name]), name
    for lost in ("none", "text"):
        (tmp_path / "b/model" / f"{lost}.safetensors").unlink(missing_ok=True)
        capsys.readouterr()
        assert trainer.main([*command[:-2], str(tmp_path / "b"), command[-1]]) == 0
        said = capsys.readouterr().out  # a text tower that is lost is read out of its CLIP
        assert "prior: already trained" in said and "clip: already trained" in said
        for part in weights:
            again = checkpoint.load_weights(tmp_path / "b/model", part)
            assert all(torch.equal(tensor, again[name]) for name, tensor in weights[part].items())


def test_a_stage_that_took_the_text_encoder_along_is_known_again(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "validation_of", lambda *_: None)  # most of the time, and beside the point
    command = [*tiny["unet, captioned"][1], "stages.prior.steps=2", "--run", str(tmp_path)]
    assert trainer.main(command) == 0
    card = checkpoint.read_card(tmp_path / "model")
    assert set(card["parts"]) == {"text", "prior"}
    capsys.readouterr()
    assert trainer.main(command) == 0, capsys.readouterr().err
    assert "prior: already trained" in capsys.readouterr().out
    assert checkpoint.read_card(tmp_path / "model") == card
    (tmp_path / "model/text.safetensors").unlink()
    assert trainer.main(command) == 0
    assert "prior: already trained" not in capsys.readouterr().out
    assert checkpoint.read_card(tmp_path / "model")["parts"]["text"]["hash"] == card["parts"]["text"]["hash"]
    assert checkpoint.load_weights(tmp_path / "model", "text")


KL = "{kind: autoencoder_kl, image_size: 32, width: 8, channel_mult: [1, 1], blocks_per_level: 1, norm_groups: 2, "
KL += "latent_channels: 2}"


def test_latents_must_have_a_measured_scale(tmp_path):
    words = [SMALL.replace("NONE", "null"), f"parts.tokenizer={KL}", "parts.prior.in_channels=2"]
    recipe, training = runs.load("shapes/ddpm", words)
    kl, source = build(recipe, "tokenizer"), source_of(recipe, training.data)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(kl))
    arguments = (recipe, training.stages["prior"], source, tmp_path, 0, torch.device("cpu"))
    with pytest.raises(RecipeError, match="scale of the tokenizer's latents was not measured"):
        DiffusionStage(*arguments)
    kl.scale.std.fill_(2.0)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(kl))
    assert DiffusionStage(*arguments).tokenizer.scale.measured


LATENTS = f"parts.tokenizer={KL}", "parts.prior.in_channels=2"
CODES = "parts.tokenizer={kind: patch_dvae, image_size: 32, num_codes: 32, width: 8}"
OBJECTIVE, DIGITS = "stages.prior.objective", "training.data={kind: digits}"
TEXT = "parts.text={kind: caption_encoder, text_vocab: 300, text_length: 12, width: 16, depth: 1, num_heads: 2}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parts.prior.context_dim=8"], "null where there is none, got 8 and None"),
        (["parts.prior.embedding_dim=8"], "leave parts.prior.embedding_dim out"),
        (["parts.prior.in_channels=4"], "pictures have 3 channels, the prior reads 4 and gives 4; write parts.prior"),
        (["parts.prior.out_channels=4"], "the prior reads 3 and gives 4"),
        (["parts.prior.channel_mult=[1, 1, 1, 1, 1, 1, 1]"], "halves its grid to 1/64, which must divide [32, 32]"),
        ([f"parts.tokenizer={KL}"], "the tokenizer gives 2 channels, the prior reads 3"),
        ([CODES], "gives codes of shape (8, 8); take an autoencoder_kl or vq_latents"),
        ([TEXT], "null where there is none, got None and 16"),
        ([TEXT, "parts.prior.context_dim=16", "captions.vocab_size=301"], "text reads 12 tokens of 300, the captions"),
        (["diffusion={prediction: eps, zero_terminal: true}"], "let the network predict v or x_0"),
        (
            ["diffusion={prediction: v, zero_terminal: true}", f"{OBJECTIVE}={{target: eps, weighting: p2}}"],
            "weights p2 of an error of eps are divided by the SNR, which ends at 0",
        ),
        (
            [f"{OBJECTIVE}={{weighting: truncated, gamma: 0.5}}"],
            "truncated weights are at least 1, so that their gamma is too, got 0.5",
        ),
        ([f"{OBJECTIVE}={{canonical: 0.2}}"], "it reads no captions, and canonical is of these"),
        ([f"{OBJECTIVE}={{bpe_dropout: 0.2}}"], "it reads no captions, and bpe_dropout is of these"),
        ([f"{OBJECTIVE}={{bpe_dropout_start: 0.2}}"], "bpe_dropout_start is of bpe_dropout, which is 0"),
        ([f"{OBJECTIVE}={{logit_mean: -1}}"], "stages.prior.objective.logit_mean is of logit_std, which is 0"),
        ([f"{OBJECTIVE}={{uniform: 0.1}}"], "uniform is of logit_std, which is 0; write that too, or leave uniform"),
        ([f"{OBJECTIVE}={{logit_std: 1}}", "parts.prior.out_channels=6"], "from timesteps that are drawn uniformly"),
        ([f"{OBJECTIVE}={{loss: vlb, logit_std: 1}}"], "from timesteps that are drawn uniformly"),
        (["diffusion={schedule: linear, num_timesteps: 100}"], "leaves 36% of the picture's variance after 100 timest"),
        ([*LATENTS, "diffusion={schedule: cosine, prediction: eps}"], "leaves 2e-09 of the latents' variance, where e"),
        (["sampling={sampler: dimm}"], "no sampler 'dimm'"),
        (["sampling={eta: 0.5}"], "eta belongs to the sampler ddim, got dpmpp_2m"),
        (["sampling={guidance_scale: 2.0}"], "reads no captions to be guided by; leave guidance_scale at 1"),
        (["sampling={guidance_high: 2.0}"], "the other knobs of guidance need a guidance_scale other than 1"),
        (["sampling={num_steps: 2000}"], "sampling.num_steps 2000 of dpmpp_2m: a sampler of 1000 timesteps takes 1 to"),
        (
            ["diffusion={prediction: v, zero_terminal: true}", "sampling={sampler: DDIMScheduler}"],
            "DDIMScheduler needs a schedule that keeps some signal",
        ),
        (["sampling={spacing: even}"], "timesteps are spaced by one of leading, trailing"),
        (["sampling={sampler: DDIMScheduler, spacing: trailing}"], "for DDIMScheduler of diffusers, which has its own"),
        (["parts.prior.num_classes=10"], "the data, shapes, have no labels, got parts.prior.num_classes=10"),
        ([DIGITS, "parts.prior.num_classes=9"], "digits, have labels of 10 classes, got parts.prior.num_classes=9"),
        ([TEXT, "parts.prior.context_dim=16", "parts.prior.num_classes=10"], "conditioned on captions or on classes"),
        (
            [f"{OBJECTIVE}={{loss: vlb, bound_weight: 1}}"],
            "loss: vlb is the bound of 8-bit pixels, without a tokenizer",
        ),
        ([f"{OBJECTIVE}={{bound_weight: 1}}"], "bound_weight is of learned variances"),
        ([f"{OBJECTIVE}={{gamma: 5}}"], "stages.prior.objective.gamma is of weighting, which is none; write that too"),
        ([TEXT, "stages.prior.optimizers={text: {lr: 0.1}}"], "'text' is not trained there with optimizers of its own"),
        (["training.data.shards=there"], "training.data.shards is of shards, and data of the kind 'shapes' has none"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused_before_anything_trains(overrides, said):
    own = [SMALL.replace("NONE", "null"), "captions={vocab_size: 300, context_length: 12}"]
    recipe, training = runs.load("shapes/ddpm", [*own, "parts.prior.attn_levels=[1]"])
    checks.check(recipe, training, ["prior"], 1, Path("none"))
    recipe, training = runs.load("shapes/ddpm", [*own, *overrides])
    with pytest.raises(RecipeError, match=re.escape(said)):
        checks.check(recipe, training, ["prior"], 1, Path("none"))


def test_few_timesteps_are_taken_where_their_noise_covers_the_picture():
    noise = "diffusion={schedule: linear, num_timesteps: 100, beta_start: 0.001, beta_end: 0.2}"
    recipe, training = runs.load("shapes/ddpm", [noise])
    checks.check(recipe, training, ["prior"], 1, Path("none"))


def test_noise_that_cannot_be_is_refused():
    recipe, _ = runs.load("shapes/ddpm", ["diffusion={prediction: eps, zero_terminal: true}"])
    with pytest.raises(RecipeError, match="let the network predict v or x_0"):
        denoiser_of(recipe, lambda x, t, c: x)
    recipe, _ = runs.load("shapes/ddpm", ["diffusion={schedule: cosine, beta_end: 0.1}"])
    with pytest.raises(RecipeError, match="cosine schedule has no beta_end"):
        schedule_of(recipe)
    recipe, _ = runs.load("shapes/ddpm", ["diffusion={schedule: scaled_linear, beta_end: 0.1}"])
    assert schedule_of(recipe).betas[-1].item() == pytest.approx(0.1)
