"""Where memory is short: activations are computed twice, in every stage alike, or a stage says what to do."""

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer
from kartina.training import parallel
from kartina.training.stages import STAGES


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


@pytest.mark.parametrize(
    ("kind", "more", "ways"),
    [
        ("patch_dvae", [], "stages.tokenizer.micro_batch=4 or stages.tokenizer.recompute=true or a smaller recipe"),
        ("clip", [], "more processes (as its loss compares the captions of a step) or stages.clip.recompute=true or"),
        ("patch_dvae", ["stages.tokenizer.micro_batch=1"], "with stages.tokenizer.recompute=true or a smaller recipe"),
    ],
)
def test_a_stage_without_memory_says_what_to_do(kind, more, ways, tiny, prepared, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    stage, argv = tiny[kind]
    monkeypatch.setattr(STAGES[kind], "updates", full)
    folder = prepared(tmp_path / "run", kind)
    assert trainer.main([*argv, *more, "--run", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"stage {stage} ran out of memory, {1 if more else 8} samples a device at once" in said and ways in said
