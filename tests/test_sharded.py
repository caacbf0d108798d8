"""FSDP2 on two CPU processes: half of everything on each, equal to one process, saved, resumed anywhere, exported."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from kartina.pipeline import checkpoint
from kartina.training import sharded, state


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


def test_reading_fills_what_is_there_in_place_of_a_second_copy(runs):
    newest = state.newest(runs[0]["two"] / "state" / "prior")
    content = state.load(newest)
    sizes = HuggingFaceStorageReader(str(newest / "shards")).read_metadata().state_dict_metadata
    made = {}

    def live(node, key):
        if isinstance(node, dict):
            return {name: live(value, f"{key}/{name}") for name, value in node.items()}
        if isinstance(node, list):
            return [live(value, f"{key}/{i}") for i, value in enumerate(node)]
        if key in sizes:
            made[key] = torch.full(sizes[key].size, torch.nan)
            return made[key]
        return node

    there = live(content, "")
    assert len(made) > 40 and set(made) == set(sizes)
    before = {key: value.data_ptr() for key, value in made.items()}
    whole = sharded.read(newest, content, there)
    assert not any(value.isnan().any() for value in made.values())
    for name, value in whole["networks"]["prior"].items():
        assert value.data_ptr() == before[f"/networks/prior/{name}"]


def test_the_export_is_whole(runs):
    folders, _ = runs
    one, two = (checkpoint.load_weights(folders[name] / "model", "prior") for name in ("one", "two"))
    for name, value in one.items():
        assert two[name].shape == value.shape
        assert torch.allclose(two[name].float(), value.float(), atol=1e-3), name
    assert (folders["two"] / "previews" / "prior-000020.png").stat().st_size > 0


HALF = """
import json, sys, warnings
from pathlib import Path
import torch
from accelerate import Accelerator
from torch import nn
from kartina.layers.attention import TransformerBlock
from kartina.layers.clip_transformer import CLIPBlock
from kartina.training import parallel

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TransformerBlock(64, 4, "gelu", "layer", qk_norm=True, shift=[1]) for _ in range(3))
        self.blocks.append(CLIPBlock(64, 4))
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, None)
        return self.head(x)

warnings.simplefilter("ignore")
accelerator = Accelerator(mixed_precision="bf16", cpu=True)
found = []
for divided in (False, True):
    network, kept = Network(), {}
    matrices = {parameter.shape for parameter in network.blocks.parameters() if parameter.dim() == 2}
    matrices |= {shape[::-1] for shape in matrices}
    forward = parallel.prepare(network, accelerator, divided, recompute=False)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(accelerator.process_index))

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in matrices:
            kept[tensor.untyped_storage()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)
    copies = sum(storage.nbytes() for storage in kept)
    y.square().mean().backward()
    gradients = [parallel.whole(parameter.grad) for _, parameter in sorted(network.named_parameters())]
    found.append((y.detach(), gradients, copies))
(whole, gradients, copies), (y, others, left) = found
worst = max(float((a - b).norm() / a.norm()) for a, b in zip(gradients, others))
facts = [float((y - whole).abs().max()), worst, copies, left]
Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(facts))
"""


def test_under_bfloat16_no_copies_of_divided_weights_are_kept_and_nothing_changes(tmp_path):
    script = tmp_path / "half.py"
    script.write_text(HALF)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        str(tmp_path),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for output, gradient, copies, left in ranks:
        assert output == 0 and gradient < 1e-6
        assert left == 2 * 4 * 64 * 64  # of nn.MultiheadAttention alone, see `matrices_of`
        assert copies >= 4 * 2 * 12 * 64 * 64
