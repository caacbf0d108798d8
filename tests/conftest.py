"""Tiny recipes of every stage, and processes in which many trainings run one after the other."""

import gc
import json
import shutil
import sys

import allocator
import job_worker
import pytest
import tiny_pipelines
import torch
from accelerate.state import AcceleratorState
from two_ranks import TwoRanks

from kartina.training import __main__ as trainer
from kartina.training import features, footprint, passes
from kartina.training import run as runs
from kartina.training.stages import contract

PLANNED = 4  # samples

_CAPTIONS = ["captions.vocab_size=300", "captions.context_length=22"]
_TOKENIZER = ["parts.tokenizer.width=8", "parts.tokenizer.num_codes=32"]
_PRIOR = [
    *[f"parts.prior.{key}" for key in ("num_codes=32", "text_vocab=300", "text_length=22", "width=32", "depth=2")],
    *["parts.prior.attention=full", "parts.prior.num_heads=2", "parts.prior.shift=[]"],
]
_CLIP = [
    *[f"parts.clip.{key}" for key in ("text_vocab=302", "text_length=24", "embed_dim=16", "vision_width=32")],
    *[f"parts.clip.{key}" for key in ("vision_depth=1", "vision_heads=2", "text_width=32", "text_depth=1")],
    "parts.clip.text_heads=2",
]
_SHORT = [
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "prior", "clip") for key in ("steps=20", "global_batch=8")],
    *[f"stages.{stage}.log_every=1" for stage in ("tokenizer", "prior", "clip")],
    *[f"stages.{stage}.validate_every=10" for stage in ("tokenizer", "prior", "clip")],
    # A chunk and a half of job_worker's: each of two ranks has one to measure.
    *[f"stages.{stage}.validate_samples=12" for stage in ("tokenizer", "prior", "clip")],
    "training.precision=fp32",
    "training.trackers=[]",
]
_DVAE = """parts.tokenizer={kind: dvae, image_size: 32, num_codes: 32, width: 8, init_width: 8, num_groups: 2,
    blocks_per_group: 1, branch_gain: 1.0}"""

_CONVOLUTIONS = "image_size: 32, width: 4, channel_mult: [1, 1, 2], blocks_per_level: 1, norm_groups: 2"
_DISCRIMINATOR = [
    "parts.discriminator={kind: patch, width: 8, depth: 1, norm: group, norm_groups: 4}",
    "stages.tokenizer.optimizers={discriminator: {lr: 0.0001}}",
]
_LISTENS = "discriminator_start: 0.1, discriminator_warmup: 0.1, discriminator_ramp: 0.3"
_VAE = f"kind: vae, {_CONVOLUTIONS}, latent_dim: 16, latent_channels: 4"
_VQVAE = "kind: vqvae, image_size: 32, num_codes: 32, code_dim: 4, width: 8, residual_width: 8, depth: 1"
_VQGAN = f"kind: vqgan, {_CONVOLUTIONS}, num_codes: 32, code_dim: 4, latent_channels: 8, attn_resolutions: []"


# Rounding grows by what Newton-Schulz and Adam make of gradients near 0: at full rates, beyond the tests' tolerance.
_GENTLE_RATES = [f"stages.tokenizer.optimizer.{key}" for key in ("muon=0.002", "lr=0.0005")]
_GENTLE = [*_GENTLE_RATES, "stages.tokenizer.validate_every=20"]


_GENTLE_PRIOR = [key.replace("tokenizer", "prior") for key in _GENTLE]


def _tokenizer(part, objective, *more):
    own = [f"parts.tokenizer={{{part}}}", f"stages.tokenizer.objective={{{objective}}}"]
    return "tokenizer", [*own, *_GENTLE, *more]


_UNET = """parts={prior: {kind: unet, in_channels: 3, out_channels: 6, width: 8, channel_mult: [1, 1, 2],
    blocks_per_level: 1, attn_levels: [2], num_heads: 2, context_dim: null, dropout: 0.1, norm_groups: 4}}"""
_CAPTIONED = """parts={prior: {kind: unet, in_channels: 3, out_channels: 6, width: 8, channel_mult: [1, 1, 2],
    blocks_per_level: 1, attn_levels: [2], num_heads: 2, context_dim: 16, dropout: 0.1, norm_groups: 4},
    text: {kind: clip_text, text_vocab: 302, text_length: 24, width: 16, depth: 1, num_heads: 2}}"""
_DENOISED = [
    "diffusion={schedule: cosine, num_timesteps: 50, prediction: v, zero_terminal: true}",
    *["sampling={num_steps: 2}", "stages.prior.objective={}", *_GENTLE_PRIOR],
]

# kind of the part, and what is special of it -> (stage, arguments of the trainer): a new stage is trusted only with an
# entry here.
_TINY = {
    "autoencoder": _tokenizer(
        f"kind: autoencoder, {_CONVOLUTIONS}, activation: sigmoid",
        "error: l1, corruption: mask, corruption_level: 0.3, sparsity: kl, sparsity_weight: 0.01, rho: 0.2",
    ),
    "autoencoder, adversarial": _tokenizer(
        f"kind: autoencoder, {_CONVOLUTIONS}, latent_dim: 2",
        f"prior: mixture, discriminator_weight: 0.1, {_LISTENS}",
        "parts.discriminator={kind: latent, latent_dim: 2, num_classes: 10, width: 16}",
        "training.data={kind: digits}",
        _DISCRIMINATOR[1],
    ),
    "vae": _tokenizer(_VAE, "likelihood: logistic, beta_share: 0.5"),
    "vae, free bits": _tokenizer(_VAE, "likelihood: logistic, beta_share: 0.5, free_bits: 0.02"),
    "vqvae": _tokenizer(_VQVAE, "data_variance: 0.3"),
    "vqvae, moved": _tokenizer(f"{_VQVAE}, ema_decay: 0.9, cosine: true", "kmeans: 0.25, restart_every: 5"),
    "vqgan": _tokenizer(_VQGAN, f"kmeans: 0, restart_every: 4, {_LISTENS}", *_DISCRIMINATOR),
    "vq_latents": _tokenizer(_VQGAN.replace("vqgan", "vq_latents"), "discriminator_weight: 0", *_DISCRIMINATOR),
    "vqgan, gumbel": _tokenizer(
        f"{_VQGAN}, quantizer: gumbel", "temperature_end: 0.1, discriminator_weight: 0", *_DISCRIMINATOR
    ),
    "autoencoder_kl": _tokenizer(
        f"kind: autoencoder_kl, {_CONVOLUTIONS}",
        f"{_LISTENS}, equivariance: 0.3",
        "parts.discriminator={kind: patch, width: 8, depth: 1, norm: batch}",
        _DISCRIMINATOR[1],
        "stages.tokenizer.optimizer.muon=0.0005",
    ),
    "autoencoder_kl, alone": _tokenizer(
        f"kind: autoencoder_kl, {_CONVOLUTIONS}", "equivariance: 0.3", "stages.tokenizer.optimizer.muon=0.0005"
    ),
    "dvae": (
        "tokenizer",
        [_DVAE, *(f"stages.tokenizer.objective.{knob}" for knob in ("autoencoder=0.25", "evenness=0")), *_GENTLE_RATES],
    ),
    "patch_dvae": ("tokenizer", []),
    "dalle": ("prior", []),
    "unet": ("prior", [_UNET, *_DENOISED]),
    "unet, captioned": ("prior", [_CAPTIONED, *_DENOISED]),
    "clip": ("clip", []),
}


def pytest_generate_tests(metafunc):
    """Tests of `tiny_kind` are made for every entry of the table, where they name none themselves."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "tiny_kind" in metafunc.fixturenames and "tiny_kind" not in named:
        metafunc.parametrize("tiny_kind", list(_TINY))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """One worker runs a file from end to end, for its fixtures are made once; of the table each has its half."""
    for item in items:
        kind = item.callspec.params.get("tiny_kind") if hasattr(item, "callspec") else None
        half = "" if kind is None else list(_TINY).index(kind) % 2
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}{half}"))


def pytest_collection_finish(session):
    # pytest 9.2 passes by the names that xdist 3.8 gives to groups: every worker would make every fixture.
    grouped = all("@test_" in item.nodeid for item in session.items)
    if getattr(session.config.option, "loadgroup", False) and not grouped:
        raise pytest.UsageError("groups of tests have no effect with this pytest; take that of constraints.txt")
    gc.freeze()  # what is imported stays: the trainer looks for garbage at the end of each stage


@pytest.fixture(autouse=True)
def same_draws():
    """What a test draws by torch without a seed of its own does not hang on those before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def any_precision():
    """What follows a test may train in another precision: of Accelerate's a process has one."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def few_images():
    """Codes begin with those of few images, and so do scales of latents, but where a test says `all_images`."""
    usual, contract.IMAGES = contract.IMAGES, 256
    yield usual
    contract.IMAGES = usual


@pytest.fixture
def all_images(few_images, monkeypatch):
    """As many as the commands take."""
    monkeypatch.setattr(contract, "IMAGES", few_images)


@pytest.fixture(scope="session")
def images():
    """A function (seed, batch) -> noise in the range of pixels, (batch, 3, 16, 16)."""

    def draw(seed=0, batch=2):
        return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    return draw


@pytest.fixture(scope="session")
def close():
    """A function (ours, theirs) that holds both to be equal: max |a - b| <= 1e-5 max(1, max |b|); 1e-10 in float64."""

    def check(ours, theirs):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        bound = 1e-10 if ours.dtype == torch.float64 else 1e-5 * max(1.0, theirs.abs().max().item())
        assert (ours - theirs).abs().max() <= bound

    return check


@pytest.fixture(scope="session")
def tiny():
    """{kind of the part, and what is special of it: (stage, the trainer's arguments for 20 steps of 8 samples)}."""
    shared = ["shapes/dalle", *_CAPTIONS, *_TOKENIZER, *_PRIOR, *_CLIP, *_SHORT]
    return {
        kind: (stage, [*shared, f"stages.{stage}.optimizer.muon=0.02", *own, "--stage", stage])
        for kind, (stage, own) in _TINY.items()
    }


@pytest.fixture(scope="session")
def trained_tokenizer(tiny, tmp_path_factory):
    """A run folder with captions and a tiny tokenizer, which later stages are trained against."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = tiny["patch_dvae"][1]
    assert trainer.main([*words, "--run", str(folder)]) == 0
    given = trainer._arguments(words)
    recipe, training = runs.load(given.recipe, given.overrides)
    trainer._prepare_captions(recipe, trainer.source_of(recipe, training.data), folder / "model")
    return folder


@pytest.fixture(scope="session")
def prepared(tiny, trained_tokenizer):
    """A function (folder, kind) -> that new run folder, with the captions and the tokenizer that the kind reads."""

    def make(folder, kind):
        stage, argv = tiny[kind]
        (folder / "model").mkdir(parents=True)
        if not any(word.startswith("training.data=") for word in argv):  # captions of the same data
            shutil.copy(trained_tokenizer / "captions.origin.json", folder)
            shutil.copy(trained_tokenizer / "model" / "captions.json", folder / "model")
        if stage != "tokenizer" and kind.partition(",")[0] != "unet":  # that one is tried on pixels
            shutil.copytree(trained_tokenizer / "model", folder / "model", dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Runs jobs (see job_worker), in this process or in two others; returns {name: [facts of each rank]}."""
    pair = []

    def run(jobs, processes):
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.jsonl").write_text("\n".join(json.dumps(job) for job in jobs))
        if processes == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ACCELERATE_USE_CPU", "1")
                job_worker.run_all(folder / "jobs.jsonl", folder)
        else:
            ranks = pair.pop() if pair else TwoRanks(tmp_path_factory.mktemp("ranks") / "errors")
            sys.stderr.write(ranks.run(folder / "jobs.jsonl", folder))  # shown where a test fails
            pair.append(ranks)
        return {
            job["name"]: [json.loads((folder / f"{job['name']}-{k}.json").read_text()) for k in range(processes)]
            for job in jobs
        }

    yield run
    for ranks in pair:
        ranks.end()


@pytest.fixture(scope="session")
def tiny_stable_diffusion():
    """A tiny pipeline of diffusers with random weights, by kind: "sd1" or "sd2"."""
    return tiny_pipelines.stable_diffusion


@pytest.fixture
def counted():
    def of(overrides, part: str, bf16: bool = False) -> dict[str, footprint.Footprint]:
        """What each update of a step takes, by what it trains."""
        recipe, training = runs.load("shapes/dalle", overrides)
        config = training.stages[part]
        with footprint.fake():
            return footprint.measure(footprint.prepare_fake(recipe, part, config, bf16=bf16), PLANNED, config.steps - 1)

    return of


@pytest.fixture
def real():
    def of(overrides, part: str, bf16: bool = False) -> passes.Setting:
        """What `counted` counts, to be computed; a perceptual network has the weights it begins with."""
        recipe, training = runs.load("shapes/dalle", overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "LOSSES", features._UNTRAINED)
            return passes.prepare(recipe, part, training.stages[part], bf16=bf16)

    return of


@pytest.fixture
def flops():
    def of(work) -> float:
        """By torch's formulas, which pass by attention and transposed convolutions."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profiler:
            work()
        products = {"aten::conv2d", "aten::mm", "aten::addmm", "aten::bmm"}
        return sum(event.flops for event in profiler.events() if event.name in products)

    return of


@pytest.fixture
def allocated(tmp_path):
    def by(work) -> tuple[list[int], object]:
        """The bytes alive after each allocation and release, and the result."""
        return allocator.alive_in(work, tmp_path / "trace.json")

    return by
