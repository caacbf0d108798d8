"""Resynthesis: directions in closed form, moves that land where they are asked to, and the commands on tiny data."""

import importlib.util
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint, resynthesis
from kartina.pipeline.images import read_metadata
from kartina.pipeline.recipe import build, parse
from kartina.training import directions as finding
from kartina.training.data.labelled import Labelled
from kartina.training.evaluation import attribute_reader, attributes_suite

FIELDS = {"hat": ["none", "red"], "skin": ["light", "medium", "dark"]}
NAMES = ["hat", "skin:light", "skin:medium", "skin:dark"]
RECIPE = """
name: avatars/tiny
paper: none
image_size: 16
parts:
  tokenizer: {kind: KIND, image_size: 16, width: 4, channel_mult: [1, 2], blocks_per_level: 1, norm_groups: 2, MORE}
"""


class Flat(torch.nn.Module):
    """A tokenizer whose latents are the pixels."""

    image_size = 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, image):
        return image.flatten(1) * self.weight

    def decode(self, latents):
        return latents.unflatten(1, (3, 4, 4))


def labelled(count: int, seed: int = 0) -> Labelled:
    """Pictures of noise whose first pixel row is light with a hat, and whose last row has the skin's brightness."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randint(len(v), (count,), generator=draws) for v in FIELDS.values()], dim=1)
    pixels = torch.randint(90, 110, (count, 4, 4, 3), generator=draws)
    pixels[:, 0] += 100 * labels[:, :1, None]
    pixels[:, 3] += 60 * labels[:, 1:, None] - 60
    return Labelled(FIELDS, pixels.to(torch.uint8), labels)


def system_of(data: Labelled) -> resynthesis.Resynthesis:
    weights = finding.directions(finding.encode(Flat(), data), finding.has(data))
    return resynthesis.Resynthesis(Flat(), NAMES, weights)


def test_directions_are_differences_of_means_and_readers_say_one_at_each_mean():
    data = labelled(300)
    z, has = finding.encode(Flat(), data), finding.has(data)
    assert has.sum(0).tolist() == [int((data.labels[:, 0] == 1).sum()), *data.labels[:, 1].bincount().tolist()]
    weights = finding.directions(z, has)
    for k in range(4):
        means = z[has[:, k]].mean(0), z[~has[:, k]].mean(0)
        assert torch.allclose(weights["directions"][k], means[0] - means[1], atol=1e-5)
        read = [float(weights["readers"][k] @ mean + weights["biases"][k]) for mean in means]
        assert read == pytest.approx([1, -1], abs=1e-3)
    with pytest.raises(ValueError, match="with it and without it, got 300 of 300"):
        finding.directions(z, torch.ones(300, 1, dtype=torch.bool))


def test_a_move_lands_where_it_is_asked_to_and_strength_nought_stays():
    data = labelled(300)
    system, z = system_of(data), finding.encode(Flat(), labelled(40, seed=1))
    assert torch.equal(system.move(z, {"hat": 1.0}, strength=0.0), z)
    for sign in (1.0, -1.0):
        way = sign * system.read(z)[:, 0]
        moved = sign * system.read(system.move(z, {"hat": sign}))[:, 0]
        assert torch.allclose(moved, way.clamp(min=1), atol=1e-3), "those that are there, or beyond, stay"
    half = system.read(system.move(z, {"hat": 1.0}, 0.5))[:, 0]
    assert torch.allclose(half, (system.read(z)[:, 0] + system.read(system.move(z, {"hat": 1.0}))[:, 0]) / 2, atol=1e-3)
    with pytest.raises(ValueError, match="no attribute 'hta' in this model; did you mean 'hat'"):
        system.move(z, {"hta": 1.0})


def test_a_moved_picture_has_the_attribute_and_keeps_the_rest():
    data, others = labelled(400), labelled(100, seed=2)
    system, images = system_of(data), others.images(slice(None))
    moved = system(images, {"hat": 1.0})
    rows = (moved.mean(dim=(1, 3)), images.mean(dim=(1, 3)))  # (B, 4)
    with_hat = images[others.labels[:, 0] == 1].mean(dim=(1, 3))[:, 0].mean()
    assert (rows[0][:, 0] - with_hat).abs().max() < 0.1 and (rows[0] - rows[1])[:, 1:].abs().max() < 0.1
    reader = attribute_reader.train_reader(data, steps=300)
    without = others.labels[:, 0] == 0
    assert (reader.read(images) == others.labels).float().mean() > 0.95
    assert (reader.read(moved)[without, 0] == 1).float().mean() > 0.9
    assert (reader.read(moved)[:, 1] == others.labels[:, 1]).float().mean() > 0.9


def test_moves_are_written_as_signs():
    assert resynthesis.moves_of(["hat=+1", "mouth:happy=-1", "a=1"]) == {"hat": 1.0, "mouth:happy": -1.0, "a": 1.0}
    for wish in ("hat", "hat=2", "=+1"):
        with pytest.raises(ValueError, match=r"expected NAME=\+1"):
            resynthesis.moves_of([wish])


def model(folder, kind="vae", more="latent_dim: 8, latent_channels: 4, scale: shared"):
    torch.manual_seed(0)
    recipe = parse(RECIPE.replace("KIND", kind).replace("MORE", more), "tiny")
    checkpoint.save_part(folder, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    return folder


def call(*words, code=0) -> str:
    if code:
        with pytest.raises((ValueError, OSError)) as error:
            CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
        return str(error.value)
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout  # not the bar


@pytest.mark.skipif(importlib.util.find_spec("dicebear") is None, reason='no DiceBear: pip install "kartina[data]"')
def test_directions_are_found_used_and_judged_by_commands(tmp_path, monkeypatch):
    from kartina.training.data.avatars import prepare

    monkeypatch.setattr(attribute_reader, "_STEPS", 5)
    prepare(tmp_path / "data", count=80, held_out=60, size=16)
    folder, picture = model(tmp_path / "model"), tmp_path / "one.png"
    Image.new("RGB", (16, 16), "red").save(picture)
    move = ("resynthesise", picture, "--model", folder, "--attribute", "hat=+1", "--device", "cpu")
    assert "kartina directions DATA" in call(*move, code=2)
    assert "27 attributes: hair:long" in call("directions", tmp_path / "data", "--model", folder, "--device", "cpu")
    call(*move, "--attribute", "mouth:happy=-1", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as drawn:
        assert drawn.width > 5 * 128
    assert read_metadata(tmp_path / "grid.png")["moves"] == {"hat": 1.0, "mouth:happy": -1.0}
    words = ("evaluate", folder, "--data", tmp_path / "data", "--per-test", 4, "--device", "cpu")
    result = json.loads(call(*words, "--json", "--save"))
    assert result["pictures"] == 30 and result["moves"]["hat -1"]["kept"]["n"] == 4 * 7
    assert result["moved"]["n"] <= 4 * len(result["moves"]) == 4 * (27 + 4)
    assert set(attributes_suite.headline(result)) == {"attributes moved", "attributes kept"}
    assert "attributes moved" in str(checkpoint.read_card(folder)["measured"])
    assert "read as moved" in call(*words)
    torch.manual_seed(1)
    other = build(checkpoint.load_recipe(folder), "tokenizer")
    checkpoint.save_part(folder, checkpoint.load_recipe(folder), "tokenizer", checkpoint.export(other))
    assert "belongs to another tokenizer" in call(*move, code=2)


def test_codes_cannot_be_moved(tmp_path):
    folder = model(tmp_path / "model", "vqgan", "num_codes: 8, code_dim: 4, latent_channels: 4, attn_resolutions: []")
    with pytest.raises(checkpoint.ModelError, match="moves latents, and this tokenizer gives codes"):
        resynthesis.load_latents(folder)
