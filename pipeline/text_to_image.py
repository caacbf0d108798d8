"""Caption -> picture: the one sampling path that users, previews and evaluation run.

    captions -> text tokens -> sampler(prior) -> codes or latents -> tokenizer.decode -> CLIP rerank -> Paintings

Candidate k of a prompt has seed `seed + k` and the same noise at any batch size. The candidates of all prompts are
painted in micro-batches whose rows do not see each other; only the size of a batch decides how its matrix products
round. So a painting remembers that size and its row, and `repaint` gives the same bits on the same machine.

B pictures of a micro-batch, T text tokens, H x W picture.

It does not know how any part was trained.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..layers.packed import pack, unpack
from ..layers.precision import without_tf32
from ..tokenizers.captions import CaptionTokenizer
from . import checkpoint, compiler, editing, interpolation, stable_diffusion
from .built import check_whole
from .drawing import DRAWINGS, DiffusionDrawing
from .images import to_pil
from .known_models import find_model, model_hash
from .memory import Progress, attempt, batch_of, in_batches, slice_attention
from .recipe import Recipe, sampling_knobs
from .rerank import clip_scores, rank

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
MAX_MICRO_BATCH, _MAX_TILE = 4096, 4096


class Scorer(Protocol):
    """What ranks candidates; `kartina.pipeline.rerank.OpenCLIPScorer` is one."""

    def score(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """B pictures and their B captions -> B scores, higher is better."""


@dataclass(frozen=True)
class Painting:
    """A picture with all that is needed to paint it again. clip_score is None where nothing ranked it."""

    image: Image
    prompt: str
    seed: int
    clip_score: float | None
    facts: dict[str, Any]


class TextToImage:
    """A loaded text-to-image system. `load` builds it from a model folder; calling it paints."""

    def __init__(
        self,
        recipe: Recipe,
        parts: dict[str, Any],
        captions: CaptionTokenizer | None,
        model_hash: str,
        reranker: Scorer | None = None,
    ) -> None:
        self.recipe, self.parts, self.captions, self.model_hash = recipe, parts, captions, model_hash
        self.compiled = False
        self.draw = DRAWINGS[recipe.parts["prior"]["kind"]](recipe, parts, captions)
        self.decode: Callable[[Tensor], Tensor] = parts["tokenizer"].decode if "tokenizer" in parts else lambda z: z
        self.scorer = reranker
        if reranker is None and "clip" in parts:
            assert captions is not None
            self.scorer = _OwnCLIP(parts["clip"], captions)

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        reranker: Scorer | None = None,
    ) -> "TextToImage":
        """Loads a model folder, by shipped name or path, strictly; or Stable Diffusion, see `stable_diffusion.load`.

        device: None is `default_device`. dtype: None is float32. reranker: ranks in place of the folder's own CLIP,
        which is then not loaded. Raises ModelError for an unknown, untrained, altered or mismatched model: each part
        must have been trained against the very parts that lie beside it. On a CPU they are then for painting alone, one
        call at a time: see `layers.packed.pack`; on a GPU see `layers.precision.without_tf32`.
        """
        device, dtype = device or checkpoint.default_device(), dtype or torch.float32
        folder = find_model(str(name))
        without_tf32()
        if stable_diffusion.is_system(folder):
            whole = stable_diffusion.load(folder)
            parts, hashes = whole.build(device, dtype), checkpoint.hashes(whole.card, whole.recipe)
            digest = model_hash(whole.recipe, hashes, whole.captions)
            return cls(whole.recipe, parts, whole.captions, digest, reranker)._ready(folder)
        card, recipe = checkpoint.read_card(folder), checkpoint.load_recipe(folder)
        if "prior" not in recipe.parts:
            raise checkpoint.ModelError(f"{folder}: its recipe has no prior, so it paints nothing; name another model")
        hashes = check_whole(folder, card, recipe)
        needed = [str(part) for part in ("tokenizer", "text", "prior") if part in recipe.parts]
        needed += ["clip"] if "clip" in card["parts"] and reranker is None else []
        parts = {part: checkpoint.load_part(folder, recipe, part, device, dtype) for part in needed}
        captions = checkpoint.load_captions(folder, recipe)
        return cls(recipe, parts, captions, model_hash(recipe, hashes, captions), reranker)._ready(folder)

    def compile(self) -> "TextToImage":
        """Itself, with its diffusion prior through torch.compile, which is meant for GPUs, where few pictures wait for
        kernels to be launched.

        The first picture of each micro-batch's size then takes long, and all round otherwise. Raises ValueError for a
        prior over codes, whose shapes change with each code, and on a CPU where no C++ compiler is at hand.
        """
        if not isinstance(self.draw, DiffusionDrawing):
            raise ValueError(f"{self.recipe.name}: what is compiled is a diffusion prior, and its own draws codes")
        if problem := compiler.lacking(next(self.parts["prior"].parameters()).device.type):
            raise ValueError(f"{self.recipe.name}: {problem}")
        unpack(self.parts["prior"])
        self.parts["prior"].compile(mode="reduce-overhead", dynamic=False)
        self.compiled = True
        return self

    def _ready(self, folder: Path) -> "TextToImage":
        """Itself, packed. Raises ModelError where its parts are not of one system."""
        painted = self.recipe.image_size
        seen = self.parts["clip"].image_size if "clip" in self.parts else painted
        if seen != painted:
            raise checkpoint.ModelError(f"{folder}: the clip reads {seen} px, the recipe paints {painted}")
        if self.draw.problem:
            raise checkpoint.ModelError(f"{folder}: {self.draw.problem}")
        for part in {"tokenizer", "prior"} & set(self.parts):
            pack(self.parts[part])
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        candidates: int = 1,
        keep: int = 1,
        progress: Progress | None = None,
        micro_batch: int | None = None,
        **knobs: Any,
    ) -> list[Painting]:
        """Paints `candidates` pictures a prompt and returns the best `keep` of each, prompt by prompt, best first.

        seed: of candidate 0 of every prompt, or one for each prompt. progress: called with the sampling steps done and
        in all. micro_batch: pictures painted at once, 1 to 4096, taken from all prompts; halved, with a warning, where
        memory does not suffice, if torch is told so: see `memory.batch_of` for what is taken by default. knobs: those
        of the prior's kind in `kartina.pipeline.recipe.SAMPLING`, by default the recipe's `sampling`. Raises ValueError
        for an empty prompt, a number or knob out of range, candidates < keep, or candidates to choose from with no CLIP
        to rank them.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = _integers(seed, len(prompts))
        self._check(prompts, seeds, candidates, keep)
        micro_batch = self.at_once(micro_batch)
        knobs = sampling_knobs(self.recipe, knobs, "knobs of painting")
        rows = [(p, first + k, k) for p, first in zip(prompts, seeds, strict=True) for k in range(candidates)]

        def paint(some: slice, report: Progress | None) -> list[Painting]:
            return self._paint(rows[some], knobs, report)

        painted = in_batches(paint, len(rows), micro_batch, self.parts, progress)
        groups = [painted[start : start + candidates] for start in range(0, len(rows), candidates)]
        return [group[k] for group in groups for k in self._order(group, keep)]

    def edit(self, image: Image, prompts: str | Sequence[str], **how: Any) -> list[Painting]:
        """Paints over a picture, or over a part of it; see `kartina.pipeline.editing.edit`."""
        return editing.edit(self, image, prompts, **how)

    def interpolate(self, first: str, second: str, **how: Any) -> list[Image]:
        """Pictures on the way from one caption to another; see `kartina.pipeline.interpolation.interpolate`."""
        return interpolation.interpolate(self, first, second, **how)

    def at_once(self, micro_batch: int | None, most: int = MAX_MICRO_BATCH) -> int:
        """How many pictures are painted at once: as given, else what memory holds, `most` at most."""
        if micro_batch is None:
            return min(most, batch_of(self.parts["prior"], self.recipe.image_size))
        if not 1 <= micro_batch <= MAX_MICRO_BATCH:
            raise ValueError(f"micro_batch must lie between 1 and {MAX_MICRO_BATCH}, got {micro_batch}")
        return micro_batch

    def _check(self, prompts: list[str], seeds: list[int], candidates: int, keep: int) -> None:
        if not prompts or not all(_is_text(prompt) for prompt in prompts):
            raise ValueError(
                "a prompt is empty or not Unicode; expected a caption such as 'a small red ring on a blue background'"
            )
        if not 1 <= keep <= candidates:
            raise ValueError(f"keep must lie between 1 and candidates ({candidates}), got {keep}")
        if keep < candidates and self.scorer is None:
            how = "set keep equal to candidates, or --reranker ViT-B-32 --reranker-pretrained FILE, of open_clip"
            raise ValueError(f"{self.recipe.name} has no trained CLIP to rank candidates; {how}")
        if len(seeds) != len(prompts):
            raise ValueError(f"give one seed, or one for each of the {len(prompts)} prompts, got {len(seeds)}")
        if wrong := [s for s in seeds if not (_is_seed(s) and _is_seed(s + candidates - 1))]:
            raise ValueError(f"seeds are integers of 64 bits, got {wrong[0]} and so on; give smaller ones")

    @torch.inference_mode()
    def _paint(self, rows: list[tuple[str, int, int]], knobs: dict, progress: Progress | None) -> list[Painting]:
        """One micro-batch: a painting for each row (prompt, seed, candidate)."""
        prompts, seeds, _ = (list(column) for column in zip(*rows, strict=True))
        weight = next(self.parts["prior"].parameters())
        pictures = to_pil(self.decode(self.draw(prompts, seeds, knobs, progress)).float())  # from (B, 3, H, W)
        scores: list[float | None] = [None] * len(rows)
        if self.scorer is not None:
            scores = self.scorer.score(pictures, prompts).tolist()
        shared = {
            "model": self.recipe.name,
            "model_hash": self.model_hash,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "knobs": knobs,
            "micro_batch": len(rows),
            **({"compiled": True} if self.compiled else {}),
            **({"sliced": True} if getattr(self.parts["prior"], "sliced", False) else {}),
            **({"tile": tile} if (tile := getattr(self.parts.get("tokenizer"), "tile", None)) else {}),
        }
        return [
            Painting(picture, prompt, seed, score, {**shared, "row": row, "candidate": candidate})
            for row, (picture, score, (prompt, seed, candidate)) in enumerate(zip(pictures, scores, rows, strict=True))
        ]

    def _order(self, group: list[Painting], keep: int) -> list[int]:
        if self.scorer is None:
            return list(range(keep))
        return rank(torch.tensor([[painting.clip_score for painting in group]]), keep)[0].tolist()


class _OwnCLIP:
    """The folder's own CLIP as a scorer; it sees the finished 8-bit pictures, as any other scorer does."""

    def __init__(self, clip: Any, captions: CaptionTokenizer) -> None:
        self.clip, self.captions = clip, captions

    def score(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        weight = next(self.clip.parameters())
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)  # (B, 3, H, W)
        text = self.clip.frame(*self.captions.encode(captions)).to(weight.device)  # (B, T)
        return clip_scores(self.clip, (pixels.float() / 127.5 - 1).to(weight), text)


def repaint(system: TextToImage, facts: Any) -> Painting:
    """Paints a picture again from its `metadata`, in the same row of a micro-batch of the same size.

    On the machine, device, dtype and version of the first time it is the same bit for bit. The other rows are copies;
    where memory does not suffice for them, it is painted alone, with a warning. Raises ValueError for facts that are
    not one painting's (see `check_facts`), or those of another model.
    """
    wanted = check_facts(facts)
    if wanted["model_hash"] != system.model_hash:
        hashes = f"{wanted['model_hash'][:12]}..., not by {system.model_hash[:12]}..."
        raise ValueError(f"the picture was painted by the model {hashes}; load that one (`find_by_hash`)")
    if wanted["compiled"] and not system.compiled:
        system.compile()
    slice_attention(system.parts, wanted["sliced"])
    tokenizer = system.parts.get("tokenizer")
    if tokenizer is not None and hasattr(tokenizer, "tile"):
        tokenizer.tile = wanted["tile"]
    row = (wanted["prompt"], wanted["seed"], wanted["candidate"])
    knobs = sampling_knobs(system.recipe, wanted["knobs"], "knobs of painting")

    def paint(some: slice, report: Progress | None) -> list[Painting]:
        return system._paint([row] * some.stop, knobs, report)

    if (count := wanted["micro_batch"]) > 1:
        if (found := attempt(paint, slice(0, count), None, system.parts)) is not None:
            return found[wanted["row"]]
        warnings.warn(f"out of memory with the {count} pictures that were painted at once: painted alone", stacklevel=2)
    return in_batches(paint, 1, 1, system.parts, None)[0]


def check_facts(facts: Any) -> dict[str, Any]:
    """What `repaint` needs out of a painting's `metadata`, checked: a PNG is untrusted, so nothing in it is believed.

    -> prompt, seed, candidate, model_hash, device, dtype (a key of DTYPES), micro_batch, row, knobs (a table, which the
    model checks), tile (None where the picture was decoded whole), compiled (whether its prior was), sliced (whether
    its attention was). Raises ValueError for what is missing, of another type or out of range.
    """
    if not isinstance(facts, dict) or not _FACTS.keys() <= facts.keys():
        names = ", ".join(_FACTS)
        raise ValueError(
            f"not the facts of one painting, which has {names}; give a single painting's PNG, not a grid's"
        )
    if "edit" in facts:
        raise ValueError("an edited picture needs its source, not its facts alone; run `kartina edit` on that again")
    for name, (holds, expected) in _FACTS.items():
        if not holds(facts[name]):
            raise ValueError(f"a painting's {name} must be {expected}, got {facts[name]!r:.60}; the facts were altered")
    if facts["row"] >= facts["micro_batch"]:
        raise ValueError(f"a painting's row must lie below micro_batch {facts['micro_batch']}, got {facts['row']}")
    tile = facts.get("tile")
    if tile is not None and not (_is_integer(tile) and 1 <= tile <= _MAX_TILE):
        raise ValueError(
            f"a painting's tile must be a side from 1 to {_MAX_TILE}, got {tile!r:.60}; the facts were altered"
        )
    flags = {name: facts.get(name, False) for name in ("compiled", "sliced")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"a painting's {name} must be true or false, got {flag!r:.60}; the facts were altered")
    return {name: facts[name] for name in _FACTS} | {"tile": tile} | flags


def _integers(seed: Any, count: int) -> list[int]:
    """One for all, or one for each, of Python, numpy or torch."""
    try:
        return [index(seed)] * count
    except TypeError:
        return [index(each) for each in seed]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.encode(errors="ignore").decode() == value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_seed(value: Any) -> bool:
    return _is_integer(value) and -(2**63) <= value < 2**63


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_text, "a caption"),
    "seed": (_is_seed, "an integer of 64 bits"),
    "candidate": (lambda v: _is_seed(v) and v >= 0, "an integer, at least 0"),
    "model_hash": (_matches(r"[0-9a-f]{64}"), "a sha256"),
    "device": (_matches(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?"), "a device"),
    "dtype": (_matches("|".join(DTYPES)), f"one of {', '.join(DTYPES)}"),
    "micro_batch": (lambda v: _is_integer(v) and 1 <= v <= MAX_MICRO_BATCH, f"an integer from 1 to {MAX_MICRO_BATCH}"),
    "row": (lambda v: _is_integer(v) and 0 <= v < MAX_MICRO_BATCH, f"an integer from 0 to {MAX_MICRO_BATCH - 1}"),
    "knobs": (lambda v: isinstance(v, dict), "a table"),
}


def metadata(painting: Painting) -> dict[str, Any]:
    """What a PNG of the painting carries, enough to paint it again."""
    return {"prompt": painting.prompt, "seed": painting.seed, "clip_score": painting.clip_score, **painting.facts}
