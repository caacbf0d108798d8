"""The commands that prepare data: `kartina data pack | mirror | check | emoji | avatars | encode`.

Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from ...pipeline.commands import Device, device_named

app = typer.Typer(help="Pack, check and prepare pictures with captions.", no_args_is_help=True)


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="a folder of pictures or of .parquet files, or hf-hub:OWNER/NAME")],
    out: Path,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="pack pictures without a caption too")] = False,
    caption: Annotated[str | None, typer.Option(help="column of the captions; by default text or caption")] = None,
    picture: Annotated[
        str | None, typer.Option(help="column of a data set's pictures; by default the only one")
    ] = None,
    split: Annotated[str | None, typer.Option(help="of a data set; train if absent")] = None,
    licence: Annotated[str | None, typer.Option(help="of the pictures: what is trained on them must name it")] = None,
) -> None:
    """Pack pictures with captions into WebDataset shards.

    In a folder captions lie beside the pictures, in x.txt for x.jpg, one a line, or in a metadata.jsonl, .csv or
    .parquet with the columns file_name and text. Data sets of Hugging Face have them in columns.
    """
    from ...pipeline.terminal import tell
    from ..packing import pack as pack_pictures

    report = pack_pictures(source, out, samples_per_shard, no_captions, caption, picture, split, licence)
    without = f", {report.captionless} without a caption" if report.captionless else ""
    several = f", {report.several} with several captions, a line each" if report.several else ""
    typer.echo(f"packed {report.packed} samples into {out}{without}{several}")
    found: dict[str, list[str] | dict[str, str]] = {
        "no caption": report.no_caption,
        "no picture": report.no_picture,
        "duplicate (packed)": report.duplicates,
        "not a picture or caption": report.ignored,
        "bad": report.bad,
    }
    tell(found)
    if counts := ", ".join(f"{len(names)} {finding}" for finding, names in found.items() if names):
        typer.echo(f"found: {counts}")


@app.command()
def mirror(
    address: Annotated[str, typer.Argument(help="of a folder, or of shards: https://host/x-{000000..000123}.tar")],
    out: Annotated[Path, typer.Argument(help="the folder that is trained from as if the shards lay there")],
    keep: Annotated[float, typer.Option(min=0, help="GB of shards that may lie there at a time")] = 100.0,
) -> None:
    """Train from shards that lie elsewhere (https, s3, gs ...): each is fetched when it is read."""
    from ..mirror import make

    rows = make(address, out, keep * 1e9)
    typer.echo(f"{len(rows)} shards, {sum(row.bytes for row in rows.values()) / 1e9:.3g} GB; train from {out}")


@app.command()
def check(shards: Path) -> None:
    """Read every sample of the shards; name each bad one with its reason, exit with 1 if there is any."""
    from ...pipeline.terminal import tell
    from ..shards import check_shards

    report = check_shards(shards)
    typer.echo(f"read {report.samples} samples, {len(report.bad)} bad, {len(report.shards)} shards with findings")
    tell({"shard": report.shards, "bad": report.bad})
    if report.bad or report.shards:
        raise typer.Exit(1)


@app.command()
def emoji(
    out: Path,
    packed: Annotated[Path | None, typer.Option(help="a folder with the .tgz files of npm pack")] = None,
    size: int = 64,
    per_concept: Annotated[int, typer.Option(help="records of each concept")] = 16,
    coloured: Annotated[float, typer.Option(help="share of them on one of twelve backgrounds, white too")] = 0.25,
) -> None:
    """Fetch Noto and Fluent emoji with your npm, rasterise them, and write shards with their licence notices."""
    from ...pipeline.terminal import tell
    from .emoji import prepare

    report = prepare(out, packed=packed, size=size, per_concept=per_concept, coloured=coloured)
    typer.echo(f"{report.samples} samples of {report.concepts} concepts in {out}; held out: {report.held_out}")
    tell({"left out": report.left_out, "not the shipped models' version": report.other_versions})


@app.command()
def avatars(
    out: Path,
    count: Annotated[int, typer.Option(help="avatars to train on")] = 20_000,
    held_out: Annotated[int, typer.Option(help="avatars of compositions that training never shows")] = 2_000,
    size: int = 64,
    seed: int = 0,
) -> None:
    """Draw faces with exact attributes (CC0 art of DiceBear), and write shards with captions in two languages."""
    from .avatars import prepare

    report = prepare(out, count, held_out, size, seed)
    typer.echo(f"{report.samples} avatars in {out}, {report.held_out} in {out / 'held_out'}")
    for name, values in report.drawn.items():
        typer.echo(f"  {name}: {', '.join(f'{value} {number}' for value, number in values.items())}")


@app.command()
def encode(
    shards: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="a model's name or folder")],
    what: Annotated[list[str] | None, typer.Option(help="codes, latents, text_tokens, image_embedding ...")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="one for each core or GPU if absent")] = None,
    device: Device = "auto",
) -> None:
    """Write what a model's frozen parts make of shards, codes by default, to train from; run it again to go on."""
    from ...pipeline.terminal import tell
    from ..encode import encode as encode_shards

    report = encode_shards(shards, out, model, what or ["codes"], processes, device_named(device))
    typer.echo(f"{out}: {report.samples} samples; shards: {report.written} written, {report.kept} were there")
    tell({"still being written by another process": report.left, "bad": report.bad})
