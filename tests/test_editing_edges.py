"""Edits at the edges: nothing to invert under, and a mask that is cropped away."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_drawing import LATENT, PIXEL, write_model

from kartina.pipeline.editing import EditDrawing, mask_of, square
from kartina.pipeline.recipe import sampling_knobs
from kartina.pipeline.text_to_image import TextToImage
from kartina.priors.diffusion_samplers import ddim_invert
from kartina.training.show import diffusion

CLASSES = {"prior": PIXEL["prior"] | {"num_classes": 10}}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_under_no_caption_the_null_condition_is_inverted_of_classes_too(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "model", CLASSES))
    assert system.edit(PICTURE, "3", invert="")[0].facts["edit"]["invert"] == ""
    edited = EditDrawing(system.draw, square(PICTURE, 16)[None], None, 1.0, "")
    knobs = sampling_knobs(system.recipe, {"sampler": "ddim", "num_steps": 4}, "tests")
    null = system.draw.null(1)
    with torch.no_grad():
        expected = ddim_invert(system.draw.denoiser(null), null, edited.x_0, 4, "trailing", strength=1.0)
        assert torch.equal(edited._noise("", knobs), expected)
        assert not torch.equal(edited._noise("3", knobs), expected)


def test_an_inversion_takes_eta_0_whatever_the_recipe_paints_with(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "model", LATENT))
    system.recipe = system.recipe.model_copy(update={"sampling": {"sampler": "ddim", "eta": 1.0, "num_steps": 4}})
    assert system.edit(PICTURE, "a ring", invert="a circle")[0].facts["knobs"]["eta"] == 0.0
    with pytest.raises(ValueError, match="undone by the sampler ddim with eta 0"):
        system.edit(PICTURE, "a ring", invert="a circle", eta=1.0)


def test_a_mask_that_is_cropped_away_is_not_called_black():
    mask = Image.new("L", (48, 16))
    mask.paste(255, (0, 0, 8, 16))
    with pytest.raises(ValueError, match="got black alone at 16 x 16 pixels; fit it by stretch"):
        mask_of(mask, (48, 16), 16, "crop")
    assert mask_of(mask, (48, 16), 16, "stretch").sum() > 0
    with pytest.raises(ValueError, match="at 16 x 16 pixels; draw it, or none"):
        mask_of(Image.new("L", (48, 16)), (48, 16), 16, "crop")


def test_a_way_from_noise_without_a_caption_is_shown_of_classes_too(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "model", CLASSES))
    seen, _ = diffusion.reverse(system.draw, "", 0, sampling_knobs(system.recipe, {"num_steps": 2}, "tests"))
    null, (t, x_t, x_0) = system.draw.null(1), seen[0]
    with torch.no_grad():
        assert torch.equal(system.draw.denoiser(null)(x_t, torch.tensor([t]), null).x_0, x_0)
    assert diffusion.of_model(PICTURE, system, count=2, num_steps=2)[0].height > 0
