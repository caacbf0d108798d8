"""The commands that train and judge: `kartina train | plan | evaluate | reconstruct | recode | ...`.

Nothing heavy is imported before a command runs.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.commands import Device, Json, device_named, load

app = typer.Typer()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, as shapes/dalle, or a .yaml file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    stage: Annotated[str | None, typer.Option(help="train this stage only")] = None,
    run: Annotated[Path | None, typer.Option(help="the run folder; runs/<recipe> if absent")] = None,
    processes: Annotated[int, typer.Option(min=1, help="on this machine: GPUs, or CPU processes")] = 1,
    extend: Annotated[list[str] | None, typer.Option(help="STAGE=STEPS: go on to more steps than before")] = None,
    begun: Annotated[str | None, typer.Option("--from", help="a model that the stages begin with")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the recipe, print it resolved, its FLOPs and memory; train nothing")
    ] = False,
) -> None:
    """Train the stages of a recipe; run the same command again to resume."""
    from . import run as runs

    resolved, training = runs.load(recipe, overrides or [])
    if dry_run:
        from ..pipeline.known_models import find_model
        from ..pipeline.recipe import dump
        from .checks import check, names_of
        from .plan import plan as planned
        from .plan_report import report

        if training is not None:
            runs.extend(training, extend or [])
            longer = [f"stages.{wish.replace('=', '.steps=')}" for wish in extend or []]
            resolved, training = runs.load(recipe, [*(overrides or []), *longer])
            assert training is not None
            model, origin = (run or runs.folder_of(resolved)) / "model", None if begun is None else find_model(begun)
            check(resolved, training, names_of(training, stage), processes, model, origin)
        typer.echo(dump(resolved))
        typer.echo(report(planned(resolved, training, devices=processes, stage=stage), of_device=False), nl=False)
        return
    trainer = ["kartina.training", *(["--"] if processes > 1 else []), recipe, *(overrides or [])]
    trainer += [
        f"--processes={processes}",
        *([f"--stage={stage}"] if stage else []),
        *([f"--run={run}"] if run else []),
        *(f"--extend={wish}" for wish in extend or []),
        *([] if begun is None else [f"--from={begun}"]),
    ]
    if processes == 1:  # replaced, not wrapped: a signal to this process reaches the trainer
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", *trainer])
    from .launcher import launch

    raise typer.Exit(launch(trainer, processes))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, as shapes/dalle, or a .yaml file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    devices: Annotated[int, typer.Option(min=1, help="how many train together")] = 1,
    device: Annotated[str, typer.Option(help="h100, h200, a100, a100-40gb, l40s, rtx4090, v100 ...")] = "h100",
    utilisation: Annotated[float, typer.Option(help="the assumed share of the device's peak rate")] = 0.4,
    stage: Annotated[str | None, typer.Option(help="plan this stage only")] = None,
    as_json: Json = False,
) -> None:
    """Print what training a recipe takes: parameters, FLOPs, memory, days; nothing is built or trained."""
    from . import plan as plans
    from . import run as runs
    from .plan_report import report

    found = plans.plan(*runs.load(recipe, overrides or []), device, devices, utilisation, stage)
    typer.echo(json.dumps(found) if as_json else report(found), nl=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a model's name or folder")],
    data: Annotated[
        Path | None,
        typer.Option(help="judge on these shards: of `kartina data emoji`, `avatars`, or any with captions"),
    ] = None,
    tests: Annotated[list[str] | None, typer.Option(help="of shapes: S1, S2a ..., or of emoji: E1 ...")] = None,
    per_test: Annotated[
        int | None, typer.Option(min=1, help="the first captions of each test, or pictures, only")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="also judge the best of N, by the model's CLIP")] = 1,
    seed: int = 0,
    device: Device = "auto",
    save: Annotated[bool, typer.Option("--save", help="write the headline figures to the model's card")] = False,
    as_json: Json = False,
) -> None:
    """Measure a model on what training never shows: on `shapes`, its tokenizer and CLIP too, on emoji, or on the
    captions of your shards that it held out.

    Of a model of shapes without a prior its tokenizer alone; of one without captions whether it draws scenes.
    """
    from ..pipeline import gallery
    from ..pipeline.checkpoint import load_recipe, read_card, save_measured
    from ..pipeline.known_models import find_model
    from ..pipeline.terminal import progress_bar
    from .data.labelled import read_fields
    from .evaluation import captions_suite, emoji_suite, shapes_suite
    from .sources import held_out

    if data is not None and read_fields(data):
        if tests or candidates > 1 or seed:
            raise ValueError(
                f"{data} has attributes to move: no --tests, no --candidates and no --seed; leave these out"
            )
        return _evaluate_attributes(model, data, per_test, device, save, as_json)
    if save and per_test is not None:
        raise ValueError("--save writes figures over whole tests to the card; leave --per-test out, or --save")
    of_emoji = data is not None and (data / "gallery").is_dir()
    suite: Any = shapes_suite if data is None else emoji_suite if of_emoji else captions_suite
    chosen = [test for entry in tests or [] for test in entry.split(",")]
    folder = find_model(model)
    if chosen and suite is captions_suite:
        raise ValueError(f"{data} has no tests by name; leave --tests out")
    if save:
        gallery.try_writing(folder)
    options: dict[str, Any] = {"per_test": per_test, "seed": seed, **({"tests": chosen} if chosen else {})}
    recipe = load_recipe(folder)
    if data is None and recipe.training.get("data", {}).get("kind") != "shapes":
        raise ValueError(f"{model} was not trained on shapes; name what it is judged by with --data FOLDER")
    if data is None and "prior" not in recipe.parts:
        if candidates > 1:
            raise ValueError(f"{model} has no prior, so it paints no candidates; leave out --candidates")
        if save and chosen:
            raise ValueError(
                "--save writes what a tokenizer keeps in all tests to the card; leave --tests out, or --save"
            )
        return _evaluate_tokenizer(model, folder, options, device_named(device), save, as_json)
    system = load(folder, device, "float32")
    if data is None and recipe.parts["prior"]["kind"] == "unet" and "text" not in recipe.parts:
        if chosen or candidates > 1:
            raise ValueError(f"{model} reads no captions; leave out --tests and --candidates")
        return _evaluate_scenes(model, system, per_test, seed, save, as_json)
    truth = () if data is None else (data,)
    known = {part.get("identity", {}).get("data") for part in read_card(folder)["parts"].values()} - {None}
    if suite is captions_suite:
        options["trained_on"] = known
    elif data is not None and not (len(known) == 1 and held_out(recipe, known, data)[0]):
        typer.echo(
            f"{model} was not trained on the shards of {data}: it may have seen what is held out there", err=True
        )
    with progress_bar("evaluating") as progress:
        result = suite.evaluate(system, *truth, candidates=candidates, progress=progress, **options)
    if data is None:
        if "tokenizer" in system.parts:
            result["tokenizer"] = suite.tokenizer_rate(system, **options)
        if "clip" in system.parts:
            result["clip"] = suite.clip_rate(system, **options)
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else suite.report(result))
    if save:
        words = ["kartina", "evaluate", model, *(f"--data={place}" for place in truth)]
        words += [f"--tests={test}" for test in chosen]
        words += [f"--candidates={candidates}", f"--seed={seed}", f"--device={result['device']}", "--save"]
        counts = {test: columns["one_sample"]["n"] for test, columns in result["tests"].items()}
        facts = {"device": result["device"], "dtype": result["dtype"], "captions": counts}
        # Of the tokenizer and CLIP a card has what all tests say.
        asked = {name: part for name, part in result.items() if not chosen or name not in ("tokenizer", "clip")}
        save_measured(folder, shlex.join(words), suite.headline(asked), **facts)


def _evaluate_tokenizer(
    model: str, folder: Path, options: dict[str, Any], device: str, save: bool, as_json: bool
) -> None:
    from ..pipeline.checkpoint import save_measured
    from .evaluation import reports, shapes_suite

    result = {"tokenizer": shapes_suite.tokenizer_rate(folder, device=device, **options)}
    typer.echo(json.dumps(result) if as_json else shapes_suite.tokenizer_line(result["tokenizer"]))
    if save:
        words = ["kartina", "evaluate", model]
        figures = reports.rounded({"tokenizer": result["tokenizer"]["rate"]})
        facts = {"device": device, "dtype": "float32", "pictures": result["tokenizer"]["n"]}
        save_measured(folder, shlex.join([*words, f"--seed={options['seed']}", "--save"]), figures, **facts)


def _evaluate_scenes(model: str, system: Any, count: int | None, seed: int, save: bool, as_json: bool) -> None:
    from ..pipeline.checkpoint import save_measured
    from ..pipeline.known_models import find_model
    from ..pipeline.terminal import progress_bar
    from .evaluation import reports
    from .evaluation import scenes_suite as suite

    training = system.recipe.training
    levels = training["stages"]["prior"].get("levels") or training["data"].get("levels", ("S1", "S2"))
    with progress_bar("evaluating") as progress:
        result = suite.evaluate(system, count or suite.PICTURES, levels=levels, seed=seed, progress=progress)
    typer.echo(json.dumps(result) if as_json else suite.report(result))
    if save:
        facts = {"pictures": result["n"], **{name: result[name] for name in ("device", "dtype", "knobs")}}
        words = shlex.join(["kartina", "evaluate", model, f"--seed={seed}", f"--device={result['device']}", "--save"])
        save_measured(find_model(model), words, reports.rounded({"scenes": result["rate"]}), **facts)


def _evaluate_attributes(model: str, data: Path, per_move: int | None, device: str, save: bool, as_json: bool) -> None:
    from ..pipeline import gallery
    from ..pipeline.checkpoint import save_measured
    from ..pipeline.known_models import find_model
    from ..pipeline.resynthesis import Resynthesis
    from ..pipeline.terminal import progress_bar
    from .evaluation import attributes_suite as suite

    place = device_named(device)
    if save:
        gallery.try_writing(find_model(model))
    with progress_bar("resynthesising") as progress:
        result = suite.evaluate(Resynthesis.load(model, place), data, per_move or suite.PER_MOVE, progress=progress)
    typer.echo(json.dumps(result) if as_json else suite.report(result), nl=as_json)
    if save:
        words = ["kartina", "evaluate", model, f"--data={data}", *([f"--per-test={per_move}"] if per_move else [])]
        save_measured(find_model(model), shlex.join([*words, "--save"]), suite.headline(result), device=place)


@app.command()
def directions(
    data: Annotated[Path, typer.Argument(help="what `kartina data avatars` wrote")],
    model: Annotated[str, typer.Option(help="a model's name or folder")],
    pictures: Annotated[int, typer.Option(min=2, help="so many of the data, the first ones")] = 5000,
    device: Device = "auto",
) -> None:
    """Find the directions of attributes in a model's latents, for `kartina resynthesise`, and keep them beside it."""
    from ..pipeline.known_models import find_model
    from .directions import find_directions

    folder = find_model(model)
    system = find_directions(folder, data, pictures, device_named(device))
    typer.echo(f"{folder}: {len(system.names)} attributes: {', '.join(system.names)}")


@app.command()
def scale(
    data: Annotated[Path, typer.Argument(help="shards, as `kartina data pack` writes them")],
    model: Annotated[str, typer.Option(help="the folder of a converted tokenizer")],
    device: Device = "auto",
) -> None:
    """Measure the scale of an imported tokenizer's latents, which a diffusion prior needs, and keep it with them."""
    import torch

    from ..pipeline.known_models import find_model
    from .stages.latents import scale_imported

    folder = find_model(model)
    mean, std = scale_imported(folder, data, torch.device(device_named(device)))
    for channel, (middle, deviation) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        typer.echo(f"channel {channel}: mean {middle:.4g}, deviation {deviation:.4g}")


@app.command()
def recode(
    model: Annotated[str, typer.Argument(help="a model with a DALL-E transformer")],
    tokenizer: Annotated[str, typer.Argument(help="a model whose tokenizer gives codes on the same grid")],
    out: Annotated[Path, typer.Argument(help="a new model folder")],
    data: Annotated[Path | None, typer.Option(help="shards; by default what the prior was trained on")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="in which both tokenizers' codes are compared")] = 32768,
    device: Device = "auto",
) -> None:
    """Put a trained DALL-E transformer over another tokenizer, to go on from there with `kartina train --from OUT`."""
    from ..pipeline.known_models import find_model
    from .recode import recode as recoded

    seen, count = recoded(find_model(model), find_model(tokenizer), out, pictures, data, device_named(device))
    typer.echo(f"{out}: {seen:,} of {count:,} codes were met in pictures; train it further: --from {out} --stage prior")


@app.command()
def reconstruct(
    models: Annotated[list[str], typer.Argument(help="names or folders of models; a prior is not needed")],
    data: Annotated[
        Path | None, typer.Option(help="shards of pictures; by default shapes' tests, or digits held out")
    ] = None,
    count: Annotated[int, typer.Option(min=4, help="pictures, at most")] = 2000,
    corruption: Annotated[
        str | None, typer.Option(help="what they see pictures through: gaussian, mask, salt_and_pepper")
    ] = None,
    corruption_level: Annotated[
        float | None, typer.Option(help="deviation of the noise, or share of the pixels that are lost; 0.3")
    ] = None,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure what tokenizers lose: PSNR, SSIM, KID, facts of shapes and the use of codes, one row for each."""
    from ..pipeline.terminal import progress_bar
    from .evaluation import reconstruction

    if corruption is None and corruption_level is not None:
        raise ValueError("--corruption-level is of --corruption, which is missing; give both")
    level = 0.3 if corruption_level is None else corruption_level
    with progress_bar("giving back") as progress:
        result = reconstruction.evaluate(
            models, data=data, count=count, seed=seed, device=device_named(device), progress=progress,
            corruption=(corruption, level) if corruption is not None else None,
        )  # fmt: skip
    typer.echo(json.dumps(result) if as_json else reconstruction.report(result))


@app.command()
def doctor(run: Annotated[Path, typer.Argument(help="a run folder")], as_json: Json = False) -> None:
    """Say what is wrong with a run, by its log, and what to do; exit with 1 where something is."""
    from . import doctor as examining

    raise typer.Exit(examining.main(run, as_json, typer.echo))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/curves.png"),
    stage: Annotated[str | None, typer.Option(help="of this stage only")] = None,
    keys: Annotated[list[str] | None, typer.Option(help="these curves only, as valid/psnr")] = None,
    save_reference: Annotated[bool, typer.Option("--save-reference", help="as what is normal for the recipe")] = False,
) -> None:
    """Draw the curves of runs, and compare with their recipe's reference; exit with 1 where one is not normal."""
    from . import compare as comparing

    raise typer.Exit(comparing.main(runs, out, stage, keys or [], save_reference, typer.echo))
