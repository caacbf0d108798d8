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

It does not know devices, optimizers or numbers of steps, nor what a pass is made of (`passes` does).
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from ..pipeline.recipe import Recipe, RecipeError
from .passes import PASSES, Setting, build_trained, frozen_parts


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
    """A part of the recipe, with what is trained along, of fake weights; call it within `fake`."""
    with unset_fake_temporarily(), torch.device("meta"):
        network = build_trained(recipe, part)
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
            "add it to PASSES in training/passes.py"
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
