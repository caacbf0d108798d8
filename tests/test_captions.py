"""The caption tokenizer: round trips, padding, truncation, and its one file."""

import json
import warnings

import pytest
import torch
from tokenizers import Tokenizer

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


def test_each_caption_that_is_cut_is_counted_and_the_first_twenty_are_told_of():
    tokenizer = CaptionTokenizer.train(CAPTIONS, vocab_size=257, context_length=4)
    with pytest.warns(UserWarning, match="4 tokens are cut, here before 'efgh'; 'z'; num_truncated") as said:
        tokens, lengths = tokenizer.encode(["abcdefgh", "abc", "zzzzz"])
    assert said[0].filename == __file__
    assert tokenizer.num_truncated == 2 and lengths.tolist() == [4, 3, 4]
    assert tokenizer.decode(tokens) == ["abcd", "abc", "zzzz"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["abcdefgh"])
    with pytest.warns(UserWarning, match="'a'; 'ab'; 'abc'; .*; others are only counted") as said:
        tokenizer.encode(["aaaa" + "abcdefghijklmnopqrstuvwxy"[: k + 1] for k in range(25)])
    assert str(said[0].message).count(";") == 18 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["aaaa is new", "aaaa is new"])
    assert tokenizer.num_truncated == 30


def test_save_and_load_in_one_file(tokenizer, tmp_path):
    path = tmp_path / "captions.json"
    tokenizer.save(path)
    loaded = CaptionTokenizer.load(path)
    captions = [*CAPTIONS[:4], "a <pad> 🐈"]
    assert torch.equal(loaded.encode(captions)[0], tokenizer.encode(captions)[0])
    assert (loaded.context_length, loaded.vocab_size) == (64, tokenizer.vocab_size)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_dropout_splits_words_and_loses_nothing(tokenizer):
    captions = sorted(set(CAPTIONS))
    draws = torch.rand(len(captions), 64, generator=torch.Generator().manual_seed(0))
    whole, split, again = (tokenizer.encode_with_dropout(captions, rate, draws) for rate in (0.0, 0.3, 0.3))
    assert torch.equal(whole[0], tokenizer.encode(captions)[0]) and torch.equal(whole[1], tokenizer.encode(captions)[1])
    assert torch.equal(split[0], again[0]) and (split[1] > whole[1]).all()
    assert tokenizer.decode(split[0]) == tokenizer.decode(whole[0]) == captions
    other = tokenizer.encode_with_dropout(captions, 0.3, draws.roll(1, 1))[0]
    assert not torch.equal(split[0], other) and tokenizer.decode(other) == captions
    row = tokenizer.encode_with_dropout(captions[:1], 0.3, draws[:1])[0]
    assert torch.equal(row[0], split[0][0])  # a caption's tokens do not depend on what it stands beside


def test_dropout_leaves_a_caption_whole_that_would_be_cut(tokenizer):
    short = CaptionTokenizer(tokenizer._tokenizer, 9)
    captions = ["a red circle above a blue square", "a red circle"]  # of 7 words and of 3
    draws = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, lengths = short.encode_with_dropout(captions, 0.9, draws)
    assert lengths.tolist() == short.encode(captions)[1].tolist() and short.decode(tokens) == captions


def test_dropout_splits_as_often_as_that_of_tokenizers(tokenizer):
    """The number of pieces of a word, over 4,000 draws, against the library's own, which cannot be seeded."""
    word, count = " квадратом", 4000
    ours = torch.tensor([len(tokenizer._pieces(tokenizer._words(word)[0], 0.2, way)) for way in range(count)]).float()
    model = Tokenizer.from_str(json.dumps(tokenizer.definition()))
    model.model.dropout = 0.2
    theirs = torch.tensor([len(model.encode(word).ids) for _ in range(count)]).float()
    assert ours.std() > 0.5
    assert abs(ours.mean() - theirs.mean()) < 5 * (2 / count) ** 0.5 * theirs.std()
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.1)


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
    with pytest.raises(ValueError, match=r"rate in \[0, 1\).*got 1.0"):
        tokenizer.encode_with_dropout(["a"], 1.0, torch.rand(1, 64))
    with pytest.raises(ValueError, match=r"shape \(1, 64\), got list and \(1, 9\)"):
        tokenizer.encode_with_dropout(["a"], 0.1, torch.rand(1, 9))
    clip = CaptionTokenizer.clip({"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}, [])
    with pytest.raises(ValueError, match="that of CLIP"):
        clip.encode_with_dropout(["a"], 0.1, torch.rand(1, 75))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="format"):
        CaptionTokenizer.load(tmp_path / "x.json")
