"""Record denoising-diffusion-pytorch into tests/data/parity/ddpm.npz (Ho 2020, arXiv:2006.11239): schedules, forward
process, posterior and losses, with learned variances too (Nichol 2021, arXiv:2102.09672).

Run by `make parity`, which installs what record_ddpm.txt names, without dependencies, into a folder of its own.

The network is not recorded: it is the tanh of x_t times a number, and for variances of another. It does not know of
kartina.
"""

from pathlib import Path

import numpy as np
import torch

SLOPES = 0.7, -0.4
SEED = 20200619
TIMES = (0, 1, 40, 99)
RECORD = Path(__file__).parent.parent / "data" / "parity" / "ddpm.npz"


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit pictures in [-1, 1] and noise, (4, 3, 8, 8) each, from numpy's legacy generator, and timesteps (4,)."""
    random = np.random.RandomState(seed)
    x_0 = (random.randint(256, size=(4, 3, 8, 8)) / 127.5 - 1).astype(np.float32)
    eps = random.standard_normal((4, 3, 8, 8)).astype(np.float32)
    return torch.from_numpy(x_0), torch.from_numpy(eps), torch.tensor(TIMES)


class Network(torch.nn.Module):
    """What their code asks of a network, and a function of x_t."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.channels, self.out_dim, self.self_condition, self.learned = 3, 6 if learned else 3, False, learned

    def forward(self, x: torch.Tensor, t: torch.Tensor, self_condition: object = None) -> torch.Tensor:
        out = torch.tanh(SLOPES[0] * x)
        return torch.cat([out, torch.tanh(SLOPES[1] * x)], dim=1) if self.learned else out


@torch.no_grad()
def record(path: Path) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion

    x_0, eps, t = inputs(SEED)
    found = {}
    for kind in ("linear", "cosine"):
        for name in ("pred_noise", "pred_x0", "pred_v"):
            shared = {"image_size": 8, "timesteps": 100, "beta_schedule": kind, "auto_normalize": False}
            for weighting in (False, True):
                theirs = GaussianDiffusion(Network(False), objective=name, min_snr_loss_weight=weighting, **shared)
                # The plain loss of another target than eps is weighted by them as well: as the error of eps.
                found[f"{kind}.{name}.{weighting}"] = theirs.p_losses(x_0, t, eps, loss_reduction="none")
        learned = LearnedGaussianDiffusion(Network(True), objective="pred_noise", **shared)
        found[f"{kind}.learned"] = learned.p_losses(x_0, t, eps, loss_reduction="none")
        found[f"{kind}.alpha_bar"] = theirs.alphas_cumprod
        found[f"{kind}.x_t"] = theirs.q_sample(x_0, t, eps)
        mean, variance, _ = theirs.q_posterior(x_0, found[f"{kind}.x_t"], t)
        found |= {f"{kind}.mean": mean, f"{kind}.variance": variance}
    np.savez_compressed(path, seed=SEED, **{name: value.numpy() for name, value in found.items()})


if __name__ == "__main__":
    record(RECORD)
