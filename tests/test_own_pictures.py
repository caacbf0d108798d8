"""The way of docs/own_pictures.md, at a small size: pictures, an autoencoder, latents, a U-Net over them."""

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import build
from kartina.training import __main__ as trainer
from kartina.training import run as runs
from kartina.training.stream import ShardSource

AUTOENCODER = [
    "image_size=32",
    "parts.tokenizer={kind: autoencoder_kl, image_size: 32, width: 8, channel_mult: [1, 2], blocks_per_level: 1,"
    " latent_channels: 4, attn_resolutions: [], norm_groups: 2}",
    "parts.discriminator={kind: patch, width: 8, depth: 1, norm: group, norm_groups: 4}",
    "stages.tokenizer.objective={kl_weight: 1.0e-6, discriminator_weight: 0.5, discriminator_start: 0.2}",
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "prior") for key in ("steps=3", "global_batch=8")],
    *["training.trackers=[]", "training.precision=fp32", "training.data.validation_share=0.2"],
]
UNET = "kind: unet, in_channels: 4, width: 8, channel_mult: [1, 2], blocks_per_level: 1, num_heads: 2, norm_groups: 4"
CODES = [
    "parts.tokenizer={kind: vqgan, image_size: 32, num_codes: 16, code_dim: 4, latent_channels: 8, width: 8,"
    " channel_mult: [1, 2], blocks_per_level: 1, attn_resolutions: [], norm_groups: 2, cosine: true, ema_decay: 0.9}",
    "stages.tokenizer.objective={kmeans: 0.4, restart_every: 1, discriminator_weight: 0.5, discriminator_start: 0.2}",
    "parts.prior={kind: dalle, text_vocab: 300, text_length: 14, num_codes: 16, grid: [16, 16], width: 16, depth: 2,"
    " num_heads: 2, attention: full, qk_norm: true}",
]
WITHOUT = [f"parts.prior={{{UNET}, attn_levels: [1], context_dim: null}}", "sampling.num_steps=2"]
WITH = [
    "captions={vocab_size: 300, context_length: 14}",
    *[f"parts.prior={{{UNET}, attn_levels: [1], context_dim: 16}}", "sampling.num_steps=2"],
    "parts.text={kind: clip_text, text_vocab: 302, text_length: 16, width: 16, depth: 1, num_heads: 2}",
    "parts.clip={kind: clip, embed_dim: 8, image_size: 32, patch_size: 16, vision_width: 16, vision_depth: 1,"
    " vision_heads: 2, text_vocab: 302, text_length: 16, text_width: 16, text_depth: 1, text_heads: 2}",
    *["stages.clip.steps=2", "stages.clip.global_batch=8"],
]


def run(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def pictures(tmp_path):
    """40 pictures of other sizes than the model's, some with captions."""
    folder, draws = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for k in range(40):
        size = (random.Random(k).randint(20, 70), 48)
        Image.fromarray(draws.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{k}.jpg")
        (folder / f"{k}.txt").write_text(f"noise number {k}\nnoise")
    return folder


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(line["stage"], name): value for line in lines for name, value in line.items() if name.startswith("valid/")}


def test_latent_diffusion_without_captions(pictures, tmp_path):
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    shards, latents, folder = (tmp_path / name for name in ("shards", "latents", "run"))
    assert "40" in run("data", "pack", pictures, shards, "--no-captions")
    command = ["own/latent-diffusion", *AUTOENCODER, *WITHOUT, f"training.data.shards={shards}", "--run", str(folder)]
    assert trainer.main([*command, "--stage", "tokenizer"]) == 0
    assert "PSNR" in run("reconstruct", folder, "--data", shards, "--count", 8)
    run("data", "encode", shards, latents, "--model", folder, "--what", "latents", "--processes", 1)
    assert trainer.main([*command, "--stage", "prior", f"training.data.cache={latents}"]) == 0
    found = metrics(folder)
    assert math.isfinite(found["tokenizer", "valid/psnr"]) and math.isfinite(found["prior", "valid/error"])
    run("paint", "anything", "--model", folder, "--candidates", 2, "--keep", 2, "--steps", 2, "--out", tmp_path / "out")
    assert [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))] == [(32, 32)] * 2


def test_an_imported_autoencoder_is_scaled_for_a_prior(pictures, tmp_path, capsys):
    """A checkpoint of CompVis' names does not say the scale of its latents."""
    torch.manual_seed(0)
    sizes = ["parts.tokenizer.width=32", "parts.tokenizer.norm_groups=32"]  # as all published ones
    network = build(runs.load("own/latent-diffusion", [*AUTOENCODER, *sizes, *WITHOUT])[0], "tokenizer")
    weights = checkpoint.export(network, torch.float32)
    save_file({name: value for name, value in weights.items() if "scale." not in name}, tmp_path / "kl.safetensors")
    shards, imported = tmp_path / "shards", tmp_path / "imported"
    run("data", "pack", pictures, shards)
    run("convert", tmp_path / "kl.safetensors", imported, "--image-size", 32)
    section = checkpoint.load_recipe(imported).parts["tokenizer"]
    assert section["latent_channels"] == 4 and section["channel_mult"] == [1, 2]
    command = ["own/latent-diffusion", *AUTOENCODER, *WITHOUT, f"training.data.shards={shards}", "--stage", "prior"]
    command += [f"parts.tokenizer={json.dumps(section)}", "licence=not stated", "--from", str(imported)]
    assert trainer.main([*command, "--run", str(tmp_path / "first")]) == 2
    assert "measure it: kartina scale SHARDS --model FOLDER" in " ".join(capsys.readouterr().err.split())
    before = checkpoint.load_weights(imported, "tokenizer")
    assert "channel 3: mean" in run("scale", shards, "--model", imported, "--device", "cpu")
    tokenizer = checkpoint.load_tokenizer(imported)[1]
    after = checkpoint.load_weights(imported, "tokenizer")
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("scale."))
    source = ShardSource(shards, 32, 0)
    with torch.no_grad():
        latents = tokenizer.encode(source.read(range(source.size)).image)
    moments = latents.mean((0, 2, 3)), latents.std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(moments, (torch.zeros(4), torch.ones(4)), atol=1e-3, rtol=0)
    assert trainer.main([*command, "--run", str(tmp_path / "second")]) == 0
    with pytest.raises(checkpoint.ModelError, match="belongs to what was trained with it"):
        run("scale", shards, "--model", tmp_path / "second" / "model")


def test_stable_diffusion_with_captions(pictures, tmp_path):
    shards, folder = tmp_path / "shards", tmp_path / "run"
    run("data", "pack", pictures, shards)
    command = ["own/stable-diffusion", *AUTOENCODER, *WITH, f"training.data.shards={shards}", "--run", str(folder)]
    assert trainer.main(command) == 0
    assert set(checkpoint.read_card(folder / "model")["parts"]) == {"tokenizer", "prior", "text", "clip"}
    run("paint", "noise", "--model", folder, "--candidates", 2, "--steps", 2, "--out", tmp_path / "out")
    judged = json.loads(run("evaluate", folder, "--data", shards, "--json").splitlines()[-1])
    assert judged["pictures"].endswith("held out of training") and 4 <= judged["true"]["n"] < 40
    run("export", folder, tmp_path / "theirs", "--to", "diffusers")
    assert (tmp_path / "theirs" / "model_index.json").is_file()


@pytest.mark.slow
def test_dalle_with_captions(pictures, tmp_path):
    shards, codes, folder = (tmp_path / name for name in ("shards", "codes", "run"))
    run("data", "pack", pictures, shards)
    sizes = [
        *AUTOENCODER,
        *(word for word in WITH if not any(name in word for name in ("text=", "prior=", "num_steps"))),
        *CODES,
    ]
    command = ["own/dalle", *sizes, f"training.data.shards={shards}", "--run", str(folder)]
    assert trainer.main([*command, "--stage", "tokenizer"]) == 0
    run("data", "encode", shards, codes, "--model", folder, "--processes", 1)
    assert trainer.main([*command, f"training.data.cache={codes}"]) == 0
    assert set(checkpoint.read_card(folder / "model")["parts"]) == {"tokenizer", "prior", "clip"}
    assert math.isfinite(metrics(folder)["prior", "valid/nats_per_code"])
    run("paint", "noise", "--model", folder, "--candidates", 2, "--out", tmp_path / "out")
