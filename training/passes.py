"""What one forward pass of a stage computes, on zeros: the networks that take part, and the loss of a micro-batch.

B samples, T text tokens, N codes, K number of codes.

It does not know what a pass costs: `footprint` counts that. A new kind of part is one function in PASSES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..pipeline.recipe import Recipe, build, is_frozen
from ..priors.caption_encoder import Captioned
from ..priors.condition import Condition
from .objectives import autoencoder as autoencoder_objective
from .objectives import autoencoder_kl as kl_objective
from .objectives import clip as clip_objective
from .objectives import dalle as dalle_objective
from .objectives import dvae as dvae_objective
from .objectives import vae as vae_objective
from .objectives import vqgan as vqgan_objective
from .objectives import vqvae as vqvae_objective


@dataclass
class Setting:
    """What a pass may use. forward: the trained network, wrapped. knobs: the objective's. world: number of devices."""

    recipe: Recipe
    network: Any
    forward: Callable[..., Any]
    knobs: dict[str, Any]
    world: int
    frozen: dict[str, Any] = field(default_factory=dict)
    flops: Callable[[], int] = int  # those counted so far
    frozen_flops: int = 0

    def run_frozen(self, part: str, method: str, *inputs: Tensor) -> Any:
        """A method of another, frozen part, on the inputs: without gradient or autocast, as the stages call it."""
        before = self.flops()
        with torch.no_grad():
            out = getattr(self.frozen[part], method)(*inputs)
        self.frozen_flops += self.flops() - before
        return out

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all devices, where a loss compares them; gradients reach the own ones."""
        return torch.cat([rows, *[rows.detach()] * (self.world - 1)])


def _dvae(setting: Setting, batch: int) -> Tensor:
    network, knobs = setting.network, setting.knobs
    image = torch.zeros(batch, 3, network.image_size, network.image_size)
    noise = torch.zeros(batch, *network.spec.shape, network.spec.vocabulary).permute(0, 3, 1, 2)  # (B, K, h, w)
    out = setting.forward(image, noise, 1.0)
    beta, squared = knobs.get("kl_weight", 6.6), knobs.get("squared", 0.0)
    return dvae_objective.dvae(out["parameters"], out["logits"], image, beta, torch.ones(batch), squared)[0][0]


def _dalle(setting: Setting, batch: int) -> Tensor:
    text = torch.zeros(batch, setting.network.text_length, dtype=torch.int64)
    size = setting.frozen["tokenizer"].image_size
    codes = setting.run_frozen("tokenizer", "encode", torch.zeros(batch, 3, size, size)).flatten(1)  # (B, N)
    text_logits, image_logits = setting.forward(text, codes)
    return dalle_objective.dalle(text_logits, image_logits, text, codes, torch.ones(batch))[0][0]


def _clip(setting: Setting, batch: int) -> Tensor:
    """Captions at their full length; in training they end with the longest of the batch."""
    network, wrong = setting.network, int(setting.knobs.get("wrong_captions", 0))
    image = torch.zeros(batch, 3, network.image_size, network.image_size)
    text = torch.zeros(batch * (1 + wrong), network.text_length, dtype=torch.int64)
    image_features, text_features, scale = setting.forward(image, text)
    own, others = text_features[:batch], text_features[batch:].unflatten(0, (batch, wrong)) if wrong else None
    total = batch * setting.world
    rows = setting.gathered(image_features), setting.gathered(own)
    others = None if others is None else setting.gathered(others)
    return clip_objective.clip(*rows, scale, torch.arange(total), others, torch.ones(total))[0][0]


def _image_of(setting: Setting, batch: int) -> tuple[Tensor, Tensor]:
    """An image of each sample, and the samples' weights."""
    size = setting.network.image_size
    return torch.zeros(batch, 3, size, size), torch.ones(batch)


def _autoencoder(setting: Setting, batch: int) -> Tensor:
    image, weight = _image_of(setting, batch)
    out = setting.forward(image)
    return autoencoder_objective.autoencoder(out["reconstruction"], image, weight)[0][0]


def _vae(setting: Setting, batch: int) -> Tensor:
    image, weight = _image_of(setting, batch)
    out = setting.forward(image, torch.zeros(batch, *setting.network.spec.shape))
    posterior = out["mean"], out["log_variance"]
    return vae_objective.vae(out["reconstruction"], out["log_scale"], image, *posterior, weight)[0][0]


def _vqvae(setting: Setting, batch: int) -> Tensor:
    image, weight = _image_of(setting, batch)
    out, codes = setting.forward(image), setting.network.spec.vocabulary
    quantized = out["latents"], out["codewords"], out["codes"], codes
    return vqvae_objective.vqvae(out["reconstruction"], image, *quantized, weight)[0][0]


def _vqgan(setting: Setting, batch: int) -> Tensor:
    """Without the discriminator, which takes a pass of its own."""
    image, weight = _image_of(setting, batch)
    out, codes = setting.forward(image), setting.network.spec.vocabulary
    terms = vqvae_objective.quantization(out["latents"], out["codewords"]) if "codewords" in out else None
    regular = torch.zeros(batch) if terms is None else terms[0] + 0.25 * terms[1]
    return vqgan_objective.vqgan(out["reconstruction"], image, regular, out["codes"], codes, weight)[0][0]


def _autoencoder_kl(setting: Setting, batch: int) -> Tensor:
    """Without the discriminator, which takes a pass of its own."""
    image, weight = _image_of(setting, batch)
    out = setting.forward(image, torch.zeros(batch, *setting.network.spec.shape))
    posterior = out["mean"], out["log_variance"]
    return kl_objective.autoencoder_kl(out["reconstruction"], image, *posterior, weight)[0][0]


def _unet(setting: Setting, batch: int) -> Tensor:
    """The squared error of a prediction. Latents and tokens are made in the step, where the recipe has what makes them;
    captions are as long as they may be.
    """
    trained, recipe, whole = setting.network, setting.recipe, torch.zeros(batch, dtype=torch.int64)
    network = trained.prior if isinstance(trained, Captioned) else trained
    x_t, image = torch.zeros(batch, network.in_channels, recipe.image_size, recipe.image_size), None
    if "tokenizer" in setting.frozen:
        size = setting.frozen["tokenizer"].image_size
        x_t = setting.run_frozen("tokenizer", "encode", torch.zeros(batch, 3, size, size))  # (B, C, h, w)
    if network.in_channels > x_t.shape[1]:
        image = torch.zeros(batch, network.in_channels - x_t.shape[1], *x_t.shape[2:])
    encoder = trained.text if isinstance(trained, Captioned) else setting.frozen.get("text")
    length = recipe.captions.context_length if encoder is None else encoder.text_length
    text, tokens, mask = torch.zeros(batch, length, dtype=torch.int64), None, None
    if isinstance(trained, Captioned):
        return setting.forward(x_t, whole, text).square().mean()
    if encoder is not None:
        tokens, mask = setting.run_frozen("text", "forward", text)
    elif network.context_dim:
        tokens = torch.zeros(*text.shape, network.context_dim)
    labels = None if network.num_classes is None else whole
    embedding = torch.zeros(batch, network.embedding_dim) if network.embedding_dim else None
    return setting.forward(x_t, whole, Condition(labels, tokens, mask, embedding, image)).square().mean()


# By kind: the frozen parts that the stage reads, and the loss of one micro-batch as the stage computes it.
PASSES: dict[str, tuple[tuple[str, ...], Callable[[Setting, int], Tensor]]] = {
    "dvae": ((), _dvae),
    "patch_dvae": ((), _dvae),
    "dalle": (("tokenizer",), _dalle),
    "unet": ((), _unet),
    "clip": ((), _clip),
    "autoencoder": ((), _autoencoder),
    "vae": ((), _vae),
    "vqvae": ((), _vqvae),
    "vqgan": ((), _vqgan),
    "autoencoder_kl": ((), _autoencoder_kl),
}
# By kind: the frozen parts that the stage reads too, where the recipe has them.
_IF_THERE: dict[str, tuple[str, ...]] = {"unet": ("tokenizer", "text")}


def frozen_parts(recipe: Recipe, part: str) -> tuple[str, ...]:
    """The parts of the recipe that the stage of a part reads, frozen."""
    kind = recipe.parts[part]["kind"]
    there = tuple(other for other in _IF_THERE.get(kind, ()) if other in recipe.parts)
    return PASSES[kind][0] + tuple(other for other in there if other not in trained_along(recipe, part))


def trained_along(recipe: Recipe, part: str) -> tuple[str, ...]:
    """The parts that the stage of a part trains with it, as one network: the text encoder of a diffusion prior."""
    takes = recipe.parts[part]["kind"] == "unet" and "text" in recipe.parts and not is_frozen(recipe, "text")
    return ("text",) if takes else ()


def build_trained(recipe: Recipe, part: str) -> Any:
    """What the stage of a part trains: the part, with what is trained along."""
    network = build(recipe, part)
    return Captioned(network, build(recipe, "text")) if trained_along(recipe, part) else network
