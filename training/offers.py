"""Pictures that may be packed into shards, what is read of each, and what became of it.

It does not know where pictures come from (`packing` and `columns` do), nor what shards are made of (`shards` does).
"""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..pipeline.images import PHOTOS
from .samples import MEMBER_LIMIT, BadSample, decode, lines
from .shards import ShardWriter

CAPTION_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # in a folder of pictures
CAPTION_COLUMNS = ("text", "caption")  # of a table; what is read where none is named
T = TypeVar("T")
_MEMBERS = {"PNG": "png", "WEBP": "webp"}  # anything else that is decoded is a JPEG


@dataclass
class PackReport:
    """What packing did with each picture, text and row, by relative name."""

    packed: int = 0
    captionless: int = 0  # of these
    several: int = 0  # of these, with several captions
    no_caption: list[str] = field(default_factory=list)
    no_picture: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


@dataclass
class Offer:
    """A picture that may be packed, and the text whose lines are its captions, None for none; neither is read yet."""

    name: str
    picture: Callable[[], bytes]  # both raise BadSample or OSError
    text: Callable[[], bytes | None]


def write(
    offers: Iterable[Offer], out: Path | str, per_shard: int, captionless: bool, report: PackReport, where: str
) -> None:
    """Writes what is offered and says in the report what became of each. Raises ValueError where nothing is packed."""
    seen: dict[bytes, str] = {}
    with ShardWriter(out, per_shard) as writer:
        for offer in offers:
            try:
                text = offer.text()
                if text is None and not captionless:
                    report.no_caption.append(offer.name)
                    continue
                data = offer.picture()
                members = {_member_of(data): data} | ({} if text is None else {"txt": text})
                captions = [] if text is None else lines(decode("txt", text))
                if text is not None and not captions:
                    raise BadSample("empty .txt")
            except (BadSample, OSError) as error:
                report.bad[offer.name] = str(error)
                continue
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                report.duplicates.append(offer.name)
            first = seen.setdefault(digest, offer.name)  # a split into training and validation keeps equals together
            facts = {"same_as": first} if first != offer.name else {}
            writer.write(members, name=offer.name, **facts, **({"captionless": True} if text is None else {}))
            report.captionless += text is None
            report.several += len(captions) > 1
        for named in (report.no_caption, report.duplicates):
            named.sort()
        report.bad = dict(sorted(report.bad.items()))
        report.packed = writer.count
        if not report.packed:
            raise ValueError(
                f"nothing to pack in {where}; {len(report.no_caption)} without caption, which --no-captions packs, "
                f"{len(report.bad)} broken{''.join(f' ({why})' for why in [*report.bad.values()][:1])}"
            )


def mixed(things: Iterable[T], name_of: Callable[[T], str]) -> list[T]:
    """In the order of a hash of their names: in no order of their own, and the same wherever they are packed."""
    return sorted(things, key=lambda thing: hashlib.sha256(name_of(thing).encode(errors="surrogatepass")).digest())


def read_file(path: Path) -> bytes:
    """A file of at most the size of a member. Raises BadSample for a larger one."""
    check_size(path.stat().st_size)
    return path.read_bytes()


def check_size(size: int) -> None:
    """Raises BadSample for more bytes than a member may have."""
    if size > MEMBER_LIMIT:
        raise BadSample(f"too large: {size} bytes, over {MEMBER_LIMIT}")


def captions_in(value: Any) -> list[str]:
    """The captions of a cell, each without line breaks. Raises BadSample for what is neither text nor a list of it."""
    values = [one for one in (value if isinstance(value, (list, tuple)) else [value]) if one is not None]
    if not all(isinstance(one, str) for one in values):
        raise BadSample(f"expected a caption, or a list of them, got {value!r:.60}")
    return [words for one in values if (words := " ".join(one.split()))]


def as_text(captions: Iterable[str]) -> bytes | None:
    """Captions as the lines of a text, each once; None for none."""
    return "\n".join(dict.fromkeys(captions)).encode(errors="surrogatepass") or None


def _member_of(data: bytes) -> str:
    """The member that holds a picture, by what its bytes are. Raises BadSample for none that can be decoded."""
    decode("png", data)
    with Image.open(io.BytesIO(data), formats=PHOTOS) as opened:
        return _MEMBERS.get(str(opened.format), "jpg")
