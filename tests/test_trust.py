"""Every stage: stopped and resumed bit for bit, and the same run on one process, on two, and in several passes."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer
from kartina.training import optim, state
from kartina.training import run as runs
from kartina.training.stages import STAGES

STEPS, STOP = 20, 10
TWICE = ("patch_dvae", "vqgan, gumbel")  # one network and two, which are split over ranks and in passes as well
LOSSES = {"loss", "image_loss", "nll", "error", "squared"}


def test_every_stage_is_in_the_table(tiny):
    assert {kind.partition(",")[0] for kind in tiny} == set(STAGES)


def is_separable(tiny, kind):
    """Whether the tiny recipe of a kind may split its steps in passes."""
    stage, argv = tiny[kind]
    given = trainer._arguments(argv)
    recipe, training = runs.load(given.recipe, given.overrides)
    return not STAGES[kind.partition(",")[0]].coupled(recipe, training.stages[stage])


@pytest.fixture(scope="module")
def trainings(tiny, prepared, tmp_path_factory, work):
    """Every stage, trained whole, parted by a real SIGTERM, on one process and on two, and in two passes.

    A function (processes, kind, "whole" or "parted" or "passes") -> (run folder, [facts of each rank] of each job). It
    trains the half of the table that the kind is in, so that a worker which tests one half does not train the other.
    """
    home, found, kinds = tmp_path_factory.mktemp("trust"), {}, list(tiny)

    def train(kinds, processes):
        jobs, plans_of = [], {}
        for kind in kinds:
            stage, argv = tiny[kind]
            plans = {"whole": [None], "parted": [STOP - 1, None]}
            if kind in TWICE or processes == 1 and is_separable(tiny, kind):
                plans["passes"] = [None]
            for plan, stops in plans.items():
                folder = prepared(home / f"{kind}-{plan}-{processes}", kind)
                own = [*argv, *([f"stages.{stage}.micro_batch={4 // processes}"] if plan == "passes" else [])]
                own += ["--run", str(folder)]
                names = [f"{kind}-{plan}-{i}" for i in range(len(stops))]
                shown = {"argv": own, "previews": plan == "whole"}
                jobs += [{"name": n, "stop_at": s, **shown} for n, s in zip(names, stops, strict=True)]
                plans_of[processes, kind, plan] = folder, names
        results = work(jobs, processes)
        return {key: (folder, [results[name] for name in names]) for key, (folder, names) in plans_of.items()}

    def of(processes, kind, plan):
        if (processes, kind, plan) not in found:
            found.update(train(kinds[kinds.index(kind) % 2 :: 2], processes))
        return found[processes, kind, plan]

    return of


def newest(folder, stage):
    return state.load(state.newest(folder / "state" / stage))


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
def test_stopped_and_resumed_equals_uninterrupted(tiny_kind, processes, trainings, tiny):
    """20 steps == 10 + a real SIGTERM, state written, all objects dropped, state read + 10."""
    one, (whole,) = trainings(processes, tiny_kind, "whole")
    two, (first, second) = trainings(processes, tiny_kind, "parted")
    assert [rank["world"] for rank in whole + first + second] == [processes] * 3 * processes
    assert [rank["status"] for rank in first] == [128 + 15 if processes == 1 else 0] * processes
    assert [rank["status"] for rank in whole + second] == [0] * 2 * processes
    for a, b, c in zip(whole, first, second, strict=True):
        assert [step for step, _ in b["keys"]] == list(range(STOP))
        assert b["keys"] + c["keys"] == a["keys"]
    stage, _ = tiny[tiny_kind]
    assert newest(one, stage)["step"] == STEPS
    assert_equal(newest(one, stage), newest(two, stage))


@pytest.mark.parametrize("tiny_kind", ["dalle", "autoencoder_kl", "unet, captioned"])
def test_in_bfloat16_stopped_and_resumed_equals_uninterrupted(tiny_kind, tiny, prepared, tmp_path, work, monkeypatch):
    """The default: weights and averages stay in float32, and come back laid out as they were."""
    monkeypatch.setattr(optim, "fast_bf16", lambda device: True)  # also where it is slow
    AcceleratorState._reset_state()  # of fixtures, which train in float32
    stage, argv = tiny[tiny_kind]
    folders, jobs = [tmp_path / "whole", tmp_path / "parted"], []
    for folder, stops in zip(folders, ([None], [STOP - 1, None]), strict=True):
        words = [*argv, "training.precision=bf16", "--run", str(prepared(folder, tiny_kind))]
        jobs += [{"name": f"{folder.name}-{i}", "argv": words, "stop_at": stop} for i, stop in enumerate(stops)]
    found = work(jobs, 1)
    assert [facts["status"] for (facts,) in found.values()] == [0, 128 + 15, 0]
    one, two = (newest(folder, stage) for folder in folders)
    values = [*one["networks"][stage].values(), *(v for name, v in one["ema"].items() if name.startswith("average."))]
    assert one["step"] == STEPS and {v.dtype for v in values if v.is_floating_point()} == {torch.float32}
    assert_equal(one, two)


def logged(folder):
    """Losses, metrics, gradient norms and learning rates by (step, name): what a rounding moves but little."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    left_out = {"stage", "wait", "seconds", "accuracy", "active_units"}
    of_accuracies = {"ema_gain", "ema_gain_error"}
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if "event" not in line
        and name.rpartition("/")[2] not in (left_out | of_accuracies if "valid/accuracy" in line else left_out)
    }


def test_one_process_two_and_two_passes_are_the_same_run(tiny_kind, trainings, tiny):
    """1 x 8, 2 x 4, 1 x 4 x 2, 2 x 2 x 2: the same samples, learning rates and, to 1e-5 in float32, losses."""
    one, (whole,) = trainings(1, tiny_kind, "whole")
    others = {"2 x 4": trainings(2, tiny_kind, "whole")}
    if is_separable(tiny, tiny_kind):
        others["1 x 4 x 2"] = trainings(1, tiny_kind, "passes")
    if tiny_kind in TWICE:
        others["2 x 2 x 2"] = trainings(2, tiny_kind, "passes")
    expected = logged(one)
    losses = [name for step, name in expected if step == STEPS and name.rpartition("/")[2] in LOSSES]
    assert losses and len([step for step, name in expected if name == "lr"]) == STEPS
    for how, (folder, (facts,)) in others.items():
        found = logged(folder)
        assert found.keys() == expected.keys(), how
        for key, value in expected.items():
            tolerance = 1e-5
            if key[1].endswith(("norm", "adaptive")):  # of gradients, in which rounding grows from step to step
                tolerance = 1e-3 if key[0] <= STEPS // 2 else 5e-3
            if key[1].endswith(("perplexity", "usage")):  # rounding may give a latent to another code
                tolerance = 0.1
            assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-5), (how, key)
        for step in range(STEPS):
            read = [key for rank in facts for s, keys in rank["keys"] if s == step for key in keys]
            assert read == [key for s, keys in whole[0]["keys"] if s == step for key in keys], (how, step)


def test_averaged_weights_are_neither_the_first_nor_the_last(tiny_kind, trainings, tiny):
    """An average that is never updated, or always replaced, passes unnoticed otherwise."""
    folder, _ = trainings(1, tiny_kind, "whole")
    stage, _ = tiny[tiny_kind]
    saved = newest(folder, stage)
    assert saved["ema"]["updates"] > 10
    live = saved["networks"][stage]
    moved = [name for name, value in live.items() if not torch.equal(saved["ema"][f"average.{name}"], value)]
    assert len(moved) > len(live) / 2


def test_ranks_end_with_the_same_networks(tiny_kind, trainings):
    """Codebooks and scales of latents too, which no exchange of gradients keeps equal; nor does a checkpoint tell."""
    _, (ranks,) = trainings(2, tiny_kind, "whole")
    assert len({rank["hash"] for rank in ranks}) == 1 and len(ranks[0]["hash"]) == 2 * 64


@pytest.mark.parametrize("tiny_kind", ["autoencoder_kl"])
def test_one_process_and_two_keep_the_same_statistics_of_batches(tiny_kind, trainings):
    one, two = (newest(trainings(n, tiny_kind, "whole")[0], "tokenizer")["networks"]["discriminator"] for n in (1, 2))
    kept = [name for name in one if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(kept) == 3 and all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in kept)


@pytest.mark.parametrize("tiny_kind", ["autoencoder", "autoencoder_kl"])
def test_one_process_and_two_measure_the_same_latent_scale(tiny_kind, trainings):
    one, two = (checkpoint.load_weights(trainings(n, tiny_kind, "whole")[0] / "model", "tokenizer") for n in (1, 2))
    for name in ("scale.mean", "scale.std"):
        assert one[name].dtype == torch.float32
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-3)
