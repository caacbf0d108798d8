"""The command line as a user meets it: run in-process where that is the same, one clear line for wrong input."""

import json
import pickle

import pytest
from PIL import Image
from test_drawing import LATENT, write_model
from typer.testing import CliRunner

from kartina import cli


def fails(capsys, monkeypatch, *words: str) -> str:
    """The one line on stderr of a command that must exit with 2."""
    monkeypatch.setattr("sys.argv", ["kartina", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr()
    assert exit_.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1, shown
    return shown.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["paint", ""], "a caption is missing or empty"),
        (["paint"], "a caption is missing or empty"),
        (["paint", "a red ring", "--keep", "2"], "--keep must be at most --candidates"),
        (["paint", "a red ring", "--model", "shapes/dale"], "no model 'shapes/dale'"),
        (["paint", "a red ring", "--prompts-file", "absent.txt"], "cannot read 'absent.txt'"),
        (["paint", "a red ring", "--dtype", "float23"], "float32"),
        (["paint", "a red ring", "--reranker-pretrained", "x"], "give both"),
        (["reproduce", "absent.png"], "absent.png"),
        (["evaluate", "nothing/here"], "no model"),
        (["evaluate", "shapes/dalle", "--save", "--per-test", "3"], "leave --per-test out"),
        (["train", "shapes/dale"], "shapes/dalle"),
        (["train", "shapes/dalle", "stages.tokenizer.stops=3"], "steps"),
        (["plan", "shapes/dale"], "shapes/dalle"),
        (["data", "check", "absent"], "no shard at absent"),
        (["show", "latents", "--data", "shape"], "did you mean 'shapes'"),
        (["show", "latents", "--prior", "mixtures"], "one of standard, mixture, swiss_roll"),
        (["show", "codebook", "--model", "shapes/dale"], "no model 'shapes/dale'"),
        (["show", "gumbel", "--logits", "1,x"], "--logits takes numbers between commas"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line_and_exit_code_2(capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, monkeypatch, *words)


def spoil_cut(folder):
    path = folder / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_altered(folder):
    path = folder / "prior.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def spoil_pickled(folder):
    (folder / "prior.safetensors").write_bytes(pickle.dumps({"a": 1}))


def spoil_untrained(folder):
    (folder / "prior.safetensors").unlink()
    card = json.loads((folder / "card.json").read_text())
    del card["parts"]["prior"]
    (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_cut, "prior.safetensors"),
        (spoil_altered, "prior.safetensors"),
        (spoil_pickled, "prior.safetensors"),
        (spoil_untrained, "prior"),
    ],
)
def test_a_model_that_cannot_paint_is_one_clear_line_and_exit_code_2(capsys, monkeypatch, tmp_path, spoil, says):
    folder = write_model(tmp_path / "model", LATENT)
    spoil(folder)
    assert says in fails(capsys, monkeypatch, "paint", "a red ring", "--model", str(folder), "--out", str(tmp_path))


def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_painted(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "a.png")
    assert "cannot write" in fails(capsys, monkeypatch, "paint", "a red ring", "--out", out)


def test_an_untrusted_name_cannot_steer_the_terminal(tmp_path):
    (tmp_path / "in").mkdir()
    hostile = "x\x1b[2J.png"
    (tmp_path / "in" / hostile).write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a caption")
    result = CliRunner().invoke(cli.app, ["data", "pack", str(tmp_path / "in"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "packed 1 samples" in result.output and "no caption: x?[2J.png" in result.output
    assert "\x1b" not in result.output
    checked = CliRunner().invoke(cli.app, ["data", "check", str(tmp_path / "out")])
    assert checked.exit_code == 0 and "read 1 samples, 0 bad, 0 shards" in checked.output


def test_plan_and_dry_run_tell_sizes_without_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = CliRunner().invoke(cli.app, ["plan", "shapes/dalle", "--json"])
    counts = json.loads(planned.output)["parameters"]
    assert set(counts) == {"tokenizer", "prior", "clip"} and min(counts.values()) > 0
    dry = CliRunner().invoke(cli.app, ["train", "shapes/dalle", "--dry-run", "stages.prior.steps=7"])
    assert dry.exit_code == 0 and "steps: 7" in dry.output
    table = dry.output[dry.output.index("shapes/dalle on 1 device: bf16\n") :].splitlines()[1:]
    planned = CliRunner().invoke(cli.app, ["plan", "shapes/dalle"]).output.splitlines()
    assert {line for line in table if line not in planned} <= {""} and len(table) > len(planned) // 2
    names = {line.split("  ")[1].strip() for line in table if line.startswith("  ")}
    assert {"parameters", "GFLOP a sample", "activations", "peak"} <= names and "device-hours" not in names
    longer = ["train", "shapes/dalle", "--dry-run", "stages.prior.steps=7", "--extend", "prior=9"]
    dry = CliRunner().invoke(cli.app, longer)
    assert "steps: 9" in dry.output and "steps: 7" not in dry.output
    refused = CliRunner().invoke(cli.app, [*longer, "--extend", "clip=1"])
    assert "STAGE=STEPS with more steps than the recipe has" in str(refused.exception)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_does_not_suffice_is_one_line_and_another_error_is_not_hidden(capsys, monkeypatch):
    other = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."
    for said, one_line in (("CUDA out of memory. Tried to allocate 2 GiB", True), (other, False)):
        monkeypatch.setattr(cli, "app", lambda said=said: (_ for _ in ()).throw(RuntimeError(said)))
        with pytest.raises(SystemExit if one_line else RuntimeError):
            cli.main()
        assert capsys.readouterr().err == (f"kartina: {said}\n" if one_line else "")
