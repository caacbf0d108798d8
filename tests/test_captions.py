"""The caption tokenizer: round trips, padding, truncation, and its one file."""

import warnings

import pytest
import torch

from kartina.tokenizers.captions import PAD, CaptionTokenizer

CAPTIONS = [
    "a red circle above a blue square",
    "a small green triangle left of a red square",
    "красный круг над синим квадратом",
    "маленький зелёный треугольник",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=400, context_length=64)


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle",
        "Красный КРУГ, ёж и йод",
        "кот 🐈 и семья 👨‍👩‍👧‍👦!",
        "日本語 tab\tand  two spaces ",
        "a <pad> b",
        "",
        "\x00",
    ],
)
def test_round_trip_lower_cases_and_composes(tokenizer, caption):
    tokens, lengths = tokenizer.encode([caption])
    assert tokenizer.decode(tokens) == [caption.lower()]
    assert (tokens[0, : lengths[0]] != PAD).all() and (tokens[0, lengths[0] :] == PAD).all()


def test_composed_and_decomposed_text_are_the_same_tokens(tokenizer):
    tokens, _ = tokenizer.encode(["й", "и\u0306"])
    assert torch.equal(tokens[0], tokens[1])


def test_shapes_and_lengths(tokenizer):
    tokens, lengths = tokenizer.encode(["a red circle above a blue square", "a", ""])
    assert tokens.shape == (3, 64) and tokens.dtype == torch.int64
    assert lengths.tolist()[1:] == [1, 0] and lengths.dtype == torch.int64
    assert tokens.max() < tokenizer.vocab_size <= 400
    assert lengths[0] < 12  # merges were learnt: the caption has 32 bytes


def test_truncation_is_counted_and_warned_of_once():
    tokenizer = CaptionTokenizer.train(CAPTIONS, vocab_size=257, context_length=4)
    with pytest.warns(UserWarning, match="cut"):
        tokens, lengths = tokenizer.encode(["abcdefgh", "abc", "zzzzz"])
    assert tokenizer.num_truncated == 2 and lengths.tolist() == [4, 3, 4]
    assert tokenizer.decode(tokens) == ["abcd", "abc", "zzzz"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["abcdefgh"])
    assert tokenizer.num_truncated == 3


def test_save_and_load_in_one_file(tokenizer, tmp_path):
    path = tmp_path / "captions.json"
    tokenizer.save(path)
    loaded = CaptionTokenizer.load(path)
    captions = [*CAPTIONS[:4], "a <pad> 🐈"]
    assert torch.equal(loaded.encode(captions)[0], tokenizer.encode(captions)[0])
    assert (loaded.context_length, loaded.vocab_size) == (64, tokenizer.vocab_size)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_training_is_deterministic(tokenizer, tmp_path):
    again = CaptionTokenizer.train(CAPTIONS, vocab_size=400, context_length=64)
    tokenizer.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_errors_say_what_was_expected(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="257"):
        CaptionTokenizer.train(CAPTIONS, vocab_size=100)
    with pytest.raises(ValueError, match="sequence"):
        tokenizer.encode("one caption")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="format"):
        CaptionTokenizer.load(tmp_path / "x.json")
