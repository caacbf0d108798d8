"""VQ-GAN, its Gumbel form, and its loss against a discriminator equal the recorded outputs and gradients of
taming-transformers (see tests/parity)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity import record_vqgan as recorder

from kartina.layers.discriminator import PatchDiscriminator
from kartina.tokenizers.vqgan import VQGAN
from kartina.training.objectives import vqgan as objective
from kartina.training.objectives.dvae import uniform_kl
from kartina.training.objectives.vqvae import quantization

HERE = Path(__file__).parent


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Within 1e-5 in float32 and 1e-10 in float64, of the largest value where that is above 1."""
    assert ours.shape == theirs.shape
    bound = {torch.float32: 1e-5, torch.float64: 1e-10}[ours.dtype]
    assert np.abs(ours.detach().numpy() - theirs).max() <= bound * max(1.0, np.abs(theirs).max())


def recorded(kind):
    """What was recorded of it, and the seed."""
    with np.load(HERE / "data" / "parity" / "vqgan.npz") as file:
        return {name.removeprefix(f"{kind}_"): file[name] for name in file.files if name.startswith(kind)}, file["seed"]


def with_weights(network, data, seed):
    shapes = [tuple(map(int, text.split(","))) if text else () for text in data["shapes"].tolist()]
    network.load_state_dict(recorder.weights(data["names"].tolist(), shapes, int(seed)))
    return network


def tiny(kind):
    data, seed = recorded(kind)
    layout = {"image_size": 16, "width": 32, "channel_mult": (1, 2), "blocks_per_level": 1, "attn_resolutions": (8,)}
    model = VQGAN(**layout, num_codes=20, code_dim=6, latent_channels=6, quantizer=kind)
    return with_weights(model, data, seed), recorder.image(int(seed))


def close_gradients(network, data, prefix="gradient/"):
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert {f"{prefix}{name}" for name in gradients} == {name for name in data if name.startswith(prefix)}
    for name, gradient in gradients.items():
        close(torch.from_numpy(recorder.sample(gradient)), data[f"{prefix}{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["vector", "gumbel"])
def test_equals_the_recorded_taming_model(kind, dtype):
    """Of "gumbel" with the published draws: a hard forward, the gradient of the relaxation, and the KL."""
    data, _ = recorded(kind)
    model, pixels = (x.to(dtype) for x in tiny(kind))
    close(model.latents(pixels), data["latents"])
    codes = torch.from_numpy(data["codes"])
    assert torch.equal(model.encode(pixels), codes) and len(codes.unique()) > 3
    given = ()
    if kind == "gumbel":
        close(model.decode(codes), data["likeliest"])
        given = (torch.from_numpy(data["noise"]).to(dtype), recorder.TEMPERATURE)
    out = model(pixels, *given)
    decoded = out["reconstruction"]
    if kind == "gumbel":
        kl = float(uniform_kl(out["logits"]).mean())  # published with 1e-10 within the logarithm
        assert kl == pytest.approx(float(data["kl"]), rel=1e-6 if dtype == torch.float32 else 1e-8)
    close(decoded, data["decoded"])
    decoded.square().mean().backward()
    close_gradients(model, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["judged", "beside"])
def test_a_step_against_the_discriminator_equals_the_recorded_losses(kind, dtype):
    """PatchGAN with batch norm in training, the balance of equation 7, both losses and all gradients; of "beside" it
    judges each picture with the one that was to come back.

    The released code adds 1e-4 to the norm that it divides by, we 1e-6, as the equation has it; and its codebook has
    its weights on the other terms.
    """
    data, seed = recorded(kind)
    model, pixels = (x.to(dtype) for x in tiny("vector"))
    beside = (pixels,) if kind == "beside" else ()
    judge = PatchDiscriminator(in_channels=3 * (1 + len(beside)), width=recorder.WIDTH, depth=recorder.LAYERS)
    judge = with_weights(judge, data, seed + 5).to(dtype).train()
    share = (data["pull"] + 1e-6) / (data["pull"] + 1e-4)
    out, weight = model(pixels), torch.ones(2)
    again = out["reconstruction"]
    codebook, commitment = quantization(out["latents"], out["codewords"])
    (loss, count), scalars = objective.vqgan(
        again, pixels, recorder.WEIGHTS["codebook_weight"] * (commitment + 0.25 * codebook), out["codes"], 20, weight,
        fake_logits=judge(again, *beside), last_layer=model.last_layer,
        ramp=recorder.WEIGHTS["disc_weight"] * float(share),
        perceptual=recorder.distance(pixels, again).flatten(), perceptual_weight=recorder.WEIGHTS["perceptual_weight"],
    )  # fmt: skip
    close(loss / count, data["generator"])
    close(scalars["nll"], data["nll_loss"])
    close(scalars["fooling"], data["g_loss"])
    close(scalars["adaptive"] * recorder.WEIGHTS["disc_weight"] * float(share), data["d_weight"])
    (loss / count).backward()
    close_gradients(model, data, "of/")

    judge.zero_grad()
    (loss, count), _ = objective.hinge(judge(pixels, *beside), judge(again.detach(), *beside), weight)
    close(loss / count, data["discriminator"])
    (loss / count).backward()
    close_gradients(judge, data)
