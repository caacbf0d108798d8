"""Optimizers: who gets Muon, and Muon on kernels."""

import pytest
import torch

from kartina.training.optim import EMA, Muon, build_optimizers, orthogonalise, rate
from kartina.training.run import Optimizer


def test_muon_gets_hidden_matrices_and_kernels_only():
    module = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(5, 4),
            "stem": torch.nn.Conv2d(3, 4, 3),
            "conv": torch.nn.Conv2d(4, 4, 3),
            "mlp": torch.nn.Linear(4, 4),
            "head": torch.nn.Linear(4, 5),
        }
    )
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    adamw, muon = build_optimizers(module, Optimizer(lr=1e-9, muon=0.02))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in (adamw, muon):
        optimizer.step()
    moved = {n for n, value in module.named_parameters() if (value - before[n]).abs().max() > 1e-4}
    assert moved == {"conv.weight", "mlp.weight"}
    for optimizer in (adamw, muon):
        optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_sees_a_kernel_as_a_matrix(memory_format):
    """Three steps equal torch's Muon on the kernel flattened to (n_out, rest), wherever the kernel's numbers lie."""
    start, gradients = torch.randn(6, 4, 3, 3), [torch.randn(6, 4, 3, 3) for _ in range(3)]
    kernel = torch.nn.Parameter(start.clone().to(memory_format=memory_format))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    ours, theirs = Muon([kernel], lr=0.02, weight_decay=0.1), torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.clone(memory_format=memory_format), gradient.flatten(1).clone()
        ours.step()
        theirs.step()
    # torch's Newton-Schulz runs in bfloat16, ours where that is quick, and the order of columns rounds differently.
    assert (kernel.flatten(1) - matrix).abs().max() < 2e-3
    assert (kernel - start).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    assert values.min() > 0.3 and values.max() < 1.3


def test_warm_up_begins_anew_where_the_optimizers_do():
    config = Optimizer(lr=1.0, warmup=10, decay=0.0)
    assert [rate(step, 100, config, restart=50) for step in (50, 59, 60)] == pytest.approx([0.1, 1.0, 1.0])


def test_averages_are_lent_to_the_module_and_taken_back():
    module = torch.nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    average = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    live = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, average)
    assert torch.equal(module.weight, live)
    ema.copy_to_network()
    assert torch.equal(module.weight, average)
