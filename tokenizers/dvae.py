"""Discrete VAE with a Gumbel-softmax relaxation (Ramesh 2021, arXiv:2102.12092, section 2.1 and appendix A; the
relaxation of Jang 2016, arXiv:1611.01144, and Maddison 2016, arXiv:1611.00712). The defaults are the published model.

B images of 3 x H x W pixels in [-1, 1], K codes on a grid of h x w; a code covers 2 ** (num_groups - 1) pixels a side.

It does not know its loss, its schedules or where the Gumbel noise comes from: the noise is an argument.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.conv import BottleneckBlock, SameConv2d
from ..layers.linear import wide_linear
from ..layers.precision import full, without_autocast
from .kmeans import kmeans
from .spec import CodesSpec, check_image

PIXEL_MARGIN = 0.1
_ENCODER_KERNELS = (3, 3, 3, 1)
_DECODER_KERNELS = (1, 3, 3, 3)
_BLOCK = 64


def map_pixels(image: Tensor) -> Tensor:
    """[-1, 1] -> [0.1, 0.9]: keeps logit(x) finite (appendix A.3, eps = 0.1, stated there for pixels in [0, 1])."""
    return (1 - 2 * PIXEL_MARGIN) * (image + 1) / 2 + PIXEL_MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, without a clamp: (0, 1) -> (-1.25, 1.25), of which [-1, 1] are pixels."""
    return 2 * (mapped - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN) - 1


def _full_precision(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The 1x1 convolutions beside the codes stay in float32 under autocast, as in the paper: (B, C, h, w) -> the same.

    Written as a linear map over channels: on CPU the float32 convolution's backward pass is many times slower.
    """
    with without_autocast(x):
        bias = None if conv.bias is None else full(conv.bias)
        y = wide_linear(full(x).permute(0, 2, 3, 1), full(conv.weight).flatten(1), bias)  # (B, h, w, C)
    return y.permute(0, 3, 1, 2)


def _groups(
    widths: list[int], blocks: int, kernels: tuple[int, ...], gain: float | None, upsample: bool = False
) -> nn.ModuleList:
    """Groups of blocks; widths: the input width, then the width of each group. gain: see `DiscreteVAE`.

    upsample: every group but the first doubles H and W on entry.
    """
    gain = 1 / ((len(widths) - 1) * blocks) ** 2 if gain is None else gain
    return nn.ModuleList(
        nn.Sequential(
            *(BottleneckBlock(b if i else a, b, kernels, gain, upsample and g > 0 and i == 0) for i in range(blocks))
        )
        for g, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    )


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, K, h, w): 7x7 stem, groups with 2x2 max-pooling between, 1x1 head."""

    outer = ("stem", "head")

    def __init__(
        self, num_codes: int, width: int, num_groups: int, blocks_per_group: int, gain: float | None = None
    ) -> None:
        super().__init__()
        widths = [width, *(width * 2**i for i in range(num_groups))]
        self.stem = SameConv2d(3, width, 7)
        self.groups = _groups(widths, blocks_per_group, _ENCODER_KERNELS, gain)
        self.head = SameConv2d(widths[-1], num_codes, 1)

    def forward(self, mapped: Tensor) -> Tensor:
        x = self.stem(mapped.to(self.stem.weight.dtype))
        for i, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if i else x)
        return _full_precision(self.head, F.relu(x))


class Decoder(nn.Module):
    """Weights over codes (B, K, h, w) -> parameters (B, 6, H, W): 1x1 stem, groups with nearest 2x between, 1x1 head.

    Channels 0-2 of the parameters are mu, channels 3-5 are ln b, of the logit-Laplace distribution of the mapped
    pixels.
    """

    outer = ("stem", "head")

    def __init__(
        self,
        num_codes: int,
        width: int,
        init_width: int,
        num_groups: int,
        blocks_per_group: int,
        gain: float | None = None,
    ) -> None:
        super().__init__()
        widths = [init_width, *(width * 2**i for i in reversed(range(num_groups)))]
        self.stem = SameConv2d(num_codes, init_width, 1)
        self.groups = _groups(widths, blocks_per_group, _DECODER_KERNELS, gain, upsample=True)
        self.head = SameConv2d(width, 6, 1)

    def forward(self, soft: Tensor) -> Tensor:
        return self._from_embedding(_full_precision(self.stem, soft).to(self.stem.weight.dtype))

    def from_codes(self, codes: Tensor) -> Tensor:
        """The same for one-hot weights, given as codes (B, h, w): a table look-up in place of the 1x1 convolution."""
        table = self.stem.weight[:, :, 0, 0].t() + self.stem.bias  # (K, init_width)
        return self._from_embedding(F.embedding(codes, table).permute(0, 3, 1, 2))

    def _from_embedding(self, x: Tensor) -> Tensor:
        for group in self.groups:
            x = group(x)
        return self.head(F.relu(x))


def likeliest(logits: Tensor) -> Tensor:
    """The argmax over K of logits (B, K, h, w) -> int64 (B, h, w), the first of equal ones.

    Of many codes, on a CPU, in two stages: the largest of blocks, then within one. There torch finds a largest value
    in a tenth of the time that it takes to say where it stands.
    """
    if logits.device.type != "cpu":
        return logits.argmax(dim=1)
    rows = full(logits).permute(0, 2, 3, 1)  # as the encoder lays them out; in bfloat16 it takes longer
    if rows.shape[-1] < 16 * _BLOCK or rows.shape[-1] % _BLOCK:
        return rows.argmax(dim=-1)
    blocks = rows.unflatten(-1, (-1, _BLOCK))
    block = blocks.amax(dim=-1).argmax(dim=-1)
    within = blocks.take_along_dim(block[..., None, None], dim=-2).squeeze(-2).argmax(dim=-1)
    return _BLOCK * block + within


class GumbelAutoencoder(nn.Module):
    """Images in [-1, 1] to a grid of codes and back, through logits over the codes that training relaxes.

    encoder: mapped pixels (B, 3, H, W) -> float32 logits (B, K, h, w). decoder: weights over codes (B, K, h, w) ->
    parameters (B, 6, H, W) of the mapped pixels' distribution; its `from_codes` reads codes (B, h, w) for one-hot
    weights. image_size: H = W. spec: what the codes are.
    """

    codes_from_pixels = False  # whether `start_codes` needs no trained autoencoder

    def __init__(self, image_size: int, spec: CodesSpec, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.image_size, self.spec = image_size, spec
        self.encoder, self.decoder = encoder, decoder
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPU

    def logits(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> logits of q(code | image), float32 (B, K, h, w)."""
        check_image(image, self.image_size, type(self).__name__, values=False)
        return self.encoder(map_pixels(image))

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> codes int64 (B, h, w), the argmax of the logits (no noise, as published).

        Raises ValueError for other images.
        """
        check_image(image, self.image_size, type(self).__name__)
        return likeliest(self.logits(image))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w) -> image (B, 3, H, W), the mode in logit space; unclamped, inside (-1.25, 1.25).

        Raises ValueError for other codes.
        """
        self.spec.check(codes, type(self).__name__)
        return self.image(self.decoder.from_codes(codes))

    @staticmethod
    def image(parameters: Tensor) -> Tensor:
        """Parameters (B, 6, H, W) -> image float32 (B, 3, H, W): unmap_pixels(sigmoid(mu)), unclamped."""
        return unmap_pixels(torch.sigmoid(full(parameters[:, :3])))

    def forward(self, image: Tensor, gumbel_noise: Tensor | None, temperature: float) -> dict[str, Tensor]:
        """Relaxed pass: softmax((logits + noise) / temperature) over the codes, in float32, then the decoder.

        image: (B, 3, H, W) in [-1, 1]. gumbel_noise: standard Gumbel draws (B, K, h, w), or None: then the decoder
        reads the logits as they are, which is a plain autoencoder. temperature: above 0. Returns parameters
        (B, 6, H, W) and logits (B, K, h, w). Raises ValueError when the noise does not fit.
        """
        logits = self.logits(image)
        if gumbel_noise is None:
            return {"parameters": self.decoder(logits), "logits": logits}
        if gumbel_noise.shape != logits.shape:
            raise ValueError(
                f"{type(self).__name__} needs gumbel_noise of shape {tuple(logits.shape)}, "
                f"got {tuple(gumbel_noise.shape)}"
            )
        return {"parameters": self.decoder(relax(logits, gumbel_noise, temperature)), "logits": logits}

    def start_codes(self, images: Sequence[Tensor], seed: int) -> None:
        """Makes the codes k-means centres of what the images hold, in place. images: batches (B, 3, H, W)."""
        raise NotImplementedError


class DiscreteVAE(GumbelAutoencoder):
    """The published model: residual convolutions on both sides, so that a code tells of its surroundings too.

    image_size: H = W, a multiple of 2 ** (num_groups - 1), the pixels a code covers a side. width: channels at full
    resolution, a multiple of 4; each group of the encoder doubles them. init_width: channels of the decoder's stem.
    branch_gain: what each residual branch is multiplied by, None for the paper's 1 / (number of blocks) ** 2.
    Raises ValueError for sizes that do not fit.
    """

    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        image_size: int = 256,
        num_codes: int = 8192,
        width: int = 256,
        init_width: int = 128,
        num_groups: int = 4,
        blocks_per_group: int = 2,
        branch_gain: float | None = None,
    ) -> None:
        if min(image_size, num_codes, width, init_width, num_groups, blocks_per_group) < 1:
            raise ValueError("DiscreteVAE needs every size to be at least 1; correct the recipe")
        patch = 2 ** (num_groups - 1)
        if image_size % patch:
            raise ValueError(
                f"DiscreteVAE needs image_size to be a multiple of 2 ** (num_groups - 1) = {patch}, got {image_size}; "
                "change image_size or num_groups"
            )
        super().__init__(
            image_size,
            CodesSpec("codes", (image_size // patch, image_size // patch), num_codes),
            Encoder(num_codes, width, num_groups, blocks_per_group, branch_gain),
            Decoder(num_codes, width, init_width, num_groups, blocks_per_group, branch_gain),
        )

    @torch.no_grad()
    def start_codes(self, images: Sequence[Tensor], seed: int) -> None:
        """Makes the codes k-means centres, in place; the argmax of the logits is then the centre nearest to a vector z.

        The logits become s * (c_k . z - |c_k|^2 / 2), where s says how many nats the median distance between
        neighbouring centres is worth. The model must be trained as a plain autoencoder (see `forward`): z is what the
        decoder's stem makes of a position's logits, and the centres become the stem's columns. images: batches of
        (B, 3, H, W) in [-1, 1]. Raises ValueError when they hold fewer positions than there are codes.
        """
        head, stem = self.encoder.head, self.decoder.stem
        to_z, offset = stem.weight[:, :, 0, 0].cpu(), stem.bias.cpu()
        logits = (self.logits(image).cpu().permute(0, 2, 3, 1).flatten(0, 2) for image in images)  # (N, K) of a batch
        points = torch.cat([each @ to_z.T + offset for each in logits])  # (N, C)
        centres = kmeans(points, self.spec.vocabulary, seed)[0]  # (K, C)
        scale = code_scale(centres, 12.5)
        shifted = scale * (centres - centres.mean(0))  # a constant added to all logits changes nothing
        from_z = shifted @ to_z  # (K, K): new logits from old ones
        bias = shifted @ offset - scale / 2 * centres.square().sum(1)
        bias = bias - bias.mean() + from_z @ head.bias.cpu()
        head.weight.copy_((from_z @ head.weight[:, :, 0, 0].cpu())[:, :, None, None])
        head.bias.copy_(bias)
        stem.weight.copy_(centres.T[:, :, None, None])
        stem.bias.zero_()


def code_scale(centres: Tensor, nats: float) -> Tensor:
    """What makes the median squared distance of the centres (K, C) to their nearest neighbours worth 2 * nats."""
    apart = torch.cdist(centres, centres).fill_diagonal_(torch.inf).amin(1).square()
    return 2 * nats / apart.median().clamp(min=1e-12)


class _Relaxation(torch.autograd.Function):
    """Keeps one array for the backward pass and makes one there; as separate operations it is bound by memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
        # Over the last dim, where the codes of a position lie side by side: no copy to another layout, forth or back.
        weights = (logits + noise).div_(temperature).permute(0, 2, 3, 1).softmax(dim=-1)
        ctx.save_for_backward(weights)
        ctx.temperature = temperature
        return weights.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        grad = torch.ops.aten._softmax_backward_data(grad.permute(0, 2, 3, 1), weights, -1, weights.dtype)
        return grad.div_(ctx.temperature).permute(0, 3, 1, 2), None, None


def relax(logits: Tensor, gumbel_noise: Tensor, temperature: float) -> Tensor:
    """Gumbel-softmax over dim 1: (B, K, h, w) -> float32 weights of the same shape, one-hot as temperature -> 0.

    Neither the noise nor the temperature get a gradient, and that of the logits cannot be differentiated again.
    """
    return _Relaxation.apply(full(logits), full(gumbel_noise), temperature)


def openai_state_dict(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published encoder's and decoder's state dicts -> a state dict of `DiscreteVAE`.

    Raises ValueError when a name is unknown or a tensor is no 4-d weight or 1-d bias. Sizes are not in the names:
    build `DiscreteVAE` with the sizes of the weights and let `load_state_dict` check them.
    """
    state: dict[str, Tensor] = {}
    for half, tensors in (("encoder", encoder), ("decoder", decoder)):
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            if {"w": 4, "b": 1}.get(leaf) != tensor.dim():
                raise ValueError(
                    f"published {half}: {name!r} should end in .w (4-d) or .b (1-d), got shape {tuple(tensor.shape)}"
                )
            state[f"{half}.{_our_path(path, half)}.{'weight' if leaf == 'w' else 'bias'}"] = tensor
    return state


def _our_path(path: str, half: str) -> str:
    """`blocks.group_2.block_1.res_path.conv_3` -> `groups.1.0.branch.2`, and so on."""
    match path.split("."):
        case ["blocks", "input"]:
            return "stem"
        case ["blocks", "output", "conv"]:
            return "head"
        case ["blocks", group, block, "id_path"]:
            return f"groups.{_index(group)}.{_index(block)}.skip"
        case ["blocks", group, block, "res_path", conv]:
            return f"groups.{_index(group)}.{_index(block)}.branch.{_index(conv)}"
    raise ValueError(f"published {half}: unknown tensor {path!r}; expected the names of the released dVAE")


def _index(part: str) -> int:
    """`group_2` -> 1: the published names count from 1."""
    return int(part.rpartition("_")[2]) - 1
