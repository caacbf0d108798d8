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
from kartina.tokenizers.spec import LatentsSpec
from kartina.training import directions as finding
from kartina.training.data.labelled import Labelled, attributes_of
from kartina.training.evaluation import attribute_reader, attributes_suite

FIELDS = {"hat": ["none", "red"], "skin": ["light", "medium", "dark"]}
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
    spec = LatentsSpec("latents", (48,))

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


ATTRIBUTES = {one.name: (one.field, one.values) for one in attributes_of(FIELDS)}


def system_of(data: Labelled) -> resynthesis.Resynthesis:
    weights = finding.means_of(finding.encode(Flat(), data), data.labels, FIELDS)
    return resynthesis.Resynthesis(Flat(), FIELDS, ATTRIBUTES, weights)


def test_means_are_those_of_the_values_and_readers_are_whitened_by_what_varies_within_them():
    data = labelled(300)
    z = finding.encode(Flat(), data)
    weights = finding.means_of(z, data.labels, FIELDS)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "origins": (2, 48), "means": (5, 48), "readers": (5, 48), "lengths": (5,)
    }  # fmt: skip
    for number, rows in enumerate((slice(0, 2), slice(2, 5))):
        own = data.labels[:, number]
        means = torch.stack([z[own == place].mean(0) for place in range(int(own.max()) + 1)])
        torch.testing.assert_close(weights["means"][rows] + weights["origins"][number], means)
        assert weights["means"][rows].sum(0).abs().max() < 1e-5
        covariance = torch.cov((z - means[own]).T, correction=0)
        covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(48)
        torch.testing.assert_close(weights["readers"][rows] @ covariance, weights["means"][rows], atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="no picture of 300 has skin:dark; take more"):
        finding.means_of(z, data.labels.clamp(max=1), FIELDS)


def test_a_move_lands_on_the_mean_of_the_value_and_leaves_what_tells_nothing_of_it():
    system, z = system_of(labelled(300)), finding.encode(Flat(), labelled(40, seed=1))
    assert torch.equal(system.move(z, {"hat": 1.0}, strength=0.0), z)
    for moves in ({"hat": 1.0}, {"hat": -1.0}, {"skin:medium": 1.0}, {"skin:dark": -1.0}):
        moved = system.move(z, moves)
        torch.testing.assert_close(system.move(moved, moves), moved, atol=1e-3, rtol=0)
        torch.testing.assert_close(system.move(z, moves, 0.5), (z + moved) / 2)
        ways = torch.linalg.matrix_rank(moved - z, atol=1e-3)
        assert ways == (1 if "hat" in moves else 2), "no other direction than those between the values"
    both = system.move(z, {"hat": 1.0, "skin:dark": 1.0})
    torch.testing.assert_close(both, system.move(system.move(z, {"hat": 1.0}), {"skin:dark": 1.0}))
    once = system.move(z, {"hat": 1.0})
    system.weights["lengths"][1] = 3.0
    further = (system.move(z, {"hat": 1.0}) - once) - 2 * system.weights["means"][1]
    assert further.abs().max() < 1e-4
    with pytest.raises(ValueError, match="no attribute 'hta' in this model; did you mean 'hat'"):
        system.move(z, {"hta": 1.0})


def test_a_moved_picture_has_the_attribute_and_keeps_the_rest():
    data, others = labelled(400), labelled(100, seed=2)
    system, images = system_of(data), others.images(slice(None))
    moved = system(images, {"hat": 1.0})
    rows = (moved.mean(dim=(1, 3)), images.mean(dim=(1, 3)))  # (B, 4)
    with_hat = images[others.labels[:, 0] == 1].mean(dim=(1, 3))[:, 0].mean()
    assert (rows[0][:, 0] - with_hat).abs().max() < 0.1 and (rows[0] - rows[1])[:, 1:].abs().max() < 0.1
    medium = system(images, {"skin:light": -1.0})  # the nearest of the others
    assert ((medium - images).mean(dim=(1, 3))[others.labels[:, 1] == 0, 3] * 127.5).mean() == pytest.approx(60, abs=2)
    reader = attribute_reader.train_reader(data, steps=300)
    without = others.labels[:, 0] == 0
    assert (reader.read(images) == others.labels).float().mean() > 0.95
    assert (reader.read(moved)[without, 0] == 1).float().mean() > 0.9
    assert (reader.read(moved)[:, 1] == others.labels[:, 1]).float().mean() > 0.9


class Demanding:
    """A reader that sees a hat only in rows that are brighter than any hat, and skin as it is."""

    def read(self, image):
        hat = image[:, :, 0].mean(dim=(1, 2)) > 1.0
        skin = ((image[:, :, 3].mean(dim=(1, 2)) + 1) * 127.5 - 100 + 90) // 60
        return torch.stack([hat.long(), skin.long().clamp(0, 2)], dim=1)


def test_the_shortest_length_is_chosen_at_which_a_value_is_read():
    data, others = labelled(400), labelled(60, seed=3)
    system = system_of(data)
    lengths = finding.choose_lengths(system, FIELDS, finding.encode(Flat(), others), others.labels, Demanding())
    # A hat's row is 100 of 255 brighter: 0.39 beyond the origin, which lies at 0.18; it exceeds 1 from a length of 2.1.
    assert lengths.tolist() == [1.0, 2.5, 1.0, 1.0, 1.0]


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


@pytest.mark.skipif(importlib.util.find_spec("dicebear") is None, reason="no DiceBear, the extra data")
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
    said = call(*move[:1], picture, *move[1:], "--each", "--json", "--out", tmp_path / "each")
    assert [json.loads(line)["moves"] for line in said.splitlines()] == [{"hat": 1.0}] * 2
    assert [Image.open(path).size for path in sorted((tmp_path / "each").iterdir())] == [(16, 16)] * 2
    words = ("evaluate", folder, "--data", tmp_path / "data", "--per-test", 4, "--device", "cpu")
    result = json.loads(call(*words, "--json", "--save"))
    assert result["pictures"] == 30 and result["moves"]["hat -1"]["kept"]["n"] == 4 * 7
    assert result["moved"]["n"] <= 4 * len(result["moves"]) == 4 * (27 + 4)
    assert set(attributes_suite.headline(result)) == {"attributes moved", "attributes kept"}
    assert "attributes moved" in str(checkpoint.read_card(folder)["measured"])
    assert "read as moved" in call(*words)
    assert "no --candidates" in call(*words, "--candidates", 2, code=2)
    facts = json.loads((folder / "attributes.json").read_text())
    every = facts["fields"][facts["attributes"]["hat"][0]]
    of_hat = [{"attributes": {"hat": hat}} for hat in (["hat", ["straw"]], ["hats", []], ["hat", []], ["hat", every])]
    for damage in ({"fields": []}, *of_hat):
        (folder / "attributes.json").write_text(json.dumps(facts | damage))
        assert "is damaged" in call(*move, code=2)
    (folder / "attributes.json").write_text(json.dumps(facts))
    torch.manual_seed(1)
    other = build(checkpoint.load_recipe(folder), "tokenizer")
    checkpoint.save_part(folder, checkpoint.load_recipe(folder), "tokenizer", checkpoint.export(other))
    assert "belongs to another tokenizer" in call(*move, code=2)


def test_codes_cannot_be_moved(tmp_path):
    folder = model(tmp_path / "model", "vqgan", "num_codes: 8, code_dim: 4, latent_channels: 4, attn_resolutions: []")
    with pytest.raises(checkpoint.ModelError, match="moves latents, and this tokenizer gives codes"):
        resynthesis.load_latents(folder)
