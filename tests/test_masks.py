"""The masks of one stream, by brute force and by eye."""

import pytest
import torch

from kartina.layers import masks

TEXT, HEIGHT, WIDTH = 3, 4, 5


def _brute(rule) -> torch.Tensor:
    length = TEXT + HEIGHT * WIDTH
    table = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            table[q, k] = k < TEXT or rule(*divmod(q - TEXT, WIDTH), *divmod(k - TEXT, WIDTH))
    return table


RULES = {
    "row": lambda r, c, kr, kc: r == kr or (kr == r - 1 and kc >= c),
    "column": lambda r, c, kr, kc: c == kc,
    "conv": lambda r, c, kr, kc: abs(r - kr) <= 1 and abs(c - kc) <= 1,
}


def _made(name: str, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    extra = {"kernel": 3} if name == "conv" else {}
    return getattr(masks, name)(queries, keys, TEXT, WIDTH, **extra)


@pytest.mark.parametrize("name", RULES)
def test_mask_is_the_rule_for_every_pair(name: str) -> None:
    every = torch.arange(TEXT + HEIGHT * WIDTH)
    assert torch.equal(_made(name, every, every), _brute(RULES[name]))


@pytest.mark.parametrize("name", RULES)
def test_one_query_is_one_row_of_the_whole(name: str) -> None:
    every = torch.arange(TEXT + HEIGHT * WIDTH)
    whole = _made(name, every, every)
    for q in (0, TEXT, TEXT + 7):
        assert torch.equal(_made(name, every[q : q + 1], every[: q + 1]), whole[q : q + 1, : q + 1])


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        masks.conv(torch.arange(4), torch.arange(4), 1, 2, kernel=4)
