"""Bad weather: numbers that are not finite, samples that cannot be read, full disks, ranks that fail, uneven worlds."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter, namedtuple

import pytest
import torch
from PIL import Image

from kartina.training import __main__ as trainer
from kartina.training import loop, state
from kartina.training.shards import ShardWriter
from kartina.training.stages.clip import CLIPStage
from kartina.training.stages.dvae import DVAEStage


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def newest(folder, stage="tokenizer"):
    return state.load(state.newest(folder / "state" / stage))


def is_finite(saved):
    return all(torch.isfinite(value).all() for network in saved["networks"].values() for value in network.values())


def optimizer_steps(saved, part="tokenizer"):
    """How many steps AdamW has taken, of each parameter that it moves."""
    return {
        int(entry["step"]) for one in saved["optimizers"][part] for entry in one["state"].values() if "step" in entry
    }


# --- on two processes -------------------------------------------------------------------------------------------------


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """3 shards of 10, 3 and 7 samples; the samples 4 and 17 have a broken picture."""
    home, number = tmp_path_factory.mktemp("shards"), 0
    for part, count in enumerate((10, 3, 7)):
        with ShardWriter(home / f"{part}", prefix=f"part{part}") as writer:
            for _ in range(count):
                picture = b"broken" if number in (4, 17) else png((number * 10, 0, 99))
                writer.write({"png": picture, "txt": f"number {number}".encode()})
                number += 1
        for path in (home / f"{part}").iterdir():
            path.rename(home / path.name)
    return home


def of_shards(tiny, shards, *more):
    data = [f"training.data={{kind: shards, shards: {shards}, validation: {shards}, bad_limit: 0.1}}"]
    return [*tiny["dvae"][1], "stages.tokenizer.objective.autoencoder=0", *data, *more]


@pytest.fixture(scope="module")
def stormy(tiny, shards, tmp_path_factory, work):
    """Runs on two processes of one life, each in a folder of its name: (their folder, {name: facts of each rank}).

    20 steps of 8 with samples that are not numbers, which one of the ranks alone meets; and of shards that are uneven,
    fewer than the readers, or of one sample. `two` is stopped half-way.
    """
    home = tmp_path_factory.mktemp("weather")
    argv = [*tiny["patch_dvae"][1], "stages.tokenizer.patience=3", "stages.tokenizer.save_every=4"]
    spans = {"sample": (43, 43), "span": (40, 63), "parted": (40, 63), "start": (0, 23), "endless": (40, 10_000)}
    jobs = [{"name": n, "argv": [*argv, "--run", str(home / n)], "poison": [span]} for n, span in spans.items()]
    jobs[2]["stop_at"] = 9
    jobs.append({"name": "steep", "argv": [*argv, "--run", str(home / "steep")], "steep_at": 5})
    jobs.append({**jobs[2], "name": "resumed", "stop_at": None})
    jobs.append({"name": "two", "argv": [*tiny["patch_dvae"][1], "--run", str(home / "two")], "stop_at": 9})
    single, middle = home / "single", home / "middle"
    for folder in (single, middle):
        folder.mkdir()
    with ShardWriter(single, prefix="alone") as writer:
        writer.write({"png": png((9, 9, 9)), "txt": b"alone"})
    shutil.copy(shards / "part1-000000.tar", middle)
    of = {
        "thread": (shards, []),
        "workers": (shards, ["training.data.workers=3"]),
        "few": (shards, [f"training.data.validation={single}"]),
        "one": (middle, ["training.data.workers=2", f"training.data.validation={shards}"]),
    }
    for name, (folder, words) in of.items():
        own = of_shards(tiny, folder, *words, "stages.tokenizer.validate_samples=96", "--run", str(home / name))
        jobs.append({"name": name, "argv": own})
    return home, work(jobs, 2)


@pytest.mark.parametrize("name", ["sample", "steep"])
def test_a_step_that_is_not_finite_is_left_out_on_every_rank(stormy, name):
    """A loss that is no number, and a finite one whose gradient is infinite; each on one rank alone."""
    home, results = stormy
    assert [rank["status"] for rank in results[name]] == [0, 0]
    (skipped,) = events(home / name, "skipped")
    assert skipped["step"] == 6
    assert skipped["keys"] == [key for rank in results[name] for key in rank["keys"][5][1]]  # of both ranks
    saved = newest(home / name)
    assert (saved["step"], saved["at"], saved["bad"]) == (20, 20, []) and is_finite(saved)
    assert saved["ema"]["updates"] == 19
    assert optimizer_steps(saved) == {19}


def test_after_several_the_run_goes_back_but_not_in_the_data(stormy):
    home, results = stormy
    (returned,) = events(home / "span", "returned")
    assert (returned["step"], returned["reached"], returned["bad"]) == (4, 8, [5, 7])
    saved = newest(home / "span")
    assert (saved["step"], saved["at"], saved["bad"]) == (20, 24, [[5, 7]]) and is_finite(saved)
    assert optimizer_steps(saved) == {20}  # the one that was taken before it went back is not counted twice
    assert [step for step, _ in results["span"][0]["keys"]] == [*range(8), *range(4, 20)]
    keys = [key for rank in results["span"] for _, step_keys in rank["keys"] for key in step_keys]
    assert len(set(keys)) == len(keys) == 24 * 8  # nothing was read twice, nothing left out


def test_a_run_that_went_back_resumes_like_any_other(stormy):
    home, results = stormy
    assert [rank["status"] for rank in results["parted"] + results["resumed"]] == [0] * 4
    for whole, first, second in zip(results["span"], results["parted"], results["resumed"], strict=True):
        assert first["keys"] + second["keys"] == whole["keys"]
    whole, parted = newest(home / "span"), newest(home / "parted")
    assert all(torch.equal(whole["networks"]["tokenizer"][k], v) for k, v in parted["networks"]["tokenizer"].items())
    assert parted["bad"] == [[5, 7]] and parted["at"] == 24
    for name in ("skipped", "returned"):
        assert events(home / "parted", name) == events(home / "span", name)


def test_bad_weather_at_the_very_start_goes_back_to_fresh_weights(stormy):
    home, _ = stormy
    saved = newest(home / "start")
    assert (saved["step"], saved["at"], saved["bad"]) == (20, 23, [[0, 2]]) and is_finite(saved)


def test_the_third_return_within_a_thousand_steps_ends_the_run(stormy):
    home, results = stormy
    assert [rank["status"] for rank in results["endless"]] == [2, 2]
    assert [event["bad"] for event in events(home / "endless", "returned")] == [[5, 7], [8, 10]]
    assert is_finite(newest(home / "endless"))
    assert len(events(home / "endless", "skipped")) == 9


# --- samples and disks ------------------------------------------------------------------------------------------------


def test_uneven_shards_two_ranks_and_three_workers(stormy):
    """Exactly the steps of the recipe, each sample as often as any other, each scored once, bad ones named once."""
    home, results = stormy
    for name in ("thread", "workers"):
        assert [rank["status"] for rank in results[name]] == [0, 0]
        read = [key for rank in results[name] for _, keys in rank["keys"] for key in keys]
        assert len(read) == 20 * 8 and {read.count(key) for key in set(read)} == {8} and len(set(read)) == 20
        one, other = (Counter(rank["scored"]) for rank in results[name])
        # At steps 10 and 20; the first two chunks with the live weights too, the last has 3 that can be read.
        assert one and other and not one & other and len(one + other) == 18
        assert sorted((one + other).values()) == [2] * 3 + [4] * 15
        found = {key for event in events(home / name, "unreadable") for key in event["problems"]}
        assert found == {"part0-000000/000000004", "part2-000000/000000004"}
        assert newest(home / name)["step"] == 20
    assert results["thread"] == results["workers"]


def test_validation_of_fewer_samples_than_ranks_hangs_nowhere(stormy):
    ranks = stormy[1]["few"]
    assert [rank["status"] for rank in ranks] == [0, 0]
    assert [rank["scored"] for rank in ranks] == [["alone-000000/000000000"] * 4, []]


def test_one_shard_for_four_readers(stormy):
    results = stormy[1]["one"]
    assert [rank["status"] for rank in results] == [0, 0]
    read = [key for rank in results for _, keys in rank["keys"] for key in keys]
    counts = sorted(read.count(key) for key in set(read))
    assert sum(counts) == 160 and len(counts) == 3 and counts[-1] - counts[0] <= 1


def test_samples_to_validate_on_that_cannot_be_read_are_named_once(stormy):
    (event,) = events(stormy[0] / "one", "unreadable")
    assert event["step"] == 10 and set(event["problems"]) == {"part0-000000/000000004", "part2-000000/000000004"}
    assert not newest(stormy[0] / "one")["problems"]  # they do not count against training's limit


def test_another_world_size_goes_on_with_the_next_sample(stormy, tiny, work):
    home, results = stormy
    words = tiny["patch_dvae"][1]
    one, whole = work([{"name": n, "argv": [*words, "--run", str(home / n)]} for n in ("two", "all")], 1).values()
    two = results["two"]
    assert two[0]["world"] == 2 and one[0]["world"] == 1
    steps = [[key for rank in two for key in rank["keys"][step][1]] for step in range(10)]
    steps += [keys for _, keys in one[0]["keys"]]
    assert steps == [keys for _, keys in whole[0]["keys"]]


def test_too_many_unreadable_samples_end_the_run(tiny, shards, tmp_path, capsys):
    argv = of_shards(tiny, shards, "training.data.bad_limit=0.05", "--run", str(tmp_path))
    assert trainer.main(argv) == 2
    assert "at most 1 samples may be unreadable, got 2" in capsys.readouterr().err


def test_a_full_disk_costs_nothing_but_the_new_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """Neither where writing stops in the middle, by the system's own limit, nor where the room is seen too small."""
    argv = [*tiny["patch_dvae"][1], "stages.tokenizer.save_every=4", "stages.tokenizer.validate_every=100"]
    real, usage = state._finish, namedtuple("usage", "total used free")
    room = iter([10**12] * 4 + [1000] + [10**12] * 9)  # of the step 0, 4, 8, 12 and then 16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, next(room)))

    def tight(temporary, final, content):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if content["at"] in (8, 12):
            resource.setrlimit(resource.RLIMIT_FSIZE, (state.size(content) // (content["at"] // 4), limit[1]))
        try:
            real(temporary, final, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(state, "_finish", tight)
    assert trainer.main([*argv, "--run", str(tmp_path)]) == 0
    assert [event["step"] for event in events(tmp_path, "not saved")] == [8, 12, 16]
    assert newest(tmp_path)["step"] == 20 and not list((tmp_path / "state" / "tokenizer").glob(".writing*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    capsys.readouterr()
    assert trainer.main([*argv, "--run", str(tmp_path / "full")]) == 2
    assert "make room" in capsys.readouterr().err


def test_a_skipped_step_is_measured_like_any_other(tiny, tmp_path, monkeypatch):
    """Or a run whose last step is bad has no metric at all."""
    real = loop._Run._update
    monkeypatch.setattr(
        loop._Run, "_update", lambda self, batches: None if self.state.step == 19 else real(self, batches)
    )
    argv = [*tiny["patch_dvae"][1], "stages.tokenizer.validate_every=20", "stages.tokenizer.export=best"]
    assert trainer.main([*argv, "--run", str(tmp_path)]) == 0
    assert [event["step"] for event in events(tmp_path, "skipped")] == [20] and not events(tmp_path, "no best")
    assert newest(tmp_path)["best"][1:] == (20, 20)


def test_no_best_is_kept_in_the_midst_of_bad_steps(tiny, tmp_path, monkeypatch):
    """The run would go back to it, and it has the weights that it goes back from."""
    real, validate, measured = loop._Run._update, loop.exchange.validate, iter([90.0, 30.0])
    monkeypatch.setattr(
        loop._Run, "_update", lambda self, batches: None if self.state.step in (8, 9) else real(self, batches)
    )
    monkeypatch.setattr(loop.exchange, "validate", lambda *rest: (validate(*rest)[0] | {"psnr": next(measured)}, {}))
    argv = [*tiny["patch_dvae"][1], "stages.tokenizer.validate_every=10", "stages.tokenizer.export=best"]
    assert trainer.main([*argv, "--run", str(tmp_path)]) == 0
    assert newest(tmp_path)["best"] == (30.0, 20, 20)


def test_samples_without_a_caption_are_named_and_left_out_where_captions_are_read(tiny, tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for k in range(20):
            told = {"json": b'{"captionless": true}'} if k == 3 else {"txt": f"number {k}".encode()}
            writer.write({"png": png((k * 10, 0, 99)), **told})
    shards = tmp_path / "shards"
    data = f"training.data={{kind: shards, shards: {shards}, validation: {shards}, bad_limit: 0.1}}"
    read, unread = tmp_path / "read", tmp_path / "unread"
    assert trainer.main([*tiny["clip"][1], data, "stages.clip.objective={}", "--run", str(read)]) == 0
    (reason,) = newest(read, "clip")["problems"].values()
    assert "captions are read here, and it was packed without one" in reason
    assert trainer.main([*of_shards(tiny, shards), "--run", str(unread)]) == 0
    assert not newest(unread)["problems"]


def test_a_best_that_could_not_be_saved_is_not_the_best(tiny, tmp_path, monkeypatch):
    """Nor does it keep a later one from being it, and the run can be finished."""
    argv = [*tiny["patch_dvae"][1], "stages.tokenizer.validate_every=5", "stages.tokenizer.export=best"]
    measured, real = iter([30.0, 20.0, 10.0, 15.0]), loop.exchange.validate
    monkeypatch.setattr(loop.exchange, "validate", lambda *rest: (real(*rest)[0] | {"psnr": next(measured)}, {}))
    usage = namedtuple("usage", "total used free")
    room = iter([10**12, 1000, *[10**12] * 9])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, next(room)))
    assert trainer.main([*argv, "--run", str(tmp_path)]) == 0
    assert newest(tmp_path)["best"] == (20.0, 10, 10)


def test_memory_that_does_not_suffice_ends_neither_validation_nor_a_run_at_its_preview(
    tiny, tmp_path, monkeypatch, capsys
):
    """Validation goes on with halves, and finds the same; CLIP, which compares the samples of a batch, cannot."""
    found, limit = {}, {"samples": 1000}
    many = [f"stages.{stage}.validate_samples=96" for stage in ("tokenizer", "clip")]

    def scarce(real):
        def measure(stage, batch):
            if len(batch.keys) > limit["samples"]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(stage, batch)

        return measure

    def preview(stage, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(DVAEStage, "measure", scarce(DVAEStage.measure))
    monkeypatch.setattr(CLIPStage, "measure", scarce(CLIPStage.measure))
    monkeypatch.setattr(DVAEStage, "preview", preview)
    for name, samples in {"enough": 1000, "scarce": 20}.items():
        limit["samples"] = samples
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert trainer.main([*tiny["patch_dvae"][1], *many, "--run", str(tmp_path / name)]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        found[name] = [line["valid/psnr"] for line in lines if "valid/psnr" in line]
        assert any("while measuring 64 samples: going on with 32" in str(w.message) for w in said) == (name == "scarce")
    assert len(found["enough"]) == 2 and found["scarce"] == pytest.approx(found["enough"], rel=1e-6)
    assert "is not saved (CUDA out of memory.)" in capsys.readouterr().out
    assert trainer.main([*tiny["clip"][1], *many, "--run", str(tmp_path / "clip")]) == 2
    assert "stage clip ran out of memory" in capsys.readouterr().err


FAILS = """import os
if os.environ.get("RANK") == "1":
    from kartina.training.stages import STAGES
    real = STAGES["patch_dvae"].updates
    def updates(stage, batch, step):
        if step == 3:
            raise RuntimeError("rank 1 fails at step 3")
        return real(stage, batch, step)
    STAGES["patch_dvae"].updates = updates
"""


def test_a_rank_that_fails_ends_all_with_its_traceback(tiny, prepared, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    argv = [*tiny["patch_dvae"][1], "--run", str(prepared(tmp_path / "run", "patch_dvae")), "--processes=2"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command, begin = [sys.executable, "-m", "kartina.cli", "train", *argv], time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and time.monotonic() - begin < 60
    assert "Traceback" in done.stderr and "RuntimeError: rank 1 fails at step 3" in done.stderr
