"""The training half of a recipe: data, stages, optimizers.

It does not know the models: they are in the recipe's other half, `kartina.pipeline.recipe`.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..pipeline.recipe import Diffusion, Recipe, RecipeError, Section, nearest, read, validate

RECIPES = Path(__file__).parent / "recipes"
CADENCE = (
    "log_every", "preview_every", "validate_every", "validate_samples", "save_minutes", "save_every", "keep",
    "patience", "micro_batch", "recompute", "compile",
)  # fmt: skip
"""What of a stage may change without changing what it learns."""

_LEFT_OUT = {*CADENCE, "levels", "jitter"}  # of an identity; the data's fingerprint tells of the last two
_ABSENT, _SHOWN = "(absent)", 8  # in errors


class Data(Section):
    """Where pictures and captions come from: drawn (`shapes`), packed (`shards`) or in a package (`digits`)."""

    kind: Literal["shapes", "shards", "digits"]
    levels: tuple[str, ...] = Field(("S1", "S2"), description="of `shapes`; one that is named twice counts twice")
    languages: tuple[Literal["en", "ru"], ...] = Field(("en", "ru"), min_length=1, description="of `shapes`")
    jitter: float = Field(0.02, ge=0, description="of `shapes`: deviation of the shift of each colour")
    contrast: int = Field(1, ge=1, description="of `shapes`: samples of a group that differ in a fact, see CLIPStage")
    shards: str | None = None
    validation: str | None = Field(None, description="a folder of shards on which the headline metric is measured")
    validation_share: float = Field(0.02, ge=0, lt=1, description="of `digits`, or `shards` without that: held out")
    cache: str | None = Field(None, description="what `kartina data encode` made of `shards`, read in their place")
    bad_limit: float = Field(0.05, ge=0, le=1, description="share of a pass that may be unreadable")
    workers: int = Field(0, ge=0, description="processes per device that read; 0 is a thread of the trainer")
    window: int = Field(4, ge=1, description="shards whose samples are mixed; more where shards are sorted by class")
    seed: int = 0


class Optimizer(Section):
    """AdamW; with `muon` > 0, matrices and kernels of hidden layers go to Muon (Jordan 2024) at that rate."""

    lr: float = Field(gt=0)
    muon: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(50, ge=0)
    decay: float = Field(0.4, ge=0, le=1, description="the last part of the steps, in which the rate falls to zero")
    shape: Literal["linear", "cosine"] = "linear"
    clip: float = Field(1.0, gt=0)


class Stage(Section):
    """One stage: it trains one part, for `steps` optimizer steps of `global_batch` samples."""

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int | None = Field(None, ge=1, description="samples per device and forward pass; derived if absent")
    recompute: bool = Field(False, description="compute activations of blocks twice instead of keeping them")
    compile: Literal["none", "cudagraphs", "inductor"] = Field("none", description="by torch.compile, see `parallel`")
    optimizer: Optimizer
    optimizers: dict[str, Optimizer] = Field({}, description="of the stage's other networks, in place of `optimizer`")
    ema: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(20, ge=1)
    preview_every: int = Field(500, ge=1)
    validate_every: int = Field(500, ge=1)
    validate_samples: int = Field(512, ge=1, description="the first of the validation data, all where it has fewer")
    save_minutes: float = Field(5.0, gt=0)
    save_every: int | None = Field(None, ge=1, description="steps; as well as by time")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")
    # So that three such spans in a row begin within the steps in which going back a third time ends a run.
    patience: int = Field(10, ge=1, le=499, description="steps in a row that are not finite before the run goes back")
    export: Literal["last", "best"] = Field(
        "last", description="the weights that become the part; best: by the headline metric"
    )
    # Numbers first: YAML takes 1e-6, without a dot, for a word.
    objective: dict[str, Annotated[float | str, Field(union_mode="left_to_right")]] = {}
    levels: tuple[str, ...] | None = Field(None, description="of `shapes`, in place of those of training.data")
    jitter: float | None = Field(None, ge=0, description="of `shapes` in training, in place of that of training.data")

    def optimizer_of(self, network: str) -> Optimizer:
        """That of one of the stage's networks."""
        return self.optimizers.get(network, self.optimizer)

    def number(self, knob: str, default: float) -> float:
        """A knob of the objective that is a number."""
        return float(self.objective.get(knob, default))

    def word(self, knob: str, default: str) -> str:
        """A knob of the objective that is one of a few words."""
        return str(self.objective.get(knob, default))


class Training(Section):
    """The `training` section of a recipe."""

    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    shard: Literal["none", "fsdp"] = Field("none", description="fsdp: divides what has blocks over the devices")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    data: Data
    stages: dict[str, Stage]

    def data_of(self, stage: str) -> Data:
        """What a stage reads: of `shapes` its own levels and jitter, and groups as its objective wants them."""
        if self.data.kind != "shapes":
            return self.data
        config = self.stages[stage]
        own = {"contrast": int(config.number("contrast", 1)), "levels": config.levels, "jitter": config.jitter}
        return self.data.model_copy(update={key: value for key, value in own.items() if value is not None})


def training_of(recipe: Recipe) -> Training:
    """The training half of a recipe. Raises RecipeError where it is missing or breaks a rule."""
    if not recipe.training:
        raise RecipeError(
            f"recipe {recipe.name} has no training section: it describes a system, but no way to train it"
        )
    return validate(Training, recipe.training, f"{recipe.name}: training")


def find(name: str) -> Path:
    """The file of a recipe, by name (`shapes/dalle`) or path. Raises RecipeError naming the nearest."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    known = {str(p.relative_to(RECIPES).with_suffix("")): p for p in sorted(RECIPES.rglob("*.yaml"))}
    if name not in known:
        raise RecipeError(f"no recipe {name!r}; {nearest(name, list(known))}")
    return known[name]


def load(name: str, overrides: list[str]) -> tuple[Recipe, Training | None]:
    """A recipe by name or path, with overrides applied, and its training half if it has one."""
    recipe = read(find(name), overrides)
    return recipe, training_of(recipe) if recipe.training else None


def folder_of(recipe: Recipe) -> Path:
    """The run folder of a recipe, where none is named."""
    return Path("runs") / recipe.name


def division(stage: Stage, world: int) -> tuple[int, int]:
    """(samples per device and forward pass, forward passes per step) so that all devices make one global batch.

    Raises RecipeError when the global batch does not divide.
    """
    per_device, rest = divmod(stage.global_batch, world)
    micro = stage.micro_batch or per_device
    if rest or per_device % micro:
        raise RecipeError(
            f"global_batch {stage.global_batch} does not divide over {world} processes x micro_batch {micro}; "
            "choose a global_batch that is a multiple of their product"
        )
    return micro, per_device // micro


def extend(training: Training, wishes: Sequence[str]) -> tuple[Training, set[str]]:
    """The training half with the steps of `--extend STAGE=STEPS`, and the names of those stages. Raises RecipeError."""
    stages = dict(training.stages)
    for wish in wishes:
        name, _, steps = wish.partition("=")
        if name not in stages or not steps.isdecimal() or int(steps) <= stages[name].steps:
            known = ", ".join(f"{known}={stage.steps}" for known, stage in stages.items())
            raise RecipeError(f"--extend {wish}: expected STAGE=STEPS with more steps than the recipe has ({known})")
        stages[name] = stages[name].model_copy(update={"steps": int(steps)})
    return training.model_copy(update={"stages": stages}), {wish.partition("=")[0] for wish in wishes}


def differences(old: dict[str, Any], new: dict[str, Any], extend: bool = False) -> str:
    """In what an older identity differs from a newer one, for an error: each dotted key with both values.

    Empty where they are equal. extend: more steps than before are no difference.
    """
    keys = [key for key in new if old.get(key) != new[key]]
    if extend and "steps" in keys and old.get("steps", new["steps"]) < new["steps"]:
        keys.remove("steps")
    lines = [line for key in keys for line in _changes(key, old.get(key, _ABSENT), new[key])]
    return "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")


def completed(known: dict[str, Any]) -> dict[str, Any]:
    """An identity as it was written, with the default of what the version that wrote it did not have yet.

    So a new field must do by default what was done before it.
    """
    optimizer = Optimizer(lr=1)
    stage = Stage(steps=1, global_batch=1, optimizer=optimizer)
    filled = stage.model_dump(mode="json", exclude={*_LEFT_OUT, "steps", "global_batch", "optimizer"}) | known
    rates = optimizer.model_dump(mode="json", exclude={"lr"})
    filled["optimizer"] = rates | filled.get("optimizer", {})
    filled["optimizers"] = {name: rates | own for name, own in filled["optimizers"].items()}
    if "diffusion" in filled:
        filled["diffusion"] = Diffusion().model_dump(mode="json") | filled["diffusion"]
    return filled


def _changes(key: str, old: Any, new: Any) -> list[str]:
    """`key.sub: old -> new` for each value that differs in what two equal keys hold."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = {name: (old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in old | new}
        return [line for name, (a, b) in both.items() if a != b for line in _changes(f"{key}.{name}", a, b)]
    before, after = (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in (old, new))
    return [f"{key}: {before} -> {after}"]


def identity(
    recipe: Recipe,
    training: Training,
    name: str,
    data: str,
    against: dict[str, str],
    beside: tuple[str, ...] = (),
    begun: dict[str, str] | None = None,
) -> dict[str, Any]:
    """All that decides what a stage learns: what a run is compared by at resume, and a part by before it is reused.

    data: the source's fingerprint. against: hashes of what the stage depends on, the caption tokenizer's too. beside:
    parts that are trained along. begun: hashes of trained weights that it begins with, if any. How often a run logs,
    previews and saves, and how a batch is split over devices and computed, are left out: they may change at resume, and
    so may `export`, which is in it for the part that is written at the end.
    """
    config = training.stages[name].model_dump(mode="json", exclude=_LEFT_OUT)
    shared = {"image_size": recipe.image_size, "seed": training.seed}
    run = {"precision": training.precision, "data": data, "against": dict(against), "from": begun}
    along = {"beside": {part: recipe.parts[part] for part in beside if part in recipe.parts}} if beside else {}
    along |= {"diffusion": recipe.diffusion.model_dump()} if recipe.parts[name]["kind"] == "unet" else {}
    return {"stage": name, "part": recipe.parts[name], **along, **shared, **run, **config}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run folder. Raises RecipeError where another trainer does: two would delete each other's checkpoints."""
    from ..pipeline.whole_file import lock  # which loads torch

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        if not lock(file, folder):
            raise RecipeError(f"{folder} is in use by another trainer; wait for it, or name another --run")
        yield
