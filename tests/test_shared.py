"""Parts that lie in another, shipped model."""

import json
import shutil

import pytest
import torch

from kartina.pipeline import catalogue, checkpoint, shared
from kartina.training.__main__ import _finished

MODEL = shared.SHIPPED / "emoji" / "dalle"


@pytest.fixture
def without_clip(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("clip.safetensors"))
    return folder


def changed(folder, part, entry):
    card = json.loads((folder / "card.json").read_text())
    card["parts"][part] = entry
    (folder / "card.json").write_text(json.dumps(card))


def test_a_part_that_is_not_there_is_the_shipped_one_of_the_same_hash(without_clip):
    found, expected = (checkpoint.load_weights(folder, "clip") for folder in (without_clip, MODEL))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    changed(without_clip, "clip", {"hash": "0" * 64})
    with pytest.raises(checkpoint.ModelError, match="part 'clip' is not trained yet"):
        checkpoint.load_weights(without_clip, "clip")


def test_a_text_encoder_is_the_text_tower_of_the_clip_beside_it(without_clip):
    clip = checkpoint.load_weights(MODEL, "clip")
    tower = {name: value for name, value in clip.items() if name.split(".")[0] in
             ("token_embedding", "positional_embedding", "transformer", "ln_final")}  # fmt: skip
    was = {"identity": {"stage": "clip"}}
    changed(without_clip, "text", was | {"hash": checkpoint.part_hash(tower)})
    found = checkpoint.load_weights(without_clip, "text")
    assert found.keys() == tower.keys() and len(found) > 10
    for entry, said in ((was | {"hash": "0" * 64}, "differ from the hash"), ({"hash": "0" * 64}, "not trained yet")):
        changed(without_clip, "text", entry)
        with pytest.raises(checkpoint.ModelError, match=said):
            checkpoint.load_weights(without_clip, "text")


def test_a_shared_part_is_not_trained_again(without_clip):
    entry = checkpoint.parts_in(without_clip)["clip"]
    assert _finished(without_clip, "clip", entry["identity"], extended=False)
    changed(without_clip, "clip", entry | {"hash": "0" * 64})
    assert not _finished(without_clip, "clip", entry["identity"], extended=False)


def test_models_tells_what_is_shared(without_clip, monkeypatch):
    monkeypatch.setattr(catalogue, "known_models", lambda: {"emoji/other": without_clip})
    rows, problems = catalogue.catalogue()
    assert not problems and rows[0]["parts"]["clip"] == 0 and rows[0]["parts"]["prior"] > 1e6
    assert "clip shared" in catalogue.report(rows, problems)
