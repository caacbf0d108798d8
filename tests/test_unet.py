"""The U-Net: sizes, conditions, edges, and equality with diffusers in outputs and gradients."""

import pytest
import torch

from kartina.pipeline import convert_unet as convert
from kartina.priors.condition import Condition
from kartina.priors.unet import UNet

TINY = {"in_channels": 3, "width": 8, "channel_mult": (1, 2), "blocks_per_level": 1, "norm_groups": 4}
PLAIN = TINY | {"attn_levels": (1,), "num_heads": 1, "context_dim": None}
CAPTIONED = TINY | {"in_channels": 4, "attn_levels": (0,), "num_heads": 2, "context_dim": 6}
DDPM = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
SD = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 6,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
}  # fmt: skip
# Ours and theirs: the pixels of Ho 2020, Dhariwal's classes and scales, Stable Diffusion 1 and 2.
PAIRS = {
    "ddpm": (PLAIN | {"convention": "ddpm"}, "UNet2DModel", DDPM),
    "adm": (
        PLAIN | {"num_heads": (1, 2), "num_classes": 4, "scale_shift": True, "out_channels": 6},
        "UNet2DModel",
        DDPM | {"attention_head_dim": 8, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
        | {"norm_eps": 1e-5, "num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "out_channels": 6}
        | {"attn_norm_num_groups": 4},
    ),
    "sd1": (CAPTIONED, "UNet2DConditionModel", SD),
    "sd2": (
        CAPTIONED | {"num_heads": (2, 4), "depth": 2, "embedding_dim": 5, "attn_levels": (0, 1)},
        "UNet2DConditionModel",
        SD | {"attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": 2}
        | {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
        | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 5},
    ),
}  # fmt: skip


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """With norms away from 1 and 0, where a swapped pair would hide, and outputs away from 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, Condition | None, dict]:
    """x_t, t, our condition and theirs."""
    channels = PAIRS[name][0]["in_channels"]
    x_t, t = draw(2, channels, 8, 12).to(dtype), torch.tensor([3, 871])
    tokens, embedding = draw(2, 7, 6, seed=3).to(dtype), draw(2, 5, seed=4).to(dtype)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    labels = torch.tensor([4, 1])
    return {
        "ddpm": (x_t, t, None, {}),
        "adm": (x_t, t, Condition(labels=labels), {"class_labels": labels}),
        "sd1": (x_t, t, Condition(tokens=tokens), {"encoder_hidden_states": tokens}),
        "sd2": (
            x_t,
            t,
            Condition(tokens=tokens, mask=mask, embedding=embedding),
            {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "class_labels": embedding},
        ),
    }[name]


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[UNet, torch.nn.Module]:
    import diffusers

    sizes, kind, theirs = PAIRS[name]
    torch.manual_seed(0)
    reference = perturbed(getattr(diffusers, kind)(**theirs)).to(dtype)
    ours = UNet(**sizes).to(dtype)
    ours.load_state_dict(convert.unet_from_diffusers(reference.state_dict(), ours))
    return ours, reference


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal as the house defines it: max |a - b| <= 1e-5 max(1, max |b|), and <= 1e-10 in float64."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    bound = 1e-10 if ours.dtype == torch.float64 else 1e-5 * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_and_gradients_equal_diffusers(name, dtype):
    ours, reference = pair(name, dtype)
    x_t, t, condition, theirs = inputs(name, dtype)
    mine, other = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    found, expected = ours(mine, t, condition), reference(other, t, **theirs).sample
    close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    close(mine.grad, other.grad)
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    gradients = convert.unet_to_diffusers(gradients, linear_projections=name == "sd2")
    assert set(gradients) == {key for key, _ in reference.named_parameters()}
    for key, parameter in reference.named_parameters():
        close(gradients[key], parameter.grad)
