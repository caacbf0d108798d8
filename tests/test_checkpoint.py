"""Model folders are strict, and checkpoints survive a torn write."""

import json
import pickle

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import Recipe
from kartina.training import state
from kartina.training.optim import EMA, build_optimizers, rate
from kartina.training.run import Optimizer

RECIPE = Recipe(name="tests/linear", paper="none", image_size=8, parts={})


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_part(tmp_path, RECIPE, "prior", {"w": torch.arange(6.0).view(2, 3)}, trained_against={})
    return tmp_path


def test_weights_come_back(folder):
    assert torch.equal(checkpoint.load_weights(folder, "prior")["w"], torch.arange(6.0).view(2, 3))


def test_the_hash_sees_names_types_shapes_and_bytes():
    w = torch.arange(6.0)
    variants = [{"w": w}, {"v": w}, {"w": w.half()}, {"w": w.view(2, 3)}, {"w": w + 1}]
    assert len({checkpoint.part_hash(v) for v in variants}) == len(variants)
    assert checkpoint.part_hash({"a": w, "b": w + 1}) == checkpoint.part_hash({"b": w + 1, "a": w})


def test_an_untrained_part_is_named(folder):
    with pytest.raises(checkpoint.ModelError, match="clip.*not trained"):
        checkpoint.load_weights(folder, "clip")


def test_a_truncated_file_is_refused(folder):
    path = folder / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(checkpoint.ModelError, match="not a whole safetensors"):
        checkpoint.load_weights(folder, "prior")


def test_altered_weights_are_refused(folder):
    path = folder / "prior.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoint.ModelError, match="differ from the hash"):
        checkpoint.load_weights(folder, "prior")


def test_a_pickle_is_never_read(folder):
    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    (folder / "prior.safetensors").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(checkpoint.ModelError, match="pickles are never read"):
        checkpoint.load_weights(folder, "prior")


def test_a_later_format_is_refused(folder):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"format": 99}))
    with pytest.raises(checkpoint.ModelError, match="format"):
        checkpoint.read_card(folder)


def test_the_newest_whole_state_is_taken(tmp_path):
    state.save(tmp_path, 10, {"step": 10, "w": torch.ones(3)})
    state.save(tmp_path, 20, {"step": 20, "w": torch.ones(3)})
    torn = tmp_path / "step-00000030"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    assert state.load_newest(tmp_path)["step"] == 20
    (tmp_path / "step-00000020" / "state.pt").write_bytes(b"rotten")
    assert state.load_newest(tmp_path)["step"] == 10
    (tmp_path / "step-00000010" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        state.load_newest(tmp_path)


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        state.save(tmp_path, step, {"step": step}, keep=2)
    assert [p.name for p in state.complete(tmp_path)] == ["step-00000002", "step-00000003"]


def test_ema_is_the_closed_form():
    torch.manual_seed(0)
    module, decay = torch.nn.Linear(3, 2), 0.9
    ema, expected = EMA(module, decay), module.weight.detach().clone()
    for n in range(100):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * module.weight.detach()
    assert torch.allclose(ema.average["weight"], expected, atol=1e-5)
    assert not torch.allclose(ema.average["weight"], module.weight)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    config = Optimizer(lr=1.0, warmup=10, decay=0.5)
    curve = [rate(step, 100, config) for step in range(101)]
    assert curve[0] == pytest.approx(0.1) and curve[9:51] == [1.0] * 42
    assert curve[75] == pytest.approx(0.5) and curve[100] == pytest.approx(0.0)


def test_muon_gets_hidden_matrices_only():
    module = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 4), "mlp": torch.nn.Linear(4, 4)})
    adamw, muon = build_optimizers(module, Optimizer(lr=0.1, muon=0.02))
    assert [p is module["mlp"].weight for g in muon.param_groups for p in g["params"]] == [True]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 2
