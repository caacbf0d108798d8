"""What the stages of tokenizers that compare pictures by a network's features share.

B images.

It does not know the tokenizer, nor the networks: `training.features`.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..features import LOSSES
from ..run import Stage
from .contract import Knob


class Perceptual:
    """The perceptual distance of a stage, or none.

    perceptual: the features that pictures are compared by. perceptual_weight: of the distance, beside the mean absolute
    error of a value; 1 if the recipe says nothing, as published.
    """

    knobs: ClassVar = {"perceptual": Knob(choices=("none", *LOSSES)), "perceptual_weight": Knob()}

    def __init__(self, config: Stage, device: torch.device) -> None:
        name = config.word("perceptual", "none")
        if name == "none" and "perceptual_weight" in config.objective:
            raise ValueError(
                "stages.tokenizer.objective has a perceptual_weight, but no features to compare by; set perceptual to "
                f"{' or '.join(LOSSES)}, or leave it out"
            )
        self.weight = config.number("perceptual_weight", 1.0)
        self.network = LOSSES[name]().to(device) if name != "none" and self.weight else None

    def terms(self, again: Tensor, image: Tensor) -> dict[str, Tensor | float]:
        """What the objective takes: distances (B,) of reconstructions from their images (B, 3, H, W), and the weight.

        Empty where there are none.
        """
        if self.network is None:
            return {}
        return {"perceptual": self.network(again, image), "perceptual_weight": self.weight}
