"""The model folder: recipe.yaml, one .safetensors per part, the caption tokenizer, and card.json.

A model folder is untrusted input: loading runs no code of it, reads no pickle, leaves the folder by no path, and is
strict about names, shapes and hashes. A part's hash is sha256 over its sorted (name, dtype, shape, bytes), so it does
not depend on how the file is laid out.

It does not know what the parts are for, nor how they are trained.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .recipe import Recipe, build, dump, read

FORMAT = 1


class ModelError(ValueError):
    """A model folder that cannot be used; the message says why and what to do."""


def part_hash(weights: dict[str, Tensor]) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of a state dict, as hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file, as hexadecimal. Raises ModelError where there is none."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; a whole model folder has it")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A part's weights as shipped: floating tensors rounded to `dtype`, everything on the CPU and contiguous."""
    return {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for name, value in module.state_dict().items()
    }


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a temporary neighbour, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a model folder. Raises ModelError where it is missing, unreadable or of a later format."""
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a model folder (no card.json); `kartina models` lists known ones") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder}/card.json is not readable as JSON ({error}); copy the folder again") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT or not _has_parts(card):
        raise ModelError(f"{folder}/card.json: expected format {FORMAT} and a table of parts; update kartina")
    return card


def _has_parts(card: dict[str, Any]) -> bool:
    entries = card["parts"].values() if isinstance(card.get("parts"), dict) else [None]
    return isinstance(card.get("licence"), str) and all(
        isinstance(entry, dict) and isinstance(entry.get("hash"), str) for entry in entries
    )


def save_part(folder: Path, recipe: Recipe, part: str, weights: dict[str, Tensor], **facts: Any) -> str:
    """Adds a trained part to a model folder (made at need), with the hashes of the parts it was trained against.

    Returns the part's hash. `facts` (licence, data, measured results) go to the part's entry of the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = read_card(folder) if (folder / "card.json").exists() else {"format": FORMAT, "parts": {}}
    digest = part_hash(weights)
    temporary = folder / f".{part}.{os.getpid()}"
    save_file(weights, temporary)
    os.replace(temporary, folder / f"{part}.safetensors")
    write_text(folder / "recipe.yaml", dump(recipe))
    card |= {"name": recipe.name, "licence": recipe.licence}
    card["parts"][part] = {"hash": digest, **facts}
    write_text(folder / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return digest


def load_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """A part's weights, checked against the card's hash.

    Raises ModelError for an untrained part, a file that is no safetensors (a pickle, a cut copy), altered weights.
    """
    card = read_card(folder)
    path = folder / f"{part}.safetensors"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{path} is a link that leaves the model folder; put the file itself there")
    if part not in card["parts"] or not path.is_file():
        raise ModelError(f"{folder}: part {part!r} is not trained yet; run `kartina train RECIPE --stage {part}` first")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); pickles are never read; copy it again"
        ) from None
    if part_hash(weights) != card["parts"][part].get("hash"):
        raise ModelError(f"{path}: the weights differ from the hash in card.json; copy the folder again")
    return weights


def load_part(folder: Path, recipe: Recipe, part: str, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Builds a part and loads its weights strictly; in evaluation mode, gradients off. Raises ModelError."""
    weights = load_weights(folder, part)
    module = build(recipe, part)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{folder}: {part} does not fit its recipe: {error}") from None
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_recipe(folder: Path) -> Recipe:
    """The recipe of a model folder. Raises ModelError where the folder has none."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ModelError(f"{folder}: no recipe.yaml; expected a model folder with recipe.yaml, card.json and weights")
    return read(path)
