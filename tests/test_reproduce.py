"""`kartina reproduce`: what it says of a picture that is the same, hardly another, and another."""

import numpy as np
import pytest
from PIL import Image
from test_drawing import LATENT, write_model
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline.images import read_metadata, read_picture, save_png


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("reproduce") / "model", LATENT)
    path = folder.parent / "a.png"
    done = CliRunner().invoke(cli.app, ["paint", "a red ring", "--model", str(folder), "--out", str(path)])
    assert done.exit_code == 0, done.output
    return folder, path


def inverted(pixels):
    return 255 - pixels


def one_level(pixels):
    pixels = pixels.copy()
    pixels[0, 0, 0] += 1 if pixels[0, 0, 0] < 255 else -1
    return pixels


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [(lambda pixels: pixels, "yes", 0), (one_level, "no, PSNR", 0), (inverted, "no, PSNR", 1)],
)
def test_it_says_whether_the_picture_is_the_same(painted, tmp_path, change, said, code):
    """Its own dissimilarity ends it: below 40 dB the two differ visibly."""
    folder, path = painted
    pixels = change(np.asarray(read_picture(path)))
    save_png(Image.fromarray(pixels), tmp_path / "b.png", read_metadata(path))
    words = ["reproduce", str(tmp_path / "b.png"), "--model", str(folder), "--out", str(tmp_path / "again.png")]
    done = CliRunner().invoke(cli.app, words)
    assert (done.exit_code, f"same pixels: {said}" in done.output) == (code, True), done.output
    assert np.array_equal(np.asarray(read_picture(tmp_path / "again.png")), np.asarray(read_picture(path)))
