"""The model folder: recipe.yaml, one .safetensors per part, the caption tokenizer, and card.json.

A model folder is untrusted input: loading runs no code of it, reads no pickle, leaves the folder by no path or link
(but for a shipped model's part of the same hash, see `shared`), takes no more memory than its files, and is strict
about names, shapes and hashes. A part's hash is sha256 over its sorted (name, dtype, shape, bytes), so it does not
depend on how the file or the memory is laid out.

It does not know what the parts are for, nor how they are trained.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.precision import without_tf32
from ..tokenizers.captions import CaptionTokenizer
from . import shared
from .recipe import PARTS, Recipe, build, captions_problem, dump, is_pretrained, parse, reads_captions
from .whole_file import replaced, save_tensors

FORMAT = 1
_RECIPE_LIMIT = 2**15  # bytes
_KEEP_SHAPE = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "normalize"}
_CALLS_PER_TENSOR = 200  # a constructor makes about ten torch calls for each of its tensors


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


def export(module: nn.Module, dtype: torch.dtype = torch.bfloat16, keep: bool = True) -> dict[str, Tensor]:
    """A part's weights as shipped: parameters rounded to `dtype`, everything on the CPU and contiguous.

    Buffers are statistics, as the latent scale, and keep their digits. What is divided over processes (a DTensor) is
    put together, one tensor at a time; all processes must call this, and those without `keep` get nothing.
    """
    weights = {}
    for name, value in module.state_dict(keep_vars=True).items():
        rounded = isinstance(value, nn.Parameter) and value.is_floating_point()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if keep:
            value = value.to(dtype) if rounded else value
            weights[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Rounds the parameters as `export` does, in place: so that what is measured is what is shipped."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a model folder.

    Raises ModelError where it is missing, unreadable or of a later format, or where a file of the folder is a link
    that leaves it.
    """
    _check_links(folder)
    if folder.is_file():
        raise ModelError(f"{folder} is a file, not a model folder; `kartina convert FILE OUT` makes one of weights")
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a model folder (no card.json); `kartina models` lists known ones") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{folder}/card.json is not readable as JSON ({error}); copy the folder again") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT or not _is_sound(card):
        raise ModelError(f"{folder}/card.json: expected format {FORMAT} and a table of parts; update kartina")
    return card


def parts_in(folder: Path) -> dict[str, Any]:
    """The entries of a folder's card by part, none where there is no card. Raises ModelError like `read_card`."""
    return read_card(folder)["parts"] if (folder / "card.json").exists() else {}


def _check_links(folder: Path) -> None:
    home = folder.resolve()
    for path in folder.iterdir() if folder.is_dir() else []:
        if not path.resolve().is_relative_to(home):
            raise ModelError(f"{path} is a link that leaves the model folder; put the file itself there")


def _is_sound(card: dict[str, Any]) -> bool:
    parts, measured = card.get("parts"), card.get("measured", {})
    if not isinstance(parts, dict) or not isinstance(card.get("licence"), str):
        return False
    if not isinstance(measured, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("figures"), dict) for entry in measured.values()
    ):
        return False
    return all(name in PARTS and isinstance(entry, dict) and _is_sound_entry(entry) for name, entry in parts.items())


def _is_sound_entry(entry: dict[str, Any]) -> bool:
    read, identity = entry.get("trained_against", {}), entry.get("identity", {})
    if not isinstance(entry.get("hash"), str) or not isinstance(read, dict) or not isinstance(identity, dict):
        return False
    tables = [identity.get(key) or {} for key in ("part", "beside", "diffusion", "from")]
    return isinstance(identity.get("stage", ""), str) and all(isinstance(table, dict) for table in tables)


def save_part(folder: Path, recipe: Recipe, part: str, weights: dict[str, Tensor], **facts: Any) -> str:
    """Adds a trained part to a model folder (made at need), with the hashes of the parts it was trained against.

    Returns the part's hash. `facts` (licence, data, measured results) go to the part's entry of the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = read_card(folder) if (folder / "card.json").exists() else {"format": FORMAT, "parts": {}}
    digest = part_hash(weights)
    save_tensors(folder / f"{part}.safetensors", weights)
    write_text(folder / "recipe.yaml", dump(recipe))
    card |= {"name": recipe.name, "licence": recipe.licence}
    card["parts"][part] = {"hash": digest, **facts}
    card.pop("measured", None)  # it was measured with another part
    _write_card(folder, card)
    return digest


def hashes(card: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Of the parts of a card, and of the recipe's pretrained ones. Raises ValueError where one of these is not here."""
    found = {part: entry["hash"] for part, entry in card["parts"].items()}
    return found | {part: pretrained_hash(recipe, part) for part in recipe.parts if is_pretrained(recipe, part)}


def pretrained_hash(recipe: Recipe, part: str) -> str:
    """What pins a part that comes pretrained; see `priors.transformers_text.digest`."""
    from ..priors.transformers_text import digest

    return digest(recipe.parts[part]["source"])


def save_measured(folder: Path, command: str, figures: dict[str, float], **facts: Any) -> None:
    """Writes what the model was measured to do to its card, under the command that measured it.

    figures: name -> value. A name that an earlier command had measured too is taken from there; what that command alone
    measured stays. facts: JSON values that say how the figures came about.
    """
    card = read_card(folder)
    kept = {}
    for earlier, entry in card.get("measured", {}).items():
        others = {name: value for name, value in entry["figures"].items() if name not in figures}
        if others:
            told = {name: n for name, n in entry.get("captions", {}).items() if any(o.startswith(name) for o in others)}
            kept[earlier] = entry | {"figures": others} | ({"captions": told} if "captions" in entry else {})
    _write_card(folder, card | {"measured": kept | {command: facts | {"figures": figures}}})


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    write_text(folder / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def load_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """A part's weights, checked against the card's hash; see `shared.place` for where they lie.

    Raises ModelError for an untrained part, a file that is no safetensors (a pickle, a cut copy), altered weights.
    """
    card = read_card(folder)
    path = shared.place(folder, card["parts"], part)
    if part not in card["parts"] or not path.is_file():
        raise ModelError(f"{folder}: part {part!r} is not trained yet; run `kartina train RECIPE --stage {part}` first")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); pickles are never read; copy it again"
        ) from None
    if part == "text" and path.stem == "clip":
        weights = shared.text_tower(weights)
    if part_hash(weights) != card["parts"][part].get("hash"):
        raise ModelError(f"{path}: the weights differ from the hash in card.json; copy the folder again")
    return weights


def default_device() -> str:
    """Where a model computes if nobody says: cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_part(folder: Path, recipe: Recipe, part: str, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Builds a part and loads its weights strictly; in evaluation mode, gradients off.

    Nothing of the part takes memory before its names and shapes are known to be those of the weights. Raises
    ModelError where they differ, and where a part that reads text was built for other captions than lie beside it. One
    that comes pretrained is read from where it lies.
    """
    if is_pretrained(recipe, part):
        with torch.device("meta"):
            module = build(recipe, part)
        module.load()
        return module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    weights = load_weights(folder, part)
    _check_shapes(folder, recipe, part, weights)
    module = build(recipe, part)
    if hasattr(module, "text_vocab"):
        check_captions(folder, recipe, part, module)
    module.load_state_dict(weights, strict=True)
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_tokenizer(folder: Path, device: Any = "cpu") -> tuple[Recipe, Any]:
    """The recipe of a model folder and its tokenizer, see `load_part`, `without_tf32`. Raises ModelError for none."""
    recipe = load_recipe(folder)
    if "tokenizer" not in recipe.parts:
        raise ModelError(f"{folder}: its recipe has no tokenizer; name a model that has one")
    without_tf32()
    return recipe, load_part(folder, recipe, "tokenizer", device)


class _Outline(TorchFunctionMode):
    """Building shapes alone: what changes numbers does nothing (on meta it imports the compiler), calls are counted.

    The meta device takes no memory for a tensor, but an absurd depth would still make tensors without end.
    """

    def __init__(self, calls: float) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "_set_grad_enabled":  # an error at the end of `no_grad` would leave gradients off for good
            return function(*args)
        self.calls -= 1
        if self.calls < 0:
            raise ValueError("it asks for more tensors than the file holds")
        if name in _KEEP_SHAPE:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _check_shapes(folder: Path, recipe: Recipe, part: str, weights: dict[str, Tensor]) -> None:
    """Raises ModelError unless the recipe asks for exactly the tensors that the file holds, by name and shape."""
    most = max(1024, sum(value.numel() for value in weights.values()))
    for key, value in recipe.parts.get(part, {}).items():
        largest = len(weights) if key.endswith("depth") else most  # of layers, each has weights
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, int | float | str | None) or (isinstance(entry, int) and abs(entry) > largest):
                raise ModelError(f"{folder}/recipe.yaml: parts.{part}.{key} asks for more than the weights hold")
    try:
        wrong = misfits(recipe, part, weights)
    except Exception as error:  # constructors given absurd arguments raise anything
        raise ModelError(f"{folder}/recipe.yaml: its {part} cannot be built: {error}") from None
    if wrong:
        name, asked, held = wrong[0]
        raise ModelError(
            f"{folder}: {part} does not fit its recipe in {len(wrong)} tensors, first {name}: expected "
            f"{asked}, got {held}; recipe.yaml and the weights must be of one model"
        )


def outline(recipe: Recipe, part: str, tensors: float = math.inf) -> Any:
    """A part on the meta device, where it takes no memory. tensors: about how many it has; errors: see `misfits`."""
    with torch.device("meta"), _Outline(_CALLS_PER_TENSOR * (tensors + 10)):
        return build(recipe, part)


def misfits(recipe: Recipe, part: str, weights: dict[str, Tensor]) -> list[tuple[str, Any, Any]]:
    """The tensors in which a part of the recipe and weights differ: name, shape asked for, shape held, "none" for none.

    Nothing of the part takes memory. Raises RecipeError like `build`, and ValueError where it asks for many more
    tensors than there are weights.
    """
    asked = {name: tuple(value.shape) for name, value in outline(recipe, part, len(weights)).state_dict().items()}
    held = {name: tuple(value.shape) for name, value in weights.items()}
    both = ((name, asked.get(name, "none"), held.get(name, "none")) for name in sorted(asked | held))
    return [(name, want, got) for name, want, got in both if want != got]


def load_captions(folder: Path, recipe: Recipe) -> CaptionTokenizer | None:
    """The caption tokenizer of a model folder, None where no part reads it."""
    return CaptionTokenizer.load(folder / "captions.json") if reads_captions(recipe) else None


def read_captions(folder: Path, recipe: Recipe) -> CaptionTokenizer:
    """The caption tokenizer of a model folder. Raises ModelError unless it is one of the sizes that the recipe says."""
    path, given = folder / "captions.json", recipe.captions
    try:
        captions = CaptionTokenizer.load(path)
    except Exception as error:  # the tokenizer of a damaged file raises anything
        raise ModelError(f"{path} is no caption tokenizer ({error}); copy the folder again") from None
    if captions.context_length != given.context_length or captions.vocab_size > given.vocab_size:
        raise ModelError(
            f"{path}: expected {given.vocab_size} tokens and a context of {given.context_length}, as recipe.yaml says, "
            f"got {captions.vocab_size} and {captions.context_length}; copy the folder again"
        )
    return captions


def check_captions(folder: Path, recipe: Recipe, part: str, module: Any) -> None:
    """Raises ModelError unless captions.json, the recipe and a part that reads text agree on their sizes."""
    if not read_captions(folder, recipe).padded and getattr(module, "framing", 0) != 2:
        raise ModelError(
            f"{folder}: captions.json is CLIP's, which has no padding; {part} takes ours: train it, or take a clip_text"
        )
    if problem := captions_problem(recipe, part, module):
        raise ModelError(f"{folder}: {problem}")


def load_recipe(folder: Path) -> Recipe:
    """The recipe of a model folder. Raises ModelError where the folder has none or it unfolds without end."""
    _check_links(folder)
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ModelError(f"{folder}: no recipe.yaml; expected a model folder with recipe.yaml, card.json and weights")
    if path.stat().st_size > _RECIPE_LIMIT:
        raise ModelError(f"{path}: expected at most {_RECIPE_LIMIT} bytes, got {path.stat().st_size}; copy it again")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ModelError(f"{path} has YAML aliases, which can unfold without end; write their values out")
        return parse(text, path.name)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ModelError(f"{path} is not readable as YAML ({error}); copy the folder again") from None
