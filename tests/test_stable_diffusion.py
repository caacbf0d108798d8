"""Stable Diffusion in and out, beside diffusers: tiny systems of random weights paint the same picture."""

import fnmatch
import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kartina import cli
from kartina.layers.random import normal
from kartina.pipeline import checkpoint, stable_diffusion
from kartina.pipeline.convert_unet import unet_to_compvis
from kartina.pipeline.text_to_image import TextToImage, check_facts, metadata, repaint
from kartina.pipeline.unpickle import WeightsError

SHAPE, SEED, PROMPT = (4, 4, 4), 3, "a Red ring, and the cat's hat!"
KINDS = ("sd1", "sd2")


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory, tiny_stable_diffusion):
    """(kind, folder of diffusers, its picture as 0 to 255)."""
    folder = tmp_path_factory.mktemp(request.param) / "there"
    pipeline = tiny_stable_diffusion(request.param)
    pipeline.save_pretrained(folder)
    return request.param, folder, theirs(pipeline)


def theirs(pipeline, shape=SHAPE, guidance=3.0, prompt=PROMPT):
    pipeline.set_progress_bar_config(disable=True)
    latents = normal(0, 0, torch.tensor([SEED]), shape, "sampler start")
    image = pipeline(prompt, latents=latents, num_inference_steps=4, guidance_scale=guidance, output_type="np").images
    return image[0].astype(np.float64) * 255


def ours(model, prompt=PROMPT, **how):
    system = model if isinstance(model, TextToImage) else TextToImage.load(model)
    return np.asarray(system(prompt, seed=SEED, num_steps=4, guidance_scale=3.0, **how)[0].image).astype(float)


def run(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_folder_of_diffusers_paints_the_same(published):
    _, folder, picture = published
    assert picture.std() > 10
    assert np.abs(ours(folder) - picture).max() <= 1


def single_file(kind, folder, path):
    """The weights of a folder of diffusers as CompVis' training writes them."""
    system = stable_diffusion.load(folder)
    vae = {n: t for n, t in system.weights["tokenizer"].items() if not n.startswith("scale.")}
    unet = unet_to_compvis(system.weights["prior"], linear_projections=kind == "sd2")
    if kind == "sd1":
        text = {f"transformer.{n}": t for n, t in load_file(folder / "text_encoder" / "model.safetensors").items()}
        text["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        text = {f"model.{n}": t for n, t in system.weights["text"].items()}
        last = {n.replace("resblocks.1.", "resblocks.2."): torch.zeros_like(t) for n, t in text.items()}
        text |= {n: t for n, t in last.items() if "resblocks.2." in n}
        text |= {"model.logit_scale": torch.ones(()), "model.text_projection": torch.zeros(64, 64)}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float()
    weights = {"betas": betas, "alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.ones(())}
    for prefix, part in (("model.diffusion_model.", unet), ("first_stage_model.", vae), ("cond_stage_model.", text)):
        weights |= {f"{prefix}{name}": tensor.clone().contiguous() for name, tensor in part.items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "global_step": 1, "callbacks": {torch.nn.Identity: {}}}, path)
    return path


def test_the_single_file_of_the_same_weights_paints_the_same(published, tmp_path):
    kind, folder, _ = published
    path = single_file(kind, folder, tmp_path / ("sd.ckpt" if kind == "sd1" else "sd.safetensors"))
    more = ["--prediction", "v"] if kind == "sd2" else []
    told = run("convert", path, tmp_path / "m", "--image-size", 32, "--tokenizer", folder / "tokenizer", *more)
    assert "prior: " in told
    a, b = TextToImage.load(tmp_path / "m"), TextToImage.load(folder)
    assert a.model_hash == b.model_hash and a.captions.definition() == b.captions.definition()
    assert a.recipe.diffusion.prediction == b.recipe.diffusion.prediction
    assert (ours(a) == ours(b)).all()
    if kind == "sd1":  # it says all that is needed
        loaded = stable_diffusion.load(path, image_size=32, tokenizer=folder / "tokenizer")
        assert loaded.recipe.parts == a.recipe.parts


def test_import_export_and_import_again_is_the_identity(published, tmp_path):
    _, folder, picture = published
    run("convert", folder, tmp_path / "m", "--licence", "openrail", "--name", "imported/sd")
    run("export", tmp_path / "m", tmp_path / "there", "--to", "diffusers")
    run("convert", tmp_path / "there", tmp_path / "again", "--licence", "openrail", "--name", "imported/sd")
    for name in ("recipe.yaml", "captions.json"):
        assert (tmp_path / "m" / name).read_text() == (tmp_path / "again" / name).read_text()
    one, two = (json.loads((tmp_path / where / "card.json").read_text())["parts"] for where in ("m", "again"))
    assert {part: entry["hash"] for part, entry in one.items()} == {part: entry["hash"] for part, entry in two.items()}
    assert np.abs(theirs(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there")) - picture).max() < 1e-2
    painted = ours(tmp_path / "m")
    assert (painted == ours(folder)).all() and np.abs(painted - picture).max() <= 1


def test_captions_have_the_ids_of_transformers_in_both_forms(published, tmp_path):
    kind, folder, _ = published
    system = stable_diffusion.load(folder)
    run("convert", folder, tmp_path / "m")
    run("export", tmp_path / "m", tmp_path / "there")
    assert not (folder / "tokenizer" / "vocab.json").exists() and (tmp_path / "there/tokenizer/vocab.json").exists()
    both = stable_diffusion.load(tmp_path / "there").captions
    reference = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    texts = [PROMPT, "Красный   круг\n🐈", "it's <|endoftext|> 1234 wow!!! <|STARTOFTEXT|>", "e\u0301", " "]
    frame = checkpoint.outline(system.recipe, "text", 100).frame
    for text in texts:
        ids = reference(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for captions in (system.captions, both):
            assert frame(*captions.encode([text])).tolist() == ids.tolist()
    assert system.captions.decode(system.captions.encode(["a red cat"])[0][:, :3])[0] == "a red cat"


@pytest.mark.parametrize("published", ["sd1"], indirect=True)
def test_a_long_prompt_is_cut_with_a_word_of_what_was(published):
    _, folder, _ = published
    system = TextToImage.load(folder)
    with pytest.warns(UserWarning, match=r"longer than 75 tokens are cut, here before 'red ring"):
        long = ours(system, "a " * 75 + "red ring")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (ours(system, "a " * 75) == long).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("published", ["sd1"], indirect=True)
def test_half_the_digits(published, dtype):
    _, folder, picture = published
    half = TextToImage.load(folder, dtype=dtype)
    assert {p.dtype for part in half.parts.values() for p in part.parameters()} == {dtype}
    assert np.abs(ours(half) - picture).mean() < 8


@pytest.mark.parametrize("published", ["sd1"], indirect=True)
def test_where_memory_ends_attention_is_sliced_and_then_the_picture_decoded_in_tiles(published, monkeypatch):
    _, folder, picture = published
    system = TextToImage.load(folder)
    paint, fails = system._paint, [True]

    def fail_at_first(*arguments):
        if fails.pop():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return paint(*arguments)

    monkeypatch.setattr(system, "_paint", fail_at_first)
    monkeypatch.setattr("kartina.pipeline.memory._QUERIES", 3)
    fails[:] = [False, True]
    with pytest.warns(UserWarning, match="attention takes 3 queries at a time, guidance two passes"):
        assert np.abs(ours(system) - picture).max() <= 1
    fails[:] = [False, True]
    with pytest.warns(UserWarning, match="decoding in tiles"):
        tiled = ours(system)
    assert system.parts["tokenizer"].tile == 2 and tiled.shape == picture.shape and (tiled != picture).any()
    monkeypatch.setattr(system, "_paint", paint)
    painting = system(PROMPT, seed=SEED, num_steps=4, guidance_scale=3.0)[0]
    again = repaint(TextToImage.load(folder), metadata(painting))
    assert (metadata(painting)["tile"], metadata(painting)["sliced"]) == (2, True) and not np.any(again.image - tiled)
    with pytest.raises(ValueError, match="tile must be a side"):
        check_facts(metadata(painting) | {"tile": 10**9})
    with pytest.raises(ValueError, match="sliced must be true or false"):
        check_facts(metadata(painting) | {"sliced": 3})
    monkeypatch.setattr(system, "_paint", fail_at_first)
    fails[:] = [True]
    with pytest.raises(torch.OutOfMemoryError):
        ours(system)


def as_bin(path):
    torch.save(load_file(path), path.with_name(path.name.replace("model.safetensors", "pytorch_model.bin")))


@pytest.mark.parametrize("published", ["sd1"], indirect=True)
def test_halves_and_pickles_of_a_folder_are_read(published, tmp_path):
    _, folder, picture = published
    copy = shutil.copytree(folder, tmp_path / "copy")
    as_bin(copy / "text_encoder" / "model.safetensors")
    (copy / "text_encoder" / "model.safetensors").unlink()
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(unet), unet.with_suffix(".bin"))
    unet.unlink()
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(vae).items()}, vae.with_suffix(".fp16.safetensors"))
    vae.unlink()
    system = stable_diffusion.load(copy)
    assert system.weights["tokenizer"]["post_quant_conv.weight"].dtype == torch.float16
    assert np.abs(ours(copy) - picture).max() <= 2


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(path):
    weights = load_file(path)
    del weights["conv_out.bias"]
    save_file(weights, path)


def to_integers(path):
    save_file({name: tensor.int() for name, tensor in load_file(path).items()}, path)


UNET, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
BAD = {
    "a part": (lambda f: shutil.rmtree(f / "vae"), "it has no vae, of unet, vae, text_encoder, tokenizer, scheduler"),
    "weights": (lambda f: (f / UNET).unlink(), "safetensors is missing; download"),
    "a tensor": (lambda f: drop_tensor(f / UNET), r"1 are missing \(conv_out.bias"),
    "a file": (lambda f: (f / "text_encoder/model.safetensors").write_bytes(b"x" * 99), "not a whole safetensors file"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "model_index.json is of 'StableDiffusionXLPipeline'; expected StableDiffusionPipeline",
    ),
    "no JSON": (lambda f: (f / "unet/config.json").write_text("{"), "is no Stable Diffusion that can be read"),
    "another activation": (lambda f: edit(f / "text_encoder/config.json", hidden_act="relu"), "gelu or quick_gelu"),
    "betas": (lambda f: edit(f / SCHEDULER, trained_betas=[0.1] * 1000), "no trained_betas"),
    "no signal": (lambda f: edit(f / SCHEDULER, rescale_betas_zero_snr=True), "zero terminal SNR"),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "needs tokenizer.json, or vocab.json"),
    "another width": (lambda f: edit(f / "unet/config.json", cross_attention_dim=32), "expected shape"),
    "no end": (lambda f: edit(f / "unet/config.json", layers_per_block=10**9), "more tensors than the file holds"),
    "noise of another kind": (
        lambda f: (f / SCHEDULER).write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"})),
        "must make its noise from betas, got 'FlowMatchEulerDiscreteScheduler'",
    ),
    "flow sigmas": (lambda f: edit(f / SCHEDULER, use_flow_sigmas=True), "of flow matching or EDM"),
    "masked pads": (lambda f: edit(f / "text_encoder/config.json", use_attention_mask=True), "use_attention_mask"),
    "another eps": (lambda f: edit(f / "text_encoder/config.json", layer_norm_eps=0.5), "layer_norm_eps"),
    "whole numbers": (
        lambda f: to_integers(f / UNET),
        "its prior must have weights of floating point, got torch.int32",
    ),
    "another vocabulary": (lambda f: edit(f / "text_encoder/config.json", vocab_size=600), "expected shape"),
}


@pytest.mark.parametrize("published", ["sd1"], indirect=True)
@pytest.mark.parametrize("what", list(BAD))
def test_what_is_no_whole_system_is_one_error(published, tmp_path, what):
    _, folder, _ = published
    spoil, message = BAD[what]
    spoil(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(WeightsError, match=message):
        TextToImage.load(tmp_path / "copy")


def test_a_single_file_that_does_not_tell_enough_is_refused(published, tmp_path):
    kind, folder, _ = published
    path = single_file(kind, folder, tmp_path / "sd.safetensors")
    weights = load_file(path)
    if kind == "sd2":
        with pytest.raises(WeightsError, match="does not say what it predicts"):
            TextToImage.load(path)
    more = {"prediction": "v", "image_size": 32, "tokenizer": folder / "tokenizer"}
    for change, message in (
        ({"betas": weights["betas"] * 2}, "betas are not those of Stable Diffusion"),
        ({"colorize": torch.zeros(3)}, "'colorize' is no tensor of a Stable Diffusion file"),
        ({"model.diffusion_model.label_emb.weight": torch.zeros(3)}, "1 have no place"),
    ):
        save_file(weights | change, tmp_path / "changed.safetensors")
        with pytest.raises(WeightsError, match=message):
            stable_diffusion.load(tmp_path / "changed.safetensors", **more)
    with pytest.raises(WeightsError, match="a multiple of 16, got 40; give another"):
        stable_diffusion.load(path, **more | {"image_size": 40})
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / "half.safetensors")
    assert stable_diffusion.load(tmp_path / "half.safetensors", **more).recipe.diffusion.prediction == "v"
    if kind == "sd2":  # without what follows the text encoder, nothing tells which of its blocks is the last one
        left = {name: value for name, value in weights.items() if not name.endswith(("projection", "logit_scale"))}
        save_file(left, tmp_path / "changed.safetensors")
        with pytest.raises(WeightsError, match="neither text_projection nor logit_scale"):
            stable_diffusion.load(tmp_path / "changed.safetensors", **more)
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 99)
    for load in (TextToImage.load, stable_diffusion.is_system):
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            load(tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="leave --prediction and --tokenizer out"):
        stable_diffusion.load(folder, prediction="v")
    with pytest.raises(ValueError, match="of the form word/word"):
        stable_diffusion.load(folder, name="Foo")
    with pytest.raises(WeightsError, match="has 518 ids|ids and its text encoder"):
        stable_diffusion.load(path, prediction="v", image_size=32)  # open_clip's vocabulary is the published one
    run("convert", path, tmp_path / "t", "--part", "tokenizer", "--image-size", 32)
    assert list(checkpoint.load_recipe(tmp_path / "t").parts) == ["tokenizer"]


@pytest.mark.parametrize("published", ["sd1"], indirect=True)
def test_a_repository_of_the_hub_is_fetched_by_name(published, tmp_path, monkeypatch):
    import huggingface_hub

    _, folder, picture = published

    def fetch(name, allow_patterns):
        if name != "someone/sd":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        for path in (path for path in folder.rglob("*") if path.is_file()):
            inside = str(path.relative_to(folder))
            if any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                (tmp_path / "hub" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "hub" / inside)
        return str(tmp_path / "hub")

    def files(_, name):
        return [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")]

    halves = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    halves.write_bytes(b"beside the whole ones, and not wanted")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    assert np.abs(ours("hf-hub:someone/sd") - picture).max() <= 1
    assert not (tmp_path / "hub" / halves.relative_to(folder)).exists()
    halves.unlink()
    run("convert", "someone/sd", tmp_path / "m")
    with pytest.raises(WeightsError, match="could not be fetched from the hub"):
        TextToImage.load("hf-hub:someone/else")


@pytest.mark.parametrize("published", ["sd1"], indirect=True)
def test_the_command_line_paints_with_it(published, tmp_path):
    _, folder, picture = published
    run(
        "paint", PROMPT, "--model", folder, "--steps", 4, "--guidance", 3.0, "--seed", SEED, "--out", tmp_path / "a.png"
    )
    painted = np.asarray(Image.open(tmp_path / "a.png")).astype(float)
    assert np.abs(painted - picture).max() <= 1
    with pytest.raises(ValueError, match="has no trained CLIP"):
        TextToImage.load(folder)(PROMPT, candidates=2)
