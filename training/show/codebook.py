"""The codebook of a model: what each code paints, how often each occurs, and how many are in use.

B images, K codes on a grid of h x w, P x Q the pixels that a code covers.

It does not know how the codebook was trained.
"""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...layers.precision import full
from ...pipeline import checkpoint
from ...pipeline.images import grid, to_pil
from ...pipeline.known_models import find_model
from ...tokenizers.vqgan import VQGAN, VQLatents
from ..objectives.dvae import codebook_use, counts_by_image
from ..run import Data
from ..sources import source_of
from ..stages.contract import psnr
from .panels import Column, bars, page

_CHUNK, _MOST, _TILE, _COLUMNS = 64, 1024, 20, 28  # most: codes that are drawn; tile: pixels a side, about


def load(model: str, data: Path | None, device: torch.device) -> tuple[Any, Any]:
    """The tokenizer of a model, and a source of pictures: `shapes` as it was trained on them, or shards.

    Raises ModelError where the model has none, or no codes, and ValueError where data is needed and not named.
    """
    folder = find_model(model)
    recipe, tokenizer = checkpoint.load_tokenizer(folder, device)
    if isinstance(tokenizer, VQLatents):  # whose prior reads latents, and whose decoder makes codes of them
        encode, decode = (partial(method, tokenizer) for method in (VQGAN.encode, VQGAN.decode))
        tokenizer = SimpleNamespace(spec=tokenizer.codes, encode=encode, decode=decode)
    if tokenizer.spec.kind != "codes":
        raise checkpoint.ModelError(
            f"{folder}: its tokenizer ({recipe.parts['tokenizer']['kind']}) gives latents, not codes; "
            "name a dVAE, VQ-VAE or VQ-GAN"
        )
    given = recipe.training.get("data", {})
    if data is None and given.get("kind") != "shapes":
        raise ValueError(f"{model} was not trained on shapes; name the shards it is shown with --data FOLDER")
    # Of an untrusted recipe words and numbers are believed, paths are not.
    shown = {name: given[name] for name in ("levels", "jitter") if name in given}
    wanted = Data(kind="shapes", **shown) if data is None else Data(kind="shards", shards=str(data), validation_share=0)
    return tokenizer, source_of(recipe, wanted)


@torch.no_grad()
def measure(tokenizer: Any, source: Any, images: int, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Numbers over so many pictures, and the first 12 of these beside what their codes give back, (24, 3, H, W).

    `usage`, `perplexity` as in `objectives.dvae`, `entropy_bits` of a code, `psnr`, and `counts`, a number for each of
    the K codes. Raises ValueError where no picture can be read.
    """
    total = min(images, source.size or images)
    counts = torch.zeros(tokenizer.spec.vocabulary, dtype=torch.float64, device=device)
    likeness, pairs = [], []
    for start in range(0, total, _CHUNK):
        batch = source.read(range(start, min(total, start + _CHUNK)))
        image = batch.image[batch.weight > 0].to(device)
        codes = tokenizer.encode(image)
        again = full(tokenizer.decode(codes)).clamp(-1, 1)
        counts += counts_by_image(codes, len(counts)).sum(0)
        likeness.append(psnr(again, image))
        pairs.append(torch.stack([image, again], 1).flatten(0, 1)[: 24 if not start else 0])
    if not counts.sum():
        raise ValueError(f"none of {total} pictures can be read; look at them with `kartina data check`")
    use = codebook_use(counts)
    numbers = {name: float(value) for name, value in use.items()}
    numbers |= {"entropy_bits": math.log2(numbers["perplexity"]), "psnr": float(torch.cat(likeness).mean())}
    facts = {"num_codes": len(counts), "images": len(torch.cat(likeness)), "counts": counts.long().tolist()}
    return numbers | facts, torch.cat(pairs)


@torch.no_grad()
def tiles(tokenizer: Any, codes: Tensor) -> list[Image.Image]:
    """What each of codes (N,) paints: the middle P x Q pixels of a picture of this code alone."""
    (h, w), found = tokenizer.spec.shape, []
    for part in codes.split(_CHUNK):
        image = full(tokenizer.decode(part[:, None, None].expand(-1, h, w).contiguous()))
        p, q = image.shape[2] // h, image.shape[3] // w
        found += to_pil(image[:, :, h // 2 * p : (h // 2 + 1) * p, w // 2 * q : (w // 2 + 1) * q])
    return found


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Tiles row by row, a thin grey line between them."""
    width, height = pictures[0].size
    scale = max(1, _TILE // max(width, height))
    width, height = scale * width + 1, scale * height + 1
    columns = max(1, _COLUMNS * (_TILE + 1) // width)
    canvas = Image.new("RGB", (columns * width - 1, -(-len(pictures) // columns) * height - 1), "#777777")
    for i, tile in enumerate(pictures):
        drawn = tile.resize((width - 1, height - 1), Image.Resampling.NEAREST)
        canvas.paste(drawn, (i % columns * width, i // columns * height))
    return canvas


def picture(tokenizer: Any, numbers: dict[str, Any], pairs: Tensor, title: str) -> Image.Image:
    """The page: the codes by use, those that never occur, how often each does, and reconstructions."""
    counts = torch.tensor(numbers["counts"], device=pairs.device)
    order = counts.argsort(descending=True, stable=True)
    used, idle = order[counts[order] > 0], order[counts[order] == 0]
    codes = Column("what each code paints: the middle of a picture of it alone", [])
    codes.pictures.append(
        (_of("codes that occur, the most frequent first", used), sheet(tiles(tokenizer, used[:_MOST])))
    )
    if len(idle):
        codes.pictures.append((_of("codes that never occur", idle), sheet(tiles(tokenizer, idle[:_MOST]))))
    lines = [
        f"{numbers['usage']:.1%} of {numbers['num_codes']:,} codes occur in {numbers['images']:,} pictures; "
        f"perplexity {numbers['perplexity']:.1f}",
    ]
    use = Column("how often each occurs", lines)
    share = (counts[used] / counts.sum()).tolist()
    use.pictures.append(("share of each among all, on a scale of logarithms", bars(share, log=True)))
    scale = max(1, 64 // pairs.shape[-1])
    use.pictures.append(
        (f"pictures and what their codes give back, {numbers['psnr']:.1f} dB", grid(pairs, 6, scale=scale))
    )
    return page(title, [codes, use])


def _of(what: str, codes: Tensor) -> str:
    return f"{len(codes):,} {what}" + (f"; {_MOST:,} of them" if len(codes) > _MOST else "")
