"""Licences: what is trained on something names them, and their notices go along."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint, notices
from kartina.pipeline.recipe import Recipe, RecipeError, build
from kartina.training import run as runs
from kartina.training.checks import check
from kartina.training.shards import check_shards


def test_a_recipe_names_the_licences_of_its_shards(tmp_path):
    words = ["training.data.kind=shards", f"training.data.shards={tmp_path}"]
    licences = [{"licence": name} for name in ("Apache-2.0 AND MIT", "CC0-1.0")]
    for manifest, named in (({"licences": licences}, "shapes"), ({"licences": [3]}, None), ([], None)):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        recipe, training = runs.load("shapes/dalle", words)
        asked = (recipe, training, ["tokenizer"], 1, tmp_path / "model")
        if named is None:
            check(*asked)
        else:
            with pytest.raises(RecipeError, match=r"under its licence too \(MIT\), .* licence='Apache-2.0 AND MIT'"):
                check(*asked)
    (tmp_path / "manifest.json").write_text(json.dumps({"licences": licences}))
    recipe, training = runs.load("shapes/dalle", [*words, "licence=Apache-2.0 AND MIT"])
    check(recipe, training, ["tokenizer"], 1, tmp_path / "model")


def test_notices_of_a_folder_that_is_a_link_are_not_taken(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "LICENSES").symlink_to(tmp_path / "private")
    with pytest.raises(RecipeError, match="LICENSES is a link; put the folder itself there"):
        notices.copy(tmp_path / "data" / "LICENSES", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_pictures_are_packed_with_their_licence_and_a_recipe_for_any_pictures_claims_none(tmp_path):
    folder, shards = tmp_path / "in", tmp_path / "shards"
    folder.mkdir()
    for k in range(2):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a caption")
    done = CliRunner().invoke(cli.app, ["data", "pack", str(folder), str(shards), "--licence", "CC-BY-NC-4.0"])
    assert done.exit_code == 0, done.output
    assert notices.of_data(shards) == ["CC-BY-NC-4.0"] and check_shards(shards).bad == {}
    recipe, training = runs.load("own/dalle", [f"training.data.shards={shards}"])
    assert recipe.licence == "not stated"
    with pytest.raises(RecipeError, match=r"\(CC-BY-NC-4.0\), not named by the recipe; write licence='CC-BY-NC-4.0'"):
        check(recipe, training, ["tokenizer"], 1, tmp_path / "model")
    recipe, training = runs.load("own/dalle", [f"training.data.shards={shards}", "licence=CC-BY-NC-4.0"])
    check(recipe, training, ["tokenizer"], 1, tmp_path / "model")


def test_notices_go_along_with_an_export(tmp_path):
    body = {"image_size": 32, "width": 4, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 2}
    parts = {"tokenizer": {"kind": "autoencoder_kl", **body}}
    recipe, folder = Recipe(name="tests/kl", paper="none", image_size=32, parts=parts), tmp_path / "model"
    checkpoint.save_part(folder, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer"), torch.float32))
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "art.txt").write_text("of the art")
    done = CliRunner().invoke(cli.app, ["export", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "LICENSES" / "art.txt").read_text() == "of the art"


def test_notices_of_one_name_are_kept_apart_and_no_link_is_followed_outside(tmp_path):
    for source, text in (("a", "ours"), ("b", "theirs"), ("b", "theirs")):
        (tmp_path / source).mkdir(exist_ok=True)
        (tmp_path / source / "art.txt").write_text(text)
        notices.copy(tmp_path / source, tmp_path / "model")
    assert sorted(path.read_text() for path in (tmp_path / "model" / "LICENSES").iterdir()) == ["ours", "theirs"]
    (tmp_path / "c" / "more").mkdir(parents=True)
    (tmp_path / "c" / "more" / "art.txt").write_text("below")
    notices.copy(tmp_path / "c", tmp_path / "model")
    assert (tmp_path / "model" / "LICENSES" / "more" / "art.txt").read_text() == "below"
    (tmp_path / "c" / "more" / "link.txt").symlink_to(tmp_path / "a" / "art.txt")
    with pytest.raises(ValueError, match="is a link that leaves"):
        notices.copy(tmp_path / "c", tmp_path / "model")
