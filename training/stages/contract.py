"""What the loop asks of a stage, and the few things that stages share.

It does not know any stage.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor, nn

from ...pipeline.images import grid, to_pil
from ..stream import Batch

Loss = tuple[tuple[Tensor, Tensor], dict[str, Tensor]]  # (loss_sum, count), scalars
Update = tuple[str, tuple[Tensor, Tensor], dict[str, Tensor]]
Updates = Iterator[Update]


@dataclass(frozen=True)
class Knob:
    """A key of a stage's objective: the values it may take, and whether it needs captions of a known grammar."""

    low: float = 0.0
    high: float = math.inf
    grammar: bool = False


class TrainingStage(Protocol):
    """A plain object that says what is trained, against what, and with which losses.

    part: the part of the recipe that it trains. networks: what is trained, by the name that `updates` yields: the part,
    and what is left behind at the end (a discriminator). forward: their wrapped forms, set by the loop, through which
    all that trains must go. depends: what must be trained before. knobs: the keys of its objective. coupled: its loss
    or its statistics compare the samples of a step, so that it gathers them over ranks and cannot be split in passes.
    metrics: names of what validation tells, from `measure` or `summary`, the headline first; higher_is_better: of the
    headline. restart_step: None, or the step at which `restart` changes the weights and the optimizers begin anew.
    cached: what it reads of a cache in place of pictures, all of it (see `training.cache`); empty where it needs
    pictures.

    Every draw comes from `kartina.layers.random`, keyed by the run's seed, the step and the sample's global position;
    what is annealed is a function of the step, and what else must outlive a stop is a buffer of a network.
    """

    part: str
    networks: dict[str, nn.Module]
    forward: dict[str, Callable[..., Any]]
    depends: tuple[str, ...]
    knobs: dict[str, Knob]
    coupled: bool
    metrics: tuple[str, ...]
    higher_is_better: bool
    restart_step: int | None
    cached: tuple[str, ...]

    def updates(self, batch: Batch, step: int) -> Updates:
        """Yields (network, (loss_sum, count), scalars); the loop steps that network's optimizer and resumes.

        The names are a function of `step` alone. Where a step is skipped, for a number that is not finite, the loop
        does not resume. What is alive across a yield is kept for every micro-batch of a step.
        """

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Values of each sample by name: numbers (B,), or statistics (B, ...) for `summary`, as counts of codes."""

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """Numbers that samples have only together: of the statistics, added up over all `count` on all ranks."""

    def preview(self, batch: Batch) -> Image | None:
        """What the part makes of the first samples of a batch; None where there is nothing to see."""

    def restart(self) -> None:
        """See restart_step."""


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Within it a network judges without being trained: gradients pass through it and stay out of its weights."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def contact_sheet(images: Tensor, captions: list[str] | None = None) -> Image:
    """images (B, 3, H, W) as one picture, eight in a row, enlarged to 128 pixels a side or more."""
    pictures = to_pil(images)
    return grid(pictures, columns=8, captions=captions, scale=max(1, 128 // pictures[0].width))
