"""BPE-dropout of a diffusion stage: words of captions are split in training alone, and never taken from a cache."""

import json
import shutil

import pytest
import torch
from shape_shards import pack

from kartina.pipeline.known_models import SHIPPED
from kartina.pipeline.recipe import RecipeError
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training import __main__ as trainer
from kartina.training import encode, stream
from kartina.training import run as runs
from kartina.training.sources import source_of
from kartina.training.stages.diffusion import DiffusionStage

TEXT = "text_vocab: 302, text_length: 24"
CLIP = "embed_dim: 8, image_size: 32, patch_size: 16, vision_width: 16, vision_depth: 1, vision_heads: 2"
FROZEN = [
    "frozen=[text]",
    "captions={vocab_size: 300, context_length: 22}",
    f"parts.text={{kind: clip_text, {TEXT}, width: 16, depth: 1, num_heads: 2, quick_gelu: false}}",
    f"parts.clip={{kind: clip, {CLIP}, {TEXT}, text_width: 16, text_depth: 1, text_heads: 2}}",
    *["parts.tokenizer.width=8", "parts.prior.width=16", "parts.prior.channel_mult=[1, 2]"],
    *["parts.prior.context_dim=16", "parts.prior.attn_levels=[1]", "sampling.num_steps=2"],
    *["training.precision=fp32", "training.trackers=[]", "stages.prior.log_every=1", "stages.clip.objective={}"],
    *[f"stages.{stage}.{key}" for stage in ("tokenizer", "clip", "prior") for key in ("steps=2", "global_batch=4")],
    *[f"stages.{stage}.levels=null" for stage in ("clip", "prior")],
    *["stages.tokenizer.jitter=null", "stages.prior.objective={bpe_dropout: 0.2, condition_drop: 0.3}"],
    *["stages.prior.steps=6", "stages.prior.optimizer.warmup=0"],
]


def stage_of(model, *overrides: str):
    recipe, training = runs.load("shapes/stable-diffusion", list(overrides))
    source = source_of(recipe, training.data_of("prior"))
    return DiffusionStage(recipe, training.stages["prior"], source, model, 0, torch.device("cpu")), source


def test_words_are_split_in_training_by_step_and_sample_and_not_in_validation():
    overrides = ["frozen=[]", "stages.prior.objective={bpe_dropout: 0.1, bpe_dropout_start: 0.5}"]
    overrides += ["stages.prior.steps=8"]
    stage, source = stage_of(SHIPPED / "shapes/stable-diffusion", *overrides)
    batch, whole = source.read(range(16)), stage.captions.encode
    split = stage._condition(batch, 4)
    assert torch.equal(split, stage._condition(batch, 4)) and not torch.equal(split, stage._condition(batch, 5))
    assert torch.equal(split[4:8], stage._condition(source.read(range(4, 8)), 4))
    plain = stage.text.frame(*whole(batch.captions))
    assert (split != plain).any(dim=1).sum() > 4
    assert torch.equal(stage._condition(batch, 3), plain) and torch.equal(stage._condition(batch), plain)


def test_captions_are_split_anew_where_all_else_comes_from_a_cache(tmp_path, monkeypatch):
    """A frozen text encoder's tokens are in the cache too, but of whole words."""
    pack(tmp_path / "shards", 8, 8)
    words = ["shapes/stable-diffusion", *FROZEN]
    words += [f"training.data={{kind: shards, shards: {tmp_path / 'shards'}, validation_share: 0}}"]
    base = tmp_path / "base"
    for stage in ("tokenizer", "clip"):
        assert trainer.main([*words, "--stage", stage, "--run", str(base)]) == 0
    encode.encode(tmp_path / "shards", tmp_path / "cache", base / "model", ["latents", "text_tokens"], processes=1)
    logs = []
    for name, more in {
        "pictures": [],
        "cached": [f"training.data.cache={tmp_path / 'cache'}"],
        "whole": ["stages.prior.objective.bpe_dropout=0"],
    }.items():
        run = shutil.copytree(base, tmp_path / name)
        with monkeypatch.context() as patch:
            if name == "cached":
                patch.setattr(stream.ShardSource, "read", None)  # no picture is read
            assert trainer.main([*words, *more, "--stage", "prior", "--run", str(run)]) == 0
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append([(line["prior/error"], line["prior/norm"]) for line in lines if "prior/error" in line])
    assert len(logs[0]) == 6 and logs[0] == logs[1] != logs[2]


def test_a_vocabulary_of_clip_cannot_be_split(monkeypatch):
    model = SHIPPED / "shapes/stable-diffusion"
    captions = CaptionTokenizer.load(model / "captions.json")
    captions.padded = False
    monkeypatch.setattr(CaptionTokenizer, "load", lambda path: captions)
    assert stage_of(model, "frozen=[]")[0].captions is captions
    with pytest.raises(RecipeError, match="bpe_dropout cannot split words of CLIP's captions; leave it out"):
        stage_of(model, "frozen=[]", "stages.prior.objective={bpe_dropout: 0.1}")
