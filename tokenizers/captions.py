"""Captions to tokens and back: byte-level BPE on lower-cased text (Sennrich 2015, arXiv:1508.07909; lower-cased with
16,384 tokens in Ramesh 2021, arXiv:2102.12092). Bytes are the alphabet, so no caption has an unknown symbol.

B captions, T tokens of context.

It does not know what reads the tokens, nor the special ids (start, one padding token for each place) of a prior.
"""

import functools
import itertools
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from ..layers.cuts import Cuts

PAD = 0
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_PAD_TOKEN = "<pad>"
_WORD_END = "</w>"
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of its release
)
_FORMAT = "kartina-captions-1"
_WAYS = 1024  # in which dropout may split a word, so that a way is found once and not for each caption
_KNOWN_WAYS = 2**18  # of all words


class CaptionTokenizer:
    """Byte-level BPE with a fixed context. Make one with `train`, `clip` or `load`.

    `context_length`: T. `vocab_size`: the number of ids, 0 (padding) included; below the size asked for when the
    captions hold fewer pairs. `padded`: whether 0 is padding; in CLIP's it is a word like others, and lengths tell.
    `num_truncated`: how many captions `encode` has cut so far.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        if context_length < 1:
            raise ValueError(f"CaptionTokenizer needs a context_length of at least 1, got {context_length}")
        self.padded = getattr(tokenizer.model, "end_of_word_suffix", None) != _WORD_END
        if self.padded and tokenizer.token_to_id(_PAD_TOKEN) != PAD:
            raise ValueError(f"CaptionTokenizer needs id {PAD} to be {_PAD_TOKEN!r}; train the vocabulary with `train`")
        # A caption that spells the padding token is text like any other; CLIP's reference takes such a word literally.
        tokenizer.encode_special_tokens = self.padded
        self._tokenizer = tokenizer
        self.context_length = context_length
        self._cuts = Cuts(context_length)
        self._known_ways: dict[tuple[str, float, int], list[int]] = {}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16384, context_length: int = 256) -> "CaptionTokenizer":
        """Learn merges from captions. vocab_size: at least 257 (256 bytes and padding). Raises ValueError below it."""
        if vocab_size < 257:
            raise ValueError(f"CaptionTokenizer needs a vocab_size of at least 257 (256 bytes + pad), got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD_TOKEN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer, context_length)

    @classmethod
    def clip(
        cls, vocab: dict[str, int], merges: Sequence[tuple[str, str]], context_length: int = 75, pad: str = CLIP_END
    ) -> "CaptionTokenizer":
        """CLIP's BPE (Radford 2021, arXiv:2103.00020, section 2.4), which gives the ids of transformers' CLIPTokenizer.

        vocab: ids by token, the last two the start and the end, which `CLIPText.frame` writes. context_length: T
        without these two. pad: a token that is taken literally wherever it stands, "!" for Stable Diffusion 2. Raises
        ValueError where the vocabulary is of another model.
        """
        if vocab.get(CLIP_START) != len(vocab) - 2 or vocab.get(CLIP_END) != len(vocab) - 1 or pad not in vocab:
            raise ValueError(
                f"a vocabulary of CLIP ends in {CLIP_START} and {CLIP_END} and holds the padding {pad!r:.40}, got "
                f"{len(vocab)} tokens with ids {[vocab.get(word) for word in (CLIP_START, CLIP_END, pad)]} of these"
            )
        suffixes = {"continuing_subword_prefix": "", "end_of_word_suffix": _WORD_END}
        tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token=CLIP_END, **suffixes))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_WORD_END, " ")])
        tokenizer.add_special_tokens([CLIP_START, CLIP_END, pad])
        return cls(tokenizer, context_length)

    @property
    def num_truncated(self) -> int:
        return self._cuts.count

    @property
    def vocab_size(self) -> int:
        """Of CLIP's, without the start and the end."""
        return self._tokenizer.get_vocab_size() - (0 if self.padded else 2)

    def definition(self) -> dict[str, Any]:
        """What tokenizer.json of Hugging Face's tokenizers holds."""
        return json.loads(self._tokenizer.to_str())

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> (tokens int64 (B, T) padded on the right with 0, lengths int64 (B,), 0 to T).

        A caption of more than T tokens keeps its first T; a warning says what was cut, of the first 20 such captions,
        and `num_truncated` counts them all. Raises ValueError for a single string in place of a sequence.
        """
        if isinstance(captions, str):
            raise ValueError("CaptionTokenizer.encode needs a sequence of captions, got one string; pass [caption]")
        found = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        rows = [encoding.ids for encoding in found]
        long = [i for i, row in enumerate(rows) if len(row) > self.context_length]
        if long:
            lost = {captions[i]: self._tokenizer.decode(rows[i][self.context_length :]) for i in long}
            self._cuts.add(lost, len(long))
        return self._padded(rows)

    def encode_with_dropout(self, captions: Sequence[str], rate: float, draws: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, but each merge that could come next is left out with probability `rate` (BPE-dropout, Provilkov
        2020, arXiv:1910.13267, algorithm 1): a word comes in one piece or in several, and a word that training does not
        hold is made of pieces that it does.

        draws: (B, T) in [0, 1), one for each word: which of the 1,024 ways that were drawn for that word, and equal
        draws give equal tokens. A caption that is longer than T in its pieces is read as `encode` reads it. Raises
        ValueError for a rate outside [0, 1), CLIP's vocabulary, or draws of another shape.
        """
        shape = (len(captions), self.context_length)
        if isinstance(captions, str) or draws.shape != shape:
            raise ValueError(
                f"CaptionTokenizer.encode_with_dropout needs a sequence of captions and draws of shape {shape}, got "
                f"{type(captions).__name__} and {tuple(draws.shape)}"
            )
        if not 0 <= rate < 1 or not self.padded:
            raise ValueError(
                "CaptionTokenizer.encode_with_dropout needs a rate in [0, 1) and a vocabulary of `train`, got "
                f"{rate} and {'one' if self.padded else 'that of CLIP'}"
            )
        rows: list[list[int]] = []
        for caption, own in zip(captions, (draws * _WAYS).long().tolist(), strict=True):
            words = self._words(caption)
            row = [token for word, way in zip(words, own, strict=False) for token in self._pieces(word, rate, way)]
            if max(len(words), len(row)) > self.context_length:
                tokens, lengths = self.encode([caption])
                row = tokens[0, : lengths[0]].tolist()
            rows.append(row)
        return self._padded(rows)

    def _words(self, caption: str) -> list[str]:
        """In the alphabet of bytes, each with the space before it."""
        text = self._tokenizer.normalizer.normalize_str(caption)
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def _pieces(self, word: str, rate: float, way: int) -> list[int]:
        """One of the ways in which dropout splits a word."""
        found = self._known_ways.get((word, rate, way))
        if found is None:
            ranks, ids = self._merges
            draw, pieces = random.Random(f"{rate} {way} {word}"), list(word)
            while True:
                pairs = enumerate(itertools.pairwise(pieces))
                left = [(ranks[pair], i) for i, pair in pairs if pair in ranks and draw.random() >= rate]
                if not left:
                    break
                _, i = min(left)
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            found = [ids[piece] for piece in pieces]
            if len(self._known_ways) == _KNOWN_WAYS:
                self._known_ways.clear()
            self._known_ways[word, rate, way] = found
        return found

    @functools.cached_property
    def _merges(self) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        """(the rank of each merge, the first to be made 0; the id of each token)."""
        model = self.definition()["model"]
        return {tuple(pair): rank for rank, pair in enumerate(model["merges"])}, model["vocab"]

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(rows), self.context_length), PAD, dtype=torch.int64)
        lengths = torch.tensor([min(len(row), self.context_length) for row in rows], dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : lengths[i]] = torch.tensor(row[: self.context_length], dtype=torch.int64)
        return tokens, lengths

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens int64 (B, T) -> B captions, lower-cased and NFC; padding is left out where a token means only that.

        Of a published vocabulary whose token 0 is a word, give rows without padding.
        """
        if tokens.dim() != 2:
            raise ValueError(f"CaptionTokenizer.decode needs tokens of shape (B, T), got {tuple(tokens.shape)}")
        rows = [[token for token in row if token != PAD or not self.padded] for row in tokens.tolist()]
        texts = self._tokenizer.decode_batch(rows, skip_special_tokens=True)
        return texts if self.padded else [text.removesuffix(" ") for text in texts]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write vocabulary, merges and context length as one JSON file."""
        content = {
            "format": _FORMAT,
            "context_length": self.context_length,
            "tokenizer": self.definition(),
        }
        Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CaptionTokenizer":
        """Read a file of `save`. Raises ValueError when the file is of another format."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content.get("format") if isinstance(content, dict) else None
        if found != _FORMAT:
            raise ValueError(
                f"{path}: expected a caption tokenizer of format {_FORMAT!r}, got {found!r}; write it with `save`"
            )
        return cls(Tokenizer.from_str(json.dumps(content["tokenizer"])), content["context_length"])
