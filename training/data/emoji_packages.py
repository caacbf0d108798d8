"""Where the emoji data comes from: the npm packages, how they join into emoji with names, and their licence notices.

It does not know captions, splits or shards.
"""

import gzip
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Those of the shipped models. Others may have more emoji, and then other cells are held out, and other bytes written.
VERSIONS = {"@iconify-json/noto": "1.2.9", "@iconify-json/fluent-emoji-flat": "1.2.6", "emojibase-data": "17.0.0"}
PACKAGES = tuple(VERSIONS)
STYLES = {"noto": PACKAGES[0], "fluent": PACKAGES[1]}
_DAMAGE = (tarfile.TarError, zlib.error, OSError, EOFError, RecursionError)
MEMBER_LIMIT = 64 * 2**20  # bytes of one member
PACKAGE_LIMIT = 512 * 2**20  # bytes of one package, unpacked
_FOREIGN = re.compile(
    r"<\s*(?:image|script|foreignObject)\b|<!|<\?|@import|url\(\s*(?![\"']?\s*#|\s)|href\s*=\s*[\"'](?!#)", re.I
)

_MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
NOTICES = {
    "noto-emoji.txt": "Noto Emoji, art by Google Inc (github.com/googlefonts/noto-emoji), Apache License 2.0.\n"
    "Changed: rasterised and laid over coloured backgrounds. Terms: http://www.apache.org/licenses/LICENSE-2.0\n",
    "fluent-emoji.txt": "Fluent Emoji, flat (github.com/microsoft/fluentui-emoji), MIT License.\n"
    f"Changed: rasterised and laid over coloured backgrounds.\n\nCopyright (c) Microsoft Corporation.\n\n{_MIT}",
    "emojibase.txt": "Labels and tags: emojibase-data (from Unicode CLDR), MIT License.\n\n"
    f"Copyright (c) 2017-2019 Miles Johnson\n\n{_MIT}",
}
LICENCES = [
    {"name": "Noto Emoji", "by": "Google Inc", "licence": "Apache-2.0", "notice": "LICENSES/noto-emoji.txt"},
    {"name": "Fluent Emoji", "by": "Microsoft Corporation", "licence": "MIT", "notice": "LICENSES/fluent-emoji.txt"},
    {"name": "emojibase-data", "by": "Miles Johnson", "licence": "MIT", "notice": "LICENSES/emojibase.txt"},
]


@dataclass(frozen=True)
class Emoji:
    """One emoji in one style. hexcode: lower case, no fe0f. concept: that without tones; tone: 1..5, else 0."""

    hexcode: str
    style: str
    concept: str
    tone: int
    labels: dict[str, str] = field(hash=False)
    tags: dict[str, list[str]] = field(hash=False)
    svg: str = field(hash=False, repr=False)

    @property
    def cell(self) -> str:
        """The name of the cell in splits.json."""
        return f"{self.style}/{self.hexcode}"


# --- packages ---------------------------------------------------------------------------------------------------------


def pack(folder: Path) -> None:
    """Runs `npm pack` for these VERSIONS in `folder`. Raises ValueError where npm is missing or fails."""
    packages = [pinned(package) for package in PACKAGES]
    advice = f"run `npm pack {' '.join(packages)}` where npm is, and pass the folder of .tgz files as `packed`"
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"the emoji data needs npm, which is not on PATH; install Node.js, or {advice}")
    try:
        subprocess.run(
            [npm, "pack", "--ignore-scripts", *packages], cwd=folder, check=True, capture_output=True, timeout=600
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")[-500:]
        raise ValueError(f"npm pack failed ({error}): {said}\nTry again, or {advice}") from error


def read_package(path: Path, wanted: Iterable[str]) -> dict[str, Any]:
    """JSON members `package/<name>` of one .tgz, by exact name; others are passed over, nothing is extracted.

    Raises ValueError for a broken or oversized package, or a wanted member that is missing.
    """
    names, found = {f"package/{name}": name for name in wanted}, {}
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=_Limited(unpacked, path.name), mode="r|") as tar:
            for info in tar:
                name = names.get(info.name)
                if name is None or name in found or not info.isreg():
                    continue
                if info.size > MEMBER_LIMIT:
                    raise ValueError(f"{path.name}: {info.name} has {info.size} bytes, over {MEMBER_LIMIT}")
                member = tar.extractfile(info)
                found[name] = json.loads(member.read()) if member else None
    except (*_DAMAGE, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not a readable npm package: {error}; pack it again with npm") from error
    missing = [name for name in names.values() if name not in found]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}; expected a package made by npm pack")
    return found


class _Limited(io.RawIOBase):
    """A stream that ends with ValueError where it has given more than PACKAGE_LIMIT bytes, headers of the tar too."""

    def __init__(self, stream: Any, name: str) -> None:
        super().__init__()
        self.stream, self.name, self.left = stream, name, PACKAGE_LIMIT

    def read(self, count: int = -1) -> bytes:
        data: bytes = self.stream.read(count)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"{self.name} unpacks to over {PACKAGE_LIMIT} bytes; pack it again with npm")
        return data


def package_file(folder: Path, package: str) -> Path:
    """The one .tgz of a package in a folder, of whatever version. Raises ValueError where there is not exactly one."""
    stem = _stem(package)
    found = sorted(folder.glob(f"{stem}-[0-9]*.tgz"))
    if len(found) != 1:
        raise ValueError(
            f"expected one {stem}-<version>.tgz in {folder}, got {len(found)}; run `npm pack {pinned(package)}` there"
        )
    return found[0]


def other_versions(folder: Path) -> dict[str, str]:
    """The packages of a folder whose version is not that of VERSIONS, by name: what it is, and what was expected."""
    found = {name: package_file(folder, name).stem.removeprefix(f"{_stem(name)}-") for name in PACKAGES}
    return {name: f"{has}, not {VERSIONS[name]}" for name, has in found.items() if has != VERSIONS[name]}


def pinned(package: str) -> str:
    """As npm names a package of one version."""
    return f"{package}@{VERSIONS[package]}"


def _stem(package: str) -> str:
    return package.removeprefix("@").replace("/", "-")


# --- joining ----------------------------------------------------------------------------------------------------------


def normal_hexcode(code: str) -> str:
    """Lower case, without the variation selector fe0f: both sides of the join write it differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def icon_svg(icons: dict[str, Any], name: str) -> str | None:
    """A square SVG of one iconify icon or mirrored alias; None for one that is absent or hidden.

    Raises ValueError for a body that points outside itself.
    """
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None or icon.get("hidden") or alias.get("hidden") or alias.get("rotate"):
        return None
    body = icon["body"]
    if _FOREIGN.search(body):
        raise ValueError("the picture points outside itself")
    width, height = (float(icon.get(side, icons.get(side, 16))) for side in ("width", "height"))
    left, top = float(icon.get("left", 0)), float(icon.get("top", 0))
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if alias.get("vFlip"):
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="{box}" width="{side}" height="{side}">{body}</svg>'


def join(
    art: dict[str, dict[str, Any]], en: list[dict[str, Any]], ru: list[dict[str, Any]]
) -> tuple[list[Emoji], dict[str, str]]:
    """Emoji that have a picture and both names. art: style -> {"icons.json", "chars.json"}; en, ru: emojibase data.

    Returns (emoji sorted by cell, reasons of those left out by cell).
    """
    russian = {normal_hexcode(e["hexcode"]): e for top in ru for e in (top, *top.get("skins", ()))}
    found, left_out = [], {}
    for style, files in art.items():
        names = {normal_hexcode(code): name for code, name in files["chars.json"].items()}
        for top in en:
            for entry in (top, *top.get("skins", ())):
                code = normal_hexcode(entry["hexcode"])
                if code not in names or code not in russian:
                    continue
                try:
                    svg = icon_svg(files["icons.json"], names[code])
                except ValueError as error:
                    left_out[f"{style}/{code}"] = str(error)
                    continue
                if svg is None:
                    continue
                tone = entry.get("tone", 0)
                labels = {"en": entry["label"], "ru": russian[code]["label"]}
                top_ru = russian.get(normal_hexcode(top["hexcode"]), {})
                tags = {"en": list(top.get("tags", ())), "ru": list(top_ru.get("tags", ()))}
                concept, single = normal_hexcode(top["hexcode"]), tone if isinstance(tone, int) else 0
                found.append(Emoji(code, style, concept, single, labels, tags, svg))
    return sorted(found, key=lambda e: e.cell), left_out


# --- notices ----------------------------------------------------------------------------------------------------------


def _licence_text() -> str:
    """The Apache License 2.0 as kartina itself ships it, or nothing where only the address is at hand."""
    beside = Path(__file__).resolve().parents[2] / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    try:
        return importlib.metadata.distribution("kartina").read_text("licenses/LICENSE") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_notices(folder: Path) -> None:
    """LICENSES/ in `folder`: one file per source of the data."""
    (folder / "LICENSES").mkdir()
    for name, text in NOTICES.items():
        more = "\n" + _licence_text() if name.startswith("noto") else ""
        (folder / "LICENSES" / name).write_text(text + more, encoding="utf-8")
