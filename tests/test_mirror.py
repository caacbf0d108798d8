"""Shards that lie elsewhere: read as if they lay here, never more of them than there is room for."""

import functools
import http.server
import json
import multiprocessing
import threading

import pytest
import torch
from shape_shards import pack

from kartina.training import encode, mirror, samples, shards
from kartina.training.stream import ShardSource

SHARDS, EACH = 10, 4


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("there") / "shards", SHARDS * EACH, EACH)


@pytest.fixture(scope="module")
def largest(there):
    return max(shard.stat().st_size for shard in there.glob("*.tar"))


def same(one, other):
    return torch.equal(one.image, other.image) and one.captions == other.captions and one.keys == other.keys


def bytes_in(folder):
    return sum(shard.stat().st_size for shard in folder.glob("*.tar"))


def test_it_reads_as_the_shards_do_within_the_room_given(there, largest, tmp_path):
    rows = mirror.make(f"file://{there}", tmp_path / "m", 8.5 * largest)
    assert len(rows) == SHARDS and not list((tmp_path / "m").glob("*.tar"))  # indexes lie beside the shards
    killed = tmp_path / "m" / f".{sorted(there.glob('*.tar'))[0].name}.4321"
    killed.write_bytes(b"what one who was killed had fetched")
    source, near = ShardSource(tmp_path / "m", 32, 0), ShardSource(there, 32, 0)
    assert source.fingerprint == near.fingerprint and source.size == SHARDS * EACH
    most = 0
    for start in range(0, 2 * SHARDS * EACH, 8):
        assert same(source.read(range(start, start + 8)), near.read(range(start, start + 8)))
        most = max(most, bytes_in(tmp_path / "m"))
    assert 7 * largest < most <= 8.5 * largest and not killed.exists()
    assert not shards.check_shards(tmp_path / "m").bad
    report = encode.encode(tmp_path / "m", tmp_path / "codes", "shapes/dalle", processes=1)
    assert report.samples == SHARDS * EACH


def test_without_indexes_the_shards_are_fetched_for_them(there, largest, tmp_path):
    for shard in there.glob("*.tar"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / shard.name).write_bytes(shard.read_bytes())
    address = f"file://{tmp_path}/bare/{sorted(there.glob('*.tar'))[0].name.replace('000000', '{000000..000009}')}"
    mirror.make(address, tmp_path / "m", 8.5 * largest)
    assert 7 * largest < bytes_in(tmp_path / "m") <= 8.5 * largest
    again = mirror.make(address, tmp_path / "m", 20 * largest)  # with more room, of the indexes that are here
    assert len(again) == SHARDS
    assert same(ShardSource(tmp_path / "m", 32, 0).read(range(40)), ShardSource(there, 32, 0).read(range(40)))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_over_http(there, largest, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    copied(there, tmp_path / "far")
    (tmp_path / "far" / "large.bin").write_bytes(b"x" * 2**23)  # this server does not read from the middle
    server = http.server.ThreadingHTTPServer(
        ("localhost", 0), functools.partial(Quiet, directory=str(tmp_path / "far"))
    )
    address = "http://{}:{}".format(*server.server_address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        name = sorted(there.glob("*.tar"))[0].name.replace("000000", "{000000..000009}")
        mirror.make(f"{address}/{name}", tmp_path / "m", 10 * largest)
        assert same(ShardSource(tmp_path / "m", 32, 0).read(range(8)), ShardSource(there, 32, 0).read(range(8)))
        monkeypatch.setattr(mirror.time, "sleep", lambda seconds: None)
        with (
            pytest.warns(UserWarning, match="trying again"),
            pytest.raises(OSError, match="none.tar could not be fetched"),
        ):
            mirror.make(f"{address}/none.tar", tmp_path / "n", 1e9)
    finally:
        server.shutdown()
        server.server_close()


def _read(folder, results):
    torch.set_num_threads(1)
    source = ShardSource(folder, 32, 0)
    results.put(sum(float(source.read([k]).image.double().sum()) for k in range(source.size)))


def test_several_processes_share_it(there, largest, tmp_path):
    mirror.make(f"file://{there}", tmp_path / "m", 8.5 * largest)
    context = multiprocessing.get_context("fork")  # as workers that read begin
    results = context.Queue()
    readers = [context.Process(target=_read, args=(tmp_path / "m", results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    sums = [results.get(timeout=100) for _ in readers]
    near = ShardSource(there, 32, 0)
    assert sums == [sum(float(near.read([k]).image.double().sum()) for k in range(near.size))] * 2
    assert bytes_in(tmp_path / "m") <= 8.5 * largest


def test_another_shard_than_the_mirrored_one_is_refused(there, largest, tmp_path, monkeypatch):
    copied(there, tmp_path / "far")
    mirror.make(f"file://{tmp_path}/far", tmp_path / "m", 20 * largest)
    for shard in (tmp_path / "far").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    source = ShardSource(tmp_path / "m", 32, 0)
    with pytest.raises(ValueError, match="changed since it was mirrored"):
        source.read([0])
    for shard in (tmp_path / "far").glob("*.tar"):
        shard.unlink()
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: None)
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(OSError):
        source.read([0])


@pytest.mark.parametrize(
    ("address", "keep", "message"),
    [
        ("THERE", 3, "must have room for 8 shards"),
        ("data/shards", 20, "is no address"),
        ("file://HERE/empty", 20, "lists no .tar"),
        ("file://HERE/x-{3..1}.tar", 20, "range of numbers that rises"),
        ("file://HERE/{1..2}/x.tar", 20, "is no name of a shard, or that of two"),
        ("file://HERE/gone", 20, "cannot be listed"),
        ("nowhere://x/y", 20, "is no address"),
        ("file://HERE/x.tar::https://y", 20, "is no address"),
        ("THERE", float("inf"), "needs room"),
    ],
)
def test_what_cannot_be_mirrored_is_refused(address, keep, message, there, largest, tmp_path):
    (tmp_path / "empty").mkdir()
    address = address.replace("THERE", f"file://{there}").replace("HERE", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        mirror.make(address, tmp_path / "m", keep * largest)
    with pytest.raises(ValueError, match="holds something, and is no mirror"):
        mirror.make(f"file://{there}", there, 20 * largest)


def test_a_forged_mirror_names_no_file_outside(there, largest, tmp_path):
    mirror.make(f"file://{there}", tmp_path / "m", 20 * largest)
    content = json.loads((tmp_path / "m" / mirror.FILE).read_text())
    for change in [{"name": name} for name in ("../x.tar", "/x.tar", ".x.tar", "x")] + [
        {"bytes": -1}, {"bytes": 10**400}, {"address": "reference://x"}, {"address": "file://x::https://y"}
    ]:  # fmt: skip
        content["shards"][0] |= change
        (tmp_path / "m" / mirror.FILE).write_text(json.dumps(content))
        mirror.table.cache_clear()
        with pytest.raises(ValueError, match="mirror.json is damaged"):
            samples.find_shards(tmp_path / "m")
    mirror.table.cache_clear()


def test_a_mirror_that_was_broken_off_is_refused_and_gone_on_with(there, largest, tmp_path, monkeypatch):
    copied(there, tmp_path / "far")
    hidden = sorted((tmp_path / "far").glob("*.tar"))[5]
    hidden.rename(tmp_path / "hidden.tar")
    for index in (tmp_path / "far").glob("*.index.json"):
        index.unlink()
    address = f"file://{tmp_path}/far/{hidden.name.replace('000005', '{000000..000009}')}"
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: None)
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(OSError, match="could not be fetched"):
        mirror.make(address, tmp_path / "m", 20 * largest)
    with pytest.raises(ValueError, match="was not made to its end"):
        ShardSource(tmp_path / "m", 32, 0)
    (tmp_path / "hidden.tar").rename(hidden)
    asked = []
    fetch = mirror._fetch
    monkeypatch.setattr(mirror, "_fetch", lambda address, *rest: asked.append(address) or fetch(address, *rest))
    mirror.make(address, tmp_path / "m", 20 * largest)
    assert len([one for one in asked if one.endswith(".tar")]) == 5  # the others are known
    near = ShardSource(there, 32, 0)
    assert same(ShardSource(tmp_path / "m", 32, 0).read(range(40)), near.read(range(40)))
    assert [path.name for path in (tmp_path / "m").glob(".*")] == [".lock"]


def test_a_mirror_without_room_is_not_whole(there, largest, tmp_path):
    name = sorted(there.glob("*.tar"))[0].name
    with pytest.raises(ValueError, match="must have room for 1 shards"):
        mirror.make(f"file://{there}/{name}", tmp_path / "m", 1)
    with pytest.raises(ValueError, match="was not made to its end"):
        ShardSource(tmp_path / "m", 32, 0)


def test_another_address_brings_other_shards(there, largest, tmp_path):
    copied(there, tmp_path / "a")
    copied(pack(tmp_path / "other", SHARDS * EACH, EACH, first=500), tmp_path / "b")
    mirror.make(f"file://{tmp_path}/a", tmp_path / "m", 20 * largest)
    assert same(ShardSource(tmp_path / "m", 32, 0).read(range(9)), ShardSource(tmp_path / "a", 32, 0).read(range(9)))
    mirror.make(f"file://{tmp_path}/b", tmp_path / "m", 20 * largest)
    assert same(ShardSource(tmp_path / "m", 32, 0).read(range(9)), ShardSource(tmp_path / "b", 32, 0).read(range(9)))


def test_what_lies_there_damaged_is_fetched_again_and_nothing_else_is_removed(there, largest, tmp_path):
    mirror.make(f"file://{there}", tmp_path / "m", 8.5 * largest)
    (tmp_path / "m" / "mine.tar").write_bytes(b"of somebody")
    source, near = ShardSource(tmp_path / "m", 32, 0), ShardSource(there, 32, 0)
    source.read([0])
    fetched = next(shard for shard in (tmp_path / "m").glob("*.tar") if shard.name != "mine.tar")
    fetched.write_bytes(b"")  # as after a power cut
    assert same(source.read(range(80)), near.read(range(80)))
    assert (tmp_path / "m" / "mine.tar").read_bytes() == b"of somebody"
    assert not shards.check_shards(tmp_path / "m").shards


def test_a_page_in_place_of_a_shard_is_refused(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.tar").write_text("<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="x.tar is no shard to train from: torn shard"):
        mirror.make(f"file://{tmp_path}/far/x.tar", tmp_path / "m", 1e9)


def copied(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
