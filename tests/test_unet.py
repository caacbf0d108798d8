"""The U-Net: sizes, conditions, edges, and equality with diffusers in outputs and gradients."""

import pytest
import torch

from kartina.layers.random import Draws
from kartina.pipeline import convert_unet as convert
from kartina.pipeline.convert_unet_config import unet_arguments, unet_config
from kartina.priors.condition import Condition
from kartina.priors.unet import UNet, _whole_lanes
from kartina.training.parallel import recompute_blocks

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

    _, kind, theirs = PAIRS[name]
    torch.manual_seed(0)
    reference = perturbed(getattr(diffusers, kind)(**theirs)).to(dtype)
    ours = UNet(**unet_arguments(reference.config)).to(dtype)
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


@pytest.mark.parametrize("name", PAIRS)
def test_weights_and_config_go_out_and_back(name):
    import diffusers

    ours, reference = pair(name)
    linear = name == "sd2"
    there = convert.unet_to_diffusers(ours.state_dict(), linear)
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert all(torch.equal(tensor, reference.state_dict()[key]) for key, tensor in there.items())
    back = convert.unet_from_diffusers(there, ours)
    assert all(torch.equal(tensor, back[key]) for key, tensor in ours.state_dict().items())
    config = unet_config(PAIRS[name][0], linear)
    again = unet_arguments(config)
    assert unet_config(again, linear) == config
    kind = getattr(diffusers, config.pop("_class_name"))
    assert type(reference) is kind
    kind(**config).load_state_dict(there)
    UNet(**again).load_state_dict(back)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_compvis_names_are_those_that_diffusers_converts(name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    sizes = PAIRS[name][0] | {"embedding_dim": None, "channel_mult": (1, 2, 2), "num_heads": 2, "blocks_per_level": 2}
    ours = perturbed(UNet(**sizes))
    single = convert.unet_to_compvis(ours.state_dict(), linear_projections=name == "sd2")
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in single.items()}
    expected = convert_ldm_unet_checkpoint(dict(prefixed), unet_config(sizes, linear_projections=name == "sd2"))
    there = convert.unet_to_diffusers(ours.state_dict(), linear_projections=name == "sd2")
    assert set(there) == set(expected) and all(torch.equal(there[key], expected[key]) for key in there)
    rest = {"first_stage_model.x": torch.ones(1), "betas": torch.ones(1), "log_one_minus_alphas_cumprod": torch.ones(1)}
    parts = convert.split_single_file(prefixed | rest | {"cond_stage_model.model.y": torch.ones(1)})
    assert set(parts["tokenizer"]) == {"x"} and set(parts["text"]) == {"y"}
    back = convert.unet_from_compvis(parts["prior"], ours)
    assert all(torch.equal(tensor, back[key]) for key, tensor in ours.state_dict().items())
    with pytest.raises(ValueError, match="'control_model.x' is no tensor of a Stable Diffusion file"):
        convert.split_single_file({"control_model.x": torch.ones(1)})


def test_weights_that_do_not_fit_are_one_error():
    ours = UNet(**CAPTIONED)
    weights = convert.unet_to_diffusers(ours.state_dict())
    surplus = weights | {"add_embedding.weight": torch.ones(1)}
    surplus.pop("conv_in.bias")
    with pytest.raises(
        ValueError, match=r"1 are missing \(conv_in.bias\) and 1 have no place \(add_embedding.weight\)"
    ):
        convert.unet_from_diffusers(surplus, ours)
    with pytest.raises(ValueError, match=r"conv_in.weight: expected shape \(8, 4, 3, 3\), got \(8, 9, 3, 3\)"):
        convert.unet_from_diffusers(weights | {"conv_in.weight": torch.ones(8, 9, 3, 3)}, ours)
    with pytest.raises(ValueError, match="no U-Net with tokens made of an image embedding"):
        convert.unet_to_diffusers(UNet(**CAPTIONED, embedding_dim=3, embedding_tokens=2).state_dict())
    with pytest.raises(ValueError, match="has no name in a CompVis U-Net"):
        convert.unet_to_compvis(UNet(**PLAIN).state_dict())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos, freq_shift"),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 2}, "must be DownBlock2D and CrossAttnDownBlock2D"),
        ({"class_embed_type": "timestep"}, "class_embed_type of the config must be None or 'simple_projection'"),
        ({"block_out_channels": [8, 12]}, "multiples of the first"),
        ({"encoder_hid_dim": 7}, "encoder_hid_dim .* got 7: kartina does not compute it"),
    ],
)
def test_a_config_that_ours_does_not_compute_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        unet_arguments(unet_config(CAPTIONED) | change)
    with pytest.raises(ValueError, match="the config lacks in_channels"):
        unet_arguments({})


def unclip(**more) -> UNet:
    """Reads captions, an image embedding and a second image, and predicts a variance."""
    torch.manual_seed(0)
    sizes = CAPTIONED | {"in_channels": 9, "out_channels": 8, "embedding_dim": 5, "embedding_tokens": 3}
    return perturbed(UNet(**sizes | {"scale_shift": True, "num_classes": 2} | more))


def everything(batch: int = 2) -> Condition:
    mask = torch.ones(batch, 7, dtype=torch.bool)
    tokens, embedding, image = draw(batch, 7, 6, seed=3), draw(batch, 5, seed=4), draw(batch, 5, 8, 8, seed=5)
    return Condition(torch.ones(batch, dtype=torch.int64), tokens, mask, embedding, image)


def test_every_field_of_the_condition_is_read_and_masked_tokens_are_not():
    network, x_t, t = unclip(), draw(2, 4, 8, 8), torch.tensor([3.5, 871.0])
    whole = everything()
    out = network(x_t, t, whole)
    assert out.shape == (2, 8, 8, 8)
    changes = {"labels": torch.zeros(2, dtype=torch.int64)}
    changes |= {name: getattr(whole, name) + 1 for name in ("tokens", "embedding", "image")}
    for name, value in changes.items():
        assert (network(x_t, t, whole._replace(**{name: value})) - out).abs().max() > 1e-4, name
    mask = whole.mask.clone()
    mask[:, 4:] = False
    cut = whole._replace(tokens=whole.tokens[:, :4], mask=None)
    close(network(x_t, t, whole._replace(mask=mask)), network(x_t, t, cut))
    alone = network(x_t, t, whole._replace(tokens=None, mask=None))  # the tokens of the embedding are left
    assert alone.shape == out.shape and (alone - out).abs().max() > 1e-4


def test_the_null_condition_takes_the_place_of_dropped_samples():
    network, x_t, t, given = unclip(), draw(2, 4, 8, 8), torch.tensor([3, 871]), everything()
    null = network.null_condition(2, tokens=torch.zeros(2, 7, 6), mask=given.mask)
    assert null.labels.tolist() == [2, 2] and not null.embedding.any() and null.image is None
    mixed = given.dropped(torch.tensor([True, False]), null)
    out, dropped, kept = (network(x_t, t, condition) for condition in (mixed, null._replace(image=given.image), given))
    close(out, torch.stack([dropped[0], kept[1]]))
    assert UNet(**PLAIN).null_condition(3) == Condition()


def test_slices_recomputation_and_channels_last_change_nothing():
    x_t, t, condition = draw(2, 4, 8, 8), torch.tensor([3, 871]), everything()
    plain, cheap = unclip(), unclip().to(memory_format=torch.channels_last)
    cheap.slice_attention(7)
    recompute_blocks(cheap)
    assert len(cheap.blocks) == 2 + 2 + 4
    found, expected = cheap(x_t.to(memory_format=torch.channels_last), t, condition), plain(x_t, t, condition)
    close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(cheap.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        close(ours.grad, theirs.grad)


def test_dropout_is_a_function_of_its_draws():
    network, x_t, t = perturbed(UNet(**PLAIN, dropout=0.5)), draw(2, 3, 8, 8), torch.tensor([3, 871])
    draws = Draws(0, 5, torch.tensor([7, 9]))
    plain, first = network(x_t, t), network(x_t, t, draws=draws)
    assert torch.equal(first, network(x_t, t, draws=draws)) and (first - plain).abs().max() > 1e-3
    close(network(x_t[1:], t[1:], draws=draws._replace(samples=torch.tensor([9]))), first[1:])
    assert (network(x_t, t, draws=draws._replace(step=6)) - first).abs().max() > 1e-3


def test_a_new_network_predicts_zero_and_its_branches_start_at_zero():
    network = UNet(**CAPTIONED)
    assert not network(draw(2, 4, 8, 8), torch.tensor([0, 999]), Condition(tokens=draw(2, 3, 6))).any()
    x = draw(2, 8, 8, 8)
    assert torch.equal(network.down[0].blocks[0](x, draw(2, 32), draw(2, 3, 6), None), x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_t": draw(2, 4, 9, 8)}, r"h and w must be multiples of 2, .* got \(9, 8\)"),
        ({"x_t": draw(2, 5, 8, 8)}, r"condition's image 4, .* got \(2, 5, 8, 8\) with 0"),
        ({"t": torch.tensor(3)}, r"t \(B,\), got .* t \(\)"),
        ({"condition": None}, r"tokens of the condition must be \(2, 0, 6\), .* got None"),
        ({"condition": Condition(tokens=draw(2, 3, 7))}, r"tokens .* \(2, 3, 6\), .* got \(2, 3, 7\)"),
        ({"condition": Condition(tokens=draw(2, 3, 6), labels=torch.ones(2))}, "labels .* must be left out"),
        ({"condition": Condition(tokens=draw(2, 3, 6), mask=torch.ones(2, 2) > 0)}, r"mask must be \(2, 3\)"),
        ({"condition": draw(2, 3, 6)}, "must be a Condition or None, got Tensor"),
    ],
)
def test_wrong_inputs_are_named(change, says):
    given = {"x_t": draw(2, 4, 8, 8), "t": torch.tensor([1, 2]), "condition": Condition(tokens=draw(2, 3, 6))}
    with pytest.raises(ValueError, match=says):
        UNet(**CAPTIONED)(**given | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attn_levels": (2,)}, "attn_levels must be among the levels 0 .. 1"),
        ({"num_heads": (1, 2, 3)}, "num_heads one number or one a level"),
        ({"num_heads": 3}, "num_heads must divide the width"),
        ({"convention": "ldm"}, "convention must be 'ddpm' or 'adm'"),
        ({"embedding_tokens": 2}, "embedding_tokens need embedding_dim"),
        ({"norm_groups": 3}, "GroupNorm needs groups that divide"),
    ],
)
def test_wrong_sizes_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        UNet(**CAPTIONED | change)


@pytest.mark.slow
def test_the_whole_unet_of_stable_diffusion_equals_diffusers():
    """859,520,964 parameters in float32, 64 x 64 latents and 77 tokens; takes 7 GB."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    reference = UNet2DConditionModel(**{k: v for k, v in unet_config({}, False).items() if k != "_class_name"})
    with torch.device("meta"):
        ours = UNet()
    # Assigned, so that both networks share their memory.
    ours.load_state_dict(convert.unet_from_diffusers(reference.state_dict(), ours), assign=True)
    x_t, t, tokens = draw(1, 4, 64, 64), torch.tensor([501]), draw(1, 77, 768, seed=3)
    with torch.no_grad():
        found, expected = ours(x_t, t, Condition(tokens=tokens)), reference(x_t, t, tokens).sample
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("length", [1, 15, 16, 17])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_that_fill_a_lane_change_nothing(length, masked):
    network = perturbed(UNet(**CAPTIONED)).double()
    x, t, tokens = draw(2, 4, 8, 8).double(), torch.tensor([3, 700]), draw(2, length, 6, seed=2).double()
    mask = (torch.arange(length) < torch.tensor([[1], [length]])) if masked else None
    with torch.no_grad():
        found = network(x, t, Condition(tokens=tokens, mask=mask))
        short = network(x[:1], t[:1], Condition(tokens=tokens[:1, :1] if masked else tokens[:1]))
        layer = next(block.attn for block in network.blocks if block.attn is not None).blocks[0].attn2
        y = draw(2, 5, layer.q.in_features, seed=3).double()
        alone, padded = layer(y, tokens, mask), layer(y, *_whole_lanes(tokens, mask))
    assert torch.allclose(found[:1], short, atol=1e-12) and torch.allclose(alone, padded, atol=1e-12)
    assert _whole_lanes(tokens, mask)[0].shape[1] == 16 * -(-length // 16)
