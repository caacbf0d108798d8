"""What can be done where memory does not suffice for one picture: attention in slices, then decoding in tiles.

It does not know how pictures are put into batches.
"""

import warnings
from typing import Any

from ..priors.unet import UNet
from ..tokenizers.autoencoder_kl import AutoencoderKL

_QUERIES = 1024


def spare(parts: dict[str, Any]) -> bool:
    """Lets the parts of a diffusion model take less memory from now on, with a warning; whether more could be spared.

    First attention takes so many queries at a time, and guidance looks at one condition after the other, which changes
    no number but by rounding; then the decoder takes tiles of half the side, which changes pictures slightly: see
    `tokenizers.tiles`.
    """
    prior, tokenizer = parts.get("prior"), parts.get("tokenizer")
    if isinstance(prior, UNet) and not prior.sliced:
        prior.slice_attention(_QUERIES)
        warnings.warn(
            f"out of memory with one picture: attention takes {_QUERIES} queries at a time, guidance two passes",
            stacklevel=2,
        )
        return True
    if isinstance(tokenizer, AutoencoderKL) and tokenizer.tile is None:
        tokenizer.tile = max(1, min(tokenizer.spec.shape[1:]) // 2)
        warnings.warn("out of memory with one picture: decoding in tiles, which changes it slightly", stacklevel=2)
        return True
    return False
