"""Every kind of tokenizer, and the discriminator, as a part: built from a recipe, exported, and loaded the same."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kartina.layers.conv import ResBlock, Up, group_norm
from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import Recipe, build
from kartina.priors.unet import UNet
from kartina.training import parallel

BODY = {"image_size": 16, "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 4}
VQGAN = {"kind": "vqgan", **BODY, "attn_resolutions": [8], "latent_channels": 6, "code_dim": 2, "num_codes": 15}
PARTS = {
    "autoencoder": {"kind": "autoencoder", **BODY},
    "flat": {"kind": "autoencoder", **BODY, "latent_dim": 7},
    "vae": {"kind": "vae", **BODY, "latent_dim": 7, "scale": "shared"},
    "vqvae": {"kind": "vqvae", "image_size": 16, "num_codes": 15, "code_dim": 2, "width": 8, "residual_width": 4},
    "vector": VQGAN,
    "ema": VQGAN | {"ema_decay": 0.9, "cosine": True},
    "gumbel": VQGAN | {"quantizer": "gumbel"},
    "vq_latents": VQGAN | {"kind": "vq_latents"},
    "fsq": VQGAN | {"quantizer": "fsq", "levels": [5, 3]},
    "kl": {"kind": "autoencoder_kl", **BODY},
    "dvae": {"kind": "dvae", "image_size": 16, "num_codes": 15, "width": 8, "init_width": 8, "num_groups": 3},
    "patch_dvae": {"kind": "patch_dvae", "image_size": 16, "num_codes": 15, "width": 8, "depth": 1},
}


def system(tokenizer: dict) -> Recipe:
    parts = {"tokenizer": tokenizer, "discriminator": {"kind": "patch", "width": 8, "depth": 1}}
    return Recipe(name="tests/parts", paper="none", image_size=16, parts=parts)


@pytest.mark.parametrize("name", PARTS)
def test_a_tokenizer_comes_back_as_it_was_exported(name, tmp_path):
    torch.manual_seed(0)
    recipe = system(PARTS[name])
    model = build(recipe, "tokenizer")
    if hasattr(model, "scale"):
        torch.nn.init.constant_(model.scale.std, 2.0)
    exported = checkpoint.export(model)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", exported)
    loaded = checkpoint.load_part(tmp_path, checkpoint.load_recipe(tmp_path), "tokenizer")
    model.load_state_dict(exported)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    z = model.eval().encode(image)
    assert torch.equal(loaded.encode(image), z) and loaded.spec == model.spec
    assert torch.equal(loaded.decode(z), model.decode(z))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("name", PARTS)
def test_bad_input_is_refused(name):
    model = build(system(PARTS[name]), "tokenizer")
    for bad, message in (
        (torch.zeros(1, 4, 16, 16), r"images of shape \(B, 3, 16, 16\)"),
        (torch.zeros(1, 3, 32, 16), r"images of shape \(B, 3, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"images of shape \(B, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating images"),
        (torch.full((1, 3, 16, 16), 255.0), r"\[-1, 1\], got values as large as 255"),
        (torch.full((1, 3, 16, 16), torch.nan), "nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(bad)
    shape = model.spec.shape
    shown = ", ".join(map(str, shape))
    if model.spec.kind == "codes":
        wrong = [
            (torch.zeros(1, *shape), f"int64 of shape .B, {shown}"),
            (torch.zeros(1, shape[0], 3, dtype=torch.int64), f"int64 of shape .B, {shown}"),
            (torch.full((1, *shape), 15), r"codes in \[0, 15\), got 15 to 15"),
            (torch.full((1, *shape), -1), "got -1 to -1"),
        ]
    else:
        message = f"floating latents of shape .B, {shown}"
        wrong = [(torch.zeros(1, *shape, dtype=torch.int64), message), (torch.zeros(1, *shape, 2), message)]
        wrong.append((torch.zeros(1, *shape[:-1], 3), message))
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.decode(bad)


def test_a_discriminator_is_a_part(tmp_path):
    recipe = system(PARTS["kl"])
    checkpoint.save_part(tmp_path, recipe, "discriminator", checkpoint.export(build(recipe, "discriminator")))
    judge = checkpoint.load_part(tmp_path, recipe, "discriminator")
    assert judge(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 6, 6)


@pytest.mark.parametrize("wrong", [{"channel_mult": [1, 2, 10**9]}, {"blocks_per_level": 10**6}, {"width": 2**30}])
def test_a_hostile_size_is_refused(wrong, tmp_path):
    recipe = system(PARTS["kl"])
    checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    with pytest.raises(checkpoint.ModelError, match="asks for more|cannot be built|does not fit"):
        checkpoint.load_part(tmp_path, system(PARTS["kl"] | wrong), "tokenizer")


@pytest.mark.parametrize("sides", [(6, 7), (12, 14)])  # few pixels and more
def test_up_is_nearest_upsampling_and_a_convolution(sides):
    torch.manual_seed(0)
    up, image = Up(5).double(), torch.randn(2, 5, *sides, dtype=torch.float64)
    with torch.no_grad():
        sampled = up(image)
    single = copy.deepcopy(up).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(single(image.float()).double(), sampled, rtol=0.05, atol=0.05)
    found = []
    for way in (up, lambda x: up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))):
        x = image.clone().requires_grad_()
        y = way(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, up.conv.weight.grad.clone(), up.conv.bias.grad.clone()))
        up.zero_grad()
    assert found[0][0].shape == (2, 5, 2 * sides[0], 2 * sides[1])
    assert (sampled - found[1][0]).abs().max() <= 1e-10
    assert all((ours - theirs).abs().max() <= 1e-10 for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("side", [8, 32])  # below 1,024 places and not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_the_same_in_both_memory_formats(dtype, side):
    torch.manual_seed(0)
    norm = group_norm(24, 8)
    torch.nn.init.normal_(norm.weight)
    plain = torch.randn(2, 24, side, side).to(dtype)
    found = []
    for x in (plain, plain.to(memory_format=torch.channels_last)):
        x = x.clone().requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    expected = F.group_norm(plain, 8, norm.weight, norm.bias, norm.eps)
    few = side == 8 and dtype == torch.bfloat16  # then they come out channel by channel
    assert found[1][0].is_contiguous(memory_format=torch.contiguous_format if few else torch.channels_last)
    for y, gradient in found:
        torch.testing.assert_close(y, expected)
        if side == 8 or dtype == torch.float32:
            torch.testing.assert_close(gradient, found[0][1])
        else:  # torch has another kernel for each format, whose sums are rounded otherwise
            assert (gradient - found[0][1]).abs().max() <= 0.01 * gradient.abs().max()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_cpu_trains_with_channels_last_and_in_bfloat16_with_contiguous_kernels(precision):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision=precision, num_processes=1, prepare_model=lambda network: network
    )
    sizes = dict(in_channels=3, width=8, channel_mult=[1, 2], blocks_per_level=1, attn_levels=[1], norm_groups=4)
    networks = build(system(PARTS["kl"]), "tokenizer"), UNet(**sizes, num_heads=2, context_dim=None)
    coder, unet = (parallel.prepare(network, accelerator, shard=False, recompute=False) for network in networks)
    kernels = [coder.encoder.mid[0].conv1.weight, coder.decoder.up[0].block[0].conv1.weight]
    kernels += [block.conv2.weight for block in unet.modules() if isinstance(block, ResBlock)]
    assert len(kernels) > 3 and all(kernel.is_contiguous() == (precision == "bf16") for kernel in kernels)
