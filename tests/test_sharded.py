"""FSDP2 on two CPU processes: half of everything on each, equal to one process, saved, resumed anywhere, exported."""

import json
import shutil

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.training import state


@pytest.fixture(scope="module")
def runs(tiny, trained_tokenizer, tmp_path_factory, work):
    """A tiny DALL-E: on one process, divided over two (whole, and stopped half-way and resumed), and resumed on one."""
    home = tmp_path_factory.mktemp("sharded")
    argv = [*tiny["dalle"][1], "training.shard=fsdp", "stages.prior.recompute=true", "stages.prior.preview_every=10"]
    folders = {name: home / name for name in ("one", "two", "parted", "moved", "joined")}
    for folder in folders.values():
        shutil.copytree(trained_tokenizer, folder, ignore=shutil.ignore_patterns("state", "log.jsonl", "previews"))
    job = {name: {"name": name, "argv": [*argv, "--run", str(folder)]} for name, folder in folders.items()}
    results = work([job["one"], {**job["joined"], "stop_at": 9}], 1)
    halves = [{**job[name], "name": f"{name} first", "stop_at": 9} for name in ("parted", "moved")]
    results |= work([job["two"], *halves, job["parted"], {**job["joined"], "name": "joined again"}], 2)
    results |= work([job["moved"]], 1)
    return folders, results


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "prior"]
    return torch.tensor([line[n] for line in lines for n in ("prior/image_loss", "valid/nats_per_code") if n in line])


def test_each_process_holds_half(runs):
    _, results = runs
    assert [rank["status"] for rank in results["two"]] == [0, 0]
    for rank in results["two"]:
        local, total, divided = rank["held"]["prior"]
        assert divided and 0.4 * total < local < 0.6 * total
    assert results["one"][0]["held"]["prior"][2] is False


@pytest.mark.parametrize("name", ["two", "parted", "moved", "joined"])
def test_the_run_is_that_of_one_process(name, runs):
    """Divided, divided and resumed, resumed on one process, and begun on one and divided half-way: losses to 1e-5."""
    folders, results = runs
    assert all(rank["status"] in (0, 143) for ranks in results.values() for rank in ranks)
    one, other = losses(folders["one"]), losses(folders[name])
    assert len(one) == 22 and torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_divided_checkpoint_has_parts_of_both_and_no_pickle_of_them(runs, tmp_path):
    folder = shutil.copytree(runs[0]["two"] / "state" / "prior", tmp_path / "prior")
    newest = state.newest(folder)
    names = sorted(path.name for path in newest.rglob("*") if path.is_file())
    assert len([name for name in names if name.endswith(".safetensors")]) == 2
    assert set(names) - {name for name in names if name.endswith(".safetensors")} == {"manifest.json", "state.pt"}
    damaged = next(newest.rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    assert state.newest(folder) == newest.with_name("step-00000010")
    assert newest.with_name("damaged-step-00000020").is_dir()


def test_the_export_is_whole(runs):
    folders, _ = runs
    one, two = (checkpoint.load_weights(folders[name] / "model", "prior") for name in ("one", "two"))
    for name, value in one.items():
        assert two[name].shape == value.shape
        assert torch.allclose(two[name].float(), value.float(), atol=1e-3), name
    assert (folders["two"] / "previews" / "prior-000020.png").stat().st_size > 0
