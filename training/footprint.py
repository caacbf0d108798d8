"""What one forward and backward pass of a stage costs, counted without computing it: FLOPs and bytes.

The pass runs on fake tensors: they have shapes and dtypes but no values, so 12 billion parameters take no memory. They
behave as CPU tensors do under bfloat16 autocast; a GPU's autocast keeps a few more operations in float32.

- FLOPs: of matrix products, convolutions and attention, forward and backward, where a multiply-add is two. Attention
  counts every pair of places, masked or not, and in its backward pass also the scores that the kernel computes again.
  A frozen part counts forward only, since nothing flows back through it. Element-wise work is not counted.
- `saved`: bytes kept for the backward pass, each storage once, parameters left out. The low-precision copies of the
  weights that autocast makes are among them, and are the part that does not grow with the batch.
- `working`: the most bytes alive at any moment besides parameters and finished gradients; `alive`: with the gradients
  that are finished by then. Kernels' own workspace, the allocator's rounding and CUDA's context are not counted.

B samples, T text tokens, N codes, K number of codes.

It does not know devices, optimizers or numbers of steps. A new kind of part is one function in PASSES.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from ..pipeline.recipe import Recipe, RecipeError, build
from ..priors.condition import Condition
from .objectives import autoencoder as autoencoder_objective
from .objectives import autoencoder_kl as kl_objective
from .objectives import clip as clip_objective
from .objectives import dalle as dalle_objective
from .objectives import dvae as dvae_objective
from .objectives import vae as vae_objective
from .objectives import vqgan as vqgan_objective
from .objectives import vqvae as vqvae_objective


@shape_wrapper
def _attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


@shape_wrapper
def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_FORMULAS: dict[Any, Callable[..., int]] = {  # torch's own know a GPU's attention, and would pass by a CPU's
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


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
    """The squared error of a prediction. Latents and tokens are made in the step, where the recipe has what makes them,
    both frozen: a text encoder that is trained too takes more.
    """
    network, recipe, whole = setting.network, setting.recipe, torch.zeros(batch, dtype=torch.int64)
    x_t, image = torch.zeros(batch, network.in_channels, recipe.image_size, recipe.image_size), None
    if "tokenizer" in setting.frozen:
        size = setting.frozen["tokenizer"].image_size
        x_t = setting.run_frozen("tokenizer", "encode", torch.zeros(batch, 3, size, size))  # (B, C, h, w)
    if network.in_channels > x_t.shape[1]:
        image = torch.zeros(batch, network.in_channels - x_t.shape[1], *x_t.shape[2:])
    text = torch.zeros(batch, recipe.captions.context_length, dtype=torch.int64)
    tokens = torch.zeros(*text.shape, network.context_dim) if network.context_dim else None
    tokens, mask = setting.run_frozen("text", "forward", text) if "text" in setting.frozen else (tokens, None)
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
    return PASSES[kind][0] + tuple(other for other in _IF_THERE.get(kind, ()) if other in recipe.parts)


@dataclass(frozen=True)
class Footprint:
    """What `measure` counted: FLOPs of one micro-batch, bytes of it, and bytes of weights."""

    flops: int  # of the trained part, forward and backward
    frozen_flops: int  # of frozen parts, forward, in float32
    saved: int  # bytes kept for the backward pass
    saved_a_sample: float  # of these, what one more sample adds
    working: int  # see the module's legend
    alive: int
    frozen_weights: int


class _Counter(TorchDispatchMode):
    """FLOPs, and the bytes of storages that were made within it and are alive, with their peaks.

    modules: whose weights are left out.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.flops = self.bytes = self.gradients = self.alive = self.working = 0
        self.seen = _weights(modules)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.seen:
                self._add(tensor.untyped_storage())
        self.alive = max(self.alive, self.bytes)
        self.working = max(self.working, self.bytes - self.gradients)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.bytes += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size

    def finished(self, parameter: Tensor) -> None:
        """A hook: the gradient of a parameter is complete, and stays."""
        self.gradients += parameter.grad.untyped_storage().nbytes()  # type: ignore[union-attr]


def _weights(modules: list[nn.Module]) -> set[int]:
    return {_key(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def fake() -> Iterator[None]:
    """Within it tensors have no values, and take no memory."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def build_fake(recipe: Recipe, part: str) -> Any:
    """A part of the recipe with fake weights; call it within `fake`."""
    with unset_fake_temporarily(), torch.device("meta"):
        network = build(recipe, part)
    made: dict[int, Any] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    trained = isinstance(old, nn.Parameter)
                    made.setdefault(id(old), nn.Parameter(new, old.requires_grad) if trained else new)
                    table[name] = made[id(old)]
    return network


def measure(
    recipe: Recipe, part: str, network: Any, batch: int, world: int = 1, knobs: dict[str, Any] | None = None,
    bf16: bool = True,
) -> Footprint:  # fmt: skip
    """Counts one pass of a stage over `batch` samples; call it within `fake`, with a network of `build_fake`.

    Raises RecipeError for a kind that has no entry in PASSES, or a recipe without a part that the stage reads.
    """
    kind = recipe.parts[part]["kind"]
    if kind not in PASSES:
        raise RecipeError(
            f"parts.{part}: what a pass of the kind {kind!r} costs is not known, expected one of {', '.join(PASSES)}; "
            "add it to PASSES in training/footprint.py"
        )
    loss_of = PASSES[kind][1]
    outputs: list[Any] = []

    def forward(*inputs: Any) -> Any:  # as Accelerate wraps it: outputs come back in float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            outputs.append(convert_to_fp32(network(*inputs)))  # which a stage holds until the step is done
        return outputs[-1]

    setting = Setting(recipe, network, forward, knobs or {}, world)
    setting.frozen = {other: build_fake(recipe, other).requires_grad_(False) for other in frozen_parts(recipe, part)}
    modules = [network, *setting.frozen.values()]
    counter = _Counter(modules)
    setting.flops = lambda: counter.flops
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(counter.finished)
    with counter:
        with _saved(modules) as saved:
            loss = loss_of(setting, batch)
        loss.backward()
    frozen = setting.frozen_flops
    outputs.clear()
    with _saved(modules) as more:
        loss_of(setting, 2 * batch)
    weights = sum(tensor.nbytes for module in setting.frozen.values() for tensor in module.parameters())
    return Footprint(
        flops=counter.flops - frozen,
        frozen_flops=frozen,
        saved=sum(saved.values()),
        saved_a_sample=(sum(more.values()) - sum(saved.values())) / batch,
        working=counter.working,
        alive=counter.alive,
        frozen_weights=weights,
    )


@contextmanager
def _saved(modules: list[nn.Module]) -> Iterator[dict[int, int]]:
    """Collects the bytes of every storage that the forward pass keeps for the backward one, parameters left out."""
    weights = _weights(modules)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in weights:
            kept[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
