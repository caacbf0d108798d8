"""Folders and files of Stable Diffusion as they were published over the years, beside diffusers: tiny ones here."""

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stable_diffusion import edit, ours, single_file, theirs

from kartina.pipeline import stable_diffusion
from kartina.pipeline.recipe import RecipeError
from kartina.pipeline.text_to_image import TextToImage
from kartina.pipeline.unpickle import WeightsError


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_stable_diffusion):
    """Folders of diffusers, by version."""
    made = {kind: tmp_path_factory.mktemp(kind) / "there" for kind in ("sd1", "sd2")}
    for kind, folder in made.items():
        tiny_stable_diffusion(kind).save_pretrained(folder)
    return made


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders["sd1"], tmp_path / "copy")


@pytest.mark.parametrize(("version", "size"), [("0.6.0", 64), ("0.9.0", 32), ("0.10.2", 32), (None, 32)])
def test_folders_of_before_diffusers_09_paint_at_the_size_of_their_training(folder, version, size):
    config = json.loads((folder / "unet/config.json").read_text()) | {"sample_size": 32, "_diffusers_version": version}
    (folder / "unet/config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    levels = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert stable_diffusion.load(folder).recipe.image_size == size * 2 ** (levels - 1)
    assert pipeline.unet.config.sample_size == size


def test_a_folder_that_skips_the_last_blocks_of_its_text_encoder(folder):
    config = json.loads((folder / "text_encoder/config.json").read_text())
    edit(folder / "text_encoder/config.json", num_hidden_layers=config["num_hidden_layers"] - 1)
    picture = theirs(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    assert np.abs(ours(folder) - picture).max() <= 1


def test_the_settings_of_a_running_average_do_not_matter(folder):
    model_hash = TextToImage.load(folder).model_hash
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 9, "power": 2 / 3}
    edit(folder / "unet/config.json", **average, update_after_step=0, use_ema_warmup=False)
    assert TextToImage.load(folder).model_hash == model_hash


def test_a_consistency_models_steps_are_taken_by_its_own_sampler(folder):
    (folder / "scheduler/scheduler_config.json").write_text(
        json.dumps(dict(diffusers.LCMScheduler().config) | {"_class_name": "LCMScheduler"})
    )
    system = TextToImage.load(folder)
    sampling = system.recipe.sampling
    assert (sampling["sampler"], sampling["num_steps"], sampling["guidance_scale"]) == ("LCMScheduler", 4, 1.0)
    assert np.asarray(system("a red ring", seed=0)[0].image).std() > 5


def test_no_guidance_is_1_and_not_0(folder):
    system = TextToImage.load(folder)
    with pytest.raises(RecipeError, match=r"0 does not look at the caption; 1 is no guidance"):
        system("a red ring", guidance_scale=0.0)
    assert system("a red ring", guidance_scale=0.5)


def test_sd_turbos_file_is_of_version_2_and_xls_is_not(folders, tmp_path):
    """Its text encoder has the names of XL's first one, and its noise comes along."""
    weights = load_file(single_file("sd2", folders["sd2"], tmp_path / "sd.safetensors"))
    named = {re.sub(r"^cond_stage_model\.", "conditioner.embedders.0.", name): each for name, each in weights.items()}
    save_file(named | {"denoiser.sigmas": torch.ones(1000)}, tmp_path / "turbo.safetensors")
    more = {"image_size": 32, "tokenizer": folders["sd2"] / "tokenizer", "prediction": "eps"}
    one, two = (stable_diffusion.load(tmp_path / f"{name}.safetensors", **more) for name in ("sd", "turbo"))
    assert one.recipe.parts == two.recipe.parts
    for part, tensors in one.weights.items():
        assert all(torch.equal(tensor, two.weights[part][name]) for name, tensor in tensors.items()), part
    save_file({n: t for n, t in named.items() if ".input_blocks.1.1." not in n}, tmp_path / "xl.safetensors")
    with pytest.raises(WeightsError, match="of Stable Diffusion XL, of which the autoencoder alone"):
        stable_diffusion.load(tmp_path / "xl.safetensors", **more)


def test_what_other_programs_left_in_a_file_is_left_out(folders, tmp_path):
    weights = load_file(single_file("sd1", folders["sd1"], tmp_path / "sd.safetensors"))
    text = "cond_stage_model.transformer."
    left = ["embedding_manager.initial", "cond_stage_model.logit_scale", f"{text}text_projection.weight"]
    left += [f"{text}vision_model.embeddings.position_ids"]
    save_file(weights | {name: torch.ones(3) for name in left}, tmp_path / "more.safetensors")
    more = {"image_size": 32, "tokenizer": folders["sd1"] / "tokenizer"}
    one, two = (stable_diffusion.load(tmp_path / f"{name}.safetensors", **more) for name in ("sd", "more"))
    for part, tensors in one.weights.items():
        assert tensors.keys() == two.weights[part].keys()
    for name in ("ztsnr", "v_pred"):  # they change the noise
        save_file(weights | {name: torch.ones(1)}, tmp_path / "more.safetensors")
        with pytest.raises(WeightsError, match=f"'{name}' is no tensor of a Stable Diffusion file"):
            stable_diffusion.load(tmp_path / "more.safetensors", **more)


def test_weights_in_shards_are_named(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/part-1.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"in shards, which are not read; save them as one file"):
        TextToImage.load(folder)


@pytest.mark.parametrize("part", ["vae", "vqvae"])
def test_of_another_pipeline_the_autoencoder_is_said_to_be_read(folder, part):
    (folder / "vae").rename(folder / "kept")
    (folder / "kept").rename(folder / part)
    edit(folder / "model_index.json", _class_name="LDMTextToImagePipeline")
    with pytest.raises(WeightsError, match="may be read alone, by kartina convert --part tokenizer"):
        TextToImage.load(folder)
