"""What the stages of tokenizers share that compare pictures by their pixels and by a network's features.

B images.

It does not know the tokenizer, nor the networks: `training.features`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..features import LOSSES, distance
from ..objectives.weighting import ERRORS
from ..run import Stage
from .contract import Knob


class Likeness:
    """How a stage compares reconstructions with their images.

    error: of values, "l1" as published, or "l2". perceptual: the features that pictures are compared by, if any.
    perceptual_weight: of that distance, beside the mean error of a value; 1 if the recipe says nothing, as published.
    """

    knobs: ClassVar = {
        "error": Knob(choices=ERRORS),
        "perceptual": Knob(choices=("none", *LOSSES)),
        "perceptual_weight": Knob(),
    }

    def __init__(self, config: Stage, device: torch.device) -> None:
        name = config.word("perceptual", "none")
        if name == "none" and "perceptual_weight" in config.objective:
            raise ValueError(
                "stages.tokenizer.objective has a perceptual_weight, but no features to compare by; set perceptual to "
                f"{' or '.join(LOSSES)}, or leave it out"
            )
        self.error, self.weight = config.word("error", "l1"), config.number("perceptual_weight", 1.0)
        self.network = distance(name, device) if name != "none" and self.weight else None

    def terms(self, again: Tensor, image: Tensor) -> dict[str, Any]:
        """What the objective takes: the error, and distances (B,) of reconstructions from their images (B, 3, H, W)
        with their weight, if there are any.
        """
        terms: dict[str, Any] = {"error": self.error}
        if self.network is None:
            return terms
        return terms | {"perceptual": self.network(again, image), "perceptual_weight": self.weight}
