"""Image-to-image and inpainting beside diffusers' pipelines: of the same weights and noise, the same pixels."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint
from PIL import Image

from kartina.layers.random import normal
from kartina.pipeline.convert import from_diffusers
from kartina.pipeline.convert_unet import unet_from_diffusers
from kartina.pipeline.denoising import schedule_of
from kartina.pipeline.recipe import Recipe, build, sampling_knobs
from kartina.pipeline.text_to_image import TextToImage
from kartina.tokenizers.captions import CaptionTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PARTS = {
    "tokenizer": {"kind": "autoencoder_kl", "image_size": 32, "width": 8, "channel_mult": [1, 2], "norm_groups": 2,
                  "blocks_per_level": 1, "latent_channels": 4, "attn_resolutions": []},
    "text": {"kind": "clip_text", "text_vocab": 262, "text_length": 14, "width": 16, "depth": 1, "num_heads": 2},
    "prior": {"kind": "unet", "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 4,
              "num_heads": 2, "out_channels": 4, "attn_levels": [1], "context_dim": 16},
}  # fmt: skip
VAE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4,
       "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
       "scaling_factor": 0.5}  # fmt: skip
UNET = {"out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "sample_size": 64}  # fmt: skip
STEPS, SEED, PROMPT, NEGATIVE = 8, 5, "a red ring", "a blue cross"

# ours, our spacing, theirs, their configuration
SAMPLERS = [
    ("DDIMScheduler", None, "DDIMScheduler", {}),
    ("EulerDiscreteScheduler", None, "EulerDiscreteScheduler", {}),
    ("ddim", "leading", "DDIMScheduler", {}),
    ("dpmpp_2m", None, "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
]


def both(channels):
    """Their modules with random weights, and a system of ours with the same; channels: that the U-Net reads."""
    torch.manual_seed(0)
    vae, unet = diffusers.AutoencoderKL(**VAE), diffusers.UNet2DConditionModel(in_channels=channels, **UNET)
    with torch.no_grad():
        for parameter in [*vae.parameters(), *unet.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape))
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30  # a draw of their posterior is its mean
    recipe = Recipe(
        name="tests/tiny", paper="none", image_size=32, captions={"vocab_size": 260, "context_length": 12},
        diffusion={"schedule": "scaled_linear"}, parts=PARTS | {"prior": PARTS["prior"] | {"in_channels": channels}},
    )  # fmt: skip
    recipe = recipe.model_copy(update={"sampling": sampling_knobs(recipe, {"num_steps": STEPS}, "tests")})
    parts = {part: build(recipe, part).eval() for part in recipe.parts}
    parts["tokenizer"].load_state_dict(from_diffusers(vae.state_dict(), VAE["scaling_factor"]))
    parts["prior"].load_state_dict(unet_from_diffusers(unet.state_dict(), parts["prior"]))
    return TextToImage(recipe, parts, CaptionTokenizer.train(["a ring"], 260, 12), "0" * 64), vae, unet.eval()


@pytest.fixture(scope="module")
def four():
    return both(4)


@pytest.fixture(scope="module")
def nine():
    return both(9)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask():
    """White on whole places of the latents."""
    pixels = np.zeros((32, 32), np.uint8)
    pixels[8:24, 6:32] = 255
    return Image.fromarray(pixels)


def theirs(pipeline, system, vae, unet, sampler, monkeypatch, **call):
    """Their picture, (H, W, 3) in [0, 255], with our noise."""
    name, config = sampler
    kind, betas = getattr(diffusers, name), np.array(schedule_of(system.recipe).betas)
    fixed = {"clip_sample": False} if kind is diffusers.DDIMScheduler else {}
    pipe = pipeline(vae, None, None, unet, kind(), None, None, requires_safety_checker=False)
    pipe.scheduler = kind(trained_betas=betas, **fixed, **config)  # now, or the pipeline would change its steps_offset
    pipe.set_progress_bar_config(disable=True)
    for module in (img2img, inpaint):
        monkeypatch.setattr(
            module, "randn_tensor",
            lambda shape, **unused: normal(0, 0, torch.tensor([SEED]), tuple(shape[1:]), "sampler start"),
        )  # fmt: skip
    with torch.no_grad():
        prompt, negative = (system.draw.condition([caption]).tokens for caption in (PROMPT, NEGATIVE))
    return 255 * pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=3.0, num_inference_steps=STEPS,
        output_type="np", **call,
    ).images[0]  # fmt: skip


def ours(system, picture, sampler, **how):
    name, spacing = sampler
    knobs = {"sampler": name, "spacing": spacing, "guidance_scale": 3.0, "negative": NEGATIVE}
    return np.asarray(system.edit(picture, PROMPT, seed=SEED, **knobs, **how)[0].image).astype(float)


@pytest.mark.parametrize("strength", [0.5, 0.75])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler[0])
def test_image_to_image(four, picture, sampler, strength, monkeypatch):
    system, vae, unet = four
    expected = theirs(diffusers.StableDiffusionImg2ImgPipeline, system, vae, unet, sampler[2:], monkeypatch,
                      image=picture, strength=strength)  # fmt: skip
    found = ours(system, picture, sampler[:2], strength=strength)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5
    assert np.abs(found - np.asarray(picture)).mean() > 5


@pytest.mark.parametrize("strength", [0.75, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler[0])
def test_inpainting(four, nine, picture, mask, channels, sampler, strength, monkeypatch):
    system, vae, unet = four if channels == 4 else nine
    expected = theirs(diffusers.StableDiffusionInpaintPipeline, system, vae, unet, sampler[2:], monkeypatch,
                      image=picture, mask_image=mask, strength=strength, height=32, width=32)  # fmt: skip
    found = ours(system, picture, sampler[:2], mask=mask, strength=strength)
    painted = np.asarray(mask) > 0
    assert np.abs(found - expected)[painted].max() <= 1 and expected[painted].std() > 5
    # Theirs decodes what is not masked; ours leaves it.
    assert (found[~painted] == np.asarray(picture)[~painted]).all()
