"""Edits at the edges: nothing to invert under, a mask that is cropped away, memory that ends at the first look."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_drawing import LATENT, PIXEL, write_model

from kartina.pipeline.editing import mask_of
from kartina.pipeline.text_to_image import TextToImage

CLASSES = {"prior": PIXEL["prior"] | {"num_classes": 10}}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def difference(paintings):
    (painted,) = paintings
    return np.abs(np.asarray(painted.image).astype(int) - np.asarray(PICTURE)).max()


def test_under_no_caption_the_null_condition_is_inverted_of_classes_too(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "model", CLASSES))
    assert system.draw.null(1).labels.tolist() != system.draw.condition(["3"]).labels.tolist()
    edited = system.edit(PICTURE, "3", invert="", num_steps=10)
    assert edited[0].facts["edit"]["invert"] == "" and difference(edited) > difference(
        system.edit(PICTURE, "3", invert="3", num_steps=50)
    )


def test_an_inversion_takes_eta_0_whatever_the_recipe_paints_with(tmp_path):
    system = TextToImage.load(write_model(tmp_path / "model", LATENT))
    system.recipe = system.recipe.model_copy(update={"sampling": {"sampler": "ddim", "eta": 1.0, "num_steps": 4}})
    assert system.edit(PICTURE, "a ring", invert="a circle")[0].facts["knobs"]["eta"] == 0.0
    with pytest.raises(ValueError, match="undone by the sampler ddim with eta 0"):
        system.edit(PICTURE, "a ring", invert="a circle", eta=1.0)


def test_a_mask_that_is_cropped_away_is_not_called_black():
    mask = Image.new("L", (48, 16))
    mask.paste(255, (0, 0, 8, 16))
    with pytest.raises(ValueError, match="cuts all of its white off, so fit it by stretch"):
        mask_of(mask, (48, 16), 16, "crop")
    assert mask_of(mask, (48, 16), 16, "stretch").sum() > 0
    with pytest.raises(ValueError, match="black alone; draw it, or none"):
        mask_of(Image.new("L", (48, 16)), (48, 16), 16, "crop")


def test_where_memory_ends_at_the_encoder_less_is_painted_at_once(tmp_path, monkeypatch):
    system = TextToImage.load(write_model(tmp_path / "model", LATENT))
    encode, looks, expected = system.draw.encode, [], system.edit(PICTURE, ["a ring"] * 2, seed=[1, 2])

    def fail_at_first(image):
        looks.append(image)
        if len(looks) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return encode(image)

    monkeypatch.setattr(system.draw, "encode", fail_at_first)
    with pytest.warns(UserWarning, match="out of memory with 2 pictures: going on with 1"):
        found = system.edit(PICTURE, ["a ring"] * 2, seed=[1, 2])
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image)).max() <= 1
