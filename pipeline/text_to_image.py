"""Caption -> picture: the one sampling path that users, previews and evaluation run.

    caption -> text tokens -> sampler(prior) -> codes -> tokenizer.decode -> CLIP rerank -> Painting

Candidate k of a prompt has seed `seed + k` and the same noise at any batch size.

It does not know how any part was trained.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ..priors.samplers import sample_codes
from ..tokenizers.captions import CaptionTokenizer
from . import checkpoint
from .images import to_pil
from .recipe import Recipe, nearest
from .rerank import clip_scores, rank

SHIPPED = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Painting:
    """A picture with all that is needed to paint it again. clip_score is None where nothing ranked it."""

    image: Image
    prompt: str
    seed: int
    clip_score: float | None
    facts: dict[str, Any]


def known_models() -> dict[str, Path]:
    """Model folders by name: shipped ones, then those trained under ./runs."""
    shipped = {str(p.parent.relative_to(SHIPPED)): p.parent for p in sorted(SHIPPED.glob("*/*/card.json"))}
    runs = {str(p.parent): p.parent for p in sorted(Path("runs").glob("**/model/card.json"))}
    return shipped | runs


def find_model(name: str) -> Path:
    """A model folder by shipped name or path. Raises ModelError naming the nearest known model."""
    known = known_models()
    if name in known:
        return known[name]
    if Path(name).is_dir():
        return Path(name)
    hint = nearest(name, list(known)) if known else "no model is here yet: train one with `kartina train shapes/dalle`"
    raise checkpoint.ModelError(f"no model {name!r}; {hint}")


class TextToImage:
    """A loaded text-to-image system. `load` builds it from a model folder; calling it paints."""

    def __init__(self, recipe: Recipe, parts: dict[str, Any], captions: CaptionTokenizer, model_hash: str) -> None:
        self.recipe, self.parts, self.captions, self.model_hash = recipe, parts, captions, model_hash

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """Loads a model folder, by shipped name or path, strictly.

        Raises ModelError for an unknown, untrained, altered or mismatched model: each part must have been trained
        against the very parts that lie beside it.
        """
        folder = find_model(str(name))
        card, recipe = checkpoint.read_card(folder), checkpoint.load_recipe(folder)
        hashes = {part: entry["hash"] for part, entry in card["parts"].items()}
        hashes["captions"] = checkpoint.file_hash(folder / "captions.json")
        for part, entry in card["parts"].items():
            for other, digest in entry.get("trained_against", {}).items():
                if hashes.get(other) != digest:
                    raise checkpoint.ModelError(f"{folder}: {part} was trained against another {other}; train it again")
        needed = ["tokenizer", "prior"] + (["clip"] if "clip" in card["parts"] else [])
        parts = {part: checkpoint.load_part(folder, recipe, part, device, dtype) for part in needed}
        return cls(recipe, parts, CaptionTokenizer.load(folder / "captions.json"), model_hash(card))

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        candidates: int = 1,
        keep: int = 1,
        progress: Callable[[int, int], None] | None = None,
        **knobs: Any,
    ) -> list[Painting]:
        """Paints `candidates` pictures a prompt and returns the best `keep` of each, best first.

        knobs: temperature, top_k, top_p, guidance_scale (see `kartina.priors.samplers.sample_codes`). Raises ValueError
        for an empty prompt, candidates < keep, or several candidates with no CLIP to rank them.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty; expected a caption such as 'a small red ring on a blue background'")
        if not 1 <= keep <= candidates:
            raise ValueError(f"keep must lie between 1 and candidates ({candidates}), got {keep}")
        if keep < candidates and "clip" not in self.parts:
            raise ValueError(f"{self.recipe.name} has no trained CLIP to rank candidates; set keep equal to candidates")
        paintings = []
        for prompt in prompts:
            paintings += self._paint(prompt, seed, candidates, keep, progress, knobs)
        return paintings

    def _paint(self, prompt: str, seed: int, candidates: int, keep: int, progress: Any, knobs: dict) -> list[Painting]:
        seeds = [seed + k for k in range(candidates)]
        device = next(self.parts["prior"].parameters()).device
        text = self.captions.encode([prompt])[0].to(device).expand(candidates, -1)  # (N, T)
        codes = sample_codes(self.parts["prior"], text, seeds, progress=progress, **knobs)  # (N, h, w)
        images = self.parts["tokenizer"].decode(codes).float()  # (N, 3, H, W)
        scores: list[float | None] = [None] * candidates
        if "clip" in self.parts:
            clip = self.parts["clip"]
            tokens = clip.with_end(*self.captions.encode([prompt])).to(device).expand(candidates, -1)
            scores = list(clip_scores(clip, images.to(next(clip.parameters()).dtype), tokens).float().tolist())
        order = list(range(keep)) if None in scores else rank(torch.tensor([scores]), keep)[0].tolist()
        pictures = to_pil(images)
        facts = {"model": self.recipe.name, "model_hash": self.model_hash, "knobs": knobs, "micro_batch": candidates}
        return [Painting(pictures[k], prompt, seeds[k], scores[k], {**facts, "candidate": k}) for k in order]


def model_hash(card: dict[str, Any]) -> str:
    """One sha256 for a whole model: over the hashes of its parts."""
    hashes = {part: entry["hash"] for part, entry in card["parts"].items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def find_by_hash(wanted: str) -> Path:
    """The known model folder with this hash. Raises ModelError where there is none."""
    for folder in known_models().values():
        if model_hash(checkpoint.read_card(folder)) == wanted:
            return folder
    raise checkpoint.ModelError(f"no known model has the hash {wanted[:12]}...; `kartina models` lists the known ones")


def metadata(painting: Painting) -> dict[str, Any]:
    """What a PNG of the painting carries, enough to paint it again."""
    return {"prompt": painting.prompt, "seed": painting.seed, "clip_score": painting.clip_score, **painting.facts}
