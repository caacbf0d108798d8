"""Checkpoints of torch are read without running them: equality with torch, and hostile or damaged files."""

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from kartina.pipeline import archive
from kartina.pipeline.archive import module_tensors, read
from kartina.pipeline.unpickle import Record, StoredTensor, WeightsError, run


def state(content) -> dict:
    return {name: value for name, value in content["state_dict"].items() if isinstance(value, StoredTensor)}


def same(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def checkpoint() -> dict:
    """As Lightning writes them: weights, an optimizer's state, hyperparameters, callbacks, a scheduler."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).to(torch.float64)
    adam = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}},
        "param_groups": [{"betas": (0.9, 0.999)}],
    }
    extra = {"half": torch.randn(3).half(), "brain": torch.randn(2, 2).bfloat16(), "flag": torch.tensor([True])}
    extra |= {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(4, 5).T,
        "row": model[2].weight[1],
    }
    return {
        "state_dict": OrderedDict(model.state_dict()) | extra,
        "optimizer_states": [adam],
        "callbacks": {Odd: {"best": 0.5}},
        "hyper_parameters": {"sizes": (1, 2), "kind": Odd(), "none": None, "big": 2**70, "set": {1, 2}, b"x": 1},
        "epoch": 3,
    }


class Odd:
    """What is not allowed: it must not be made."""

    def __init__(self):
        self.word = "odd"

    def __setstate__(self, state):
        raise AssertionError("code of the file ran")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_saves(tmp_path, zipped, protocol):
    if protocol == 4 and not zipped:
        pytest.skip("torch wrote the old format with protocol 2")
    content = checkpoint()
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    same(read(tmp_path / "a.ckpt", state), content["state_dict"])


def test_other_classes_become_records(tmp_path):
    torch.save(checkpoint(), tmp_path / "a.ckpt")
    seen = []
    read(tmp_path / "a.ckpt", lambda content: seen.append(content) or {})
    parameters = seen[0]["hyper_parameters"]
    assert isinstance(parameters["kind"], Record) and parameters["kind"].of.name.endswith(".Odd")
    assert parameters["kind"].state == {"word": "odd"}
    assert parameters["sizes"] == (1, 2) and parameters["big"] == 2**70 and seen[0]["epoch"] == 3


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_pickled_whole_gives_its_weights(tmp_path, zipped):
    package = types.ModuleType("gone_package")
    package.Net = type("Net", (nn.Sequential,), {"__module__": "gone_package", "__qualname__": "Net"})
    sys.modules["gone_package"] = package
    model = package.Net(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Upsample(scale_factor=2)))
    try:
        torch.save(model, tmp_path / "net.pkl", _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules["gone_package"]
    found = read(tmp_path / "net.pkl", module_tensors)
    assert set(found) == set(model.state_dict())
    same({name: found[name] for name in model.state_dict()}, model.state_dict())
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.pkl")
    with pytest.raises(WeightsError, match="no module of finite depth"):
        read(tmp_path / "net.pkl", module_tensors)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) + (() if state is None else (state,))

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "nested": lambda mark: {"a": [Calls(OrderedDict, [("k", Calls(os.system, f"touch {mark}"))])]},
    "call of a call": lambda mark: Calls(list, Calls(map, exec, [f"open({str(mark)!r}, 'w')"])),
    "state": lambda mark: Calls(OrderedDict, state={"f": Calls(os.system, f"touch {mark}")}),
    "rebuild": lambda mark: Calls(torch._utils._rebuild_parameter, Calls(os.system, f"touch {mark}"), True, {}),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_hostile_file_runs(tmp_path, name, zipped):
    mark = tmp_path / "ran"
    content = {"state_dict": {"w": torch.ones(2)}, "evil": HOSTILE[name](mark)}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert read(tmp_path / "a.ckpt", state)["w"].tolist() == [1, 1]
    assert not mark.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False) if name == "open" else None  # the file does what it says
    assert mark.exists() == (name == "open")


def test_an_allowed_name_in_another_module_is_a_record():
    for text in (b"cevil.torch._utils\n_rebuild_tensor_v2\n", b"ccollections.evil\nOrderedDict\n"):
        made = run(io.BytesIO(b"\x80\x02" + text + b")R."), 2**20)
        assert isinstance(made, Record) and made.of.name.split(".")[0] in ("evil", "collections")
    stacked = pickle.dumps("collections.x", 4)[:-1] + pickle.dumps("OrderedDict", 4)[2:-1] + b"\x93)R."
    assert isinstance(run(io.BytesIO(stacked), 2**20), Record)


def rewrite(path, change) -> None:
    """Writes a zip archive again, each entry as `change` of its name and bytes gives it."""
    with zipfile.ZipFile(path) as archive:
        entries = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, *method in entries:
            archive.writestr(name, data, *method)


def tensors_of(pickled: bytes):
    def change(name, data):
        return name, pickled if name.endswith("data.pkl") else data

    return change


def view(offset, shape, stride, numel=4, key="0") -> bytes:
    """A pickle of {"state_dict": {"w": a view}}."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", numel) if value is Pickler else None

    out = io.BytesIO()
    rebuilt = Calls(torch._utils._rebuild_tensor_v2, Pickler, offset, shape, stride, False, OrderedDict())
    Pickler(out, 2).dump({"state_dict": {"w": rebuilt}})
    return out.getvalue()


DAMAGED = {
    "more numbers": (tensors_of(view(0, (5,), (1,), 5)), "has 16 bytes, expected 5"),
    "fewer numbers": (tensors_of(view(0, (1,), (1,), 1)), "has 16 bytes, expected 1"),
    "view outside": (tensors_of(view(2, (4,), (1,))), "does not lie within its 4"),
    "negative offset": (tensors_of(view(-2, (4,), (1,))), "no storage or no sizes"),
    "negative stride": (tensors_of(view(3, (4,), (-1,))), "no storage or no sizes"),
    "expanded": (tensors_of(view(0, (2**40,), (0,))), "does not lie within"),
    "huge": (tensors_of(view(0, (2**40,), (1,), 2**40)), "has 16 bytes"),
    "path": (tensors_of(view(0, (4,), (1,), key="../../etc/passwd")), "no sound key"),
    "missing": (tensors_of(view(0, (4,), (1,), key="9")), "damaged"),
    "compressed": (lambda name, data: (name, data, zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (lambda name, data: (name, b"big" if "byteorder" in name else data), "little-endian"),
    "no pickle": (lambda name, data: (name.replace("data.pkl", "x.pkl"), data), "one data.pkl"),
    "path in the zip": (lambda name, data: (f"../{name}", data), "one data.pkl"),
    "no end": (tensors_of(b"\x80\x02}"), "damaged"),
    "instruction": (tensors_of(b"\x80\x02ios\nsystem\n."), "instruction INST"),
    "empty stack": (tensors_of(b"\x80\x02tR."), "damaged"),
    "word for a storage": (tensors_of(b"\x80\x02X\x01\x00\x00\x00aQ."), "damaged|no storage"),
    "long word": (tensors_of(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a."), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_archives_are_one_clear_error(tmp_path, name):
    change, message = DAMAGED[name]
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(4)}}, path)
    rewrite(path, change)
    with pytest.raises(WeightsError, match=f"a.ckpt.*{message}|{message}"):
        read(path, state)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_files_are_one_clear_error(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(40)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 29):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="damaged|no checkpoint|bytes, expected"):
            read(path, state)
    path.write_bytes(pickle.dumps([1], 2))
    with pytest.raises(WeightsError, match="not of torch.save"):
        read(path, state)


def test_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(4)}}, path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))  # its entry in the directory
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="claim more"):
        read(path, state)


def test_a_pickle_of_old_without_end_is_refused_where_its_limit_is(tmp_path, monkeypatch):
    """Of a byte each, lists take seventy times their file; nothing of what comes after the limit is made."""
    path = tmp_path / "a.ckpt"
    magic, version = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    for facts in (b"", magic, magic + version):
        path.write_bytes(facts + b"\x80\x02" + b"]" * 10_000_000)
        with pytest.raises(WeightsError, match="more than 4096 bytes"):
            read(path, state)
    start = [pickle.dumps(fact, 2) for fact in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(start) + b"\x80\x02" + b"]" * 9_000_000)
    monkeypatch.setattr(archive, "_PICKLE_LIMIT", 10_000)
    with pytest.raises(WeightsError, match="more than 10000 bytes"):
        read(path, state)


def test_modules_of_long_names_are_refused_before_their_paths_are_made(tmp_path):
    child = Record("child", state={"_modules": {str(n): Record("leaf", state={}) for n in range(10)}})
    deep = Record("deep", state={"_modules": {"x" * 300: Record("inner", state={"_modules": {"y" * 300: child}})}})
    for inner in ({"x" * 513: child}, {str(n): child for n in range(100_001)}, {"z": deep}):
        with pytest.raises(WeightsError, match="no module of finite depth"):
            module_tensors(Record("root", state={"_modules": inner}))
    long = Record("long", state={"_buffers": {"x" * 513: None}})
    with pytest.raises(WeightsError, match="no module of finite depth"):
        module_tensors(Record("root", state={"_modules": {"a": long}}))
    assert module_tensors(Record("root", state={"_modules": {"x" * 500: child}})) == {}


def test_a_storage_is_read_once_however_many_look_into_it(tmp_path, monkeypatch):
    whole = torch.arange(12.0)
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"b": whole[6:], "a": whole[:6], "c": torch.ones(2)}}, path)
    count, numbers = [], archive._numbers
    monkeypatch.setattr(archive, "_numbers", lambda *given: count.append(1) or numbers(*given))
    found = read(path, state)
    assert len(count) == 2 and list(found) == ["b", "a", "c"]
    assert torch.equal(found["a"], whole[:6]) and torch.equal(found["b"], whole[6:])
    assert found["a"].untyped_storage().nbytes() == 24


def test_tuples_that_double_without_end_take_no_time():
    nested = b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60))
    assert isinstance(run(io.BytesIO(nested + b"."), 2**20), tuple)
    assert run(io.BytesIO(nested + b"}h\x00K\x01s."), 2**20) == {}  # as a key, whose hash would take forever
    with pytest.raises(WeightsError, match="no storage"):
        run(io.BytesIO(nested + b"X\x07\x00\x00\x00storageh\x00h\x00h\x00h\x00tQ.".replace(b"X", b"(X", 1)), 2**20)
