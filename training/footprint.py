"""What the passes of a stage cost, forward and backward, counted without computing them: FLOPs and bytes.

They run on fake tensors: they have shapes and dtypes but no values, so 12 billion parameters take no memory. They
behave as CPU tensors do under bfloat16 autocast, but that captions are not padded for a CPU's attention; a GPU's
autocast keeps a few more operations in float32.

- FLOPs: of matrix products, convolutions and attention, forward and backward, where a multiply-add is two. Attention
  counts every pair of places, masked or not, and in its backward pass also the scores that the kernel computes again.
  Of frozen parts a perceptual network alone passes gradients on. Element-wise work is not counted.
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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from ..pipeline.recipe import Recipe
from .passes import Setting, prepare
from .run import Stage


def _attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# FLOPs by shapes: torch's own formulas know a GPU's attention, and would pass by a CPU's.
ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FORMULAS = {**flop_registry, **{product: shape_wrapper(formula) for product, formula in ATTENTION.items()}}


@dataclass(frozen=True)
class Footprint:
    """What `measure` counted of one update of a micro-batch: FLOPs and bytes."""

    flops: int  # of what is trained, forward and backward
    frozen_flops: int  # of frozen parts, in float32
    saved: int  # bytes kept for the backward pass
    saved_a_sample: float  # of these, what one more sample adds
    working: int  # see the module's legend
    alive: int


class _Counter(TorchDispatchMode):
    """FLOPs, and the bytes of storages that were made within it and are alive, with their peaks.

    modules: whose weights are left out.
    """

    def __init__(self, setting: Setting, modules: list[nn.Module]) -> None:
        super().__init__()
        self.setting, self.bytes = setting, 0
        self.seen, self.frozen = _weights(modules), _weights(list(setting.frozen.values()))
        self.begin()

    def begin(self) -> None:
        """The next update: what the last one left alive is alive still."""
        self.flops = self.frozen_flops = self.gradients = 0
        self.alive = self.working = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            count = formula(*args, **(kwargs or {}), out_val=out)
            frozen = self.setting.aside or any(isinstance(x, Tensor) and _key(x) in self.frozen for x in args)
            self.flops += 0 if frozen else count
            self.frozen_flops += count if frozen else 0
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


def prepare_fake(recipe: Recipe, part: str, config: Stage, world: int = 1, bf16: bool = True) -> Setting:
    """`passes.prepare` with fake weights; call it within `fake`."""
    with unset_fake_temporarily():
        setting = prepare(recipe, part, config, world, bf16, "meta")
    made: dict[int, Any] = {}
    for module in (module for network in _networks(setting) for module in network.modules()):
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    trained = isinstance(old, nn.Parameter)
                    made.setdefault(id(old), nn.Parameter(new, old.requires_grad) if trained else new)
                    table[name] = made[id(old)]
    return setting


def _networks(setting: Setting) -> list[nn.Module]:
    return [*setting.networks.values(), *setting.frozen.values()]


def measure(setting: Setting, batch: int, step: int) -> dict[str, Footprint]:
    """Counts each update of a step over `batch` samples, by what it trains; call it within `fake`."""
    modules = _networks(setting)
    counter = _Counter(setting, modules)
    parameters = [parameter for network in setting.networks.values() for parameter in network.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]  # a codebook may follow its latents
    hooks = [parameter.register_post_accumulate_grad_hook(counter.finished) for parameter in trained]
    more = list(_kept(setting, modules, 2 * batch, step))
    found: dict[str, Footprint] = {}
    with counter:
        for (name, loss, saved), (_, _, twice) in zip(_kept(setting, modules, batch, step), more, strict=True):
            loss.backward()
            found[name] = Footprint(
                flops=counter.flops,
                frozen_flops=counter.frozen_flops,
                saved=saved,
                saved_a_sample=(twice - saved) / batch,
                working=counter.working,
                alive=counter.alive,
            )
            for parameter in trained:
                parameter.grad = None
            counter.begin()
    for hook in hooks:
        hook.remove()
    return found


def _kept(setting: Setting, modules: list[nn.Module], batch: int, step: int) -> Iterator[tuple[str, Tensor, int]]:
    """The updates of a step: what is trained, its loss, and the bytes that are kept for the backward pass."""
    updates = setting.updates(batch, step)
    while True:
        with _saved(modules) as saved:
            update = next(updates, None)
        if update is None:
            setting.outputs.clear()
            return
        yield *update, sum(saved.values())


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
