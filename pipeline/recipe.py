"""The recipe of a system: one YAML file whose part sections go straight to constructors.

This half knows what a system is made of; `kartina.training.run` reads the `training` section. A recipe may come from an
untrusted model folder, so it names entries of the closed table PARTS only, never a module, a package or a path.

The one exception is `parts.text.source` of the kind `transformers_text`: NAME or OWNER/NAME, two words of letters,
digits, `_`, `-` and inner dots. It is a name of that module's closed table of packages, or else a folder of that name
below $KARTINA_TEXT_ENCODERS (below the current folder where that is not set), or else a repository in the cache of the
hub. Nothing is downloaded for it, no code of it runs and no pickle of it is read; the card's hash pins what it holds.

It knows no optimizer, no data and no weights.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

PARTS: dict[str, dict[str, tuple[str, str]]] = {
    "tokenizer": {
        "autoencoder": ("tokenizers.autoencoder", "Autoencoder"),
        "vae": ("tokenizers.vae", "VAE"),
        "vqvae": ("tokenizers.vqvae", "VQVAE"),
        "dvae": ("tokenizers.dvae", "DiscreteVAE"),
        "patch_dvae": ("tokenizers.patch_dvae", "PatchDVAE"),
        "vqgan": ("tokenizers.vqgan", "VQGAN"),
        "vq_latents": ("tokenizers.vqgan", "VQLatents"),
        "autoencoder_kl": ("tokenizers.autoencoder_kl", "AutoencoderKL"),
    },
    "discriminator": {
        "patch": ("layers.discriminator", "PatchDiscriminator"),
        "latent": ("layers.discriminator", "LatentDiscriminator"),
    },
    "prior": {"dalle": ("priors.dalle", "DALLE"), "unet": ("priors.unet", "UNet")},
    "text": {
        "caption_encoder": ("priors.caption_encoder", "CaptionEncoder"),
        "clip_text": ("priors.caption_encoder", "CLIPText"),
        "transformers_text": ("priors.transformers_text", "TransformersText"),
    },
    "clip": {"clip": ("tokenizers.clip_towers", "CLIP")},
}
PRETRAINED = ("transformers_text",)  # kinds that come with their weights, which stay where they lie
_HALVES = ("encoder", "decoder")


class RecipeError(ValueError):
    """A recipe, or an override of one, that breaks a rule; the message says which and what to write."""


class Section(BaseModel):
    """A section whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


class Captions(Section):
    """The caption tokenizer: `vocab_size` tokens at most, `context_length` tokens a caption."""

    vocab_size: int = Field(16384, ge=257)
    context_length: int = Field(256, ge=1)


class Sampling(Section):
    """The knobs that a system paints with where none are given, of one kind of prior.

    Strict, since the facts of a picture are read by it too, and a picture comes from anyone.
    """

    model_config = ConfigDict(strict=True)


class CodeSampling(Sampling):
    """Of a prior over codes, see `kartina.priors.code_samplers.sample_codes`."""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)


class DiffusionSampling(Sampling):
    """Of a diffusion prior, see `kartina.priors.diffusion_samplers` and `Guided`.

    sampler: one of SAMPLERS, or the class of a scheduler of diffusers. spacing: None is the sampler's own. eta: of ddim
    alone. negative: a caption that guidance leads away from, in place of the empty one. guidance_low, guidance_high:
    the interval of sigma / alpha in which it guides; None, without end.
    """

    sampler: str = Field("dpmpp_2m", min_length=1, max_length=60)
    num_steps: int = Field(20, ge=1, le=100_000)
    spacing: str | None = Field(None, max_length=60)
    eta: float | None = Field(None, ge=0, le=1)
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    guidance_low: float = Field(0.0, ge=0, allow_inf_nan=False)
    guidance_high: float | None = Field(None, gt=0, allow_inf_nan=False)
    negative: str = Field("", max_length=10_000)


SAMPLING: dict[str, type[Sampling]] = {"dalle": CodeSampling, "unet": DiffusionSampling}  # by the kind of the prior


class Diffusion(Section):
    """A diffusion prior's noise and what it predicts, see `kartina.priors.schedules` and `kartina.priors.denoiser`.

    The ends of beta are by default those of the schedule's paper; "cosine" has none.
    """

    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    num_timesteps: int = Field(1000, ge=2, le=100_000)
    beta_start: float | None = Field(None, gt=0, lt=1)
    beta_end: float | None = Field(None, gt=0, lt=1)
    zero_terminal: bool = False
    prediction: Literal["eps", "x_0", "v"] = "eps"


_NAME = r"^[a-z0-9]+(-[a-z0-9.]+)*/[a-z0-9]+([-.][a-z0-9]+)*$"


class Recipe(Section):
    """One system. `parts` maps a part's name to its kind and constructor arguments.

    sampling: of the section that SAMPLING has for its prior. frozen: parts that stay as they are where training could
    take them along, as the text encoder of a diffusion prior.
    """

    name: str = Field(pattern=_NAME)
    paper: str
    image_size: int = Field(ge=8)
    captions: Captions = Captions()
    parts: dict[str, dict[str, Any]]
    frozen: tuple[str, ...] = ()
    licence: str = "Apache-2.0"
    sampling: dict[str, Any] = {}
    diffusion: Diffusion = Diffusion()
    training: dict[str, Any] = {}


def check_name(name: str) -> None:
    """Raises RecipeError unless a recipe may be called so."""
    if re.fullmatch(_NAME, name) is None:
        raise RecipeError(f"a name is of the form word/word, in lower case, as shapes/dalle, got {name!r:.60}")


def nearest(word: str, valid: list[str]) -> str:
    """The end of an error about an unknown word: the nearest valid one, or all of them."""
    close = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def validate(section: type[S], given: dict[str, Any], where: str) -> S:
    """Builds a section; a failure is a RecipeError that names the key, and the nearest valid one if it is unknown."""
    try:
        return section.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _fields_at(section, first["loc"][:-1]))
            raise RecipeError(f"{where}: unknown key {key!r:.60}; {hint}") from None
        raise RecipeError(f"{where}: {key:.60}: {first['msg']}, got {first.get('input')!r:.60}") from None


def _fields_at(section: type[Section], location: Sequence[Any]) -> list[str]:
    """The valid keys of the section that lies at a location inside another; mappings are passed through by any key."""
    here: Any = section
    for word in location:
        is_section = isinstance(here, type) and issubclass(here, Section)
        here = here.model_fields[word].annotation if is_section else get_args(here)[-1]
    return list(here.model_fields)


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe's YAML and applies overrides `key.sub=value` (values are YAML).

    Raises RecipeError for unreadable YAML, unknown keys (naming the nearest), wrong types and unknown parts.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys, got {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    recipe = validate(Recipe, tree, where)
    for part, arguments in recipe.parts.items():
        _check_part(part, arguments, where)
    for part in recipe.frozen:
        if part not in recipe.parts:
            raise RecipeError(f"{where}: frozen: there is no part {part!r}; {nearest(part, list(recipe.parts))}")
    return recipe.model_copy(update={"sampling": sampling_knobs(recipe, {}, f"{where}: sampling")})


def sampling_knobs(recipe: Recipe, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All knobs that the recipe's prior is sampled with: as given, as the recipe says, or by default.

    What the recipe says for its own sampler or its guidance is not said for another sampler, or for none.

    Raises RecipeError for an unknown name or a value against its rule, and for any knob where there is no prior.
    """
    section: type[Section] = SAMPLING.get(recipe.parts.get("prior", {}).get("kind", ""), Section)
    said = dict(recipe.sampling)
    if given.get("sampler", said.get("sampler")) != said.get("sampler"):
        said = {name: value for name, value in said.items() if name not in ("eta", "spacing")}
    if given.get("guidance_scale") == 1:
        own = ("negative", "guidance_rescale", "guidance_low", "guidance_high")
        said = {name: value for name, value in said.items() if name not in own}
    return validate(section, {**said, **given}, where).model_dump()


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file; see `parse`."""
    return parse(path.read_text(encoding="utf-8"), path.name, overrides)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets `a.b.c=value` in a nested mapping; `stages.` is short for `training.stages.`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key.sub=value, as in stages.tokenizer.steps=24")
    words = key.split(".")
    if words[0] == "stages":
        words = ["training", *words]
    if words[0] == "training" and words[1:2] in (["data"], ["stages"]) and isinstance(tree.get("training"), dict):
        tree["training"].setdefault(words[1], {})  # which a converted recipe leaves to its default
    for depth, word in enumerate(words[:-1]):
        if not isinstance(tree.get(word), dict):
            raise RecipeError(
                f"override {override!r}: no section {'.'.join(words[: depth + 1])!r}; "
                + nearest(word, [str(k) for k in tree])
            )
        tree = tree[word]
    try:
        tree[words[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r:.200}: the value is not readable as YAML: {error}") from None


def _constructor(part: str, kind: str) -> type:
    module, name = PARTS[part][kind]
    return getattr(importlib.import_module(f"..{module}", __package__), name)


def _check_part(part: str, arguments: dict[str, Any], where: str) -> None:
    if part not in PARTS:
        raise RecipeError(f"{where}: unknown part {part!r}; {nearest(part, list(PARTS))}")
    kind = str(arguments.get("kind"))
    if kind not in PARTS[part]:
        raise RecipeError(f"{where}: parts.{part}.kind is {kind!r}; {nearest(str(kind), list(PARTS[part]))}")
    valid = [name for name in inspect.signature(_constructor(part, kind)).parameters]
    for key in arguments:
        if key != "kind" and key not in valid:
            raise RecipeError(f"{where}: parts.{part}: unknown key {key!r}; {nearest(key, valid)}")


def build(recipe: Recipe, part: str) -> Any:
    """Constructs a part with fresh weights, on torch's current default device.

    Raises RecipeError when the recipe has no such part, and where its constructor takes no such arguments.
    """
    if part not in recipe.parts:
        raise RecipeError(f"recipe {recipe.name} has no part {part!r}; it has {', '.join(recipe.parts)}")
    arguments = dict(recipe.parts[part])
    kind = arguments.pop("kind")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        return _constructor(part, kind)(**arguments)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:  # none checks everything
        raise RecipeError(f"recipe {recipe.name}: parts.{part} cannot be built: {error}") from error


def is_frozen(recipe: Recipe, part: str) -> bool:
    """Whether no stage trains a part, nor takes it along: the recipe says so, or it comes pretrained."""
    return part in recipe.frozen or is_pretrained(recipe, part)


def is_pretrained(recipe: Recipe, part: str) -> bool:
    """Whether a part is of a kind that comes with its weights, which no model folder holds."""
    return recipe.parts.get(part, {}).get("kind") in PRETRAINED


def reads_captions(recipe: Recipe) -> bool:
    """Whether a part reads captions by the own caption tokenizer."""
    readers = [part for part in ("text", "clip") if part in recipe.parts and not is_pretrained(recipe, part)]
    return bool(readers) or recipe.parts.get("prior", {}).get("kind") == "dalle"


def captions_problem(recipe: Recipe, part: str, module: Any) -> str:
    """Why a part, with or without weights, reads other captions than the recipe's, or "" where it does not."""
    given, framing = recipe.captions, getattr(module, "framing", 0)  # ids around a caption
    expected = given.context_length + framing, given.vocab_size + framing
    if not hasattr(module, "text_vocab") or (module.text_length, module.text_vocab) == expected:
        return ""
    return (
        f"{part} reads {module.text_length} tokens of {module.text_vocab}, the captions have {given.context_length} of "
        f"{given.vocab_size}; correct parts.{part} or captions in the recipe"
    )


def defaults(part: str, kind: str) -> dict[str, Any]:
    """The constructor arguments of a kind that have defaults, with them."""
    parameters = inspect.signature(_constructor(part, kind)).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def section_of(recipe: Recipe, part: str) -> dict[str, Any]:
    """A part's kind and constructor arguments, those by default too, with lists for all sequences."""
    whole = defaults(part, recipe.parts[part]["kind"]) | recipe.parts[part]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in whole.items()}


def count_parameters(recipe: Recipe) -> dict[str, int]:
    """The number of parameters of each part, counted on the meta device: no memory is taken."""
    import torch

    with torch.device("meta"):
        return {part: _size(build(recipe, part)) for part in recipe.parts}


def count_halves(recipe: Recipe) -> dict[str, dict[str, int]]:
    """The same of the tokenizer's halves, {"tokenizer": {"encoder": n, "decoder": n}}, or {} where it has none."""
    import torch

    if "tokenizer" not in recipe.parts:
        return {}
    with torch.device("meta"):
        module = build(recipe, "tokenizer")
    found = {half: _size(getattr(module, half)) for half in _HALVES if hasattr(module, half)}
    return {"tokenizer": found} if len(found) == len(_HALVES) else {}


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
