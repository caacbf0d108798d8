"""The stages, one file each, by the kind of the part that they train. `contract` says what a stage is.

They do not know optimizers or checkpoints, and of other devices only where a loss compares their samples.
"""

from typing import Any

from .clip import CLIPStage
from .contract import Knob, TrainingStage, Update
from .dalle import DALLEStage
from .dvae import DVAEStage

STAGES: dict[str, Any] = {
    "dvae": DVAEStage,
    "patch_dvae": DVAEStage,
    "dalle": DALLEStage,
    "clip": CLIPStage,
}

__all__ = ["STAGES", "Knob", "TrainingStage", "Update"]
