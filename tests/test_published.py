"""Published tokenizers in and out, on stand-ins of the published layouts at tiny size: equality, identity, errors."""

import fnmatch
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import published
from kartina.pipeline.checkpoint import load_part, load_recipe, read_card
from kartina.pipeline.convert import from_diffusers
from kartina.pipeline.recipe import build, defaults
from kartina.pipeline.unpickle import WeightsError
from kartina.tokenizers.autoencoder_kl import AutoencoderKL
from kartina.tokenizers.dvae import DiscreteVAE, openai_state_dict
from kartina.tokenizers.vqgan import VQGAN
from kartina.training.run import load

LAYOUT = {"image_size": 16, "width": 32, "blocks_per_level": 1}
TWO = LAYOUT | {"channel_mult": (1, 2), "attn_resolutions": (8,)}
MODELS = {
    "vqgan": lambda: VQGAN(**TWO, num_codes=20, code_dim=4, latent_channels=6),
    "gumbel": lambda: VQGAN(**TWO, num_codes=20, code_dim=6, latent_channels=6, quantizer="gumbel"),
    "kl": lambda: AutoencoderKL(**LAYOUT, channel_mult=(1, 1, 1, 1)),
}


def run(*words) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[name]()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def stand_in(name: str, path: Path, prefix: str = "", **extra: torch.Tensor) -> nn.Module:
    """Writes a checkpoint as CompVis' training does, for a `.ckpt`, or of its weights, for a `.safetensors`."""
    made = model(name)
    weights = {prefix + n: value for n, value in made.state_dict().items() if not n.startswith("scale.")} | extra
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    else:
        torch.save({"state_dict": weights, "epoch": 1, "callbacks": {nn.Identity: {"best": 1.0}}}, path)
    return made


def loaded(folder: Path) -> nn.Module:
    return load_part(folder, load_recipe(folder), "tokenizer")


def image() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())


@pytest.mark.parametrize("name", ["vqgan", "gumbel"])
def test_a_checkpoint_of_taming_becomes_a_model_folder(tmp_path, name):
    extra = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    made = stand_in(name, tmp_path / "last.ckpt", **extra)
    run(
        "convert",
        tmp_path / "last.ckpt",
        tmp_path / "m",
        "--image-size",
        16,
        "--licence",
        "MIT",
        "--name",
        "imported/vq",
    )
    again = loaded(tmp_path / "m")
    same(again.state_dict(), made.state_dict())
    assert torch.equal(again.encode(image()), made.encode(image()))
    card = read_card(tmp_path / "m")
    assert (card["name"], card["licence"]) == ("imported/vq", "MIT")
    assert card["parts"]["tokenizer"]["source"] == "last.ckpt"


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_first_stage_of_stable_diffusion_is_found_and_scaled(tmp_path, ending, prefix):
    others = {"model.diffusion_model.out.0.weight": torch.zeros(2), "model_ema.decay": torch.zeros(1)} if prefix else {}
    made = stand_in("kl", tmp_path / f"sd.{ending}", prefix, **others)
    run("convert", tmp_path / f"sd.{ending}", tmp_path / "m", "--image-size", 16)
    again, z = loaded(tmp_path / "m"), made.encode(image())
    torch.testing.assert_close(again.encode(image()), z * 0.18215)
    torch.testing.assert_close(again.decode(z * 0.18215), made.decode(z), atol=1e-5, rtol=1e-5)
    assert read_card(tmp_path / "m")["licence"] == "not stated"


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_the_first_stage_of_stable_diffusion_xl_has_a_scale_of_its_own(ending, tmp_path):
    path, reader = tmp_path / f"xl.{ending}", {"conditioner.embedders.0.weight": torch.zeros(2)}
    stand_in("kl", path, "first_stage_model.", **reader)
    assert published.load(path, 16)[1]["scale.std"].tolist() == pytest.approx([1 / 0.13025] * 4)


def test_a_scale_that_the_checkpoint_holds_goes_first(tmp_path):
    stand_in("kl", tmp_path / "ldm.ckpt", "first_stage_model.", scale_factor=torch.tensor(0.25))
    section, weights = published.load(tmp_path / "ldm.ckpt", 16)
    assert section["kind"] == "autoencoder_kl" and weights["scale.std"].tolist() == [4.0] * 4


@pytest.mark.parametrize("factor", [torch.ones(2), torch.tensor(0.0), torch.tensor(torch.nan), torch.tensor(-1.0)])
def test_a_factor_that_makes_nothing_of_latents_is_refused(tmp_path, factor):
    stand_in("kl", tmp_path / "ldm.ckpt", "first_stage_model.", scale_factor=factor)
    with pytest.raises(WeightsError, match="ldm.ckpt: (scale_factor must be one number|the factor of its latents)"):
        published.load(tmp_path / "ldm.ckpt")


@pytest.mark.parametrize("name", ["vqgan", "kl"])
def test_export_loads_in_diffusers_and_import_of_it_is_the_identity(tmp_path, name):
    import diffusers

    made = stand_in(name, tmp_path / "a.ckpt")
    run("convert", tmp_path / "a.ckpt", tmp_path / "m", "--image-size", 16)
    run("export", tmp_path / "m", tmp_path / "there", "--to", "diffusers")
    run("convert", tmp_path / "there", tmp_path / "back")
    same(load_file(tmp_path / "back" / "tokenizer.safetensors"), load_file(tmp_path / "m" / "tokenizer.safetensors"))
    assert load_recipe(tmp_path / "back").parts == load_recipe(tmp_path / "m").parts
    run("export", tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "there" / "config.json").read_text()
    reference = getattr(diffusers, "VQModel" if name == "vqgan" else "AutoencoderKL").from_pretrained(
        tmp_path / "there"
    )
    with torch.no_grad():
        if name == "vqgan":
            theirs = reference.decode(reference.encode(image()).latents).sample
            ours = made.decode(made.encode(image()))
        else:
            theirs, ours = reference(image()).sample, made(image())["reconstruction"]
            assert reference.config.scaling_factor == 0.18215
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_a_folder_with_a_vae_in_it_and_a_measured_scale_go_there_and_back(tmp_path):
    section = load_section(tmp_path)
    weights = model("kl").state_dict() | {"scale.mean": torch.randn(4), "scale.std": torch.rand(4) + 0.5}
    published.save_diffusers(tmp_path / "pipe" / "vae", section, weights)
    back, found = published.load(tmp_path / "pipe")
    same(found, weights)
    assert back == section


def load_section(folder: Path) -> dict:
    stand_in("kl", folder / "section.ckpt")
    return published.load(folder / "section.ckpt", 16)[0]


def half(name: str, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A module of a class of the `dall_e` package, as its encoder.pkl holds it."""
    sys.modules.setdefault("dall_e", types.ModuleType("dall_e"))
    package = types.ModuleType(f"dall_e.{name.lower()}")
    sys.modules[package.__name__] = package
    setattr(package, name, type(name, (nn.Module,), {"__module__": package.__name__, "__qualname__": name}))
    top = getattr(package, name)()
    for path, value in weights.items():
        *words, leaf = path.split(".")
        inner = top
        for word in words:
            if word not in inner._modules:
                inner.add_module(word, nn.Module())
            inner = inner._modules[word]
        inner.register_parameter(leaf, nn.Parameter(value))
    return top


def openai_names(model: DiscreteVAE, side: str) -> dict[str, torch.Tensor]:
    """The published names of one half's weights."""
    found = {}
    for name, value in getattr(model, side).state_dict().items():
        *words, leaf = name.split(".")
        match words:
            case ["stem"]:
                path = "input"
            case ["head"]:
                path = "output.conv"
            case ["groups", i, j, "skip"]:
                path = f"group_{int(i) + 1}.block_{int(j) + 1}.id_path"
            case ["groups", i, j, "branch", k]:
                path = f"group_{int(i) + 1}.block_{int(j) + 1}.res_path.conv_{int(k) + 1}"
        found[f"blocks.{path}.{leaf[0]}"] = value
    return found


def test_openais_discrete_vae_becomes_a_model_folder(tmp_path):
    torch.manual_seed(2)
    made = DiscreteVAE(image_size=16, num_codes=12, width=8, init_width=6, num_groups=3, blocks_per_group=2)
    halves = {side: openai_names(made, side) for side in ("encoder", "decoder")}
    same(openai_state_dict(halves["encoder"], halves["decoder"]), made.state_dict())
    (tmp_path / "dalle").mkdir()
    for side, weights in halves.items():
        torch.save(half(side.capitalize(), weights), tmp_path / "dalle" / f"{side}.pkl")
        del sys.modules[f"dall_e.{side}"]
    del sys.modules["dall_e"]
    run("convert", tmp_path / "dalle", tmp_path / "m", "--image-size", 16)
    again = loaded(tmp_path / "m")
    same(again.state_dict(), made.state_dict())
    assert torch.equal(again.encode(image()), made.encode(image()))
    with pytest.raises(WeightsError, match="no class for this dvae"):
        run("export", tmp_path / "m", tmp_path / "there")


def test_wrong_checkpoints_are_one_clear_error(tmp_path):
    path, made = tmp_path / "a.ckpt", model("vqgan")
    names = made.state_dict()
    for weights, message in (
        (
            {n: v for n, v in names.items() if "norm_out" not in n},
            "4 tensors do not fit a vqgan, first decoder.norm_out",
        ),
        (names | {"colorize": torch.zeros(3)}, "1 tensors do not fit a vqgan, first colorize: expected none"),
        (names | {"quant_conv.bias": torch.zeros(9)}, "first quant_conv.bias: expected .4,., got .9,."),
        (
            {"model.diffusion_model.a": torch.zeros(1)},
            "it is a latent diffusion model without its first stage; expected",
        ),
        ({"visual.proj": torch.zeros(1)}, "it is a CLIP; expected a VQ-GAN"),
        ({"x": torch.zeros(1)}, "of no model known"),
        ({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, "an autoencoder without"),
    ):
        torch.save({"state_dict": weights}, path)
        with pytest.raises(WeightsError, match=rf"a\.ckpt: .*{message}"):
            published.load(path, 16)
    torch.save([1], path)
    with pytest.raises(WeightsError, match="no state dict"):
        published.load(path)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError, match="not a whole safetensors"):
        published.load(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="is not there"):
        published.load(tmp_path / "none")
    with pytest.raises(WeightsError, match="holds no published tokenizer"):
        published.load(tmp_path)


@pytest.mark.parametrize("name", ["vqgan", "kl"])
def test_a_lone_autoencoder_of_the_hub_becomes_a_model_folder(tmp_path, monkeypatch, name):
    """Its config and weights lie at the top; what lies beside them (a picture, a pickle, halves) is not fetched."""
    import huggingface_hub

    there, cache = tmp_path / "there", tmp_path / "cache"
    stand_in(name, tmp_path / "a.ckpt")
    run("convert", tmp_path / "a.ckpt", tmp_path / "m", "--image-size", 16)
    run("export", tmp_path / "m", there, "--to", "diffusers")
    for other in ("sample.png", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (there / other).write_bytes(b"not this one")

    def fetch(repository, allow_patterns):
        assert repository == "someone/autoencoder"
        for path in there.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                cache.mkdir(exist_ok=True)
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda _, name: [path.name for path in there.iterdir()]
    )
    known = load_file(tmp_path / "m" / "tokenizer.safetensors")
    for number, source in enumerate(["hf-hub:someone/autoencoder", "someone/autoencoder"]):
        run("convert", source, tmp_path / f"m{number}")
        same(load_file(tmp_path / f"m{number}" / "tokenizer.safetensors"), known)
    assert {path.name for path in cache.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert torch.equal(loaded(tmp_path / "m0").encode(image()), loaded(tmp_path / "m").encode(image()))


@pytest.mark.parametrize("source", ["models/vqgan.ckpt", "models/vqgan.SAFETENSORS", "./vqgan", "a/b/c", "vqgan"])
def test_a_path_to_nothing_is_not_sought_on_the_hub(tmp_path, monkeypatch, source):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: pytest.fail(f"{name} was asked for"))
    with pytest.raises(ValueError, match=f"no file or folder '{source}'; for the hub write hf-hub:OWNER/NAME"):
        run("convert", source, tmp_path / "m")
    assert published.is_repository("stabilityai/stable-diffusion-2.1") and published.is_repository(f"hf-hub:{source}")


def test_wrong_folders_of_diffusers_are_one_clear_error(tmp_path):
    section, folder = load_section(tmp_path), tmp_path / "vae"
    published.save_diffusers(folder, section, model("kl").state_dict())
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "of 'UNet2DConditionModel'; expected one of VQModel, AutoencoderKL"),
        ({"_class_name": "VQModel"}, "says VQModel, the weights are of autoencoder_kl"),
        ({"act_fn": "relu"}, "act_fn is 'relu', expected 'silu'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=message):
            published.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not readable as JSON"):
        published.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="is missing"):
        published.load(folder)
    with pytest.raises(ValueError, match="is there already"):
        run("convert", folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper/kl-f8", "paper/vqgan-f16-1024", "paper/vqgan-f16-16384"])
@torch.no_grad()
def test_the_whole_autoencoders_equal_diffusers(name):
    """At their published sizes, 72 to 84 million parameters, in float32, one picture of 256 pixels there and back."""
    import diffusers

    recipe = load(name, [])[0]
    ours, section = build(recipe, "tokenizer").eval(), defaults("tokenizer", recipe.parts["tokenizer"]["kind"])
    section |= recipe.parts["tokenizer"]
    codes = {"num_vq_embeddings": section["num_codes"], "vq_embed_dim": section["code_dim"]} if "vq" in name else {}
    kind = diffusers.VQModel if codes else diffusers.AutoencoderKL
    torch.manual_seed(0)
    theirs = kind(**published.autoencoder_layout(section), **codes).eval()
    if codes:
        theirs.quantize.embedding.weight.normal_()  # as it begins, several codes would be equally near
    ours.load_state_dict(from_diffusers(theirs.state_dict(), None if codes else 1.0))
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = theirs.encode(image)
    if codes:
        latents, out = encoded.latents, ours(image)
        again, found, seen = theirs.decode(latents).sample, out["latents"], out["reconstruction"]
        assert torch.equal(theirs.quantize(latents)[2][2], out["codes"].flatten())
    else:
        latents, noise = encoded.latent_dist.mode(), torch.zeros(1, 4, 32, 32)
        out = ours(image, noise)
        again, found, seen = theirs.decode(latents).sample, out["mean"], out["reconstruction"]
    for one, other in ((found, latents), (seen, again)):
        assert other.std() > 0.05
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
