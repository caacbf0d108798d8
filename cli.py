"""The front door, `kartina paint | train | models | ...`. A room is imported only when its command runs."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="kartina: captions to pictures, and every model on the way.", no_args_is_help=True)
data = typer.Typer(help="Pack, check and prepare pictures with captions.", no_args_is_help=True)
app.add_typer(data, name="data")

Json = Annotated[bool, typer.Option("--json", help="print one JSON object a line")]
OWN = "by default the model's own"
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: cuda where there is one")]


@app.command()
def paint(
    prompts: Annotated[list[str] | None, typer.Argument(help="captions, one picture each")] = None,
    model: Annotated[str, typer.Option(help="a shipped model's name or a model folder")] = "shapes/dalle",
    candidates: Annotated[int, typer.Option(min=1, help="pictures painted for each caption")] = 1,
    keep: Annotated[int, typer.Option(min=1, help="best pictures kept for each caption")] = 1,
    seed: Annotated[int, typer.Option(help="of the first candidate; the next has the next number")] = 0,
    temperature: Annotated[float | None, typer.Option(help=f"0: the likeliest code, 1: as trained; {OWN}")] = None,
    top_k: Annotated[int | None, typer.Option(help=f"from the likeliest K codes only; {OWN}")] = None,
    top_p: Annotated[float | None, typer.Option(help=f"from the likeliest codes that make up P; {OWN}")] = None,
    guidance: Annotated[float | None, typer.Option(help=f"above 1: closer to the caption; {OWN}")] = None,
    reranker: Annotated[str | None, typer.Option(help="an open_clip model that ranks: a name or a folder")] = None,
    reranker_pretrained: Annotated[str | None, typer.Option(help="its weights: a published tag or a file")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out"),
    grid: Annotated[bool, typer.Option("--grid", help="one picture with all paintings, captions and scores")] = False,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file with one caption a line")] = None,
    as_json: Json = False,
) -> None:
    """Paint captions with a trained model."""
    from .pipeline import gallery
    from .pipeline.terminal import progress_bar

    texts = gallery.captions(prompts or [], prompts_file)
    if keep > candidates:
        raise ValueError(f"--keep must be at most --candidates, got {keep} of {candidates}; paint more candidates")
    paths = gallery.targets(out, len(texts) * keep, grid)
    system = _load(model, device, dtype, reranker, reranker_pretrained)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance}
    knobs = {name: value for name, value in knobs.items() if value is not None}
    with progress_bar("painting") as progress:
        paintings = system(texts, seed=seed, candidates=candidates, keep=keep, progress=progress, **knobs)
    for path, entry in gallery.save_grid(paintings, paths[0]) if grid else gallery.save(paintings, paths):
        typer.echo(json.dumps({"file": str(path), **entry}, ensure_ascii=False) if as_json else str(path))


def _load(model: str | Path, device: str, dtype: str, reranker: str | None = None, weights: str | None = None) -> Any:
    """A text-to-image system. Raises ValueError for a device or type that is not here, and as loading does."""
    from .pipeline.recipe import nearest
    from .pipeline.text_to_image import DTYPES, TextToImage

    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; {nearest(dtype, list(DTYPES))}")
    if weights and not reranker:
        raise ValueError("--reranker-pretrained names the weights of --reranker, which is missing; give both")
    place, scorer = _device(device), None
    if reranker:
        from .pipeline.rerank import OpenCLIPScorer

        scorer = OpenCLIPScorer(reranker, weights, place)
    return TextToImage.load(model, device=place, dtype=DTYPES[dtype], reranker=scorer)


def _device(name: str) -> str:
    import torch

    from .pipeline.checkpoint import default_device

    if name == "auto":
        return default_device()
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name!r} is not here ({reason}); take cpu, or auto to have one chosen") from None
    return name


@app.command()
def reproduce(
    file: Path,
    model: Annotated[str | None, typer.Option(help="a model's name or folder; the known one of the same hash")] = None,
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/reproduced.png"),
) -> None:
    """Paint a picture again from what its PNG carries, and compare; exit with 1 where the two differ visibly."""
    from .pipeline import gallery
    from .pipeline.images import psnr, read_metadata, read_picture
    from .pipeline.text_to_image import check_facts, find_by_hash, repaint

    facts, before = check_facts(read_metadata(file)), read_picture(file)
    paths = gallery.targets(out, 1)
    try:
        device = _device(facts["device"])
    except ValueError:
        typer.echo(f"it was painted on {facts['device']}, which is not here: painting on the CPU", err=True)
        device = "cpu"
    again = repaint(_load(model or find_by_hash(facts["model_hash"]), device, facts["dtype"]), facts)
    gallery.save([again], paths)
    likeness = psnr(before, again.image)
    typer.echo(str(paths[0]))
    typer.echo("same pixels: yes" if likeness == float("inf") else f"same pixels: no, PSNR {likeness:.1f} dB")
    if likeness < gallery.SAME:
        raise typer.Exit(1)


@app.command()
def models(as_json: Json = False) -> None:
    """List shipped and local models with licence, parts, and what they were measured to do."""
    from .pipeline import catalogue

    rows, problems = catalogue.catalogue()
    if not as_json:
        typer.echo(catalogue.report(rows, problems), nl=False)
        return
    for row in [*rows, *({"problem": problem} for problem in problems)]:
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a model's name or folder")],
    data: Annotated[Path | None, typer.Option(help="judge on emoji, those of `kartina data emoji FOLDER`")] = None,
    tests: Annotated[list[str] | None, typer.Option(help="of shapes: S1, S2a ..., or of emoji: E1 ...")] = None,
    per_test: Annotated[int | None, typer.Option(min=1, help="the first captions of each test only")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="also judge the best of so many, by the model's CLIP")] = 1,
    seed: int = 0,
    device: Device = "auto",
    save: Annotated[bool, typer.Option("--save", help="write the headline figures to the model's card")] = False,
    as_json: Json = False,
) -> None:
    """Measure a model on what training never shows: on `shapes`, its tokenizer and CLIP too, or on emoji."""
    from .pipeline import gallery
    from .pipeline.checkpoint import save_measured
    from .pipeline.terminal import progress_bar
    from .pipeline.text_to_image import find_model
    from .training.evaluation import emoji_suite, shapes_suite

    if save and per_test is not None:
        raise ValueError("--save writes figures over whole tests to the card; leave --per-test out, or --save")
    suite: Any = shapes_suite if data is None else emoji_suite
    chosen = [test for entry in tests or [] for test in entry.split(",")]
    folder = find_model(model)
    if save:
        gallery.try_writing(folder)
    system = _load(folder, device, "float32")
    options: dict[str, Any] = {"per_test": per_test, "seed": seed, **({"tests": chosen} if chosen else {})}
    if data is None and system.recipe.training.get("data", {}).get("kind", "shapes") != "shapes":
        raise ValueError(f"{model} was not trained on shapes; name what it is judged by with --data FOLDER")
    truth = () if data is None else (data,)
    with progress_bar("evaluating") as progress:
        result = suite.evaluate(system, *truth, candidates=candidates, progress=progress, **options)
    if data is None:
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
        save_measured(folder, shlex.join(words), suite.headline(result), **facts)


@app.command()
def train(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    stage: Annotated[str | None, typer.Option(help="train this stage only")] = None,
    run: Annotated[Path | None, typer.Option(help="the run folder; runs/<recipe> if absent")] = None,
    processes: Annotated[int, typer.Option(min=1)] = 1,
    extend: Annotated[list[str] | None, typer.Option(help="STAGE=STEPS: go on to more steps than before")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved recipe and its size; train nothing")
    ] = False,
) -> None:
    """Train the stages of a recipe; run the same command again to resume."""
    from .training import run as runs

    resolved, _ = runs.load(recipe, overrides or [])
    if dry_run:
        from .pipeline.recipe import count_parameters, dump

        typer.echo(dump(resolved))
        typer.echo(json.dumps({"parameters": count_parameters(resolved)}, indent=2))
        return
    trainer = ["kartina.training", *(["--"] if processes > 1 else []), recipe, *(overrides or [])]
    trainer += [
        f"--processes={processes}",
        *([f"--stage={stage}"] if stage else []),
        *([f"--run={run}"] if run else []),
        *(f"--extend={wish}" for wish in extend or []),
    ]
    if processes == 1:  # replaced, not wrapped: a signal to this process reaches the trainer
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", *trainer])
    from .training.launcher import launch

    raise typer.Exit(launch(trainer, processes))


@app.command()
def doctor(run: Annotated[Path, typer.Argument(help="a run folder")], as_json: Json = False) -> None:
    """Say what is wrong with a run, by its log, and what to do; exit with 1 where something is."""
    from .training import doctor as examining

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
    from .training import compare as comparing

    raise typer.Exit(comparing.main(runs, out, stage, keys or [], save_reference, typer.echo))


@app.command()
def plan(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    devices: Annotated[int, typer.Option(min=1, help="how many train together")] = 1,
    device: Annotated[str, typer.Option(help="h100, h200, a100, a100-40gb, l40s, rtx4090, v100 ...")] = "h100",
    utilisation: Annotated[float, typer.Option(help="the assumed share of the device's peak rate")] = 0.4,
    stage: Annotated[str | None, typer.Option(help="plan this stage only")] = None,
    as_json: Json = False,
) -> None:
    """Print what training a recipe takes: parameters, FLOPs, memory, days; nothing is built or trained."""
    from .training import plan as plans
    from .training import run as runs

    found = plans.plan(*runs.load(recipe, overrides or []), device, devices, utilisation, stage)
    typer.echo(json.dumps(found) if as_json else plans.report(found), nl=as_json)


@data.command()
def pack(folder: Path, out: Path, samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000) -> None:
    """Pack pictures with sibling .txt captions into WebDataset shards."""
    from .pipeline.terminal import tell
    from .training.shards import pack_folder

    report = pack_folder(folder, out, samples_per_shard)
    typer.echo(f"packed {report.packed} samples into {out}")
    tell({"no caption": report.no_caption, "no picture": report.no_picture, "duplicate (packed)": report.duplicates})
    tell({"not a picture or caption": report.ignored, "bad": report.bad})


@data.command()
def check(shards: Path) -> None:
    """Read every sample of the shards; name each bad one with its reason, exit with 1 if there is any."""
    from .pipeline.terminal import tell
    from .training.shards import check_shards

    report = check_shards(shards)
    typer.echo(f"read {report.samples} samples, {len(report.bad)} bad, {len(report.shards)} shards with findings")
    tell({"shard": report.shards, "bad": report.bad})
    if report.bad or report.shards:
        raise typer.Exit(1)


@data.command()
def emoji(
    out: Path,
    packed: Annotated[Path | None, typer.Option(help="a folder with the .tgz files of npm pack")] = None,
    size: int = 64,
    per_concept: Annotated[int, typer.Option(help="records of each concept")] = 16,
) -> None:
    """Fetch Noto and Fluent emoji with your npm, rasterise them, and write shards with their licence notices."""
    from .pipeline.terminal import tell
    from .training.data.emoji import prepare

    report = prepare(out, packed=packed, size=size, per_concept=per_concept)
    typer.echo(f"{report.samples} samples of {report.concepts} concepts in {out}; held out: {report.held_out}")
    tell({"left out": report.left_out})


@data.command()
def encode(
    shards: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="a model's name or folder")],
    what: Annotated[list[str] | None, typer.Option(help="codes, latents, image_embedding, text_embedding")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="one for each core or GPU if absent")] = None,
    device: Device = "auto",
) -> None:
    """Write what a model's frozen parts make of shards, codes by default, to train from; run it again to go on."""
    from .pipeline.terminal import tell
    from .training.encode import encode as encode_shards

    report = encode_shards(shards, out, model, what or ["codes"], processes, _device(device))
    typer.echo(f"{out}: {report.samples} samples; shards: {report.written} written, {report.kept} were there")
    tell({"still being written by another process": report.left, "bad": report.bad})


@app.command()
def demo(out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/demo.png")) -> None:
    """Paint a grid with every shipped model, best of 8 for each caption; its path is the last line."""
    from .pipeline import gallery
    from .pipeline.checkpoint import ModelError
    from .pipeline.terminal import progress_bar
    from .pipeline.text_to_image import SHIPPED

    shipped = [name for name in gallery.DEMO if (SHIPPED / name / "card.json").is_file()]
    if not shipped:
        raise ModelError("no model is shipped yet; train one: kartina train shapes/dalle, then kartina paint --model")
    path = gallery.targets(out, 1)[0]
    paintings = []
    for name in shipped:
        system = _load(name, "auto", "float32")
        with progress_bar(name) as progress:
            paintings += system(gallery.DEMO[name], candidates=8, progress=progress)
    for painting in paintings:
        typer.echo(f"{painting.clip_score:.3f}  {painting.prompt}")
    gallery.save_grid(paintings, path)
    typer.echo(str(path))


def main() -> None:
    """Runs the command line: wrong input gives one clear line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        from .pipeline.terminal import printable

        typer.echo(f"kartina: {printable(' '.join(str(error).split()))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
