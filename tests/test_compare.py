"""Runs side by side: curves, the reference that a recipe carries, and a run at 40 times the learning rate."""

import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline.recipe import read
from kartina.training import __main__ as trainer
from kartina.training import charts, compare, history, reference
from kartina.training.run import RECIPES, find

SMALL = [
    "captions.vocab_size=300",
    "parts.tokenizer={kind: patch_dvae, image_size: 32, num_codes: 64, patch: [4, 4], width: 16, depth: 1}",
    "parts.prior={kind: dalle, text_vocab: 300, text_length: 22, num_codes: 64, grid: [8, 8], width: 64, depth: 2,"
    " num_heads: 2, attention: full, rotary: true, qk_norm: true, norm: rms, zero_init: true}",
    *["training.precision=fp32", "training.trackers=[]", "training.data.levels=[S1]"],
    *["stages.tokenizer.steps=20", "stages.tokenizer.global_batch=16", "stages.tokenizer.log_every=2"],
    *["stages.prior.steps=150", "stages.prior.global_batch=8", "stages.prior.log_every=2"],
    *["stages.prior.validate_every=15", "stages.prior.optimizer.muon=0"],
    *["stages.tokenizer.validate_samples=64", "stages.prior.validate_samples=32"],
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, the same with another seed, and the same at 40 times the learning rate; and where references go."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "find", lambda name: folder / f"{name.replace('/', '-')}.yaml")
        assert trainer.main(["shapes/dalle", *SMALL, "--stage", "tokenizer", "--run", str(folder / "first")]) == 0
        more = {"first": [], "other-seed": ["training.seed=1"], "x40": ["stages.prior.optimizer.lr=0.4"]}
        for name, overrides in more.items():
            if name != "first":
                shutil.copytree(folder / "start", folder / name)
            else:
                shutil.copytree(folder / "first", folder / "start")
            command = ["shapes/dalle", *SMALL, *overrides, "--stage", "prior", "--run", str(folder / name)]
            assert trainer.main(command) == 0
        shutil.copy(folder / "first" / "recipe.yaml", folder / "shapes-dalle.yaml")
        yield folder


def test_a_run_at_40_times_the_rate_is_not_normal_and_one_of_another_seed_is(runs, tmp_path):
    folders = [runs / name for name in ("first", "other-seed", "x40")]
    plain = CliRunner().invoke(cli.app, ["compare", str(folders[0]), "--out", str(tmp_path / "one.png")])
    assert plain.exit_code == 0 and "no verdict" in plain.output
    path = reference.save_reference(folders[0])
    assert path == runs / "shapes-dalle.curves.json" and path.stat().st_size < 8000
    with pytest.raises(ValueError, match=r"changes its recipe \(stages.prior.optimizer.lr: 0.01 -> 0.4\)"):
        reference.save_reference(folders[2])
    of_another = json.loads(path.read_text())
    of_another["stages"]["clip"] = of_another["stages"]["tokenizer"]
    path.write_text(json.dumps(of_another))
    reference.save_reference(folders[0], "prior")
    assert json.loads(path.read_text()) == of_another  # stages that this run has not, or that were not asked for, stay
    assert set(json.loads(path.read_text())["stages"]["prior"]["curves"]) == {
        "valid/nats_per_code", "valid/caption_gain", "prior/total"
    }  # fmt: skip
    found = compare.compare(folders, stage="prior").verdicts
    words = {label.rpartition("/")[2]: {one.key: one.word for one in found[label]} for label in found}
    assert set(words["first"].values()) == {"normal"}
    assert words["other-seed"]["valid/nats_per_code"] == "normal"
    assert words["x40"]["valid/nats_per_code"] == "behind"
    command = ["compare", *map(str, folders), "--stage", "prior", "--keys", "prior/total", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1 and "the reference was there at step" in " ".join(result.output.split())
    assert Image.open(tmp_path / "0000.png").size[0] == 400


def test_a_loss_far_above_a_reference_that_is_negative_is_drawn(runs, tmp_path, monkeypatch):
    """What a run alone would show by its logarithm, the reference does not let."""
    shutil.copytree(runs / "first", folder := tmp_path / "first")
    shutil.copy(runs / "first" / "recipe.yaml", tmp_path / "shapes-dalle.yaml")
    monkeypatch.setattr(reference, "find", lambda name: tmp_path / "shapes-dalle.yaml")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    reference.save_reference(folder)
    for line in lines:
        if "prior/total" in line:
            line["prior/total"] = 1e3 / line["step"]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = compare.compare([folder], stage="prior")
    (known,) = told.references.values()
    known["prior"]["curves"]["prior/total"] = [[step, -2.0] for step, _ in known["prior"]["curves"]["prior/total"]]
    assert compare.picture(told).width and "prior/total" in compare.report(told)


def test_a_reference_of_another_version_of_the_recipe_or_of_other_data_judges_nothing(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "first", tmp_path / "first")
    shutil.copy(runs / "shapes-dalle.yaml", tmp_path)
    monkeypatch.setattr(reference, "find", lambda name: tmp_path / "shapes-dalle.yaml")
    reference.save_reference(tmp_path / "first")
    assert compare.compare([tmp_path / "first"]).verdicts[str(tmp_path / "first")]

    def answer():
        result = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "first"), "--out", str(tmp_path / "one.png")])
        return result.exit_code, " ".join(result.output.split())

    recipe = (tmp_path / "shapes-dalle.yaml").read_text()
    (tmp_path / "shapes-dalle.yaml").write_text(recipe.replace("steps: 150", "steps: 300"))
    code, text = answer()
    assert code == 0 and "no verdict on prior: the reference is of this recipe before it was changed" in text
    assert "stages.prior.steps: 150 -> 300" in text and "no verdict on tokenizer" not in text
    (tmp_path / "shapes-dalle.yaml").write_text(recipe.replace("num_codes: 64", "num_codes: 128"))
    code, text = answer()
    assert code == 0 and all(f"no verdict on {stage}: the reference is of" in text for stage in ("tokenizer", "prior"))
    (tmp_path / "shapes-dalle.yaml").write_text(recipe)
    log = tmp_path / "first" / "log.jsonl"
    log.write_text(log.read_text().replace('"data": "shapes', '"data": "other shapes'))
    code, text = answer()
    assert code == 0 and "no verdict on prior: the reference read other data" in text


def test_a_reference_that_ends_before_its_training_judges_until_there_and_never_replaces_a_longer_one(
    runs, tmp_path, monkeypatch
):
    shutil.copy(runs / "shapes-dalle.yaml", tmp_path)
    monkeypatch.setattr(reference, "find", lambda name: tmp_path / "shapes-dalle.yaml")
    entries = [json.loads(line) for line in (runs / "first" / "log.jsonl").read_text().splitlines()]
    shutil.copytree(runs / "first", tmp_path / "cut")

    def cut(last):
        kept = [one for one in entries if one["stage"] == "prior" and one["step"] <= last]
        (tmp_path / "cut" / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))

    cut(10)
    with pytest.raises(ValueError, match="prior is at step 10 and was never validated"):
        reference.save_reference(tmp_path / "cut")
    cut(68)  # validated at 60, and its loss told until 68
    reference.save_reference(tmp_path / "cut")
    found = compare.compare([runs / "first", runs / "x40"], stage="prior").verdicts
    for name, word in ("first", "normal"), ("x40", "behind"):
        one = next(one for one in found[str(runs / name)] if one.key == "valid/nats_per_code")
        assert (one.step, one.word) == (45, word) and "the reference ends at step 60 of 150" in one.why
    cut(50)
    with pytest.raises(ValueError, match="prior is measured at step 45; its reference until step 60"):
        reference.save_reference(tmp_path / "cut")
    reference.save_reference(runs / "first")
    one = compare.compare([runs / "first"], stage="prior").verdicts[str(runs / "first")][0]
    assert one.step == 150 and "ends" not in one.why

    path = tmp_path / "shapes-dalle.curves.json"
    later = json.loads(path.read_text())
    for points in later["stages"]["prior"]["curves"].values():
        points[:] = [(step, value) for step, value in points if step > 60]  # first measured at 75
    path.write_text(json.dumps(later))
    cut(50)
    comparison = compare.compare([tmp_path / "cut"])
    assert comparison.verdicts == {str(tmp_path / "cut"): []}
    assert "no verdict on prior: the reference was not measured around these" in " ".join(
        compare.report(comparison).split()
    )
    cut(10)
    said = " ".join(compare.report(compare.compare([tmp_path / "cut"])).split())
    assert "no verdict on prior: the run was not validated yet" in said


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.curves.json")), ids=lambda path: path.parent.name + path.name)
def test_every_shipped_reference_is_of_its_recipe_as_it_stands(path, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "find", find)  # where `runs` has replaced it
    recipe = path.with_name(path.name.replace(".curves.json", ".yaml"))
    shutil.copy(recipe, tmp_path / "recipe.yaml")
    fit, unfit = reference.reference_of(tmp_path, {})
    assert fit and not unfit
    for name, one in fit.items():
        stage = read(recipe).training["stages"][name]
        assert (one["steps"], one["global_batch"]) == (stage["steps"], stage["global_batch"])
        run = history.History(name, {"data": "of the user's own"})
        assert reference.reference_of(tmp_path, {name: run})[1] == {name: "the reference read other data"}


def test_all_shared_curves_are_drawn_from_the_log_alone(runs, tmp_path):
    for name in ("first", "x40"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / name / "log.jsonl", tmp_path / name)
    comparison = compare.compare([tmp_path / "first", tmp_path / "x40"])
    keys = [key for stage, key in comparison.keys if stage == "prior"]
    assert keys[0] == "valid/nats_per_code" and {"prior/image_loss", "prior/norm", "lr", "wait"} < set(keys)
    picture = compare.picture(comparison)
    colours = {colour for _, colour in picture.getcolors(2**24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} < colours
    rows = -(-len(comparison.keys) // 3)
    assert picture.size == (1200, 30 + 240 * rows)


def test_what_is_not_shared_is_named(runs, tmp_path):
    for arguments, message in (
        ({"stage": "priot"}, "did you mean 'prior'"),
        ({"keys": ["valid/nats_per_cod"]}, "did you mean 'valid/nats_per_code'"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.compare([runs / "first"], **arguments)
    (tmp_path / "log.jsonl").write_text((runs / "first" / "log.jsonl").read_text())
    with pytest.raises(ValueError, match="names no shipped recipe"):
        reference.save_reference(tmp_path)


def test_normal_is_what_the_reference_was_around_this_step():
    points = [(step, 100 / step) for step in range(10, 301, 10)]
    low, high = reference.band(points, 150)
    room = 0.02 * 100 / 150  # 2 %: it scatters less
    assert (low, high) == pytest.approx((100 / 200 - room, 100 / 112.5 + room), rel=1e-2)
    assert reference._at(points, 15) == pytest.approx(7.5) and reference._at(points, 999) == 100 / 300
    thin = reference._thin([(step, float(step)) for step in range(1, 1001)])
    assert len(thin) == 50 and thin[-1] == (1000, 990.5) and thin[0] == (20, 10.5)


def test_sparklines_and_axes():
    rising = [(step, float(step)) for step in range(8)]
    assert charts.sparkline(rising, (0, 7), 0, 7, False, width=8) == "▁▂▃▄▅▆▇█"
    assert charts.sparkline(rising[:4], (0, 7), 0, 7, False, width=8) == "▁▂▃▄    "
    assert charts.ticks(0.0, 1.0, False) == [0, 0.5, 1.0]
    assert charts.ticks(21.3, 22.7, False) == [21.5, 22.0, 22.5]
    assert charts.ticks(0.5, 2000, True) == [1, 10, 100, 1000]
    spiky = [(step, 1.0) for step in range(99)] + [(99, 100.0)]
    assert max(value for _, value in charts.smooth(spiky)) == 1.0
