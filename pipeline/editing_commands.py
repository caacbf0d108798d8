"""The commands that start from a picture, or from two captions: `kartina edit | interpolate`.

Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from .commands import OWN, Device, Json, MicroBatch, Reranker, RerankerWeights, check_keep, given, load, tell

app = typer.Typer()

Model = Annotated[str, typer.Option(help="a diffusion model's name or folder")]
MODEL = "shapes/stable-diffusion"
Steps = Annotated[int | None, typer.Option(help=f"from noise to picture, of which an edit takes a share; {OWN}")]
Sampler = Annotated[str | None, typer.Option(help=f"ddim, dpmpp_2m, unipc ...; {OWN}")]
Guidance = Annotated[float | None, typer.Option(help=f"above 1: closer to the caption; {OWN}")]
Negative = Annotated[str | None, typer.Option(help="what guidance leads away from")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Out = Annotated[Path, typer.Option(help="a .png file, or a folder")]


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="the picture: PNG, JPEG or WebP")],
    prompt: Annotated[str, typer.Option(help="the caption of what it is to become")],
    model: Model = MODEL,
    strength: Annotated[float | None, typer.Option(help="in (0, 1]: 1 forgets the picture; 0.8, with a mask 1")] = None,
    mask: Annotated[Path | None, typer.Option(help="a picture of its size, white where it is painted anew")] = None,
    invert: Annotated[
        str | None, typer.Option(help="its caption as it is: DDIM finds its noise, which is kept")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="a picture of another size: crop or stretch")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="pictures painted")] = 1,
    keep: Annotated[int | None, typer.Option(min=1, help="best pictures kept; by default all")] = None,
    seed: Annotated[int, typer.Option(help="of the first candidate; the next has the next number")] = 0,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Annotated[float | None, typer.Option(help="of ddim: 0 draws no noise on the way, 1 as much as ddpm")] = None,
    guidance: Guidance = None,
    negative: Negative = None,
    reranker: Reranker = None,
    reranker_pretrained: RerankerWeights = None,
    device: Device = "auto",
    dtype: DType = "float32",
    micro_batch: MicroBatch = None,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Paint over a picture, or over what a mask marks of it, after a caption."""
    from . import gallery
    from .images import PHOTOS, read_picture
    from .terminal import progress_bar

    kept = candidates if keep is None else keep
    check_keep(kept, candidates)
    picture = read_picture(image, PHOTOS)
    marked = None if mask is None else read_picture(mask, PHOTOS, under="black")
    gallery.check_target(out)
    system = load(model, device, dtype, reranker, reranker_pretrained)
    knobs = given(num_steps=steps, sampler=sampler, eta=eta, guidance_scale=guidance, negative=negative)
    how = {"strength": strength, "mask": marked, "invert": invert, "fit": fit, "micro_batch": micro_batch}
    with progress_bar("editing") as progress:
        paintings = system.edit(
            picture, prompt, **how, seed=seed, candidates=candidates, keep=kept, progress=progress, **knobs
        )
    for path, entry in gallery.save(paintings, gallery.targets(out, len(paintings))):
        tell(path, entry, as_json)


@app.command()
def interpolate(
    first: Annotated[str, typer.Argument(help="the caption of the first picture")],
    second: Annotated[str, typer.Argument(help="the caption of the last one")],
    model: Model = MODEL,
    frames: Annotated[int, typer.Option(help="pictures, both ends among them")] = 8,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    to_seed: Annotated[int | None, typer.Option(help="of the last picture's noise; the same")] = None,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    negative: Negative = None,
    device: Device = "auto",
    dtype: DType = "float32",
    micro_batch: MicroBatch = None,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Paint the way from one caption to another, and from one noise to another, as a strip."""
    from . import gallery
    from .images import grid, save_png
    from .terminal import progress_bar

    gallery.check_target(out)
    system = load(model, device, dtype)
    knobs = given(num_steps=steps, sampler=sampler, guidance_scale=guidance, negative=negative)
    with progress_bar("painting") as progress:
        pictures = system.interpolate(
            first,
            second,
            frames=frames,
            seed=seed,
            to_seed=to_seed,
            progress=progress,
            micro_batch=micro_batch,
            **knobs,
        )
    facts = {"prompts": [first, second], "seeds": [seed, seed if to_seed is None else to_seed], "frames": frames}
    facts |= {"model": system.recipe.name, "model_hash": system.model_hash, "knobs": knobs}
    captions = [first, *[""] * (frames - 2), second]
    scale, path = max(1, gallery.CELL // pictures[0].width), gallery.targets(out, 1, grid=True)[0]
    save_png(grid(pictures, columns=frames, captions=captions, scale=scale), path, facts)
    tell(path, facts, as_json)
