"""Painting with diffusion priors: of latents with captions, and of pixels; what their knobs do, and what is refused."""

import numpy as np
import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.drawing import DiffusionDrawing
from kartina.pipeline.recipe import Recipe, build, sampling_knobs
from kartina.pipeline.text_to_image import TextToImage, metadata, repaint
from kartina.tokenizers.captions import CaptionTokenizer

UNET = {"kind": "unet", "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 4, "num_heads": 2}
LATENT = {
    "tokenizer": {"kind": "autoencoder_kl", "image_size": 16, "width": 8, "channel_mult": [1, 2], "norm_groups": 2,
                  "blocks_per_level": 1, "latent_channels": 4, "attn_resolutions": []},
    "text": {"kind": "clip_text", "text_vocab": 262, "text_length": 14, "width": 16, "depth": 1, "num_heads": 2},
    "prior": UNET | {"in_channels": 4, "attn_levels": [1], "context_dim": 16},
}  # fmt: skip
PIXEL = {"prior": UNET | {"in_channels": 3, "attn_levels": [1], "context_dim": None}}
NOISE = {"schedule": "cosine", "num_timesteps": 50, "prediction": "v"}
PROMPTS = ["a red ring", "синий круг"]


def write_model(folder, parts, **sections):
    """A model folder of random weights, not zero where a U-Net begins with zeros."""
    recipe = Recipe(
        name="tests/tiny", paper="none", image_size=16, captions={"vocab_size": 260, "context_length": 12},
        diffusion=NOISE, parts=parts, **{"sampling": {"num_steps": 4}, **sections},
    )  # fmt: skip
    folder.mkdir()
    CaptionTokenizer.train(["a ring"], 260, 12).save(folder / "captions.json")
    for part in parts:
        torch.manual_seed(0)
        network = build(recipe, part)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        identity = {"part": recipe.parts[part]} | (
            {"diffusion": recipe.diffusion.model_dump()} if part == "prior" else {}
        )
        checkpoint.save_part(folder, recipe, part, checkpoint.export(network, torch.float32), identity=identity)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("drawing") / "model", LATENT)


@pytest.fixture(scope="module")
def system(folder):
    return TextToImage.load(folder)


def pixels(paintings):
    return np.stack([np.asarray(painting.image) for painting in paintings]).astype(int)


def test_a_painting_is_painted_again_and_does_not_see_its_batch(system):
    together = system(PROMPTS, seed=[3, 4])
    assert pixels(together).std() > 0 and (pixels(together)[0] != pixels(together)[1]).any()
    assert (pixels([repaint(system, metadata(together[1]))]) == pixels(together[1:])).all()
    alone = system(PROMPTS[1], seed=4)
    assert np.abs(pixels(alone) - pixels(together[1:])).max() <= 1


def test_captions_seeds_guidance_and_a_negative_prompt_all_matter(system):
    plain = pixels(system(PROMPTS[0], seed=1))
    for other in (
        system(PROMPTS[1], seed=1),
        system(PROMPTS[0], seed=2),
        system(PROMPTS[0], seed=1, guidance_scale=3.0),
        system(PROMPTS[0], seed=1, num_steps=5),
        system(PROMPTS[0], seed=1, sampler="ddim", eta=1.0),
    ):
        assert (pixels(other) != plain).any()
    guided = pixels(system(PROMPTS[0], seed=1, guidance_scale=3.0))
    assert (pixels(system(PROMPTS[0], seed=1, guidance_scale=3.0, negative="a ring")) != guided).any()
    # Guided at no level it is not guided at all.
    nowhere = system(PROMPTS[0], seed=1, guidance_scale=3.0, guidance_low=1e8, guidance_high=1e9)
    assert (pixels(nowhere) == plain).all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k": 3}, "unknown key 'top_k'"),
        ({"sampler": "dpm"}, "no sampler 'dpm'"),
        ({"eta": 0.5}, "eta belongs to the sampler ddim"),
        ({"negative": "a ring"}, "need a guidance_scale"),
        ({"num_steps": 51}, "takes 1 to 50 steps"),
        ({"num_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_knobs_that_cannot_be_are_refused(system, knobs, message):
    with pytest.raises(ValueError, match=message):
        system(PROMPTS[0], **knobs)


def test_a_recipe_of_other_noise_is_refused(folder, tmp_path):
    text = (folder / "recipe.yaml").read_text()
    assert "prediction: v" in text
    (folder / "recipe.yaml").write_text(text.replace("prediction: v", "prediction: eps"))
    try:
        with pytest.raises(checkpoint.ModelError, match="builds another prior"):
            TextToImage.load(folder)
    finally:
        (folder / "recipe.yaml").write_text(text)


def test_pixels_are_drawn_without_captions(tmp_path):
    folder = write_model(tmp_path / "pixels", PIXEL)
    (folder / "captions.json").unlink()
    system = TextToImage.load(folder)
    painted = system("anything", seed=5)
    assert painted[0].image.size == (16, 16) and (pixels(system("something else", seed=5)) == pixels(painted)).all()
    with pytest.raises(ValueError, match="no captions to be guided by"):
        system("anything", guidance_scale=2.0)


def test_guided_pixels_stay_in_their_range():
    """Guidance by 3 leads from 0.9 and -0.9 to 4.5; what leaves the denoiser is clipped after it."""
    recipe = Recipe(name="tests/tiny", paper="none", image_size=8, diffusion={"prediction": "x_0"}, parts={
        "prior": PIXEL["prior"] | {"num_classes": 10}})  # fmt: skip
    draw = DiffusionDrawing(recipe, {"prior": build(recipe, "prior")}, None)

    def network(x_t, t, condition):
        return torch.where(condition.labels == 10, -0.9, 0.9).view(-1, 1, 1, 1).expand_as(x_t)

    draw.prior.forward = network
    x_t, t, knobs = torch.randn(2, 3, 8, 8), torch.tensor([500, 9]), sampling_knobs(recipe, {"guidance_scale": 3.0}, "")
    condition = draw.condition(["7", "3"])
    found = draw.denoiser(condition, knobs)(x_t, t, condition)
    assert (found.x_0 == 1).all()
    torch.testing.assert_close(draw.denoiser(condition).schedule.diffuse(found.x_0, t, found.eps), x_t)


def test_parts_of_two_systems_are_refused(tmp_path):
    parts = LATENT | {"prior": LATENT["prior"] | {"context_dim": 24}}
    with pytest.raises(checkpoint.ModelError, match="looks at tokens of width 24"):
        TextToImage.load(write_model(tmp_path / "model", parts))


def test_classes_are_painted_by_their_number(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "classes", {"prior": PIXEL["prior"] | {"num_classes": 10}}))
    one, other, null = (pixels(system(word, seed=5)) for word in ("7", "3", " 7 "))
    assert (one != other).any() and (one == null).all()
    guided = pixels(system("7", seed=5, guidance_scale=3.0))
    assert (guided != one).any() and (pixels(system("7", seed=5, guidance_scale=3.0, negative="3")) != guided).any()
    for word in ("10", "-1", "seven", "٣"):
        with pytest.raises(ValueError, match="tests/tiny paints classes: say a number from 0 to 9, got"):
            system(word)


def test_codes_without_a_tokenizer_are_one_error(tmp_path):
    dalle = {"kind": "dalle", "text_vocab": 260, "text_length": 12, "num_codes": 8, "grid": [4, 4], "width": 16,
             "depth": 1, "num_heads": 2}  # fmt: skip
    write_model(tmp_path / "m", {"prior": dalle}, sampling={})
    with pytest.raises(checkpoint.ModelError, match="the prior draws codes, and there is no tokenizer to read them"):
        TextToImage.load(tmp_path / "m")
