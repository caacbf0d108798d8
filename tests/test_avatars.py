"""Avatars: labels are what was drawn, held-out cells stay out, equal arguments give equal shards, captions tell all."""

import importlib.util
import json
from collections import Counter

import pytest
import torch

from kartina.training.data import avatars
from kartina.training.data.avatars_captions import FIELDS, caption
from kartina.training.data.labelled import attributes_of, read_fields, read_labelled
from kartina.training.shards import check_shards
from kartina.training.stream import ShardSource

if not all(map(importlib.util.find_spec, ("dicebear", "dicebear_styles", "resvg_py"))):
    pytest.skip("DiceBear is not here, the extra data", allow_module_level=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "avatars"
    return out, avatars.prepare(out, count=60, held_out=8, size=16, samples_per_shard=40)


def test_equal_arguments_give_equal_shards_and_another_seed_others(data, tmp_path):
    out, report = data
    assert (report.samples, report.held_out) == (60, 8) and sum(report.drawn["hat"].values()) == 60
    avatars.prepare(tmp_path / "again", count=60, held_out=8, size=16, samples_per_shard=40)
    avatars.prepare(tmp_path / "other", count=60, held_out=8, size=16, seed=1, samples_per_shard=40)
    hashes = [
        [shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]
        for folder in (out, tmp_path / "again", tmp_path / "other")
    ]
    assert len(hashes[0]) == 2 and hashes[0] == hashes[1] and hashes[0] != hashes[2]
    assert not check_shards(out).bad and not check_shards(out / "held_out").bad


def test_labels_are_those_of_the_draw_and_colours_are_seen(data):
    found = read_labelled(data[0], 16)
    grounds = {"white": (255, 255, 255), "grey": (140, 140, 140), "cyan": (95, 205, 220), "pink": (245, 165, 195)}
    for number in range(60):
        drawn = avatars.draw(0, "train", number)
        labels = {name: found.fields[name][place] for name, place in zip(FIELDS, found.labels[number], strict=True)}
        assert labels == drawn.attributes and not avatars.is_held_out(labels)
        pixels = found.pixels[number].reshape(-1, 3).int()
        colours = [drawn.options["skinColor"], drawn.options["clothingColor"]]
        colours += [drawn.options["hatColor"]] if labels["hat"] != "none" else [drawn.options["hairColor"]]
        wanted = [grounds[labels["background"]], *(tuple(bytes.fromhex(colour[1:])) for colour in colours)]
        for colour in wanted:  # some variants of mouth and eyes lighten the whole face
            assert (pixels - torch.tensor(colour)).abs().amax(1).min() <= 25, (number, colour)
    images = found.images(slice(0, 2))
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1


def test_held_out_cells_are_never_drawn_for_training_and_their_words_are():
    cells = Counter(
        (a["hair_colour"], a["clothes"]) for a in (avatars.draw(0, "train", n).attributes for n in range(800))
    )
    assert not set(avatars.HELD_OUT) & set(cells) and len(cells) == 6 * 4 - len(avatars.HELD_OUT)
    held = [avatars.draw(0, "held_out", n).attributes for n in range(8)]
    assert [(a["hair_colour"], a["clothes"]) for a in held] == [*avatars.HELD_OUT] * 2
    names = [avatars.draw(0, "train", n).name for n in range(200)]
    assert len(set(names)) == 200 and names[0].startswith("pixel-art-")


def test_captions_in_both_languages(data):
    said = ("long", "brown", "dark", "none", "red", "happy", "yellow", "cyan")
    attributes = dict(zip(FIELDS, said, strict=True))
    assert caption(attributes, "en") == (
        "a pixel portrait with long brown hair, dark skin, a red hat, a smile and yellow clothes on a cyan background"
    )
    assert caption(attributes | {"hair": "short", "glasses": "light"}, "ru") == (
        "пиксельный портрет с короткими каштановыми волосами, тёмной кожей, прозрачными очками, красной шапкой, "
        "улыбкой и жёлтой одеждой на голубом фоне"
    )
    batch = ShardSource(data[0], 16, seed=0).read(range(60))
    assert {text.startswith("a pixel") for text in batch.captions} == {True, False} and batch.weight.min() == 1
    with pytest.raises(ValueError, match="a caption needs the fields"):
        caption({"hair": "long"}, "en")


def test_the_folder_says_what_it_holds_and_under_what_licence(data):
    out = data[0]
    assert read_fields(out) == {name: list(values) for name, values in FIELDS.items()} == read_fields(out / "held_out")
    assert "CC0" in (out / "LICENSES" / "pixel-art.txt").read_text()
    held = json.loads((out / "held_out" / "manifest.json").read_text())
    assert (out / "held_out" / held["licences"][0]["notice"]).is_file() and held["kind"] == "avatars"
    names = {one.name: one for one in attributes_of(read_fields(out))}
    assert names["hat"].values == ("blue", "green", "pink", "red") and names["hat"].certain
    assert names["mouth:happy"].certain and not names["skin:dark"].certain and "mouth:sad" not in names


def test_one_clear_error(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="already has content"):
        avatars.prepare(data[0])
    with pytest.raises(ValueError, match="size 16..512"):
        avatars.prepare(tmp_path / "a", size=8)
    with pytest.raises(ValueError, match="holds no labelled pictures"):
        read_labelled(tmp_path, 16)
    monkeypatch.setitem(avatars.UNNAMED, "eyesVariant", ("variant99",))
    with pytest.raises(ValueError, match="DiceBear|variant99|eyesVariant"):
        avatars.prepare(tmp_path / "b", count=1, held_out=1, size=16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -c constraints.txt -e "\.\[data\]"'):
        avatars.prepare(tmp_path / "c")
    assert not list(tmp_path.iterdir())
