"""The stage of CLIP.

B batch, D features, W wrong captions.
"""

import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn

from ...pipeline import checkpoint, shared
from ...pipeline.recipe import Recipe, build, defaults, is_frozen
from ...tokenizers.captions import CaptionTokenizer
from ..objectives import clip as clip_objective
from ..run import Stage
from ..stream import Batch, Source
from .contract import (
    ONE_WORDING,
    SPLIT_WORDS,
    Knob,
    Loss,
    TrainingStage,
    Updates,
    captions_of,
    falling_share,
    in_one_wording,
    read_captions,
)

_TOLD = 8  # of the captions that are true of a sample so many are known to the loss


class CLIPStage(TrainingStage):
    """Fits CLIP (arXiv:2103.00020); captions of equal meaning are no negatives, nor are others of a sample's own.

    With `contrast`, a step's samples come in groups of so many, of which all but the first are one fact away from it:
    pictures and captions are then hard negatives of each other, and none is encoded for that alone. With
    `wrong_captions`, each picture stands beside so many more captions that are one fact away from its own.

    In the first share `canonical` of its steps every caption is read in the one wording of its meaning, beside its
    first wrong caption only; from there to the share `canonical_end` fewer and fewer are. With "A above B" and "B below
    A" equally often from the start, neither the order of the words nor the relation alone tells where A is, and both
    towers stay blind to it for long; with one wording the order alone tells, and the other wording is an exception.

    With `bpe_dropout`, that share of merges is left out of the words it trains on, see
    `CaptionTokenizer.encode_with_dropout`, once the share `bpe_dropout_start` of the steps is done. From the start on
    it makes all words slower to learn; at the end it teaches what pieces mean, of which a new word is made.
    """

    part = "clip"
    metrics = ("accuracy",)
    higher_is_better = True
    fewest = None
    steady = True
    depends: tuple[str, ...] = ("captions",)
    knobs: ClassVar = {
        "wrong_captions": Knob(whole=True, grammar=True),
        **ONE_WORDING,
        "contrast": Knob(low=1, high=64, grammar=True),
        **SPLIT_WORDS,
    }

    def __init__(
        self, recipe: Recipe, config: Stage, source: Source, model: Path, seed: int, device: torch.device
    ) -> None:
        self.captions = CaptionTokenizer.load(model / "captions.json")
        self.hold(build(recipe, self.part))
        self.recipe, self.config, self.source, self.seed = recipe, config, source, seed
        checkpoint.check_captions(model, recipe, self.part, self.network)
        self.gives_text = _gives_text(recipe, model)

    @staticmethod
    def coupled(recipe: Recipe, config: Stage) -> str:
        """Always."""
        return "its loss compares the captions of a step"

    @staticmethod
    def problem(recipe: Recipe, parts: dict[str, Any], config: Stage, model: Path) -> str:
        """A text encoder of other sizes than those of the text tower that it is to be."""
        if not _gives_text(recipe, model):
            return ""
        asked, clip = defaults("text", "clip_text") | recipe.parts["text"], recipe.parts["clip"]
        given = {name: clip[name] for name in ("text_vocab", "text_length")}
        given |= {"width": clip["text_width"], "depth": clip["text_depth"], "num_heads": clip["text_heads"]}
        given["quick_gelu"] = False
        wrong = ", ".join(f"{name}: {value}" for name, value in given.items() if asked[name] != value)
        return wrong and (
            "parts.text is frozen and not there, so it becomes the text tower of parts.clip; write "
            f"{wrong}, or have a text encoder in the model folder"
        )

    def exported(self) -> dict[str, nn.Module]:
        """Beside CLIP its text tower, where a prior reads one that is frozen and did not come from elsewhere."""
        if not self.gives_text:
            return super().exported()
        tower = build(self.recipe, "text")
        tower.load_state_dict(shared.text_tower(self.network.state_dict()))
        return {"text": tower, **super().exported()}

    def updates(self, batch: Batch, step: int) -> Updates:
        yield self.part, *self._loss(batch, step)

    def _loss(self, batch: Batch, step: int) -> Loss:
        clip_objective.clamp_logit_scale(self.network.logit_scale)
        image_features, text_features, scale, wrong = self._features(self.forward[self.part], batch, step)
        meanings = [[_number(meaning) for meaning in row] for row in self._meanings(batch)]
        groups = gather(torch.tensor(meanings, device=batch.image.device))
        rows = [image_features, text_features, *([] if wrong is None else wrong.unbind(1))]  # (B, D) each
        image_features, text_features, *others = _gather(torch.stack(rows, dim=1)).unbind(1)
        wrong, weight = torch.stack(others, dim=1) if others else None, gather(batch.weight)
        loss, scalars = clip_objective.clip(image_features, text_features, scale, groups, wrong, weight)
        return loss, {**scalars, "logit_scale": scale.detach()}

    def _features(
        self, towers: Callable[..., Any], batch: Batch, step: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features of images (B, D) and captions (B, D), the scale, features of wrong captions (B, W, D) or None.

        step: of training, in which captions may be read otherwise; None reads them as they are.
        """
        wanted = int(self.config.number("wrong_captions", 0))
        if step is None:  # as many as training shows, whichever way
            wanted = max(wanted, int(self.config.number("contrast", 1)) - 1)
        wanted = min(wanted, 1) if falling_share(self.config, "canonical", step) == 1 else wanted
        count, captions = len(batch.captions), [*captions_of(batch), *self._wrong(batch, wanted)]
        captions = in_one_wording(self.source, captions, self.config, self.seed, step, batch.samples)
        tokens, lengths = read_captions(self.captions, captions, self.config, self.seed, step, batch.samples)
        text = self.network.frame(tokens, lengths)
        if self.config.compile == "none":  # else of one shape
            text = text[:, : int(lengths.max()) + 2]  # what follows the end is not read
        image_features, text_features, scale = towers(batch.image, text.to(batch.image.device))
        own, wrong = text_features[:count], text_features[count:]
        return image_features, own, scale, wrong.view(count, -1, own.shape[1]) if len(wrong) else None

    def _meanings(self, batch: Batch) -> list[list[Hashable]]:
        """Of each sample what its caption means, then its others, of one length on all ranks: cut, or filled up."""
        told = batch.told or [()] * len(batch.captions)
        rows = [[own, *(each for each in all_ if each != own)] for own, all_ in zip(batch.captions, told, strict=True)]
        meant = [[self.source.meaning(caption) for caption in row[:_TOLD]] for row in rows]
        return [row + row[:1] * (_TOLD - len(row)) for row in meant]

    def _wrong(self, batch: Batch, wanted: int) -> list[str]:
        """As many minimal wrong captions of each sample as wanted, one sample after the other."""
        if not wanted:
            return []
        found = self.source.wrong(batch.captions, batch.samples.tolist())
        return [wrong[i % len(wrong)] for wrong in found for i in range(wanted)]

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`accuracy`: how often an image's caption beats those of the batch that mean another thing, and wrong ones."""
        image_features, text_features, _, wrong = self._features(self.network, batch)
        similarity = image_features.float() @ text_features.float().T  # (B, B)
        right = similarity.diagonal().clone()
        meanings = self._meanings(batch)
        same = torch.tensor([[other[0] in row for other in meanings] for row in meanings], device=right.device)
        same |= batch.weight == 0  # what could not be read
        best = similarity.masked_fill(same, -1.0).amax(dim=1)
        if wrong is not None:
            best = best.maximum(torch.einsum("bd,bwd->bw", image_features.float(), wrong.float()).amax(dim=1))
        return {"accuracy": (right > best).float()}


def _gives_text(recipe: Recipe, model: Path) -> bool:
    """Whether the recipe's frozen text encoder is to be the text tower of its CLIP: the folder holds no other."""
    if recipe.parts.get("text", {}).get("kind") != "clip_text" or not is_frozen(recipe, "text"):
        return False
    known = checkpoint.parts_in(model).get("text")
    return known is None or known.get("identity", {}).get("stage") == "clip"


def _number(meaning: Hashable) -> int:
    """A number of 64 bits that is equal on all ranks for equal meanings."""
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _gather(local: Tensor) -> Tensor:
    """Rows of all ranks, in order of rank, for a loss that every rank computes whole.

    Gradients reach the own rows only, times the number of ranks: the sum of what all ranks would send back.
    """
    fixed, here = local.detach(), PartialState()
    rows = list(gather(fixed).chunk(here.num_processes))
    rows[here.process_index] = fixed + here.num_processes * (local - fixed)
    return torch.cat(rows)
