"""Makes tests/data/emoji/: 12 concepts x 2 styles, from a folder with the packed npm files.

Run `python make_emoji_fixture.py FOLDER`.

The file has the layout of the three packages, cut down, so that tests pack it again and run the whole path.
"""

import json
import sys
from pathlib import Path

from kartina.training.data import emoji_packages as source

CONCEPTS = [
    "1f34e",
    "1f34c",
    "1f436",
    "1f431",
    "1f41f",
    "2764",
    "2b50",
    "1f319",
    "1f697",
    "2600",
    "1f468-200d-1f680",
    "1f600",
]
FULL = ("label", "hexcode", "tags")


def main(folder: Path, out: Path) -> None:
    """Writes emoji.json and NOTICE into `out`."""
    content = {}
    for package in source.STYLES.values():
        files = source.read_package(source.package_file(folder, package), ("icons.json", "chars.json", "info.json"))
        names = {source.normal_hexcode(code): name for code, name in files["chars.json"].items()}
        icons, chars = files["icons.json"], {code: names[code] for code in CONCEPTS}
        kept = {side: icons[side] for side in ("prefix", "width", "height") if side in icons}
        kept["icons"] = {name: icons["icons"][name] for name in chars.values()}
        info = {key: files["info.json"][key] for key in ("name", "author", "license")}
        content[package] = {"icons.json": kept, "chars.json": chars, "info.json": info}
    names = source.read_package(source.package_file(folder, source.PACKAGES[2]), ("en/data.json", "ru/data.json"))
    content[source.PACKAGES[2]] = {
        file: [{k: e[k] for k in FULL if k in e} for e in rows if source.normal_hexcode(e["hexcode"]) in CONCEPTS]
        for file, rows in names.items()
    }
    out.mkdir(exist_ok=True)
    (out / "emoji.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    heading = "emoji.json holds 12 emoji of each of these, with names. The Apache License is in LICENSE at the root.\n"
    notice = "\n----\n\n".join([heading, *source.NOTICES.values()])
    (out / "NOTICE").write_text(notice, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_name("emoji"))
