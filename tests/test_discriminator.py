"""PatchGAN: published sizes, the 70 x 70 patch, group normalisation, edges, images judged beside others."""

import json

import pytest
import torch
from test_tokenizer_stages import JUDGED, stage_of
from typer.testing import CliRunner

from kartina import cli
from kartina.layers.discriminator import PatchDiscriminator


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("channels", "count"), [(3, 2_765_633), (6, 2_768_705)])
def test_published_size(channels, count, norm):
    with torch.device("meta"):
        model = PatchDiscriminator(channels, norm=norm)
        assert model(torch.zeros(2, channels, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(p.numel() for p in model.parameters()) == count


def test_what_is_negative_keeps_a_fifth():
    model = PatchDiscriminator(width=8, depth=2, norm="group", norm_groups=4)
    assert [layer.negative_slope for layer in model.main if isinstance(layer, torch.nn.LeakyReLU)] == [0.2] * 3


def test_a_logit_sees_70_pixels():
    model = PatchDiscriminator(width=32).eval()  # running statistics: nothing else reaches from afar
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    model(image)[0, 0, 15, 15].backward()
    seen = image.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_with_group_norm_an_image_is_judged_alone():
    torch.manual_seed(0)
    model = PatchDiscriminator(width=32, depth=2, norm="group")
    images = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), atol=1e-6, rtol=1e-5)
    assert not [name for name, _ in model.named_buffers()]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_smallest_image_has_one_patch(depth):
    model = PatchDiscriminator(width=32, depth=depth)
    size = model.smallest
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 1, 1, 1)
    for bad in (torch.zeros(1, 3, size - 1, size), torch.zeros(1, 1, size, size), torch.zeros(3, size, size)):
        with pytest.raises(ValueError, match=f"at least {size}"):
            model(bad)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="norm 'batch' or 'group'"):
        PatchDiscriminator(norm="instance")
    with pytest.raises(ValueError, match="groups that divide"):
        PatchDiscriminator(width=8, norm="group")


@pytest.mark.parametrize("kind", JUDGED)
def test_with_six_channels_what_came_back_is_judged_beside_what_was_to(kind, tiny):
    """One logit of whether both are equal: 0 where they are, which are the real ones."""
    stage, batch = stage_of(tiny, kind, "parts.discriminator.in_channels=6")

    def apart(image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1] == 6
        return (image[:, :3] - image[:, 3:]).abs().mean(dim=(1, 2, 3), keepdim=True)

    stage.networks["discriminator"].main.forward = apart
    (_, _, fooling), (_, _, judged) = stage.updates(batch, 19)
    assert judged["real_logits"] == 0
    assert judged["fake_logits"] == pytest.approx(-float(fooling["fooling"]), abs=1e-6)
    assert judged["fake_logits"] > 0.1


def test_the_command_counts_six_channels():
    argv = ["plan", "paper/vqgan-f16-1024", "parts.discriminator.in_channels=6", "--json"]
    assert json.loads(CliRunner().invoke(cli.app, argv).output)["parameters"]["discriminator"] == 2_768_705
