"""Best of N: score pictures by their caption with CLIP, keep the best (Ramesh 2021, arXiv:2102.12092, section 2.6).

B pictures, P captions, N candidates per caption.

It does not know how the pictures were made. The CLIP that ranks must not be the one that reports quality.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


class _Towers(Protocol):
    def encode_image(self, image: Tensor) -> Tensor: ...
    def encode_text(self, text: Tensor) -> Tensor: ...


@torch.no_grad()
def clip_scores(clip: _Towers, images: Tensor, text: Tensor) -> Tensor:
    """The cosine of each picture and its caption.

    images (B, 3, H, W) in [-1, 1] of the CLIP's own size; text (B, T) int64 as the CLIP was trained on it, that is as
    `CLIP.frame` gives it. -> (B,) float32 in [-1, 1]. Raises ValueError if the counts differ.
    """
    if len(images) != len(text):
        raise ValueError(
            f"clip_scores needs one caption per picture, got {len(images)} pictures and {len(text)} captions"
        )
    return F.cosine_similarity(clip.encode_image(images).float(), clip.encode_text(text).float(), dim=-1)


def rank(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` highest scores of each row, best first; of equal scores the lower place comes first.

    scores (P, N) -> (P, keep) int64. Raises ValueError if keep is not in [1, N] or a score is NaN.
    """
    if scores.ndim != 2 or not 1 <= keep <= scores.shape[1]:
        raise ValueError(f"rank needs scores (P, N) and 1 <= keep <= N, got {tuple(scores.shape)} and keep={keep}")
    if scores.isnan().any():
        raise ValueError(
            "rank needs numbers, got NaN among the scores; look at the pictures and the CLIP that scored them"
        )
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep]


class OpenCLIPScorer:
    """Scores with any open_clip checkpoint; open_clip is imported only here, when the first scorer is built.

    name_or_path is one of: an architecture that open_clip knows ("ViT-B-32"), with `pretrained` a published tag or a
    local weights file; a repository on the hub ("org/name" or "hf-hub:org/name"); a local folder that holds
    open_clip_config.json and weights. Weight files are read as tensors only, never unpickled into code.

    Raises ImportError if open_clip is missing and ValueError if the name or the weights cannot be resolved.
    """

    def __init__(self, name_or_path: str | Path, pretrained: str | Path | None = None, device: str = "cpu") -> None:
        name = _resolve(name_or_path, pretrained)
        open_clip = _open_clip()
        tag = None if pretrained is None else str(pretrained)
        try:
            _refuse_code(name)
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                name, tag, device=device, weights_only=True
            )
            self.tokenize = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, torch and the hub client raise a dozen kinds
            raise ValueError(
                f"open_clip could not load {str(name_or_path)!r} with pretrained={tag!r}: {error}; name "
                "an architecture and its pretrained tag or weights file, a hub repository, or a folder with its config"
            ) from error
        self.model.eval()
        self.device = device

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], captions: Sequence[str], batch_size: int = 32) -> Tensor:
        """B pictures of any size and B captions -> cosines (B,) float32 on the CPU. ValueError if the counts differ."""
        if len(images) != len(captions):
            raise ValueError(f"score needs one caption per picture, got {len(images)} and {len(captions)}")
        scores = [torch.empty(0)]
        for start in range(0, len(images), batch_size):
            pictures = [self.preprocess(image.convert("RGB")) for image in images[start : start + batch_size]]
            text = self.tokenize(list(captions[start : start + batch_size]))
            scores.append(clip_scores(self.model, torch.stack(pictures).to(self.device), text.to(self.device)).cpu())
        return torch.cat(scores)


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "OpenCLIPScorer needs the package open_clip, which is not installed; run `pip install open_clip_torch`, "
            "or rank with the model folder's own CLIP"
        ) from error
    return open_clip


_WHOLE = ("hf-hub:", "local-dir:")  # an architecture and its weights

_TOKENIZER_KWARGS = {"clean", "strip_sep_token"}  # what open_clip's own configurations set


def _refuse_code(name: str) -> None:
    """Raises ValueError where a folder's or repository's config hands its tokenizer more than open_clip's own do.

    transformers would take `trust_remote_code` among them, and run what lies there.
    """
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        config = json.loads((Path(place) / "open_clip_config.json").read_text(encoding="utf-8"))
    elif kind == "hf-hub":
        from open_clip.factory import _get_hf_config

        config = _get_hf_config(place)
    else:
        return
    given = set(config.get("model_cfg", {}).get("text_cfg", {}).get("tokenizer_kwargs", {}))
    if not given <= _TOKENIZER_KWARGS:
        raise ValueError(
            f"tokenizer_kwargs may hold {sorted(_TOKENIZER_KWARGS)}, got {sorted(given)}: it could run foreign code"
        )


def _resolve(name_or_path: str | Path, pretrained: str | Path | None) -> str:
    """The name as open_clip spells it, with the prefix for a folder or the hub."""
    name = _spelled(str(name_or_path), pretrained)
    if pretrained is not None and name.startswith(_WHOLE):  # open_clip would say so in a log, and go on
        raise ValueError(
            f"{name} has weights of its own, {str(pretrained)!r} would not be read; leave pretrained out, or name the "
            "architecture, as ViT-B-32"
        )
    return name


def _spelled(name: str, pretrained: str | Path | None) -> str:
    path = Path(name)
    if name.startswith(_WHOLE):
        return name
    if path.is_dir() and (pretrained is None or "/" in name):
        if not (path / "open_clip_config.json").is_file():
            raise ValueError(
                f"an open_clip folder must hold open_clip_config.json, {name!r} does not; name another folder"
            )
        return f"local-dir:{path}"
    if path.is_file():
        raise ValueError(
            f"{name!r} is a weights file, which does not say its architecture; pass the architecture as the name and "
            "the file as pretrained"
        )
    if path.is_absolute() or name.startswith("."):
        raise ValueError(f"there is no folder {name!r}; name an existing open_clip folder")
    return f"hf-hub:{name}" if "/" in name else name
