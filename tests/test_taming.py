"""VQ-GAN and its Gumbel form equal the recorded outputs and gradients of taming-transformers (see tests/parity)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from kartina.tokenizers.vqgan import VQGAN

HERE = Path(__file__).parent


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Within 1e-5 in float32 and 1e-10 in float64, of the largest value where that is above 1."""
    assert ours.shape == theirs.shape
    bound = {torch.float32: 1e-5, torch.float64: 1e-10}[ours.dtype]
    assert np.abs(ours.detach().numpy() - theirs).max() <= bound * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["vector", "gumbel"])
def test_equals_the_recorded_taming_model(kind, dtype):
    """Of "gumbel" with the published draws: a hard forward, and the gradient of the relaxation."""
    spec = importlib.util.spec_from_file_location("record_vqgan", HERE / "parity" / "record_vqgan.py")
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    with np.load(HERE / "data" / "parity" / "vqgan.npz") as file:
        data = {name.removeprefix(f"{kind}_"): file[name] for name in file.files if name.startswith(kind)}
        seed = int(file["seed"])
    shapes = [tuple(map(int, text.split(","))) for text in data["shapes"].tolist()]
    layout = {"image_size": 16, "width": 32, "channel_mult": (1, 2), "blocks_per_level": 1, "attn_resolutions": (8,)}
    model = VQGAN(**layout, num_codes=20, code_dim=6, latent_channels=6, quantizer=kind)
    model.load_state_dict(recorder.weights(data["names"].tolist(), shapes, seed))
    model, pixels = model.to(dtype), recorder.image(seed).to(dtype)
    close(model.latents(pixels), data["latents"])
    codes = torch.from_numpy(data["codes"])
    assert torch.equal(model.encode(pixels), codes) and len(codes.unique()) > 3
    given = ()
    if kind == "gumbel":
        close(model.decode(codes), data["likeliest"])
        given = (torch.from_numpy(data["noise"]).to(dtype), recorder.TEMPERATURE)
    decoded = model(pixels, *given)["reconstruction"]
    close(decoded, data["decoded"])
    decoded.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {f"gradient/{name}" for name in gradients} == {name for name in data if name.startswith("gradient/")}
    for name, gradient in gradients.items():
        close(torch.from_numpy(recorder.sample(gradient)), data[f"gradient/{name}"])
