"""The discrete VAE and its objective: likelihood, KL, relaxation, sizes, and equality with the published model."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import record_dvae as recorder

from kartina.pipeline.recipe import build
from kartina.tokenizers.dvae import DiscreteVAE, likeliest, map_pixels, openai_state_dict, relax, unmap_pixels
from kartina.tokenizers.spec import CodesSpec
from kartina.training.objectives import dvae as objective
from kartina.training.objectives.dvae import codebook_use, dvae, kl_weight, logit_laplace_nll, temperature, uniform_kl
from kartina.training.run import load

HERE = Path(__file__).parent
SMALL = {"image_size": 32, "num_codes": 32, "width": 16, "init_width": 16, "num_groups": 3, "blocks_per_group": 1}


def gumbel(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return (-torch.log(-torch.log(u))).float()


@pytest.fixture
def small() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(**SMALL)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.3)])
def test_logit_laplace_integrates_to_one(mu, log_b):
    n = 400_000
    x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).float().view(1, 1, 1, n).expand(1, 3, 1, n)
    parameters = torch.tensor([mu] * 3 + [log_b] * 3).view(1, 6, 1, 1).expand(1, 6, 1, n)
    density = torch.exp(-logit_laplace_nll(parameters, x).double())
    torch.testing.assert_close(density.mean(dim=-1), torch.ones(1, 3, 1, dtype=torch.float64), atol=2e-3, rtol=0)


def test_logit_laplace_reads_mu_then_log_b():
    parameters = torch.tensor([0.1, 0.2, 0.3, -0.5, 0.0, 0.5]).view(1, 6, 1, 1)
    x = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1)
    expected = [
        -math.log(math.exp(-abs(math.log(v / (1 - v)) - m) / b) / (2 * b * v * (1 - v)))
        for v, m, b in ((0.2, 0.1, math.exp(-0.5)), (0.5, 0.2, 1.0), (0.8, 0.3, math.exp(0.5)))
    ]
    torch.testing.assert_close(logit_laplace_nll(parameters, x).flatten(), torch.tensor(expected))


def test_kl_equals_the_sum_over_outcomes():
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 5, 3, 4, generator=generator) * 3).requires_grad_()
    again = logits.detach().double().requires_grad_()
    q = torch.softmax(again, dim=1)
    brute = sum(q[:, k] * torch.log(q[:, k] / (1 / 5)) for k in range(5))
    torch.testing.assert_close(uniform_kl(logits).double(), brute, atol=1e-5, rtol=1e-5)
    grad = torch.randn(2, 3, 4, generator=generator)
    uniform_kl(logits).backward(grad)
    brute.backward(grad.double())
    torch.testing.assert_close(logits.grad.double(), again.grad, atol=1e-6, rtol=1e-5)
    assert torch.allclose(uniform_kl(torch.zeros(1, 7, 2, 2)), torch.zeros(1, 2, 2), atol=1e-6)


def test_objective_weights_images_and_divides_by_the_values_of_an_image():
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    parameters = torch.randn(3, 6, 8, 8, generator=generator)
    logits = torch.randn(3, 11, 2, 2, generator=generator)
    weight = torch.tensor([1.0, 0.0, 2.0])
    (total, count), scalars = dvae(parameters, logits, image, 6.6, weight)
    nll = logit_laplace_nll(parameters, map_pixels(image)).sum(dim=(1, 2, 3))
    each = (nll + 6.6 * uniform_kl(logits).sum(dim=(1, 2))) / 192
    torch.testing.assert_close(total, each[0] + 2 * each[2])
    assert count == 3
    torch.testing.assert_close(scalars["nll"], (nll[0] + 2 * nll[2]) / 3 / 192)
    torch.testing.assert_close(scalars["kl"](), (uniform_kl(logits).mean(dim=(1, 2)) * weight).sum() / 3)


def test_codes_are_counted_by_the_weight_of_their_image():
    codes = torch.tensor([[[0, 1], [2, 3]], [[7, 7], [7, 7]]])
    logits = torch.nn.functional.one_hot(codes, 8).permute(0, 3, 1, 2).float()
    image, parameters = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
    _, scalars = dvae(parameters, logits, image, 0.0, torch.tensor([1.0, 0.0]))
    assert scalars["codes"]().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    used = codebook_use(scalars["codes"]())
    assert (used["perplexity"].item(), used["usage"].item()) == pytest.approx((4.0, 0.5))


def test_a_kl_without_weight_is_told_like_one_with_and_computed_when_asked(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    image, weight = torch.zeros(2, 3, 4, 4), torch.tensor([1.0, 3.0])
    parameters, logits = torch.zeros(2, 6, 4, 4), torch.randn(2, 7, 2, 2, generator=generator)
    asked = []
    monkeypatch.setattr(objective, "uniform_kl", lambda x: asked.append(1) or uniform_kl(x))
    (without, _), plain = dvae(parameters, logits.requires_grad_(), image, 0.0, weight)
    assert not asked and not without.requires_grad
    (with_kl, _), weighed = dvae(parameters, logits, image, 6.6, weight)
    assert len(asked) == 1 and with_kl.requires_grad
    assert torch.equal(plain["kl"](), weighed["kl"]()) and len(asked) == 2


def test_schedules():
    assert (temperature(0), temperature(150_000), temperature(10**7)) == (1.0, 1 / 16, 1 / 16)
    assert (kl_weight(0), kl_weight(5000), kl_weight(3_000_000)) == (0.0, 6.6, 6.6)
    assert kl_weight(2500) == pytest.approx(3.3)
    assert kl_weight(1250, shape="linear") == pytest.approx(1.65)
    assert kl_weight(1250) == pytest.approx(6.6 * (1 - math.cos(math.pi / 4)) / 2)
    with pytest.raises(ValueError, match="cosine"):
        temperature(0, shape="step")


def test_gumbel_max_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    n = 100_000
    noise = gumbel((n, 5, 1, 1), seed=3)
    drawn = relax(logits.view(1, 5, 1, 1).expand(n, 5, 1, 1), noise, 1.0).argmax(dim=1).flatten()
    expected = torch.softmax(logits, dim=0) * n
    chi_square = ((torch.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.47  # the 0.999 quantile at 4 degrees of freedom


def test_low_temperature_is_one_hot_at_the_noisy_argmax():
    logits, noise = torch.randn(2, 9, 4, 4, generator=torch.Generator().manual_seed(4)), gumbel((2, 9, 4, 4), 5)
    soft = relax(logits, noise, 1e-4)
    assert torch.equal(soft.argmax(dim=1), (logits + noise).argmax(dim=1))
    assert soft.amax(dim=1).min() > 0.999
    assert relax(logits.bfloat16(), noise, 1.0).dtype == torch.float32


def test_relaxed_weights_and_their_gradient_are_those_of_the_formula():
    logits, noise = torch.randn(2, 9, 4, 3, generator=torch.Generator().manual_seed(4)), gumbel((2, 9, 4, 3), 5)
    target, found = torch.randn(2, 9, 4, 3, generator=torch.Generator().manual_seed(6)), []
    for way in (relax, lambda x, noise, temperature: ((x + noise) / temperature).softmax(dim=1)):
        x = logits.clone().requires_grad_()
        soft = way(x, noise, 0.7)
        (soft * target).sum().backward()
        found.append((soft.detach(), x.grad))
    for ours, formula in zip(*found, strict=True):
        torch.testing.assert_close(ours, formula)


def test_shapes_and_spec(small):
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = small.encode(image)
    assert small.spec == CodesSpec("codes", (8, 8), 32)
    assert codes.shape == (2, 8, 8) and codes.dtype == torch.int64
    assert small.decode(codes).shape == (2, 3, 32, 32)
    out = small(image, gumbel((2, 32, 8, 8), 6), 1.0)
    assert out["parameters"].shape == (2, 6, 32, 32) and out["logits"].shape == (2, 32, 8, 8)
    torch.testing.assert_close(unmap_pixels(map_pixels(image)), image)
    assert map_pixels(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


def test_code_lookup_equals_the_one_hot_pass(small):
    torch.nn.init.normal_(small.decoder.stem.bias)
    codes = torch.randint(32, (2, 8, 8), generator=torch.Generator().manual_seed(7))
    one_hot = torch.nn.functional.one_hot(codes, 32).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(small.decode(codes), small.image(small.decoder(one_hot)), atol=1e-5, rtol=1e-5)


def test_errors_say_what_was_expected(small):
    with pytest.raises(ValueError, match="multiple of"):
        DiscreteVAE(**{**SMALL, "image_size": 30})
    with pytest.raises(ValueError, match="gumbel_noise"):
        small(torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 4, 4), 1.0)
    with pytest.raises(ValueError, match="unknown"):
        openai_state_dict({"blocks.middle.w": torch.zeros(1, 1, 1, 1)}, {})


def test_published_size():
    with torch.device("meta"):
        model = DiscreteVAE()
    assert model.spec == CodesSpec("codes", (32, 32), 8192)
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766


def test_codes_stay_in_float32_under_autocast_and_shapes_can_be_probed_on_meta(small):
    image, noise = torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = small(image, noise, 1.0)
    assert (out["logits"].dtype, out["parameters"].dtype) == (torch.float32, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float64):
        half = copy.deepcopy(small).to(dtype)
        codes = half.encode(image)
        soft = torch.nn.functional.one_hot(codes, 32).movedim(3, 1).to(dtype)
        assert half.decoder(soft).dtype == half.decoder.from_codes(codes).dtype == dtype
    probe = small.to("meta")(image.to("meta"), noise.to("meta"), 1.0)
    assert probe["parameters"].shape == (1, 6, 32, 32)


def test_overfits_a_few_flat_images(small):
    torch.manual_seed(8)
    image = (torch.rand(4, 3, 1, 1) * 1.6 - 0.8).expand(4, 3, 32, 32).contiguous()
    optimizer = torch.optim.Adam(small.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        out = small(image, gumbel((4, 32, 8, 8), 100 + step), temperature(step, steps=50))
        (total, count), _ = dvae(out["parameters"], out["logits"], image, kl_weight(step, end=0.1), torch.ones(4))
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    error = (small.decode(small.encode(image)) - image).abs().mean()
    assert error < 0.2 < image.std(dim=0).mean()


@pytest.mark.parametrize("count", [1024, 8192, 1000, 512])
def test_the_likeliest_code_is_the_first_of_the_largest_logits(count):
    draw = torch.Generator().manual_seed(0)
    for logits in (
        torch.randn(2, count, 5, 3, generator=draw),
        torch.randint(0, 4, (2, count, 5, 3), generator=draw).float(),  # many are equal
        torch.randint(0, 9, (2, 5, 3, count), generator=draw).permute(0, 3, 1, 2).bfloat16(),
        torch.full((1, count, 2, 2), -torch.inf),
    ):
        assert torch.equal(likeliest(logits), logits.argmax(dim=1))
    logits[0, 700 % count, 1, 0] = torch.nan
    assert torch.equal(likeliest(logits), logits.argmax(dim=1))


def published_sized() -> DiscreteVAE:
    return DiscreteVAE(image_size=32, num_codes=64, width=8, init_width=8)


def check_against(model: DiscreteVAE, close, logits, parameters, codes, decoded) -> None:
    image, soft = (given.to(logits.dtype) for given in recorder.inputs(recorder.SEED))
    with torch.no_grad():
        ours = image * 2 - 1
        close(model.logits(ours), logits)
        close(model.decoder(soft), parameters)
        assert torch.equal(model.encode(ours), codes)
        close((model.decode(codes).clamp(-1, 1) + 1) / 2, decoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_recorded_published_model(close, dtype):
    with np.load(HERE / "data" / "parity" / "dvae.npz") as file:
        data = dict(file)
    seed = int(data["seed"])
    halves = []
    for half, offset in (("encoder", 0), ("decoder", 7)):
        shapes = [tuple(map(int, s.split(","))) for s in data[f"{half}_shapes"].tolist()]
        halves.append(recorder.weights(data[f"{half}_names"].tolist(), shapes, seed + offset))
    model = published_sized()
    model.load_state_dict(openai_state_dict(*halves))
    model = model.to(dtype)
    logits, parameters, decoded = (torch.from_numpy(data[n]).to(dtype) for n in ("logits", "parameters", "decoded"))
    check_against(model, close, logits, parameters, torch.from_numpy(data["codes"]), decoded)
    image, soft = (given.to(dtype) for given in recorder.inputs(recorder.SEED))
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    for half, given in (("encoder", map_pixels(image * 2 - 1)), ("decoder", soft)):
        inner, own = recorder.gradients(getattr(model, half), given)
        expected = torch.from_numpy(data[f"{half}_input_gradient"]).to(dtype)
        torch.testing.assert_close(inner, expected, atol=bound * max(1, float(expected.abs().max())), rtol=0)
        names = data[f"{half}_names"].tolist()
        blank = {name: torch.empty((1,) * (4 if name.endswith(".w") else 1)) for name in names}
        ours = openai_state_dict(*(blank if half == one else {} for one in ("encoder", "decoder")))
        assert len(ours) == len(own)
        for name, sums in zip(ours, data[f"{half}_gradients"], strict=True):
            gradient = own[name.removeprefix(f"{half}.")]
            scale = bound * max(1, sums[4]) * gradient.numel() ** 0.5  # of a sum of so many, each off by no more
            np.testing.assert_allclose(recorder.digest(gradient), sums, rtol=0, atol=scale, err_msg=name)


@pytest.mark.slow
@torch.no_grad()
def test_equals_the_recorded_published_model_at_its_own_size():
    """In float32, a picture of 64 pixels there and back, to 1e-4."""
    with np.load(HERE / "data" / "parity" / "dvae.npz") as file:
        data, seed = {name: file[name] for name in file.files if name.startswith("whole")}, int(file["seed"])
    halves = []
    for half, offset in (("encoder", 0), ("decoder", 7)):
        shapes = [tuple(map(int, s.split(","))) for s in data[f"whole_{half}_shapes"].tolist()]
        halves.append(recorder.weights(data[f"whole_{half}_names"].tolist(), shapes, seed + offset))
    model = build(load("paper/openai-dvae", ["parts.tokenizer.image_size=64"])[0], "tokenizer")
    model.load_state_dict(openai_state_dict(*halves))
    codes, image = torch.from_numpy(data["whole_codes"]), recorder.picture(seed) * 2 - 1
    logits, soft = model.logits(image), torch.nn.functional.one_hot(codes, 8192).permute(0, 3, 1, 2).float()
    for ours, theirs in ((logits.flatten()[::97], "logits"), (model.decoder(soft), "parameters")):
        expected = torch.from_numpy(data[f"whole_{theirs}"])
        assert ours.shape == expected.shape and (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (model.encode(image) == codes).float().mean() > 0.98  # of random weights two logits may all but tie


def test_equals_the_installed_published_model(close):
    package = pytest.importorskip("dall_e")
    encoder, decoder = recorder.published()
    model = published_sized()
    model.load_state_dict(openai_state_dict(encoder.state_dict(), decoder.state_dict()))
    image, soft = recorder.inputs(recorder.SEED)
    with torch.no_grad():
        logits = encoder(package.map_pixels(image))
        codes = logits.argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(codes, 64).permute(0, 3, 1, 2).float()
        decoded = package.unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
        check_against(model, close, logits, decoder(soft), codes, decoded)
