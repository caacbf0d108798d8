"""Packed layers: the same values as plain ones, at every shape, and back; painting by a loaded system."""

import copy

import pytest
import torch
from torch import nn

from kartina.layers.conv import SameConv2d, Up
from kartina.layers.linear import GEGLU
from kartina.layers.packed import Packed, known, pack, unpack
from kartina.pipeline.text_to_image import TextToImage

pytestmark = pytest.mark.skipif(not known(), reason="no such kernels here")
DTYPES = [torch.float32, *([torch.bfloat16] if known() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]

LAYERS = {
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1), (8, 9, 5)),
    "strided, grouped, without bias": (lambda: nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False), (8, 9, 5)),
    "1x1": (lambda: SameConv2d(8, 6, 1), (8, 4, 4)),
    "up": (lambda: Up(8), (8, 6, 4)),
    "large up": (lambda: Up(8), (8, 20, 20)),
    "linear": (lambda: nn.Linear(8, 6, bias=False), (7, 8)),
    "geglu": (lambda: GEGLU(8, 6), (7, 8)),
}


def tensors(layer: nn.Module) -> list[torch.Tensor]:
    return [tensor for module in layer.modules() for tensor in module._parameters.values() if tensor is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_a_packed_layer_computes_what_the_plain_one_does_at_any_shape_and_comes_back(name, dtype):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    plain = make().to(dtype)
    layer = copy.deepcopy(plain)
    pack(layer)
    exact = make().double()
    exact.load_state_dict(plain.state_dict())
    packed = not (name == "linear" and dtype == torch.float32)
    assert isinstance(layer, Packed) == packed
    for batch in (2, 5, 2):
        x = torch.randn(batch, *shape).to(dtype)
        off = (layer(x).double() - exact(x.double())).abs().max()
        assert off < (1e-5 if dtype == torch.float32 else 0.05)
        assert off <= 2 * (plain(x).double() - exact(x.double())).abs().max() + 1e-6
        assert any(tensor.is_mkldnn for tensor in tensors(layer)) == packed
    unpack(layer)
    assert type(layer) is type(plain) and list(layer.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_layers_that_the_kernels_do_not_know_stay_as_they_are():
    others = [
        nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3).double(), nn.Conv2d(3, 4, 3, device="meta"), nn.ConvTranspose2d(3, 4, 3), nn.Linear(3, 4),
    ]  # fmt: skip
    before = [type(layer) for layer in others]
    for layer in others:
        pack(layer)
    assert [type(layer) for layer in others] == before


@pytest.mark.parametrize("name", ["geglu", "conv", "up"])
@pytest.mark.parametrize("where", ["order", "restore"])
def test_weights_outlive_a_change_of_shape_that_fails(name, where, monkeypatch):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(2, *shape)
    plain = copy.deepcopy(layer)
    pack(layer)
    expected = layer(x)

    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(type(layer), where, fails)
        with pytest.raises(MemoryError):
            layer(torch.cat([x, x]))
    assert torch.equal(layer(x), expected)
    unpack(layer)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("name", ["shapes/stable-diffusion", "shapes/dalle"])
def test_a_loaded_system_is_packed_and_paints_the_same(name):
    system, plain = TextToImage.load(name, "cpu"), TextToImage.load(name, "cpu")
    for part in ("prior", "tokenizer"):
        unpack(plain.parts[part])
    many = [any(isinstance(m, Packed) for m in system.parts[part].modules()) for part in ("prior", "tokenizer")]
    assert many == [name == "shapes/stable-diffusion", True]
    caption, knobs = "a red ring on a blue background", {"num_steps": 3} if many[0] else {}
    ours, theirs = ((s(caption, **knobs)[0].image) for s in (system, plain))
    off = [abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)]
    assert max(off) <= 1 and sum(off) < len(off) / 50
