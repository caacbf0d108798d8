"""Wide linear maps: products in parts of columns, and their gradients."""

import pytest
import torch
from torch.nn import functional as F

from kartina.layers import linear

DOUBLE = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
@pytest.mark.parametrize(("wide", "high", "products"), [(4, 11, 4 + 2 + 2), (11, 4, 2 + 4 + 4), (11, 13, 5 + 4 + 4)])
def test_a_map_in_parts_and_its_gradients_are_those_of_torch(wide, high, products, frozen, monkeypatch):
    monkeypatch.setattr(linear, "_COLUMNS", 3)
    given = [torch.randn(*shape, **DOUBLE) for shape in ((2, wide, 5), (high, wide), (high,))]
    target, found, made = torch.randn(2, 5, high, **DOUBLE), [], []
    for how in (linear.wide_linear, F.linear):
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(given)]
        with monkeypatch.context() as patch:
            if how is linear.wide_linear:
                patch.setattr(torch, "mm", lambda *all, mm=torch.mm, **out: made.append(1) or mm(*all, **out))
            out = how(leaves[0].mT, *leaves[1:])  # rows that lie apart
            (out * target).sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves)])
    assert len(made) == products or frozen
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs)


def test_what_is_not_wide_is_torchs(monkeypatch):
    monkeypatch.setattr(linear._Linear, "apply", None)
    x, weight, bias = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    assert torch.equal(linear.wide_linear(x, weight, bias), F.linear(x, weight, bias))
