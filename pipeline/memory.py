"""Pictures in micro-batches, and what can be done where memory does not suffice: smaller ones, then attention in
slices, then decoding in tiles.

It does not know how a picture is made.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..priors.unet import UNet
from ..tokenizers.autoencoder_kl import AutoencoderKL

_QUERIES = 1024
_PICTURES, _SIDE = 64, 128

Progress = Callable[[int, int], None]
T = TypeVar("T")


def in_batches(
    paint: Callable[[slice, Progress | None], list[T]],
    total: int,
    micro_batch: int,
    parts: dict[str, Any],
    progress: Progress | None,
) -> list[T]:
    """All that `paint` makes of so many items, of a slice of them at a time; a warning tells what was spared.

    progress: of all; `paint` is given that of its slice.
    """
    done: list[T] = []
    while len(done) < total:
        some = slice(len(done), min(total, len(done) + micro_batch))
        report = _share_of(progress, len(done) // micro_batch, -(-total // micro_batch))
        if (found := attempt(paint, some, report, parts)) is not None:
            done += found
        elif (count := some.stop - some.start) > 1:
            micro_batch = count // 2
            warnings.warn(f"out of memory with {count} pictures: going on with {micro_batch}", stacklevel=3)
    return done


def batch_of(prior: Any, image_size: int) -> int:
    """The pictures that are painted at once if nobody says: 64, and on a CPU no more than take the memory of 64 of 128
    pixels a side, for there a system that runs out of memory may end the program in place of telling it.
    """
    if next(prior.parameters()).device.type != "cpu":
        return _PICTURES
    return max(1, min(_PICTURES, _PICTURES * _SIDE**2 // image_size**2))


def attempt(
    paint: Callable[..., list[T]], some: slice, report: Progress | None, parts: dict[str, Any]
) -> list[T] | None:
    """What it makes, or None where memory does not suffice and can be spared."""
    try:
        return paint(some, report)
    except RuntimeError as error:
        from accelerate.utils.memory import should_reduce_batch_size  # slow to import

        if not should_reduce_batch_size(error) or (some.stop - some.start == 1 and not spare(parts)):
            raise
    torch.cuda.empty_cache()  # outside of the handler, which held on to what had been allocated
    return None


def _share_of(progress: Progress | None, number: int, batches: int) -> Progress | None:
    """The progress of one batch as a share of all of them."""
    if progress is None:
        return None
    return lambda done, steps: progress(number * steps + done, batches * steps)


def spare(parts: dict[str, Any]) -> bool:
    """Lets the parts of a diffusion model take less memory from now on, with a warning; whether more could be spared.

    First attention takes so many queries at a time, and guidance looks at one condition after the other, which changes
    no number but by rounding; then the decoder takes tiles of half the side, which changes pictures slightly: see
    `tokenizers.tiles`.
    """
    prior, tokenizer = parts.get("prior"), parts.get("tokenizer")
    if isinstance(prior, UNet) and not prior.sliced:
        slice_attention(parts, True)
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


def slice_attention(parts: dict[str, Any], sliced: bool) -> None:
    """Lets a diffusion prior take so many queries at a time, or all again."""
    if isinstance(prior := parts.get("prior"), UNet) and prior.sliced != sliced:
        prior.slice_attention(_QUERIES if sliced else None)
