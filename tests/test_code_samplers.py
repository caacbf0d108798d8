"""Drawing codes: guidance by hand, and the order of temperature, top-k and top-p."""

import pytest
import torch

from kartina.layers.random import gumbel
from kartina.priors.code_samplers import draw, sample_codes, truncate


class Fixed:
    """A prior whose logits hang on the caption alone: row 0 of a table is of the null caption."""

    grid, num_codes = (1, 2), 4
    table = torch.tensor([[2.0, 0.0, 0.5, 0.0], [2.5, 2.0, 0.0, 1.9]])

    def null_text(self, batch):
        return torch.zeros(batch, 1, dtype=torch.int64)

    def next_logits(self, text, codes):
        return self.table[text[:, 0]]

    def prefill(self, text):
        return text, self.table[text[:, 0]]

    def step(self, cache, code, position):
        return self.table[cache[:, 0]]


@pytest.mark.parametrize(("scale", "code"), [(0.0, 0), (0.5, 0), (1.0, 0), (1.2, 0), (1.4, 1), (3.0, 1)])
def test_guidance_goes_away_from_the_null_caption(scale, code):
    """null + s (conditional - null): 2 + 0.5 s of code 0 and 2 s of code 1, equal at s = 4/3."""
    text = torch.ones(3, 1, dtype=torch.int64)
    for cached in (True, False):
        found = sample_codes(Fixed(), text, [1, 2, 3], temperature=0, guidance_scale=scale, use_cache=cached)
        assert found.unique().tolist() == [code]


def test_top_p_is_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert truncate(logits, top_k=2, top_p=0.5).isfinite().tolist() == [[True, False, False, False]]
    assert truncate(logits, top_k=2, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logits, top_p=0.5).isfinite().tolist() == [[True, True, False, False]]


def test_top_p_is_of_what_is_drawn_from():
    """At a temperature of 1/2 0.5, 0.3, 0.2 are 0.66, 0.24, 0.11."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    noise = gumbel(0, 0, torch.arange(4000), (3,), "test")
    for top_p, kept in ((0.6, {0}), (0.8, {0, 1}), (0.95, {0, 1, 2})):
        assert set(draw(logits, noise, 0.5, top_p=top_p).tolist()) == kept
    shares = torch.bincount(draw(logits, noise, 0.5, top_k=2), minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([25 / 34, 9 / 34, 0.0]), atol=0.03, rtol=0)
