"""One network on several devices: whole on each (DDP), or divided over them (FSDP2, arXiv:2304.11277).

FSDP2 is `torch.distributed.fsdp.fully_shard`, called here on CPU and GPU alike; Accelerate's plugin for it does nothing
on CPU. A divided network has DTensors for parameters, of which each device holds a part: weights, gradients, optimizer
and moving average take 1 / devices of their memory, and the weights of one block at a time are gathered to compute.

It does not know what is trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ..layers.attention import SpatialAttention
from ..layers.clip_transformer import CLIPBlock
from ..layers.conv import BottleneckBlock, ResBlock

_RESIDUAL = (BottleneckBlock, ResBlock, SpatialAttention, CLIPBlock)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered one at a time: the `blocks` of a network that says so, none elsewhere."""
    return list(getattr(network, "blocks", []))


def matrices_of(block: nn.Module) -> list[nn.Module]:
    """What autocast computes in bfloat16. Divided, they are gathered in it: of a weight that is gathered in float32 the
    backward pass keeps autocast's copy, and so in the end of all blocks at once.
    """
    return [part for part in block.modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def prepare(
    network: nn.Module, accelerator: Accelerator, shard: bool, recompute: bool, compiler: str = "none"
) -> Callable[..., Any]:
    """The form of a network through which it trains, with autocast as Accelerate has it.

    shard: divides it over the processes, in place, where it has blocks. recompute: the activations inside blocks are
    computed again in the backward pass instead of being kept (Chen 2016, arXiv:1604.06174). What is not divided is laid
    out by `lay_out`.

    compiler: of torch.compile, through which a network goes that is not divided. "cudagraphs": its passes are recorded
    and replayed at one stroke, for networks whose kernels take longer to launch than to compute. "inductor" writes
    kernels anew, which takes minutes. Each shape is compiled by itself, up to a limit of torch.
    """
    if recompute:
        recompute_blocks(network)
    divided = shard and blocks_of(network) and accelerator.num_processes > 1
    if not divided:
        lay_out(network, accelerator.device, accelerator.mixed_precision == "bf16")
        prepared = accelerator.prepare_model(network)
        return prepared if compiler == "none" else torch.compile(prepared, backend=compiler, dynamic=False)
    # Autocast alone: placing is left to fully_shard, so that no device ever holds the whole network.
    accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks_of(network):
        if accelerator.mixed_precision == "bf16" and (matrices := matrices_of(block)):
            fully_shard(matrices, mesh=mesh, mp_policy=half)
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)  # else the next step would compute with old weights
    for name in getattr(network, "sampling_methods", ()):
        register_fsdp_forward_method(network, name)
    return network


def lay_out(network: nn.Module, device: torch.device, bf16: bool) -> None:
    """On a CPU, parts with `layout_by_precision` get tensors with channels last, in bfloat16 contiguous ones, in place:
    the other layout is slower to train.
    """
    layout = torch.contiguous_format if bf16 else torch.channels_last
    for module in network.modules() if device.type == "cpu" else ():
        if getattr(module, "layout_by_precision", False):
            module.to(memory_format=layout)  # type: ignore[call-overload]


def recompute_blocks(network: nn.Module) -> None:
    """Activations inside blocks are computed again in the backward pass (see `prepare`), in place.

    The blocks are those of `blocks_of`; of the tokenizers and CLIP, which have none, their residual blocks.
    """
    for block in blocks_of(network) or [each for each in network.modules() if isinstance(each, _RESIDUAL)]:
        block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def is_sharded(network: nn.Module) -> bool:
    """Whether a network is divided over the processes."""
    return isinstance(network, FSDPModule)


def no_sync(network: Any, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Within it, gradients of a wrapped network add up on each device instead of being exchanged."""
    return _unsynchronised(network) if is_sharded(network) else accelerator.no_sync(network)


@contextmanager
def _unsynchronised(network: FSDPModule) -> Any:
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one, gathered from all processes if it is divided; then all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, divided as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def any_rank(here: bool, together: Accelerator | None) -> bool:
    """Whether it holds on any process; on this one where it stands alone."""
    if together is None:
        return here
    return bool(together.reduce(torch.tensor(float(here), device=together.device), reduction="sum") > 0)
