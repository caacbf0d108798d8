"""The log of a run: a resumed one repeats no step, however long it is, and no tracker and no full disk ends a run."""

import io
import json
import resource
import time
from contextlib import contextmanager

import pytest
from accelerate import tracking
from PIL import Image

from kartina.training import __main__ as trainer
from kartina.training import doctor, history, log, loop, state
from kartina.training.log import Log
from kartina.training.shards import ShardWriter

LONG = 250_000
PICTURE = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PICTURE, "PNG")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_repeats_no_step(tmp_path):
    first = Log(tmp_path, "tokenizer", True, 0)
    first.write(4, 4, {"loss": 1.0})
    crashed = Log(tmp_path, "prior", True, 0)
    for step in (1, 2, 3):
        crashed.at = step
        crashed.write(step, 4, {"loss": 1.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "prior", "st')
    Log(tmp_path, "prior", False, 1)  # another rank leaves it alone
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5
    again = Log(tmp_path, "prior", True, 1)
    again.at = 2
    again.write(2, 4, {"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["loss"]) for line in lines] == [
        ("tokenizer", 4, 1.0), ("prior", 1, 1.0), ("prior", 2, 2.0)
    ]  # fmt: skip


def test_lines_of_other_stages_stay_where_one_goes_back(tmp_path):
    for stage, at in (("clip", 7), ("prior", 1), ("prior", 2), ("clip", 8), ("prior", 3), ("clip", 9)):
        Log(tmp_path, stage, True, at).write(at, 9, {"loss": 1.0})
    Log(tmp_path, "prior", True, 1)
    kept = [("clip", 7), ("prior", 1), ("clip", 8), ("clip", 9)]
    assert [(line["stage"], line["step"]) for line in lines_of(tmp_path)] == kept
    Log(tmp_path, "clip", True, 0)
    assert [(line["stage"], line["step"]) for line in lines_of(tmp_path)] == [("prior", 1)]


def test_a_name_that_is_no_unicode_or_ends_lines_elsewhere_is_logged_and_read(tmp_path):
    names = ["caf\udce9", "wait\u0085", "two\u2028lines"]
    written = Log(tmp_path, "prior", True, 0)
    written.write(1, 2, {"loss": 1.0})
    written.event(1, "skipped", f"left out {names[0]}", keys=names)
    written.write(2, 2, {"loss": 0.5})
    (old,) = history.read(tmp_path).values()
    assert old.events[-1]["keys"] == names and [step for step, _ in old.curve("loss")] == [1, 2]
    line = json.dumps({"stage": "prior", "step": 3, "at": 3, "event": "skipped", "keys": names[1:]}, ensure_ascii=False)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert history.read(tmp_path)["prior"].events[-1]["keys"] == names[1:]


# --- trackers ---------------------------------------------------------------------------------------------------------


class Kept:
    """A tracker that keeps what it is given, by the name under which it was started."""

    runs: dict[str, list] = {}

    def __init__(self, project, name, id=None, **more):
        self.logged = self.runs.setdefault(id or name, [])

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        pass


@pytest.fixture
def trackers(monkeypatch):
    """W&B and trackio, as far as a run sees them."""
    monkeypatch.setattr(Kept, "runs", {})
    monkeypatch.setattr(log, "_is_installed", lambda name: True)
    monkeypatch.setattr(tracking, "WandBTracker", Kept)
    monkeypatch.setattr(tracking, "TrackioTracker", Kept)
    return Kept.runs


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_recipes_of_one_name_are_apart_and_a_resumed_one_goes_on(name, trackers, tmp_path):
    for at, recipe in ((0, "shapes"), (0, "emoji"), (1, "shapes")):
        for stage in ("tokenizer", "prior"):
            one = Log(tmp_path / recipe / "vae", stage, True, at, (name,))
            one.at = at + 1
            one.write(at + 1, 2, {"loss": 1.0})
    steps = [[step for step, _ in logged] for logged in trackers.values()]
    assert steps == [[1, 2], [1, 2], [1], [1]]


@pytest.mark.parametrize("broken", ["__init__", "start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_left_out(broken, trackers, tmp_path, monkeypatch, capsys):
    class Broken(Kept):
        pass

    def fail(self, *given, **more):
        raise OSError(28, "No space left on device")

    setattr(Broken, broken, fail)
    monkeypatch.setattr(tracking, "WandBTracker", Broken)
    one = Log(tmp_path, "prior", True, 0, ("wandb", "trackio"))
    for step in (1, 2, 3):
        one.at = step
        one.write(step, 3, {"loss": 1.0})
    one.close()
    (event,) = [line for line in lines_of(tmp_path) if "event" in line]
    assert (event["event"], event["tracker"]) == ("tracker lost", "wandb") and "No space" in event["error"]
    assert capsys.readouterr().out.count("wandb failed") == 1
    (other,) = [logged for name, logged in trackers.items() if name.startswith(tmp_path.name)]
    assert [step for step, _ in other] == [1, 2, 3]
    assert [line["step"] for line in lines_of(tmp_path) if "loss" in line] == [1, 2, 3]


# --- full disks -------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(size):
    """As on a full disk, writing stops there in the midst of things; by the system's own limit."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_full_disk_costs_lines_and_tensorboard_but_not_the_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    one = Log(tmp_path, "prior", True, 0, ("tensorboard",))
    one.write(1, 9, {"loss": 1.0})
    (curves,) = (tmp_path / "tensorboard" / "prior").iterdir()
    with no_file_beyond((tmp_path / "log.jsonl").stat().st_size + 10):
        assert curves.stat().st_size > (tmp_path / "log.jsonl").stat().st_size + 10
        for step in range(2, 6):
            one.write(step, 9, {"loss": 1.0})
            time.sleep(0.05)
        doctor.watch(one, 5)
    one.write(6, 9, {"loss": 1.0})
    one.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 6]  # and no half of one between
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("tensorboard failed") == 1 and "a line is lost" in told


def test_a_terminal_that_is_a_file_on_a_full_disk_does_not_end_a_run(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    one = Log(tmp_path, "prior", True, 0)
    one.console.file = Full()
    one.write(1, 9, {"loss": 1.0})
    one.event(1, "finding", "warning")
    assert len(lines_of(tmp_path)) == 2


# --- long runs --------------------------------------------------------------------------------------------------------


def long_log(path, stage):
    """250,000 lines."""
    lines = (f'{{"stage": "{stage}", "step": {at}, "at": {at}, "{stage}/nll": 0.5}}\n' for at in range(1, LONG + 1))
    with open(path, "a") as file:
        file.write("".join(lines))


def test_a_long_log_is_not_read_to_go_on_with_it(tmp_path, monkeypatch):
    long_log(tmp_path / "log.jsonl", "prior")
    parsed, real = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or real(text))
    for stage, last in (("tokenizer", LONG), ("prior", LONG - 2)):
        Log(tmp_path, stage, True, LONG - 2)
        assert real((tmp_path / "log.jsonl").read_text().splitlines()[-1])["at"] == last
    assert len(parsed) <= 8


def test_the_doctor_reads_a_log_once(tmp_path, monkeypatch):
    read, real = [], history.read
    monkeypatch.setattr(log, "read", lambda folder: read.append(folder) or real(folder))
    one = Log(tmp_path, "prior", True, 0)
    one.event(0, "started", "", steps=40, networks=["prior"])
    for step in range(1, 41):
        one.write(step, 40, {"prior/loss": 1.0, "prior/chance": 1.0, "odd": float("nan")})
        if step % 10 == 0:
            doctor.watch(one, step)
    assert read == [tmp_path] and one.history == real(tmp_path)["prior"]
    assert [line["finding"] for line in lines_of(tmp_path) if "finding" in line] == ["loss at chance level"]


def test_a_run_of_a_billion_samples_resumes_within_seconds(tiny, tmp_path, monkeypatch):
    """At the position 10^12 of shards of 20 samples, with 250,000 lines of log behind it."""
    with ShardWriter(tmp_path / "shards", prefix="few") as writer:
        for number in range(20):
            writer.write({"png": PICTURE.getvalue(), "txt": f"number {number}".encode()})
    steps = 10**12 // 8 + 2
    data = f"training.data={{kind: shards, shards: {tmp_path / 'shards'}, validation_share: 0}}"
    argv = [*tiny["vqvae"][1], data, f"stages.tokenizer.steps={steps}", "--run", str(tmp_path / "run")]
    real = loop.rate

    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.main(argv)
    folder = tmp_path / "run" / "state" / "tokenizer"
    content = state.load(state.newest(folder))
    state.save(folder, content | {"step": steps - 2, "at": steps - 2}, keep=1)
    long_log(tmp_path / "run" / "log.jsonl", "tokenizer")
    begin, reached = time.monotonic(), []
    monkeypatch.setattr(loop, "rate", lambda *rest: reached.append(time.monotonic() - begin) or real(*rest))
    assert trainer.main(argv) == 0
    assert reached[0] < 30
    with open(tmp_path / "run" / "log.jsonl") as file:
        assert sum(1 for _ in file) > LONG
    assert state.load(state.newest(folder))["at"] == steps
