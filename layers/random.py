"""Counter-based random draws: each number is a pure function of (seed, step, sample, stream, position).

A draw does not depend on the batch it stands in, on the rank that makes it, on what was drawn before it or on
recomputation, so a run is the same on any number of devices and a sample is the same at any batch size.
The bits are splitmix64 (Steele 2014, doi:10.1145/2660193.2660195) in wrapping int64 arithmetic, equal on CPU and GPU;
`normal` and `gumbel` pass them through log and cos, which devices may round differently in the last bit.

B samples.

It does not know what the numbers are used for: `stream` names the use, so that two uses never share draws.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_WORD = (1 << 64) - 1
_IN_CACHE = 2**17  # words


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)


def _stir(x: Tensor) -> Tensor:
    """`_mix` without its last step, which leaves the upper 31 bits as they are; in place."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_MIX_1)
    return x.bitwise_xor_(_shift(x, 27)).mul_(_MIX_2)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit words that avalanches; in place."""
    x = _stir(x)
    return x.bitwise_xor_(_shift(x, 31))


def _mix_word(word: int) -> int:
    """`_mix` of one word, as int64 has it: on a GPU a tensor of one takes as many launches as one of a million."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * (_MIX_1 & _WORD)) & _WORD
    word = ((word ^ (word >> 27)) * (_MIX_2 & _WORD)) & _WORD
    word ^= word >> 31
    return word - (1 << 64) if word >> 63 else word


def _keys(seed: int, step: int, samples: Tensor, stream: str) -> Tensor:
    """A word for each sample, (B,), from which those of its draws are counted."""
    if samples.dtype != torch.int64 or samples.dim() != 1:
        raise ValueError(
            f"random draws need samples as int64 of shape (B,), got {samples.dtype} of shape {tuple(samples.shape)}"
        )
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"random draws need a seed of 64 bits, got {seed}")
    key = 0
    for word in (seed, step, zlib.crc32(stream.encode())):
        key = _mix_word((key ^ word) + _GOLDEN)  # mixed after each word, else seed 0 at step 1 were seed 1 at step 0
    return _mix((samples ^ key) + _GOLDEN)


def _counted(keys: Tensor, first: int, last: int) -> Tensor:
    """The words that draws first to last - 1 of each sample are mixed from, (B, last - first)."""
    counter = torch.arange(first + 1, last + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    return keys[:, None] + counter[None, :]


def uniform(seed: int, step: int, samples: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """Uniform draws in the open interval (0, 1), float32 of shape (B, *shape).

    seed: of 64 bits. step: the optimizer or sampling step. samples: int64 (B,), the global numbers of the samples, or a
    seed for each. stream: the name of the use. Raises ValueError when `samples` is not int64 (B,), or
    for a seed of more bits.
    """
    return _drawn(_keys(seed, step, samples, stream), shape)


def _drawn(keys: Tensor, shape: tuple[int, ...], change: Callable[[Tensor], object] | None = None) -> Tensor:
    """What `uniform` gives, (B, *shape), after `change` in place.

    A CPU makes it in parts that fit its cache; on a GPU, and where shapes alone are counted, parts are more calls.
    """
    count = math.prod(shape)
    found = torch.empty(len(keys), count, device=keys.device, dtype=torch.float32)
    in_parts = keys.device.type == "cpu" and type(keys) is Tensor  # else it is a fake one
    size = max(1, _IN_CACHE // max(1, len(keys)) if in_parts else count)
    for first in range(0, count, size):
        part = found[:, first : first + size]
        # 23 bits: the largest value, 1 - 2**-24, still fits a float32 below 1.
        part.copy_(_shift(_stir(_counted(keys, first, first + part.shape[1])), 41)).add_(0.5).mul_(2.0**-23)
        if change is not None:
            change(part)
    return found.view(len(keys), *shape)


def normal(seed: int, step: int, samples: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """Standard normal draws (Box-Muller), float32 of shape (B, *shape). Arguments as in `uniform`."""
    u = uniform(seed, step, samples, (2, *shape), stream)  # (B, 2, *shape)
    return torch.sqrt(-2 * torch.log(u[:, 0])) * torch.cos(2 * math.pi * u[:, 1])


def gumbel(seed: int, step: int, samples: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """Standard Gumbel draws, -log(-log u), float32 of shape (B, *shape). Arguments as in `uniform`."""
    return _drawn(_keys(seed, step, samples, stream), shape, lambda u: u.log_().neg_().log_().neg_())


def integers(seed: int, step: int, samples: Tensor, shape: tuple[int, ...], stream: str, high: int) -> Tensor:
    """Integers in [0, high), int64 of shape (B, *shape); the bias is below high / 2**63. Arguments as in `uniform`."""
    if high < 1:
        raise ValueError(f"integers: the upper bound must be at least 1, got {high}")
    bits = _mix(_counted(_keys(seed, step, samples, stream), 0, math.prod(shape)))
    return _shift(bits, 1).remainder_(high).view(len(samples), *shape)


class Draws(NamedTuple):
    """What the masks of a forward pass are a function of; see `uniform`."""

    seed: int
    step: int
    samples: Tensor


def dropout(x: Tensor, rate: float, draws: Draws, stream: str) -> Tensor:
    """x (B, ...) with each value 0 at probability `rate`, else divided by 1 - rate (Srivastava 2014, JMLR 15)."""
    kept = uniform(*draws, tuple(x.shape[1:]), stream) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)
