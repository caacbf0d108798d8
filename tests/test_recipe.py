"""Recipes: strict keys with the nearest valid one, overrides, closed tables, and counts on the meta device."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kartina import cli
from kartina.layers.discriminator import BatchNorm
from kartina.pipeline import recipe as recipes
from kartina.training import run as runs
from kartina.training.stages import STAGES

ALL = sorted(str(p.relative_to(runs.RECIPES).with_suffix("")) for p in runs.RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_builds_on_the_meta_device(name):
    recipe, training = runs.load(name, [])
    assert recipe.name == name
    counts = recipes.count_parameters(recipe)
    assert set(counts) == set(recipe.parts) and all(count > 0 for count in counts.values())
    if training:
        assert set(training.stages) <= set(recipe.parts)


def test_published_size_of_dalle():
    counts = recipes.count_parameters(runs.load("paper/dalle-12b", [])[0])
    assert counts["tokenizer"] == 53_786_240 + 43_829_766
    assert 12.0e9 < counts["prior"] < 12.4e9


@pytest.mark.parametrize(
    ("name", "tokenizer", "discriminator"),
    [
        ("vqgan-f16-1024", 72_141_699, 2_765_633),
        ("vqgan-f16-16384", 76_073_859, 663_361),
        ("kl-f8", 83_653_863, 2_765_633),
        ("gumbelvq-f8", 68_995_971, 663_361),  # counted here, not published
        ("vqvae-cifar10", 4_942_915, None),  # likewise
        ("openai-dvae", 53_786_240 + 43_829_766, None),
    ],
)
def test_sizes_of_the_published_tokenizers(name, tokenizer, discriminator):
    counts = recipes.count_parameters(runs.load(f"paper/{name}", [])[0])
    assert (counts["tokenizer"], counts.get("discriminator")) == (tokenizer, discriminator)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("openai-dvae", {"tokenizer": 53_786_240 + 43_829_766}),
        ("vqgan-f16-1024", {"tokenizer": 72_141_699, "discriminator": 2_765_633}),
        ("vqgan-f16-16384", {"tokenizer": 76_073_859, "discriminator": 663_361}),
        ("kl-f8", {"tokenizer": 83_653_863, "discriminator": 2_765_633}),
    ],
)
def test_the_command_counts_published_tokenizers(name, counts):
    printed = CliRunner().invoke(cli.app, ["plan", f"paper/{name}", "--json"])
    assert json.loads(printed.output)["parameters"] == counts


@pytest.mark.parametrize(
    ("name", "prior", "text"),
    [
        ("ddpm-cifar10", 35_746_307, None),
        ("ddpm-256", 113_673_219, None),
        ("sd-1.5", 859_520_964, 123_060_480),
        ("sd-2.1", 865_910_724, 340_387_840),
        ("ldm-t2i-1.4b", 872_300_484, 668_848_640),  # the text transformer is ours, see the recipe
    ],
)
def test_sizes_of_the_published_diffusion_models(name, prior, text):
    counts = recipes.count_parameters(runs.load(f"paper/{name}", [])[0])
    assert (counts["prior"], counts.get("text")) == (prior, text)


def test_overrides_reach_the_stage():
    _, training = runs.load("shapes/dalle", ["stages.tokenizer.steps=24"])
    assert training.stages["tokenizer"].steps == 24


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.tokenizer.stps=24", "did you mean 'steps'"),
        ("stages.tokeniser.steps=24", "did you mean 'tokenizer'"),
        ("parts.prior.widht=8", "did you mean 'width'"),
        ("parts.prior.kind=dale", "did you mean 'dalle'"),
        ("imagesize=8", "did you mean 'image_size'"),
        ("sampling={guidance: 2}", "did you mean 'guidance_scale'"),
        ("sampling={temperature: .inf}", "sampling: temperature"),
        ("stages.tokenizer.steps", "expected key.sub=value"),
        ("stages.tokenizer.steps=many", "steps"),
        ("stages.tokenizer.steps=[", "the value is not readable as YAML"),
    ],
)
def test_wrong_overrides_name_the_right_key(override, message):
    with pytest.raises(recipes.RecipeError, match=message):
        runs.load("shapes/dalle", [override])


@pytest.mark.parametrize("override", ["depth=abc", "width=1.5", "width=130", "num_codes=-1", "num_heads=0", "grid=8"])
def test_arguments_that_no_constructor_takes_name_their_part(override):
    recipe, _ = runs.load("shapes/dalle", [f"parts.prior.{override}"])
    with pytest.raises(recipes.RecipeError, match=r"parts\.prior cannot be built"):
        recipes.count_parameters(recipe)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(recipes.RecipeError, match="shapes/dalle"):
        runs.find("shapes/dale")


def test_a_part_cannot_name_a_module():
    text = "name: a/b\npaper: x\nimage_size: 8\nparts: {tokenizer: {kind: os.system}}\n"
    with pytest.raises(recipes.RecipeError, match="os.system"):
        recipes.parse(text, "hostile")


def test_the_global_batch_must_divide():
    _, training = runs.load("shapes/dalle", [])
    stage = training.stages["tokenizer"]
    assert runs.division(stage, 2) == (stage.global_batch // 2, 1)
    with pytest.raises(recipes.RecipeError, match="does not divide"):
        runs.division(stage, 3)


@pytest.mark.parametrize("name", ALL)
def test_statistics_of_a_batch_are_of_all_devices_and_in_published_discriminators_alone(name):
    """Those of a device would make a run another one on another number of devices."""
    recipe, _ = runs.load(name, [])
    with torch.device("meta"):
        modules = [module for part in recipe.parts for module in recipes.build(recipe, part).modules()]
    normed = [module for module in modules if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(module, BatchNorm) for module in normed)
    assert bool(normed) == (name.startswith("paper/") and "discriminator" in recipe.parts)


def test_what_differs_is_named_down_to_the_value():
    old = {"steps": 4, "part": {"kind": "vae", "width": 8, "shift": [1]}, "optimizer": {"lr": 0.002}, "against": {}}
    new = {"steps": 9, "part": {"kind": "vae", "width": 16}, "optimizer": {"lr": 0.004, "muon": None}, "against": {}}
    lines = ["part.width: 8 -> 16", "part.shift: [1] -> (absent)", "optimizer.lr: 0.002 -> 0.004"]
    lines.append("optimizer.muon: (absent) -> null")
    assert runs.differences(old, new) == "; ".join(["steps: 4 -> 9", *lines])
    assert runs.differences(old, new, extend=True) == "; ".join(lines)
    assert runs.differences(new, json.loads(json.dumps(new))) == ""
    assert runs.differences({}, {str(k): k for k in range(10)}).endswith("7: (absent) -> 7; and 2 more")


@pytest.mark.parametrize("name", ["shapes/stable-diffusion", "shapes/vqgan"])
def test_a_run_of_an_older_version_goes_on_and_another_value_of_a_new_field_is_a_difference(name):
    """What an identity does not have yet was as the default of its field says."""
    recipe, training = runs.load(name, [])
    for stage in training.stages:
        now = json.loads(json.dumps(runs.identity(recipe, training, stage, "data", {})))
        old = {key: value for key, value in now.items() if key not in ("ema", "optimizers")}
        old["optimizer"] = {key: value for key, value in now["optimizer"].items() if key != "shape"}
        if "diffusion" in now:
            old["diffusion"] = {k: v for k, v in now["diffusion"].items() if k != "num_timesteps"}
        fields = (now["ema"] == 0.999, now["optimizers"] == {}, now["optimizer"]["shape"] == "linear")
        found = runs.differences(runs.completed(old), now)
        assert (found == "") == all(fields), (stage, found)
        assert runs.differences(runs.completed(now), now) == ""
        later = now | {"ema": 0.5, "optimizer": now["optimizer"] | {"shape": "cosine"}}
        found = runs.differences(runs.completed(old), later)
        assert "ema: 0.999 -> 0.5" in found and "optimizer.shape: linear -> cosine" in found


def test_a_stage_reads_its_own_levels_and_jitter():
    _, training = runs.load("shapes/dalle", ["stages.tokenizer.jitter=0.1", "stages.tokenizer.levels=[S2]"])
    own, other = training.data_of("tokenizer"), training.data_of("prior")
    assert (own.jitter, own.levels) == (0.1, ("S2",))
    assert (other.jitter, other.levels) == (training.data.jitter, training.data.levels)
    assert own != training.data and other.contrast == 1


def test_knobs_of_the_recipe_s_own_sampler_and_guidance_are_not_those_of_another():
    recipe = runs.load("shapes/stable-diffusion", [])[0]
    said = {"sampler": "ddim", "eta": 1.0, "spacing": "leading", "guidance_rescale": 0.5, "negative": "a ring"}
    recipe = recipe.model_copy(update={"sampling": recipes.sampling_knobs(recipe, said, "tests")})
    same = recipes.sampling_knobs(recipe, {"sampler": "ddim", "guidance_scale": 2.0}, "tests")
    assert {name: same[name] for name in said} == said
    other = recipes.sampling_knobs(recipe, {"sampler": "unipc"}, "tests")
    assert (other["eta"], other["spacing"], other["negative"]) == (None, None, "a ring")
    alone = recipes.sampling_knobs(recipe, {"guidance_scale": 1.0}, "tests")
    assert (alone["eta"], alone["guidance_rescale"], alone["negative"]) == (1.0, 0.0, "")


def test_the_page_on_recipes_names_every_recipe_key_kind_and_knob_and_no_other():
    """Between backticks, or in a list behind the folder of recipes."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`([\w./-]+)`", page))
    sections = [runs.Training, runs.Data, runs.Stage, runs.Optimizer, *recipes.SAMPLING.values()]
    sections += [recipes.Recipe, recipes.Captions, recipes.Diffusion]
    known = {key for section in sections for key in section.model_fields}
    known |= {kind for kinds in recipes.PARTS.values() for kind in kinds} | recipes.PARTS.keys()
    known |= {knob for stage in STAGES.values() for knob in stage.knobs}
    names = {line.split("`")[1]: re.split(r"[ ,|]+", line.split("`")[2]) for line in page.splitlines() if "/` " in line}
    assert {folder + name for folder, words in names.items() for name in words if folder + name in ALL} == {*ALL}
    assert not known - said, "not on the page"
    words = {"stages.", "training.stages.", "training.data", "training", "training/recipes/", ".yaml", "shapes/dalle"}
    words |= {"shapes", "digits", "shards"}  # kinds of data
    assert not said - known - words - {*names}, "not in the code"
