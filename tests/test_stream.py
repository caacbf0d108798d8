"""The stream: each sample once a pass at any number of ranks, restored at any position, bad samples in their place."""

import errno
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from kartina.pipeline import checkpoint
from kartina.pipeline.known_models import find_model
from kartina.training import __main__ as trainer
from kartina.training import encode, mirror, samples, stream
from kartina.training import run as runs
from kartina.training.cache import source_for
from kartina.training.packing import pack_folder
from kartina.training.shards import ShardWriter
from kartina.training.stages.dalle import DALLEStage

GOLDEN = [6, 1, 3, 0, 2, 4, 7, 5]


def png(color, size=(4, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def write(folder, counts, bad=()):
    """Shards with these counts; the samples numbered in `bad` have a broken picture."""
    number = 0
    for k, count in enumerate(counts):
        with ShardWriter(folder / f"{k}", prefix=f"part{k}") as writer:
            for _ in range(count):
                data = b"broken" if number in bad else png((number, 255 - number, 7))
                writer.write({"png": data, "txt": f"number {number}".encode()})
                number += 1
    return [folder / f"{k}" for k in range(len(counts))]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), (10, 3, 7))


def test_a_pass_holds_each_sample_once_and_passes_differ(parts):
    for window in (1, 2, 4):
        source = stream.ShardSource(parts, 4, seed=5, window=window)
        assert source.size == 20
        first, second = (source.read(range(p * 20, p * 20 + 20)) for p in (0, 1))
        assert sorted(first.keys) == sorted(second.keys) and len(set(first.keys)) == 20
        assert first.keys != second.keys
        again = stream.ShardSource(parts, 4, seed=5, window=window).read(range(20))
        assert again.keys == first.keys and torch.equal(again.image, first.image)
        assert stream.ShardSource(parts, 4, seed=6, window=window).read(range(20)).keys != first.keys


def test_a_batch_holds_what_it_says(parts):
    batch = stream.ShardSource(parts, 4, seed=0).read([23, 2])
    assert batch.image.shape == (2, 3, 4, 4) and batch.image.dtype == torch.float32
    assert batch.samples.tolist() == [23, 2] and batch.samples.dtype == torch.int64
    assert batch.weight.tolist() == [1, 1] and batch.weight.dtype == torch.float32
    for image, caption in zip(batch.image, batch.captions, strict=True):
        number = int(caption.split()[1])
        expected = torch.tensor([number, 255 - number, 7]) / 127.5 - 1
        assert torch.allclose(image, expected[:, None, None].expand(3, 4, 4))


def test_windows_keep_reading_near_one_place(parts):
    keys = stream.ShardSource(parts, 4, seed=1, window=1).read(range(20)).keys
    shards = [key.split("/")[0] for key in keys]
    assert sum(a != b for a, b in zip(shards, shards[1:], strict=False)) == 2


def test_resume_equals_the_uninterrupted_run(parts):
    whole = stream.ShardSource(parts, 4, seed=2, window=2).read(range(60))
    for k in (1, 19, 20, 33):
        rest = stream.ShardSource(parts, 4, seed=2, window=2).read(range(k, 60))
        assert rest.keys == whole.keys[k:] and torch.equal(rest.image, whole.image[k:])


@pytest.mark.parametrize("world, micro", [(1, 8), (2, 4), (1, 4), (4, 1)])
def test_divisions_see_the_same_global_batch(world, micro):
    for step in (0, 3):
        ranks = [stream.rank_positions(step, 8, rank, world, micro) for rank in range(world)]
        assert [p for rank in ranks for part in rank for p in part] == list(range(step * 8, step * 8 + 8))
        assert all(len(part) == micro for rank in ranks for part in rank)


@pytest.mark.parametrize("world, micro", [(3, 1), (2, 3)])
def test_a_global_batch_that_does_not_divide_is_refused(world, micro):
    with pytest.raises(ValueError, match="multiple"):
        stream.rank_positions(0, 8, 0, world, micro)


def test_uneven_shards_over_two_ranks_and_four_readers_of_one_shard(parts, tmp_path):
    source = stream.ShardSource(parts, 4, seed=3)
    seen = [
        key
        for rank in range(2)
        for step in range(5)
        for wanted in stream.rank_positions(step, 4, rank, 2, 2)
        for key in source.read(wanted).keys
    ]
    assert len(seen) == 20 and len(set(seen)) == 20
    single = stream.ShardSource(write(tmp_path, (9,)), 4, seed=3)
    with ThreadPoolExecutor(4) as readers:
        shares = list(readers.map(lambda r: single.read(range(9 * r // 4, 9 * (r + 1) // 4)).keys, range(4)))
    assert sorted(map(len, shares)) == [2, 2, 2, 3] and len({key for share in shares for key in share}) == 9


def test_a_bad_sample_keeps_its_place(parts, tmp_path):
    good = stream.ShardSource(parts, 4, seed=4).read(range(20))
    source = stream.ShardSource(write(tmp_path, (10, 3, 7), bad=(12,)), 4, seed=4)
    for _ in range(2):  # read twice, counted once
        batch = source.read(range(20))
    assert batch.keys == good.keys
    assert list(batch.problems) == ["part1-000000/000000002"]
    assert "undecodable" in batch.problems["part1-000000/000000002"]
    at = batch.keys.index("part1-000000/000000002")
    assert batch.weight.tolist() == [float(k != at) for k in range(20)]
    assert batch.image[at].abs().max() == 0 and batch.captions[at] == ""
    kept = [k for k in range(20) if k != at]
    assert torch.equal(batch.image[kept], good.image[kept])
    readable = stream.ShardSource(parts, 4, seed=4).captions(range(20))
    assert readable == good.captions


def test_order_does_not_depend_on_the_interpreter(parts):
    """Golden: a stored run must find the same samples in every later version; each test run has another hash seed."""
    assert stream.permutation(7, 1, 1, 2, 8).tolist() == GOLDEN


def test_fit_crops_the_centre():
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255
    image = stream.fit(Image.fromarray(wide), 8)
    assert image.shape == (3, 8, 8) and image.min() > 0.99
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    small = stream.fit(Image.fromarray(ramp), 8)[0, 4]
    assert torch.allclose(small, torch.linspace(-1, 1, 17)[1::2], atol=0.03)


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_keeps_order_and_passes_errors_on(parts, workers):
    source = stream.ShardSource(parts, 4, seed=0)
    wanted = [[0, 1], [5, 4], [39, 2], [7, 7]]
    got = list(stream.prefetch(source, iter(wanted), workers=workers))
    assert [b.samples.tolist() for b in got] == wanted
    assert [b.keys for b in got] == [source.read(w).keys for w in wanted]
    assert all(torch.equal(b.image, source.read(w).image) for b, w in zip(got, wanted, strict=True))
    endless = stream.prefetch(source, ([k] for k in iter(int, 1)), workers=workers)
    assert next(endless).samples.tolist() == [0]
    endless.close()
    failing = stream.prefetch(source, iter([[0], [-1], [1]]), workers=workers)
    next(failing)
    with pytest.raises(ValueError, match="positions"):
        next(failing)


def test_changed_shards_have_another_fingerprint_and_missing_ones_say_so(parts, tmp_path):
    other = stream.ShardSource(write(tmp_path, (10, 3, 7), bad=(3,)), 4, seed=0)
    assert other.fingerprint != stream.ShardSource(parts, 4, seed=0).fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no shards"):
        stream.ShardSource(tmp_path / "empty", 4, seed=0)
    with pytest.raises(ValueError, match="no shard at"):
        stream.ShardSource(tmp_path / "missing.tar", 4, seed=0)


def test_a_file_system_that_fails_for_a_while_ends_no_training(parts, monkeypatch):
    source = stream.ShardSource(parts, 4, seed=0)
    expected, pauses, failing = source.read([0]), [], [1, 2]
    monkeypatch.setattr(mirror.time, "sleep", pauses.append)

    def failing_read(*args, **kwargs):
        if failing:
            raise OSError(errno.ESTALE, f"failure {failing.pop()}")
        return read(*args, **kwargs)

    read, reads = samples.read_member, "kartina.training.samples.read_member"
    monkeypatch.setattr(reads, failing_read)
    with pytest.warns(UserWarning, match=r"could not be read \(.*failure 2\); trying again in 1 s"):
        batch = source.read([0])
    assert torch.equal(batch.image, expected.image) and batch.captions == expected.captions and pauses == [1, 5]
    failing[:] = range(4)
    with pytest.warns(UserWarning), pytest.raises(OSError, match="failure 0"):
        source.read([0])
    assert sum(pauses[2:]) == 31


def test_of_several_captions_one_is_drawn_at_each_position(tmp_path):
    """One a line; which one is a function of seed and position, for whoever reads, and passes differ."""
    (tmp_path / "in").mkdir()
    for k in range(40):
        (tmp_path / "in" / f"{k}.png").write_bytes(png((k, 0, 0)))
        lines = f"{k} first\r\n\n {k} second \n{k} third\n" if k else "one alone"
        (tmp_path / "in" / f"{k}.txt").write_bytes(lines.encode())
    report = pack_folder(tmp_path / "in", tmp_path / "out", 9)
    assert (report.packed, report.several) == (40, 39)
    source = stream.ShardSource(tmp_path / "out", 4, seed=0)
    batch = source.read(range(400))
    found = {(key, caption) for key, caption in zip(batch.keys, batch.captions, strict=True)}
    assert 110 < len(found) <= 1 + 39 * 3  # nearly all are drawn within ten passes
    assert all(caption == "one alone" or caption.split()[1] in ("first", "second", "third") for _, caption in found)
    counts = [sum(caption.endswith(word) for caption in batch.captions) for word in ("first", "second", "third")]
    assert sum(counts) == 390 and min(counts) > 100
    again = stream.ShardSource(tmp_path / "out", 4, seed=0)
    assert source.captions(range(400)) == [again.read([k]).captions[0] for k in range(400)] == batch.captions
    encode.encode(tmp_path / "out", tmp_path / "codes", "shapes/dalle", processes=1)
    model = find_model("shapes/dalle")
    against = {"tokenizer": checkpoint.read_card(model)["parts"]["tokenizer"]["hash"]}
    data = runs.Data(kind="shards", shards=str(tmp_path / "out"), cache=str(tmp_path / "codes"))
    cached = source_for(DALLEStage, stream.ShardSource(tmp_path / "out", 32, seed=0), data, against, model)
    assert cached.read(range(400)).captions == batch.captions
    with pytest.raises(ValueError, match=r"has 3 captions, \['text_embedding'\] keep one; leave text out"):
        encode.encode(tmp_path / "out", tmp_path / "text", "shapes/dalle", ["text_embedding"], processes=1)


def split(folder, share=0.3):
    """The captions of each part, whole passes read twice."""
    sources = [stream.ShardSource(folder, 4, seed=0, part=part, share=share) for part in ("train", "validation")]
    return [{c for c in source.read(range(2 * source.size)).captions} for source in sources], sources


@pytest.mark.parametrize("named", [True, False])  # by the name in the json, and by the picture's bytes
def test_the_same_samples_are_held_out_however_they_are_packed(named, tmp_path):
    found = []
    for shards, order in ((3, range(100)), (7, range(99, -1, -1))):
        with ShardWriter(tmp_path / f"{shards}", -(-100 // shards)) as writer:
            for number in order:
                name = {"name": f"{number}.png"} if named else {}
                writer.write({"png": png((number, 0, 7)), "txt": f"number {number}".encode()}, **name)
        assert len(list((tmp_path / f"{shards}").glob("*.tar"))) == shards
        (train, held_out), sources = split(tmp_path / f"{shards}")
        assert sources[0].size + sources[1].size == 100 and 15 < sources[1].size < 45
        assert not train & held_out and len(train | held_out) == 100
        found.append(held_out)
    assert found[0] == found[1]
    assert held_out >= split(tmp_path / "7", share=0.1)[0][1]  # a larger share holds out more, and none less
    whole, prints = stream.ShardSource(tmp_path / "7", 4, seed=0), {source.fingerprint for source in sources}
    assert len(prints | {whole.fingerprint, split(tmp_path / "7", share=0.4)[1][0].fingerprint}) == 4


def test_equal_pictures_are_held_out_together(tmp_path):
    """Packed from a folder under several names, a picture that is held out is nowhere seen in training."""
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(png((number % 20, 0, 0)))
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"number {number % 20}")
    assert len(pack_folder(tmp_path / "in", tmp_path / "out", 9).duplicates) == 40
    (train, held_out), _ = split(tmp_path / "out")
    assert held_out and train and not train & held_out


def test_a_recipe_holds_out_a_share_of_its_shards(tmp_path):
    recipe, _ = runs.load("shapes/dalle", [])
    with ShardWriter(tmp_path / "data") as writer:
        for number in range(200):
            writer.write({"png": png((number, 0, 0)), "txt": f"number {number}".encode()})
    data = runs.Data(kind="shards", shards=str(tmp_path / "data"))
    assert data.validation_share == 0.02
    train, held_out = trainer.source_of(recipe, data), trainer.validation_of(recipe, data)
    keys = [set(source.read(range(source.size)).keys) for source in (train, held_out)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 200 and len(keys[1]) < 12
    none = data.model_copy(update={"validation_share": 0.0})
    assert trainer.source_of(recipe, none).size == 200 and trainer.validation_of(recipe, none) is None
    tiny = data.model_copy(update={"validation_share": 1e-9})
    assert trainer.source_of(recipe, tiny).size == 200 and trainer.validation_of(recipe, tiny) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parent's death is told on Linux alone")
def test_workers_end_at_once_with_a_trainer_that_is_killed(tmp_path):
    """They hold the lock of its run folder, which the next trainer must get."""
    code = """
import sys, time
from pathlib import Path
from kartina.training import run
from kartina.training.data.shapes import ShapesSource
from kartina.training.stream import prefetch
with run.locked(Path(sys.argv[1])):
    batches = prefetch(ShapesSource(), ([k] for k in range(10**6)), workers=2)
    next(batches)
    print("reads", flush=True)
    time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "reads\n"
    workers = psutil.Process(trainer.pid).children(recursive=True)
    assert len(workers) >= 2
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(workers, timeout=3)  # torch's own look at the parent comes every 5 s
    assert not alive
    with runs.locked(tmp_path):
        pass
