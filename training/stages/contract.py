"""What the loop asks of a stage, and the few things that stages share.

It does not know any stage.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import reduce
from PIL.Image import Image
from torch import Tensor, nn

from ...layers import random
from ...layers.precision import full
from ...pipeline.images import grid, to_pil
from ...pipeline.recipe import Recipe
from ...tokenizers.captions import CaptionTokenizer
from ..run import Stage
from ..stream import NO_CAPTION, Batch, Source

IMAGES = 2048  # of which a stage takes its first codes, or the scale of its latents

Scalars = Mapping[str, Tensor | Callable[[], Tensor]]
Loss = tuple[tuple[Tensor, Tensor], Scalars]  # (loss_sum, count), scalars
Update = tuple[str, tuple[Tensor, Tensor], Scalars]
Updates = Iterator[Update]


def told(scalars: Scalars) -> dict[str, Tensor]:
    """As a line has them: functions are called."""
    return {name: x() if callable(x) else x for name, x in scalars.items()}


@dataclass(frozen=True)
class Knob:
    """A key of a stage's objective: a number in [low, high], or, where there are choices, one of these words.

    whole: without a fraction. grammar: it needs captions of a known grammar. anew: a share of the steps, after which
    codes begin anew. phase: a share of the steps, after which it learns otherwise. of: the key without which it says
    nothing.
    """

    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    grammar: bool = False
    anew: bool = False
    phase: bool = False
    of: str = ""
    choices: tuple[str, ...] = ()


# The share of merges that are left out of the words of captions in training, and that of the steps before it begins.
SPLIT_WORDS = {"bpe_dropout": Knob(high=0.9), "bpe_dropout_start": Knob(high=1, phase=True, of="bpe_dropout")}
# Of the steps: the share in which captions come in one wording of each meaning, and that up to which many do.
ONE_WORDING = {name: Knob(high=1, grammar=True, phase=True) for name in ("canonical", "canonical_end")}


class TrainingStage(ABC):
    """What is trained, against what, and with which losses. What a stage has no need for, it inherits as empty.

    part: the part of the recipe that it trains. beside: other parts that are trained along where the recipe has them,
    each by optimizers of its own, or all by those of the part where they are `joined` to its network; what is not among
    `exported` is left behind at the end (a discriminator). networks: all of these, by the name that
    `updates` yields. forward: their wrapped forms, set by the loop, through which all that trains must go. depends:
    what must be trained before. knobs: the keys of its objective. metrics: names of what validation tells, from
    `measure` or `summary`, the headline first; higher_is_better: of the headline. fewest: how few samples `measure` can
    be given in place of a batch, for want of memory, and still say the same; None where it sets all of a batch against
    each other. restart_step: None, or the step at which `restart` changes the weights and the optimizers begin anew.
    ramp_end: the step from which no weight of its objective rises any more, so that its loss may be compared. starts:
    of networks that learn from a later step on, that step. phases: steps at which its losses change for good. steady:
    whether its network is given tensors of few shapes alone, no numbers that change from step to step, so that it can
    be compiled. cached: what it reads of a cache, first what stands for the picture, then what else of it a part makes
    that it depends on (see `training.cache`); empty where it needs pictures. One that makes anew what a cache has but
    once reads less than its class.

    Every draw comes from `kartina.layers.random`, keyed by the run's seed, the step and the sample's global position;
    what is annealed is a function of the step, and what else must outlive a stop is a buffer of a network.
    """

    part: str
    depends: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    joined: bool = False
    cached: tuple[str, ...] = ()
    knobs: ClassVar[dict[str, Knob]]
    metrics: tuple[str, ...]
    higher_is_better: bool
    fewest: int | None = 1
    restart_step: int | None = None
    ramp_end: int = 0
    starts: Mapping[str, int] = {}
    phases: tuple[int, ...] = ()
    steady: bool = False

    def hold(self, network: Any, **beside: nn.Module) -> None:
        """The network of the part, and those that are trained beside it."""
        self.network = network
        self.networks: dict[str, nn.Module] = {self.part: network, **beside}
        self.forward: dict[str, Callable[..., Any]] = dict(self.networks)

    @classmethod
    def captioned(cls, recipe: Recipe) -> bool:
        """Whether it reads captions, by the own caption tokenizer or by that of a pretrained text encoder."""
        return "captions" in cls.needs(recipe) or (cls.part == "prior" and "text" in recipe.parts)

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Why a step of this recipe cannot be split in passes, or "" where it can.

        It cannot where a loss or a statistic compares the samples of a step. Over ranks the stage gathers these.
        """
        return ""

    @staticmethod
    def problem(recipe: Recipe, parts: dict[str, Any], config: Stage, model: Path) -> str:
        """Why the parts of a recipe and the stage's `config` are not of one system, and what to correct; "" where they
        are.

        parts: with or without weights. model: the model folder, in which there may be parts already.
        """
        return ""

    @classmethod
    def needs(cls, recipe: Recipe) -> tuple[str, ...]:
        """What of `depends` this recipe must have trained before."""
        return cls.depends

    @abstractmethod
    def updates(self, batch: Batch, step: int) -> Updates:
        """Yields (network, (loss_sum, count), scalars); the loop steps that network's optimizer and resumes.

        Scalars are means over the samples of a batch; one of the name `codes` holds counts (K,) of codes instead, which
        add up over all steps to the next line. One that takes time may be a function: it is called before the backward
        pass, `codes` of every step, others of one that writes a line. The names are a function of `step` alone. Where
        a step is skipped, for a number that is not finite, the loop does not resume. What is alive across a yield is
        kept for every micro-batch of a step.
        """

    @abstractmethod
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Values of each sample by name: numbers (B,), or statistics (B, ...) for `summary`, as counts of codes."""

    def summary(self, total: dict[str, Tensor], count: float) -> dict[str, Tensor]:
        """Numbers that samples have only together: of the statistics, added up over all `count` on all ranks."""
        return {}

    def preview(self, batch: Batch) -> Image | None:
        """What the part makes of the first samples of a batch; None where there is nothing to see."""
        return None

    def restart(self) -> None:  # noqa: B027 (most stages have nothing to do here)
        """See restart_step."""

    def replayed(self, config: Stage, before: int, step: int) -> int | None:
        """The step at which a phase would end again that is over at `step`, where the stage had `before` steps."""
        shares = [config.number(name, 0) for name, knob in self.knobs.items() if knob.phase]
        ends = [*self.phases, *(round(share * config.steps) for share in shares)]
        if self.restart_step is not None:
            ends.append(self.restart_step + 1)  # the step at which it begins anew is the last before what follows
        return next((end for end in ends if end * before / config.steps < step < end), None)

    def exported(self) -> dict[str, nn.Module]:
        """What the model folder gets, by the name of the part, the stage's own last."""
        return {self.part: self.network}

    def finish(self) -> None:  # noqa: B027
        """Measures what belongs to the part, and takes out of it what only training needs.

        Called on all ranks at the end, when the part has the weights that are shipped: averaged and rounded.
        """


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


def captions_of(batch: Batch) -> list[str]:
    """The captions of a batch. Raises ValueError where a sample that can be read was packed without one."""
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        if not caption and key not in batch.problems:
            raise ValueError(NO_CAPTION.format(f"the sample {key} was"))
    return batch.captions


def falling_share(config: Stage, knob: str, step: int | None) -> float:
    """1 up to the share `knob` of a stage's steps, then falling in a line to 0 at the share `knob`_end.

    None is no step of training, but validation: 0.
    """
    if step is None:
        return 0.0
    start = config.number(knob, 0) * config.steps
    end = max(start, config.number(f"{knob}_end", 0) * config.steps)
    return 1.0 if step < start else max(0.0, (end - step) / max(1.0, end - start))


def in_one_wording(
    source: Source, captions: list[str], config: Stage, seed: int, step: int | None, samples: Tensor
) -> list[str]:
    """Captions, those of the falling share `canonical` of the samples in the one wording of their meaning.

    captions: one for each of the samples (B,), then as many more of each, sample after sample.
    """
    share = falling_share(config, "canonical", step)
    if step is None or not share:
        return captions
    drawn = (random.uniform(seed, step, samples, (1,), "canonical wording")[:, 0] < share).tolist()
    rewrite = drawn + [draw for draw in drawn for _ in range(len(captions) // len(drawn) - 1)]
    return [source.canonical(c) if r else c for c, r in zip(captions, rewrite, strict=True)]


def read_captions(
    tokenizer: CaptionTokenizer, captions: list[str], config: Stage, seed: int, step: int | None, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens and lengths of captions, with a stage's `bpe_dropout` where `step` is one of training, not None, and not
    before the share `bpe_dropout_start` of them.

    captions: one for each of the samples (B,), then as many more of each, sample after sample.
    """
    rate = config.number("bpe_dropout", 0)
    if step is None or not rate or step < config.number("bpe_dropout_start", 0) * config.steps:
        return tokenizer.encode(captions)
    shape = (len(captions) // len(samples), tokenizer.context_length)
    draws = random.uniform(seed, step, samples, shape, "bpe dropout")
    return tokenizer.encode_with_dropout(captions, rate, torch.cat([draws[:, 0], draws[:, 1:].flatten(0, 1)]))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within it a network drops nothing out."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def contact_sheet(images: Tensor, captions: list[str] | None = None) -> Image:
    """images (B, 3, H, W) as one picture, eight in a row, enlarged to 128 pixels a side or more."""
    pictures = to_pil(images)
    return grid(pictures, columns=8, captions=captions, scale=max(1, 128 // pictures[0].width))


def pairs(*images: Tensor) -> Image:
    """Pictures (B, 3, H, W) each beside what became of it, as one picture."""
    return contact_sheet(torch.stack(images, 1).flatten(0, 1))


def reconstruct(network: Any, image: Tensor) -> Tensor:
    """Images (B, 3, H, W) as a tokenizer gives them back, in the range of the pixels."""
    return full(network.decode(network.encode(image))).clamp(-1, 1)


def psnr(again: Tensor, image: Tensor) -> Tensor:
    """dB of each image (B, 3, H, W), (B,), whose values span 2."""
    return -10 * torch.log10((again - image).square().mean(dim=(1, 2, 3)).clamp(min=1e-12) / 4)


def read_images(source: Source, positions: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """The images at these positions that can be read, in batches (B, 3, H, W) of at most 128, and of fewer where they
    are larger than 64 pixels a side: what encodes them does so whole, however few a device trains on.
    """
    for start in range(0, len(positions), 128):
        batch = source.read(positions[start : start + 128])
        side = batch.image.shape[-1]
        yield from batch.image[batch.weight > 0].to(device).split(max(1, min(128, 128 * 64**2 // side**2)))


def last_read(source: Source, end: int) -> range:
    """The `IMAGES` positions before `end`; where nothing was read yet, the first ones."""
    end = end or min(IMAGES, source.size or IMAGES)
    return range(max(0, end - IMAGES), end)


def over_ranks(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What turns a mean over a rank's samples, of this weight (B,), into the mean over those of all ranks.

    Gradients reach the own samples only, as if their mean were the whole one: the loop adds up what the ranks find.
    """
    count = full(weight).sum()
    share = count / reduce(count, "sum").clamp(min=1e-12)

    def average(mean: Tensor) -> Tensor:
        fixed = mean.detach()
        return reduce((share * fixed).contiguous(), "sum") + (mean - fixed)

    return average
