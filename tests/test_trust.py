"""Every stage: stopped and resumed bit for bit, and the same run on one process, on two, and in several passes."""

import json
import shutil

import pytest
import torch

from kartina.training import __main__ as trainer
from kartina.training import state
from kartina.training.stages import STAGES

STEPS, STOP = 20, 10


def test_every_stage_is_in_the_table(tiny):
    assert set(tiny) == set(STAGES)


def prepared(folder, trained_tokenizer, stage):
    """A new run folder, which holds a tokenizer where the stage needs one."""
    folder.mkdir()
    if stage != "tokenizer":
        shutil.copytree(trained_tokenizer / "model", folder / "model")
        shutil.copy(trained_tokenizer / "captions.origin.json", folder)
    return folder


def newest(folder, stage):
    return state.load_newest(folder / "state" / stage)


def assert_equal(a, b, where=""):
    """Bit for bit, in nested dictionaries and lists; the seconds that a run took may differ."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("processes", [1, 2])
def test_every_stage_stopped_and_resumed_equals_uninterrupted(processes, tiny, trained_tokenizer, tmp_path, work):
    """20 steps == 10 + a real SIGTERM, state written, all objects dropped, state read + 10."""
    jobs = []
    for kind in STAGES:
        stage, argv = tiny[kind]
        for name in ("whole", "parted"):
            folder = prepared(tmp_path / f"{kind}-{name}", trained_tokenizer, stage)
            runs = [(name, None)] if name == "whole" else [("first", STOP - 1), ("second", None)]
            jobs += [
                {"name": f"{kind}-{part}", "argv": [*argv, "--run", str(folder)], "stop_at": stop}
                for part, stop in runs
            ]
    results = work(jobs, processes)
    for kind in STAGES:
        stage, _ = tiny[kind]
        whole, first, second = (results[f"{kind}-{part}"] for part in ("whole", "first", "second"))
        assert [rank["world"] for rank in whole + first + second] == [processes] * 3 * processes
        assert [rank["status"] for rank in first] == [128 + 15 if processes == 1 else 0] * processes
        assert [rank["status"] for rank in whole + second] == [0] * 2 * processes
        for rank in range(processes):
            assert [step for step, _ in first[rank]["keys"]] == list(range(STOP))
            assert first[rank]["keys"] + second[rank]["keys"] == whole[rank]["keys"]
        assert_equal(newest(tmp_path / f"{kind}-whole", stage), newest(tmp_path / f"{kind}-parted", stage), kind)
