"""What the stages of tokenizers with a discriminator share: when it learns, and when the tokenizer listens to it.

B images; what is judged are images, in h x w patches, or latents.

It does not know the tokenizer.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...layers.discriminator import PatchDiscriminator
from ...pipeline.recipe import Recipe, build
from ..run import Stage
from .contract import Knob, Loss, TrainingStage, Update, frozen


class Adversary:
    """The recipe's part "discriminator", or none where it has no such part.

    It learns from the share discriminator_start of the steps on. For the share discriminator_warmup of them the
    tokenizer does not listen yet; then the weight of its adversarial loss rises in a line, over the share
    discriminator_ramp, to discriminator_weight, times the adaptive weight where there is one. As published: warm-up and
    ramp 0. With parts.discriminator.in_channels of 6 each image is judged beside the one that was to come back
    (Isola 2017, arXiv:1611.07004, section 3.1). weight: discriminator_weight where the recipe says nothing. loss: the
    discriminator's, of its logits of what is real, those of what is not, and the weight (B,).
    """

    part = "discriminator"
    knobs: ClassVar = {
        "discriminator_weight": Knob(),
        "discriminator_start": Knob(high=1),
        "discriminator_warmup": Knob(high=1),
        "discriminator_ramp": Knob(high=1),
    }

    def __init__(
        self, recipe: Recipe, config: Stage, weight: float, device: torch.device, loss: Callable[..., Loss]
    ) -> None:
        self.network: nn.Module | None = None
        self.loss = loss
        if self.part in recipe.parts:
            self.network = build(recipe, self.part).to(device)
        elif wrong := config.objective.keys() & self.knobs.keys():
            raise ValueError(
                f"stages.tokenizer.objective has {', '.join(sorted(wrong))}, but the recipe no part 'discriminator'; "
                "add the part, or leave them out"
            )
        self.conditional = getattr(self.network, "in_channels", 3) == 6
        self.weight = config.number("discriminator_weight", weight)
        shares = [config.number(f"discriminator_{name}", default) for name, default in _DEFAULTS]
        self.start, warmup, self.rise = (round(share * config.steps) for share in shares)
        self.heard, self.steps = self.start + warmup, config.steps

    @classmethod
    def problem(cls, parts: Mapping[str, Any]) -> str:
        """Why the discriminator among the parts cannot judge the images of the tokenizer, and what to correct."""
        judge, side = parts.get(cls.part), parts["tokenizer"].image_size
        if judge is None:
            return ""
        if not isinstance(judge, PatchDiscriminator):
            return "it is judged by its images: expected parts.discriminator of kind patch; correct the recipe"
        if judge.in_channels not in (3, 6):
            return (
                f"parts.discriminator.in_channels: expected 3, or 6 to judge an image beside the one that was to come "
                f"back, got {judge.in_channels}; correct the recipe"
            )
        if side < judge.smallest:
            return (
                f"parts.discriminator of depth {judge.depth} judges images of at least {judge.smallest} pixels a side, "
                f"got {side}; choose a smaller depth"
            )
        return ""

    @classmethod
    def coupled(cls, recipe: Recipe, config: Stage) -> str:
        """Where the tokenizer listens: the adaptive weight is the whole batch's; and where there is a BatchNorm."""
        part = recipe.parts.get(cls.part, {})
        if part.get("kind") == "patch" and part.get("norm", "batch") == "batch":
            return "the BatchNorm of its discriminator is of a whole step"
        listens = part and config.number("discriminator_weight", 1) > 0
        return "the adaptive weight of its discriminator is of a whole step" if listens else ""

    def join(self, stage: TrainingStage, network: nn.Module) -> None:
        """Has a stage train its network and, where there is one, the discriminator."""
        if self.network is None:
            return stage.hold(network)
        stage.hold(network, **{self.part: self.network})
        stage.starts, stage.phases = {self.part: self.start}, (self.start, self.heard, self.heard + self.rise)
        stage.ramp_end = self.heard + self.rise if self.weight else self.steps

    def ramp(self, step: int) -> float:
        """The weight of the tokenizer's adversarial loss at a step, or what the adaptive weight is multiplied by."""
        if self.network is None or step < self.heard:
            return 0.0
        return self.weight * min(1.0, (step - self.heard + 1) / max(1, self.rise))

    def learns(self, step: int) -> bool:
        """Whether the discriminator takes this step."""
        return self.network is not None and step >= self.start

    def condition(self, image: Tensor) -> tuple[Tensor, ...]:
        """What is judged with what was made of an image: the image itself, or nothing."""
        return (image,) if self.conditional else ()

    def judge(self, *made: Tensor) -> Tensor:
        """Logits, (B, 1, h, w) of images, of what the tokenizer made; their gradients stay out of the discriminator."""
        assert self.network is not None
        with frozen(self.network) as judge:
            return judge(*made)

    def update(
        self, forward: Callable[..., Any], real: Tensor, fake: Tensor, weight: Tensor, *beside: Tensor
    ) -> Update:
        """The discriminator's own loss, of two tensors of one shape; beside: what each is judged with.

        One after the other, so that no statistics of a BatchNorm are of both.
        """
        loss, scalars = self.loss(*forward((real, fake.detach().to(real.dtype)), *beside), weight)
        return self.part, loss, scalars


_DEFAULTS = (("start", 0.0), ("warmup", 0.05), ("ramp", 0.1))
