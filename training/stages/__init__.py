"""The stages, one file each, by the kind of the part that they train. `contract` says what a stage is.

They do not know optimizers or checkpoints, and of other devices only where a loss compares their samples.
"""

from typing import Any

from .autoencoder import AutoencoderStage
from .autoencoder_kl import AutoencoderKLStage
from .clip import CLIPStage
from .contract import Knob, TrainingStage, Update, told
from .dalle import DALLEStage
from .diffusion import DiffusionStage
from .dvae import DVAEStage
from .vae import VAEStage
from .vqgan import VQGANStage, VQLatentsStage
from .vqvae import VQVAEStage

STAGES: dict[str, Any] = {
    "autoencoder": AutoencoderStage,
    "vae": VAEStage,
    "vqvae": VQVAEStage,
    "vqgan": VQGANStage,
    "vq_latents": VQLatentsStage,
    "autoencoder_kl": AutoencoderKLStage,
    "dvae": DVAEStage,
    "patch_dvae": DVAEStage,
    "dalle": DALLEStage,
    "unet": DiffusionStage,
    "clip": CLIPStage,
}

__all__ = ["STAGES", "Knob", "TrainingStage", "Update", "told"]
