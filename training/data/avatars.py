"""The `avatars` data: faces drawn from parts, with exact attributes and captions in English and Russian, as shards.

The parts are DiceBear's CC0 style `pixel-art`, from two packages of the extra `[data]`; nothing is fetched. Attributes
are drawn first, each evenly or by its weight, then a variant and a colour that show them, so that a label is exact:
what DiceBear says it has drawn is compared with what was asked. The json of a sample has `attributes`, {field: value}.
Held out are four cells of hair colour x clothes, one colour of clothes for each of four colours of hair: training shows
all of their words, but never the cell. They go to held_out/. An avatar is a pure function of (seed, part, number).

It does not know the order of reading (`stream` does), nor what reads the attributes. No paper.
"""

import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipeline.terminal import followed
from ...pipeline.whole_file import appearing
from ..shards import ShardWriter, free_folder
from .avatars_captions import FIELDS, LANGUAGES, STYLE, UNNAMED, caption
from .emoji import MAX_SIZE, compose, rasterise

KIND = "avatars"
HELD_OUT = (("black", "red"), ("brown", "yellow"), ("blond", "blue"), ("red", "green"))  # (hair_colour, clothes)
_CC0 = "CC0 1.0"
_EXTRA = (
    "the avatars are drawn by dicebear-core, dicebear-styles and resvg-py; in the checkout: "
    '.venv/bin/pip install -c constraints.txt -e ".[data]"'
)


@dataclass(frozen=True)
class Avatar:
    """An avatar to be drawn: its attributes {field: value}, and DiceBear's options."""

    attributes: dict[str, str]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """All that is drawn, in words: equal for equal pictures."""
        drawn = {key: value for key, value in self.options.items() if not _unseen(key, self.options)}
        words = [str(value).removeprefix("#") for _, value in sorted(drawn.items())]
        return "-".join([STYLE, *words, self.attributes["background"]])


@dataclass
class AvatarsReport:
    """What `prepare` did: numbers of avatars to train on and of held-out ones, and how often each value was drawn."""

    samples: int
    held_out: int
    drawn: dict[str, dict[str, int]]


def _unseen(option: str, options: dict[str, Any]) -> bool:
    part = option.removesuffix("Variant").removesuffix("Color")
    return option.endswith("Probability") or options.get(f"{part}Probability", 100) == 0


def is_held_out(attributes: dict[str, str]) -> bool:
    """Whether training must not show an avatar of these attributes."""
    return (attributes["hair_colour"], attributes["clothes"]) in HELD_OUT


def draw(seed: int, part: str, number: int) -> Avatar:
    """Avatar `number` of a part, "train" or "held_out"."""
    draws = random.Random(f"avatars {seed} {part} {number}")
    while True:
        attributes = {
            name: draws.choices(list(values), [value.weight for value in values.values()])[0]
            for name, values in FIELDS.items()
        }
        if part == "held_out":
            attributes["hair_colour"], attributes["clothes"] = HELD_OUT[number % len(HELD_OUT)]
        if is_held_out(attributes) == (part == "held_out"):
            break
    options = dict(UNNAMED)
    for name, value in attributes.items():
        options |= FIELDS[name][value].options
    return Avatar(attributes, {option: draws.choice(choices) for option, choices in sorted(options.items())})


def _style() -> tuple[Any, dict[str, Any]]:
    """DiceBear's style, and what is said of it. Raises ValueError where a package is missing, or it is not CC0."""
    found = importlib.util.find_spec("dicebear_styles")
    path = Path(next(iter(found.submodule_search_locations or []), "."), f"{STYLE}.json") if found else None
    if path is None or not path.is_file() or not all(map(importlib.util.find_spec, ("dicebear", "resvg_py"))):
        raise ValueError(_EXTRA)
    from dicebear import Style

    definition = json.loads(path.read_text(encoding="utf-8"))
    licence = definition["meta"]["license"]["name"]
    if licence != _CC0:
        raise ValueError(
            f"the style {STYLE} should be under {_CC0}, this version says {licence!r}; take another version"
        )
    return Style(definition), definition["meta"]


def picture(style: Any, avatar: Avatar, size: int) -> bytes:
    """PNG bytes of an avatar. Raises ValueError where DiceBear draws other parts than were asked for."""
    from dicebear import Avatar as Drawn

    asked = {key: value if key.endswith("Probability") else [value] for key, value in avatar.options.items()}
    drawn = Drawn(style, {"seed": "", **asked}).to_json()
    for option, value in avatar.options.items():
        got = drawn["options"].get(option)
        if not _unseen(option, avatar.options) and got not in (value, [value]):
            raise ValueError(f"DiceBear was asked for {option} {value}, and drew {got}; use dicebear-styles 10")
    return compose(rasterise(drawn["svg"], size), avatar.attributes["background"])


def _records(style: Any, seed: int, size: int, part: str, count: int) -> Iterator[tuple[dict[str, bytes], Avatar, str]]:
    for number in followed(range(count), f"avatars: {part}"):
        avatar = draw(seed, part, number)
        language = random.Random(f"language {seed} {part} {number}").choice(LANGUAGES)
        text = caption(avatar.attributes, language)
        yield {"png": picture(style, avatar, size), "txt": text.encode()}, avatar, language


def prepare(
    out: Path | str,
    count: int = 20_000,
    held_out: int = 2_000,
    size: int = 64,
    seed: int = 0,
    samples_per_shard: int = 1000,
) -> AvatarsReport:
    """Writes `count` avatars to `out` and others to out/held_out, with manifests, and licence notices to LICENSES/.

    size: side in pixels, 16 to 512; the style is drawn on a grid of 16. Equal arguments give equal shards. Raises
    ValueError for these, where `out` has content, or where a package is missing.
    """
    if not 16 <= size <= MAX_SIZE or count < 1 or held_out < 1:
        raise ValueError(f"size 16..{MAX_SIZE}, count and held_out >= 1; got {size}, {count}, {held_out}")
    out = free_folder(out)
    style, meta = _style()
    drawn = {name: dict.fromkeys(values, 0) for name, values in FIELDS.items()}
    with appearing(out) as staging:
        for part, number, folder in (("train", count, staging), ("held_out", held_out, staging / "held_out")):
            with ShardWriter(folder, samples_per_shard, "avatars" if part == "train" else "held-out") as writer:
                for fields, avatar, language in _records(style, seed, size, part, number):
                    facts = {"attributes": avatar.attributes, "language": language}
                    writer.write(fields, name=avatar.name, **facts)
                    for name, value in avatar.attributes.items():
                        drawn[name][value] += part == "train"
        _describe(staging, seed, meta)
    return AvatarsReport(count, held_out, drawn)


def _describe(folder: Path, seed: int, meta: dict[str, Any]) -> None:
    """The licence notice, and what the manifests say beside the shards."""
    (folder / "LICENSES").mkdir()
    notice = (
        f"{meta['license']['text']}\nChanged: drawn by DiceBear from chosen parts, laid over coloured backgrounds.\n"
    )
    (folder / "LICENSES" / f"{STYLE}.txt").write_text(notice, encoding="utf-8")
    for place, up in ((folder, ""), (folder / "held_out", "../")):
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        licence = {"name": STYLE, "by": meta["creator"]["name"], "licence": "CC0-1.0"}
        manifest |= {"kind": KIND, "seed": seed, "fields": {name: list(values) for name, values in FIELDS.items()}}
        manifest |= {"held_out": HELD_OUT, "licences": [{**licence, "notice": f"{up}LICENSES/{STYLE}.txt"}]}
        (place / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
