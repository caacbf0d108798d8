"""A cache of shards: the same bytes however it was written, the same training as without, refused where it differs."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shape_shards import pack
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import RecipeError
from kartina.training import __main__ as trainer
from kartina.training import cache, encode, loop, samples, state, stream
from kartina.training.run import Data
from kartina.training.shards import check_shards
from kartina.training.stages import STAGES

SMALL = [
    *["captions.vocab_size=300", "captions.context_length=22", "training.precision=fp32"],
    *[f"parts.tokenizer.{key}" for key in ("width=8", "num_codes=32", "depth=1")],
    *[f"parts.prior.{key}" for key in ("num_codes=32", "text_vocab=300", "width=32", "depth=2", "num_heads=2")],
    "parts.prior.attention=full",
    *[f"stages.tokenizer.{key}" for key in ("steps=2", "global_batch=4")],
    *[f"stages.prior.{key}" for key in ("steps=20", "global_batch=4", "log_every=1", "objective.caption_drop=0.5")],
    *["training.data.kind=shards", "training.data.validation_share=0"],  # what is held out is read as pictures
    "stages.clip.objective={}",
]
BAD = "shard-000001/000000012"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("data") / "shards", 24, 7, broken=12)


def command(shards, run, *more):
    return ["shapes/dalle", *SMALL, f"training.data.shards={shards}", *more, "--run", str(run)]


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run folder with a trained tokenizer and nothing else."""
    folder = tmp_path_factory.mktemp("run")
    assert trainer.main([*command(shards, folder), "--stage", "tokenizer"]) == 0
    assert not (folder / "model" / "captions.json").exists()
    return folder


@pytest.fixture(scope="module")
def encoded(shards, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "codes"
    report = encode.encode(shards, out, run / "model", processes=1)
    assert (report.samples, report.written, report.kept, report.left) == (24, 4, 0, [])
    assert list(report.bad) == [BAD] and "undecodable picture" in report.bad[BAD]
    return out


def contents(folder):
    """By name, but for indexes, which hold the time of their shard."""
    read = (path for path in folder.iterdir() if path.name != ".lock" and not path.name.endswith(".index.json"))
    return {path.name: path.read_bytes() for path in read}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_cache_holds_the_codes_of_its_encoder_in_the_shards_order(shards, run, encoded):
    tokenizer = checkpoint.load_part(run / "model", checkpoint.load_recipe(run / "model"), "tokenizer")
    for origin, index in zip(
        *(map(samples.load_index, samples.find_shards(f)) for f in (shards, encoded)), strict=True
    ):
        assert [e.key for e in index.entries] == [e.key for e in origin.entries]
        with open(origin.path, "rb") as raw, open(index.path, "rb") as file:
            for member, (before, after) in enumerate(zip(origin.entries, index.entries, strict=True)):
                if index.sample_name(member) == BAD:
                    with pytest.raises(samples.BadSample, match="undecodable picture"):
                        samples.read_encoded(file, after, ["codes"])
                    continue
                picture, caption = samples.read_sample(raw, before)
                (codes,), text = samples.read_encoded(file, after, ["codes"])
                assert codes.dtype == np.int16 and codes.shape == (16, 8) and text == caption
                assert torch.equal(tokenizer.encode(stream.fit(picture, 32)[None])[0], torch.from_numpy(codes).long())
    report = check_shards(encoded)
    assert report.samples == 24 and list(report.bad) == [BAD] and not report.shards


def test_the_command_line_writes_the_same_bytes_with_two_processes(shards, run, encoded, tmp_path):
    out = tmp_path / "two"
    words = ["data", "encode", str(shards), str(out), "--model", str(run / "model"), "--device", "cpu"]
    launched = subprocess.run(
        [sys.executable, "-m", "kartina.cli", *words, "--processes", "2"], capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    assert "24 samples; shards: 4 written, 0 were there" in launched.stdout and f"bad: {BAD}" in launched.stdout
    assert contents(out) == contents(encoded)
    again = CliRunner().invoke(cli.app, [*words, "--processes", "1"])
    assert again.exit_code == 0 and "24 samples; shards: 0 written, 4 were there" in again.output
    assert contents(out) == contents(encoded)


SLOW = """
import sys, time
from kartina.training import encode
write = encode._members
def slowly(*given):
    for member in write(*given):
        time.sleep(0.05)
        yield member
encode._members = slowly
encode.encode(sys.argv[1], sys.argv[2], sys.argv[3], processes=1)
"""


def test_killed_and_run_again_gives_the_same_bytes(shards, run, encoded, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(shards), str(out), str(run / "model")])
    beside, until = out / ".shard-000001.tar.writing", time.monotonic() + 120
    while not (beside.exists() and beside.stat().st_size) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = out / "shard-000000.tar"
    assert beside.stat().st_size and [path.name for path in out.glob("*.tar")] == [first.name]
    with pytest.raises(RecipeError, match="not finished"):
        read_as_stage(shards, out, run)
    written = first.stat().st_mtime_ns
    report = encode.encode(shards, out, run / "model", processes=1)
    assert (report.written, report.kept, list(report.bad)) == (3, 1, [BAD])
    assert first.stat().st_mtime_ns == written and contents(out) == contents(encoded)


def test_a_shard_that_another_process_writes_is_left_to_it(shards, run, encoded, tmp_path):
    out = tmp_path / "shared"
    out.mkdir()
    with open(out / ".shard-000002.tar.writing", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        report = encode.encode(shards, out, run / "model", processes=1)
    assert report.left == ["shard-000002.tar"] and report.written == 3
    assert encode.encode(shards, out, run / "model", processes=1).left == []
    assert contents(out) == contents(encoded)


def test_another_folder_or_cache_is_not_overwritten(shards, run, encoded, tmp_path):
    with pytest.raises(ValueError, match="has content and no cache"):
        encode.encode(shards, shards, run / "model", processes=1)
    model = shutil.copytree(run / "model", tmp_path / "model")
    change_encoder(model)
    before = contents(encoded)
    with pytest.raises(ValueError, match=r"made otherwise: it differs in parts\.tokenizer; choose a new folder"):
        encode.encode(shards, encoded, model, processes=1)
    with pytest.raises(ValueError, match="the model's tokenizer gives codes, not latents"):
        encode.encode(shards, tmp_path / "latents", run / "model", ["latents"], processes=1)
    with pytest.raises(ValueError, match="'code' is unknown; did you mean 'codes'"):
        encode.encode(shards, tmp_path / "latents", run / "model", ["code"], processes=1)
    assert contents(encoded) == before and not (tmp_path / "latents").exists()


class Posterior:
    """A tokenizer of latents, as far as a cache sees it: the mean is the small picture, the variance its own."""

    spec = SimpleNamespace(kind="latents", shape=(3, 4, 4))

    def posterior(self, image):
        return torch.nn.functional.adaptive_avg_pool2d(image, 4), image.amax((2, 3), keepdim=True).expand(-1, 3, 4, 4)


def test_latents_are_mean_and_log_variance(shards, run, tmp_path, monkeypatch):
    monkeypatch.setattr(encode.checkpoint, "load_part", lambda *given: Posterior())
    encode.encode(shards, tmp_path / "out", run / "model", ["latents"], processes=1)
    source, stage = stream.ShardSource(shards, 32, seed=0), SimpleNamespace(part="prior", cached=("latents",))
    data = Data(kind="shards", shards=str(shards), cache=str(tmp_path / "out"))
    batch = cache.source_for(stage, source, data, hashes(run), run / "model").read(range(8))
    mean, log_variance = Posterior().posterior(source.read(range(8)).image)
    assert batch.encoded["latents"].dtype == torch.float32 and batch.encoded["latents"].shape == (8, 2, 3, 4, 4)
    good = batch.weight > 0
    assert torch.equal(batch.encoded["latents"][good], torch.stack([mean, log_variance], 1)[good])
    monkeypatch.delattr(Posterior, "posterior")
    with pytest.raises(ValueError, match="need a tokenizer with a posterior"):
        encode.encode(shards, tmp_path / "none", run / "model", ["latents"], processes=1)


def test_latents_alone_do_for_a_frozen_text_encoder(shards, run, tmp_path, monkeypatch):
    """It encodes the captions then, which a cache has too: where a sample has several, as drawn."""
    monkeypatch.setattr(encode.checkpoint, "load_part", lambda *given: Posterior())
    encode.encode(shards, tmp_path / "out", run / "model", ["latents"], processes=1)
    source, stage = stream.ShardSource(shards, 32, seed=0), SimpleNamespace(part="prior", cached=STAGES["unet"].cached)
    assert "text_tokens" in stage.cached
    data = Data(kind="shards", shards=str(shards), cache=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match=r"has no text_tokens, which the stage prior then makes of the captions"):
        found = cache.source_for(stage, source, data, hashes(run) | {"text": "of a frozen one"}, run / "model")
    batch, pictures = found.read(range(8)), source.read(range(8))
    assert list(batch.encoded) == ["latents"] and batch.captions == pictures.captions


def test_embeddings_are_those_of_the_models_clip(shards, tmp_path):
    from kartina.pipeline.text_to_image import TextToImage

    encode.encode(shards, tmp_path / "out", "shapes/dalle", ["image_embedding", "text_embedding", "codes"], processes=1)
    system, source = TextToImage.load("shapes/dalle", device="cpu"), stream.ShardSource(shards, 32, seed=0)
    parts, folder = checkpoint.read_card(trainer_model())["parts"], trainer_model()
    against = {part: parts[part]["hash"] for part in ("tokenizer", "clip")}
    against["captions"] = checkpoint.file_hash(folder / "captions.json")
    stage = SimpleNamespace(part="prior", cached=("text_embedding", "image_embedding"))
    data = Data(kind="shards", shards=str(shards), cache=str(tmp_path / "out"))
    batch, pictures = cache.source_for(stage, source, data, against, folder).read(range(6)), source.read(range(6))
    clip, good = system.parts["clip"], batch.weight > 0
    with torch.no_grad():
        image = clip.encode_image(pictures.image)
        text = clip.encode_text(clip.frame(*system.captions.encode(pictures.captions)))
    assert set(batch.encoded) == {"text_embedding", "image_embedding"}
    assert torch.allclose(batch.encoded["image_embedding"][good], image[good], atol=1e-5)
    assert torch.allclose(batch.encoded["text_embedding"][good], text[good], atol=1e-5)
    with pytest.raises(RecipeError, match=r"does not fit the stage prior: it differs in parts\.captions; make it with"):
        cache.source_for(stage, source, data, against | {"captions": "of others"}, folder)


def trainer_model():
    from kartina.pipeline.known_models import SHIPPED

    return SHIPPED / "shapes" / "dalle"


# --- training ---------------------------------------------------------------------------------------------------------


def hashes(run):
    return {"tokenizer": checkpoint.read_card(run / "model")["parts"]["tokenizer"]["hash"]}


def read_as_stage(shards, folder, run, **changed):
    """The source of the DALL-E stage, with the cache in `folder`."""
    data = Data(kind="shards", shards=str(shards), cache=str(folder))
    source = stream.ShardSource(shards, 32, seed=0)
    return cache.source_for(STAGES["dalle"], source, data, hashes(run) | changed, run / "model")


def test_positions_hold_the_same_samples(shards, run, encoded):
    pictures, codes = stream.ShardSource(shards, 32, seed=0), read_as_stage(shards, encoded, run)
    part = stream.ShardSource(shards, 32, 0, part="train", share=0.3)
    again = cache.source_for(STAGES["dalle"], part, Data(kind="shards", cache=str(encoded)), hashes(run), run / "model")
    assert again.read(range(60)).keys == part.read(range(60)).keys and part.size < pictures.size
    one, two = pictures.read(range(60)), codes.read(range(60))
    assert two.keys == one.keys and two.captions == one.captions and two.encoded["codes"].dtype == torch.int64
    assert torch.equal(two.samples, one.samples) and torch.equal(two.weight, one.weight) and 0 in two.weight
    assert codes.fingerprint == pictures.fingerprint and codes.size == pictures.size
    assert two.image.numel() == 0


def copied(run, folder):
    return shutil.copytree(run, folder)


def trained(folder, *words):
    """The DALL-E stage, on to its 20 steps: what it logged, and its state."""
    assert trainer.main([*words, "--run", str(folder), "--stage", "prior"]) == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("prior/image_loss", "prior/text_loss", "prior/norm")
    logged = [[line[name] for name in names] for line in lines if "prior/image_loss" in line]
    return torch.tensor(logged), state.load(state.newest(folder / "state" / "prior"))


def test_training_from_a_cache_equals_training_on_the_fly(shards, run, encoded, tmp_path, monkeypatch):
    """20 steps, all from pictures, all from the cache, and 10 of each: equal bit for bit."""
    words = command(shards, "")[:-2]
    cached = [*words, f"training.data.cache={encoded}"]
    whole, before = trained(copied(run, tmp_path / "pictures"), *words)
    assert whole.shape == (20, 3)
    monkeypatch.setattr(stream.ShardSource, "read", None)  # no picture is read, for the preview neither
    from_cache, after = trained(copied(run, tmp_path / "cache"), *cached)
    monkeypatch.undo()
    assert torch.equal(from_cache, whole) and before["identity"] == after["identity"]

    real, both = loop.rate, copied(run, tmp_path / "both")

    def stop_at_ten(step, *rest):
        if step == 10:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(loop, "rate", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        trainer.main([*words, "stages.prior.save_every=5", "--run", str(both), "--stage", "prior"])
    monkeypatch.undo()
    mixed, last = trained(both, *cached)
    assert torch.equal(mixed, whole)
    for other in (after, last):
        for name, value in before["networks"]["prior"].items():
            assert torch.equal(other["networks"]["prior"][name], value), name


def change_encoder(model):
    weights = {name: value + 1 for name, value in checkpoint.load_weights(model, "tokenizer").items()}
    facts = {key: value for key, value in checkpoint.read_card(model)["parts"]["tokenizer"].items() if key != "hash"}
    checkpoint.save_part(model, checkpoint.load_recipe(model), "tokenizer", weights, **facts)


def test_the_trainer_refuses_a_cache_of_another_encoder(shards, run, encoded, tmp_path, capsys):
    words = [*command(shards, "")[:-2], f"training.data.cache={encoded}"]
    change_encoder(copied(run, tmp_path / "other") / "model")
    assert trainer.main([*words, "--run", str(tmp_path / "other"), "--stage", "prior"]) == 2
    said = capsys.readouterr().err
    assert "does not fit the stage prior: it differs in parts.tokenizer; make it with `kartina data encode" in said
    drawn = ["training.precision=fp32", f"training.data.cache={encoded}", "--run", str(tmp_path / "drawn")]
    assert trainer.main(["shapes/dalle", *drawn]) == 2 and "'shapes' has none" in capsys.readouterr().err


def test_other_shards_preprocessing_or_contents_are_refused_with_the_key(shards, run, encoded, tmp_path, monkeypatch):
    for folder, changes in {"captions": {"caption": "another caption"}, "pictures": {"first": 1}}.items():
        changed = pack(tmp_path / folder, 24, 7, broken=12, **changes)
        with pytest.raises(RecipeError, match=r"differs in source\.shard-000003\.tar|differs in source\.shard-000000"):
            read_as_stage(changed, encoded, run)
    with pytest.raises(
        RecipeError, match=r"no cache of this format; make it with `kartina data encode .* --what=codes`"
    ):
        read_as_stage(shards, tmp_path / "nowhere", run)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "FIT", "squeezed")
        with pytest.raises(RecipeError, match=r"differs in preprocessing\.fit"):
            read_as_stage(shards, encoded, run)
    spoilt = shutil.copytree(encoded, tmp_path / "spoilt")
    data = bytearray((spoilt / "shard-000002.tar").read_bytes())
    data[700] ^= 1
    (spoilt / "shard-000002.tar").write_bytes(data)
    with pytest.raises(RecipeError, match="shard-000002.tar is not what was written; remove it and run"):
        read_as_stage(shards, spoilt, run)
    with pytest.raises(ValueError, match="shard-000002.tar is not what was written; remove it and run"):
        encode.encode(shards, spoilt, run / "model", processes=1)
    written = json.loads((spoilt / "manifest.json").read_text())
    written["shards"][2]["sha256"] = "of another device"
    (spoilt / "manifest.json").write_text(json.dumps(written))
    (spoilt / "shard-000002.tar").unlink()
    with pytest.raises(RecipeError, match="shard-000002.tar is missing"):
        read_as_stage(shards, spoilt, run)
    encode.encode(shards, spoilt, run / "model", processes=1)
    assert contents(spoilt) == contents(encoded)
    manifest = json.loads((spoilt / "manifest.json").read_text())
    manifest["arrays"] = {"latents": {"dtype": "float32", "shape": [4, 4, 4]}}
    (spoilt / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="it has no codes, but latents"):
        read_as_stage(shards, spoilt, run)
