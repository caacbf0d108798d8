"""The commands that use and look after trained models: `kartina paint | reproduce | resynthesise | models | demo`, and
`kartina convert | export` for published weights.

Nothing heavy is imported before a command runs.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="print one JSON object a line")]
OWN = "by default the model's own"
Reranker = Annotated[str | None, typer.Option(help="an open_clip model that ranks: a name or a folder")]
RerankerWeights = Annotated[str | None, typer.Option(help="its weights: a published tag or a file")]
MicroBatch = Annotated[int | None, typer.Option(help="pictures painted at once; on a CPU fewer of larger ones")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: cuda where there is one")]


@app.command()
def paint(
    prompts: Annotated[list[str] | None, typer.Argument(help="captions, one picture each")] = None,
    model: Annotated[str, typer.Option(help="a name, a folder, or hf-hub:OWNER/NAME")] = "shapes/dalle",
    candidates: Annotated[int, typer.Option(min=1, help="pictures painted for each caption")] = 1,
    keep: Annotated[int, typer.Option(min=1, help="best pictures kept for each caption")] = 1,
    seed: Annotated[int, typer.Option(help="of the first candidate; the next has the next number")] = 0,
    temperature: Annotated[float | None, typer.Option(help=f"0: the likeliest code, 1: as trained; {OWN}")] = None,
    top_k: Annotated[int | None, typer.Option(help=f"from the likeliest K codes only; {OWN}")] = None,
    top_p: Annotated[float | None, typer.Option(help=f"from the likeliest codes that make up P; {OWN}")] = None,
    guidance: Annotated[float | None, typer.Option(help=f"above 1: closer to the caption; {OWN}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"of diffusion: from noise to picture; {OWN}")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"of diffusion: ddim, dpmpp_2m, unipc ...; {OWN}")] = None,
    eta: Annotated[float | None, typer.Option(help="of ddim: 0 draws no noise on the way, 1 as much as ddpm")] = None,
    negative: Annotated[str | None, typer.Option(help="of diffusion: what guidance leads away from")] = None,
    reranker: Reranker = None,
    reranker_pretrained: RerankerWeights = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="of diffusion, for GPUs: by torch.compile")] = False,
    micro_batch: MicroBatch = None,
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out"),
    grid: Annotated[bool, typer.Option("--grid", help="one picture with all paintings, captions and scores")] = False,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file with one caption a line")] = None,
    as_json: Json = False,
) -> None:
    """Paint captions with a trained model."""
    from . import gallery
    from .terminal import progress_bar

    texts = gallery.captions(prompts or [], prompts_file)
    check_keep(keep, candidates)
    gallery.check_target(out)
    system = load(model, device, dtype, reranker, reranker_pretrained)
    system = system.compile() if compiled else system
    knobs = given(
        temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance, num_steps=steps, sampler=sampler,
        eta=eta, negative=negative,
    )  # fmt: skip
    with progress_bar("painting") as progress:
        paintings = system(
            texts, seed=seed, candidates=candidates, keep=keep, progress=progress, micro_batch=micro_batch, **knobs
        )
    paths = gallery.targets(out, len(paintings), grid)
    for path, entry in gallery.save_grid(paintings, paths[0]) if grid else gallery.save(paintings, paths):
        tell(path, entry, as_json)


@app.command()
def reproduce(
    file: Path,
    model: Annotated[str | None, typer.Option(help="a model's name or folder; the known one of the same hash")] = None,
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/reproduced.png"),
) -> None:
    """Paint a picture again from what its PNG carries, and compare; exit with 1 where the two differ visibly."""
    from . import gallery
    from .images import psnr, read_metadata, read_picture
    from .known_models import find_by_hash
    from .text_to_image import check_facts, repaint

    facts, before = check_facts(read_metadata(file)), read_picture(file)
    gallery.check_target(out)
    try:
        device = device_named(facts["device"])
    except ValueError:
        typer.echo(f"it was painted on {facts['device']}, which is not here: painting on the CPU", err=True)
        device = "cpu"
        facts |= {"micro_batch": 1, "row": 0, "compiled": False}  # without equal bits, nothing is gained by more
    again = repaint(load(model or find_by_hash(facts["model_hash"]), device, facts["dtype"]), facts)
    paths = gallery.targets(out, 1)
    gallery.save([again], paths)
    likeness = psnr(before, again.image)
    typer.echo(str(paths[0]))
    typer.echo("same pixels: yes" if likeness == float("inf") else f"same pixels: no, PSNR {likeness:.1f} dB")
    if likeness < gallery.SAME:
        raise typer.Exit(1)


@app.command()
def resynthesise(
    pictures: Annotated[list[Path], typer.Argument(help="pictures: PNG, JPEG or WebP")],
    model: Annotated[str, typer.Option(help="a model's name or folder")],
    attribute: Annotated[list[str], typer.Option(help="NAME=+1 or NAME=-1, as in glasses=+1")],
    strength: Annotated[float, typer.Option(help="0: not at all, 1: the whole way")] = 1.0,
    each: Annotated[bool, typer.Option("--each", help="the moved pictures alone, a file each")] = False,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Move pictures along attributes of a model's latents: before and after at growing strengths, as one grid."""
    from . import gallery, resynthesis
    from .images import PHOTOS, read_picture, save_png

    moves, shown = resynthesis.moves_of(attribute), [read_picture(path, PHOTOS) for path in pictures]
    gallery.check_target(out)
    system = resynthesis.Resynthesis.load(model, device_named(device))
    draw = resynthesis.moved if each else resynthesis.sheets
    pages = list(draw(system, shown, moves, strength))
    for path, picture in zip(gallery.targets(out, len(pages), grid=not each), pages, strict=True):
        facts = {"model": model, "moves": moves, "strength": strength}
        save_png(picture, path, facts)
        tell(path, facts, as_json)


@app.command()
def models(as_json: Json = False) -> None:
    """List shipped and local models with licence, parts, and what they were measured to do."""
    from . import catalogue

    rows, problems = catalogue.catalogue()
    if not as_json:
        typer.echo(catalogue.report(rows, problems), nl=False)
        return
    for row in [*rows, *({"problem": problem} for problem in problems)]:
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/demo.png")) -> None:
    """Paint a grid with every shipped model, best of 8 for each caption; its path is the last line."""
    from . import gallery
    from .checkpoint import ModelError
    from .known_models import SHIPPED
    from .terminal import progress_bar

    shipped = [name for name in gallery.DEMO if (SHIPPED / name / "card.json").is_file()]
    if not shipped:
        raise ModelError("no model is shipped yet; train one: kartina train shapes/dalle, then kartina paint --model")
    gallery.check_target(out)
    paintings = []
    for name in shipped:
        system = load(name, "auto", "float32")
        with progress_bar(name) as progress:
            painted = system(gallery.DEMO[name], candidates=8, progress=progress)
        for painting in painted:
            typer.echo(f"{painting.clip_score:.3f}  {name}: {painting.prompt}")
        paintings += painted
    path = gallery.targets(out, 1)[0]
    gallery.save_grid(paintings, path)
    typer.echo(str(path))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a file, a folder, or a hub repository as OWNER/NAME")],
    out: Annotated[Path, typer.Argument(help="the model folder to make")],
    name: Annotated[str | None, typer.Option(help="what the model is called, as word/word")] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="pixels a side; by default its own")] = None,
    licence: Annotated[str, typer.Option(help="of the weights, as their authors state it")] = "not stated",
    part: Annotated[str | None, typer.Option(help="tokenizer: only this of a whole Stable Diffusion")] = None,
    prediction: Annotated[str | None, typer.Option(help="eps or v: of a single file, which does not say it")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="of a single file: a folder with another BPE of CLIP")] = None,
) -> None:
    """Make a model folder of published weights: Stable Diffusion 1 or 2, or a tokenizer (OpenAI's, VQ-GAN, KL)."""
    from . import published, stable_diffusion
    from .checkpoint import save_part
    from .whole_file import appearing

    _check_new(out)
    _check_part(part)
    path = Path(source)
    if not path.exists():
        if not published.is_repository(source):
            raise ValueError(f"there is no file or folder {source!r:.80}; for the hub write {published.HUB}OWNER/NAME")
        path = published.fetch(source)
    if part is None and stable_diffusion.is_system(path):
        system = stable_diffusion.load(
            path, name or "imported/stable-diffusion", licence, image_size, prediction, tokenizer
        )
        with appearing(out) as folder:
            system.save(folder, Path(source).name)
        for each, weights in system.weights.items():
            typer.echo(f"{each}: {sum(value.numel() for value in weights.values()):,d} numbers")
    else:
        if prediction is not None or tokenizer is not None:
            raise ValueError(
                "--prediction and --tokenizer are of a whole Stable Diffusion, not of a tokenizer; leave them out"
            )
        section, weights = published.load(path, image_size)
        recipe = published.recipe_of(name or "imported/tokenizer", section, licence)
        with appearing(out) as folder:
            digest = save_part(folder, recipe, "tokenizer", weights, source=Path(source).name)
        numbers = sum(value.numel() for value in weights.values())
        typer.echo(f"{section['kind']}, {numbers:,d} numbers, hash {digest[:12]}")
    typer.echo(str(out))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a name, a model folder or a run folder")],
    out: Annotated[Path, typer.Argument(help="the folder to make")],
    to: Annotated[str, typer.Option(help="whose format: diffusers")] = "diffusers",
    part: Annotated[str | None, typer.Option(help="tokenizer: only this of a diffusion model")] = None,
) -> None:
    """Write a diffusion model, or else the tokenizer of a model, as a folder that diffusers loads."""
    from . import diffusers_folder, notices, published
    from .checkpoint import load_recipe, load_weights
    from .known_models import find_model
    from .whole_file import appearing

    if to != "diffusers":
        raise ValueError(f"--to {to!r} is unknown; valid: diffusers")
    _check_part(part)
    _check_new(out)
    folder = find_model(model)
    recipe = load_recipe(folder)
    prior = recipe.parts.get("prior", {}).get("kind")
    whole = prior == "unet" and part is None
    if not whole and "tokenizer" not in recipe.parts:
        raise ValueError(f"{model} has no tokenizer, only {', '.join(recipe.parts)}; export another model")
    with appearing(out) as made:
        if whole:
            diffusers_folder.save(folder, made)
        else:
            published.save_diffusers(made, recipe.parts["tokenizer"], load_weights(folder, "tokenizer"))
        notices.copy(folder / "LICENSES", made)
    if prior is not None and part is None and not whole:
        typer.echo(f"the tokenizer alone: diffusers has no pipeline for a prior {prior}", err=True)
    typer.echo(str(out))


def _check_part(part: str | None) -> None:
    if part not in (None, "tokenizer"):
        raise ValueError(f"--part {part!r:.40} is unknown; valid: tokenizer")


def _check_new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is there already; give the name of a folder to make")


def check_keep(keep: int, candidates: int) -> None:
    """Raises ValueError before anything is loaded."""
    if keep > candidates:
        raise ValueError(f"--keep must be at most --candidates, got {keep} of {candidates}; paint more candidates")


def given(**knobs: Any) -> dict[str, Any]:
    """The options that were given; the others are the model's own."""
    return {name: value for name, value in knobs.items() if value is not None}


def tell(path: Path, facts: dict[str, Any], as_json: bool) -> None:
    """A line for a picture that was written."""
    typer.echo(json.dumps({"file": str(path), **facts}, ensure_ascii=False) if as_json else str(path))


def load(model: str | Path, device: str, dtype: str, reranker: str | None = None, weights: str | None = None) -> Any:
    """A text-to-image system. Raises ValueError for a device or type that is not here, and as loading does."""
    from .recipe import nearest
    from .text_to_image import DTYPES, TextToImage

    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; {nearest(dtype, list(DTYPES))}")
    if weights and not reranker:
        raise ValueError("--reranker-pretrained names the weights of --reranker, which is missing; give both")
    place, scorer = device_named(device), None
    if reranker:
        from .rerank import OpenCLIPScorer

        scorer = OpenCLIPScorer(reranker, weights, place)
    return TextToImage.load(model, device=place, dtype=DTYPES[dtype], reranker=scorer)


def device_named(name: str) -> str:
    import torch

    from .checkpoint import default_device

    if name == "auto":
        return default_device()
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name!r} is not here ({reason}); take cpu, or auto to have one chosen") from None
    return name
