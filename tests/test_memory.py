"""Micro-batches are halved where memory ends, then one picture takes less, and what cannot be helped is raised."""

import pytest
import torch
from PIL import ImageChops
from test_drawing import LATENT, write_model
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline.images import read_metadata, read_picture, save_png
from kartina.pipeline.memory import batch_of, in_batches
from kartina.pipeline.text_to_image import TextToImage, metadata, repaint

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_halved_until_it_fits_every_item_is_made_once_in_order():
    seen, told = [], []

    def paint(some, report):
        seen.append((some.start, some.stop))
        if some.stop - some.start > 2:
            raise OUT_OF_MEMORY
        report(1, 2)
        return [*range(some.start, some.stop)]

    with pytest.warns(UserWarning) as warned:
        made = in_batches(paint, 11, 8, {}, lambda *done: told.append(done))
    assert made == [*range(11)]
    assert [str(one.message) for one in warned] == [
        "out of memory with 8 pictures: going on with 4", "out of memory with 4 pictures: going on with 2"
    ]  # fmt: skip
    assert seen == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    assert all(done <= total for done, total in told) and told == sorted(told)


def test_what_cannot_be_spared_or_is_another_error_is_raised():
    def paint(some, report):
        raise OUT_OF_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        in_batches(paint, 1, 8, {}, None)
    with pytest.raises(RuntimeError, match="of another kind"):
        in_batches(lambda *_: (_ for _ in ()).throw(RuntimeError("of another kind")), 4, 4, {}, None)


@pytest.mark.parametrize(("size", "expected"), [(8, 64), (128, 64), (256, 16), (512, 4), (768, 1), (2048, 1)])
def test_on_a_cpu_fewer_of_larger_pictures_are_painted_at_once(size, expected):
    assert batch_of(torch.nn.Linear(1, 1), size) == expected
    assert batch_of(torch.nn.Linear(1, 1, device="meta"), size) == 64


def test_a_picture_of_a_batch_that_does_not_fit_is_painted_again_alone(tmp_path, monkeypatch):
    system = TextToImage.load(write_model(tmp_path / "model", LATENT))
    painting, paint = system("a red ring", candidates=3, keep=3)[2], system._paint
    facts = metadata(painting)
    assert repaint(system, facts).facts == painting.facts

    def tight(rows, *rest):
        if len(rows) > 1:
            raise OUT_OF_MEMORY
        return paint(rows, *rest)

    monkeypatch.setattr(system, "_paint", tight)
    with pytest.warns(UserWarning, match="out of memory with the 3 pictures.*painted alone"):
        again = repaint(system, facts)
    assert (again.seed, again.facts["micro_batch"], again.facts["row"]) == (painting.seed, 1, 0)
    assert max(high for _, high in ImageChops.difference(again.image, painting.image).getextrema()) <= 1
    tried = []

    def tighter(rows, *rest):
        tried.append(len(rows))
        return paint(rows, *rest) if len(tried) > 2 else tight([*rows, *rows], *rest)

    monkeypatch.setattr(system, "_paint", tighter)
    with pytest.warns(UserWarning, match="attention takes"):
        assert repaint(system, facts).facts["sliced"]
    assert tried == [3, 1, 1]


def test_the_command_line_says_how_many_at_once_and_one_alone_without_the_device(tmp_path):
    def run(*words):
        done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    folder = write_model(tmp_path / "model", LATENT)
    here = ("--model", folder, "--device", "cpu", "--micro-batch", 2)
    run("paint", "a red ring", "a blue ring", "a green ring", *here, "--out", tmp_path / "out")
    facts = [read_metadata(tmp_path / "out" / f"000{k}.png") for k in range(3)]
    assert [one["micro_batch"] for one in facts] == [2, 2, 1]
    away = facts[1] | {"device": "cuda:7", "compiled": True, "micro_batch": 64, "row": 9}
    save_png(read_picture(tmp_path / "out" / "0001.png"), tmp_path / "away.png", away)
    said = run("reproduce", tmp_path / "away.png", "--model", folder, "--out", tmp_path / "again.png")
    again = read_metadata(tmp_path / "again.png")
    assert "painting on the CPU" in said and (again["micro_batch"], again["row"]) == (1, 0)
    assert "compiled" not in again


def test_the_way_between_two_captions_takes_what_memory_there_is(tmp_path, monkeypatch):
    system = TextToImage.load(write_model(tmp_path / "model", LATENT))
    whole, draw = system.interpolate("a red ring", "a blue ring", frames=4), system.draw.sample

    def sample(condition, seeds, *rest, **walk):
        if len(seeds) > 1:
            raise OUT_OF_MEMORY
        return draw(condition, seeds, *rest, **walk)

    monkeypatch.setattr(system.draw, "sample", sample)
    with pytest.warns(UserWarning, match="out of memory with 4 pictures"):
        spared = system.interpolate("a red ring", "a blue ring", frames=4)
    assert len(spared) == 4
    for one, other in zip(whole, spared, strict=True):
        assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
