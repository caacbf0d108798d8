"""The commands that explain: `kartina show latents | codebook | gumbel | diffusion`, each a picture with its numbers.

Nothing heavy is imported before a command runs.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from ...pipeline.commands import Device, Json, device_named

app = typer.Typer(help="Draw what latent spaces, codebooks and relaxations look like.", no_args_is_help=True)


@app.command()
def latents(
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/latents.png"),
    steps: Annotated[int, typer.Option(min=1, help="of training, for each of the five models")] = 300,
    data: Annotated[str, typer.Option(help="what they learn: digits, or shapes")] = "digits",
    prior: Annotated[str, typer.Option(help="of the adversarial one: standard, mixture, swiss_roll")] = "standard",
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train five small autoencoders with two latents each, and draw their latent spaces side by side."""
    import torch

    from ...pipeline import gallery
    from ...pipeline.images import save_png
    from ...pipeline.terminal import progress_bar
    from . import latents as comparing
    from .latents_picture import picture, report

    gallery.check_target(out)
    with progress_bar("training five models") as progress:
        found = comparing.compare(data, steps, seed, prior, torch.device(device_named(device)), progress)
    facts = {"data": data, "steps": steps, "seed": seed, "prior": prior}
    facts |= {"models": {one.model.name: one.numbers for one in found}}
    path = gallery.targets(out, 1)[0]
    save_png(picture(found, data, f"latent spaces: {data}, {steps} steps of {comparing.BATCH} pictures"), path, facts)
    typer.echo(json.dumps({"file": str(path), **facts}) if as_json else f"{report(found)}{path}")


@app.command()
def codebook(
    model: Annotated[str, typer.Option(help="a model's name or folder")],
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/codebook.png"),
    data: Annotated[Path | None, typer.Option(help="shards; by default shapes, if it was trained on them")] = None,
    images: Annotated[int, typer.Option(min=1, help="pictures over which codes are counted")] = 1024,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw what each code of a model paints, the most frequent first, and how often each occurs."""
    import torch

    from ...pipeline import gallery
    from ...pipeline.images import save_png
    from . import codebook as drawing

    gallery.check_target(out)
    place = torch.device(device_named(device))
    tokenizer, source = drawing.load(model, data, place)
    numbers, pairs = drawing.measure(tokenizer, source, images, place)
    facts = {"model": model, **numbers}
    path = gallery.targets(out, 1)[0]
    save_png(drawing.picture(tokenizer, numbers, pairs, f"the codebook of {model}"), path, facts)
    if as_json:
        typer.echo(json.dumps({"file": str(path), **facts}))
        return
    typer.echo(
        f"{numbers['usage']:.1%} of {numbers['num_codes']} codes occur in {numbers['images']} pictures, perplexity "
        f"{numbers['perplexity']:.1f} ({numbers['entropy_bits']:.2f} bits a code), {numbers['psnr']:.1f} dB\n{path}"
    )


@app.command()
def gumbel(
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/gumbel.png"),
    model: Annotated[str | None, typer.Option(help="a dVAE, whose pictures are decoded at each temperature")] = None,
    data: Annotated[Path | None, typer.Option(help="shards; by default shapes, if it was trained on them")] = None,
    logits: Annotated[str, typer.Option(help="numbers between commas")] = "2,1,0.5,0,-1",
    temperatures: Annotated[str, typer.Option(help="numbers between commas")] = "0.1,0.5,1,2,5",
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Draw what the temperature of a Gumbel-softmax does to its draws, and to a model's reconstructions."""
    import torch

    from ...pipeline import gallery
    from ...pipeline.images import save_png
    from . import codebook as models
    from . import gumbel as drawing

    gallery.check_target(out)
    images, tokenizer = None, None
    given, wanted = _numbers(logits, "--logits"), _numbers(temperatures, "--temperatures")
    if model is not None:
        tokenizer, source = models.load(model, data, torch.device("cpu"))
        batch = source.read(range(8))
        images = batch.image[batch.weight > 0]
        if not len(images):
            raise ValueError("none of the first 8 pictures can be read; look at them with `kartina data check`")
    page, numbers = drawing.picture(given, wanted, seed, tokenizer, images)
    facts = {"model": model, "logits": given, "seed": seed, "temperatures": numbers}
    path = gallery.targets(out, 1)[0]
    save_png(page, path, facts)
    if as_json:
        typer.echo(json.dumps({"file": str(path), **facts}))
        return
    for found in numbers:
        decoded = f", decoded {found['psnr']:.1f} dB" if "psnr" in found else ""
        typer.echo(f"temperature {found['temperature']:g}: largest weight {found['peak']:.3f} in the mean{decoded}")
    typer.echo(str(path))


@app.command()
def diffusion(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP; its centre square is shown")],
    model: Annotated[str | None, typer.Option(help="a diffusion model: its noise, and its way back")] = None,
    prompt: Annotated[str, typer.Option(help="the caption of the way back")] = "",
    timesteps: Annotated[int, typer.Option(help="that are shown")] = 8,
    steps: Annotated[int | None, typer.Option(help="of the way back; by default the model's own")] = None,
    sampler: Annotated[str | None, typer.Option(help="of the way back; by default the model's own")] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1)] = 0,
    out: Annotated[Path, typer.Option(help="a .png file, or a folder")] = Path("out/diffusion.png"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw how diffusion noises a picture, in pixels and latents, and how a model finds a picture in noise."""
    from ...pipeline import gallery
    from ...pipeline.commands import given, load
    from ...pipeline.images import PHOTOS, read_picture, save_png
    from ...pipeline.terminal import progress_bar
    from . import diffusion as drawing

    gallery.check_target(out)
    shown = read_picture(image, PHOTOS)
    if model is None:
        if prompt or steps is not None or sampler is not None:
            raise ValueError("--prompt, --steps and --sampler are of a model's way back; name one with --model")
        page, found = drawing.schedules(shown, timesteps, seed)
    else:
        system = load(model, device, "float32")
        with progress_bar("from noise") as progress:
            page, found = drawing.of_model(
                shown, system, prompt, timesteps, seed, progress, **given(num_steps=steps, sampler=sampler)
            )
    facts = {"model": model, "prompt": prompt, "seed": seed, "timesteps": found}
    path = gallery.targets(out, 1)[0]
    save_png(page, path, facts)
    typer.echo(json.dumps({"file": str(path), **facts}) if as_json else f"{drawing.report(found)}{path}")


def _numbers(text: str, option: str) -> list[float]:
    """Finite numbers between commas."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [float("nan")]
    if any(not abs(value) < float("inf") for value in found):
        raise ValueError(f"{option} takes numbers between commas, as 2,1,0.5, got {text!r}")
    return found
