"""Record LPIPS of VGG16 as the package `lpips` computes it, distances and gradients in float64, into
tests/data/parity/lpips.npz (Zhang 2018, arXiv:1801.03924).

Run by `make parity`, which installs what record_lpips.txt names, without dependencies, into a folder of its own.
Weights are random, published ones are in no package: `weights` makes them again from numpy's frozen legacy generator.
It does not know of kartina.
"""

import os
from pathlib import Path

import numpy as np
import torch

SEED = 20180111
_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions among torchvision's `features`


def weights(seed: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The trunk's tensors by torchvision's names, as He 2015 starts them, and the heads' five weights above 0, (C,)."""
    random, trunk, n_in = np.random.RandomState(seed), {}, 3
    for place, n_out in zip(_PLACES, _WIDTHS, strict=True):
        weight = random.standard_normal((n_out, n_in, 3, 3)) * (2 / (9 * n_in)) ** 0.5
        trunk[f"features.{place}.weight"] = torch.from_numpy(weight.astype(np.float32))
        bias = 0.1 * random.standard_normal(n_out)
        trunk[f"features.{place}.bias"] = torch.from_numpy(bias.astype(np.float32))
        n_in = n_out
    heads = [random.uniform(0, 1, count).astype(np.float32) for count in (64, 128, 256, 512, 512)]
    return trunk, [torch.from_numpy(head) for head in heads]


def images(seed: int) -> torch.Tensor:
    """Two pairs, (2, 2, 3, 32, 32) in [-1, 1]: apart, and near each other."""
    random = np.random.RandomState(seed + 1)
    first, second = random.uniform(-1, 1, (2, 2, 3, 32, 32))
    second[1] = np.clip(first[1] + 0.05 * random.standard_normal(first[1].shape), -1, 1)
    return torch.from_numpy(np.stack([first, second]).astype(np.float32))


def record(path: Path) -> None:
    import lpips

    trunk, heads = weights(SEED)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    state = theirs.net.state_dict()
    assert len(state) == len(trunk)
    # Its slices keep the numbers of torchvision's layers: net.slice1.0 and so on.
    theirs.net.load_state_dict({name: trunk[f"features.{name.split('.', 1)[1]}"] for name in state})
    for head, values in zip(theirs.lins, heads, strict=True):
        head.model[-1].weight.data.copy_(values.view(1, -1, 1, 1))
    first, second = images(SEED).double()
    first.requires_grad_()
    found = theirs.double()(first, second).flatten()
    found.sum().backward()
    np.savez_compressed(path, seed=SEED, distances=found.detach().numpy(), gradient=first.grad.numpy())


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    record(Path(__file__).parent.parent / "data" / "parity" / "lpips.npz")
