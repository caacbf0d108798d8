"""Resynthesis: a picture is encoded, moved to where an attribute's pictures lie, and decoded.

Moved are the latents of a tokenizer (Larsen 2016, arXiv:1512.09300, section 4.2, and White 2016, arXiv:1609.04468,
section 3.4). Of a latent, the part that tells the values of the attribute's field apart, by the linear discriminants
(Rao 1948, doi:10.1111/j.2517-6161.1948.tb00008.x), is replaced by that of the mean of the wanted value, at a length
chosen for each value; the rest stays. A model folder holds this in attributes.safetensors, and in attributes.json the
names and the hash of the tokenizer that it belongs to.

B pictures, F fields, V values of all of them, v of one, D values of the latents of a picture.

It does not know how means and lengths are found (`kartina.training.directions` does), nor whether a move succeeds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import checkpoint
from .images import fit, grid, to_pil
from .known_models import find_model
from .recipe import nearest
from .whole_file import save_tensors

WEIGHTS, FACTS = "attributes.safetensors", "attributes.json"
STEPS = (0.0, 0.5, 1.0, 1.5)  # of the strength, in a row of `sheets`
_CELL = 128  # pixels a side of a picture in it

Fields = Mapping[str, Sequence[str]]  # {field: its values}
Attributes = Mapping[str, tuple[str, Sequence[str]]]  # {name: (field, the values that have it)}


class Resynthesis:
    """A tokenizer, and where in its latents the values of attributes lie.

    weights, with a row for each value of all fields in their order: `origins` (F, D), of each field the middle of the
    means of its values; `means` (V, D) of the latents with a value, less that origin; `readers` (V, D), the means times
    the inverse covariance within the values; `lengths` (V,), by which a move multiplies the means.
    """

    def __init__(self, tokenizer: Any, fields: Fields, attributes: Attributes, weights: Mapping[str, Tensor]) -> None:
        self.tokenizer, self.names, self.weights = tokenizer, list(attributes), weights
        self._fields, self._attributes = {name: list(values) for name, values in fields.items()}, attributes

    @classmethod
    def load(cls, model: str | Path, device: Any = "cpu") -> "Resynthesis":
        """From a model folder, by name or path. Raises ModelError where it has no directions, or those of another."""
        folder = find_model(str(model))
        tokenizer = load_latents(folder, device)
        digest = checkpoint.read_card(folder)["parts"]["tokenizer"]["hash"]
        if not (folder / FACTS).is_file():
            raise checkpoint.ModelError(f"{folder} has no {FACTS}; find them: kartina directions DATA --model {model}")
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            fields = {str(name): [str(value) for value in values] for name, values in facts["fields"].items()}
            attributes = {str(name): (field, values) for name, (field, values) in facts["attributes"].items()}
            for name, (field, having) in attributes.items():
                if not set() < {*having} < {*fields[field]}:
                    raise ValueError(f"{name}: some values of {field}, not all, got {having!r:.60}")
            owner, weights = facts["tokenizer"], load_file(folder / WEIGHTS)
            shapes = {key: tuple(value.shape) for key, value in weights.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise checkpoint.ModelError(
                f"{folder}/{FACTS} or {WEIGHTS} is damaged ({error!r}); find them again"
            ) from None
        if owner != digest or facts.get("weights") != checkpoint.part_hash(weights):
            raise checkpoint.ModelError(f"{folder}/{WEIGHTS} belongs to another tokenizer; find the directions again")
        size, count = int(torch.Size(tokenizer.spec.shape).numel()), sum(map(len, fields.values()))
        expected = {
            "origins": (len(fields), size),
            "means": (count, size),
            "readers": (count, size),
            "lengths": (count,),
        }
        if shapes != expected:
            raise checkpoint.ModelError(f"{folder}/{WEIGHTS}: expected {expected}, got {shapes}; find them again")
        return cls(tokenizer, fields, attributes, {key: value.float().to(device) for key, value in weights.items()})

    def move(self, latents: Tensor, moves: Mapping[str, float], strength: float = 1.0) -> Tensor:
        """Latents (B, ...) moved by {attribute: sign}, one after the other; of the same shape.

        A picture is moved to the nearest value that has the attribute, or at -1 to the nearest that has it not.
        strength: 0 leaves it as it is, 1 is the whole way. Raises ValueError for an unknown attribute.
        """
        for name in moves:
            if name not in self.names:
                raise ValueError(f"no attribute {name!r} in this model; {nearest(name, self.names)}")
        start = moved = latents.flatten(1).float()
        for name, sign in moves.items():
            field, having = self._attributes[name]
            wanted = [place for place, value in enumerate(self._fields[field]) if (value in having) == (sign > 0)]
            moved = self.put(moved, field, wanted)
        return latents + (strength * (moved - start)).view_as(latents).to(latents.dtype)

    def put(self, z: Tensor, field: str, wanted: Sequence[int]) -> Tensor:
        """z (B, D) put where the nearest of the wanted values of a field lies; these are places among its values."""
        number, sizes = list(self._fields).index(field), list(map(len, self._fields.values()))
        means, readers, lengths = (self.weights[key].split(sizes)[number] for key in ("means", "readers", "lengths"))
        gram = readers @ means.T  # (v, v), of rank v - 1
        scores = (z - self.weights["origins"][number]) @ readers.T  # (B, v)
        near = (scores - gram.diagonal() / 2)[:, wanted].argmax(dim=1)  # by the distance within the values
        target = torch.tensor(wanted, device=z.device)[near]  # (B,)
        here = scores @ torch.linalg.pinv(gram, rtol=1e-4, hermitian=True) @ means  # what tells the values apart
        return z + lengths[target, None] * means[target] - here

    @torch.no_grad()
    def __call__(self, image: Tensor, moves: Mapping[str, float], strength: float = 1.0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> resynthesised, of the same shape and unclamped. Raises like `move`."""
        return self.tokenizer.decode(self.move(self.tokenizer.encode(image), moves, strength)).float()


def load_latents(folder: Path, device: Any = "cpu") -> Any:
    """The tokenizer of a model folder. Raises ModelError where its output is codes, between which nothing can move."""
    _, tokenizer = checkpoint.load_tokenizer(folder, device)
    if tokenizer.spec.kind != "latents":
        raise checkpoint.ModelError(
            f"{folder}: resynthesis moves latents, and this tokenizer gives {tokenizer.spec.kind}; name a VAE"
        )
    return tokenizer


def save_directions(
    folder: Path, fields: Fields, attributes: Attributes, weights: Mapping[str, Tensor], **facts: Any
) -> None:
    """Writes what `Resynthesis` is made of beside the tokenizer that it belongs to, with its hash."""
    digest = checkpoint.read_card(folder)["parts"]["tokenizer"]["hash"]
    saved = {key: value.cpu().contiguous() for key, value in weights.items()}
    save_tensors(folder / WEIGHTS, saved)
    known = {"fields": fields, "attributes": attributes, "tokenizer": digest, "weights": checkpoint.part_hash(saved)}
    checkpoint.write_text(folder / FACTS, json.dumps(known | facts, indent=1) + "\n")


def moves_of(wishes: Sequence[str]) -> dict[str, float]:
    """["glasses=+1", "mouth:happy=-1"] -> {attribute: 1.0 or -1.0}. Raises ValueError for another form."""
    moves = {}
    for wish in wishes:
        found = re.fullmatch(r"([^=]+)=([+-]?)1", wish)
        if not found:
            raise ValueError(f"--attribute {wish!r}: expected NAME=+1 or NAME=-1, as in glasses=+1")
        moves[found[1]] = -1.0 if found[2] == "-" else 1.0
    if not moves:
        raise ValueError("nothing to move: expected --attribute NAME=+1 or NAME=-1, as in glasses=+1")
    return moves


def moved(
    system: Resynthesis, pictures: Sequence[Image], moves: Mapping[str, float], strength: float = 1.0
) -> list[Image]:
    """The pictures after the moves, at the model's size."""
    return to_pil(_moved(system, _pixels(system, pictures), moves, strength))


def sheets(
    system: Resynthesis, pictures: Sequence[Image], moves: Mapping[str, float], strength: float = 1.0
) -> list[Image]:
    """One grid. Each picture in a row: as it was, decoded again, and moved at growing parts of the strength."""
    images = _pixels(system, pictures)
    columns = [_moved(system, images, moves, strength * step) for step in STEPS]
    said = ", ".join(f"{name} {'+' if sign > 0 else '-'}1" for name, sign in moves.items())
    captions = ["picture", "decoded again", *(f"{said} at {strength * step:g}" for step in STEPS[1:])]
    cells = torch.stack([images, *columns], dim=1).flatten(0, 1)  # (B columns, 3, H, W)
    return [
        grid(to_pil(cells), len(captions), captions * len(pictures), scale=max(1, _CELL // system.tokenizer.image_size))
    ]


def _pixels(system: Resynthesis, pictures: Sequence[Image]) -> Tensor:
    return torch.stack([fit(picture, system.tokenizer.image_size) for picture in pictures])  # (B, 3, H, W)


def _moved(system: Resynthesis, images: Tensor, moves: Mapping[str, float], strength: float) -> Tensor:
    return system(images.to(next(system.tokenizer.parameters()).device), moves, strength).cpu()
