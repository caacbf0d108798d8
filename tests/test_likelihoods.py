"""The likelihoods of the VAE: levels of 8 bits, and a scale at its bound."""

import pytest
import torch

from kartina.training.objectives.vae import gaussian_nll, logistic_nll


def test_the_discretised_logistic_is_of_the_nearest_level():
    levels = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    at, log_scale = torch.zeros(1, 1, 16, 16), torch.tensor(-3.0)
    between = levels + torch.linspace(-0.003, 0.003, 256).view(1, 1, 16, 16)
    assert torch.equal(logistic_nll(between, at, log_scale), logistic_nll(levels, at, log_scale))


@pytest.mark.parametrize("nll", [gaussian_nll, logistic_nll])
def test_a_scale_below_its_bound_has_a_way_back_up(nll):
    """But none further down: of an exact reconstruction the bound says nothing more."""
    image = torch.zeros(1, 1, 2, 2) + 1 / 255  # a level
    for error, pulled in ((0.5, True), (0.0, False)):
        scale = torch.full((1,), -8.0, requires_grad=True)
        nll(image, image + error, scale).sum().backward()
        assert (scale.grad < 0).item() is pulled and (pulled or scale.grad.item() == 0)


@pytest.mark.parametrize("nll", [gaussian_nll, logistic_nll])
def test_a_scale_below_its_bound_has_the_same_gradient_in_passes(nll):
    """Of one shared scale: some values pull it up, others would not."""
    image, found = torch.zeros(4, 3, 2, 2) + 1 / 255, []
    location = image + torch.tensor([0.3, 0.0, 0.0, 0.0]).view(4, 1, 1, 1)
    for parts in (1, 2, 4):
        scale = torch.full((1, 1, 1, 1), -8.0, requires_grad=True)
        for one, other in zip(image.chunk(parts), location.chunk(parts), strict=True):
            nll(one, other, scale).sum().backward()
        found.append(scale.grad.item())
    assert found[0] < 0 and found == pytest.approx([found[0]] * 3)
