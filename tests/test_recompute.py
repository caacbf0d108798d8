"""Activations that are computed twice in place of being kept: every stage does so, and learns the same."""

import torch

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer
from kartina.training import parallel


def test_every_stage_computes_its_blocks_twice_and_learns_the_same(tiny_kind, tiny, prepared, tmp_path, monkeypatch):
    calls, plain = [], parallel.checkpoint
    monkeypatch.setattr(parallel, "checkpoint", lambda *given, **named: calls.append(1) or plain(*given, **named))
    stage, argv = tiny[tiny_kind]
    found = {}
    for recompute in (False, True):
        folder = prepared(tmp_path / str(recompute), tiny_kind)
        calls.clear()
        more = ["training.precision=fp32", f"stages.{stage}.steps=3", f"stages.{stage}.recompute={recompute}"]
        assert trainer.main([*argv, *more, "--run", str(folder)]) == 0
        assert bool(calls) == recompute
        found[recompute] = checkpoint.load_weights(folder / "model", stage)
    assert found[False].keys() == found[True].keys()
    for name, weight in found[False].items():
        assert torch.equal(weight, found[True][name]), name
