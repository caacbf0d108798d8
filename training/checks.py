"""What is refused of a recipe before anything trains, though only a later stage could not do it.

It does not know what a stage computes: each says itself what does not fit it, by `TrainingStage.problem`.
"""

from pathlib import Path
from typing import Any

import torch

from ..pipeline import checkpoint, compiler, notices
from ..pipeline.recipe import Recipe, RecipeError, captions_problem, is_frozen, is_pretrained, nearest
from . import run as runs
from . import warm_start
from .cache import check_data
from .log import check_trackers
from .stages import STAGES


def names_of(training: runs.Training, stage: str | None) -> list[str]:
    """The stages to train, all or the one that is named. Raises RecipeError where there is none of that name."""
    if stage and stage not in training.stages:
        raise RecipeError(f"no stage {stage!r}; {nearest(stage, list(training.stages))}")
    return [stage] if stage else list(training.stages)


def stage_of(recipe: Recipe, name: str) -> Any:
    """The class of a stage, by the kind of its part. Raises RecipeError where nothing trains that part."""
    if name not in recipe.parts:
        raise RecipeError(f"training.stages: no part {name!r} to train; {nearest(name, list(recipe.parts))}")
    if is_frozen(recipe, name):
        raise RecipeError(f"training.stages.{name}: {name} is frozen; leave out this stage, or take it out of `frozen`")
    kind = recipe.parts[name]["kind"]
    if kind not in STAGES or STAGES[kind].part != name:
        raise RecipeError(f"training.stages.{name}: nothing trains {name} of the kind {kind!r} yet")
    return STAGES[kind]


def check(
    recipe: Recipe, training: runs.Training, names: list[str], processes: int, model: Path, begun: Path | None = None
) -> None:
    """Raises RecipeError for what any of the named stages could not do.

    model: the model folder, in which there may be parts already, or nothing. begun: the model folder that they begin
    with, if any.
    """
    check_trackers(training.trackers)
    check_data(training.data)
    stages = {name: stage_of(recipe, name) for name in names}
    if checkpoint.parts_in(model):
        notices.check_licences(
            recipe, notices.of_model(checkpoint.read_card(model)), f"what {model} holds is under its licence"
        )
    if training.data.kind == "shards" and training.data.shards is not None:
        shards = Path(training.data.shards)
        notices.check_licences(recipe, notices.of_data(shards), f"what is trained on {shards} is under its licence too")
    for name, stage in stages.items():
        _check_objective(name, training.stages[name], stage, training.data.kind)
    if begun is not None:
        warm_start.check(recipe, {name: (stage, training.stages[name]) for name, stage in stages.items()}, begun, model)
        model = model if checkpoint.parts_in(model) else begun
    if training.data.contrast != 1:
        raise RecipeError("training.data.contrast is what stages.clip.objective.contrast sets; set that")
    read = {other for stage in stages.values() for other in stage.needs(recipe)}
    built = {
        part: checkpoint.outline(recipe, part)
        for part in recipe.parts
        if part in read or not is_pretrained(recipe, part)
    }
    for name, stage in stages.items():
        config = training.stages[name]
        own = {name} if stage.joined else {name, *stage.beside} & recipe.parts.keys()
        for other in config.optimizers.keys() - own:
            raise RecipeError(
                f"stages.{name}.optimizers: {other!r} is not trained there with optimizers of its own; leave it out"
            )
        for other in stage.needs(recipe):
            if other not in (*recipe.parts, "captions"):
                raise RecipeError(f"stage {name} needs a {other}, which {recipe.name} has not; add parts.{other}")
        for part in (name, *stage.beside, *stage.needs(recipe)):
            if problem := part in built and captions_problem(recipe, part, built[part]):
                raise RecipeError(f"stage {name}: {problem}")
        if problem := stage.problem(recipe, built, config, model):
            raise RecipeError(f"stage {name}: {problem}")
        passes, why = runs.division(config, processes)[1], stage.coupled(recipe, config)
        if config.compile != "none" and (problem := _not_compiled(stage, built[name], training.shard)):
            raise RecipeError(f"stages.{name}.compile={config.compile}: {problem}")
        if config.compile == "inductor" and (problem := compiler.lacking(_device())):
            raise RecipeError(f"stages.{name}.compile=inductor: {problem}")
        if config.compile == "cudagraphs" and passes > 1:
            raise RecipeError(
                f"stages.{name}.compile=cudagraphs overwrites gradients that add up over {passes} passes; leave out "
                "compile or micro_batch, or take inductor"
            )
        if why and passes > 1:
            raise RecipeError(
                f"stage {name}: {why}, so its samples cannot be read in {passes} passes; "
                "leave out micro_batch, or use more processes"
            )


def spared(name: str, config: runs.Stage, coupled: str, processes: int) -> str:
    """What to do about a stage that has run out of memory."""
    micro, _ = runs.division(config, processes)
    ways = [] if config.recompute else [f"stages.{name}.recompute=true"]
    if micro > 1:
        fewer = max(count for count in range(1, micro) if micro % count == 0)
        plain = f" stages.{name}.compile=none" if config.compile == "cudagraphs" else ""  # which takes one pass
        less = f"more processes (as {coupled})" if coupled else f"stages.{name}.micro_batch={fewer}{plain}"
        ways = [less, *ways]
    return (
        f"stage {name} ran out of memory, {micro} samples a device at once; run the same command again with "
        f"{' or '.join([*ways, 'a smaller recipe'])}; `kartina plan` says what fits"
    )


def _device() -> str:
    """What Accelerator will take."""
    from accelerate.utils import parse_flag_from_env

    return "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"


def _not_compiled(stage: Any, part: Any, shard: str) -> str:
    """Why a stage's network cannot be compiled, and what to do; "" where it can."""
    if not stage.steady:
        known = ", ".join(sorted(kind for kind, each in STAGES.items() if each.steady))
        return f"only {known} are compiled; leave it out"
    if shard == "fsdp":
        return "what is divided is not compiled; leave out compile or training.shard=fsdp"
    if getattr(part, "dropout", 0):
        return "what drops out is drawn by the step, and would be compiled anew each; leave out dropout or compile"
    return ""


def _check_objective(name: str, config: runs.Stage, stage: Any, data: str) -> None:
    """Raises RecipeError where a key of a stage's objective, or its value, is none, or the data not for it."""
    where = f"stages.{name}.objective"
    for key, value in config.objective.items():
        if key not in stage.knobs:
            raise RecipeError(f"{where}: unknown key {key!r}; {nearest(key, list(stage.knobs))}")
        check_knob(where, key, value, stage.knobs[key], data)
        if value and (of := stage.knobs[key].of) and config.objective.get(of) in (None, 0, "none"):
            absent = "none" if stage.knobs[of].choices else 0
            raise RecipeError(f"{where}.{key} is of {of}, which is {absent}; write that too, or leave {key} out")
    contrast = config.number("contrast", 1)
    if contrast > 1 and (contrast % 1 or config.global_batch % contrast or data != "shapes"):
        raise RecipeError(
            f"{where}.contrast must be a whole number that divides global_batch, of shapes alone, "
            f"got {contrast:g} with {config.global_batch} of {data}; correct it, or leave it out"
        )


def check_knob(where: str, key: str, value: float | str, knob: Any, data: str) -> None:
    """Raises RecipeError where a knob does not take a value, or the data not the knob."""
    if knob.choices and value not in knob.choices:
        raise RecipeError(f"{where}.{key} must be one of {', '.join(knob.choices)}, got {value}")
    if not knob.choices and (isinstance(value, str) or not knob.low <= value <= knob.high):
        raise RecipeError(f"{where}.{key} must lie between {knob.low:g} and {knob.high:g}, got {value}")
    if knob.whole and value % 1:  # of infinity too
        raise RecipeError(f"{where}.{key} must be a whole number, got {value}")
    if knob.grammar and value and data == "shards":
        raise RecipeError(f"{where}.{key} needs captions of a known grammar, which shards have not; set {where}={{}}")
