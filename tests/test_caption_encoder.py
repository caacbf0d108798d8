"""Text encoders: CLIP's text tower against transformers and open_clip, and the own transformer over captions."""

import pytest
import torch
from safetensors.torch import save_file

from kartina.pipeline import convert_unet as convert
from kartina.pipeline.convert_unet_config import clip_text_arguments, clip_text_config
from kartina.priors.caption_encoder import CaptionEncoder, CLIPText

SIZES = {"text_vocab": 50, "text_length": 10, "width": 16, "depth": 2, "num_heads": 2}
# Stable Diffusion 1 and 2.
KINDS = pytest.mark.parametrize("more", [{}, {"quick_gelu": False, "pad": 0}], ids=["sd1", "sd2"])


def captions(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 50, (batch, 10), generator=torch.Generator().manual_seed(1))


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """With norms and biases away from 1 and 0, where a swapped pair would hide."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def reference(more: dict) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return perturbed(CLIPTextModel(CLIPTextConfig(**clip_text_config(SIZES | more))).eval())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal as the house defines it: max |a - b| <= 1e-5 max(1, max |b|), and <= 1e-10 in float64."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    bound = 1e-10 if ours.dtype == torch.float64 else 1e-5 * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@KINDS
def test_clip_equals_transformers_in_outputs_and_gradients(more, dtype):
    theirs = reference(more).to(dtype)
    ours = CLIPText(**clip_text_arguments(theirs.config.to_dict())).to(dtype)
    ours.load_state_dict(convert.clip_text_from_transformers(theirs.state_dict(), ours))
    (found, mask), expected = ours(captions()), theirs(captions()).last_hidden_state
    assert mask is None
    close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = convert.clip_text_to_transformers({name: p.grad for name, p in ours.named_parameters()})
    gradients = {name.removeprefix("text_model."): value for name, value in gradients.items()}
    assert set(gradients) == {name.removeprefix("text_model.") for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        close(gradients[name.removeprefix("text_model.")], parameter.grad)


@KINDS
def test_clip_goes_out_to_a_folder_of_transformers_and_back(more, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    ours = perturbed(CLIPText(**SIZES | more))
    there = convert.clip_text_to_transformers(ours.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in there.items()}, tmp_path / "model.safetensors")
    CLIPTextConfig(**clip_text_config(SIZES | more)).save_pretrained(tmp_path)
    theirs = CLIPTextModel.from_pretrained(tmp_path).eval()
    close(ours(captions())[0], theirs(captions()).last_hidden_state)
    old = there | {"text_model.embeddings.position_ids": torch.arange(10)[None]}
    for given in (there, old, theirs.state_dict()):
        back = convert.clip_text_from_transformers(given, ours)
        assert list(back) == list(ours.state_dict())
        assert all(torch.equal(tensor, back[name]) for name, tensor in ours.state_dict().items())


def test_open_clip_up_to_its_last_block_but_one():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=4, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=10, vocab_size=50, width=16, heads=2, layers=3)
    theirs = perturbed(open_clip.CLIP(24, vision, text))
    ours = CLIPText(**SIZES, quick_gelu=False, pad=0)
    weights = theirs.state_dict()
    ours.load_state_dict(convert.clip_text_from_openclip(weights, ours))
    x = theirs.token_embedding(captions()) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    close(ours(captions())[0], theirs.ln_final(x))
    whole = CLIPText(**SIZES | {"depth": 3}, quick_gelu=False)
    whole.load_state_dict(convert.clip_text_from_openclip(weights, whole))
    with pytest.raises(ValueError, match=r"0 are missing and 12 have no place \(transformer.resblocks.2"):
        convert.clip_text_from_openclip(weights, CLIPText(**SIZES | {"depth": 1}, quick_gelu=False))


def test_weights_or_a_config_of_another_tower_are_refused():
    ours = CLIPText(**SIZES)
    there = convert.clip_text_to_transformers(ours.state_dict())
    lacking = {name: tensor for name, tensor in there.items() if "layers.1.self_attn.q_proj" not in name}
    with pytest.raises(ValueError, match=r"2 are missing \(encoder.layers.1.self_attn.q_proj.bias"):
        convert.clip_text_from_transformers(lacking, ours)
    with pytest.raises(ValueError, match="hidden_act of the config must be gelu or quick_gelu, got 'relu'"):
        clip_text_arguments(clip_text_config(SIZES) | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="four times hidden_size"):
        clip_text_arguments(clip_text_config(SIZES) | {"intermediate_size": 32})
    with pytest.raises(ValueError, match="num_heads must divide the width"):
        CLIPText(**SIZES | {"num_heads": 3})
    with pytest.raises(ValueError, match=r"1 <= t <= 10, got \(3, 11\)"):
        ours(torch.zeros(3, 11, dtype=torch.int64))


def test_the_null_captions():
    assert CLIPText(**SIZES).null_text(2)[1].tolist() == [48, *[49] * 9]
    assert CLIPText(**SIZES, pad=0).null_text(1)[0].tolist() == [48, 49, *[0] * 8]
    encoder = CaptionEncoder(**SIZES)
    tokens, mask = encoder(encoder.null_text(2))
    assert tokens.shape == (2, 11, 16) and mask.tolist() == [[True] + [False] * 10] * 2


def test_captions_look_both_ways_and_never_at_pads():
    torch.manual_seed(0)
    encoder, text = perturbed(CaptionEncoder(**SIZES)), captions().clamp(min=1)
    text[:, 6:] = 0
    tokens, mask = encoder(text)
    assert tokens.shape == (3, 11, 16) and mask.sum(1).tolist() == [7, 7, 7]
    close(encoder(text[:, :6])[0], tokens[:, :7])
    other = text.clone()
    other[:, 5] = other[:, 5] % 49 + 1
    changed = (encoder(other)[0] - tokens).abs().amax(-1)
    assert (changed[:, :7] > 1e-5).all()
    tokens.sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match=r"CaptionEncoder: text must be \(B, t\) with 1 <= t <= 10"):
        encoder(torch.zeros(3, 11, dtype=torch.int64))
