"""Captions to tokens and back: byte-level BPE on lower-cased text (Sennrich 2015, arXiv:1508.07909; lower-cased with
16,384 tokens in Ramesh 2021, arXiv:2102.12092). Bytes are the alphabet, so no caption has an unknown symbol.

B captions, T tokens of context.

It does not know what reads the tokens, nor the special ids (start, one padding token for each place) of a prior.
"""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

PAD = 0
_PAD_TOKEN = "<pad>"
_FORMAT = "kartina-captions-1"


class CaptionTokenizer:
    """Byte-level BPE with a fixed context. Make one with `train` or `load`.

    `context_length`: T. `vocab_size`: the number of ids, 0 (padding) included; below the size asked for when the
    captions hold fewer pairs. `num_truncated`: how many captions `encode` has cut so far.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        if context_length < 1:
            raise ValueError(f"CaptionTokenizer needs a context_length of at least 1, got {context_length}")
        if tokenizer.token_to_id(_PAD_TOKEN) != PAD:
            raise ValueError(f"CaptionTokenizer needs id {PAD} to be {_PAD_TOKEN!r}; train the vocabulary with `train`")
        # A caption that spells the padding token is text like any other.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.num_truncated = 0

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

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> (tokens int64 (B, T) padded on the right with 0, lengths int64 (B,), 0 to T).

        A caption of more than T tokens keeps its first T; the first time this happens there is one warning, and
        `num_truncated` counts them all. Raises ValueError for a single string in place of a sequence.
        """
        if isinstance(captions, str):
            raise ValueError("CaptionTokenizer.encode needs a sequence of captions, got one string; pass [caption]")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]
        self._count_truncated(sum(len(row) > self.context_length for row in rows))
        tokens = torch.full((len(rows), self.context_length), PAD, dtype=torch.int64)
        lengths = torch.tensor([min(len(row), self.context_length) for row in rows], dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : lengths[i]] = torch.tensor(row[: self.context_length], dtype=torch.int64)
        return tokens, lengths

    def _count_truncated(self, count: int) -> None:
        if count and not self.num_truncated:
            warnings.warn(
                f"captions longer than {self.context_length} tokens are cut; num_truncated counts them "
                "(this warning comes once)",
                stacklevel=3,
            )
        self.num_truncated += count

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens int64 (B, T) -> B captions, lower-cased and NFC; padding is left out."""
        if tokens.dim() != 2:
            raise ValueError(f"CaptionTokenizer.decode needs tokens of shape (B, T), got {tuple(tokens.shape)}")
        rows = [[token for token in row if token != PAD] for row in tokens.tolist()]
        return self._tokenizer.decode_batch(rows, skip_special_tokens=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write vocabulary, merges and context length as one JSON file."""
        content = {
            "format": _FORMAT,
            "context_length": self.context_length,
            "tokenizer": json.loads(self._tokenizer.to_str()),
        }
        whole = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")  # renamed when it is complete
        whole.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(whole, path)

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
