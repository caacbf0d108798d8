"""Networks that train and paint through torch.compile."""

import json
import sys
import sysconfig

import numpy as np
import pytest
import torch._dynamo
from torch._dynamo.utils import counters

from kartina.pipeline.text_to_image import TextToImage, metadata, repaint
from kartina.training import __main__ as trainer


def losses(folder, stage):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[f"{stage}/total"] for line in lines if f"{stage}/total" in line]


@pytest.mark.parametrize(
    "tiny_kind", ["dalle", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("unet, captioned", "clip"))]
)
def test_a_compiled_network_learns_the_same(tiny_kind, tiny, prepared, tmp_path):
    """On a CPU, where no graph is recorded. It is compiled whole, and once for all steps."""
    stage, argv = tiny[tiny_kind]
    argv = [*argv, f"stages.{stage}.steps=4", f"stages.{stage}.validate_samples=8"]
    argv += ["parts.prior.dropout=0"] if tiny_kind.startswith("unet") else []
    found = []
    for compiler in ("none", "cudagraphs"):
        torch._dynamo.reset()
        counters.clear()
        run = prepared(tmp_path / compiler, tiny_kind)
        assert trainer.main([*argv, f"stages.{stage}.compile={compiler}", "--run", str(run)]) == 0
        found.append(losses(run, stage))
        assert counters["stats"]["unique_graphs"] == (compiler != "none") and not counters["graph_break"]
    assert len(found[0]) == 4 and found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("patch_dvae", ["stages.tokenizer.compile=inductor"], "only clip, dalle, unet are compiled"),
        ("dalle", ["stages.prior.compile=inductor", "training.shard=fsdp"], "leave out compile or training.shard=fsdp"),
        ("unet", ["stages.prior.compile=cudagraphs"], "leave out dropout or compile"),
        ("dalle", ["stages.prior.compile=cudagraphs", "stages.prior.micro_batch=4"], "compile or micro_batch"),
        ("dalle", ["stages.prior.compile=magic"], "'none', 'cudagraphs' or 'inductor'"),
    ],
)
def test_what_cannot_be_compiled_is_refused(kind, words, said, tiny, tmp_path, capsys):
    assert trainer.main([*tiny[kind][1], *words, "--run", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lacks", "said"), [("compiler", "there is no no-such-compiler; install it"), ("headers", "has none; install them")]
)
def test_what_inductor_lacks_on_a_cpu_is_said_before_anything_trains(lacks, said, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler" if lacks == "compiler" else sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    words = [*tiny["dalle"][1], "stages.prior.compile=inductor", "--run", str(tmp_path / "run")]
    assert trainer.main(words) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=said):
        TextToImage.load("shapes/stable-diffusion", device="cpu").compile()


def test_a_compiled_prior_paints_the_same(monkeypatch):
    """Two micro-batches of one size, through one graph."""
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: torch._dynamo.optimize("eager")(model))
    torch._dynamo.reset()
    counters.clear()
    prompts = ["a large red ring on a blue background", "a small green cross on a white background"] * 2
    plain, compiled = (TextToImage.load("shapes/stable-diffusion", device="cpu") for _ in range(2))
    expected = plain(prompts, num_steps=3, micro_batch=2)
    found = compiled.compile()(prompts, num_steps=3, micro_batch=2)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for one, other in zip(expected, found, strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image)).max() <= 1
        assert "compiled" not in one.facts and other.facts["compiled"] is True
    again = repaint(plain, metadata(found[0]))
    assert plain.compiled and np.array_equal(np.asarray(again.image), np.asarray(found[0].image))
    with pytest.raises(ValueError, match="what is compiled is a diffusion prior"):
        TextToImage.load("shapes/dalle", device="cpu").compile()
