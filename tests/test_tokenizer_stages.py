"""The stages of the tokenizers, step by step: two networks, codebooks, corruptions, and what is measured at the end."""

import json

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.text_to_image import TextToImage
from kartina.training import __main__ as trainer
from kartina.training import run as runs
from kartina.training import state
from kartina.training.data.digits import DigitsSource
from kartina.training.data.shapes import ShapesSource
from kartina.training.stages import STAGES

CPU = torch.device("cpu")


def stage_of(tiny, kind, *overrides):
    """The stage of a tiny recipe, and a batch of its data."""
    given = trainer._arguments([*tiny[kind][1], *overrides])
    recipe, training = runs.load(given.recipe, given.overrides)
    source = DigitsSource() if training.data.kind == "digits" else ShapesSource(levels=("S1",))
    torch.manual_seed(0)
    config = training.stages["tokenizer"]
    return STAGES[recipe.parts["tokenizer"]["kind"]](recipe, config, source, None, 0, CPU), source.read(range(8))


def knob(name, value):
    return f"stages.tokenizer.objective.{name}={value}"


# --- two networks -----------------------------------------------------------------------------------------------------

JUDGED = ["vqgan", "autoencoder_kl"]


@pytest.mark.parametrize("kind", JUDGED)
def test_the_generators_loss_leaves_the_discriminator_alone(kind, tiny):
    stage, batch = stage_of(tiny, kind)
    name, (loss, _), scalars = next(stage.updates(batch, 19))
    assert name == "tokenizer" and scalars["adaptive"] > 0
    loss.backward()
    assert all(value.grad is None for value in stage.networks["discriminator"].parameters())
    assert all(value.requires_grad for value in stage.networks["discriminator"].parameters())
    assert stage.network.last_layer.grad.abs().max() > 0


@pytest.mark.parametrize("kind", JUDGED)
def test_the_discriminators_loss_sees_the_tokenizers_new_weights(kind, tiny):
    found = []
    for moved in (0.0, 1.0):
        stage, batch = stage_of(tiny, kind)
        updates = stage.updates(batch, 19)
        next(updates)
        with torch.no_grad():
            stage.network.decoder.conv_out.bias.add_(moved)
        name, (loss, count), scalars = next(updates)
        assert name == "discriminator" and count == 8
        found.append(scalars["fake_logits"])
        loss.backward()
        assert all(value.grad is None for value in stage.network.parameters())
        assert next(updates, None) is None
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", JUDGED)
def test_the_discriminator_learns_first_and_is_heard_more_and_more(kind, tiny):
    """From step 2 it learns, from step 4 the tokenizer listens, from step 9 on to all of it."""
    stage, batch = stage_of(tiny, kind)
    names = [[update[0] for update in stage.updates(batch, step)] for step in (0, 1, 2, 19)]
    assert names == [["tokenizer"]] * 2 + [["tokenizer", "discriminator"]] * 2
    weight = {"vqgan": 0.8, "autoencoder_kl": 0.5}[kind]
    ramps = [stage.adversary.ramp(step) / weight for step in range(11)]
    assert ramps == pytest.approx([0, 0, 0, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])


def without_discriminator(argv):
    return [word for word in argv if "discriminator=" not in word and "{discriminator:" not in word]


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keep = [name for line in lines for name in line if name.startswith(("tokenizer/", "valid/"))]
    return [{name: line[name] for name in keep if name in line} for line in lines if "event" not in line]


def test_a_discriminator_that_is_not_heard_changes_nothing(tiny, tmp_path):
    stage, argv = tiny["vqgan, gumbel"]
    assert trainer.main([*argv, "--run", str(tmp_path / "with")]) == 0
    alone = [*without_discriminator(argv), "stages.tokenizer.objective={temperature_end: 0.1}"]
    assert trainer.main([*alone, "--run", str(tmp_path / "without")]) == 0
    one, other = (checkpoint.load_weights(tmp_path / name / "model", "tokenizer") for name in ("with", "without"))
    assert checkpoint.part_hash(one) == checkpoint.part_hash(other)
    assert log(tmp_path / "with") == log(tmp_path / "without")
    saved = state.load(state.newest(tmp_path / "with" / "state" / "tokenizer"))
    assert set(saved["networks"]) == {"tokenizer", "discriminator"}
    assert set(checkpoint.read_card(tmp_path / "with" / "model")["parts"]) == {"tokenizer"}


def test_two_networks_step_once_each_in_two_passes(tiny, tmp_path):
    """Muon apart, which counts nothing: AdamW's step of every parameter is the number of steps."""
    argv = [*tiny["vqgan, gumbel"][1], "stages.tokenizer.micro_batch=4", "--run", str(tmp_path)]
    assert trainer.main([*argv, knob("discriminator_start", 0.25)]) == 0
    saved = state.load(state.newest(tmp_path / "state" / "tokenizer"))
    for name, steps in (("tokenizer", 20), ("discriminator", 15)):
        adamw = saved["optimizers"][name][0]["state"]
        assert adamw and {int(entry["step"]) for entry in adamw.values()} == {steps}, name


PETALS = "expected prior mixture or swiss_roll with pieces 10"
GROUPS = "parts.discriminator={kind: patch, width: 8, depth: 1, norm: group, norm_groups: 4}"


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("vqgan", ["stages.tokenizer.micro_batch=4"], "codes begin anew among the latents of a step"),
        ("autoencoder_kl", ["stages.tokenizer.micro_batch=4"], "BatchNorm of its discriminator is of a whole step"),
        ("autoencoder_kl", ["stages.tokenizer.micro_batch=4", GROUPS], "adaptive weight"),
        ("vqgan", ["parts.discriminator.in_channels=4"], "expected 3, or 6 to judge an image beside"),
        ("vqgan", ["parts.discriminator={kind: latent, latent_dim: 8}"], "expected parts.discriminator of kind patch"),
        ("autoencoder_kl", ["parts.discriminator.depth=4"], "of at least 48 pixels a side, got 32"),
        ("vqvae, moved", ["stages.tokenizer.micro_batch=4"], "follows the latents of a step"),
        ("vae, free bits", ["stages.tokenizer.micro_batch=4"], "free bits"),
        ("autoencoder", ["stages.tokenizer.micro_batch=4"], "sparsity is of a step's mean"),
        ("autoencoder", ["parts.tokenizer.activation=none"], "sparsity kl is of latents between 0 and 1"),
        ("vae", [knob("likelihood", "laplace")], "must be one of gaussian, logistic, got laplace"),
        ("vae", [knob("beta", "much")], "must lie between 0 and inf, got much"),
        ("vqvae, moved", [knob("codebook_weight", 1)], "leave out stages.tokenizer.objective.codebook_weight"),
        ("vqgan, gumbel", [knob("kmeans", 0)], "kmeans has no meaning for quantizer 'gumbel'"),
        ("autoencoder", [knob("corruption_level", 0)], "corruption goes with a corruption_level"),
        ("autoencoder", [knob("prior", "mixture")], "prior, but the recipe no part 'discriminator'"),
        ("autoencoder, adversarial", ["parts.discriminator.num_classes=5"], "got 5 and labels up to 9"),
        ("autoencoder, adversarial", ["training.data.kind=shapes"], "got 10 and none"),
        ("autoencoder, adversarial", [knob("prior", "standard")], PETALS),
        ("autoencoder, adversarial", [knob("pieces", 7)], PETALS),
        ("autoencoder, adversarial", ["parts.tokenizer.latent_dim=3"], "latent_dim for flat latents (3,)"),
        ("autoencoder, adversarial", ["parts.tokenizer.latent_dim=null"], "kind latent"),
        ("vqgan", ["stages.tokenizer.optimizers={critic: {lr: 0.1}}"], "'critic' is not trained there"),
    ],
)
def test_what_a_stage_refuses(kind, overrides, message, tiny, tmp_path, capsys):
    assert trainer.main([*tiny[kind][1], *overrides, "--run", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_without_a_discriminator_has_no_knobs_for_one(tiny, tmp_path, capsys):
    argv = without_discriminator(tiny["autoencoder_kl"][1])
    assert trainer.main([*argv, "--run", str(tmp_path)]) == 2
    assert "the recipe no part 'discriminator'" in capsys.readouterr().err


def test_another_discriminator_is_another_recipe(tiny, tmp_path, capsys):
    argv = [*tiny["autoencoder_kl"][1], "stages.tokenizer.steps=2", "--run", str(tmp_path)]
    assert trainer.main(argv) == 0
    assert trainer.main([*argv, "parts.discriminator.width=4"]) == 2
    assert "(differs in beside.discriminator.width: 8 -> 4)" in capsys.readouterr().err


def test_small_numbers_may_be_written_without_a_dot(tiny):
    assert stage_of(tiny, "autoencoder_kl", knob("kl_weight", "1e-6"))[0].kl_weight == 1e-6


# --- codebooks --------------------------------------------------------------------------------------------------------


def test_codes_that_were_not_met_become_latents_of_the_batch(tiny):
    """Drawn by (seed, step, sample), without repetition, and never from images that could not be read."""
    stage, batch = stage_of(tiny, "vqvae", knob("restart_every", 2))
    batch.weight[0] = 0
    quantizer, before = stage.network.quantize, stage.network.quantize.embedding.weight.detach().clone()
    for step in range(2):
        out = stage.network(batch.image)
        list(stage.updates(batch, step))
    met = torch.bincount(out["codes"][1:].flatten(), minlength=32) > 0
    after = quantizer.embedding.weight.detach()
    assert 0 < int(met.sum()) < 32 and torch.equal(after[met], before[met])
    latents = out["latents"].permute(0, 2, 3, 1)
    readable = latents[1:].flatten(0, 2)
    assert all((readable == code).all(dim=1).any() for code in after[~met])
    assert quantizer.met.sum() == 0
    again, _ = stage_of(tiny, "vqvae", knob("restart_every", 2))
    for step in range(2):
        list(again.updates(batch, step))
    assert torch.equal(again.network.quantize.embedding.weight, after)


def test_no_code_begins_anew_in_the_last_fifth(tiny):
    stage, batch = stage_of(tiny, "vqvae", knob("restart_every", 1))
    before = stage.network.quantize.embedding.weight.detach().clone()
    list(stage.updates(batch, 16))
    assert torch.equal(stage.network.quantize.embedding.weight, before)
    list(stage.updates(batch, 15))
    assert not torch.equal(stage.network.quantize.embedding.weight, before)


def test_a_codebook_moves_only_once_the_step_is_taken(tiny):
    stage, batch = stage_of(tiny, "vqvae, moved")
    before = stage.network.quantize.embedding.weight.detach().clone()
    updates = stage.updates(batch, 0)
    next(updates)
    assert torch.equal(stage.network.quantize.embedding.weight, before)
    assert next(updates, None) is None
    assert not torch.equal(stage.network.quantize.embedding.weight, before)


@pytest.mark.parametrize("kind", ["vqvae, moved", "vqgan, gumbel"])
def test_what_is_exported_loads_and_has_nothing_of_the_training(kind, tiny, tmp_path):
    assert trainer.main([*tiny[kind][1], "--run", str(tmp_path)]) == 0
    recipe = checkpoint.load_recipe(tmp_path / "model")
    part = checkpoint.load_part(tmp_path / "model", recipe, "tokenizer")
    codes = part.encode(ShapesSource(levels=("S1",)).read(range(4)).image)
    assert part.decode(codes).shape == (4, 3, 32, 32) and not hasattr(part.quantize, "met")


def test_fsq_needs_no_codebook(tiny):
    levels = ["parts.tokenizer.quantizer=fsq", "parts.tokenizer.levels=[4, 2, 2, 2]", "stages.tokenizer.objective={}"]
    stage, batch = stage_of(tiny, "vqgan", *levels)
    ((name, (loss, count), scalars), *_) = stage.updates(batch, 0)
    loss.backward()
    assert (name, count, scalars["regular"]) == ("tokenizer", 8, 0)
    assert stage.network.encoder.conv_in.weight.grad.abs().max() > 0


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autoencoder", "autoencoder_kl", "vq_latents"])
def test_the_shipped_latents_have_mean_0_and_deviation_1(kind, tiny, tmp_path, all_images):
    assert not stage_of(tiny, kind)[0].network.scale.measured
    assert trainer.main([*tiny[kind][1], "--run", str(tmp_path)]) == 0
    recipe = checkpoint.load_recipe(tmp_path / "model")
    part = checkpoint.load_part(tmp_path / "model", recipe, "tokenizer")
    assert part.scale.measured
    assert checkpoint.load_weights(tmp_path / "model", "tokenizer")["scale.std"].dtype == torch.float32
    image = ShapesSource(levels=("S1", "S2")).read(range(10_000, 10_512)).image
    values = part.encode(image).transpose(0, 1).flatten(1)
    assert (values.mean(dim=1).abs() < 0.05).all() and ((values.std(dim=1) - 1).abs() < 0.05).all()


@pytest.mark.parametrize(("corruption", "level"), [("gaussian", 0.5), ("mask", 0.3), ("salt_and_pepper", 0.3)])
def test_corruptions_are_drawn_by_step_and_sample(corruption, level, tiny):
    stage, batch = stage_of(tiny, "autoencoder", knob("corruption", corruption), knob("corruption_level", level))
    seen = stage.corrupt(batch, 3)
    assert not torch.equal(seen, stage.corrupt(batch, 4)) and torch.equal(seen, stage.corrupt(batch, 3))
    changed = (seen != batch.image).any(dim=1).float().mean()
    assert changed > 0.99 if corruption == "gaussian" else abs(changed - level) < 0.05
    _, _, scalars = next(stage.updates(batch, 3))
    clean, _ = stage_of(tiny, "autoencoder", "stages.tokenizer.objective={error: l1}")
    assert scalars["error"] != next(clean.updates(batch, 3))[2]["error"]


def test_an_adversary_pulls_the_latents_towards_the_piece_of_their_label(tiny):
    """The discriminator tells draws of each label's piece from latents; what fools it moves the encoder alone."""
    stage, batch = stage_of(tiny, "autoencoder, adversarial")
    (name, (loss, count), scalars), (judge, (own, _), told) = stage.updates(batch, 19)
    assert (name, judge, count) == ("tokenizer", "discriminator", 8)
    labels, latents = batch.labels, stage.network(batch.image)["latents"]
    logits = stage.networks["discriminator"](latents, labels)
    torch.testing.assert_close(scalars["adversary"], torch.nn.functional.softplus(-logits).mean())
    torch.testing.assert_close(loss / count, scalars["error"] + 0.1 * scalars["adversary"])
    loss.backward(retain_graph=True)
    assert all(value.grad is None for value in stage.networks["discriminator"].parameters())
    stage.network.zero_grad()
    own.backward()
    assert all(value.grad is None for value in stage.network.parameters())
    drawn = stage.prior.draw(0, 19, batch.samples, "adversarial prior", labels)
    torch.testing.assert_close(told["real_logits"], stage.networks["discriminator"](drawn, labels).mean())
    torch.testing.assert_close(told["fake_logits"], logits.mean())
    stage.network.encode = lambda image: drawn
    assert stage.measure(batch)["own_piece"].tolist() == (stage.prior.piece(drawn) == labels).tolist() == [True] * 8


def test_a_discriminator_without_classes_sees_no_labels(tiny):
    stage, batch = stage_of(
        tiny, "autoencoder, adversarial", "parts.discriminator.num_classes=0", knob("prior", "standard")
    )
    first, _ = stage.updates(batch, 3)
    assert "adversary" not in first[2]  # it learns from step 2 on, and is heard from step 4 on
    batch.labels = None
    assert [name for name, *_ in stage.updates(batch, 19)] == ["tokenizer", "discriminator"]
    assert stage.preview(batch).height > 4 * 128  # pairs, and two rows of draws


@pytest.mark.parametrize("kind", ["vae", "autoencoder, adversarial"])
def test_metrics_are_not_of_what_a_step_in_bfloat16_computes(kind, tiny):
    stage, batch = stage_of(tiny, kind, *[knob("iwae_draws", 2)] * (kind == "vae"))
    stage.network.forward = None  # which Accelerate wraps
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in stage.measure(batch).values())


def active_units(stage, batch):
    """Over one batch, as the loop adds up what is measured."""
    total = {name: value.sum(0) for name, value in stage.measure(batch).items()}
    return stage.summary(total, len(batch.keys))["active_units"]


def test_beta_rises_and_idle_latents_are_counted(tiny):
    """At step 0 the weight of the KL is 0; a latent whose mean is the same for every image is not active."""
    stage, batch = stage_of(tiny, "vae")
    rows = stage.network.flat.inward
    with torch.no_grad():
        rows.weight[:8] = 0
        rows.bias[:8] = 5
    for step, beta in ((0, 0.0), (5, 0.5), (15, 1.0)):
        _, (loss, count), scalars = next(stage.updates(batch, step))
        torch.testing.assert_close(loss / count, scalars["nll"] + beta * scalars["kl"])
    assert active_units(stage, batch) <= 0.5
    with torch.no_grad():
        rows.weight[8:16] *= 1000
    assert active_units(stage, batch) == 0.5


def test_many_draws_bound_the_likelihood_from_nearer(tiny):
    """Burda 2015, theorem 1: with one draw the mean is the evidence lower bound, with more it is larger."""
    found = {}
    for draws in (0, 1, 50):
        stage, batch = stage_of(tiny, "vae", knob("iwae_draws", draws))
        found[draws] = stage.measure(batch)
        assert ("iwae" in stage.metrics) == ("iwae" in found[draws]) == (draws > 0)
    one, many, elbo = found[1]["iwae"], found[50]["iwae"], found[0]["elbo"]
    assert one.shape == elbo.shape and (many > one).float().mean() > 0.9 and many.mean() > elbo.mean()
    assert abs(one.mean() - elbo.mean()) < 0.2 * abs(many.mean() - elbo.mean()) + 0.01 * abs(elbo.mean())
    assert (found[50]["iwae_bits_per_dim"] < found[50]["bits_per_dim"]).float().mean() > 0.9


def test_a_recipe_with_a_tokenizer_alone_needs_no_captions(tmp_path):
    tiny = [f"stages.tokenizer.{key}" for key in ("steps=2", "global_batch=4", "log_every=1", "validate_samples=8")]
    assert trainer.main(["shapes/vae", *tiny, "training.trackers=[]", "--run", str(tmp_path)]) == 0
    assert set(checkpoint.read_card(tmp_path / "model")["parts"]) == {"tokenizer"}
    assert not list(tmp_path.rglob("captions*"))
    with pytest.raises(checkpoint.ModelError, match="its recipe has no prior"):
        TextToImage.load(tmp_path / "model")


def test_latents_are_held_to_smaller_pictures(tiny):
    """What averages of latents give back becomes the picture made as small."""
    stage, batch = stage_of(tiny, "autoencoder_kl", knob("discriminator_weight", 0), knob("equivariance", 1))
    optimizer = torch.optim.Adam(stage.network.parameters(), 0.01)
    stage.forward["tokenizer"] = stage.network
    found = []
    for step in range(60):
        _, (loss, count), scalars = next(stage.updates(batch, step))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        found.append([float(scalars[name]) for name in ("shrunk_2", "shrunk_4")])
    assert all(last < first / 2 for first, last in zip(found[0], found[-1], strict=True))
