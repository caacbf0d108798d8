"""Models of ours as diffusers reads them: the same picture, the same captions, and what cannot be said there."""

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from kartina import cli
from kartina.layers.random import normal
from kartina.pipeline import caption_files, checkpoint
from kartina.pipeline.convert_scheduler import noise_of, sampling_of, scheduler_config
from kartina.pipeline.denoising import schedule_of
from kartina.pipeline.recipe import Recipe, build, dump
from kartina.pipeline.text_to_image import TextToImage
from kartina.priors.caption_encoder import CaptionEncoder, CLIPText
from kartina.priors.diffusion_samplers import SAMPLERS
from kartina.tokenizers.captions import CaptionTokenizer

SEED = 3


def run(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def ours(model, prompt):
    image = TextToImage.load(model)(prompt, seed=SEED, num_steps=4, guidance_scale=3.0)[0].image
    return np.asarray(image).astype(float)


def theirs(pipeline, prompt):
    pipeline.set_progress_bar_config(disable=True)
    latents = normal(0, 0, torch.tensor([SEED]), (3, 8, 8), "sampler start")
    knobs = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline(prompt, latents=latents, **knobs).images[0].astype(np.float64) * 255


def write_own(folder, noise, latents=3, channels=3):
    """A model folder with captions, of this noise, whose U-Net reads so many channels."""
    unet = {"kind": "unet", "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 4}
    parts = {
        "tokenizer": {"kind": "autoencoder_kl", "image_size": 16, "width": 8, "channel_mult": [1, 2], "norm_groups": 2,
                      "blocks_per_level": 1, "latent_channels": latents, "attn_resolutions": [16]},
        "text": {"kind": "clip_text", "text_vocab": 272, "text_length": 14, "width": 16, "depth": 1, "num_heads": 2},
        "prior": unet | {"num_heads": 2, "in_channels": channels, "out_channels": latents, "attn_levels": [1],
                         "context_dim": 16},
    }  # fmt: skip
    recipe = Recipe(name="tests/own", paper="none", image_size=16, captions={"vocab_size": 270, "context_length": 12},
                    diffusion=noise, parts=parts, sampling={"sampler": "dpmpp_2m", "num_steps": 4})  # fmt: skip
    folder.mkdir()
    CaptionTokenizer.train(["a ring", "a red ring"], 270, 12).save(folder / "captions.json")
    torch.manual_seed(1)
    for part in parts:
        network = build(recipe, part)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        weights = checkpoint.export(network, torch.float32)
        if part == "tokenizer":  # as measured: each channel has its own
            scale = torch.tensor([0.5, -1.0, 0.1, 0.3]), torch.tensor([0.7, 2.0, 1.3, 0.9])
            weights |= {f"scale.{name}": value[:latents] for name, value in zip(("mean", "std"), scale, strict=True)}
        checkpoint.save_part(folder, recipe, part, weights)


@pytest.mark.parametrize("noise", [{"schedule": "cosine", "prediction": "v"}, {"schedule": "scaled_linear"}])
def test_a_model_of_ours_paints_the_same_in_diffusers(tmp_path, noise):
    write_own(tmp_path / "m", noise)
    run("export", tmp_path / "m", tmp_path / "there")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there")
    for prompt in ("a red ring", "a <|endoftext|> кот", "ring " * 20):
        picture = theirs(pipeline, prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert picture.std() > 5 and np.abs(ours(tmp_path / "m", prompt) - picture).max() <= 1
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mine = TextToImage.load(tmp_path / "m").parts["tokenizer"].encode(image)
        torch.testing.assert_close(pipeline.vae.encode(image).latent_dist.mean, mine, atol=1e-5, rtol=1e-5)
    run("convert", tmp_path / "there", tmp_path / "back")
    assert np.abs(ours(tmp_path / "back", "a red ring") - ours(tmp_path / "m", "a red ring")).max() <= 1
    assert CaptionTokenizer.load(tmp_path / "back/captions.json").definition() == (
        CaptionTokenizer.load(tmp_path / "m/captions.json").definition()
    )


def test_a_model_of_ours_that_fills_a_mask_fills_the_same_in_diffusers(tmp_path, monkeypatch):
    """Of 9 channels: within the mask, of whole places of the latents, after what each makes of the same noise."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint

    write_own(tmp_path / "m", {"schedule": "scaled_linear"}, latents=4, channels=9)
    run("export", tmp_path / "m", tmp_path / "there")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((8, 10), 255, np.uint8), ((4, 4), (6, 0))))
    own = TextToImage.load(tmp_path / "m")
    edited = own.edit(picture, "a red ring", mask=mask, strength=1.0, seed=SEED, num_steps=4, guidance_scale=3.0)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there")
    assert type(pipeline) is diffusers.StableDiffusionInpaintPipeline
    pipeline.set_progress_bar_config(disable=True)

    def noise(shape, **unused):
        return normal(0, 0, torch.tensor([SEED]), tuple(shape[1:]), "sampler start")

    monkeypatch.setattr(inpaint, "randn_tensor", noise)
    mean = DiagonalGaussianDistribution.mode  # what ours takes of a picture, see docs/deviations.md
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: mean(posterior))
    size = {"height": 16, "width": 16, "strength": 1.0, "num_inference_steps": 4, "guidance_scale": 3.0}
    found = pipeline("a red ring", image=picture, mask_image=mask, output_type="np", **size).images[0] * 255.0
    inside = np.asarray(mask) > 0
    assert found[inside].std() > 5
    assert np.abs(np.asarray(edited[0].image).astype(float) - found)[inside].max() <= 1


def test_a_model_of_pixels_draws_the_same_in_diffusers(tmp_path, monkeypatch):
    unet = {"kind": "unet", "in_channels": 3, "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1}
    unet |= {"num_heads": 2, "attn_levels": [1], "context_dim": None, "norm_groups": 4}
    recipe = Recipe(
        name="tests/own", paper="none", image_size=16, parts={"prior": unet},
        sampling={"sampler": "dpmpp_2m", "num_steps": 4}, diffusion={"schedule": "cosine", "prediction": "v"},
    )  # fmt: skip
    torch.manual_seed(1)
    network = build(recipe, "prior")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    (tmp_path / "m").mkdir()
    checkpoint.save_part(tmp_path / "m", recipe, "prior", checkpoint.export(network, torch.float32))
    run("export", tmp_path / "m", tmp_path / "there")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there")
    assert type(pipeline).__name__ == "DDPMPipeline"
    pipeline.set_progress_bar_config(disable=True)
    start = normal(0, 0, torch.tensor([SEED]), (3, 16, 16), "sampler start")
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *rest, **more: start)
    theirs = pipeline(num_inference_steps=4, output_type="np").images[0].astype(np.float64) * 255
    mine = np.asarray(TextToImage.load(tmp_path / "m")("anything", seed=SEED)[0].image).astype(float)
    assert np.abs(mine - theirs).max() <= 1
    assert 0.2 < ((theirs > 1) & (theirs < 254)).mean() < 0.98  # some were held to the range, most lie in it
    for sampler, kept in (("ddpm", {"clip_sample": True}), ("ddim", None)):
        (tmp_path / "m" / "recipe.yaml").write_text(dump(recipe.model_copy(update={"sampling": {"sampler": sampler}})))
        if kept is None:
            with pytest.raises(ValueError, match="DDIMScheduler does not keep pixels"):
                run("export", tmp_path / "m", tmp_path / sampler)
            assert not (tmp_path / sampler).exists()
        else:
            run("export", tmp_path / "m", tmp_path / sampler)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / sampler)
            assert kept.items() <= dict(pipeline.scheduler.config).items()


def test_a_model_of_latents_without_captions_draws_the_same_in_diffusers(tmp_path, monkeypatch):
    unet = {"kind": "unet", "in_channels": 3, "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1}
    unet |= {"num_heads": 2, "attn_levels": [1], "context_dim": None, "norm_groups": 4}
    latents = {"kind": "autoencoder_kl", "image_size": 16, "width": 8, "channel_mult": [1, 2], "norm_groups": 2}
    latents |= {"blocks_per_level": 1, "latent_channels": 3, "attn_resolutions": []}
    recipe = Recipe(
        name="tests/own", paper="none", image_size=16, parts={"tokenizer": latents, "prior": unet},
        sampling={"sampler": "ddim", "num_steps": 4}, diffusion={"schedule": "scaled_linear"},
    )  # fmt: skip
    (tmp_path / "m").mkdir()
    torch.manual_seed(1)
    for part in recipe.parts:
        network = build(recipe, part)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        weights = checkpoint.export(network, torch.float32)
        if part == "tokenizer":
            weights |= {"scale.mean": torch.tensor([0.5, -1.0, 0.1]), "scale.std": torch.tensor([0.7, 2.0, 1.3])}
        checkpoint.save_part(tmp_path / "m", recipe, part, weights)
    run("export", tmp_path / "m", tmp_path / "there")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there")
    assert type(pipeline).__name__ == "LDMPipeline" and type(pipeline.vqvae).__name__ == "AutoencoderKL"
    pipeline.set_progress_bar_config(disable=True)
    start = normal(0, 0, torch.tensor([SEED]), (3, 8, 8), "sampler start")
    monkeypatch.setitem(type(pipeline).__call__.__wrapped__.__globals__, "randn_tensor", lambda *rest, **more: start)
    theirs = pipeline(num_inference_steps=4, output_type="np").images[0].astype(np.float64) * 255
    mine = np.asarray(TextToImage.load(tmp_path / "m")("anything", seed=SEED)[0].image).astype(float)
    assert np.abs(mine - theirs).max() <= 1 and mine.std() > 5
    run("export", tmp_path / "m", tmp_path / "alone", "--part", "tokenizer")
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "alone").config.latents_std == pytest.approx(
        [0.7, 2, 1.3]
    )
    codes = {"kind": "vq_latents", "image_size": 16, "num_codes": 8, "code_dim": 3, "latent_channels": 3}
    other = recipe.model_copy(update={"parts": {"tokenizer": codes, "prior": unet}})
    (tmp_path / "m" / "recipe.yaml").write_text(dump(other))
    with pytest.raises(ValueError, match="takes a tokenizer autoencoder_kl here, tests/own has vq_latents"):
        run("export", tmp_path / "m", tmp_path / "none")


def test_open_clips_vocabulary_is_that_of_transformers(tmp_path):
    captions = caption_files.of_open_clip(75)
    assert caption_files.write(tmp_path / "t", captions, 49408, 49407) == "CLIPTokenizer"
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path / "t")
    texts = [
        "a Red ring, and the cat's hat!",
        "Красный круг 🐈 2026",
        "an astronaut riding a horse <|endoftext|>",
        "y " * 90,
    ]
    with pytest.warns(UserWarning, match="cut"):
        ids, lengths = captions.encode(texts)
    for text, row, length in zip(texts, ids.tolist(), lengths.tolist(), strict=True):
        assert reference(text, truncation=True).input_ids == [49406, *row[:length], 49407]
    captions.save(tmp_path / "captions.json")
    recipe = Recipe(name="a/b", paper="", image_size=8, captions={"vocab_size": 49406, "context_length": 75}, parts={})
    encoder = CaptionEncoder(49406, 75, 8, 1, 1)
    with pytest.raises(checkpoint.ModelError, match="CLIP's, which has no padding"):
        checkpoint.check_captions(tmp_path, recipe, "text", encoder)
    checkpoint.check_captions(tmp_path, recipe, "text", CLIPText(49408, 77, 8, 1, 1))


@pytest.mark.parametrize(
    ("changes", "pad"),
    [
        ({"pad_token": "<|endoftext|>"}, "!"),
        ({"pad_token": "!", "added_tokens_decoder": {}}, "!"),
        ({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}, "<|endoftext|>"),
        ({"pad_token": None, "added_tokens_decoder": {}}, "<|endoftext|>"),
    ],
)
def test_of_two_files_that_name_a_padding_that_of_transformers_counts(changes, pad, tmp_path):
    """Those of the published Stable Diffusion 2 differ; an `added_tokens_decoder` is in what is saved since."""
    words = tmp_path / "t"
    caption_files.write(words, caption_files.of_open_clip(75), 49408, 49407)
    config = json.loads((words / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in (config | changes).items() if value is not None}
    (words / "tokenizer_config.json").write_text(json.dumps(kept))
    (words / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    captions, number = caption_files.read(words, 75)
    reference = transformers.CLIPTokenizer.from_pretrained(words)
    assert (reference.pad_token, reference.pad_token_id) == (pad, number)
    for text in ("a red ring", "no! wow !!!"):
        (row,), (length,) = captions.encode([text])
        assert reference(text).input_ids == [49406, *row[:length].tolist(), 49407]


def test_diffusers_has_no_other_kinds(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    recipe = Recipe(name="tests/own", paper="none", image_size=16, parts={
        "prior": {"kind": "unet"}, "text": {"kind": "caption_encoder"}})  # fmt: skip
    (folder / "recipe.yaml").write_text(dump(recipe))
    (folder / "card.json").write_text('{"format": 1, "licence": "", "parts": {}}')
    with pytest.raises(ValueError, match="needs a tokenizer autoencoder_kl, a text clip_text and a prior unet"):
        run("export", folder, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    plain = {"kind": "unet", "context_dim": None, "in_channels": 3, "num_heads": 1}
    for parts, message in (
        ({"prior": plain | {"num_classes": 10}}, "has 10 classes"),
        ({"prior": plain | {"out_channels": 6}}, "gives 6 and has no"),
    ):
        (folder / "recipe.yaml").write_text(dump(recipe.model_copy(update={"parts": parts})))
        with pytest.raises(ValueError, match=message):
            run("export", folder, tmp_path / "there")
        assert not (tmp_path / "there").exists()
    latents = {"kind": "autoencoder_kl", "latent_channels": 4}
    read = {"kind": "unet", "in_channels": 9, "out_channels": 8, "context_dim": 8}
    parts = {"tokenizer": latents, "text": {"kind": "clip_text", "width": 8}, "prior": read}
    (folder / "recipe.yaml").write_text(dump(recipe.model_copy(update={"parts": parts})))
    with pytest.raises(ValueError, match="its U-Net gives 4 channels, those of the latents, tests/own gives 8"):
        run("export", folder, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    write_own(tmp_path / "own", {"schedule": "cosine", "prediction": "v"})
    card = json.loads((tmp_path / "own" / "card.json").read_text())
    card["parts"]["prior"]["trained_against"] = {"tokenizer": "0" * 64}
    (tmp_path / "own" / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="prior was trained against another tokenizer"):
        run("export", tmp_path / "own", tmp_path / "there")
    del card["parts"]["prior"]["trained_against"]
    (tmp_path / "own" / "card.json").write_text(json.dumps(card))
    (tmp_path / "own" / "captions.json").write_text("[]")  # which is written last
    with pytest.raises(ValueError, match="captions"):
        run("export", tmp_path / "own", tmp_path / "there")
    assert not [path for path in tmp_path.iterdir() if "there" in path.name]
    for sampling, message in (
        ({"spacing": "leading"}, "has no spacing 'leading'"),
        ({"sampler": "ddim", "spacing": "linspace"}, "has no spacing 'linspace' that takes the steps of ddim"),
        ({"sampler": "unipc", "spacing": "karras"}, "has no spacing 'karras' that takes the steps of unipc"),
        ({"sampler": "DDIMScheduler"}, "DDIMScheduler has its own steps; set one of ddpm, ddim"),
        ({"sampler": "ddim", "eta": 1.0}, "eta is 1.0, which no config of diffusers holds"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler_config(recipe.model_copy(update={"sampling": sampling}))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_noise_and_sampler_go_there_and_back(sampler, kind):
    noise = {"schedule": kind, "prediction": "v", "zero_terminal": kind == "linear", "num_timesteps": 500}
    recipe = Recipe(name="a/b", paper="", image_size=8, parts={}, diffusion=noise, sampling={"sampler": sampler})
    if sampler == "heun" and kind != "scaled_linear":
        said = {"linear": " of diffusers has no rescale_betas_zero_snr", "cosine": "'s first step from cosine noise"}
        with pytest.raises(ValueError, match=f"HeunDiscreteScheduler{said[kind]}"):
            scheduler_config(recipe)
        return
    config = scheduler_config(recipe)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    back = Recipe(name="a/b", paper="", image_size=8, parts={}, diffusion=noise_of(dict(scheduler.config)))
    same = schedule_of(back).alpha_bar[:-1].float()
    torch.testing.assert_close(scheduler.alphas_cumprod[:-1], same, atol=1e-5, rtol=1e-3)
    assert schedule_of(back).alpha_bar.equal(schedule_of(recipe).alpha_bar)
    assert sampling_of(config) == {"sampler": sampler}


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun"])
def test_spacings_go_there_and_back(sampler, spacing):
    """Of a model of few steps, as one that looks at 999 and 499 alone, they are part of what it is."""
    sampling = {"sampler": sampler, "spacing": spacing}
    recipe = Recipe(name="a/b", paper="", image_size=8, parts={}, sampling=sampling)
    if (sampler, spacing) == ("euler_ancestral", "karras"):
        with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler of diffusers has no use_karras_sigmas"):
            scheduler_config(recipe)
        return
    config = scheduler_config(recipe)
    assert sampling_of(config) == sampling
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(4)
    ours = [level.t for level in schedule_of(recipe).levels(4, spacing)[:-1]]
    assert scheduler.timesteps.unique().flip(0).tolist() == pytest.approx(ours, abs=0.5)
