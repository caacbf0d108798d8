"""Plans: FLOPs against hand counts and the profiler, bytes against a CPU's allocator and real optimizers, scaling."""

import functools
import json
import resource
import subprocess
import sys
import time

import pytest
import torch
from planned_tokenizers import BATCH, JUDGED, LAYOUT, OBJECTIVES, PLAIN, RECONSTRUCTING
from typer.testing import CliRunner

from kartina import cli
from kartina.layers import random
from kartina.pipeline.recipe import PARTS, RecipeError, build
from kartina.priors.transformers_text import PACKAGES
from kartina.training import passes, plan
from kartina.training import run as runs
from kartina.training.optim import EMA, build_optimizers
from kartina.training.plan_report import report

FSDP, FROZEN = "training.shard=fsdp", "frozen=[text]"
PRETRAINED = "parts.text={kind: transformers_text, source: tiny, text_length: 11}"
DVAE = [
    "parts.tokenizer={kind: dvae, image_size: 32, num_codes: 64, width: 16, init_width: 16, num_groups: 2}",
    "stages.tokenizer.objective.evenness=0",
]
SMALL = ["parts.prior.depth=2", "parts.prior.attention=[conv, causal]", "parts.clip.vision_depth=1"]
LATENT = [
    f"parts.tokenizer={{kind: autoencoder_kl, {LAYOUT}}}",
    *[PLAIN, "captions.context_length=9", "sampling={}"],
    "parts.text={kind: clip_text, text_length: 11, text_vocab: 100, width: 16, depth: 1, num_heads: 2}",
    "parts.prior={kind: unet, width: 16, channel_mult: [1, 2], attn_levels: [1], context_dim: 16, norm_groups: 4}",
]
CASES = {
    "patch_dvae": ([], "tokenizer"),
    "dalle": (SMALL, "prior"),
    "clip": (SMALL, "clip"),
    "dvae": (DVAE, "tokenizer"),
    "unet": (LATENT, "prior"),
    "unet_frozen": ([*LATENT, FROZEN], "prior"),
    "unet_pretrained": ([*LATENT, PRETRAINED], "prior"),
    **{
        kind: ([f"parts.tokenizer={{kind: {kind}, {sizes}}}", PLAIN], "tokenizer")
        for kind, sizes in RECONSTRUCTING.items()
    },
    **{f"{kind}_judged": ([*words, OBJECTIVES[kind]], "tokenizer") for kind, words in JUDGED.items()},
}
KINDS = pytest.mark.parametrize(("overrides", "part"), CASES.values(), ids=CASES)
QUICK = ("vqgan_judged", "unet", "dalle")  # in float32 too, which is counted more closely; the others are slow tests
PRECISIONS = pytest.mark.parametrize(
    ("overrides", "part", "bf16"),
    [
        pytest.param(*case, bf16, id=f"{kind}-{name}", marks=[] if bf16 or kind in QUICK else pytest.mark.slow)
        for kind, case in CASES.items()
        for name, bf16 in (("fp32", False), ("bf16", True))
    ],
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A pretrained encoder's sizes; where it lies does not matter."""
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"model_type": "bert", "intermediate_size": 32, "max_position_embeddings": 16}
    monkeypatch.setitem(PACKAGES, "tiny", ("none", "none", sizes))


@functools.cache
def planned(name: str, *overrides: str, **options) -> dict:
    recipe, training = runs.load(name, list(overrides))
    return plan.plan(recipe, training, **options)


def prior(*overrides: str, **options) -> dict:
    """The stage of a small transformer, as planned."""
    return planned("shapes/dalle", *SMALL, *overrides, stage="prior", **options)["stages"]["prior"]


def updates_of(setting: passes.Setting):
    return setting.updates(BATCH, setting.config.steps - 1)


def loss_of(setting: passes.Setting) -> torch.Tensor:
    """Of the part, and only what it holds on to."""
    loss = next(updates_of(setting))[1]
    setting.outputs.clear()
    return loss


def test_every_kind_of_part_can_be_planned():
    trained = {
        part: kinds for part, kinds in PARTS.items() if part not in ("discriminator", "text")
    }  # in others' stages
    assert {kind for kinds in trained.values() for kind in kinds} == set(passes.PASSES)


def test_a_kind_without_an_entry_is_one_clear_error(monkeypatch):
    monkeypatch.delitem(passes.PASSES, "clip")
    with pytest.raises(RecipeError, match=r"parts\.clip: .*'clip'.*expected one of dvae.*passes\.py"):
        planned("shapes/dalle", stage="clip")


def test_flops_of_the_transformer_by_hand(counted):
    texts, codes, width, depth, vocabulary, num_codes = 22, 128, 128, 5, 500, 2048
    places = texts + codes
    products = 2 * (places * depth * 12 * width**2 + width * (texts * vocabulary + codes * num_codes))
    attention = depth * 2 * places**2 * width  # one product of queries and keys: 2 of them forward, 5 backward
    patches = 2 * 128 * (3 * 2 * 4) * num_codes  # the frozen tokenizer's convolution
    found = counted([], "prior")["prior"]
    assert found.flops == BATCH * (3 * products + 7 * attention)
    assert found.frozen_flops == BATCH * patches


def test_flops_of_clip_by_hand(counted):
    width, images, texts, embedding = 128, 64 + 1, 24, 128
    blocks = 12 * width**2 * (3 * images + 2 * texts) + 2 * width * embedding
    blocks += width**2 * (2 * (images + texts) + 2 * 10)  # the last: keys and values of all, the rest of one
    attention = 2 * width * (3 * images**2 + images + 2 * texts**2 + texts)
    stem = 2 * 64 * (3 * 4 * 4) * width  # has no gradient of its input
    logits = 2 * BATCH * embedding
    assert counted(["stages.clip.objective={}"], "clip")["clip"].flops == pytest.approx(
        BATCH * (3 * (2 * blocks + logits) + 7 * attention + 2 * stem), rel=0.01
    )


@pytest.mark.parametrize("overrides", [[], DVAE], ids=["patch_dvae", "dvae"])
def test_flops_of_the_dvae_against_the_profiler(overrides, counted, real, flops):
    """Backward takes twice the forward pass, but for the first convolution, whose input needs no gradient."""
    setting = real(overrides, "tokenizer")
    forward = flops(lambda: loss_of(setting))
    assert counted(overrides, "tokenizer")["tokenizer"].flops == pytest.approx(3 * forward, rel=0.1)


@PRECISIONS
def test_activations_and_peak_against_the_allocator(overrides, part, bf16, counted, real, allocated, monkeypatch):
    monkeypatch.setattr(random, "_IN_CACHE", 2**62)  # a CPU draws whole tensors too, as the devices that are planned
    found, setting = counted(overrides, part, bf16), real(overrides, part, bf16)
    alive, loss = allocated(lambda: loss_of(setting))
    assert found[part].saved == pytest.approx(alive[-1], rel=0.02)  # what the loss holds on to, and the loss
    del loss
    # A CPU's convolutions in bfloat16 have a workspace of their own; a tiny discriminator has little else.
    workspace = bf16 and setting.recipe.parts[part]["kind"] in (*RECONSTRUCTING, "unet", "clip")
    setting, held = real(overrides, part, bf16), 0
    updates = updates_of(setting)
    for name, cost in found.items():
        alive, made = allocated(lambda: _backward(next(updates)))
        assert made == name
        if not (bf16 and name == "discriminator"):
            assert cost.alive == pytest.approx(held + max(alive), rel=0.1 if workspace else 0.02)
        assert cost.working <= cost.alive
        held += alive[-1] - _forget_gradients(setting)
    assert next(updates, None) is None and list(found) == list(setting.networks)


def _backward(update) -> str:
    name, loss = update
    loss.backward()
    return name


def _forget_gradients(setting: passes.Setting) -> int:
    """Their bytes."""
    parameters = [parameter for network in setting.networks.values() for parameter in network.parameters()]
    size = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    return size


def test_a_micro_batch_adds_what_each_of_its_samples_takes():
    four, eight = prior("stages.prior.micro_batch=4"), prior("stages.prior.micro_batch=8")
    more = eight["memory"]["activations"] - four["memory"]["activations"]
    assert more == pytest.approx(4 * four["activations_per_sample"], rel=1e-3)
    whole = four["activations_constant"] + 4 * four["activations_per_sample"]
    assert whole == four["memory"]["activations"] and four["flops_per_sample"] == eight["flops_per_sample"]
    for share, fits in ((0.95, True), (1.05, False)):
        size = int(share * four["largest_micro_batch"])
        assert prior(f"stages.prior.global_batch={size}", f"stages.prior.micro_batch={size}")["fits"] is fits


@KINDS
def test_optimizer_and_moving_average_are_as_large_as_the_real_ones(overrides, part):
    recipe, training = runs.load("shapes/dalle", overrides)
    config = training.stages[part]
    network = passes.prepare(recipe, part, config).network
    optimizers, ema = build_optimizers(network, config.optimizer), EMA(network, config.ema)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    values = [pair for optimizer in optimizers for state in optimizer.state.values() for pair in state.items()]
    memory = planned("shapes/dalle", *overrides, stage=part)["stages"][part]["memory"]
    assert memory["optimizer"] == sum(value.nbytes for name, value in values if name != "step")
    assert memory["ema"] == sum(value.nbytes for value in ema.average.values())
    assert memory["weights"] == memory["gradients"] == sum(p.nbytes for p in network.parameters())


def test_twice_the_devices_take_half_the_time():
    adamw = "stages.prior.optimizer.muon=0"
    one, two = prior(adamw), prior(adamw, devices=2)
    assert two["compute_seconds"] == pytest.approx(one["compute_seconds"] / 2)
    assert two["update_seconds"] == one["update_seconds"]
    assert two["samples"] == one["samples"] == 3500 * 64 and two["global_batch"] == 64
    assert one["days"] == pytest.approx(3500 * one["step_seconds"] / 86400)
    assert two["device_hours"] == pytest.approx(48 * two["days"])
    assert one["memory"]["buckets"] == 0 and two["memory"]["buckets"] == two["memory"]["gradients"]
    assert prior(adamw, FSDP, devices=2)["step_seconds"] == pytest.approx(one["step_seconds"] / 2)
    assert prior(adamw, utilisation=0.2)["compute_seconds"] == pytest.approx(2 * one["compute_seconds"])
    products = 5 * (2 * 128**2 * 512 * 2 + 2 * 128**3)  # Muon's, five rounds of an MLP's matrix
    muon = prior()["flops_per_update"]
    assert muon > 4 * products > one["flops_per_update"] == 0
    assert prior(devices=2)["flops_per_update"] == pytest.approx(muon / 2, rel=0.02)
    assert prior(FSDP, devices=2)["flops_per_update"] == muon


def test_fsdp_divides_the_state_and_not_the_activations():
    """But autocast's copies of the blocks' matrices: twelve of 128 by 128, twice two bytes; without it, nothing."""
    whole, parts = (prior(*key, devices=4)["memory"] for key in ((), (FSDP,)))
    in_fp32 = [prior("training.precision=fp32", *key, devices=4)["memory"]["activations"] for key in ((), (FSDP,))]
    for key in ("weights", "gradients", "optimizer", "ema"):
        assert parts[key] == whole[key] / 4
    assert whole["activations"] - parts["activations"] == 2 * 2 * 12 * 128**2
    assert in_fp32[0] == in_fp32[1] and parts["frozen"] == whole["frozen"]
    assert parts["buckets"] == 0 < parts["gathered"] and parts["peak"] < whole["peak"]


def test_a_device_without_bfloat16_computes_in_float32():
    assert planned("shapes/dalle", *SMALL, device="v100", stage="clip")["precision"] == "fp32"
    assert planned("shapes/dalle", *SMALL, "training.precision=fp32", stage="clip")["device"]["peak_flops"] == 67e12
    assert all(device.bandwidth and device.source and device.memory > 1e10 for device in plan.DEVICES.values())


def test_twelve_billion_parameters_are_planned_in_seconds_without_memory():
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = planned("paper/dalle-12b", FSDP, devices=1024, stage="prior")["stages"]["prior"]
    assert time.process_time() - started < 30
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500e6  # the weights alone are 49e9
    assert found["samples"] == 430_000 * 1024 and found["passes"] == 1 and found["fits"]
    # 6 FLOPs for each weight and place of the stream, of which the embeddings are no part, and attention.
    assert found["flops_per_sample"]["trained"] == pytest.approx(6 * 12.1e9 * 1280, rel=0.1)


def test_a_recipe_without_training_has_no_days(tmp_path):
    text = (runs.RECIPES / "paper" / "dalle-12b.yaml").read_text()
    (tmp_path / "bare.yaml").write_text(text[: text.index("training:")])
    found = planned(str(tmp_path / "bare.yaml"), stage="tokenizer")
    assert found["stages"]["tokenizer"]["days"] is None and found["stages"]["tokenizer"]["parameters"] == 97_616_006
    assert "states no training" in report(found)


@pytest.mark.parametrize(
    ("name", "halves", "others"),
    [
        ("paper/openai-dvae", (53_786_240, 43_829_766), {"tokenizer": 97_616_006}),
        ("paper/vqgan-f16-1024", (29_298_176, 42_449_795), {"discriminator": 2_765_633}),
    ],
)
def test_a_plan_lists_encoders_and_decoders(name, halves, others):
    recipe, _ = runs.load(name, [])
    found = plan.plan(recipe, None, stage="tokenizer")
    assert found["halves"] == {"tokenizer": dict(zip(("encoder", "decoder"), halves, strict=True))}
    assert others.items() <= found["parameters"].items()
    assert f"of the tokenizer: encoder {halves[0]:,d}, decoder {halves[1]:,d}" in report(found)


def test_flops_of_the_unet_against_the_profiler(counted, real, flops):
    """Without attention and transposed convolutions, which the profiler does not count: backward is twice forward."""
    part = "{prior: {kind: unet, in_channels: 3, width: 16, channel_mult: [1], attn_levels: [], mid_attention: false"
    overrides = [f"parts={part}, context_dim: null, norm_groups: 4}}}}", "sampling={}"]
    setting = real(overrides, "prior")
    forward = flops(lambda: loss_of(setting))
    assert counted(overrides, "prior")["prior"].flops == pytest.approx(3 * forward, rel=0.05)


@pytest.mark.slow
def test_a_published_diffusion_model_is_planned_by_the_parts_that_have_a_stage():
    found = planned("paper/ddpm-cifar10")
    assert list(found["stages"]) == ["prior"] and found["stages"]["prior"]["parameters"] == 35_746_307
    assert found["stages"]["prior"]["samples"] == 800_000 * 128 and found["stages"]["prior"]["days"] > 0
    found = planned("shapes/dalle", *LATENT, "training={}")
    assert "text" not in found["stages"] and found["stages"]["prior"]["parts"] == ["prior", "text"]
    both = found["parameters"]["prior"] + found["parameters"]["text"]
    assert found["stages"]["prior"]["parameters"] == both and "not planned" not in report(found)
    alone = planned("shapes/dalle", *LATENT, FROZEN, "training={}")
    assert alone["stages"]["prior"]["parameters"] == found["parameters"]["prior"]
    assert f"not planned: text {found['parameters']['text']:,d}" in report(alone)


def test_flops_of_a_text_encoder_that_trains_with_its_prior(counted):
    """Of CLIP's, for the 9 tokens of a caption and the 2 of its frame: a frozen one takes a forward pass alone."""
    recipe, _ = runs.load("shapes/dalle", LATENT)
    tokens, width = 11, 16
    products, attention = 2 * tokens * 12 * width**2, 2 * tokens**2 * width
    reading = [
        p
        for name, p in build(recipe, "prior").named_parameters()
        if name.endswith(("attn2.k.weight", "attn2.v.weight"))
    ]
    into = 2 * tokens * sum(p.numel() for p in reading)  # from keys and values back to the tokens
    with_text, without = counted(LATENT, "prior")["prior"], counted([*LATENT, FROZEN], "prior")["prior"]
    assert without.frozen_flops - with_text.frozen_flops == BATCH * (products + 2 * attention)
    assert with_text.flops - without.flops == BATCH * (3 * products + 7 * attention + into)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "h10"}, "did you mean 'h100'"),
        ({"stage": "priors"}, "did you mean 'prior'"),
        ({"utilisation": 0.0}, "above 0 and at most 1, got 1 and 0"),
        ({"devices": 3}, "stage tokenizer: .* does not divide .*--stage"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(RecipeError, match=says):
        planned("shapes/dalle", **options)


def test_the_command_prints_a_table_or_json():
    options = ["--devices", "2", "--device", "a100", "--utilisation", "0.3", "--stage", "clip"]
    words = ["plan", "shapes/dalle", *SMALL, "stages.clip.steps=7", *options]
    printed = CliRunner().invoke(cli.app, [*words, "--json"])
    found = json.loads(printed.output)
    assert set(found["parameters"]) == {"tokenizer", "prior", "clip"} and found["device"]["name"] == "A100 SXM 80 GB"
    clip = found["stages"]["clip"]
    assert clip["steps"] == 7 and found["utilisation"] == 0.3 and clip["parameters"] == found["parameters"]["clip"]
    table = CliRunner().invoke(cli.app, words).output
    assert "on 2 x A100 SXM 80 GB" in table and "30 % are assumed" in table and f"{clip['parameters']:,d}" in table
    assert all(word in table for word in ("weights", "optimizer", "moving average", "activations", "fits", "days"))


def test_the_front_door_is_light():
    code = "import sys, kartina.cli; sys.exit('torch' in sys.modules or 'rich.table' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recomputed_activations_are_computed_twice_and_not_kept():
    kept, twice = prior(), prior("stages.prior.recompute=true")
    assert twice["memory"]["activations"] < 0.7 * kept["memory"]["activations"]
    assert (
        1.1 * kept["flops_per_sample"]["trained"]
        < twice["flops_per_sample"]["trained"]
        < 4 / 3 * kept["flops_per_sample"]["trained"]
    )
