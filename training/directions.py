"""Where attributes lie in the latents of a trained tokenizer, from labelled pictures, for resynthesis.

Each value of a field has the mean of its pictures' latents; the covariance within the values says which directions
tell them apart, and is shared by the values of a field, as linear discriminants have it (Rao 1948,
doi:10.1111/j.2517-6161.1948.tb00008.x). How far beyond the mean a move must go differs from value to value: it is
tried on pictures that the means do not know, which a small reader judges once they are decoded. That reader is
trained here; the suite's own (see `attribute_reader`) chooses nothing.

N pictures, F fields, V values of all of them, D values of the latents of a picture.

It does not know how a picture is moved (`kartina.pipeline.resynthesis` does), nor how well on other pictures.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipeline.resynthesis import Fields, Resynthesis, load_latents, save_directions
from ..pipeline.terminal import progress_bar
from .data.labelled import Labelled, attributes_of, read_labelled
from .evaluation.attribute_reader import AttributeReader, train_reader

LENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
_CHUNK = 128
_RIDGE = 1e-3  # of the mean variance: latents that the tokenizer does not use vary by nothing
_TRIED, _NEAR = 50, 0.02  # pictures of each value and length; the shortest so near to the best is chosen
_SHARE, _SEED = 5, 1  # one picture in so many is kept for the lengths; of their reader, 0 is the suite's


def means_of(latents: Tensor, labels: Tensor, fields: Fields) -> dict[str, Tensor]:
    """latents (N, D), labels (N, F) -> `origins`, `means`, `readers`, and `lengths` of 1; see `Resynthesis`.

    Raises ValueError for a value that no picture has.
    """
    z = latents.double()
    found: dict[str, list[Tensor]] = {"origins": [], "means": [], "readers": []}
    for (field, values), own in zip(fields.items(), labels.T, strict=True):
        counts = own.bincount(minlength=len(values))
        if not counts.all():
            raise ValueError(f"no picture of {len(z)} has {field}:{values[int(counts.argmin())]}; take more of them")
        means = torch.stack([z[own == place].mean(0) for place in range(len(values))])
        within = z - means[own]
        covariance = within.T @ within / len(z)
        covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(z.shape[1], dtype=z.dtype)
        origin = means.mean(0)
        found["origins"].append(origin[None])
        found["means"].append(means - origin)
        found["readers"].append(torch.linalg.solve(covariance, (means - origin).T).T)
    weights = {name: torch.cat(rows).float() for name, rows in found.items()}
    return weights | {"lengths": torch.ones(len(weights["means"]))}


@torch.no_grad()
def choose_lengths(
    system: Resynthesis, fields: Fields, latents: Tensor, labels: Tensor, reader: AttributeReader
) -> Tensor:
    """The length (V,) at which most pictures without a value are read as having it; the latents' are (N, D).

    Of those that are near to the best, the shortest. Raises ValueError where all pictures have one value of a field.
    """
    device, shape = system.weights["means"].device, system.tokenizer.spec.shape
    steps = [(number, field, place) for number, field in enumerate(fields) for place in range(len(fields[field]))]
    chosen = []
    with progress_bar("choosing lengths", transient=True) as report:
        for turn, (number, field, place) in enumerate(steps):
            rows = (labels[:, number] != place).nonzero()[:_TRIED, 0]
            if not len(rows):
                raise ValueError(
                    f"all of {len(labels)} pictures have {field}:{fields[field][place]}; take more of them"
                )
            z, shares = latents[rows].to(device), []
            far = system.put(z, field, [place])
            one = system.weights["means"][turn]  # at length 1
            for length in LENGTHS:
                image = system.tokenizer.decode((far + (length - 1) * one).unflatten(1, shape))
                shares.append(float((reader.read(image.float().cpu())[:, number] == place).float().mean()))
            chosen.append(next(n for n, share in zip(LENGTHS, shares, strict=True) if share >= max(shares) - _NEAR))
            report(turn + 1, len(steps))
    return torch.tensor(chosen)


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
    """Finds where all attributes lie from the first `limit` pictures, and keeps it in the model folder.

    Raises ValueError for data without attributes, or too few of them, and ModelError for a model without latents.
    """
    tokenizer = load_latents(folder, device)
    labelled = read_labelled(data, tokenizer.image_size, limit)
    fields, latents, labels = labelled.fields, encode(tokenizer, labelled), labelled.labels
    known = len(latents) - len(latents) // _SHARE
    weights = {k: w.to(device) for k, w in means_of(latents[:known], labels[:known], fields).items()}
    attributes = {one.name: (one.field, one.values) for one in attributes_of(fields)}
    system = Resynthesis(tokenizer, fields, attributes, weights)
    reader = train_reader(Labelled(fields, labelled.pixels[:known], labels[:known]), seed=_SEED)
    weights["lengths"] = choose_lengths(system, fields, latents[known:], labels[known:], reader).to(device)
    save_directions(folder, fields, attributes, weights, pictures=len(latents))
    return system
