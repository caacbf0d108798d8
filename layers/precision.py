"""Where numbers stay in full precision, whatever autocast says around them.

It does not know which numbers need it.
"""

import contextlib

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast where `x` is; on meta, where shapes are probed, there is none."""
    quiet = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if quiet else contextlib.nullcontext()


def full(x: Tensor) -> Tensor:
    """The same in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def without_tf32() -> None:
    """From now on the convolutions of float32 on a GPU are of float32, as its products are: cuDNN's would be of TF32,
    which rounds to 10 bits, so that codes and pictures were others than in training.
    """
    torch.backends.cudnn.allow_tf32 = False
