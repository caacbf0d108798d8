"""The `emoji` data: Noto and Fluent flat emoji with English and Russian captions, made into shards by `prepare`.

Nothing is bundled: the art and the names come from three npm packages, packed by the user's own `npm pack` or found in
a folder. Records are drawn by concept, then evenly over its (tone, style) cells, never by file: most files are people
in five skin tones. A record carries all captions that are true of it, one a line; where they name no background, it is
white. A label then leaves little more open than the style; three tags alone, a quarter of these captions, may stand for
several emoji. Two built-in splits measure composition, written to splits.json as cells `style/hexcode`: E1 (role x
tone): role i, in sorted order, never shows tone i mod 5 in training. E2 (concept x style): one concept in ten, by
sha256, loses one style in training. gallery/ holds every emoji once, without a background: what a painted picture is
compared with. The licences of the art travel in LICENSES/.

It does not know the order of reading (`stream` does), nor how a score is computed. No paper.
"""

import hashlib
import importlib.util
import io
import json
import random
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ...pipeline.terminal import followed
from ...pipeline.whole_file import appearing
from ..samples import Entry, decode, find_shards, load_index, read_member
from ..shards import ShardWriter, free_folder
from .emoji_captions import BACKGROUNDS, LANGUAGES, PLAIN, captions
from .emoji_packages import (
    LICENCES,
    PACKAGES,
    STYLES,
    Emoji,
    join,
    other_versions,
    pack,
    package_file,
    pinned,
    read_package,
    write_notices,
)

TONES = 5
COLOURED = 1 / 4  # of the records are on a background that was drawn; of one in twelve of these it is white again
MAX_SIZE = 512  # pixels a side
_TONE = re.compile(r"-1f3f[b-f]")
_FACING_RIGHT = "-200d-27a1"
_EXTRA = "emoji are drawn by resvg-py, which is not installed; pip install 'kartina[data]'"


@dataclass
class EmojiReport:
    """What `prepare` did: numbers of records, concepts, rasterised emoji, held-out cells, and what was left out.

    other_versions: packages of other versions than those that the shipped models were trained on, by name.
    """

    samples: int
    concepts: int
    emoji: int
    held_out: dict[str, int]
    left_out: dict[str, str]
    other_versions: dict[str, str]


@dataclass(frozen=True, eq=False)
class Art:
    """One emoji of the gallery: facts as those of Emoji, labels by language, pixels uint8 (S, S, 4), RGBA."""

    cell: str
    style: str
    concept: str
    tone: int
    labels: dict[str, str]
    pixels: np.ndarray

    @property
    def hexcode(self) -> str:
        """The hexcode, with its tones."""
        return self.cell.partition("/")[2]


# --- splits -----------------------------------------------------------------------------------------------------------


def role_of(hexcode: str) -> tuple[str, str]:
    """(role, gender) of a hexcode without its tones: `1f469-200d-1f680` -> (`person-200d-1f680`, `woman`)."""
    code = _TONE.sub("", hexcode)
    for sign, gender in (("-200d-2640", "woman"), ("-200d-2642", "man")):
        if sign in code:
            return code.replace(sign, ""), gender
    for sign, gender in (("1f9d1", "person"), ("1f469", "woman"), ("1f468", "man")):
        if code.startswith(sign + "-200d-"):
            return code.replace(sign, "person", 1), gender
    return code, "person"


def _turned(code: str) -> str:
    """The hexcode, or role, of the mirror image, whether there is one or not."""
    left = code.removesuffix(_FACING_RIGHT)
    return left if left != code else code + _FACING_RIGHT


def splits(emoji: Sequence[Emoji]) -> dict[str, Any]:
    """{"E1": cells, "mirrored": cells, "E2": cells, "roles": {role: held-out tone}}: cells that training never sees.

    A role is in E1 if every style has its full grid of 3 genders x 5 tones; its concepts are not in E2. What also comes
    facing right shows training its mirror image: such cells are held out as `mirrored`, and asked by no test.
    """
    styles = sorted({e.style for e in emoji})
    grid: dict[str, set[tuple[str, str, int]]] = defaultdict(set)
    shown: dict[str, set[str]] = defaultdict(set)
    for e in emoji:
        shown[e.concept].add(e.style)
        if e.tone:
            role, gender = role_of(e.hexcode)
            grid[role].add((e.style, gender, e.tone))
    whole = (role for role, cells in grid.items() if len(cells) == len(styles) * 3 * TONES)
    full = sorted(role for role in whole if not role.endswith(_FACING_RIGHT))
    roles = {role: i % TONES + 1 for i, role in enumerate(full)}
    lost = {}
    for concept, have in shown.items():
        digest = hashlib.sha256(concept.encode()).digest()
        if len(have) > 1 and role_of(concept)[0] not in roles and int.from_bytes(digest[:8]) % 10 == 0:
            lost[concept] = sorted(have)[digest[8] % len(have)]
    held: dict[str, list[str]] = {"E1": [], "mirrored": [], "E2": []}
    for e in emoji:
        role, turned = role_of(e.hexcode)[0], _turned(e.concept)
        if e.tone and roles.get(role) == e.tone:
            held["mirrored" if _turned(role) in grid else "E1"].append(e.cell)
        elif lost.get(e.concept) == e.style:
            shows = e.style in shown.get(turned, ()) and lost.get(turned) != e.style
            held["mirrored" if shows else "E2"].append(e.cell)
    return {**held, "roles": roles}


# --- drawing and writing ----------------------------------------------------------------------------------------------


def rasterise(svg: str, size: int = 64) -> Image.Image:
    """An RGBA picture, size x size. Raises ValueError where it cannot be drawn or comes out blank."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(data)), formats=("PNG",)).convert("RGBA")
    if picture.size != (size, size) or picture.getchannel("A").getextrema()[1] == 0:
        raise ValueError(f"blank, or not {size}x{size}: {picture.size}")
    return picture


def lay(picture: Image.Image, colour: str) -> Image.Image:
    """An RGBA picture over a background of BACKGROUNDS, RGB."""
    ground = Image.new("RGBA", picture.size, (*BACKGROUNDS[colour][0], 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def compose(picture: Image.Image, colour: str) -> bytes:
    """PNG bytes of `lay`."""
    data = io.BytesIO()
    lay(picture, colour).save(data, "PNG")
    return data.getvalue()


def _write(
    writer: ShardWriter,
    e: Emoji,
    picture: Image.Image,
    draws: random.Random,
    languages: Sequence[str],
    coloured: float = COLOURED,
) -> None:
    colour = draws.choice(list(BACKGROUNDS)) if draws.random() < coloured else PLAIN
    labels = {language: e.labels[language] for language in languages}
    said = captions(labels, e.tags, e.style, colour)
    facts = {"style": e.style, "concept": e.concept, "tone": e.tone, "background": colour, "labels": labels}
    writer.write({"png": compose(picture, colour), "txt": "\n".join(said).encode()}, name=e.cell, **facts)


def _write_gallery(
    out: Path, emoji: list[Emoji], pictures: dict[str, Image.Image], languages: Sequence[str], per_shard: int
) -> None:
    with ShardWriter(out, per_shard, "gallery") as writer:
        for e in emoji:
            data = io.BytesIO()
            pictures[e.cell].save(data, "PNG")
            labels = {language: e.labels[language] for language in languages}
            fields = {"png": data.getvalue(), "txt": labels[languages[0]].encode()}
            writer.write(fields, name=e.cell, style=e.style, concept=e.concept, tone=e.tone, labels=labels)


def read_gallery(data: Path | str) -> list[Art]:
    """Every emoji that `prepare` rasterised into the folder `data`, held-out ones too, sorted by cell.

    Raises ValueError for a folder without a gallery, or a record that is not as `prepare` writes it.
    """
    folder = Path(data) / "gallery"
    if not folder.is_dir():
        raise ValueError(f"{data} has no gallery/ to compare with; write the data again: kartina data emoji OUT")
    found: list[Art] = []
    for shard in find_shards(folder):
        with open(shard, "rb") as file:
            for entry in load_index(shard).entries:
                try:
                    found.append(_read_art(file, entry))
                except (KeyError, TypeError, ValueError, OSError) as error:
                    named = f"{shard.name.removesuffix('.tar')}/{entry.key}"
                    raise ValueError(f"{named} is no record of a gallery: {error!r}; write the data again") from error
    if len(sides := {art.pixels.shape for art in found}) != 1:
        raise ValueError(f"a gallery holds pictures of one size, got {sorted(sides)}; write the data again")
    return found


def _read_art(file: BinaryIO, entry: Entry) -> Art:
    facts = decode("json", read_member(file, entry, "json"))
    with Image.open(io.BytesIO(read_member(file, entry, "png")), formats=("PNG",)) as picture:
        if picture.width != picture.height or picture.width > MAX_SIZE:
            raise ValueError(f"a square of at most {MAX_SIZE} pixels was expected, got {picture.size}")
        pixels = np.asarray(picture.convert("RGBA"))  # (S, S, 4)
    return Art(facts["name"], facts["style"], facts["concept"], facts["tone"], facts["labels"], pixels)


def prepare(
    out: Path | str,
    packed: Path | str | None = None,
    size: int = 64,
    per_concept: int = 16,
    seed: int = 0,
    languages: Sequence[str] = LANGUAGES,
    samples_per_shard: int = 1000,
    coloured: float = COLOURED,
) -> EmojiReport:
    """Writes training shards to `out`, held-out cells once each to `out/held_out`; gallery/, splits.json, LICENSES/.

    packed: a folder with the three .tgz files of `npm pack`; without it npm is run in a temporary folder. size: side in
    pixels, 16 to 512. per_concept: records of each concept. coloured: the share of training's records, 0 to 1, on a
    background that is drawn from BACKGROUNDS, of which one is white. Raises ValueError for these, where `out` has
    content, and without the extra `data`.
    """
    if not 16 <= size <= MAX_SIZE or per_concept < 1 or not languages or not set(languages) <= set(LANGUAGES):
        raise ValueError(
            f"size 16..{MAX_SIZE}, per_concept >= 1, languages of {LANGUAGES}; got {size}, {per_concept}, {languages}"
        )
    if not 0 <= coloured <= 1:
        raise ValueError(f"coloured is a share of the records, 0 to 1; got {coloured}")
    if importlib.util.find_spec("resvg_py") is None:
        raise ValueError(_EXTRA)
    out = free_folder(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if packed is None else Path(packed)
        if packed is None:
            print(f"npm pack {' '.join(map(pinned, PACKAGES))} ...", file=sys.stderr, flush=True)
            pack(folder)
        others = other_versions(folder)
        names = read_package(package_file(folder, PACKAGES[2]), ("en/data.json", "ru/data.json"))
        art = {
            s: read_package(package_file(folder, package), ("icons.json", "chars.json"))
            for s, package in STYLES.items()
        }
    try:
        emoji, left_out = join(art, names["en/data.json"], names["ru/data.json"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the packages are not laid out as {', '.join(map(pinned, PACKAGES))} are: {error!r}; pack these"
        ) from error
    pictures = {}
    for e in followed(emoji, f"drawing {len(emoji)} emoji"):
        try:
            pictures[e.cell] = rasterise(e.svg, size)
        except ValueError as error:
            left_out[e.cell] = str(error)
    kept = [e for e in emoji if e.cell in pictures]
    counts = _write_all(out, kept, pictures, left_out, per_concept, seed, languages, samples_per_shard, coloured)
    return EmojiReport(*counts, left_out, others)


def _write_all(
    out: Path,
    emoji: list[Emoji],
    pictures: dict[str, Image.Image],
    left_out: dict[str, str],
    per_concept: int,
    seed: int,
    languages: Sequence[str],
    samples_per_shard: int,
    coloured: float,
) -> tuple[int, int, int, dict[str, int]]:
    """Returns the numbers of records, concepts, emoji and held-out cells."""
    split = splits(emoji)
    hidden = {*split["E1"], *split["mirrored"], *split["E2"]}
    concepts: dict[str, list[Emoji]] = defaultdict(list)
    for e in emoji:
        if e.cell not in hidden:
            concepts[e.concept].append(e)
    draws = random.Random(seed)
    rounds = {
        c: [draws.sample(cells, len(cells)) for _ in range(-(-per_concept // len(cells)))]
        for c, cells in concepts.items()
    }
    records = [e for rounds_of in rounds.values() for e in [e for r in rounds_of for e in r][:per_concept]]
    draws.shuffle(records)
    with appearing(out) as staging:
        with ShardWriter(staging, samples_per_shard, "emoji") as writer:
            for e in followed(records, f"writing {len(records)} records"):
                _write(writer, e, pictures[e.cell], draws, languages, coloured)
        with ShardWriter(staging / "held_out", samples_per_shard, "held-out") as writer:
            for e in emoji:
                if e.cell in hidden:
                    _write(writer, e, pictures[e.cell], draws, languages)
        _write_gallery(staging / "gallery", emoji, pictures, languages, samples_per_shard)
        training = sorted({e.cell for e in records})
        text = json.dumps({**split, "training": training, "left_out": left_out}, ensure_ascii=False, indent=1)
        (staging / "splits.json").write_text(text, encoding="utf-8")
        write_notices(staging)
        for folder, notices in ((staging, ""), (staging / "held_out", "../"), (staging / "gallery", "../")):
            content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            content["licences"] = [{**one, "notice": notices + one["notice"]} for one in LICENCES]
            (folder / "manifest.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return len(records), len(concepts), len(emoji), {name: len(split[name]) for name in ("E1", "E2")}
