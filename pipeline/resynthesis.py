"""Resynthesis: a picture is encoded, moved along the directions of attributes, and decoded.

An attribute is a direction in the space of a tokenizer's latents (Larsen 2016, arXiv:1512.09300, section 4.2, and White
2016, arXiv:1609.04468, section 3.4): the mean of the latents of pictures that have it less that of those that have it
not. A model folder holds them in attributes.safetensors, and in attributes.json their names and the hash of the
tokenizer that they belong to.

B pictures, K attributes, D values of the latents of a picture.

It does not know how directions are found (`kartina.training.directions` does), nor whether a move succeeds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import checkpoint
from .images import fit, grid, to_pil
from .recipe import nearest
from .text_to_image import find_model

WEIGHTS, FACTS = "attributes.safetensors", "attributes.json"
STEPS = (0.0, 0.5, 1.0, 1.5)  # of the strength, in a row of `sheet`
_CELL = 128  # pixels a side of a picture in it


class Resynthesis:
    """A tokenizer and the directions of its attributes.

    directions: (K, D), from the mean of the latents without an attribute to that with it. readers: (K, D) and biases
    (K,), such that readers z + biases is -1 at the first mean and 1 at the second.
    """

    def __init__(self, tokenizer: Any, names: Sequence[str], weights: Mapping[str, Tensor]) -> None:
        self.tokenizer, self.names = tokenizer, list(names)
        self.directions, self.readers, self.biases = (weights[key] for key in ("directions", "readers", "biases"))

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
            names, owner = [str(name) for name in facts["names"]], facts["tokenizer"]
            weights = load_file(folder / WEIGHTS)
            shapes = {key: tuple(value.shape) for key, value in weights.items()}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise checkpoint.ModelError(
                f"{folder}/{FACTS} or {WEIGHTS} is damaged ({error!r}); find them again"
            ) from None
        if owner != digest or facts.get("weights") != checkpoint.part_hash(weights):
            raise checkpoint.ModelError(f"{folder}/{WEIGHTS} belongs to another tokenizer; find the directions again")
        wide = (len(names), int(torch.Size(tokenizer.spec.shape).numel()))
        if shapes != {"directions": wide, "readers": wide, "biases": wide[:1]}:
            raise checkpoint.ModelError(
                f"{folder}/{WEIGHTS}: expected {wide} for directions, got {shapes}; find them again"
            )
        return cls(tokenizer, names, {key: value.float().to(device) for key, value in weights.items()})

    def read(self, latents: Tensor) -> Tensor:
        """Latents (B, ...) -> where they lie by each attribute, (B, K): 1 as those that have it, else -1."""
        return latents.flatten(1).float() @ self.readers.T + self.biases

    def move(self, latents: Tensor, moves: Mapping[str, float], strength: float = 1.0) -> Tensor:
        """Latents (B, ...) moved by {attribute: sign}, of the same shape; strength 0 leaves them as they are.

        At strength 1 an attribute asked for at +1 or -1 is read at +1 or -1; a picture that already is there stays.
        Raises ValueError for an unknown attribute.
        """
        for name in moves:
            if name not in self.names:
                raise ValueError(f"no attribute {name!r} in this model; {nearest(name, self.names)}")
        places = [self.names.index(name) for name in moves]
        asked = torch.tensor(list(moves.values()), device=latents.device)  # (M,)
        way = asked - self.read(latents)[:, places]  # (B, M)
        way = torch.where(way * asked > 0, way, torch.zeros_like(way))
        return latents + (strength * way @ self.directions[places] / 2).view_as(latents).to(latents.dtype)

    @torch.no_grad()
    def __call__(self, image: Tensor, moves: Mapping[str, float], strength: float = 1.0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> resynthesised, of the same shape and unclamped. Raises like `move`."""
        return self.tokenizer.decode(self.move(self.tokenizer.encode(image), moves, strength)).float()


def load_latents(folder: Path, device: Any = "cpu") -> Any:
    """The tokenizer of a model folder. Raises ModelError where its output is codes, between which nothing can move."""
    recipe = checkpoint.load_recipe(folder)
    if "tokenizer" not in recipe.parts:
        raise checkpoint.ModelError(f"{folder}: its recipe has no tokenizer; name a model of pictures")
    tokenizer = checkpoint.load_part(folder, recipe, "tokenizer", device)
    if tokenizer.spec.kind != "latents":
        raise checkpoint.ModelError(
            f"{folder}: resynthesis moves latents, and this tokenizer gives {tokenizer.spec.kind}; name a VAE"
        )
    return tokenizer


def save_directions(folder: Path, names: Sequence[str], weights: dict[str, Tensor], **facts: Any) -> None:
    """Writes the directions beside the tokenizer that they belong to, with its hash."""
    digest = checkpoint.read_card(folder)["parts"]["tokenizer"]["hash"]
    weights = {key: value.contiguous() for key, value in weights.items()}
    save_file(weights, folder / WEIGHTS)
    known = {"names": list(names), "tokenizer": digest, "weights": checkpoint.part_hash(weights), **facts}
    checkpoint.write_text(folder / FACTS, json.dumps(known, indent=1) + "\n")


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


def sheet(system: Resynthesis, pictures: Sequence[Image], moves: Mapping[str, float], strength: float = 1.0) -> Image:
    """Each picture in a row: as it was, what the tokenizer makes of it, and moved at growing parts of the strength."""
    size = system.tokenizer.image_size
    device = next(system.tokenizer.parameters()).device
    images = torch.stack([fit(picture, size) for picture in pictures])
    moved = [system(images.to(device), moves, strength * step).cpu() for step in STEPS]
    said = ", ".join(f"{name} {'+' if sign > 0 else '-'}1" for name, sign in moves.items())
    captions = ["picture", "decoded again", *(f"{said} at {strength * step:g}" for step in STEPS[1:])]
    cells = torch.stack([images, *moved], dim=1).flatten(0, 1)  # (B columns, 3, H, W)
    columns = len(captions)
    return grid(to_pil(cells), columns, captions * len(pictures), scale=max(1, _CELL // size))
