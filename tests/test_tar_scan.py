"""Tars that are cut, damaged or forged, beside whole ones of several kinds."""

import io
import struct
import tarfile

import pytest

from kartina.training import samples, tar_scan

NAMES = ["a.txt", "b.txt", "c.txt"]


def written(path, kind=tarfile.USTAR_FORMAT, names=NAMES):
    with tarfile.open(path, "w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    return path


def found(path):
    return [info.name for info in tar_scan.files(path)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_tars_of_every_kind_are_read(tmp_path, kind):
    names = [*NAMES, "long/" * 60 + "d.txt"] if kind != tarfile.USTAR_FORMAT else NAMES
    assert found(written(tmp_path / "x.tar", kind, names)) == names
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("none.txt"))
    assert found(tmp_path / "y.tar") == ["none.txt"]
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "z.tar").write_bytes(whole[:-512] + b"what old systems leave behind".ljust(512))
    assert found(tmp_path / "z.tar") == names


def blocks(*edits):
    """What a tar of three files is after edits of (offset, bytes): headers at 0, 1536 and 3072, the end at 4608."""

    def damage(data):
        for place, new in edits:
            data[place : place + len(new)] = new
        return data

    return damage


def header(data, place, **fields):
    """That header with its fields changed, and a checksum that fits."""
    block = bytearray(data[place : place + 512])
    for name, new in fields.items():
        at = {"size": 124, "kind": 156, "magic": 257, "extended": 482, "real": 483}[name]
        block[at : at + len(new)] = new
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[place : place + 512] = block
    return data


BACKWARDS = "leads backwards|no member and no end mark at byte 1536"  # newer versions of Python find it themselves
NEGATIVE = b"\xff" * 4 + struct.pack(">q", -512)
DAMAGES = {
    "a bit of a header": (blocks((1536, b"\xff")), ["a.txt"], "no member and no end mark at byte 1536"),
    "cut between members": (lambda data: data[:3072], ["a.txt", "b.txt"], "no member and no end mark at byte 3072"),
    "cut in a header": (lambda data: data[:1700], ["a.txt"], "no member and no end mark at byte 1536"),
    "cut in a file": (lambda data: data[:2300], ["a.txt", "b.txt"], "cut off inside 'b.txt'"),
    "joined": (lambda data: data + data, NAMES, "more comes after its end mark at byte 4608, as of tars joined by cat"),
    "a header of zeros": (blocks((1536, bytes(512))), ["a.txt"], "more comes after its end mark at byte 1536"),
    "an unknown kind that leads backwards": (
        lambda data: header(data, 1536, kind=b"9", size=NEGATIVE), ["a.txt"], BACKWARDS
    ),
    "a file that leads backwards": (lambda data: header(data, 1536, size=NEGATIVE), ["a.txt"], BACKWARDS),
    "a size beyond all file systems": (
        lambda data: header(data, 1536, size=b"\x80\0\0\0" + struct.pack(">q", 2**60)),
        ["a.txt", "b.txt"],
        "cut off inside 'b.txt'",
    ),
    "a sparse file that leads backwards": (
        lambda data: header(data, 1536, kind=b"S", size=NEGATIVE, magic=b"ustar  \0", extended=b"\0", real=b"0" * 11),
        ["a.txt"],
        BACKWARDS,
    ),
    "a sparse file without an end": (
        lambda data: header(data[:2048], 1536, kind=b"S", magic=b"ustar  \0", extended=b"\1", real=b"0" * 11),
        ["a.txt"],
        "index out of range",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_fault_is_told_after_what_lies_before_it(tmp_path, damage):
    edit, before, reason = DAMAGES[damage]
    path = written(tmp_path / "x.tar")
    path.write_bytes(edit(bytearray(path.read_bytes())))
    reached = []
    with pytest.raises(ValueError, match=reason):
        for info in tar_scan.files(path):
            reached.append(info.name)
    assert reached == before
    index = samples.build_index(path)
    assert "torn shard" in index.problem and [entry.key for entry in index.entries] == [n[0] for n in before]


def test_long_names_without_end_are_a_fault(tmp_path):
    path = tmp_path / "x.tar"
    data = bytearray(written(path).read_bytes())
    name = bytes(header(bytearray(data[:512]), 0, kind=b"L", size=b"%011o\0" % 0))
    path.write_bytes(bytes(data[:1536]) + name * 5000 + bytes(data[1536:]))
    with pytest.raises(ValueError, match="recursion"):
        list(tar_scan.files(path))
