"""The discrete VAE of patches: where its codes start, and that its two ways of decoding are one."""

import pytest
import torch

from kartina.tokenizers.dvae import map_pixels
from kartina.tokenizers.patch_dvae import PatchDVAE


@pytest.mark.parametrize("patch", [(4, 4), (2, 8)])
def test_codes_of_patches_read_their_own_pixels_and_start_by_pasting_the_nearest_centre(patch):
    torch.manual_seed(0)
    model = PatchDVAE(image_size=16, num_codes=24, patch=patch, width=8, channels=8, depth=1)
    assert model.spec.shape == (16 // patch[0], 16 // patch[1])
    images = (torch.rand(32, 3, 16, 16) * 2 - 1).round(decimals=2)
    images[:, :, :8] = -0.5  # half of all patches are one: it must not take half of the codes
    model.start_codes([images[:16], images[16:]], seed=3)
    codes = model.encode(images)
    patches = torch.nn.functional.unfold(map_pixels(images), patch, stride=patch).mT.flatten(0, 1)  # (B * h * w, 48)
    above = 8 // patch[0]  # rows of codes whose patches are all alike
    assert len(codes.unique()) == 24 and len(codes[:, :above].unique()) == 1
    pasted = map_pixels(model.decode(codes))
    pasted = torch.nn.functional.unfold(pasted, patch, stride=patch).mT.flatten(0, 1)
    centres = torch.stack([pasted[codes.flatten() == k][0] for k in range(24)])
    nearest = torch.cdist(patches, centres).argmin(1)
    assert (nearest == codes.flatten()).float().mean() > 0.99  # but for ties that round differently
    assert torch.allclose(pasted, centres[codes.flatten()], atol=1e-6)  # its own pixels alone
    changed = images.clone()
    changed[:, :, 16 - patch[0] :, 16 - patch[1] :] = 1.0
    before, after = model.logits(images).flatten(2), model.logits(changed).flatten(2)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1]) and not torch.equal(after[:, :, -1], before[:, :, -1])


def test_evenness_gives_edges_between_near_colours_codes_of_those_between_far_ones():
    share = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    ground, near, far = torch.tensor([[0.9, 0.1, -0.7], [0.9, 0.7, -0.5], [-0.6, -0.3, 0.6]])[:, :, None, None]
    images, used = [ground + share * (colour - ground) for colour in (near, far)], []
    for evenness in (0.0, 0.5, 1.0):
        model = PatchDVAE(image_size=16, num_codes=64, patch=(2, 4), width=8, channels=8, depth=1)
        model.start_codes(images, seed=0, evenness=evenness)
        used.append(len(model.encode(images[0]).unique()))
    assert used == sorted(used) and used[0] < 12 and used[2] > 18, used


def test_a_patch_decoder_reads_one_hot_weights_and_codes_alike():
    torch.manual_seed(0)
    decoder = PatchDVAE(image_size=8, num_codes=5, patch=(2, 4), width=8, channels=7, depth=2).decoder
    codes = torch.randint(5, (3, 4, 2))
    soft = torch.nn.functional.one_hot(codes, 5).permute(0, 3, 1, 2).float()
    assert decoder.from_codes(codes).shape == (3, 6, 8, 8)
    assert torch.allclose(decoder(soft), decoder.from_codes(codes), atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"patch": (3, 4)}, {"patch": (0, 4)}, {"patch": 4}, {"patch": [2.5, 4]}, {"channels": 5}, {"depth": 0}]
)
def test_sizes_of_patches_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="PatchDVAE needs"):
        PatchDVAE(**{"image_size": 16, "num_codes": 24, **wrong})


def test_too_few_different_patches_are_refused():
    model = PatchDVAE(16, 24, (4, 4), 8)
    with pytest.raises(ValueError, match="at least as many points as centres, got 1 for 24"):
        model.start_codes([torch.zeros(8, 3, 16, 16)], seed=0)


def test_codes_stay_in_float32_under_autocast_and_shapes_can_be_probed_on_meta():
    model = PatchDVAE(image_size=8, num_codes=5, patch=(2, 4), width=8, channels=7, depth=2)
    image, noise = torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(image, noise, 1.0)
        logits = model.logits(image)
    assert torch.equal(out["logits"], logits) and logits.dtype == torch.float32
    assert torch.equal(logits, model.logits(image))
    for dtype in (torch.bfloat16, torch.float64):
        half = PatchDVAE(image_size=8, num_codes=5, patch=(2, 4), width=8, channels=7, depth=2).to(dtype)
        codes = half.encode(image.to(dtype))
        soft = torch.nn.functional.one_hot(codes, 5).movedim(3, 1).to(dtype)
        torch.testing.assert_close(half.decoder(soft), half.decoder.from_codes(codes))
    probe = model.to("meta")(image.to("meta"), noise.to("meta"), 1.0)
    assert probe["parameters"].shape == (1, 6, 8, 8)
