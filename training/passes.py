"""What a step of a stage computes, on zeros: the networks that take part, and the loss of each of its updates.

A stage that needs no other part runs as it is, discriminator and perceptual network included. Of the others a function
in PASSES does what their one update does, so that no model folder is needed.

B samples, T text tokens, N codes.

It does not know what a pass costs: `footprint` counts that. A new kind of part is one entry in PASSES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

from ..pipeline.recipe import Recipe, RecipeError, build, is_frozen
from ..priors.caption_encoder import Captioned
from ..priors.condition import Condition
from .objectives import clip as clip_objective
from .objectives import dalle as dalle_objective
from .run import Stage
from .stages import STAGES, told
from .stream import Batch


@dataclass
class Setting:
    """A stage ready for `updates`; see `prepare`.

    world: number of devices. networks: what is trained, the part first. frozen: what stands beside and is not. stage:
    of a kind that runs as it is. aside: whether a frozen part is at work. outputs: of the network, which a stage holds
    until its step is done.
    """

    recipe: Recipe
    part: str
    config: Stage
    world: int
    networks: dict[str, Any]
    frozen: dict[str, Any]
    stage: Any = None
    aside: bool = False
    outputs: list[Any] = field(default_factory=list)

    @property
    def network(self) -> Any:
        return self.networks[self.part]

    @property
    def knobs(self) -> dict[str, Any]:
        return self.config.objective

    def phases(self) -> list[range]:
        """The steps, parted where one begins to do more than those before: a discriminator learns, then is heard."""
        adversary, steps = getattr(self.stage, "adversary", None), self.config.steps
        judged = adversary is not None and adversary.network is not None
        starts = {0, adversary.start, adversary.heard} if judged else {0}  # type: ignore[union-attr]
        marks = [*sorted(start for start in starts if start < steps), steps]
        return [range(first, end) for first, end in zip(marks, marks[1:], strict=False)]

    def updates(self, batch: int, step: int) -> Iterator[tuple[str, Tensor]]:
        """The name of what is trained and the loss of a micro-batch, one update after the other."""
        if self.stage is None:
            loss_of = PASSES[self.recipe.parts[self.part]["kind"]][1]
            assert loss_of is not None
            yield self.part, loss_of(self, batch)
            return
        for name, (loss, _), scalars in self.stage.updates(_zeros(batch, self.network.image_size), step):
            told(scalars)  # as in a step with a line, which takes the most memory
            del scalars
            yield name, loss

    def forward(self, *inputs: Any) -> Any:
        self.outputs.append(self.network(*inputs))
        return self.outputs[-1]

    def run_frozen(self, part: str, method: str, *inputs: Tensor) -> Any:
        """A method of another, frozen part, on the inputs: without gradient or autocast, as the stages call it."""
        self.aside = True
        with torch.no_grad():
            out = getattr(self.frozen[part], method)(*inputs)
        self.aside = False
        return out

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all devices, where a loss compares them; gradients reach the own ones."""
        return torch.cat([rows, *[rows.detach()] * (self.world - 1)])


def prepare(
    recipe: Recipe, part: str, config: Stage, world: int = 1, bf16: bool = True, device: str = "cpu"
) -> Setting:
    """The stage of a part, with fresh weights on a device; on "meta" a perceptual network needs no file.

    Raises RecipeError for a kind that has no entry in PASSES, or a recipe without a part that the stage reads, and
    ValueError for what the stage itself refuses.
    """
    kind = recipe.parts[part]["kind"]
    if kind not in PASSES:
        raise RecipeError(
            f"parts.{part}: what a pass of the kind {kind!r} costs is not known, expected one of {', '.join(PASSES)}; "
            "add it to PASSES in training/passes.py"
        )
    with torch.device(device):
        if PASSES[kind][1] is None:
            setting = _stage_alone(recipe, part, config, world, torch.device(device))
        else:
            frozen = {other: build(recipe, other).requires_grad_(False) for other in frozen_parts(recipe, part)}
            network = build(recipe, part)
            if trained_along(recipe, part):
                network = Captioned(network, build(recipe, "text"))
            setting = Setting(recipe, part, config, world, {part: network}, frozen)
    for network in setting.networks.values():
        _wrap(network, bf16)
    return setting


def _stage_alone(recipe: Recipe, part: str, config: Stage, world: int, device: torch.device) -> Setting:
    stage = STAGES[recipe.parts[part]["kind"]](recipe, config, _Zeros(), Path(), 0, device)
    if problem := stage.problem(recipe, dict(stage.networks), config, Path()):
        raise RecipeError(f"stage {part}: {problem}")
    if getattr(stage, "codebook", None) is not None:
        stage.codebook.until = 0  # which codes begin anew is asked of values, which a plan has none of
    distance = getattr(getattr(stage, "likeness", None), "network", None)
    frozen = {} if distance is None else {"perceptual": distance}
    return Setting(recipe, part, config, world, dict(stage.networks), frozen, stage)


def _wrap(network: nn.Module, bf16: bool) -> None:
    """As Accelerate wraps it, in place: with autocast, and its outputs come back in float32."""
    forward = network.forward

    def wrapped(*inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return convert_to_fp32(forward(*inputs))

    network.forward = wrapped  # type: ignore[method-assign]


def _zeros(count: int, size: int = 1) -> Batch:
    whole = torch.zeros(count, dtype=torch.int64, device="cpu")
    image = torch.zeros(count, 3, size, size, device="cpu")
    return Batch(image, [""] * count, [""] * count, whole, torch.ones(count, device="cpu"), labels=whole)


class _Zeros:
    """A source of what a stage asks for before its first step: the classes that there are."""

    size = None

    def read(self, positions: range) -> Batch:
        return _zeros(len(positions))


def _dalle(setting: Setting, batch: int) -> Tensor:
    text = torch.zeros(batch, setting.network.text_length, dtype=torch.int64)
    size = setting.frozen["tokenizer"].image_size
    codes = setting.run_frozen("tokenizer", "encode", torch.zeros(batch, 3, size, size)).flatten(1)  # (B, N)
    text_logits, image_logits = setting.forward(text, codes)
    return dalle_objective.dalle(text_logits, image_logits, text, codes, torch.ones(batch))[0][0]


def _clip(setting: Setting, batch: int) -> Tensor:
    """Captions at their full length; in training they end with the longest of the batch."""
    network, wrong = setting.network, int(setting.knobs.get("wrong_captions", 0))
    image = torch.zeros(batch, 3, network.image_size, network.image_size)
    text = torch.zeros(batch * (1 + wrong), network.text_length, dtype=torch.int64)
    image_features, text_features, scale = setting.forward(image, text)
    own, others = text_features[:batch], text_features[batch:].unflatten(0, (batch, wrong)) if wrong else None
    total = batch * setting.world
    rows = setting.gathered(image_features), setting.gathered(own)
    others = None if others is None else setting.gathered(others)
    return clip_objective.clip(*rows, scale, torch.arange(total)[:, None], others, torch.ones(total))[0][0]


def _unet(setting: Setting, batch: int) -> Tensor:
    """The squared error of a prediction. Latents and tokens are made in the step, where the recipe has what makes them;
    captions are as long as they may be.
    """
    trained, recipe, whole = setting.network, setting.recipe, torch.zeros(batch, dtype=torch.int64)
    network = trained.prior if isinstance(trained, Captioned) else trained
    x_t, image = torch.zeros(batch, network.in_channels, recipe.image_size, recipe.image_size), None
    if "tokenizer" in setting.frozen:
        size = setting.frozen["tokenizer"].image_size
        x_t = setting.run_frozen("tokenizer", "encode", torch.zeros(batch, 3, size, size))  # (B, C, h, w)
    if network.in_channels > x_t.shape[1]:
        image = torch.zeros(batch, network.in_channels - x_t.shape[1], *x_t.shape[2:])
    encoder = trained.text if isinstance(trained, Captioned) else setting.frozen.get("text")
    length = recipe.captions.context_length if encoder is None else encoder.text_length
    text, tokens, mask = torch.zeros(batch, length, dtype=torch.int64), None, None
    if isinstance(trained, Captioned):
        return setting.forward(x_t, whole, text).square().mean()
    if encoder is not None:
        tokens, mask = setting.run_frozen("text", "forward", text)
    elif network.context_dim:
        tokens = torch.zeros(*text.shape, network.context_dim)
    labels = None if network.num_classes is None else whole
    embedding = torch.zeros(batch, network.embedding_dim) if network.embedding_dim else None
    return setting.forward(x_t, whole, Condition(labels, tokens, mask, embedding, image)).square().mean()


# By kind: the frozen parts that the stage reads, and the loss of one micro-batch as the stage computes it; None: the
# stage itself runs.
PASSES: dict[str, tuple[tuple[str, ...], Callable[[Setting, int], Tensor] | None]] = {
    "dvae": ((), None),
    "patch_dvae": ((), None),
    "dalle": (("tokenizer",), _dalle),
    "unet": ((), _unet),
    "clip": ((), _clip),
    "autoencoder": ((), None),
    "vae": ((), None),
    "vqvae": ((), None),
    "vqgan": ((), None),
    "vq_latents": ((), None),
    "autoencoder_kl": ((), None),
}
# By kind: the frozen parts that the stage reads too, where the recipe has them.
_IF_THERE: dict[str, tuple[str, ...]] = {"unet": ("tokenizer", "text")}


def frozen_parts(recipe: Recipe, part: str) -> tuple[str, ...]:
    """The parts of the recipe that the stage of a part reads, frozen."""
    kind = recipe.parts[part]["kind"]
    there = tuple(other for other in _IF_THERE.get(kind, ()) if other in recipe.parts)
    return PASSES[kind][0] + tuple(other for other in there if other not in trained_along(recipe, part))


def trained_along(recipe: Recipe, part: str) -> tuple[str, ...]:
    """The parts that the stage of a part trains with it, as one network: the text encoder of a diffusion prior."""
    takes = recipe.parts[part]["kind"] == "unet" and "text" in recipe.parts and not is_frozen(recipe, "text")
    return ("text",) if takes else ()
