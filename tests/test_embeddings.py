"""Rotary positions: what is turned by how much, and what the products then depend on."""

import math

import pytest
import torch

from kartina.layers.embeddings import rotate, rotation


def test_products_depend_on_how_far_apart_two_tokens_lie_on_each_axis():
    torch.manual_seed(0)
    q, k = torch.randn(16).expand(30, -1), torch.randn(16).expand(30, -1)
    places = torch.randint(40, (30, 2))
    turned = rotate(q, rotation(places, 16)) @ rotate(k, rotation(places, 16)).T  # (30, 30)
    moved = (
        rotate(q, rotation(places + torch.tensor([5, -3]), 16))
        @ rotate(k, rotation(places + torch.tensor([5, -3]), 16)).T
    )
    assert torch.allclose(turned, moved, atol=1e-4)
    assert turned.std() > 0.1
    for axis in (0, 1):  # and on both
        other = places.clone()
        other[:, axis] *= 2
        assert not torch.allclose(turned, rotate(q, rotation(other, 16)) @ rotate(k, rotation(other, 16)).T, atol=0.1)


def test_each_pair_turns_by_its_own_speed_and_keeps_its_length():
    x = torch.zeros(8)
    x[:4] = 1.0  # (1, 0) in each of four pairs: channel i with channel i + 4
    turned = rotate(x[None], rotation(torch.tensor([[2, 3]]), 8, base=100.0))[0]
    angles = torch.tensor([2.0, 2.0 / 10, 3.0, 3.0 / 10])  # 100 ** (-j / 2), j = 0, 1; rows, then columns
    assert torch.allclose(turned, torch.cat([angles.cos(), angles.sin()]), atol=1e-6)
    one = rotate(torch.ones(1, 2), rotation(torch.tensor([[1]]), 2))[0]
    assert torch.allclose(one, torch.tensor([math.cos(1) - math.sin(1), math.cos(1) + math.sin(1)]))


def test_a_head_too_narrow_for_the_axes_is_refused():
    with pytest.raises(ValueError, match="2 axes need a head width that 4 divides, got 6"):
        rotation(torch.zeros(3, 2), 6)
