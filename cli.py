"""The front door, `kartina paint | train | plan | models | data ...`. A room is imported only when its command runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="kartina: captions to pictures, and every model on the way.", no_args_is_help=True)
data = typer.Typer(help="Pack, check and prepare pictures with captions.", no_args_is_help=True)
app.add_typer(data, name="data")


@app.command()
def paint(
    prompts: Annotated[list[str] | None, typer.Argument(help="captions, one picture each")] = None,
    model: Annotated[str, typer.Option(help="a shipped model's name or a model folder")] = "shapes/dalle",
    candidates: Annotated[int, typer.Option(min=1, help="pictures painted for each prompt")] = 1,
    keep: Annotated[int, typer.Option(min=1, help="best pictures kept for each prompt")] = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out"),
    grid: Annotated[bool, typer.Option("--grid", help="one picture with all paintings, captions and scores")] = False,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file with one caption a line")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the results as JSON")] = False,
) -> None:
    """Paint captions with a trained model."""
    from .pipeline.text_to_image import TextToImage

    texts = list(prompts or [])
    if prompts_file:
        texts += [line for line in prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    system = TextToImage.load(model, device=device)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance}
    paintings = system(texts, seed=seed, candidates=candidates, keep=keep, **knobs)
    for path, entry in _write(paintings, out, grid):
        typer.echo(json.dumps({"file": str(path), **entry}, ensure_ascii=False) if as_json else str(path))


def _write(paintings: list[Any], out: Path, grid: bool) -> list[tuple[Path, dict[str, Any]]]:
    from .pipeline import images
    from .pipeline.text_to_image import metadata

    if grid:
        path = out if out.suffix == ".png" else out / "grid.png"
        captions, scores = [p.prompt for p in paintings], [p.clip_score for p in paintings]
        drawn = None if None in scores else scores
        scale = max(1, 160 // paintings[0].image.width)
        picture = images.grid([p.image for p in paintings], columns=4, captions=captions, scores=drawn, scale=scale)
        entry = {"paintings": [metadata(p) for p in paintings]}
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save_png(picture, path, entry)
        return [(path, entry)]
    written = []
    for k, painting in enumerate(paintings):
        single = out.suffix == ".png"
        path = out if single and k == 0 else (out.with_name(f"{out.stem}-{k}.png") if single else out / f"{k:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save_png(painting.image, path, metadata(painting))
        written.append((path, metadata(painting)))
    return written


@app.command()
def train(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    stage: Annotated[str | None, typer.Option(help="train this stage only")] = None,
    run: Annotated[Path | None, typer.Option(help="the run folder; runs/<recipe> if absent")] = None,
    processes: Annotated[int, typer.Option(min=1)] = 1,
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
    ]
    if processes == 1:  # replaced, not wrapped: a signal to this process reaches the trainer
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", *trainer])
    import torch

    environment = dict(os.environ)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if torch.cuda.is_available():
        launcher = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    else:
        environment["ACCELERATE_USE_CPU"] = "1"
    command = [sys.executable, "-m", *launcher, "-m", *trainer]
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


@app.command()
def plan(recipe: str, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print what a recipe needs, counted without building it."""
    from .pipeline.recipe import count_parameters
    from .training import run as runs

    resolved, _ = runs.load(recipe, [])
    counts = count_parameters(resolved)
    if as_json:
        typer.echo(json.dumps({"parameters": counts}))
        return
    for part, count in counts.items():
        typer.echo(f"{part:12s} {count:>16,d} parameters")


@app.command()
def models() -> None:
    """List shipped and local models with licence and what they were measured to do."""
    from .pipeline.checkpoint import read_card
    from .pipeline.text_to_image import known_models

    found = known_models()
    if not found:
        typer.echo("no models yet: train one with `kartina train shapes/dalle`")
    for name, folder in found.items():
        card = read_card(folder)
        measured = card.get("measured") or "not measured"
        typer.echo(f"{name}  {card['licence']}  parts: {', '.join(card['parts'])}  {measured}")


@app.command()
def reproduce(file: Path, out: Annotated[Path, typer.Option(help="a .png file")] = Path("out/reproduced.png")) -> None:
    """Paint a picture again from what its PNG carries, with the known model of the same hash."""
    from .pipeline.images import read_metadata
    from .pipeline.text_to_image import TextToImage, find_by_hash

    facts = read_metadata(file)
    keys = {"prompt", "seed", "candidate", "model_hash", "knobs", "micro_batch"}
    knobs = {"temperature", "top_k", "top_p", "guidance_scale"}
    if not keys <= set(facts) or not set(facts["knobs"]) <= knobs or not 1 <= int(facts["micro_batch"]) <= 4096:
        raise ValueError(f"{file} does not hold one painting's facts (a grid does not); give a single painting's PNG")
    folder = find_by_hash(facts["model_hash"])
    count = facts["micro_batch"]
    first = facts["seed"] - facts["candidate"]
    paintings = TextToImage.load(folder)(facts["prompt"], seed=first, candidates=count, keep=count, **facts["knobs"])
    again = [p for p in paintings if p.seed == facts["seed"]]
    for path, _ in _write(again, out, False):
        typer.echo(str(path))


@data.command()
def pack(folder: Path, out: Path, samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000) -> None:
    """Pack pictures with sibling .txt captions into WebDataset shards."""
    from .training.shards import pack_folder

    report = pack_folder(folder, out, samples_per_shard)
    typer.echo(f"packed {report.packed} samples into {out}")
    for name in report.no_caption:
        typer.echo(f"  no caption: {name}")
    for name in report.no_picture:
        typer.echo(f"  no picture: {name}")
    for name in report.duplicates:
        typer.echo(f"  duplicate (packed): {name}")
    for name in report.ignored:
        typer.echo(f"  not a picture or caption: {name}")
    for name, reason in report.bad.items():
        typer.echo(f"  bad: {name}: {reason}")


@data.command()
def check(shards: Path) -> None:
    """Read every sample of the shards; name each bad one with its reason, exit with 1 if there is any."""
    from .training.shards import check_shards

    report = check_shards(shards)
    typer.echo(f"read {report.samples} samples, {len(report.bad)} bad, {len(report.shards)} shards with findings")
    for name, reason in {**report.shards, **report.bad}.items():
        typer.echo(f"  {name}: {reason}")
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
    from .training.data.emoji import prepare

    report = prepare(out, packed=packed, size=size, per_concept=per_concept)
    typer.echo(f"{report.samples} samples of {report.concepts} concepts in {out}; held out: {report.held_out}")
    for name, reason in report.left_out.items():
        typer.echo(f"  left out: {name}: {reason}")


@app.command()
def demo(out: Path = Path("out/demo.png")) -> None:
    """Paint a grid with the shipped models."""
    from .pipeline.checkpoint import ModelError
    from .pipeline.text_to_image import SHIPPED

    if not list(SHIPPED.glob("*/*/card.json")):
        raise ModelError("no model is shipped yet; train one: kartina train shapes/dalle, then kartina paint --model")
    prompts = ["a small red ring on a blue background", "маленькое красное кольцо на синем фоне"]
    paint(prompts=prompts, grid=True, out=out, candidates=8)


def main() -> None:
    """Runs the command line: wrong input gives one clear line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"kartina: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
