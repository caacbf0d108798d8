"""Packing: every picture with a caption comes into a shard with its bytes, whatever is left out is named."""

import csv
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from kartina.pipeline.known_models import SHIPPED
from kartina.training import packing, samples, shards, stream
from kartina.training import run as runs
from kartina.training.stages.clip import CLIPStage
from kartina.training.stages.contract import captions_of
from kartina.training.stream import ShardSource


def picture(kind: str = "PNG", color=(200, 10, 30), **save) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, kind, **save)
    return out.getvalue()


def packed(folder: Path) -> dict[str, list[str]]:
    """The captions of each sample of the shards by name."""
    found = {}
    for shard in shards.find_shards(folder):
        with open(shard, "rb") as file:
            for entry in samples.load_index(shard).entries:
                name = samples.decode("json", samples.read_member(file, entry, "json"))["name"]
                found[name] = samples.read_sample(file, entry)[1]
    return found


def test_packing_keeps_bytes_and_names(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    names = ["a.b 2.0 (x).v1.JPG", "deep/plain.jpg", "deep/кошка.jpg"]
    for k, name in enumerate(names):
        (folder / name).write_bytes(picture("JPEG", color=(k, 2, 3)))
        (folder / name).with_suffix(".txt").write_text(f"caption {k} 猫", encoding="utf-8")
    (folder / "alone.png").write_bytes(picture())
    (folder / "nobody.txt").write_text("no picture here")
    (folder / "broken.png").write_bytes(picture()[:40])
    (folder / "broken.txt").write_text("a broken one")
    (folder / "notes.md").write_text("else")
    report = packing.pack_folder(folder, tmp_path / "out", samples_per_shard=2)
    assert report.packed == 3 and report.no_caption == ["alone.png"] and report.no_picture == ["nobody.txt"]
    assert list(report.bad) == ["broken.png"] and report.ignored == ["notes.md"]

    import webdataset

    found = shards.find_shards(tmp_path / "out")
    assert len(found) == 2
    read = list(webdataset.WebDataset([str(p) for p in found], shardshuffle=False, empty_check=False))
    kept = [json.loads(s["json"])["name"] for s in read]
    assert sorted(kept) == names
    for sample, name in zip(read, kept, strict=True):
        assert "." not in sample["__key__"]
        assert sample["jpg"] == (folder / name).read_bytes()
        assert sample["txt"] == (folder / name).with_suffix(".txt").read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["samples"] == 3 and [s["samples"] for s in manifest["shards"]] == [2, 1]
    assert shards.check_shards(tmp_path / "out").bad == {}


def test_packing_follows_a_link_and_refuses_a_mount(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    name = os.fsencode(tmp_path / "pictures") + b"/caf\xe9"  # not UTF-8
    for extension, content in ((b".png", picture()), (b".txt", b"coffee")):
        Path(os.fsdecode(name + extension)).write_bytes(content)
    packing.pack_folder(tmp_path / "pictures", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big" / "shard-000000.tar").is_file()
    source = ShardSource(tmp_path / "out", 8, 0)
    assert source.read([0]).captions == ["coffee"] and not source.read([0]).problems
    (tmp_path / "pictures" / "more").symlink_to(tmp_path / "big")
    (tmp_path / "pictures" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    report = packing.pack_folder(tmp_path / "pictures", tmp_path / "third")
    assert (report.packed, {*report.bad}) == (1, {"more", "gone.png"})
    assert "not followed" in report.bad["more"] and "a link to nothing" in report.bad["gone.png"]
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(ValueError, match="name a folder inside it"):
        packing.pack_folder(tmp_path / "pictures", tmp_path / "other")


def test_pictures_without_captions_are_packed_where_asked_for(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.png").write_bytes(picture(color=(k, 2, 3)))
    with pytest.raises(ValueError, match="4 without caption, which --no-captions packs"):
        packing.pack_folder(folder, tmp_path / "none")
    report = packing.pack_folder(folder, tmp_path / "out", captionless=True)
    assert (report.packed, report.captionless, report.no_caption) == (4, 4, [])
    assert shards.check_shards(tmp_path / "out").bad == {}
    source = stream.ShardSource(tmp_path / "out", 8, seed=0)
    batch = source.read(range(4))
    assert batch.captions == [""] * 4 and batch.weight.tolist() == [1] * 4 and not batch.problems
    source.captioned = True  # then each is unreadable, named, and counts towards the limit
    told = source.read(range(4))
    assert told.weight.tolist() == [0] * 4
    assert all("packed without one; put a .txt" in why for why in told.problems.values())
    source.captioned = False
    recipe, training = runs.load("shapes/dalle", ["stages.clip.objective={}"])
    clip = CLIPStage(recipe, training.stages["clip"], source, SHIPPED / "shapes/dalle", 0, torch.device("cpu"))
    which = "the sample shard-000000/00000000. was"
    refusing = [(lambda: captions_of(batch), which), (lambda: next(clip.updates(batch, 0)), which)]
    for refused, what in [*refusing, (lambda: source.captions(range(4)), "the samples were")]:
        with pytest.raises(ValueError, match=f"{what} packed without one; put a .txt beside"):
            refused()


def test_captions_come_from_tables_too(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for k, name in enumerate(("a.jpg", "b.png", "c.png", "deep/d.webp", "deep/e.png", "none.png")):
        kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[Path(name).suffix]
        (folder / name).write_bytes(picture(kind, (9 * k, 0, 0)))
    (folder / "a.txt").write_text("beside it")
    (folder / "b.txt").write_text("its text")
    rows = [
        {"file_name": "b.png", "text": "two\n lines", "else": 1},
        {"file_name": "./deep/../c.png", "text": ["кошка", "", "猫"]},
        {"file_name": "gone.png", "text": "nothing"},
        {"file_name": "../secret.png", "text": "outside"},
        {"file_name": "none.png", "text": None},
        {"file_name": "none.png", "text": 3},
    ]
    (tmp_path / "secret.png").write_bytes(picture())
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(f"\ufeff{text}\n[1]\n{{half\n", encoding="utf-8")
    with open(folder / "deep" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], ["d.webp", "d, the first"], ["d.webp", "d, again"]])
    report = packing.pack(folder, tmp_path / "out")
    assert packed(tmp_path / "out") == {
        "a.jpg": ["beside it"],
        "b.png": ["its text", "two lines"],
        "c.png": ["кошка", "猫"],
        "deep/d.webp": ["d, the first", "d, again"],
    }
    assert (report.packed, report.several, report.no_caption) == (4, 3, ["deep/e.png", "none.png"])
    table = "metadata.jsonl, row"
    assert report.no_picture == [f"{table} 3: gone.png", f"{table} 4: ../secret.png"]
    assert [*report.bad] == [f"{table} {k}" for k in (6, 7, 8)]
    assert not report.ignored


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metadata.csv", "file_name,words\na.png,b\n", "columns file_name, words; name that .* with --caption"),
        ("metadata.jsonl", b"\xff\xfe", "metadata.jsonl: 'utf-8' codec"),
        ("metadata.parquet", b"PAR1", "metadata.parquet: "),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(name, content, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        packing.pack(with_table(tmp_path / "in", name, content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_table(folder, name, content):
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "b.png").write_bytes(picture(color=(1, 2, 3)))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_another_column_holds_the_captions(tmp_path):
    folder = with_table(tmp_path / "in", "metadata.csv", "file_name,words\na.png,these\n")
    packing.pack(folder, tmp_path / "out", caption="words")
    assert packed(tmp_path / "out") == {"a.png": ["these"]}


def test_a_table_without_captions_hinders_no_packing_without_them(tmp_path):
    folder = with_table(tmp_path / "in", "metadata.csv", "file_name,label\na.png,3\n")
    assert packing.pack(folder, tmp_path / "out", captionless=True).captionless == 2
    assert packing.pack(
        with_table(tmp_path / "other", "metadata.csv", "a,b\n1,2\n"), tmp_path / "out2", captionless=True
    )
    rows = '{"file_name": "a.png"}\n{"file_name": "b.png", "caption": "b"}'  # a column that not every row has
    report = packing.pack(with_table(tmp_path / "third", "metadata.jsonl", rows), tmp_path / "out3")
    assert packed(tmp_path / "out3") == {"b.png": ["b"]} and report.no_caption == ["a.png"]
    assert packing.pack(f"{tmp_path}/other/../third", tmp_path / "out4").packed == 1


def test_a_row_has_as_many_cells_as_columns_and_one_column_does_not_spoil_another(tmp_path):
    rows = "file_name,text\na.png,a cat, sitting\nb.png,b\n"
    report = packing.pack(with_table(tmp_path / "in", "metadata.csv", rows), tmp_path / "out")
    assert packed(tmp_path / "out") == {"b.png": ["b"]} and "more cells" in report.bad["metadata.csv, row 1"]
    rows = '{"file_name": "a.png", "text": "a cat", "caption": 3}\n{"file_name": "b.png", "text": "", "caption": "b"}'
    packing.pack(with_table(tmp_path / "other", "metadata.jsonl", rows), tmp_path / "out2")
    assert packed(tmp_path / "out2") == {"a.png": ["a cat"], "b.png": ["b"]}


def test_a_table_of_parquet(tmp_path):
    table = pytest.importorskip("pyarrow").table({"file_name": ["a.png"], "text": ["a"]})
    content = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(table, content)
    packing.pack(with_table(tmp_path / "in", "metadata.parquet", content.getvalue()), tmp_path / "out")
    assert packed(tmp_path / "out") == {"a.png": ["a"]}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Parquet as the hub has it: pictures as bytes and path, beside captions, classes and addresses."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    folder = tmp_path_factory.mktemp("tables")
    kinds = ["PNG", "JPEG", "WEBP", "PNG"]
    cells = [{"bytes": picture(kind, (40 * k, 0, 0)), "path": "image"} for k, kind in enumerate(kinds)]
    secret = folder.parent / "secret.png"
    cells += [{"bytes": None, "path": str(secret)}, {"bytes": cells[0]["bytes"][:40], "path": None}]
    content = {
        "image": cells,
        "text": ["one", "two\nlines", None, "four", "five", "six"],
        "captions": [["a", None, "b"], ["c"], [], None, ["e"], ["f"]],
        "label": [0, 1, -1, 0, 1, 1],
        "url": ["x"] * 6,
        "tags": [[0, 1], [], None, [1], [2], [0]],
        "fetched": [{"bytes": None, "path": "http://somewhere/x.png"}] * 6,
    }
    features = datasets.Features(
        image=datasets.Image(decode=False), text=datasets.Value("string"),
        captions=datasets.List(datasets.Value("string")),
        tags=datasets.List(datasets.ClassLabel(names=["cat", "dog"])), label=datasets.ClassLabel(names=["cat", "dog"]),
        url=datasets.Value("string"), fetched=datasets.Image(decode=False),
    )  # fmt: skip
    (folder / "data").mkdir()
    rows = pyarrow.Table.from_pydict(content, schema=features.arrow_schema)  # datasets itself would read the paths
    parquet.write_table(rows, folder / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(rows.slice(1, 1), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: /absolute/*.parquet\n---\n")
    secret.write_bytes(picture())
    return folder


def test_a_data_set_is_packed(tables, tmp_path):
    report = packing.pack(tables, tmp_path / "out", picture="image")
    assert packed(tmp_path / "out") == {
        "train/000000000": ["one"],
        "train/000000001": ["two lines"],
        "train/000000003": ["four"],
    }
    assert report.no_caption == ["train/000000002"] and [*report.bad] == ["train/000000004", "train/000000005"]
    assert "names the file" in report.bad["train/000000004"]
    index = samples.load_index(tmp_path / "out" / "shard-000000.tar")
    assert sorted([*entry.members][0] for entry in index.entries) == ["jpg", "png", "png"]
    one = tables / "data" / "test-00000-of-00001.parquet"
    assert packing.pack(one, tmp_path / "one", caption="captions").packed == 1
    assert packed(tmp_path / "one") == {"train/000000000": ["c"]}
    packing.pack(tables, tmp_path / "test", split="test", caption="label")
    assert packed(tmp_path / "test") == {"test/000000000": ["dog"]}
    several = packing.pack(tables, tmp_path / "several", caption="captions", captionless=True)
    assert (several.several, several.captionless) == (1, 2)  # of two the list is empty, or there is none
    with open(tmp_path / "several" / "shard-000000.tar", "rb") as file:
        entries = samples.load_index(tmp_path / "several" / "shard-000000.tar").entries
        assert samples.read_captions(file, entries[0]) == ["a", "b"]
    tagged = packing.pack(tables, tmp_path / "tagged", caption="tags")
    assert packed(tmp_path / "tagged")["train/000000000"] == ["cat", "dog"]
    assert "no [2]" in tagged.bad["train/000000004"]
    labelled = packing.pack(tables, tmp_path / "labelled", caption="label")
    assert labelled.no_caption == ["train/000000002"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"split": "validation"}, "no split validation; its files are of test, train"),
        ({"split": "clean"}, "no split clean; its files are of test, train"),
        ({"picture": "url"}, "column url holds addresses of pictures"),
        ({"picture": "label"}, "column label holds ClassLabel.*, not pictures"),
        ({"picture": "pixels"}, "columns image, text, captions, .*; name that of the pictures with --picture"),
        ({"caption": "prompt"}, "columns image, .*; name that of the captions with --caption"),
        ({"caption": "fetched"}, "column fetched holds Image.*, not text"),
        ({"picture": "fetched"}, "nothing to pack .* 1 without caption.* 5 broken .*names the file http"),
    ],
)
def test_a_data_set_without_the_split_or_columns_is_refused(options, problem, tables, tmp_path):
    with pytest.raises(ValueError, match=problem):
        packing.pack(tables, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_of_the_hub_files_are_read_where_datasets_put_them(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "cache").mkdir()
    with zipfile.ZipFile(tmp_path / "cache" / "all.zip", "w") as archive:
        archive.writestr("deep/x.png", picture())
    (tmp_path / "cache" / "y.png").write_bytes(picture(color=(0, 1, 2)))
    (tmp_path / "outside.png").write_bytes(picture())
    paths = [f"zip://deep/x.png::{tmp_path}/cache/all.zip", f"{tmp_path}/cache/y.png", f"{tmp_path}/outside.png"]
    paths += [f"zip://none.png::{tmp_path}/cache/all.zip", f"{tmp_path}/cache/../outside.png"]
    paths += [f"simplecache::http://x::{tmp_path}/cache/y.png"]
    cells = {"image": [{"bytes": None, "path": path} for path in paths], "text": ["x"] * len(paths)}
    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict(cells, features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    report = packing.pack("hf-hub:someone/pictures", tmp_path / "out")
    assert asked == [("someone/pictures", "train")] and report.packed == 2
    assert [*report.bad] == [f"train/{k:09d}" for k in (2, 3, 4, 5)]


def test_what_is_neither_a_folder_nor_a_data_set_is_refused(tables, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="no picture .*, and no .parquet"):
        packing.pack(tmp_path / "in", tmp_path / "out")
    for source in (tmp_path / "nowhere", "https://some/where", "someone/pictures"):
        with pytest.raises(ValueError, match="for the hub write hf-hub:OWNER/NAME"):
            packing.pack(source, tmp_path / "out")
    (tmp_path / "in" / "thumbnail.png").write_bytes(picture())
    with pytest.raises(ValueError, match="--split and --picture are of data sets"):
        packing.pack(tmp_path / "in", tmp_path / "out", split="test")
    shutil.copytree(tables / "data", tmp_path / "in" / "data")
    with pytest.raises(ValueError, match="holds pictures and Parquet files, first .*test-00000"):
        packing.pack(tmp_path / "in", tmp_path / "out")
