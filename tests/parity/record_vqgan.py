"""Record taming's VQ-GAN and its Gumbel form at a tiny size, and the two losses of a step against its discriminator,
outputs and gradients in float64, into tests/data/parity/vqgan.npz (Esser 2021, arXiv:2012.09841).

Run by `make parity`, which installs what record_vqgan.txt names, without dependencies, into a folder of its own. The
package imports parts of Lightning and omegaconf that a network does not use: `published` puts empty ones in their
place.

The weights are not recorded, only their names, shapes and the seed: `weights` makes them again from numpy's frozen
legacy generator. It does not know of kartina.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch

SIZES = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [8], "in_channels": 3}
SIZES |= {"resolution": 16, "z_channels": 6, "double_z": False, "dropout": 0.0}
CODES = {"n_embed": 20, "embed_dim": 6}
SEED = 20201217
KINDS = ("vector", "gumbel")
TEMPERATURE = 0.7  # of the relaxation of "gumbel"
LAYERS, WIDTH = 2, 4  # of the discriminator
WEIGHTS = {"disc_weight": 0.8, "perceptual_weight": 0.5, "codebook_weight": 1.5}


def weights(names: list[str], shapes: list[tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Normal weights of variance 1 / fan-in, gains near 1, biases of deviation 0.1, in the order of the names.

    Of a norm's running averages means are 0 and variances 1.
    """
    random = np.random.RandomState(seed)
    state = {}
    for name, shape in zip(names, shapes, strict=True):
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            state[name] = torch.ones(shape) if name.endswith("var") else torch.zeros(shape)
            continue
        value = random.standard_normal(shape) * (0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)
        value += 1 if len(shape) == 1 and name.endswith("weight") else 0
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def image(seed: int) -> torch.Tensor:
    """(2, 3, 16, 16) in [-1, 1]."""
    return torch.from_numpy(np.random.RandomState(seed + 1).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32))


def sample(gradient: torch.Tensor) -> np.ndarray:
    """Some 32 values of a gradient, evenly spread: the whole would be too much to keep."""
    return gradient.flatten()[:: max(1, gradient.numel() // 32)].numpy()


def published(kind: str) -> torch.nn.Module:
    """The published model at the tiny size with the weights of SEED."""
    parts = {
        "pytorch_lightning": {
            "LightningModule": torch.nn.Module,
            "LightningDataModule": object,
            "seed_everything": None,
        },
        "pytorch_lightning.trainer": {"Trainer": object},
        "pytorch_lightning.callbacks": dict.fromkeys(("ModelCheckpoint", "Callback", "LearningRateMonitor"), object),
        "pytorch_lightning.utilities": {"rank_zero_only": lambda function: function},
        "pytorch_lightning.utilities.distributed": {"rank_zero_only": lambda function: function},
        "omegaconf": {"OmegaConf": object},
        "torch._six": {"string_classes": (str, bytes)},
    }
    for name, contents in parts.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules.setdefault(name, module)
    from taming.models.vqgan import GumbelVQ, VQModel

    lossless = {"target": "torch.nn.Identity"}
    if kind == "vector":
        model = VQModel(SIZES, lossless, **CODES)
    else:
        model = GumbelVQ(SIZES, lossless, **CODES, temperature_scheduler_config=lossless)
    state = model.state_dict()
    model.load_state_dict(weights(list(state), [tuple(t.shape) for t in state.values()], SEED))
    return model


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """For the perceptual distance, whose network is not in the package: of means of 4x4 pixels, (B, 1, 1, 1)."""
    apart = torch.nn.functional.avg_pool2d(one - other, 4)
    return apart.square().mean(dim=(1, 2, 3), keepdim=True)


def judged(model: torch.nn.Module, pixels: torch.Tensor, kind: str) -> dict[str, np.ndarray]:
    """The published loss of `model` and of its discriminator in training, for these pixels.

    kind: "judged", or "beside" where each picture is judged with the one that was to come back, in 6 channels.
    """
    from taming.modules.losses import vqperceptual

    class Distance(torch.nn.Module):
        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return distance(one, other)

    vqperceptual.LPIPS = Distance
    sizes = {"disc_start": 0, "disc_num_layers": LAYERS, "disc_ndf": WIDTH}
    cond = pixels if kind == "beside" else None
    sizes |= {} if cond is None else {"disc_in_channels": 6, "disc_conditional": True}
    loss = vqperceptual.VQLPIPSWithDiscriminator(**sizes, **WEIGHTS).double().train()
    state = loss.discriminator.state_dict()
    loss.discriminator.load_state_dict(weights(list(state), [tuple(t.shape) for t in state.values()], SEED + 5))
    tables = {
        "names": np.array(list(state)),
        "shapes": np.array([",".join(map(str, t.shape)) for t in state.values()]),
    }
    model.zero_grad()
    decoded, codebook = model(pixels)
    last = model.get_last_layer()
    pictures = decoded if cond is None else torch.cat([decoded, cond], dim=1)
    (pull,) = torch.autograd.grad(-loss.discriminator(pictures).mean(), last, retain_graph=True)
    generator, log = loss(codebook, pixels, decoded, 0, 0, last_layer=last, cond=cond)
    generator.backward()
    tables |= {"generator": generator.detach().numpy(), "pull": pull.norm().numpy()}
    tables |= {name: log[f"train/{name}"].numpy() for name in ("d_weight", "g_loss", "nll_loss")}
    tables |= {f"of/{name}": sample(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    loss.zero_grad()
    discriminator, _ = loss(codebook, pixels, decoded, 1, 0, last_layer=last, cond=cond)
    discriminator.backward()
    tables |= {"discriminator": discriminator.detach().numpy()}
    tables |= {f"gradient/{name}": sample(p.grad) for name, p in loss.discriminator.named_parameters()}
    return {f"{kind}_{name}": values for name, values in tables.items()}


def record(path: Path) -> None:
    tables: dict[str, np.ndarray] = {}
    for kind in KINDS:
        model, pixels = published(kind).double(), image(SEED).double()
        state = model.state_dict()
        tables[f"{kind}_names"] = np.array(list(state))
        tables[f"{kind}_shapes"] = np.array([",".join(map(str, t.shape)) for t in state.values()])
        latents = model.quant_conv(model.encoder(pixels))
        tables[f"{kind}_latents"] = latents.detach().numpy()
        if kind == "vector":
            _, _, (_, _, codes) = model.quantize(latents)
            codes = codes.view(2, 8, 8)
            # The published forward, without a straight-through sum of its own: the decoder is what is compared.
            decoded = model(pixels)[0]
        else:
            logits = model.quantize.proj(latents)
            codes = logits.argmax(dim=1)
            torch.manual_seed(SEED)
            quantized, kl, _ = model.quantize(latents, temp=TEMPERATURE)
            tables["gumbel_kl"] = (kl / model.quantize.kl_weight).detach().numpy()
            torch.manual_seed(SEED)  # the draws once more, as torch.nn.functional.gumbel_softmax makes them
            noise = -torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
            tables["gumbel_noise"] = noise.detach().numpy()
            decoded = model.decode(quantized)
            # get_codebook_entry makes its one-hot codes in float32
            entry = model.quantize.embed(codes).permute(0, 3, 1, 2)
            tables["gumbel_likeliest"] = model.decode(entry).detach().numpy()
        decoded.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        tables |= {f"{kind}_decoded": decoded.detach().numpy(), f"{kind}_codes": codes.numpy()}
        tables |= {f"{kind}_gradient/{name}": sample(gradient) for name, gradient in gradients.items()}
        if kind == "vector":
            tables |= judged(model, pixels, "judged") | judged(model, pixels, "beside")
    np.savez_compressed(path, seed=SEED, **tables)


if __name__ == "__main__":
    record(Path(__file__).parent.parent / "data" / "parity" / "vqgan.npz")
