"""Tiny recipes of every stage, and processes in which many trainings run one after the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kartina.training import __main__ as trainer

WORKER = Path(__file__).parent / "job_worker.py"

_CAPTIONS = ["captions.vocab_size=300", "captions.context_length=22"]
_TOKENIZER = ["parts.tokenizer.width=8", "parts.tokenizer.num_codes=32"]
_PRIOR = [
    *[f"parts.prior.{key}" for key in ("num_codes=32", "text_vocab=300", "text_length=22", "width=32", "depth=2")],
    *["parts.prior.attention=full", "parts.prior.num_heads=2", "parts.prior.shift=[]"],
]
_CLIP = [
    *[f"parts.clip.{key}" for key in ("text_vocab=301", "text_length=22", "embed_dim=16", "vision_width=32")],
    *[f"parts.clip.{key}" for key in ("vision_depth=1", "vision_heads=2", "text_width=32", "text_depth=1")],
    "parts.clip.text_heads=2",
]
_SHORT = [
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "prior", "clip") for key in ("steps=20", "global_batch=8")],
    *[f"stages.{stage}.log_every=1" for stage in ("tokenizer", "prior", "clip")],
    *[f"stages.{stage}.validate_every=10" for stage in ("tokenizer", "prior", "clip")],
    "training.precision=fp32",
    "training.trackers=[]",
]
_DVAE = """parts.tokenizer={kind: dvae, image_size: 32, num_codes: 32, width: 8, init_width: 8, num_groups: 2,
    blocks_per_group: 1, branch_gain: 1.0}"""

# kind of the part -> (stage, arguments of the trainer): a new stage is trusted only with an entry here.
_TINY = {
    "dvae": ("tokenizer", [_DVAE, "stages.tokenizer.objective.autoencoder=0.25"]),
    "patch_dvae": ("tokenizer", []),
    "dalle": ("prior", []),
    "clip": ("clip", []),
}


@pytest.fixture(scope="session")
def tiny():
    """{kind of the part: (stage, the trainer's arguments for 20 steps of 8 samples of it)}."""
    shared = ["shapes/dalle", *_CAPTIONS, *_TOKENIZER, *_PRIOR, *_CLIP, *_SHORT]
    return {
        kind: (stage, [*shared, f"stages.{stage}.optimizer.muon=0.02", *own, "--stage", stage])
        for kind, (stage, own) in _TINY.items()
    }


@pytest.fixture(scope="session")
def trained_tokenizer(tiny, tmp_path_factory):
    """A run folder with captions and a tiny tokenizer, which later stages are trained against."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert trainer.main([*tiny["patch_dvae"][1], "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Runs jobs (see job_worker) in so many processes of one life; returns {name: [facts of each rank]}."""

    def run(jobs, processes):
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.jsonl").write_text("\n".join(json.dumps(job) for job in jobs))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        worker = [*(launcher if processes > 1 else []), str(WORKER), str(folder / "jobs.jsonl"), str(folder)]
        done = subprocess.run([sys.executable, *worker], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        sys.stderr.write(done.stderr)  # shown where a test fails
        ranks = range(processes)
        return {
            job["name"]: [json.loads((folder / f"{job['name']}-{rank}.json").read_text()) for rank in ranks]
            for job in jobs
        }

    return run
