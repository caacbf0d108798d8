"""The caption tokenizer of a text encoder in the files of transformers, in and out: vocab.json with merges.txt, or
tokenizer.json, beside a tokenizer_config.json.

CLIP's BPE is made again from its vocabulary and merges, whatever else a file says, so nothing of a file is run. What
`write` made of a tokenizer of ours comes back as it was.

It does not know the text encoder, but for the number of its ids.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..tokenizers.captions import CLIP_END, CLIP_START, CaptionTokenizer
from . import archive
from .unpickle import WeightsError


def read(folder: Path, context_length: int) -> tuple[CaptionTokenizer, int]:
    """A tokenizer folder of transformers -> the captions' tokenizer, and the id that fills a caption up.

    context_length: of captions, without start and end. Raises WeightsError where the folder holds neither form whole.
    """
    config, special = (archive.table(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    # As transformers reads the two; of Stable Diffusion 2 they differ, and its captions are filled with "!".
    settings = config if "added_tokens_decoder" in config else {**config, **special}
    given = settings.get("pad_token") or CLIP_END
    pad = str(given.get("content") if isinstance(given, dict) else given)
    try:
        if (folder / "tokenizer.json").is_file():
            whole = archive.table(folder / "tokenizer.json")
            model = whole["model"]
            if model.get("end_of_word_suffix") != "</w>":
                number = int(model["vocab"][pad])
                return _own(whole, context_length), number
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            vocab = {**model["vocab"], **{each["content"]: each["id"] for each in whole.get("added_tokens", [])}}
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = archive.table(folder / "vocab.json")
            lines = archive.text(folder / "merges.txt").splitlines()
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        else:
            raise WeightsError(
                f"{folder} needs tokenizer.json, or vocab.json and merges.txt; download the whole folder"
            )
        merges = [(first, second) for first, second in pairs]
        return CaptionTokenizer.clip(vocab, merges, context_length, pad), vocab[pad]
    except WeightsError:
        raise
    except Exception as error:  # the constructor of a damaged BPE raises anything
        raise WeightsError(f"{folder} holds no tokenizer of CLIP ({error!s:.200}); download it again") from None


def of_open_clip(context_length: int) -> CaptionTokenizer:
    """CLIP's vocabulary as it comes with open_clip, for a file of weights that has no tokenizer beside it."""
    from open_clip.tokenizer import SimpleTokenizer

    known = SimpleTokenizer()
    vocab = dict(known.encoder)
    start, end = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab |= {CLIP_START: vocab.pop(start), CLIP_END: vocab.pop(end)}
    return CaptionTokenizer.clip(vocab, sorted(known.bpe_ranks, key=known.bpe_ranks.__getitem__), context_length)


def write(folder: Path, captions: CaptionTokenizer, text_vocab: int, pad: int) -> str:
    """Writes the files of transformers; returns the class that reads them. text_vocab, pad: see `CLIPText`."""
    definition, length = captions.definition(), captions.context_length + 2
    folder.mkdir(parents=True)
    vocab: dict[str, int] = definition["model"]["vocab"]
    settings: dict[str, Any] = {"model_max_length": length, "bos_token": CLIP_START, "eos_token": CLIP_END}
    if not captions.padded:
        settings |= {"tokenizer_class": "CLIPTokenizer", "unk_token": CLIP_END}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["model"]["merges"]]
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    else:
        # A caption that spells the start or the end is text like any other, as for us.
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
        vocab |= {CLIP_START: text_vocab - 2, CLIP_END: text_vocab - 1}
        definition["added_tokens"] += [_added(CLIP_START, text_vocab - 2), _added(CLIP_END, text_vocab - 1)]
        definition["post_processor"] = _framing(vocab)
        (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    settings["pad_token"] = next(word for word, number in vocab.items() if number == pad)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return str(settings["tokenizer_class"])


def _own(whole: dict[str, Any], context_length: int) -> CaptionTokenizer:
    """One that `write` made, without the start and the end that were added."""
    for word in (CLIP_START, CLIP_END):
        del whole["model"]["vocab"][word]
    whole["added_tokens"] = [each for each in whole["added_tokens"] if each["content"] not in (CLIP_START, CLIP_END)]
    whole |= {"post_processor": None, "truncation": None, "padding": None}
    return CaptionTokenizer(Tokenizer.from_str(json.dumps(whole)), context_length)


def _added(word: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": word, **flags, "special": True}


def _framing(vocab: dict[str, int]) -> dict[str, Any]:
    """Hugging Face's post-processor that puts the start before a caption and the end behind it."""
    start, end = ({"SpecialToken": {"id": word, "type_id": 0}} for word in (CLIP_START, CLIP_END))
    special = {word: {"id": word, "ids": [vocab[word]], "tokens": [word]} for word in (CLIP_START, CLIP_END)}
    piece = [start, {"Sequence": {"id": "A", "type_id": 0}}, end]
    return {"type": "TemplateProcessing", "single": piece, "pair": piece, "special_tokens": special}
