"""The convolutional encoder and decoder, the plain autoencoder, KL and VAE: sizes, edges, equality with diffusers."""

import pytest
import torch

from kartina.pipeline.convert import from_compvis, from_diffusers, to_diffusers
from kartina.tokenizers.autoencoder import Autoencoder, LatentScale, latent_sums
from kartina.tokenizers.autoencoder_kl import AutoencoderKL
from kartina.tokenizers.spec import LatentsSpec
from kartina.tokenizers.tiles import decode_tiles
from kartina.tokenizers.vae import VAE, moments, reparameterise

TINY = {"image_size": 16, "width": 8, "channel_mult": (1, 2, 2), "blocks_per_level": 1, "norm_groups": 4}


@pytest.fixture
def pair():
    """Diffusers' AutoencoderKL with random weights, and ours with the same."""
    from diffusers import AutoencoderKL as Reference

    torch.manual_seed(0)
    reference = Reference(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    for parameter in reference.parameters():  # gains and biases too, or a wrong name would not show
        torch.nn.init.normal_(parameter, std=0.2)
    ours = AutoencoderKL(**TINY)
    ours.load_state_dict(from_diffusers(reference.state_dict(), scaling_factor=0.5))
    return reference, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_equals_diffusers_in_outputs_and_gradients(pair, dtype, images, close):
    reference, ours = (model.to(dtype) for model in pair)
    image, noise = images().to(dtype), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    posterior = reference.encode(image).latent_dist
    latents = posterior.mean + posterior.std * noise
    decoded = reference.decode(latents).sample
    out = ours(image, noise)
    close(out["mean"], posterior.mean)
    close(out["log_variance"], posterior.logvar)
    close(out["reconstruction"], decoded)
    (decoded.square().mean() + posterior.kl().mean() / 100).backward()
    kl = 0.5 * (out["mean"] ** 2 + out["log_variance"].exp() - 1 - out["log_variance"]).sum(dim=(1, 2, 3))
    (out["reconstruction"].square().mean() + kl.mean() / 100).backward()
    gradients = to_diffusers({name: p.grad for name, p in ours.named_parameters()})
    theirs = dict(reference.named_parameters())
    assert set(gradients) == set(theirs)
    for name, gradient in gradients.items():
        close(gradient, theirs[name].grad)


def test_the_scaling_factor_lives_in_the_tokenizer(pair, images, close):
    reference, ours = pair
    with torch.no_grad():
        close(ours.encode(images()), reference.encode(images()).latent_dist.mean * 0.5)
        z = torch.randn(2, 4, 4, 4)
        close(ours.decode(z), reference.decode(z / 0.5).sample)


def test_names_go_to_diffusers_and_back(pair):
    reference, ours = pair
    there = to_diffusers(ours.state_dict())
    assert set(there) == set(reference.state_dict())
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in there.items())
    back = from_diffusers(there, scaling_factor=0.5)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in back.items())
    assert set(back) == set(ours.state_dict())
    before = {name.replace("to_out.0", "proj_attn").replace("to_q", "query"): value for name, value in there.items()}
    assert set(from_diffusers(before)) == set(back) - {"scale.mean", "scale.std"}


def test_unknown_names_are_refused_and_the_loss_of_a_checkpoint_is_left_out(pair):
    with pytest.raises(ValueError, match="no tensor of an autoencoder"):
        from_diffusers({"encoder.mid_block.resnets.0.time_emb_proj.weight": torch.zeros(1)})
    weights = pair[1].state_dict()
    scaled = from_compvis({**weights, "loss.logvar": torch.zeros(())}, scaling_factor=0.25)
    assert "loss.logvar" not in scaled and scaled["scale.std"].tolist() == [4.0] * 4


def test_published_size_of_kl_f8():
    with torch.device("meta"):
        model = AutoencoderKL()
        assert model.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 4, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert model.spec == LatentsSpec("latents", (4, 32, 32))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: Autoencoder(**TINY), (4, 4, 4)),
        (lambda: Autoencoder(**TINY, latent_dim=5, attn_resolutions=(8,)), (5,)),
        (lambda: AutoencoderKL(**TINY, attn_resolutions=(16, 4)), (4, 4, 4)),
        (lambda: VAE(**TINY, latent_dim=6), (6,)),
        (lambda: VAE(**TINY, latent_dim=6, scale="shared"), (6,)),
    ],
)
def test_the_contract(model, shape, images):
    torch.manual_seed(1)
    model = model()
    z = model.encode(images())
    assert model.spec == LatentsSpec("latents", shape) and z.shape == (2, *shape) and z.dtype == torch.float32
    assert model.decode(z).shape == (2, 3, 16, 16)
    out = model(images())
    torch.testing.assert_close(model.decode(z), out["reconstruction"], atol=1e-5, rtol=1e-5)
    sum(value.sum() for value in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_noise_is_an_argument(images):
    torch.manual_seed(2)
    for model in (VAE(**TINY, latent_dim=6), AutoencoderKL(**TINY)):
        noise = torch.randn(2, *model.spec.shape)
        out = model(images(), noise)
        expected = out["mean"] + torch.exp(0.5 * out["log_variance"]) * noise
        torch.testing.assert_close(out["latents"], expected)
        torch.testing.assert_close(model.encode(images(), noise), expected)
        with pytest.raises(ValueError, match="noise of shape"):
            model(images(), noise[:1])


def test_moments_are_clamped_as_published():
    mean, log_variance = moments(torch.tensor([[3.0, -100.0], [3.0, 100.0]]))
    assert log_variance.flatten().tolist() == [-30.0, 20.0]
    assert torch.equal(reparameterise(mean, log_variance, None), mean)


def test_the_latent_scale_is_what_was_measured():
    latents = torch.randn(50, 3, 4, 4, dtype=torch.float64) * torch.tensor([2.0, 0.5, 1.0]).view(3, 1, 1) + 1.5
    scale = LatentScale(3)
    torch.testing.assert_close(scale(latents), latents)
    parts = [latent_sums(part) for part in latents.split(20)]  # uneven, as from several ranks
    scale.measure(*(sum(column) for column in zip(*parts, strict=True)))
    scaled = scale(latents)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        scaled.std(dim=(0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(scale.inverse(scaled), latents)
    with pytest.raises(ValueError, match="that vary"):
        scale.measure(*latent_sums(torch.ones(4, 3)))
    assert set(Autoencoder(**TINY).state_dict()) >= {"scale.mean", "scale.std"}


def test_bad_sizes_are_refused():
    for wrong, message in (
        ({"image_size": 18}, "multiple of 4"),
        ({"attn_resolutions": (5,)}, r"among the resolutions of the levels, \[16, 8, 4\]"),
        ({"channel_mult": (1, 0)}, "at least 1"),
        ({"norm_groups": 3}, "groups that divide"),
        ({"channel_mult": 2}, "channel_mult must be a list"),
        ({"latent_channels": 0}, "latent_channels of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Autoencoder(**TINY | wrong)
    with pytest.raises(ValueError, match="'pixel' or 'shared'"):
        VAE(scale="both")


def test_tiles_of_what_sees_one_place_make_the_whole():
    z = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0))

    def decode(latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=4)

    for side, overlap in ((3, 1), (4, 2), (5, 0), (9, 3)):
        torch.testing.assert_close(decode_tiles(decode, z, side, overlap), decode(z))
    with pytest.raises(ValueError, match="0 <= overlap < side"):
        decode_tiles(decode, z, 2, 2)
    wide = torch.full((1, 4, 64, 64), 0.5, dtype=torch.float16)  # half has no room for the sums of wide fades

    def decode_wide(latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=16)

    torch.testing.assert_close(decode_tiles(decode_wide, wide, 48, 32), decode_wide(wide), atol=1e-2, rtol=0)
