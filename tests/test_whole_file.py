"""Files that are written whole or not at all: what a failure leaves, what reaches the disk first, who may read them."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kartina.pipeline import whole_file
from kartina.pipeline.images import save_png
from kartina.training import __main__ as trainer
from kartina.training import run as runs

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3).T}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_tensors_may_be_read_by_those_who_may_read_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        whole_file.save_tensors(tmp_path / "w.safetensors", WEIGHTS, {"of": "a test"})
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], WEIGHTS["w"])


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    told, sync, replace = [], whole_file.sync, os.replace
    monkeypatch.setattr(whole_file, "sync", lambda path: (told.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (told.append("replace"), replace(old, new)))
    whole_file.save_tensors(tmp_path / "w.safetensors", WEIGHTS)
    assert told[0].startswith(f".w.safetensors.{os.getpid()}-") and told[1:] == ["replace", tmp_path.name]


def test_captions_and_pictures_are_written_as_weights_are(tmp_path, monkeypatch):
    """Or a power cut could leave an empty file, which a later run takes for whole."""
    done, sync = [], whole_file.sync
    monkeypatch.setattr(whole_file, "sync", lambda path: (done.append((path.name, path.stat().st_size)), sync(path)))
    recipe, _ = runs.load("shapes/dalle", ["captions.vocab_size=300"])
    source = SimpleNamespace(fingerprint="one caption", captions=lambda positions: ["a red ring"])
    trainer._prepare_captions(recipe, source, tmp_path / "model")
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {})
    for path in (tmp_path / "model" / "captions.json", tmp_path / "a.png"):
        sizes = [size for name, size in done if name.startswith(f".{path.name}.{os.getpid()}-")]
        assert sizes == [path.stat().st_size]


def test_two_processes_of_one_number_write_apart(tmp_path):
    """As in two containers, on a folder that both share."""
    path = tmp_path / "x.json"
    with whole_file.replaced(path) as one, whole_file.replaced(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_and_is_one_process_alone(tmp_path):
    out = tmp_path / "in" / "out"
    with whole_file.appearing(out) as folder:
        (folder / "a").write_text("a")
        with (
            pytest.raises(ValueError, match="out is being written by another process; wait"),
            whole_file.appearing(out),
        ):
            pytest.fail("two at once")
        assert (folder / "a").read_text() == "a" and not out.exists()
    assert (out / "a").read_text() == "a" and list((tmp_path / "in").iterdir()) == [out]
    (tmp_path / "in" / ".other.writing" / "left").mkdir(parents=True)  # by one that was killed
    with pytest.raises(OSError, match="full"), whole_file.appearing(tmp_path / "in" / "other") as folder:
        assert not list(folder.iterdir())
        raise OSError("full")
    assert list((tmp_path / "in").iterdir()) == [out]


def test_where_there_are_no_locks_it_is_said_and_written(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with whole_file.appearing(tmp_path / "out") as folder, whole_file.locked(tmp_path):
        (folder / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"
    said = capsys.readouterr().err
    assert f"{tmp_path / '.out.lock'} cannot be locked" in said and f"{tmp_path} cannot be locked" in said


def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    whole_file.save_tensors(path, WEIGHTS)
    before = path.read_bytes()

    def full(tensors, target, facts):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(whole_file, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        whole_file.save_tensors(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_part_without_its_file_is_not_finished(tmp_path):
    identity = {"stage": "prior"}
    (tmp_path / "card.json").write_text(
        '{"format": 1, "licence": "none", "parts": {"prior": {"hash": "", "identity": {"stage": "prior"}}}}'
    )
    assert not trainer._finished(tmp_path, "prior", identity, extended=False)
    (tmp_path / "prior.safetensors").touch()
    assert trainer._finished(tmp_path, "prior", identity, extended=False)
