"""VQ-GAN and VQ-VAE: sizes, the contract, edges, equality with diffusers, and how often codes survive a round trip."""

import pytest
import torch

from kartina.pipeline.convert import from_diffusers, to_diffusers
from kartina.tokenizers.spec import CodesSpec, LatentsSpec
from kartina.tokenizers.vqgan import VQGAN, VQLatents
from kartina.tokenizers.vqvae import VQVAE
from kartina.training.objectives.vqvae import quantization, vqvae

TINY = {"image_size": 16, "num_codes": 20, "code_dim": 4, "latent_channels": 6, "width": 8, "norm_groups": 4}
TINY |= {"channel_mult": (1, 2), "blocks_per_level": 1, "attn_resolutions": (8,)}
SMALL = {"image_size": 16, "num_codes": 20, "code_dim": 4, "width": 8, "residual_width": 2}
MODELS = {
    "vector": lambda: VQGAN(**TINY),
    "ema": lambda: VQGAN(**TINY, ema_decay=0.9),
    "cosine": lambda: VQGAN(**TINY, cosine=True),
    "gumbel": lambda: VQGAN(**TINY, quantizer="gumbel"),
    "fsq": lambda: VQGAN(**TINY | {"num_codes": 3 * 5 * 4 * 2}, quantizer="fsq", levels=(3, 5, 4, 2)),
    "vqvae": lambda: VQVAE(**SMALL),
    "vqvae-ema": lambda: VQVAE(**SMALL, ema_decay=0.9, cosine=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_contract(name, images):
    torch.manual_seed(1)
    model = MODELS[name]()
    codes = model.encode(images())
    grid = 4 if name.startswith("vqvae") else 8
    assert model.spec == CodesSpec("codes", (grid, grid), 120 if name == "fsq" else 20)
    assert codes.shape == (2, grid, grid) and codes.dtype == torch.int64
    assert model.decode(codes).shape == (2, 3, 16, 16)
    out = model(images())
    assert torch.equal(out["codes"], codes)
    torch.testing.assert_close(model.decode(codes), out["reconstruction"], atol=1e-5, rtol=1e-5)
    loss = out["reconstruction"].square().sum() + sum(map(torch.sum, quantization(*terms(out))))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []


@pytest.mark.parametrize("quantizer", ["vector", "gumbel"])
def test_as_latents_the_quantizer_is_part_of_the_decoder(quantizer, images):
    torch.manual_seed(1)
    codes, latents = VQGAN(**TINY, quantizer=quantizer), VQLatents(**TINY, quantizer=quantizer)
    missing = latents.load_state_dict(codes.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["scale.mean", "scale.std"], [])
    latents.scale.mean += 0.3
    latents.scale.std *= 2.0
    z = latents.encode(images())
    assert latents.spec == LatentsSpec("latents", (4, 8, 8)) and z.shape == (2, 4, 8, 8)
    torch.testing.assert_close(z * 2 + 0.3, codes.latents(images()), atol=1e-5, rtol=1e-5)
    wanted = codes.decode(codes.encode(images()))
    torch.testing.assert_close(latents.decode(z), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents.decode(z + 1e-5), wanted, atol=1e-5, rtol=1e-5)  # nothing lies between codes
    torch.testing.assert_close(latents.scale(latents.posterior(images())[0]), z)
    with pytest.raises(ValueError, match="VQLatents needs floating latents"):
        latents.decode(codes.encode(images()))


def terms(out: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return out.get("latents", torch.zeros(1, 1, 1, 1)), out.get("codewords", torch.zeros(1, 1, 1, 1))


def test_published_sizes():
    with torch.device("meta"):
        small, large = VQGAN(), VQGAN(num_codes=16384)
        assert small.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 16, 16)
    assert sum(p.numel() for p in small.parameters()) == 72_141_699
    assert sum(p.numel() for p in large.parameters()) == 76_073_859


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vqgan_equals_diffusers_in_outputs_and_gradients(dtype, images, close):
    from diffusers import VQModel

    torch.manual_seed(0)
    reference = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=6,
        vq_embed_dim=4,
        num_vq_embeddings=20,
        sample_size=16,
    )
    for parameter in reference.parameters():  # gains and biases too, or a wrong name would not show
        torch.nn.init.normal_(parameter, std=0.25)
    ours = VQGAN(**TINY)
    ours.load_state_dict(from_diffusers(reference.state_dict()))
    assert set(to_diffusers(ours.state_dict())) == set(reference.state_dict())
    reference, ours, image = reference.to(dtype), ours.to(dtype), images().to(dtype)
    latents = reference.encode(image).latents
    sample = reference.decode(latents).sample
    codes = reference.quantize(latents)[2][2].view(2, 8, 8)
    out = ours(image)
    assert torch.equal(out["codes"], codes) and len(codes.unique()) > 3
    close(out["latents"], latents)
    close(out["reconstruction"], sample)
    # Its own loss has the commitment weight on the wrong term, so it is written out here.
    picked = reference.quantize.embedding(codes).permute(0, 3, 1, 2)
    regular = 0.25 * (picked.detach() - latents).square().mean() + (picked - latents.detach()).square().mean()
    (sample.square().mean() + regular).backward()
    codebook, commitment = quantization(out["latents"], out["codewords"])
    (out["reconstruction"].square().mean() + (codebook + 0.25 * commitment).mean()).backward()
    gradients = to_diffusers({name: p.grad for name, p in ours.named_parameters()})
    theirs = dict(reference.named_parameters())
    assert set(gradients) == set(theirs)
    for name, gradient in gradients.items():
        close(gradient, theirs[name].grad)


def test_gumbel_noise_is_an_argument(images):
    torch.manual_seed(1)
    model, noise = MODELS["gumbel"](), torch.randn(2, 20, 8, 8) * 10
    out = model(images(), noise, 0.5)
    assert torch.equal(out["codes"], (out["logits"] + noise).argmax(dim=1))
    assert not torch.equal(out["codes"], model.encode(images()))
    with pytest.raises(ValueError, match="'gumbel' alone"):
        MODELS["vector"]()(images(), noise)


@pytest.mark.parametrize("name", ["vector", "cosine", "vqvae", "vqvae-ema"])
def test_codes_start_as_centres_of_what_the_encoder_gives(name, images):
    torch.manual_seed(2)
    model = MODELS[name]()
    batches = [images(seed, 4) for seed in range(3)]
    model.start_codes(batches, seed=0)
    used = torch.cat([model.encode(batch).flatten() for batch in batches]).unique()
    assert len(used) == 20
    with pytest.raises(ValueError, match="k-means can start"):
        MODELS["fsq"]().start_codes(batches, seed=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VQGAN(**TINY, quantizer="lfq"), "'vector', 'gumbel' or 'fsq'"),
        (lambda: VQGAN(**TINY, quantizer="fsq", levels=(3, 5)), "num_codes their product"),
        (lambda: VQGAN(**TINY, levels=(3, 5)), "levels with quantizer 'fsq' alone"),
        (lambda: VQGAN(**TINY, quantizer="gumbel", cosine=True), "of quantizer 'vector'"),
        (lambda: VQVAE(**SMALL | {"image_size": 18}), "multiple of 2"),
        (lambda: VQVAE(**SMALL | {"width": 0}), "at least 1"),
    ],
)
def test_bad_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", MODELS)
def test_a_half_precision_model_paints_nearly_the_same(name, images):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    codes = torch.randint(model.spec.vocabulary, (2, *model.spec.shape))
    full = model.decode(codes)
    half = model.to(torch.bfloat16)
    assert (half.decode(codes).float() - full).abs().max() < 0.1
    assert half.encode(images()).shape == codes.shape


def test_vqvae_learns_a_few_flat_images():
    torch.manual_seed(6)
    model = VQVAE(**SMALL | {"width": 16, "residual_width": 16}, ema_decay=0.9)
    image = (torch.rand(4, 3, 1, 1) * 1.6 - 0.8).expand(4, 3, 16, 16).contiguous()
    model.start_codes([image + 0.01 * torch.randn(4, 3, 16, 16)], seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        out = model(image)
        found = out["latents"], out["codewords"], out["codes"]
        (total, count), _ = vqvae(out["reconstruction"], image, *found, 20, torch.ones(4), codebook_weight=0.0)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        model.quantize.update(*model.quantize.statistics(out["latents"], out["codes"], torch.ones(4)))
    error = (model.decode(model.encode(image)) - image).square().mean()
    assert error < 0.1 * image.var(dim=0).mean()
