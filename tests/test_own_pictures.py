"""The way of docs/own_pictures.md, at a small size: pictures, an autoencoder, latents, a U-Net over them."""

import json
import math
import random

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer

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
WITHOUT = f"parts.prior={{{UNET}, attn_levels: [1], context_dim: null}}"
WITH = [
    "captions={vocab_size: 300, context_length: 14}",
    f"parts.prior={{{UNET}, attn_levels: [1], context_dim: 16}}",
    "parts.text={kind: clip_text, text_vocab: 302, text_length: 16, width: 16, depth: 1, num_heads: 2}",
    "parts.clip={kind: clip, embed_dim: 8, image_size: 32, patch_size: 16, vision_width: 16, vision_depth: 1,"
    " vision_heads: 2, text_vocab: 302, text_length: 16, text_width: 16, text_depth: 1, text_heads: 2}",
    *["stages.clip.steps=2", "stages.clip.global_batch=8"],
]


def run(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
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
    command = ["own/latent-diffusion", *AUTOENCODER, WITHOUT, f"training.data.shards={shards}", "--run", str(folder)]
    assert trainer.main([*command, "--stage", "tokenizer"]) == 0
    assert "PSNR" in run("reconstruct", folder, "--data", shards, "--count", 8)
    run("data", "encode", shards, latents, "--model", folder, "--what", "latents", "--processes", 1)
    assert trainer.main([*command, "--stage", "prior", f"training.data.cache={latents}"]) == 0
    found = metrics(folder)
    assert math.isfinite(found["tokenizer", "valid/psnr"]) and math.isfinite(found["prior", "valid/error"])
    run("paint", "anything", "--model", folder, "--candidates", 2, "--keep", 2, "--steps", 2, "--out", tmp_path / "out")
    assert [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))] == [(32, 32)] * 2


def test_stable_diffusion_with_captions(pictures, tmp_path):
    shards, folder = tmp_path / "shards", tmp_path / "run"
    run("data", "pack", pictures, shards)
    command = ["own/stable-diffusion", *AUTOENCODER, *WITH, f"training.data.shards={shards}", "--run", str(folder)]
    assert trainer.main(command) == 0
    assert set(checkpoint.read_card(folder / "model")["parts"]) == {"tokenizer", "prior", "text", "clip"}
    run("paint", "noise", "--model", folder, "--candidates", 2, "--steps", 2, "--out", tmp_path / "out")
    run("export", folder, tmp_path / "theirs", "--to", "diffusers")
    assert (tmp_path / "theirs" / "model_index.json").is_file()
