"""Optimizer groups, the learning-rate curve, and the moving average of the weights.

It does not know what is trained. All rates are functions of the optimizer step, never of the number of devices.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from .parallel import like, whole
from .run import Optimizer

_STACK = 1 / 32  # of the work in one stack at most: more would leave too little to share among processes


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) as torch.optim.Muon computes it, with three additions: kernels too, without slow bfloat16, and
    each process does a share of the work.

    A kernel is the matrix (n_out, rest). Newton-Schulz runs in bfloat16, as published, with `bf16` and where the device
    multiplies it quickly, else in float32: elsewhere it took longer than the rest of a step; a CPU has small ones in
    float32 too. See `orthogonalise_all`; of a network that is divided over the processes each one gathers every matrix
    and does all of it, one at a time.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        bf16: bool = True,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients of the parameters, which every process has alike, and which it overwrites."""
        for group in self.param_groups:
            kept = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not kept:
                continue
            matrices, lr = self._momentum(kept, group["momentum"]), group["lr"]
            torch._foreach_mul_(kept, 1 - lr * group["weight_decay"])
            updates: Iterable[Tensor]
            if isinstance(kept[0], DTensor):
                updates = (orthogonalise(whole(matrix), self.bf16) for matrix in matrices)  # whole one at a time
            else:
                updates = orthogonalise_all(matrices, self.bf16)
            for parameter, matrix, update in zip(kept, matrices, updates, strict=True):
                wide = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.add_(like(update.view(parameter.shape), parameter), alpha=-lr * wide)

    def _momentum(self, parameters: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """The gradients with Nesterov's momentum, (n_out, rest), which take the place of the gradients.

        All at once: on a GPU each alone takes longer to launch than to compute.
        """
        gradients: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, averages, momentum)
        return [gradient.flatten(1) for gradient in gradients]


def orthogonalise_all(matrices: Sequence[Tensor], bf16: bool = True) -> list[Tensor]:
    """`orthogonalise` of each, by `stacks`; where there are several processes, all with the same matrices, each
    computes a share of the stacks.

    Each process then sends its share to the others, so that all hold the same numbers to the bit.
    """
    if not matrices:
        return []
    device, shapes = matrices[0].device, [matrix.shape for matrix in matrices]
    together = stacks(shapes)

    def solve(places: list[int]) -> Tensor:  # (N, A, B)
        if len(places) == 1:
            return orthogonalise(matrices[places[0]], bf16)[None]
        return orthogonalise(torch.stack([matrices[place] for place in places]), bf16)

    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        solved = [solve(places) for places in together]
    else:
        sizes = [(len(places), *shapes[places[0]]) for places in together]
        owners, here = shares(sizes, world), distributed.get_rank()
        load = [sum(math.prod(size) for size, of in zip(sizes, owners, strict=True) if of == i) for i in range(world)]
        own = [solve(places).flatten() for places, owner in zip(together, owners, strict=True) if owner == here]
        dtype = newton_schulz_dtype(device, bf16)
        sent = torch.zeros(max(load), dtype=dtype, device=device)  # of one length everywhere
        if own:
            sent[: load[here]] = torch.cat(own)
        found = sent.new_empty(world, len(sent))
        distributed.all_gather_into_tensor(found.view(-1), sent)
        at, solved = [0] * world, []
        for size, owner in zip(sizes, owners, strict=True):
            end = at[owner] + math.prod(size)
            solved.append(found[owner, at[owner] : end].view(size))
            at[owner] = end
    updates: dict[int, Tensor] = {}
    for places, stack in zip(together, solved, strict=True):
        updates |= dict(zip(places, stack.unbind(), strict=True))
    return [updates[place] for place in range(len(matrices))]


def stacks(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which matrices are orthogonalised at once: those of one shape, up to `_STACK` of the work of all.

    The product of small ones takes a GPU longer to launch than to compute: of the 139 of a U-Net of 3 million
    parameters they were 90 of the 220 milliseconds that a step took on an H200. A CPU core with bfloat16 has 24 of
    64 x 64 in a fifth of the time, 8 of 96 x 128 in a third. A stack is the same for any number of processes that hold
    the whole network, so that its numbers are rounded alike.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        alike.setdefault(tuple(shape), []).append(place)
    most, found = _STACK * sum(_work(shape) for shape in shapes), []
    for shape, places in alike.items():
        count = max(1, int(most / _work(shape)))
        found += [places[at : at + count] for at in range(0, len(places), count)]
    return found


def _work(shape: Sequence[int]) -> int:
    return max(shape) * min(shape) ** 2


def shares(shapes: Sequence[Sequence[int]], world: int) -> list[int]:
    """Which of so many processes orthogonalises each of some stacks (N, A, B); none then has much more to do.

    Counted as on a GPU: on a CPU small wide ones cost less.
    """
    costs = [count * _work(shape) for count, *shape in shapes]
    load, owners = [0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):  # the dearest first, each to the idlest
        owners[i] = min(range(world), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def orthogonalise(matrix: Tensor, bf16: bool = True, rounds: int = 5) -> Tensor:
    """(A, B) -> about U V^T of its singular value decomposition, by Newton-Schulz with Jordan's coefficients.

    (N, A, B) -> the same of each. A CPU computes small ones in float32, and wide ones of these `by_gram`, which takes
    about half the time.
    """
    dtype = newton_schulz_dtype(matrix.device, bf16)
    tall = matrix.shape[-2] > matrix.shape[-1]
    narrow, wide = sorted(matrix.shape[-2:])
    cpu = matrix.device.type == "cpu"  # where these were measured to be faster
    gram = cpu and narrow <= 128 and 2 * narrow <= wide
    x = matrix.to(torch.float32 if gram or (cpu and narrow <= 64) else dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = (by_gram if gram else newton_schulz)(x, rounds).to(dtype)
    return x.mT.contiguous() if tall else x


def newton_schulz(x: Tensor, rounds: int) -> Tensor:
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(rounds):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def by_gram(x: Tensor, rounds: int) -> Tensor:
    """The same, but each round is of (A, A): X X^T is followed, and X multiplied once, with the product of all rounds.

    rounds: at least 1. In float32, since in bfloat16 the small eigenvalues of X X^T would be rounded, below 0 too, from
    where they grow.
    """
    product = torch.addmm if x.ndim == 2 else torch.baddbmm

    def polynomial(gram: Tensor) -> Tensor:
        step = product(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        step.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        return step

    gram = x @ x.mT
    found = step = polynomial(gram)
    for _ in range(rounds - 1):
        gram = step @ gram @ step
        step = polynomial(gram)
        found = step @ found
    return found @ x


def newton_schulz_dtype(device: torch.device, bf16: bool = True) -> torch.dtype:
    """What `orthogonalise` gives, and computes in but for what is small, on a CPU."""
    return torch.bfloat16 if bf16 and fast_bf16(device) else torch.float32


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has arithmetic for bfloat16; without it, a CPU is many times slower in it than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def outer_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that meet what goes in or comes out: data, text, codes, latents.

    These are every embedding's, and those of the children and parameters that a module names in its `outer`.
    """
    found = set()
    for path, part in module.named_modules():
        outer = [name.split(".") for name in getattr(part, "outer", ())]
        for name, _ in part.named_parameters():
            if isinstance(part, nn.Embedding) or any(name.split(".")[: len(words)] == words for words in outer):
                found.add(f"{path}.{name}" if path else name)
    return found


def build_optimizers(module: nn.Module, config: Optimizer, bf16: bool = True) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for matrices and kernels of hidden layers if the recipe asks for it. A group keeps its peak.

    Hidden is what is not outer, see `outer_parameters`. What needs no gradient has no optimizer. bf16: see `Muon`.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    outer = outer_parameters(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim in (2, 4) and name not in outer
            (matrices if config.muon and hidden else others).append(parameter)
    decayed = [p for p in others if p.ndim >= 2]
    plain = [p for p in others if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon, weight_decay=config.weight_decay, bf16=bf16))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, steps: int, config: Optimizer, restart: int = 0) -> float:
    """The share of the peak learning rate at a step in [0, steps): warm-up, plateau, then linear or cosine to zero.

    restart: the step at which the warm-up begins: of a network that learns later, or of optimizers that begin anew.
    """
    warm = min(1.0, max(0, step - restart + 1) / config.warmup) if config.warmup else 1.0
    start = steps * (1 - config.decay)
    if step < start or config.decay == 0:
        return warm
    done = (step - start) / (steps - start)
    return warm * (1 - done if config.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class EMA:
    """Moving average of a module's floating tensors, in fp32; the decay warms up as min(decay, (1 + n) / (10 + n)).

    They are divided over processes all or none.

    Parameters are matched by object at construction, so wrappers' name prefixes cannot make it a no-op.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = module.state_dict(keep_vars=True)
        self.average = {name: value.detach().clone() for name, value in self.live.items()}
        self.leaping = [(path, part) for path, part in module.named_modules() if hasattr(part, "leapt")]

    @torch.no_grad()
    def update(self) -> None:
        """One update; call once per real optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        moving = [name for name, value in self.live.items() if value.is_floating_point()]
        averages, values = ([tensors[name] for name in moving] for tensors in (self.average, self.live))
        torch._foreach_lerp_(averages, values, 1 - decay)  # all at once: on a GPU each alone takes longer to launch
        for name in self.live.keys() - set(moving):
            self.average[name].copy_(self.live[name])

    @torch.no_grad()
    def leap(self) -> None:
        """Rows that `leapt` in a part of the module, as codes that began anew do, begin anew here too.

        Call it once a step, after all that changes the module, and before anything is saved.
        """
        for path, part in self.leaping:
            if part.leapt is not None:
                for name in (f"{path}.{row}".lstrip(".") for row in part.rows):
                    if name in self.live:
                        self.average[name][part.leapt] = self.live[name][part.leapt].to(self.average[name])
                part.leapt = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module holds the averaged weights."""
        live = {name: value.detach().clone() for name, value in self.live.items()}
        try:
            self._write(self.average)
            yield
        finally:
            self._write(live)

    def copy_to_network(self) -> None:
        """The module takes the averaged weights for good."""
        self._write(self.average)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in self.live.items():
            value.copy_(values[name])

    def state(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"average.{k}": v for k, v in self.average.items()}}

    def load(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(state[f"average.{name}"])  # type: ignore[arg-type]
