"""Optimizer groups, the learning-rate curve, and the moving average of the weights.

It does not know what is trained. All rates are functions of the optimizer step, never of the number of devices.
"""

import math

import torch
from torch import Tensor, nn

from .run import Optimizer


def build_optimizers(module: nn.Module, config: Optimizer) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of hidden layers if the recipe asks for it. Each group keeps its peak rate."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        hidden = parameter.ndim == 2 and not any(word in name for word in ("embedding", "head", "position"))
        (matrices if config.muon and hidden else others).append(parameter)
    decayed = [p for p in others if p.ndim >= 2]
    plain = [p for p in others if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, steps: int, config: Optimizer) -> float:
    """The share of the peak learning rate at a step in [0, steps): warm-up, plateau, then linear or cosine to zero."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    start = steps * (1 - config.decay)
    if step < start or config.decay == 0:
        return warm
    done = (step - start) / (steps - start)
    return warm * (1 - done if config.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class EMA:
    """Moving average of a module's floating tensors, in fp32; the decay warms up as min(decay, (1 + n) / (10 + n)).

    Parameters are matched by object at construction, so wrappers' name prefixes cannot make it a no-op.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = module.state_dict(keep_vars=True)
        self.average = {name: value.detach().clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One update; call once per real optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self.live.items():
            if value.is_floating_point():
                self.average[name].lerp_(value.detach(), 1 - decay)
            else:
                self.average[name].copy_(value)

    def state(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"average.{k}": v for k, v in self.average.items()}}

    def load(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(state[f"average.{name}"])  # type: ignore[arg-type]
