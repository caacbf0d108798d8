"""The ruler of reconstructions: SSIM, KID, and one table of several tokenizers."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from kartina.cli import app
from kartina.pipeline import checkpoint
from kartina.pipeline.images import to_pil, to_uint8
from kartina.pipeline.recipe import build, parse
from kartina.training import corruptions
from kartina.training.data.shapes import ShapesSource
from kartina.training.evaluation import reconstruction
from kartina.training.evaluation.shapes_checker import check
from kartina.training.shards import ShardWriter
from kartina.training.sources import held_out
from kartina.training.stream import ShardSource

KL = "parts: {tokenizer: {kind: autoencoder_kl, image_size: SIDE, width: 4, channel_mult: [1, 2], norm_groups: 2}}\n"


class Means(nn.Module):
    """In the ruler's place: the mean colours of 16 squares."""

    def pooled(self, image):
        assert image.shape[1:] == (3, 128, 128) and image.abs().max() <= 1
        return F.avg_pool2d(image, 32).flatten(1)


@pytest.fixture(autouse=True)
def small_ruler(monkeypatch):
    """So that no package is needed."""
    monkeypatch.setattr(reconstruction, "ruler", Means)
    monkeypatch.setattr(reconstruction, "SUBSETS", 4)


@pytest.fixture
def kl(tmp_path):
    """The folder of an AutoencoderKL with random weights, of images of a side, by what its training section says."""

    def save(side=32, data="{kind: shapes, jitter: 0.0}"):
        training = f"training: {{data: {data}, stages: {{}}}}\n"
        recipe = parse(
            f"name: tests/kl\npaper: none\nimage_size: {side}\n" + KL.replace("SIDE", str(side)) + training, "kl"
        )
        torch.manual_seed(1)
        folder = tmp_path / f"kl-{side}-{len(data)}"
        checkpoint.save_part(folder, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
        return str(folder)

    return save


def pictures(count=3, side=32, seed=0):
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.manual_seed(seed))


# --- SSIM -------------------------------------------------------------------------------------------------------------


def test_ssim_is_equation_13():
    true = to_uint8(ShapesSource(32).read(range(3)).image)
    again = (true.int() + pictures() % 40 - 20).clamp(0, 255).to(torch.uint8)
    found = reconstruction.ssim(true, again)
    for b in range(3):
        values = []
        for colour in range(3):
            x, y = true[b, :, :, colour].double().numpy(), again[b, :, :, colour].double().numpy()

            def local(z):
                return ndimage.gaussian_filter(z, 1.5, truncate=10 / 3)[5:-5, 5:-5]  # 11 wide, wholly inside

            mx, my = local(x), local(y)
            vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
        assert abs(found[b] - np.mean(values)) <= 1e-10
    assert (reconstruction.ssim(true, true) - 1).abs().max() <= 1e-12 and found.max() < 0.99


def test_ssim_of_flat_pictures_compares_their_lightness():
    first, second = (
        torch.full((1, 11, 11, 3), 100, dtype=torch.uint8),
        torch.full((1, 11, 11, 3), 50, dtype=torch.uint8),
    )
    wanted = (2 * 100 * 50 + 2.55**2) / (100**2 + 50**2 + 2.55**2)
    assert abs(float(reconstruction.ssim(first, second)) - wanted) <= 1e-9
    with pytest.raises(ValueError, match="at least 11 pixels a side"):
        reconstruction.ssim(first[:, :10], second[:, :10])


# --- KID --------------------------------------------------------------------------------------------------------------


def test_squared_mmd_is_equation_4():
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, dtype=torch.float64, generator=draws) for n in (4, 5))

    def mean(pairs):
        values = [(float(a @ b) / 3 + 1) ** 3 for a, b in pairs]
        return sum(values) / len(values)

    within = [mean(itertools.permutations(z, 2)) for z in (x, y)]
    wanted = within[0] + within[1] - 2 * mean(itertools.product(x, y))
    assert abs(reconstruction.squared_mmd(x, y) - wanted) <= 1e-10
    with pytest.raises(ValueError, match="at least 2"):
        reconstruction.squared_mmd(x[:1], y)


def test_kid_is_unbiased_for_equal_pictures_and_grows_with_their_difference():
    draws = torch.Generator().manual_seed(0)
    true = torch.randn(400, 8, generator=draws)
    same, far = reconstruction.kid(true, true), reconstruction.kid(true, true + 0.5)
    assert abs(same[0]) < 0.1 < far[0] and same[1] > 0
    estimates = []
    for _ in range(300):  # of small samples: their mean is 0, where a biased estimate has about 0.5
        x, y = (torch.randn(8, 8, dtype=torch.float64, generator=draws) for _ in range(2))
        estimates.append(reconstruction.squared_mmd(x, y))
    error = np.std(estimates) / 300**0.5
    assert abs(np.mean(estimates)) < 4 * error and error < 0.05


# --- the table --------------------------------------------------------------------------------------------------------


def test_one_row_for_each_tokenizer(trained_tokenizer, kl):
    models = [str(trained_tokenizer / "model"), kl()]
    result = reconstruction.evaluate(models, count=16)
    first, second = result["tokenizers"]
    assert result["n"] == 16 and result["features"] == "efficientnet-lite0"
    assert first["vocabulary"] == 32 and first["trained_on"] == 160 and 0 < first["usage"] <= 1
    assert "usage" not in second and second["latent"] == [4, 16, 16] and second["trained_on"] is None
    tests = [ShapesSource(32, 0, split=test, jitter=0.0) for test in ("S1", "S2a", "S2b", "S2c")]
    image = torch.cat([test.read(range(4)).image for test in tests])
    facts = [fact for test in tests for fact in test.facts(range(4))]
    recipe = checkpoint.load_recipe(trained_tokenizer / "model")
    tokenizer = checkpoint.load_part(trained_tokenizer / "model", recipe, "tokenizer")
    codes = tokenizer.encode(image)
    true, again = to_uint8(image), to_uint8(tokenizer.decode(codes))
    error = (true.double() - again.double()).square().mean()
    assert abs(first["psnr"] - float(10 * torch.log10(255**2 / error))) <= 1e-9
    assert first["facts"]["accepted"] == sum(not failures for failures in check(again.numpy(), facts))
    assert abs(first["usage"] - len(codes.unique()) / 32) <= 1e-7
    large = [F.interpolate(p.movedim(3, 1) / 127.5 - 1, size=(128, 128), mode="bilinear") for p in (true, again)]
    wanted = reconstruction.kid(*map(Means().pooled, large))
    assert wanted[0] > 1e-3 and (first["kid"], first["kid_deviation"]) == pytest.approx(wanted, rel=1e-4)


def test_shards_of_pictures_need_no_facts(kl, tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for picture in to_pil(ShapesSource(32).read(range(6)).image):
            file = io.BytesIO()
            picture.save(file, "PNG")
            writer.write({"png": file.getvalue(), "txt": b"a picture"})
    model = kl(data="{kind: shards, shards: elsewhere}")
    row = reconstruction.evaluate([model], data=tmp_path / "shards")["tokenizers"][0]
    assert "facts" not in row and row["psnr"] > 0
    with pytest.raises(ValueError, match="--data FOLDER"):
        reconstruction.evaluate([model])


def test_of_shards_that_training_read_only_what_it_held_out_is_judged(kl, tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for k, picture in enumerate(to_pil(ShapesSource(32).read(range(24)).image)):
            file = io.BytesIO()
            picture.save(file, "PNG")
            writer.write({"png": file.getvalue(), "txt": b"a picture"}, name=str(k))

    def trained(share):
        model = kl(data=f"{{kind: shards, shards: elsewhere, validation_share: {share}}}")
        path, part = Path(model) / "card.json", {"part": "train", "share": share} if share else {}
        card = json.loads(path.read_text())
        source = ShardSource(tmp_path / "shards", 32, 0, **part)
        card["parts"]["tokenizer"]["identity"] = {"data": source.fingerprint, "steps": 1, "global_batch": 1}
        path.write_text(json.dumps(card))
        return model

    half, all_of_it = trained(0.5), trained(0)
    recipes = [checkpoint.load_recipe(Path(model)) for model in (half, all_of_it, kl(data="{kind: shapes}"))]
    known = [checkpoint.read_card(Path(m))["parts"]["tokenizer"]["identity"]["data"] for m in (half, all_of_it)]
    assert [held_out(recipe, {known[0]}, tmp_path / "shards")[0] for recipe in recipes] == [True, False, False]
    assert held_out(recipes[1], {known[1]}, tmp_path / "shards") == (True, None)
    held = ShardSource(tmp_path / "shards", 32, 0, part="validation", share=0.5)
    found = reconstruction.evaluate([half], data=tmp_path / "shards")
    assert 4 < found["n"] == held.size < 20 and found["pictures"].endswith("held out of training")
    with pytest.raises(ValueError, match="trained on the pictures of"):
        reconstruction.evaluate([all_of_it], data=tmp_path / "shards")
    with pytest.raises(ValueError, match="different parts"):
        reconstruction.evaluate([half, trained(0.25)], data=tmp_path / "shards")


def test_digits_are_those_that_training_held_out(kl):
    held = "{kind: digits, validation_share: 0.01}"
    found = reconstruction.evaluate([kl(data=held), kl(data=held + " ")])
    assert found["pictures"] == "digits that are held out" and 20 < found["n"] < 100
    assert "facts" not in found["tokenizers"][0] and found["tokenizers"][0]["psnr"] > 0
    with pytest.raises(ValueError, match=r"validation_share \[0.01, 0.02\]"):
        reconstruction.evaluate([kl(data=held), kl(data="{kind: digits}")])
    with pytest.raises(ValueError, match="some of .'digits', 'shapes'."):
        reconstruction.evaluate([kl(), kl(data="{kind: digits,  jitter: 0.0}")])


def test_corrupted_pictures_are_judged_by_the_pictures_themselves(kl, monkeypatch):
    """A tokenizer that gives back what it sees is as good as what it was given."""
    monkeypatch.setattr(reconstruction._Tokenizer, "reconstruct", lambda self, image: to_uint8(image))
    spoiling = "salt_and_pepper", 0.2
    found = reconstruction.evaluate([kl()], count=16, corruption=spoiling)
    tests = [ShapesSource(32, 0, split=test, jitter=0.0).read(range(4)).image for test in ("S1", "S2a", "S2b", "S2c")]
    image = torch.cat(tests)
    spoiled = corruptions.corrupt(image, *spoiling, 0, 0, torch.arange(16)).clamp(-1, 1)
    error = (to_uint8(image).double() - to_uint8(spoiled).double()).square().mean()
    assert abs(found["seen"] - float(10 * torch.log10(255**2 / error))) <= 1e-9
    assert found["tokenizers"][0]["psnr"] == found["seen"] < 20
    assert found["corruption"] == {"kind": "salt_and_pepper", "level": 0.2}
    for wrong, message in ((("blur", 0.2), "one of"), (("mask", 1.2), "at most 1"), (("mask", 0.0), "above 0")):
        with pytest.raises(ValueError, match=message):
            reconstruction.evaluate([kl()], corruption=wrong)


def test_one_table_holds_the_same_pictures(kl):
    with pytest.raises(ValueError, match=r"sizes \[32, 64\] px"):
        reconstruction.evaluate([kl(), kl(side=64)])
    with pytest.raises(ValueError, match=r"jitters \[0.0, 0.02\]"):
        reconstruction.evaluate([kl(), kl(data="{kind: shapes, jitter: 0.02}")])
    with pytest.raises(ValueError, match="at least 4 pictures"):
        reconstruction.evaluate([kl()], count=3)


def test_the_command_prints_the_table(trained_tokenizer, kl):
    words = ["reconstruct", str(trained_tokenizer / "model"), kl(), "--count=8", "--device=cpu"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "16x8 of 32" in shown.output and "4x16x16" in shown.output, shown.output
    spoiled = CliRunner().invoke(app, [*words, "--corruption=gaussian", "--corruption-level=1.5"])
    assert "through gaussian of 1.5, which leaves" in spoiled.output and "through" not in shown.output, spoiled.output
    with pytest.raises(ValueError, match="is of --corruption, which is missing"):
        CliRunner().invoke(app, [*words, "--corruption-level=0.1"], catch_exceptions=False)
    rows = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["tokenizers"]
    assert [row["latent"] for row in rows] == [[16, 8], [4, 16, 16]]
