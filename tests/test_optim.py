"""Optimizers: who gets Muon, and Muon on kernels."""

import pytest
import torch

from kartina.pipeline import recipe as recipes
from kartina.tokenizers.quantize import VectorQuantizer
from kartina.training import optim, state
from kartina.training.optim import EMA, Muon, build_optimizers, orthogonalise, outer_parameters, rate, shares, stacks
from kartina.training.run import Optimizer

# kind of the part -> the matrices, tables and kernels of it that are AdamW's, where Muon has the hidden ones
ADAMW = {
    "autoencoder": "encoder.conv_in encoder.conv_out decoder.conv_in decoder.conv_out flat.inward flat.outward",
    "vae": "encoder.conv_in encoder.conv_out decoder.conv_in decoder.conv_out flat.inward flat.outward",
    "autoencoder_kl": """encoder.conv_in encoder.conv_out decoder.conv_in decoder.conv_out quant_conv
        post_quant_conv""",
    "vqgan": """encoder.conv_in encoder.conv_out decoder.conv_in decoder.conv_out quant_conv post_quant_conv
        quantize.proj quantize.embed""",
    "vq_latents": """encoder.conv_in encoder.conv_out decoder.conv_in decoder.conv_out quant_conv post_quant_conv
        quantize.embedding""",
    "vqvae": "encoder.0 encoder.6 decoder.0 decoder.6 quantize.embedding",
    "dvae": "encoder.stem encoder.head decoder.stem decoder.head",
    "patch_dvae": "encoder.head decoder.patch_embedding decoder.stem decoder.head",
    "patch": "main.0 main.11",
    "latent": "main.0 main.4",
    "unet": "conv_in conv_out label_embedding embedding_in tokens_in",
    "caption_encoder": "token_embedding positions",
    "clip_text": "token_embedding positional_embedding",
    "dalle": """text_embedding text_position code_embedding code_position.rows code_position.columns text_head
        image_head""",
    "clip": """token_embedding positional_embedding text_projection visual.conv1 visual.positional_embedding
        visual.proj""",
}
SIZES = {
    "autoencoder": {"latent_dim": 8},
    "vqgan": {"quantizer": "gumbel"},
    "latent": {"latent_dim": 8},
    "unet": {"width": 32, "channel_mult": (1, 2), "attn_levels": (1,), "context_dim": 16, "num_classes": 10,
             "embedding_dim": 24, "embedding_tokens": 2},
    "dalle": {"text_vocab": 300, "text_length": 22, "num_codes": 32, "grid": (4, 4), "width": 32, "depth": 1,
              "num_heads": 2},
    "clip": {"embed_dim": 16, "image_size": 32, "patch_size": 4, "vision_width": 32, "vision_depth": 1,
             "vision_heads": 2, "text_vocab": 301, "text_length": 22, "text_width": 32, "text_depth": 1,
             "text_heads": 2},
}  # fmt: skip


def built(kind):
    part = next(part for part, kinds in recipes.PARTS.items() if kind in kinds)
    with torch.device("meta"):
        return recipes._constructor(part, kind)(**SIZES.get(kind, {}))


@pytest.mark.parametrize("kind", sorted(set().union(*recipes.PARTS.values()) - set(recipes.PRETRAINED)))
def test_what_meets_data_codes_or_text_is_adamws(kind):
    module = built(kind)
    shapes = {name: value.ndim for name, value in module.named_parameters()}
    found = {name.removesuffix(".weight") for name in outer_parameters(module) if shapes[name] >= 2}
    assert found == set(ADAMW[kind].split())
    adamw, muon = build_optimizers(module, Optimizer(lr=1e-3, muon=0.02))
    hidden = {id(value) for value in muon.param_groups[0]["params"]}
    assert {
        name.removesuffix(".weight") for name, v in module.named_parameters() if v.ndim >= 2 and id(v) not in hidden
    } == found
    assert sum(len(group["params"]) for group in adamw.param_groups) + len(hidden) == len(shapes)


@pytest.mark.parametrize("kind", ["dvae", "patch_dvae", "dalle", "clip"])
def test_the_split_of_the_shipped_kinds_is_the_one_they_were_trained_with(kind):
    """It was by what a name contains."""
    words = ("embedding", "position", "stem", "head", "conv1", "visual.proj", "text_projection")
    module = built(kind)
    before = {n for n, v in module.named_parameters() if v.ndim in (2, 4) and not any(word in n for word in words)}
    muon = {id(value) for value in build_optimizers(module, Optimizer(lr=1e-3, muon=0.02))[1].param_groups[0]["params"]}
    assert before == {name for name, value in module.named_parameters() if id(value) in muon}


def test_a_codebook_that_follows_its_latents_has_no_optimizer():
    module = recipes._constructor("tokenizer", "vqvae")(width=8, residual_width=8, ema_decay=0.9)
    trained = [v for one in build_optimizers(module, Optimizer(lr=1e-3)) for g in one.param_groups for v in g["params"]]
    assert not any(value is module.quantize.embedding.weight for value in trained)


class Outlined(torch.nn.ModuleDict):
    outer = ("stem", "head")


def test_muon_gets_hidden_matrices_and_kernels_only():
    module = Outlined(
        {
            "embedding": torch.nn.Embedding(5, 4),
            "stem": torch.nn.Conv2d(3, 4, 3),
            "conv": torch.nn.Conv2d(4, 4, 3),
            "mlp": torch.nn.Linear(4, 4),
            "head": torch.nn.Linear(4, 5),
        }
    )
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    adamw, muon = build_optimizers(module, Optimizer(lr=1e-9, muon=0.02))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in (adamw, muon):
        optimizer.step()
    moved = {n for n, value in module.named_parameters() if (value - before[n]).abs().max() > 1e-4}
    assert moved == {"conv.weight", "mlp.weight"}
    for optimizer in (adamw, muon):
        optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_sees_a_kernel_as_a_matrix(memory_format):
    """Three steps equal torch's Muon on the kernel flattened to (n_out, rest), wherever the kernel's numbers lie."""
    start, gradients = torch.randn(6, 4, 3, 3), [torch.randn(6, 4, 3, 3) for _ in range(3)]
    kernel = torch.nn.Parameter(start.clone().to(memory_format=memory_format))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    ours, theirs = Muon([kernel], lr=0.02, weight_decay=0.1), torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.clone(memory_format=memory_format), gradient.flatten(1).clone()
        ours.step()
        theirs.step()
    # torch's Newton-Schulz runs in bfloat16, ours where that is quick, and the order of columns rounds differently.
    assert (kernel.flatten(1) - matrix).abs().max() < 2e-3
    assert (kernel - start).abs().max() > 1e-2


def test_matrices_of_one_shape_make_stacks(monkeypatch):
    """In whatever order they come, and no larger than is allowed; a large matrix stands alone."""
    shapes = [(16, 24), (24, 16), (16, 24), (8, 9), (16, 24), (24, 16), (64, 64)]
    work = sum(max(shape) * min(shape) ** 2 for shape in shapes)
    monkeypatch.setattr(optim, "_STACK", 2.5 * 24 * 16**2 / work)
    assert optim.stacks(shapes) == [[0, 2], [4], [1, 5], [3], [6]]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 24), (2, 24, 16), (2, 16, 16), (2, 72, 80), (3, 40, 16), (2, 66, 140)])
def test_matrices_of_a_stack_go_as_they_go_alone(shape, bf16):
    """The updates are written as kernels, so that each must be contiguous."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for update, matrix in zip(orthogonalise(stack, bf16).unbind(), stack, strict=True):
        alone = orthogonalise(matrix, bf16)
        assert update.dtype == alone.dtype and update.is_contiguous()
        most = 0.03 if alone.dtype == torch.bfloat16 else 1e-4
        assert (update - alone).float().norm() < most * alone.float().norm()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8), (72, 80), (80, 72)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(8, 20), (128, 256), (4, 3000)])
def test_rounds_of_the_gram_matrix_are_those_of_the_matrix(shape):
    """Also of a matrix that has lost its rank, whose small eigenvalues are rounding."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[:, -1] = matrix[:, 0]
    matrix[-1] = matrix[0]
    x = matrix / matrix.norm()
    assert (optim.by_gram(x, 5) - optim.newton_schulz(x, 5)).abs().max() < 1e-4


def test_two_processes_share_stacks_and_find_what_one_finds(monkeypatch):
    """Both, to the bit. What the processes would send is put in by hand."""
    noise, shapes = torch.Generator().manual_seed(0), [(16, 24), (8, 9), (16, 24), (24, 16), (16, 24), (40, 40)]
    matrices = [torch.randn(shape, generator=noise) for shape in shapes]
    monkeypatch.setattr(optim, "_STACK", 0.5)
    assert [len(places) for places in stacks(shapes)] == [3, 1, 1, 1]
    alone = optim.orthogonalise_all(matrices)
    sent = {}

    def gather(found, own):
        sent[optim.distributed.get_rank()] = own.clone()
        if len(sent) == 2:
            found.copy_(torch.cat([sent[0], sent[1]]))

    monkeypatch.setattr(optim.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(optim.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(optim.distributed, "all_gather_into_tensor", gather)
    for rank in (0, 1, 0):  # the first time nothing has come from the other
        monkeypatch.setattr(optim.distributed, "get_rank", lambda rank=rank: rank)
        found = optim.orthogonalise_all(matrices)
        if len(sent) == 2:
            assert all(torch.equal(update, same) for update, same in zip(found, alone, strict=True))
    assert sent[0].any() and sent[1].any()


def test_processes_share_the_matrices_evenly():
    """However they are ordered; those left over when one is dear; and more processes than matrices."""
    stacks = [(1, 64, 64), (2, 64, 256), (1, 256, 64), (4, 64, 64), (1, 64, 576), (1, 64, 64)]
    owners = shares(stacks, 2)
    costs = [sum(n * a * b for (n, a, b), owner in zip(stacks, owners, strict=True) if owner == i) for i in (0, 1)]
    assert max(costs) <= 0.55 * sum(costs)
    assert shares([(1, 8, 8), (1, 90, 90), (1, 8, 8)], 2) == [1, 0, 1]
    assert shares([(3, 8, 8), (1, 8, 8), (1, 8, 8)], 2) == [0, 1, 1]
    assert sorted(shares([(1, 8, 8), (1, 8, 8)], 5)) == [0, 1] and shares([(1, 8, 8), (1, 9, 9)], 1) == [0, 0]


def test_warm_up_begins_anew_where_the_optimizers_do():
    config = Optimizer(lr=1.0, warmup=10, decay=0.0)
    assert [rate(step, 100, config, restart=50) for step in (50, 59, 60)] == pytest.approx([0.1, 1.0, 1.0])
    assert rate(20, 100, config, restart=50) == 0.0


def test_averages_are_lent_to_the_module_and_taken_back():
    module = torch.nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    average = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    live = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, average)
    assert torch.equal(module.weight, live)
    ema.copy_to_network()
    assert torch.equal(module.weight, average)


@pytest.mark.parametrize("decay", [0.99, None])
def test_a_code_that_begins_anew_does_so_in_the_average(decay):
    """It is not mixed with what it was; other codes are averaged as all else."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), VectorQuantizer(8, 4, ema_decay=decay))
    ema, codebook = EMA(module, 0.999), module[1].embedding.weight
    dead = torch.arange(8) == 3
    for _ in range(20):
        with torch.no_grad():
            codebook.add_(1)
        ema.update()
    module[1].restart(dead, torch.full((1, 4), -50.0))
    ema.leap()
    same = (ema.average["1.embedding.weight"] - codebook).abs().amax(1) < 0.2
    assert torch.equal(same, dead) and module[1].leapt is None
    if decay is not None:
        assert ema.average["1.ema_counts"][3] == module[1].ema_counts[3]
    with ema.applied():
        assert module[1](torch.full((1, 4, 1, 1), -50.0))["codes"].item() == 3


def test_a_run_goes_on_where_kernels_lie_otherwise_in_memory(tmp_path):
    """A CPU's fused AdamW reads moments as they lie: saved channels last, they would meet other weights."""

    def begin(layout):
        torch.manual_seed(0)
        kernel = torch.nn.Conv2d(4, 6, 3).to(memory_format=layout)
        optimizers = build_optimizers(kernel, Optimizer(lr=0.1, muon=0))
        return kernel, state.RunState({}, {"tokenizer": kernel}, {"tokenizer": optimizers}, EMA(kernel, 0.9))

    def step(kernel, run, seed):
        kernel.weight.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed)).to(
            memory_format=torch.channels_last if kernel.weight.stride(1) == 1 else torch.contiguous_format
        )
        kernel.bias.grad = torch.ones(6)
        for optimizer in run.optimizers["tokenizer"]:
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()

    kernel, run = begin(torch.channels_last)
    step(kernel, run, 0)
    path = state.save(tmp_path, run.collect())
    step(kernel, run, 1)
    other, resumed = begin(torch.contiguous_format)
    resumed.restore(path)
    step(other, resumed, 1)
    assert other.weight.stride() != kernel.weight.stride()
    assert (other.weight - kernel.weight).abs().max() < 1e-6
