"""The emoji data, from a fixture of 12 concepts x 2 styles packed again as npm packages: no network."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from kartina.training.data import emoji, emoji_packages  # noqa: E402
from kartina.training.data.emoji_captions import BACKGROUNDS, caption, captions, plain_label  # noqa: E402
from kartina.training.shards import check_shards  # noqa: E402

FIXTURE = Path(__file__).parent / "data" / "emoji"


def _tgz(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def content():
    return json.loads((FIXTURE / "emoji.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def packed(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for package, files in content.items():
        stem = package.removeprefix("@").replace("/", "-")
        version = "17.0.0" if package == "emojibase-data" else "1.0.0"
        _tgz(folder / f"{stem}-{version}.tgz", {f"package/{n}": json.dumps(f).encode() for n, f in files.items()})
    return folder


@pytest.fixture(scope="module")
def prepared(packed):
    out = packed / "out"
    return out, emoji.prepare(out, packed=packed, per_concept=6)


def _joined(content):
    art = {style: content[package] for style, package in emoji_packages.STYLES.items()}
    names = content["emojibase-data"]
    return emoji_packages.join(art, names["en/data.json"], names["ru/data.json"])


def test_join_gives_both_styles_and_both_names(content):
    found, left_out = _joined(content)
    assert len(found) == 24 and not left_out
    heart = next(e for e in found if e.cell == "noto/2764")
    assert heart.labels == {"en": "red heart", "ru": "алое сердце"} and heart.tags["en"]


def test_pictures_are_not_blank(content):
    for e in _joined(content)[0]:
        picture = np.asarray(emoji.rasterise(e.svg, 64))
        assert picture.shape == (64, 64, 4) and picture[..., 3].mean() > 25 and picture[..., :3].std() > 5, e.cell
    with pytest.raises(ValueError, match="blank"):
        emoji.rasterise('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>', 64)


def test_captions():
    assert plain_label("woman astronaut: dark skin tone") == "a woman astronaut with dark skin"
    assert plain_label("flag: France") == "flag: France"
    assert caption("red heart", [], "noto", "orange", "en", 2) == "an emoji of red heart on an orange background"
    assert caption("красное сердце", [], "noto", "blue", "ru", 2) == "красное сердце на синем фоне"


def test_prepared_shards_are_whole_and_even(prepared):
    out, report = prepared
    checked = check_shards(out)
    assert report.samples == checked.samples == 12 * 6 and not checked.bad and not checked.shards
    notices = json.loads((out / "manifest.json").read_text())["licences"]
    assert len(notices) == 3 and all((out / one["notice"]).stat().st_size > 1000 for one in notices)


def test_another_version_of_a_package_is_said(prepared):
    """It may have more emoji, of which other cells are held out than of those that shipped models know."""
    assert prepared[1].other_versions == {
        "@iconify-json/noto": "1.0.0, not 1.2.9", "@iconify-json/fluent-emoji-flat": "1.0.0, not 1.2.6"
    }  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_on_a_background_is_that_of_training_alone(packed, prepared, tmp_path, share):
    out = tmp_path / "out"
    emoji.prepare(out, packed=packed, per_concept=6, coloured=share)
    with tarfile.open(next(out.glob("*.tar"))) as tar:
        grounds = [json.load(tar.extractfile(m))["background"] for m in tar if m.name.endswith(".json")]
    plain = grounds.count("white") / len(grounds)
    assert plain == 1 if share == 0 else plain < 1 / 3
    assert (out / "splits.json").read_bytes() == (prepared[0] / "splits.json").read_bytes()
    with pytest.raises(ValueError, match=r"coloured is a share of the records, 0 to 1; got 1\.5"):
        emoji.prepare(tmp_path / "other", packed=packed, coloured=1.5)


def test_captions_of_a_record_are_true_of_it(prepared):
    """Where they name no background it is white; any other is named by all of them."""
    out, _ = prepared
    colours = set()
    art = {one.cell: one for one in emoji.read_gallery(out)}
    with tarfile.open(next(out.glob("*.tar"))) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    for name in [name for name in members if name.endswith(".txt")]:
        said, facts = members[name].decode().split("\n"), json.loads(members[name.replace(".txt", ".json")])
        picture = Image.open(io.BytesIO(members[name.replace(".txt", ".png")]))
        colour, style, labels = facts["background"], facts["style"], facts["labels"]
        russian = BACKGROUNDS[colour][1]
        colours.add(colour)
        truth = Image.fromarray(art[facts["name"]].pixels)
        assert art[facts["name"]].labels == labels and np.array_equal(picture, emoji.lay(truth, colour))
        english = [f"{colour} background" in one and plain_label(labels["en"]) in one for one in said]
        assert sum(english) == 1 == sum(one == f"{labels['ru']} на {russian} фоне" for one in said)
        assert len(said) == len(set(said)) == (8 if colour == "white" else 2)
        assert (f"{labels['ru']}, стиль {style}" in said) == (colour == "white")
    assert "white" in colours and len(colours) > 3


def test_captions_without_tags_come_once():
    assert captions({"en": "x"}, {"en": []}, "noto", "white") == [
        "x", "x, noto style emoji", "an emoji of x on a white background"
    ]  # fmt: skip
    assert captions({"en": "x", "ru": "икс"}, {"en": [], "ru": ["a"]}, "noto", "red") == [
        "an emoji of x on a red background", "икс на красном фоне"
    ]  # fmt: skip


def test_held_out_cells_are_not_in_the_training_shards(prepared):
    out, report = prepared
    split = json.loads((out / "splits.json").read_text(encoding="utf-8"))
    names = set()
    with tarfile.open(next(out.glob("*.tar"))) as tar:
        names = {json.load(tar.extractfile(m))["name"] for m in tar if m.name.endswith(".json")}
    assert split["E2"] and not names & {*split["E1"], *split["E2"]} and names == set(split["training"])
    assert len(names) + len(split["E2"]) == 24


def test_e1_holds_out_one_tone_of_each_full_role():
    people = ("1f9d1", "1f468", "1f469")
    rows = [(f"{p}-200d-{job}", f"{p}-1f3f{t}-200d-{job}", i) for job in ("1f680", "1f52c") for p in people
            for i, t in enumerate("bcdef", 1)]  # fmt: skip
    cells = [emoji.Emoji(code, style, top, tone, {}, {}, "") for style in ("a", "b") for top, code, tone in rows]
    split = emoji.splits(cells)
    assert split["roles"] == {"person-200d-1f52c": 1, "person-200d-1f680": 2} and not split["E2"]
    assert len(split["E1"]) == 2 * 2 * 3 and all(("1f3fb" in c) == ("1f52c" in c) for c in split["E1"])
    assert emoji.splits(cells[1:])["roles"] == {"person-200d-1f52c": 1}


def test_e1_asks_for_no_tone_that_training_shows_mirrored():
    """Of runners those facing right are in training, in all tones; those facing left keep their held-out tone."""
    cells = []
    for turn in ("", "-200d-27a1"):
        for sign in ("", "-200d-2640", "-200d-2642"):
            for tone, letter in enumerate("bcdef", 1):
                top, code = f"1f3c3{sign}{turn}", f"1f3c3-1f3f{letter}{sign}{turn}"
                cells += [emoji.Emoji(code, style, top, tone, {}, {}, "") for style in ("a", "b")]
    split = emoji.splits(cells)
    assert split["roles"] == {"1f3c3": 1} and not split["E1"]
    assert sorted(cell for cell in split["mirrored"] if not cell.endswith("27a1")) == sorted(
        f"{style}/1f3c3-1f3fb{sign}" for style in ("a", "b") for sign in ("", "-200d-2640", "-200d-2642")
    )


def test_e2_asks_for_no_style_that_training_shows_mirrored():
    """Ten boats, each facing left and right, in two styles: one in ten loses one."""
    codes = [f"1f6{n:02x}{turn}" for n in range(64) for turn in ("", "-200d-27a1")]
    cells = [emoji.Emoji(code, style, code, 0, {}, {}, "") for style in ("a", "b") for code in codes]
    split = emoji.splits(cells)
    assert split["mirrored"] and len(split["mirrored"]) + len(split["E2"]) > 5
    hidden = {*split["mirrored"], *split["E2"]}
    for cell in hidden:
        other = cell.removesuffix("-200d-27a1") if cell.endswith("-200d-27a1") else f"{cell}-200d-27a1"
        assert (cell in split["E2"]) == (other in hidden), cell


def test_a_missing_rasteriser_is_said_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(emoji, "pack", lambda folder: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=r"resvg-py, which is not installed; pip install 'kartina\[data\]'"):
        emoji.prepare(tmp_path / "out")


def test_missing_npm_is_said_with_the_way_around(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs npm.*npm pack @iconify-json/noto@1\.2\.9 .*packed"):
        emoji.prepare(tmp_path / "out")


def test_hostile_members_are_ignored(tmp_path):
    path = tmp_path / "x-1.tgz"
    names = ["../icons.json", "/package/icons.json", "package/../package/icons.json", "package/icons.json"]
    _tgz(path, {name: json.dumps(name).encode() for name in names})
    assert emoji_packages.read_package(path, ["icons.json"]) == {"icons.json": "package/icons.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["x-1.tgz"]


def test_a_package_is_read_within_its_limit_whatever_its_headers_claim(tmp_path, monkeypatch):
    """tarfile reads a long name whole before it tells of any member."""
    path = tmp_path / "x-1.tgz"
    name = tarfile.TarInfo("long")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2**24
    with gzip.open(path, "wb", 1) as file:
        file.write(name.tobuf(tarfile.GNU_FORMAT) + bytes(2**24))
    monkeypatch.setattr(emoji_packages, "PACKAGE_LIMIT", 2**20)
    with pytest.raises(ValueError, match="x-1.tgz unpacks to over 1048576 bytes"):
        emoji_packages.read_package(path, ["icons.json"])


def test_a_damaged_package_is_one_clear_error(tmp_path):
    path = tmp_path / "x-1.tgz"
    _tgz(path, {"package/icons.json": json.dumps([str(k * k) for k in range(9000)]).encode()})
    data = bytearray(path.read_bytes())
    for place in range(60, len(data) - 20, len(data) // 7):
        damaged = data.copy()
        damaged[place : place + 8] = bytes(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="x-1.tgz is not a readable npm package"):
            emoji_packages.read_package(path, ["icons.json"])


def test_packages_of_another_layout_are_one_clear_error(content, tmp_path):
    for package, files in content.items():
        stem = package.removeprefix("@").replace("/", "-")
        changed = files if package != "emojibase-data" else {name: [{"code": 1}] for name in files}
        _tgz(tmp_path / f"{stem}-1.0.0.tgz", {f"package/{n}": json.dumps(f).encode() for n, f in changed.items()})
    with pytest.raises(ValueError, match=r"not laid out as @iconify-json/noto@1\.2\.9, .* are: KeyError\('hexcode'\)"):
        emoji.prepare(tmp_path / "out", packed=tmp_path)


@pytest.mark.parametrize("body", ['<image href="file:' + "//" + '/x"/>', "<!ENTITY a>", '<use xlink:href="x.svg#a"/>'])
def test_a_picture_that_points_outside_is_refused(body):
    with pytest.raises(ValueError, match="outside"):
        emoji_packages.icon_svg({"icons": {"a": {"body": body}}}, "a")
