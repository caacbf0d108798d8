"""The trainer that `kartina train` launches: fits the stages of a recipe in order, each pinned by hash to the last.

    accelerate launch --config_file accelerate_config.yaml -m kartina.training shapes/dalle

Run the same command again and it resumes.
"""

import argparse
import atexit
import contextlib
import ctypes
import json
import os
import shutil
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from ..pipeline import checkpoint, notices, shared
from ..pipeline.built import built_otherwise
from ..pipeline.known_models import find_model
from ..pipeline.recipe import Recipe, RecipeError, dump, is_pretrained, reads_captions
from ..pipeline.whole_file import replaced
from . import cache, warm_start
from . import run as runs
from .sources import expect_captions, source_of, validation_of

# Others wait for so long while one writes a checkpoint or paints; one that fails is noticed at once by the launcher.
_PATIENCE = timedelta(hours=1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kartina.training", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, as in stages.tokenizer.steps=24")
    parser.add_argument("--stage", help="train this stage only")
    extend = "go on to more steps than the run began with"
    parser.add_argument("--extend", action="append", default=[], metavar="STAGE=STEPS", help=extend)
    parser.add_argument("--from", dest="origin", metavar="MODEL", help="begin with the weights of a model")
    parser.add_argument("--run", type=Path, help="the run folder; runs/<recipe> if absent")
    parser.add_argument("--processes", type=int, default=_asked(), help="the number of processes asked for")
    return parser.parse_intermixed_args(argv)


def _asked() -> int:
    """The number of processes that the launcher has told; 0 where `accelerate launch` starts one in place of several.

    It then says where they would meet, but not how many they are.
    """
    several = {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys()
    return int(os.environ.get("WORLD_SIZE", 0 if several else 1))


def _prepare_captions(recipe: Recipe, source: Any, model: Path, begun: Path | None = None) -> None:
    """Trains the caption tokenizer once, on the first captions of the data; later stages read its file.

    begun: the model that the run begins with, whose caption tokenizer is taken instead.

    Raises RecipeError where the folder holds one of another recipe or other data, or another that parts read and
    that no run here made: it would be lost.
    """
    from ..tokenizers.captions import CaptionTokenizer

    path, origin = model / "captions.json", model.parent / "captions.origin.json"
    known = json.loads(origin.read_text(encoding="utf-8")) if path.exists() and origin.exists() else {}
    place = {"data": source.fingerprint} if begun is None else {"from": checkpoint.file_hash(begun / "captions.json")}
    if begun is None and "from" in known:  # a later stage of a run that began with a model
        place = {"from": known["from"]}
    wanted = recipe.captions.model_dump() | place
    if begun is not None and path.exists() and checkpoint.file_hash(path) != wanted["from"]:
        raise RecipeError(f"{path} is not the caption tokenizer of {begun}; start another run with --run FOLDER")
    if known:
        if keys := runs.differences(known, wanted):
            raise RecipeError(
                f"{path}: the caption tokenizer was trained with another recipe or other data (differs in {keys}); "
                "put back what it began with, or start another run with --run FOLDER"
            )
        return
    model.mkdir(parents=True, exist_ok=True)
    there = checkpoint.file_hash(path) if path.exists() else ""
    read = [entry.get("trained_against", {}).get("captions") for entry in checkpoint.parts_in(model).values()]
    with replaced(path) as temporary:
        if begun is not None:
            shutil.copyfile(begun / "captions.json", temporary)
        else:
            captions = source.captions(range(20_000))
            CaptionTokenizer.train(captions, recipe.captions.vocab_size, recipe.captions.context_length).save(temporary)
        if there in read and there != checkpoint.file_hash(temporary):
            raise RecipeError(
                f"{path} is what the parts beside it read, and would be lost: this recipe and its data have another; "
                "start another run with --run FOLDER"
            )
    checkpoint.write_text(origin, json.dumps(wanted))


def _carry_notices(data: runs.Data, model: Path) -> None:
    """Puts the licence notices of the data into the model folder: what is trained on them carries them."""
    if data.kind == "digits":
        from .data.digits import write_notice

        write_notice(model)
    if data.kind == "shards":
        notices.copy(Path(data.shards or "") / "LICENSES", model)


def _check_frozen(recipe: Recipe, model: Path) -> None:
    """Raises RecipeError where a trained part of the folder was built by another section than the recipe's."""
    for part in built_otherwise(checkpoint.parts_in(model), recipe):
        raise RecipeError(
            f"{model}: the trained {part} was built otherwise than parts.{part} of the recipe says; "
            "put the recipe back, or start another run with --run FOLDER"
        )


def hashes_of(recipe: Recipe, model: Path, depends: tuple[str, ...]) -> dict[str, str]:
    """The hashes of what a stage depends on. Raises ModelError where one is not trained yet."""
    hashes = {}
    for other in depends:
        if other == "captions":
            hashes[other] = checkpoint.file_hash(model / "captions.json")
        elif is_pretrained(recipe, other):
            hashes[other] = checkpoint.pretrained_hash(recipe, other)
        else:
            checkpoint.load_weights(model, other)
            hashes[other] = checkpoint.read_card(model)["parts"][other]["hash"]
    return hashes


def _sources(recipe: Recipe, training: runs.Training, names: list[str]) -> dict[runs.Data, Any]:
    """What the caption tokenizer and the stages read, each source once, and before anything is trained."""
    wanted = {training.data, *(training.data_of(name) for name in names)}
    return {data: source_of(recipe, data) for data in wanted}


def keep_memory() -> None:
    """Lets the C library keep large blocks that a step frees, where it is glibc.

    By default each goes back to the system at once, and the next step waits for the same pages to be zeroed again.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def _train(
    recipe: Recipe,
    training: runs.Training,
    names: list[str],
    folder: Path,
    asked: int,
    extended: set[str],
    begun: Path | None,
    stop: Any,
) -> None:
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import parse_flag_from_env, set_seed

    from ..layers.precision import without_tf32
    from .checks import check, spared, stage_of
    from .exchange import is_out_of_memory
    from .loop import train_stage
    from .optim import fast_bf16

    check(recipe, training, names, max(1, asked), folder / "model", begun)
    # The tails of a softmax are denormal numbers, with which a CPU is many times slower. Threads made later inherit it.
    torch.set_flush_denormal(True)
    without_tf32()  # what is kept out of bfloat16 means float32
    keep_memory()
    # The flag that Accelerator reads itself: without it several CPU processes would each stand alone.
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE).device
    precision = training.precision if fast_bf16(device) else "fp32"
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    if precision != training.precision:
        accelerator.print("this device has no fast bfloat16: training in float32")
    if accelerator.num_processes != asked:
        raise RecipeError(
            f"asked for {asked or 'several'} processes, got {accelerator.num_processes}: without --multi_gpu, and on a "
            "CPU, `accelerate launch` starts one; use `kartina train --processes N`, which starts them all, or say "
            "--processes 1"
        )
    sources, model = _sources(recipe, training, names), folder / "model"
    validation = validation_of(recipe, training.data)
    if validation is None:
        if best := [name for name in names if training.stages[name].export == "best"]:
            raise RecipeError(
                f"stages.{best[0]}.export: best needs a metric, and nothing is held out to measure it on; set "
                "training.data.validation=FOLDER, or a larger training.data.validation_share"
            )
        accelerator.print("nothing is held out to measure on: there will be no valid/... in the log")
    _check_frozen(recipe, model)
    if accelerator.is_main_process:
        reads = any("captions" in stage_of(recipe, name).needs(recipe) for name in names)
        theirs = begun if begun is not None and (begun / "captions.json").is_file() else None
        if reads or (theirs is not None and reads_captions(recipe)):
            _prepare_captions(recipe, sources[training.data], model, theirs)
        if begun is not None:
            warm_start.take_over(recipe, begun, model, names)
        _carry_notices(training.data, model)
        if not (folder / "recipe.yaml").exists():
            checkpoint.write_text(folder / "recipe.yaml", dump(recipe))
    accelerator.wait_for_everyone()

    def one(name: str) -> None:
        """Trains a stage and writes what it exports. Nothing of it stays in memory for the next one."""
        kind, config = stage_of(recipe, name), training.stages[name]
        against = hashes_of(recipe, model, kind.needs(recipe))
        source = sources[training.data_of(name)]
        for each in (source, validation):
            expect_captions(each, kind.captioned(recipe))
        trained = None if begun is None else warm_start.began_with(recipe, begun, (name, *kind.beside))
        identity = runs.identity(recipe, training, name, source.fingerprint, against, kind.beside, trained)
        if _finished(model, name, identity, name in extended):
            accelerator.print(f"{name}: already trained in {model}")
            return
        set_seed(training.seed)
        stage = kind(recipe, config, source, model, training.seed, accelerator.device)
        source = cache.source_for(stage, source, training.data, against, model)
        if begun is not None:
            warm_start.begin(stage, recipe, begun, list(trained or ()))  # which a checkpoint replaces
        try:
            ema = train_stage(
                identity, stage, training, source, validation, folder, accelerator, stop, name in extended
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RecipeError(spared(name, config, stage.coupled(recipe, config), accelerator.num_processes)) from error
        ema.copy_to_network()
        for network in stage.exported().values():
            checkpoint.round_weights(network)
        stage.finish()
        if cut := getattr(getattr(stage, "captions", None), "num_truncated", 0):
            accelerator.print(
                f"{name}: since it started, this process read {cut:,} times a caption of more than "
                f"{stage.captions.context_length} tokens, and cut it"
            )
        for part, network in stage.exported().items():
            weights = checkpoint.export(network, keep=accelerator.is_main_process)
            if accelerator.is_main_process:
                own = identity | {"part": recipe.parts[part]}
                facts = {"trained_against": dict(against), "identity": own, "computed_in": precision}
                against[part] = checkpoint.save_part(model, recipe, part, weights, **facts)
        accelerator.wait_for_everyone()

    for name in names:
        one(name)
        accelerator.free_memory()  # of what Accelerate keeps of it


def _finished(model: Path, part: str, identity: dict[str, Any], extended: bool) -> bool:
    """Whether there is this very part, and what its stage exports beside it, in the model folder or as `shared.place`.

    extended: one of fewer steps, but else the same, is not finished. Raises RecipeError where it holds one trained
    otherwise.
    """
    parts = checkpoint.parts_in(model)
    entry = parts.get(part)
    exported = {part, *(other for other, each in parts.items() if each.get("identity", {}).get("stage") == part)}
    if entry is None or not all(shared.place(model, parts, other).is_file() for other in exported):
        return False
    known = runs.completed(entry.get("identity", {}))
    if entry["hash"] == (identity.get("from") or {}).get(part):
        return False  # it came along, and is what the stage begins with
    keys = runs.differences(known, identity, extended)
    if extended and not keys and known.get("steps") != identity.get("steps"):
        return False
    if keys:
        raise RecipeError(
            f"{model}: {part} was trained with another recipe or other data (differs in {keys}); "
            "put back what it began with, or start another run with --run FOLDER"
        )
    return True


def end(status: int) -> NoReturn:
    """Ends this process; one of several without Python's shutdown, in which threads of gloo would abort it.

    They give back tensors that Python knows, and one that asks for Python while it shuts down is ended by force, now
    and then, after all was saved. Whoever holds networks holds the threads too, also when the group is left.
    """
    from torch import distributed

    if not distributed.is_initialized():
        sys.exit(status)
    if status not in (1, 2):  # what failed may have failed on this rank alone, and others still wait for it
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # of a disk that is full, or a pipe that nobody reads
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def main(argv: list[str] | None = None) -> int:
    """Trains. Returns 0 when the stages are done, 2 with one clear line for a wrong recipe or run.

    A signal that stopped the run gives 128 + its number, but 0 to torchrun, which would take anything else
    for a crash; `accelerate launch` starts several processes by it.
    """
    from .checks import names_of
    from .stopping import Stopped, watched

    given = _arguments(argv)
    rank = os.environ.get("RANK", "0")
    try:
        recipe, training = runs.load(given.recipe, given.overrides)
        if training is None:
            raise RecipeError(f"recipe {recipe.name} has no training section")
        training, extended = runs.extend(training, given.extend)
        names, folder = names_of(training, given.stage), given.run or runs.folder_of(recipe)
        begun = None if given.origin is None else find_model(given.origin)
        lock = runs.locked(folder) if rank == "0" else contextlib.nullcontext()  # the job's
        with lock, watched() as stop:
            _train(recipe, training, names, folder, given.processes, extended, begun, stop)
    except Stopped as stopped:
        from torch.distributed import is_torchelastic_launched

        return 0 if is_torchelastic_launched() else 128 + stopped.signum
    except (ValueError, OSError) as error:
        agreed = getattr(error, "agreed", False)
        if agreed and rank != "0":
            return 2  # the first one says it
        if given.processes > 1 and not agreed and not isinstance(error, RecipeError | checkpoint.ModelError):
            traceback.print_exc()  # it may be this rank's alone
        print(f"kartina: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        ended = main()
    except Exception:
        traceback.print_exc()
        ended = 1
    end(ended)
