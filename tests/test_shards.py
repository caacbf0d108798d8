"""Shards: names and bytes survive packing, every bad sample is named, nothing in a shard is executed."""

import errno
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kartina.training import samples, shards
from kartina.training.stream import ShardSource


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8), mode: str = "RGB", color=(200, 10, 30), **save) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, kind, **save)
    return out.getvalue()


def foreign_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_equal_input_gives_equal_shards_and_the_index_finds_members(tmp_path):
    for out in ("one", "two"):
        with shards.ShardWriter(tmp_path / out) as writer:
            writer.write({"png": picture(), "txt": b"red"}, name="x.png")
    one, two = (tmp_path / out / "shard-000000.tar" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    offset, size = samples.load_index(one).entries[0].members["png"]
    assert one.read_bytes()[offset : offset + size] == picture()


def test_a_failed_writer_leaves_nothing_and_content_is_not_overwritten(tmp_path):
    with pytest.raises(RuntimeError), shards.ShardWriter(tmp_path / "out") as writer:
        writer.write({"png": picture()})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="empty folder"):
        shards.ShardWriter(tmp_path / "out")
    with pytest.raises(ValueError, match="members may be"), shards.ShardWriter(tmp_path / "new") as writer:
        writer.write({"pkl": b""})


def test_every_bad_sample_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "PIXEL_LIMIT", 1000)
    good = picture()
    members = {
        "good.png": good, "good.txt": b"fine",
        "cut.png": good[:50], "cut.txt": b"cut",
        "void.png": b"", "void.txt": b"void",
        "mute.png": good,
        "blank.png": good, "blank.txt": b" \n",
        "huge.png": picture(size=(64, 64)), "huge.txt": b"huge",
        "noise.jpg": b"not a picture", "noise.txt": b"noise",
        "text.txt": b"no picture",
        "latin.png": good, "latin.txt": b"\xff\xfe\xfa",
        "a.b 2.0 (x).v1.JPG": good, "a.b 2.0 (x).v1.txt": b"dots",
        "gif.gif": b"GIF89a", "gif.txt": b"gif",
    }  # fmt: skip
    path = foreign_tar(tmp_path / "foreign.tar", members)
    report = shards.check_shards([path])
    reasons = {
        "cut": "undecodable picture", "void": "empty .png", "mute": "no caption", "blank": "no caption",
        "huge": "too large", "noise": "undecodable", "text": "expected one picture", "latin": "undecodable .txt",
        "a": "dotted name", "gif": "expected one picture",
    }  # fmt: skip
    assert report.samples == 11 and set(report.bad) == {f"foreign/{key}" for key in reasons}
    for key, reason in reasons.items():
        assert reason in report.bad[f"foreign/{key}"]


def test_torn_empty_compressed_and_changed_shards(tmp_path):
    with shards.ShardWriter(tmp_path / "out") as writer:
        for k in range(3):
            writer.write({"txt": b"caption", "png": picture(color=(k, 0, 0)) + bytes(4000)})
    path = tmp_path / "out" / "shard-000000.tar"
    last = shards.build_index(path).entries[-1].members["png"]
    data = path.read_bytes()
    path.write_bytes(data[: last[0] + 100])
    report = shards.check_shards(path)
    assert "truncated" in report.bad["shard-000000/000000002"] and len(report.bad) == 1
    assert report.shards
    changed = bytearray(data)
    changed[last[0] + last[1] - 1] ^= 1
    path.write_bytes(changed)
    assert "manifest" in shards.check_shards(path).shards[path.name]
    assert "no samples" in shards.check_shards(foreign_tar(tmp_path / "empty.tar", {})).shards["empty.tar"]
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(path, "x.png")
    assert "uncompressed" in shards.check_shards(tmp_path / "packed.tar").shards["packed.tar"]


def test_training_refuses_data_that_is_not_whole(tmp_path):
    with shards.ShardWriter(tmp_path / "out", 2) as writer:
        for k in range(6):
            writer.write({"txt": b"caption", "png": picture(color=(k, 0, 0)) + bytes(4000)})
    first, second, third = sorted((tmp_path / "out").glob("*.tar"))
    source = ShardSource(tmp_path / "out", 8, 0)
    assert source.size == 6 and ShardSource(tmp_path / "out", 8, 0).indexes[0] is source.indexes[0]
    second.unlink()
    third.write_bytes(third.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"not whole: .*000002.tar: torn.*000001.tar: missing, though the manifest"):
        ShardSource(tmp_path / "out", 8, 0)
    assert ShardSource(first, 8, 0).size == 2  # named alone, it promises nothing else
    third.unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    assert ShardSource(tmp_path / "out", 8, 0).size == 2


def test_training_refuses_a_shard_that_is_not_what_was_packed(tmp_path):
    """As one of fewer members, which is a whole tar."""
    with shards.ShardWriter(tmp_path / "out") as writer:
        for k in range(6):
            writer.write({"txt": b"caption", "png": picture(color=(k, 0, 0))})
    path = tmp_path / "out" / "shard-000000.tar"
    with tarfile.open(path) as tar:
        begin = tar.getmembers()[6].offset
    path.write_bytes(path.read_bytes()[:begin] + bytes(1024))
    assert samples.build_index(path).problem is None
    with pytest.raises(ValueError, match="changed since it was packed"):
        ShardSource(tmp_path / "out", 8, 0)


def test_a_stale_or_spoilt_index_is_built_again(tmp_path):
    path = foreign_tar(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"a"})
    first = samples._load_index(path)
    assert samples.index_path(path).is_file() and samples._load_index(path).sha256 == first.sha256
    samples.index_path(path).write_text('{"format": 1}')
    assert samples._load_index(path).entries == first.entries
    foreign_tar(path, {f"{k}.png": picture() for k in range(20)})
    assert len(samples._load_index(path).entries) == 20


def test_on_a_mount_that_is_read_only_the_index_stays_in_memory(tmp_path, monkeypatch):
    """There even removing what is not there fails."""
    path = foreign_tar(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"a"})

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.warns(UserWarning, match="cannot be written to"):
        assert [entry.key for entry in samples.build_index(path).entries] == ["a"]
    assert not samples.index_path(path).exists()


def test_an_older_shard_of_the_same_size_in_the_place_of_another_is_read_anew(tmp_path):
    """As `cp -p` brings it: the index of the one before is younger than it."""
    path = foreign_tar(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"a"})
    first = samples.load_index(path)
    foreign_tar(path, {"b.png": picture(), "b.txt": b"b"})
    os.utime(path, (1, 1))
    second = samples.load_index(path)
    assert second.bytes == first.bytes and second.sha256 != first.sha256 and second.entries[0].key == "b"
    os.utime(path, ns=(0, 7 * 10**9 + 5))
    third = samples.load_index(path)
    written = samples.index_path(path).read_bytes()
    os.utime(path, (7, 7))  # as an archive keeps it
    assert samples.load_index(path) == third and samples.index_path(path).read_bytes() == written
    os.utime(path, (8, 8))
    samples.load_index(path)
    assert samples.index_path(path).read_bytes() != written


def test_pickles_are_refused_and_arrays_are_read():
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    out = io.BytesIO()
    np.save(out, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(samples.BadSample, match="allow_pickle"):
        samples.decode("npy", out.getvalue())
    with pytest.raises(samples.BadSample, match="unknown kind"):
        samples.decode("pkl", pickle.dumps(1))
    out = io.BytesIO()
    np.save(out, np.arange(3))
    assert samples.decode("npy", out.getvalue()).tolist() == [0, 1, 2]


def test_odd_pictures_become_upright_rgb():
    clear = samples.decode("png", picture(mode="RGBA", color=(255, 0, 0, 0)))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    out = io.BytesIO()
    grey.save(out, "PNG")
    assert samples.decode("png", out.getvalue()).getpixel((0, 0)) == (128, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert samples.decode("jpg", picture("JPEG", size=(8, 4), exif=exif)).size == (4, 8)
    assert samples.decode("jpeg", picture("JPEG", mode="CMYK", color=(0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert samples.decode("webp", picture("WEBP", lossless=True)).getpixel((0, 0)) == (200, 10, 30)
    assert samples.decode("png", picture(mode="P", color=0)).mode == "RGB"


def test_damaged_exif_says_nothing_of_the_pixels():
    """As crawled photos have it: Pillow raises struct.error or SyntaxError."""
    for exif in (b"Exif\0\0II*\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
            found = samples.decode(extension, picture(kind, size=(8, 4), exif=exif))
            assert found.size == (8, 4) and found.mode == "RGB"
    entry = struct.pack("<HHII", 0x8825, 4, 1, 10**6)
    # A turn, beside a table of places that lies beyond the end.
    turned = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + entry + bytes(4)
    assert samples.decode("jpg", picture("JPEG", size=(8, 4), exif=turned)).size == (4, 8)


def test_a_clear_colour_of_16_bit_grey_is_clear():
    levels = np.array([[0, 30_000], [65_535, 30_001]], dtype=np.uint16)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG", transparency=30_000)
    found = samples.decode("png", out.getvalue())
    assert np.asarray(found)[..., 0].tolist() == [[0, 255], [255, 116]]


def test_lines_of_a_caption_are_those_of_files():
    """str.splitlines also ends lines at what web captions have within: U+2028, U+0085, form feeds."""
    text = "a\u2028b\n\n c\x85d \r\ne\x0cf\rg"
    assert samples.lines(text) == ["a\u2028b", "c\x85d", "e\x0cf", "g"]


def test_arrays_are_arrays_of_numbers():
    for array in (np.array(["a"]), np.zeros(3, dtype=[("x", "f4")]), np.array([True])):
        out = io.BytesIO()
        np.save(out, array)
        with pytest.raises(samples.BadSample, match="expected one array of numbers"):
            samples.decode("codes.npy", out.getvalue())
    out = io.BytesIO()
    np.savez(out, np.zeros(3))
    with pytest.raises(samples.BadSample, match="expected one array of numbers, got an archive"):
        samples.decode("codes.npy", out.getvalue())


def test_forged_headers_and_indexes_stop_nothing(tmp_path):
    """A header that tarfile rejects is a torn shard; an index with places before the shard is built again.

    `_load_index` reads it each time; `load_index` keeps what it has read.
    """
    forged = tmp_path / "forged.tar"
    with tarfile.open(forged, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("000.png")
        info.pax_headers = {"GNU.sparse.map": "a,b", "GNU.sparse.size": "x"}
        tar.addfile(info)
    assert samples.build_index(forged).problem
    good = foreign_tar(tmp_path / "good.tar", {"000.png": picture(), "000.txt": b"x"})
    whole = samples._load_index(good)
    path = samples.index_path(good)
    content = json.loads(path.read_text())
    content["samples"][0][1]["png"] = [-5, 3]
    path.write_text(json.dumps(content))
    assert samples._load_index(good) == whole
    content["samples"][0][1]["png"] = [float("inf"), 3]
    for forged_index in (json.dumps(content), "[" * 100_000):
        path.write_text(forged_index)
        assert samples._load_index(good) == whole


def test_a_shard_that_the_manifest_lists_and_that_is_gone_is_a_finding(tmp_path):
    with shards.ShardWriter(tmp_path / "out", samples_per_shard=2) as writer:
        for k in range(5):
            writer.write({"txt": b"caption", "png": picture(color=(k, 0, 0))})
    assert not shards.check_shards(tmp_path / "out").shards
    (tmp_path / "out" / "shard-000001.tar").unlink()
    report = shards.check_shards(tmp_path / "out")
    assert list(report.shards) == ["shard-000001.tar"] and "missing" in report.shards["shard-000001.tar"]
    assert report.samples == 3
    with pytest.raises(ValueError, match="no shard at .*nowhere.*data pack"):
        shards.check_shards(tmp_path / "nowhere")
