"""The commands that explain: known latents are measured right, codes and draws are drawn as they are, files hold it."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.images import read_metadata, read_picture
from kartina.pipeline.recipe import Recipe, build
from kartina.priors.gaussian import Standard
from kartina.training.data.shapes import ShapesSource
from kartina.training.show import codebook, gumbel, latents, panels
from kartina.training.stages.vae import VAEStage

CPU = torch.device("cpu")
BODY = {"image_size": 32, "width": 4, "channel_mult": [1, 1, 2], "blocks_per_level": 1, "norm_groups": 2}


def show(*words):
    """What a command prints, apart from its progress."""
    result = CliRunner().invoke(cli.app, ["show", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


# --- latents ----------------------------------------------------------------------------------------------------------


class Placed(nn.Module):
    """An autoencoder whose posteriors lie where a function puts them; it gives every picture back as grey."""

    def __init__(self, place):
        super().__init__()
        self.place, self.at = place, 0

    def forward(self, image):
        samples = torch.arange(self.at, self.at + len(image))
        self.at += len(image)
        return {"latents": self.place(Standard(2).draw(7, 0, samples, "elsewhere"))}

    def decode(self, z):
        return torch.zeros(len(z), 3, 32, 32)


@pytest.mark.parametrize(
    ("place", "holes", "outside"),
    [
        (lambda z: z, (0.0, 0.03), (0.0, 0.03)),  # the prior itself
        (lambda z: 0.01 * z, (0.9, 1.0), (0.0, 0.01)),  # a point: the prior is one hole
        (lambda z: 30 * z, (0.7, 1.0), (0.9, 1.0)),  # far and wide
        (lambda z: torch.stack([z[:, 0].abs(), z[:, 1]], 1), (0.3, 0.5), (0.0, 0.03)),  # one half of it
    ],
)
def test_holes_are_where_no_posterior_is(place, holes, outside):
    model = latents.models()[3]
    source = ShapesSource(levels=("S1",))
    found = latents.measure(model, Placed(place), source, range(2000), 0, CPU)
    assert holes[0] <= found.numbers["holes"] <= holes[1] and outside[0] <= found.numbers["outside"] <= outside[1]
    assert found.holes.float().mean().item() == pytest.approx(found.numbers["holes"])
    assert found.labels[:3].tolist() == [facts.background for facts in source.facts(range(3))]
    grey = source.read(range(2000)).image.square().mean(dim=(1, 2, 3))
    expected = (-10 * torch.log10(grey / 4)).mean().item()
    assert found.numbers["psnr"] == pytest.approx(expected, abs=1e-3)
    assert found.numbers["sample_psnr"] == pytest.approx(-10 * torch.log10(grey.min() / 4).item(), abs=1e-3)


def stages():
    recipes = [latents._recipe(model, "shapes", 10) for model in latents.models()]
    source = ShapesSource(levels=("S1",))
    return [latents._Trained(m, r, source, 0, CPU) for m, r in zip(latents.models(), recipes, strict=True)], source


def test_the_five_have_the_same_encoder_and_each_its_own_loss():
    trained, source = stages()
    assert len({sum(p.numel() for p in one.stage.network.encoder.parameters()) for one in trained}) == 1
    assert len({sum(p.numel() for p in one.stage.network.decoder.parameters()) for one in trained}) == 1
    batch = source.read(range(8))
    told = [{name: scalars for name, _, scalars in one.stage.updates(batch, 9)} for one in trained]
    names = [set(one) for one in told]
    assert names == [{"tokenizer"}] * 4 + [{"tokenizer", "discriminator"}]
    assert "kl" in told[0]["tokenizer"] and "nll" not in told[1]["tokenizer"] and "nll" in told[2]["tokenizer"]
    assert "adversary" in told[4]["tokenizer"] and "adversary" not in told[3]["tokenizer"]


def test_the_kl_alone_reaches_the_encoder_alone():
    trained, source = stages()
    kl_only, both = trained[1].stage, trained[2].stage
    assert isinstance(both, VAEStage) and type(both) is VAEStage
    _, (loss, count), scalars = next(kl_only.updates(source.read(range(8)), 0))
    torch.testing.assert_close(loss / count, scalars["kl"])
    loss.backward()
    assert kl_only.network.encoder.conv_in.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in kl_only.network.decoder.parameters())


def test_five_models_are_trained_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_POINTS", 48)
    monkeypatch.setattr(latents, "_SAMPLES", 24)
    told = json.loads(show("latents", "--steps=2", "--prior=mixture", f"--out={tmp_path / 'l.png'}", "--json"))
    facts = read_metadata(tmp_path / "l.png")
    assert told == {"file": str(tmp_path / "l.png"), **facts}
    assert list(facts["models"]) == [model.name for model in latents.models()]
    assert all(set(one) == {"psnr", "holes", "outside", "sample_psnr"} for one in facts["models"].values())
    width, height = read_picture(tmp_path / "l.png").size
    assert width >= 5 * panels.WIDTH and height > 3 * panels.WIDTH


# --- codebooks and relaxations ----------------------------------------------------------------------------------------


def test_a_codebook_is_counted_and_drawn(tmp_path):
    out = tmp_path / "c.png"
    told = json.loads(show("codebook", "--model=shapes/dalle", "--images=70", f"--out={out}", "--json"))
    assert read_metadata(out)["counts"] == told["counts"]
    assert (told["num_codes"], told["images"]) == (2048, 70) and sum(told["counts"]) == 70 * 128
    assert told["usage"] == pytest.approx(sum(count > 0 for count in told["counts"]) / 2048)
    assert 1 < told["perplexity"] < 2048 and told["psnr"] > 25
    assert told["entropy_bits"] == pytest.approx(torch.tensor(told["perplexity"]).log2().item(), abs=1e-4)


def test_the_codebook_of_latents_that_are_quantized_in_the_decoder_is_that_of_the_vqgan(tmp_path):
    body = {"width": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "attn_resolutions": [], "norm_groups": 4}
    found = []
    for kind in ("vqgan", "vq_latents"):
        torch.manual_seed(0)
        part = {"kind": kind, "image_size": 32, "num_codes": 16, "code_dim": 4, "latent_channels": 8, **body}
        tokenizer, source = codebook.load(folder(tmp_path / kind, part, data={"kind": "shapes"}), None, CPU)
        numbers, pairs = codebook.measure(tokenizer, source, 6, CPU)
        assert sum(numbers["counts"]) == 6 * 16 * 16 and len(codebook.tiles(tokenizer, torch.arange(3))) == 3
        found.append((numbers, pairs.tolist()))
    assert found[0] == found[1]


def test_a_tile_is_the_middle_of_a_picture_of_its_code():
    torch.manual_seed(0)
    kind = {"kind": "vqvae", "num_codes": 6, "code_dim": 2, "width": 8, "residual_width": 4}
    model = build(Recipe(name="tests/show", paper="none", image_size=32, parts={"tokenizer": kind}), "tokenizer")
    found = codebook.tiles(model, torch.tensor([4, 1]))
    assert [tile.size for tile in found] == [(4, 4)] * 2
    with torch.no_grad():
        whole = model.decode(torch.full((1, 8, 8), 4)).clamp(-1, 1)
    middle = ((whole[0, :, 16:20, 16:20] + 1) * 127.5).round()
    assert found[0].getpixel((1, 2)) == tuple(int(v) for v in middle[:, 2, 1])
    assert codebook.sheet(found * 20).size == (28 * 21 - 1, 2 * 21 - 1)


def folder(tmp_path, part, **training):
    recipe = Recipe(name="tests/show", paper="none", image_size=32, parts={"tokenizer": part}, training=training)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    return str(tmp_path)


def test_models_without_codes_or_pictures_are_refused(tmp_path):
    with pytest.raises(checkpoint.ModelError, match="gives latents, not codes"):
        codebook.load(folder(tmp_path / "a", {"kind": "autoencoder", **BODY}), None, CPU)
    vqvae = {"kind": "vqvae", "num_codes": 6, "code_dim": 2, "width": 8, "residual_width": 4}
    elsewhere = folder(tmp_path / "b", vqvae, data={"kind": "shards", "shards": "../secret"})
    with pytest.raises(ValueError, match="--data FOLDER"):
        codebook.load(elsewhere, None, CPU)
    model, source = codebook.load(folder(tmp_path / "c", vqvae, data={"kind": "shapes", "levels": ["S1"]}), None, CPU)
    assert {len(facts.objects) for facts in source.facts(range(20))} == {1}
    with pytest.raises(ValueError, match="reads no mixtures of codes"):
        gumbel.reconstruct(model, source.read(range(2)).image, 1.0, 0)


def test_the_largest_weight_is_drawn_from_the_softmax_at_any_temperature():
    share = torch.tensor(gumbel.LOGITS).softmax(dim=0)
    found = [gumbel.measure(gumbel.LOGITS, temperature, 0) for temperature in (0.01, 0.5, 5.0)]
    for one in found:
        drawn = torch.tensor(one["largest"]) * 20_000
        assert ((drawn - share * 20_000).square() / (share * 20_000)).sum() < 18.47  # the 0.999 quantile, 4 degrees
    assert found[0]["peak"] > 0.99 > 0.7 > found[2]["peak"] and found[0]["peak"] > found[1]["peak"] > found[2]["peak"]
    torch.testing.assert_close(torch.tensor(found[0]["mean"]), share, atol=0.01, rtol=0)
    assert (torch.tensor(found[2]["mean"]) - share).abs().max() > 0.2  # towards even weights
    for wrong in (((1.0,), 1.0), ((1.0, 2.0), 0.0)):
        with pytest.raises(ValueError, match="two logits or more and temperatures above 0"):
            gumbel.measure(*wrong, 0)


def test_temperatures_are_drawn_with_a_models_reconstructions(tmp_path):
    out = tmp_path / "g.png"
    words = ("gumbel", "--model=shapes/dalle", "--temperatures=0.1,2", "--logits=1,0,0", f"--out={out}", "--json")
    told = json.loads(show(*words))
    assert (
        [one["temperature"] for one in told["temperatures"]]
        == [0.1, 2.0]
        == [one["temperature"] for one in read_metadata(out)["temperatures"]]
    )
    assert all(one["psnr"] > 20 for one in told["temperatures"])
    assert "temperature 1: largest weight" in show("gumbel", "--temperatures=1", f"--out={out}")


# --- panels -----------------------------------------------------------------------------------------------------------


def test_points_lie_where_their_numbers_say():
    w = panels.WIDTH
    picture = panels.scatter([panels.Dots(torch.tensor([[0.5, 0.5], [-0.5, 0.0]]), ["#FF0000", "#0000FF"], 4)], 1.0)
    assert picture.size == (w, w)
    assert picture.getpixel((3 * w // 4, w // 4)) == (255, 0, 0)  # upwards is up
    assert picture.getpixel((w // 4, w // 2)) == (0, 0, 255)
    assert picture.getpixel((w // 2, 3 * w // 4)) == (255, 255, 255)
    dense = panels.density(torch.tensor([[0.5, 0.5], [9.0, 9.0]]), 1.0)
    assert dense.getpixel((3 * w // 4, w // 4)) == (0, 72, 140) and dense.getpixel((w // 4, w // 4)) == (255,) * 3


def test_bars_are_as_high_as_their_values():
    def height(picture, i, count):
        x = round((i + 0.5) * picture.width / count)
        return sum(picture.getpixel((x, y)) == (0, 114, 178) for y in range(picture.height))

    plain = panels.bars([1.0, 0.5, 0.0], ["a", "b", "c"], (300, 120))
    assert height(plain, 1, 3) == pytest.approx(height(plain, 0, 3) / 2, abs=2) and height(plain, 2, 3) <= 1
    logarithmic = panels.bars([0.1, 0.01, 0.001], size=(300, 120), log=True)
    rise = [height(logarithmic, i, 3) for i in range(3)]
    assert rise[0] - rise[1] == pytest.approx(rise[1] - rise[2], abs=2) and rise[2] > 5
