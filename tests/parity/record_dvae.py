"""Record the published discrete VAE at a tiny size, in float64, and at its own, in float32, into
tests/data/parity/dvae.npz (Ramesh 2021, arXiv:2102.12092).

Run by `make parity`, which installs what record_dvae.txt names, without dependencies, into a folder of its own.

The weights are not recorded, only their names, shapes and the seed: `weights` makes them again from numpy's frozen
legacy generator. It does not know of kartina.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch

SIZES = {"n_hid": 8, "vocab_size": 64}
SEED = 20210224


def weights(names: list[str], shapes: list[tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Normal weights of variance 1 / fan-in and biases of standard deviation 0.1, in the order of the names."""
    random = np.random.RandomState(seed)
    scale = [0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5 for shape in shapes]
    values = [random.standard_normal(shape) * s for shape, s in zip(shapes, scale, strict=True)]
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in zip(names, values, strict=True)}


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (2, 3, 32, 32) in [0, 1] and weights over codes (2, 64, 4, 4)."""
    random = np.random.RandomState(seed + 1)
    image = random.uniform(size=(2, 3, 32, 32)).astype(np.float32)
    soft = random.dirichlet(np.full(64, 0.1), size=(2, 4, 4)).astype(np.float32).transpose(0, 3, 1, 2)
    return torch.from_numpy(image), torch.from_numpy(soft.copy())


def picture(seed: int) -> torch.Tensor:
    """(1, 3, 64, 64) in [0, 1], for the model at its own size."""
    return torch.from_numpy(np.random.RandomState(seed + 1).uniform(size=(1, 3, 64, 64)).astype(np.float32))


def published(whole: bool = False) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The published encoder and decoder, at the tiny size or the whole one, with the weights of SEED and SEED + 7."""
    from dall_e import Decoder, Encoder

    models = (Encoder(), Decoder()) if whole else (Encoder(**SIZES), Decoder(n_init=8, **SIZES))
    for model, seed in zip(models, (SEED, SEED + 7), strict=True):
        state = model.state_dict()
        model.load_state_dict(weights(list(state), [tuple(t.shape) for t in state.values()], seed))
    return models


def gradients(model: torch.nn.Module, given: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the outputs, weighted by numbers of the seed: the gradient of what is given, and by name of each weight."""
    model, given = model.requires_grad_(True), given.clone().requires_grad_(True)
    out = model(given)
    random = np.random.RandomState(SEED + 2)
    (out * torch.from_numpy(random.standard_normal(out.shape).astype(np.float32)).to(out)).sum().backward()
    return given.grad, {name: value.grad for name, value in model.named_parameters()}


def digest(gradient: torch.Tensor) -> np.ndarray:
    """Four sums of a gradient, each weighted by other numbers of the seed, and its largest size: (5,)."""
    random = np.random.RandomState(SEED + 3)
    flat = gradient.detach().double().flatten()
    sums = [float((flat * torch.from_numpy(random.standard_normal(len(flat)))).sum()) for _ in range(4)]
    return np.array([*sums, float(flat.abs().max())])


def at_its_own_size() -> dict[str, np.ndarray]:
    """Every 97th logit, all codes, the picture that they give back, and what the weights are made of again by."""
    from dall_e import map_pixels

    tables = {}
    encoder, decoder = published(whole=True)
    for half, model in (("encoder", encoder), ("decoder", decoder)):
        state = model.state_dict()
        tables[f"whole_{half}_names"] = np.array(list(state))
        tables[f"whole_{half}_shapes"] = np.array([",".join(map(str, t.shape)) for t in state.values()])
    logits = encoder(map_pixels(picture(SEED)))
    codes = logits.argmax(dim=1)
    one_hot = torch.nn.functional.one_hot(codes, logits.shape[1]).permute(0, 3, 1, 2).float()
    tables |= {"whole_logits": logits.flatten()[::97].numpy(), "whole_codes": codes.numpy()}
    return tables | {"whole_parameters": decoder(one_hot).numpy()}


@torch.no_grad()
def record(path: Path) -> None:
    from dall_e import map_pixels, unmap_pixels

    encoder, decoder = (model.double() for model in published())
    image, soft = (given.double() for given in inputs(SEED))
    # The published code asks for torch.float and torch.float32 by name, and makes these of all else.
    with mock.patch.multiple(torch, float=torch.float64, float32=torch.float64):
        with torch.enable_grad():
            found = [gradients(encoder, map_pixels(image)), gradients(decoder, soft)]
        logits, parameters = encoder(map_pixels(image)), decoder(soft)
        codes = logits.argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(codes, SIZES["vocab_size"]).permute(0, 3, 1, 2).double()
        decoded = unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
    tables = {}
    for half, model, (inner, own) in (("encoder", encoder, found[0]), ("decoder", decoder, found[1])):
        state = model.state_dict()
        tables[f"{half}_input_gradient"] = inner.numpy()
        tables[f"{half}_gradients"] = np.stack([digest(own[name]) for name in state])
        tables[f"{half}_names"] = np.array(list(state))
        tables[f"{half}_shapes"] = np.array([",".join(map(str, t.shape)) for t in state.values()])
    tables |= at_its_own_size()
    np.savez_compressed(
        path,
        seed=SEED,
        logits=logits.numpy(),
        parameters=parameters.numpy(),
        codes=codes.numpy(),
        decoded=decoded.numpy(),
        **tables,
    )


if __name__ == "__main__":
    record(Path(__file__).parent.parent / "data" / "parity" / "dvae.npz")
