"""The stage of DALL-E: which parts it refuses, and how captions are read."""

import pytest
import torch
from typer.testing import CliRunner

from kartina import cli
from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import build
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training import __main__ as trainer
from kartina.training import run as runs
from kartina.training.sources import source_of
from kartina.training.stages.clip import CLIPStage
from kartina.training.stages.dalle import DALLEStage


def test_a_fitting_prior_is_taken(tiny, tmp_path):
    given = trainer._arguments(tiny["dalle"][1])
    recipe, training = runs.load(given.recipe, given.overrides)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    CaptionTokenizer.train(["a red ring"], 300, 22).save(tmp_path / "captions.json")
    source = source_of(recipe, training.data)
    made = DALLEStage(recipe, training.stages["prior"], source, tmp_path, 0, torch.device("cpu"))
    ((name, (loss, count), _),) = made.updates(source.read(range(2)), 0)
    assert name == "prior" and loss > 0 and count == 2


@pytest.mark.parametrize("part", ["prior", "clip"])
def test_words_are_split_in_training_by_step_and_sample_and_not_in_validation(part, tiny, tmp_path, monkeypatch):
    wrong = 2 if part == "clip" else 0
    knobs = f"{{bpe_dropout: 0.3{', wrong_captions: 2' if wrong else ''}}}"
    argv = [*tiny["dalle" if part == "prior" else "clip"][1], f"stages.{part}.objective={knobs}"]
    argv += ["captions.context_length=99", "parts.prior.text_length=99", "parts.clip.text_length=101"]
    given = trainer._arguments([*argv, f"stages.{part}.levels=[S1]"])
    recipe, training = runs.load(given.recipe, given.overrides)
    checkpoint.save_part(tmp_path, recipe, "tokenizer", checkpoint.export(build(recipe, "tokenizer")))
    source = source_of(recipe, training.data_of(part))
    CaptionTokenizer.train(source.captions(range(200)), 300, 99).save(tmp_path / "captions.json")
    kind = {"prior": DALLEStage, "clip": CLIPStage}[part]
    stage = kind(recipe, training.stages[part], source, tmp_path, 0, torch.device("cpu"))
    read, split, whole = [], stage.captions.encode_with_dropout, stage.captions.encode

    def noted(encode):
        def call(*arguments):
            read.append(encode(*arguments)[0])
            return encode(*arguments)

        return call

    monkeypatch.setattr(stage.captions, "encode_with_dropout", noted(split))
    monkeypatch.setattr(stage.captions, "encode", noted(whole))
    batch, last = source.read(range(8)), source.read(range(4, 8))
    for given, step in ((batch, 3), (batch, 3), (batch, 4), (last, 3)):
        next(stage.updates(given, step))
    stage.measure(batch)
    one, again, other, part_of, measured = read  # the captions, then the wrong ones of each
    assert [len(tokens) for tokens in read] == [count * (1 + wrong) for count in (8, 8, 8, 4, 8)]
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.cat([one[4:8], one[8 + 4 * wrong :]]), part_of)
    texts = stage.captions.decode(measured)
    assert texts[:8] == batch.captions and stage.captions.decode(one) == stage.captions.decode(other) == texts
    assert torch.equal(measured, whole(texts)[0]) and not torch.equal(one, measured)


PRIOR_ALONE = [
    "parts={prior: {kind: dalle, grid: [4, 4], width: 32, depth: 1, num_heads: 2}}",
    "training.stages={prior: {steps: 1, global_batch: 8, optimizer: {lr: 0.001}}}",
]
SHRUNK = [
    "parts={tokenizer: {kind: autoencoder_kl, image_size: 32, width: 8, channel_mult: [1, 1, 1, 1, 2],"
    " norm_groups: 4, attn_resolutions: []}}",
    "training.stages={tokenizer: {steps: 1, global_batch: 8, optimizer: {lr: 0.001}, objective: {equivariance: 1}}}",
    "sampling={}",
]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parts.prior.width=130"], "parts.prior cannot be built: attention: num_heads must divide"),
        (["parts.clip.text_depth=abc"], "parts.clip cannot be built"),
        (["parts.prior.num_codes=64"], "stage prior: the prior draws (grid, codes) ((16, 8), 64), the tokenizer reads"),
        (["parts.prior.grid=[8, 16]"], "stage prior: the prior draws (grid, codes) ((8, 16), 2048)"),
        (["parts.prior.text_vocab=512"], "stage prior: prior reads 22 tokens of 512, the captions have 22 of 500"),
        (["parts.prior.text_length=24"], "stage prior: prior reads 24 tokens of 500"),
        (["parts.clip.text_length=22"], "stage clip: clip reads 22 tokens of 502, the captions have 22 of 500"),
        (PRIOR_ALONE, "stage prior needs a tokenizer, which shapes/dalle has not"),
        (SHRUNK, "stage tokenizer: its objective's equivariance shrinks latents (2, 4) times, got sides of 2"),
    ],
)
def test_what_a_later_stage_could_not_do_is_said_before_the_first_one_trains(tmp_path, capsys, overrides, said):
    assert trainer.main(["shapes/dalle", *overrides, "--run", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "model").exists()
    dry = CliRunner().invoke(cli.app, ["train", "shapes/dalle", *overrides, "--dry-run"])
    assert dry.exit_code and said in str(dry.exception)
