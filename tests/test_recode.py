"""A trained transformer over another tokenizer: what it knows goes over to the codes that stand in their places."""

import math

import pytest
import torch
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import Recipe, build
from kartina.training import __main__ as trainer
from kartina.training.recode import _rows


@pytest.fixture(scope="module")
def system(tiny, prepared, tmp_path_factory):
    """A tiny DALL-E, its tokenizer's folder, and that of one with the codes in another order."""
    home = tmp_path_factory.mktemp("recode")
    folder = prepared(home / "run", "dalle")
    assert trainer.main([*tiny["dalle"][1], "stages.prior.steps=2", "--run", str(folder)]) == 0
    model = folder / "model"
    recipe, weights = checkpoint.load_recipe(model), checkpoint.load_weights(model, "tokenizer")
    order = torch.randperm(recipe.parts["tokenizer"]["num_codes"], generator=torch.Generator().manual_seed(0))
    moved = dict(weights)
    for name in ("encoder.head.weight", "encoder.head.bias", "decoder.patch_embedding"):
        moved[name] = weights[name][order]
    checkpoint.save_part(home / "moved", recipe, "tokenizer", moved)
    return model, home / "moved", order


def recoded(model, tokenizer, out, *more):
    command = ["recode", str(model), str(tokenizer), str(out), "--pictures", "300", *more]
    return CliRunner().invoke(cli.app, command)


def test_codes_in_another_order_are_told_as_likely_as_before(system, tmp_path):
    model, moved, order = system
    done = recoded(model, moved, tmp_path / "out")
    assert done.exit_code == 0, done.output
    recipe = checkpoint.load_recipe(tmp_path / "out")
    old, new = (checkpoint.load_part(folder, recipe, "prior") for folder in (model, tmp_path / "out"))
    card = checkpoint.read_card(tmp_path / "out")
    parts, before = card["parts"], checkpoint.read_card(model)["parts"]
    assert parts["prior"]["trained_against"]["tokenizer"] == parts["tokenizer"]["hash"] != before["tokenizer"]["hash"]
    assert parts["prior"]["recoded_from"]["prior"] == before["prior"]["hash"]
    torch.testing.assert_close(new.code_embedding.weight, old.code_embedding.weight[order])
    text = torch.randint(1, 20, (3, recipe.captions.context_length), generator=torch.Generator().manual_seed(1))
    codes = torch.randint(len(order), (3, old.grid[0] * old.grid[1]), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(new(text, codes)[1], old(text, order[codes])[1][..., order], rtol=1e-4, atol=1e-4)


def test_it_is_trained_further_over_the_new_tokenizer(system, tiny, tmp_path):
    model, moved, _ = system
    assert recoded(model, moved, tmp_path / "out").exit_code == 0
    command = [*tiny["dalle"][1], "--from", str(tmp_path / "out"), "--run", str(tmp_path / "run")]
    assert trainer.main([*command, "stages.prior.steps=2"]) == 0
    parts = checkpoint.read_card(tmp_path / "run" / "model")["parts"]
    start = checkpoint.read_card(tmp_path / "out")["parts"]
    assert parts["prior"]["identity"]["from"] == {"prior": start["prior"]["hash"]}
    assert parts["tokenizer"]["hash"] == start["tokenizer"]["hash"]


def test_a_code_that_is_divided_gives_each_half_its_share():
    """Of the old codes 0 and 1 the first is divided in 3 and 1 places of 4; a third one is met nowhere."""
    counts = torch.tensor([[3.0, 0], [1, 0], [0, 5], [0, 0]])
    embedding, head, bias = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0], [-1]]), torch.tensor([0.5, -0.5])
    new_embedding, new_head, new_bias = _rows(counts, embedding, head, bias)
    assert new_embedding.tolist() == [[1, 2], [1, 2], [3, 4], [2, 3]]
    old, new = ((h * 0.7).squeeze(1) + b for h, b in ((head, bias), (new_head, new_bias)))
    assert float(new[:2].exp().sum()) == pytest.approx(float(old[0].exp()))
    assert float(new[0] - new[1]) == pytest.approx(math.log(3))
    assert float(new[2]) == pytest.approx(float(old[1])) and float(new_bias[3]) == -0.5


def test_what_cannot_be_recoded_is_refused(system, tmp_path):
    model, moved, _ = system
    done = recoded(model, moved, moved)
    assert done.exit_code != 0 and "is there already" in str(done.exception)
    done = recoded("shapes/stable-diffusion", moved, tmp_path / "out")
    assert "only a prior of kind dalle has rows for codes" in str(done.exception)
    recipe = checkpoint.load_recipe(model)
    parts = {"tokenizer": recipe.parts["tokenizer"] | {"patch": [4, 4]}}
    other = Recipe(name="tests/other", paper="none", image_size=32, parts=parts)
    weights = checkpoint.export(build(other, "tokenizer"))
    checkpoint.save_part(tmp_path / "other", other, "tokenizer", weights)
    done = recoded(model, tmp_path / "other", tmp_path / "out")
    assert "expected codes on a grid of (16, 8) for pictures of 32, got codes of (8, 8) for 32" in str(done.exception)
    done = recoded(model, "shapes/stable-diffusion", tmp_path / "out")
    assert "got latents" in str(done.exception) and not (tmp_path / "out").exists()
