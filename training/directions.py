"""Directions of attributes in the latents of a trained tokenizer, from labelled pictures, for resynthesis.

The direction of an attribute is the difference of the means of the latents with and without it. How far a picture has
gone along it is read by the linear discriminant (Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x), scaled to -1 and
1 at the two means.

N pictures, D values of the latents of a picture, K attributes.

It does not know how a picture is moved (`kartina.pipeline.resynthesis` does), nor how well.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipeline.resynthesis import Resynthesis, load_latents, save_directions
from ..pipeline.terminal import progress_bar
from .data.labelled import Labelled, attributes_of, read_labelled

_CHUNK = 128
_RIDGE = 1e-3  # of the mean variance: latents that the tokenizer does not use vary by nothing


def has(data: Labelled) -> Tensor:
    """Which picture has which attribute of `attributes_of`, bool (N, K)."""
    places = {name: place for place, name in enumerate(data.fields)}
    columns = []
    for one in attributes_of(data.fields):
        wanted = torch.tensor([data.fields[one.field].index(value) for value in one.values])
        columns.append(torch.isin(data.labels[:, places[one.field]], wanted))
    return torch.stack(columns, dim=1)


def directions(latents: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """latents (N, D), labels bool (N, K) -> `directions` and `readers` (K, D), `biases` (K,); see `Resynthesis`.

    Raises ValueError for an attribute that all pictures have, or none.
    """
    z = latents.double()
    found: dict[str, list[Tensor]] = {"directions": [], "readers": [], "biases": []}
    for one in labels.T:
        if one.all() or not one.any():
            raise ValueError(f"an attribute needs pictures with it and without it, got {int(one.sum())} of {len(one)}")
        with_it, without = z[one], z[~one]
        means = with_it.mean(0), without.mean(0)
        way = means[0] - means[1]  # (D,)
        within = torch.cat([with_it - means[0], without - means[1]])
        covariance = within.T @ within / len(z)
        covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(z.shape[1], dtype=z.dtype)
        reader = torch.linalg.solve(covariance, way)
        reader *= 2 / (reader @ way)
        found["directions"].append(way)
        found["readers"].append(reader)
        found["biases"].append(-(reader @ (means[0] + means[1])) / 2)
    return {name: torch.stack(rows).float() for name, rows in found.items()}


@torch.no_grad()
def encode(tokenizer: Any, data: Labelled) -> Tensor:
    """The latents of all pictures, without noise, float32 (N, D)."""
    found = []
    with progress_bar("encoding", transient=True) as report:
        for start in range(0, len(data.pixels), _CHUNK):
            images = data.images(slice(start, start + _CHUNK))
            device = next(tokenizer.parameters()).device
            found.append(tokenizer.encode(images.to(device)).flatten(1).float().cpu())
            report(min(start + _CHUNK, len(data.pixels)), len(data.pixels))
    return torch.cat(found)


def find_directions(folder: Path, data: Path, limit: int, device: str = "cpu") -> Resynthesis:
    """Finds the directions of all attributes from the first `limit` pictures, and keeps them in the model folder.

    Raises ValueError for data without attributes, and ModelError for a model without latents.
    """
    tokenizer = load_latents(folder, device)
    labelled = read_labelled(data, tokenizer.image_size, limit)
    weights = directions(encode(tokenizer, labelled), has(labelled))
    names = [one.name for one in attributes_of(labelled.fields)]
    save_directions(folder, names, weights, pictures=len(labelled.pixels))
    return Resynthesis(tokenizer, names, {key: value.to(device) for key, value in weights.items()})
