"""The transformer block written out in float64, and the gradient of its squared ReLU."""

import pytest
import torch
from torch.nn import functional as F

from kartina.layers.attention import TransformerBlock, squared_relu


def test_the_squared_relu_and_its_gradient():
    x = torch.randn(5, 7, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(5, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad(squared_relu(x), x, upstream)
    (theirs,) = torch.autograd.grad(F.relu(x) ** 2, x, upstream)
    torch.testing.assert_close(squared_relu(x), F.relu(x) ** 2)
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(squared_relu, torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_())


def written_out(block: TransformerBlock, x: torch.Tensor, mlp: str, norm: str) -> torch.Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x)), causal, by the textbook."""

    def normed(layer, x):
        if norm == "layer":
            centred = x - x.mean(dim=-1, keepdim=True)
            y = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            return y * layer.weight + layer.bias
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    batch, length, width = x.shape
    heads, own = block.attention.num_heads, block.attention
    y = normed(block.attention_norm, x) @ own.qkv.weight.T + own.qkv.bias
    q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part in y.split(width, dim=-1))
    scores = (q @ k.mT) / (width // heads) ** 0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    seen = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + seen @ own.out.weight.T + own.out.bias
    y = normed(block.mlp_norm, x) @ block.mlp_in.weight.T + block.mlp_in.bias
    y = y * 0.5 * (1 + torch.erf(y / 2**0.5)) if mlp == "gelu" else y.clamp(min=0) ** 2
    return x + y @ block.mlp_out.weight.T + block.mlp_out.bias


@pytest.mark.parametrize(("mlp", "norm"), [("gelu", "layer"), ("squared_relu", "rms")])
def test_a_block_is_its_formula(mlp, norm):
    block = TransformerBlock(24, 3, mlp=mlp, norm=norm).double()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a swapped pair
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    torch.testing.assert_close(block(x), written_out(block, x, mlp, norm), rtol=1e-10, atol=1e-10)
