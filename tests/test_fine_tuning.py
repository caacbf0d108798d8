"""Stable Diffusion trained further on one's own pictures: in from diffusers, trained, painted, and out to diffusers."""

import diffusers
import numpy as np
from PIL import Image
from test_stable_diffusion import ours, run, theirs

from kartina.pipeline import checkpoint
from kartina.training import __main__ as trainer


def test_a_published_model_is_trained_on_own_pictures_and_goes_back(tiny_stable_diffusion, tmp_path, capsys):
    tiny_stable_diffusion("sd1").save_pretrained(tmp_path / "there")
    model, tuned = tmp_path / "model", tmp_path / "tuned"
    run("convert", tmp_path / "there", model)
    (tmp_path / "pictures").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 32), colour).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"a {colour} cat")
    run("data", "pack", tmp_path / "pictures", tmp_path / "shards")
    words = [str(model / "recipe.yaml"), "--from", str(model), "--run", str(tuned), "--stage", "prior"]
    words += ["training.data.kind=shards", f"training.data.shards={tmp_path / 'shards'}"]
    words += ["training.precision=fp32", "training.trackers=[]"]
    words += ["stages.prior={steps: 3, global_batch: 2, validate_samples: 2, ema: 0.5, optimizer: {lr: 0.003}}"]
    assert trainer.main(words) == 0
    before, after = (checkpoint.read_card(folder)["parts"] for folder in (model, tuned / "model"))
    assert before.keys() == after.keys() == {"tokenizer", "text", "prior"}
    assert {part for part in before if before[part]["hash"] != after[part]["hash"]} == {"prior"}
    assert after["prior"]["identity"]["from"] == {"prior": before["prior"]["hash"]}
    assert trainer.main(words) == 0 and "already trained" in capsys.readouterr().out
    picture = ours(tuned)
    assert np.abs(picture - ours(model)).max() > 20
    run("export", tuned, tmp_path / "back", "--to", "diffusers")
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back", safety_checker=None)
    assert np.abs(picture - theirs(back)).max() <= 1
