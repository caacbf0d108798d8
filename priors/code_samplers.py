"""Drawing codes from an autoregressive prior.

Gumbel-max: argmax(logits / temperature + gumbel) is a draw from softmax(logits / temperature). Each sample's Gumbel
numbers are a function of its own seed, the code's number and the code, so sample k is the same at any batch size.
Guidance is classifier-free (Ho 2022, arXiv 2207.12598) on logits; top-p is nucleus sampling (arXiv 1904.09751).

B samples, T text tokens, N = h * w codes, K number of codes.

It does not know how the prior was made, nor what the codes mean.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layers.random import gumbel


class CodePrior(Protocol):
    """What a prior must offer to be sampled here; see `DALLE`."""

    grid: tuple[int, int]
    num_codes: int

    def null_text(self, batch: int) -> Tensor: ...
    def next_logits(self, text: Tensor, codes: Tensor) -> Tensor: ...
    def prefill(self, text: Tensor) -> tuple[Any, Tensor]: ...
    def step(self, cache: Any, code: Tensor, position: int) -> Tensor: ...


@torch.no_grad()
def sample_codes(
    prior: CodePrior,
    text: Tensor,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    use_cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws one grid of codes for each caption, int64 (B, h, w) on the device of `text`.

    text: int64 (B, T); seeds: B ints, one for each sample. temperature: >= 0, where 0 takes the likeliest code.
    top_k, top_p: keep only the likeliest codes, see `truncate`. guidance_scale s: null + s * (conditional - null);
    1 is none and does not run the null caption. use_cache: False computes every step anew, to the same codes.
    progress: called with (codes drawn so far, N). Raises ValueError for knobs out of range, and for logits that are
    not numbers: their argmax would be codes like any others.
    """
    _check(len(text), seeds, temperature, top_k, top_p, guidance_scale)
    batch, total = len(text), prior.grid[0] * prior.grid[1]
    guided = guidance_scale != 1.0
    stream = torch.cat([text, prior.null_text(batch).to(text.device)]) if guided else text
    numbers = torch.tensor([int(s) for s in seeds], dtype=torch.int64, device=text.device)
    codes, sound = text.new_zeros(batch, total), torch.ones((), dtype=torch.bool, device=text.device)
    cache = None
    for i in range(total):
        if not use_cache:
            logits = prior.next_logits(stream, _twice(codes[:, :i], guided))
        elif i == 0:
            cache, logits = prior.prefill(stream)
        else:
            logits = prior.step(cache, _twice(codes[:, i - 1], guided), i - 1)
        given, logits = str(logits.dtype).removeprefix("torch."), logits.float()
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + guidance_scale * (conditional - null)
        sound &= ~logits.isnan().any()
        noise = gumbel(0, i, numbers, (prior.num_codes,), "gumbel")
        codes[:, i] = draw(logits, noise, temperature, top_k, top_p)
        if progress is not None:
            progress(i + 1, total)
    if not sound:  # asked once, for a GPU would wait for each answer
        raise ValueError(f"a prior over codes must give numbers, got NaN in {given}; take float32 or less guidance")
    return codes.view(batch, *prior.grid)


def draw(
    logits: Tensor, noise: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Gumbel-max: logits (B, K) and Gumbel numbers (B, K) give int64 (B,); at temperature 0 the argmax."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return (truncate(logits / temperature, top_k, top_p) + noise).argmax(dim=-1)


def truncate(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, K) with all but the kept ones at -inf.

    top_k keeps exactly min(top_k, K); top_p then keeps the fewest likeliest whose probability reaches top_p.
    """
    if top_k is None and top_p is None:
        return logits
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        values = values.masked_fill(torch.arange(values.shape[-1], device=values.device) >= top_k, -torch.inf)
    if top_p is not None and top_p < 1:
        share = values.softmax(dim=-1)
        before = share.cumsum(dim=-1) - share  # the probability of all that are likelier
        enough = before >= top_p
        enough[..., 0] = False
        values = values.masked_fill(enough, -torch.inf)
    return torch.empty_like(values).scatter_(-1, order, values)


def _twice(codes: Tensor, guided: bool) -> Tensor:
    return torch.cat([codes, codes]) if guided else codes


def _check(
    batch: int, seeds: Sequence[int], temperature: float, top_k: int | None, top_p: float | None, scale: float
) -> None:
    if len(seeds) != batch:
        raise ValueError(f"sample_codes: give one seed for each caption, expected {batch}, got {len(seeds)}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"sample_codes: temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample_codes: top_k must be at least 1, or None for all codes, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample_codes: top_p must be in (0, 1], or None for all codes, got {top_p}")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"sample_codes: guidance_scale must be finite and at least 0, got {scale}; 1 is no guidance")
