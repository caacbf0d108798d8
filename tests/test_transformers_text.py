"""Pretrained text encoders: tiny random ones of transformers in folders; a prior trained over one, and painted with."""

import io
import json
import shutil

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.images import to_pil
from kartina.pipeline.recipe import RecipeError, count_parameters
from kartina.pipeline.text_to_image import TextToImage, metadata, repaint
from kartina.priors import transformers_text
from kartina.priors.transformers_text import FOLDER, PAD, TransformersText, digest, find
from kartina.training import __main__ as trainer
from kartina.training import checks, encode, state, stream
from kartina.training import run as runs
from kartina.training.data.shapes import ShapesSource
from kartina.training.shards import ShardWriter
from kartina.training.sources import source_of
from kartina.training.stages.diffusion import DiffusionStage

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "ring", "on", "large", "small", "square", "background"]
SIZES = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = pytest.mark.parametrize("kind", ["t5", "bert", "clip"])
RECIPE = [
    "parts.tokenizer.width=8",
    "parts.tokenizer.latent_channels=4",
    "parts.text.source=tiny/bert",
    "parts.text.text_length=20",
    "parts.prior.width=16",
    "parts.prior.in_channels=4",
    "parts.prior.context_dim=16",
    "parts.prior.attn_levels=[1]",
    *(f"stages.{stage}.{key}" for stage in ("tokenizer", "prior") for key in ("steps=2", "global_batch=4")),
    *(f"stages.{stage}.validate_samples=16" for stage in ("tokenizer", "prior")),
    "training.precision=fp32",
    "training.trackers=[]",
    "sampling.num_steps=2",
]


def save_encoder(folder, kind: str):
    """A random encoder of transformers and its tokenizer of WORDS. -> the network, with the whole of CLIP's towers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, PreTrainedTokenizerFast, T5Config, T5Model

    torch.manual_seed(0)
    if kind == "t5":
        network = T5Model(
            T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **SIZES)
        )
    elif kind == "bert":
        network = BertModel(BertConfig(**BLOCK, **SIZES, max_position_embeddings=24))
    else:
        text = BLOCK | SIZES | {"max_position_embeddings": 24}
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=BLOCK | {"image_size": 8, "patch_size": 4}))
    network.eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return network


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The folder of folders, tiny/t5 and so on, and what was saved there."""
    home = tmp_path_factory.mktemp("encoders")
    return home, {kind: save_encoder(home / "tiny" / kind, kind) for kind in ("t5", "bert", "clip")}


@pytest.fixture(autouse=True)
def here(encoders, monkeypatch):
    monkeypatch.setenv(FOLDER, str(encoders[0]))


def loaded(kind: str, **more) -> TransformersText:
    encoder = TransformersText(f"tiny/{kind}", **{"text_length": 8} | more)
    encoder.load()
    return encoder.eval()


@torch.no_grad()
@KINDS
def test_it_gives_what_transformers_gives_and_pads_change_nothing(kind, encoders):
    encoder, theirs = loaded(kind), encoders[1][kind]
    text, lengths = encoder.captions.encode(["a red ring", "a large blue square on a"])
    assert text[0].tolist() == [1, 4, 5, 7, 2, PAD, PAD, PAD] and lengths.tolist() == [5, 8]
    tokens, mask = encoder(encoder.frame(text, lengths))
    assert tokens.shape == (2, 8, encoder.width) == (2, 8, 16) and mask.sum(dim=1).tolist() == [5, 8]
    tower = {"t5": lambda: theirs.encoder, "bert": lambda: theirs, "clip": lambda: theirs.text_model}[kind]()
    for row, length in enumerate(lengths.tolist()):
        alone = tower(input_ids=text[row : row + 1, :length]).last_hidden_state[0]
        assert (tokens[row, :length] - alone).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())
    null, seen = encoder(encoder.null_text(3))
    assert null.shape == (3, 8, 16) and seen.sum().item() == 6 and encoder.null_text(1)[0, :3].tolist() == [1, 2, PAD]


def test_a_long_caption_is_cut_once_with_a_warning_and_keeps_its_end():
    captions = loaded("bert", text_length=4).captions
    with pytest.warns(UserWarning, match="longer than 4 tokens are cut, here before 'ring'"):
        text, lengths = captions.encode(["a red ring", "a"])
    assert text[0].tolist() == [1, 4, 5, 2] and lengths.tolist() == [4, 3]
    with pytest.warns(UserWarning, match="here before 'red ring'"):
        captions.encode(["a large red ring"])
    assert captions.num_truncated == 2


def test_what_is_missing_is_one_clear_error(encoders, tmp_path, monkeypatch):
    home, _ = encoders
    monkeypatch.setitem(transformers_text.PACKAGES, "gone", ("no_such_package", "model", {"model_type": "bert"}))
    with pytest.raises(ValueError, match=r'package no_such_package, which is not here; .* -e "\.\[text\]"'):
        find("gone")
    with pytest.raises(ValueError, match="no text encoder 'tiny/none': neither .* run `hf download tiny/none`, or set"):
        TransformersText("tiny/none")
    for path in ("../tiny", "/tiny/bert", "a/b/c", ".hidden", {"a": 1}):
        with pytest.raises(ValueError, match="source is a name, or OWNER/NAME"):
            TransformersText(path)
    for length in (1, 5000, "9"):
        with pytest.raises(ValueError, match="text_length must lie between 2 and 4096"):
            TransformersText("tiny/bert", length)
    with pytest.raises(ValueError, match="reads at most 24 tokens, got text_length 25"):
        loaded("bert", text_length=25)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for name, spoil, message in (
        ("weightless", lambda folder: (folder / "model.safetensors").unlink(), "no weights that transformers reads"),
        ("wordless", lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer that transformers reads"),
        ("broken", lambda folder: (folder / "config.json").write_text("{"), "config.json is none of transformers"),
        ("vision", lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), "name a text encoder"),
    ):
        shutil.copytree(home / "tiny" / "bert", tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            TransformersText(name).load()


def test_weights_of_another_network_are_refused(encoders, tmp_path, monkeypatch):
    shutil.copytree(encoders[0] / "tiny" / "bert", tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match="the weights lack 16 tensors, first encoder.layer.1"):
        TransformersText("deeper", text_length=8).load()


def test_the_digest_is_of_what_the_encoder_is_made_of(encoders, tmp_path, monkeypatch):
    before = digest("tiny/bert")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    copy = tmp_path / "tiny" / "bert"
    shutil.copytree(encoders[0] / "tiny" / "bert", copy)
    (copy / "README.md").write_text("of no matter")
    assert digest("tiny/bert") == before
    words = copy / "tokenizer_config.json"
    words.write_text(json.dumps({**(json.loads(words.read_text()) if words.exists() else {}), "do_lower_case": False}))
    cased = digest("tiny/bert")
    assert cased != before
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert digest("tiny/bert") not in (before, cased)


def test_the_recipe_is_counted_without_its_package():
    recipe, _ = runs.load("shapes/stable-diffusion-minilm", [])
    assert count_parameters(recipe)["text"] == 22_713_216


def test_a_prior_is_trained_over_it_and_painted_with(encoders, tmp_path, monkeypatch):
    command = ["shapes/stable-diffusion-minilm", *RECIPE, "--run", str(tmp_path / "run")]
    assert trainer.main([*command, "--stage", "tokenizer"]) == 0
    bare = shutil.copytree(tmp_path / "run", tmp_path / "bare")
    assert trainer.main(command) == 0
    model = tmp_path / "run" / "model"
    card = checkpoint.read_card(model)
    assert set(card["parts"]) == {"tokenizer", "prior"} and not (model / "captions.json").exists()
    assert card["parts"]["prior"]["trained_against"]["text"] == digest("tiny/bert")
    assert set(card["parts"]["prior"]["trained_against"]) == {"tokenizer", "text"}
    system = TextToImage.load(model)
    first, second = system(["a red ring", "a blue square"], num_steps=2)
    assert first.image.size == second.image.size == (32, 32)
    assert repaint(system, metadata(second)).image.tobytes() == second.image.tobytes()
    assert not any(parameter.requires_grad for parameter in system.parts["text"].parameters())

    from_cache(model, bare, tmp_path)

    other = tmp_path / "other" / "tiny" / "bert"
    shutil.copytree(encoders[0] / "tiny" / "bert", other)
    monkeypatch.setenv(FOLDER, str(tmp_path / "other"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(checkpoint.ModelError, match="prior was trained against another text; put that one back"):
        TextToImage.load(model)


def from_cache(model, bare, folder):
    """20 steps from cached latents and tokens equal 20 from pictures and captions, bit for bit.

    bare: a run folder that holds the tokenizer alone.
    """
    with ShardWriter(folder / "shards", 8) as writer:
        for k, picture in enumerate(to_pil(ShapesSource().read(range(6)).image)):
            data = io.BytesIO()
            picture.save(data, "PNG")
            writer.write({"png": b"broken" if k == 4 else data.getvalue(), "txt": b"a red ring" if k else b"a ring"})
    encode.encode(folder / "shards", folder / "cache", model, ["latents", "text_tokens"], processes=1)
    words = ["shapes/stable-diffusion-minilm", *RECIPE, "stages.prior.steps=20", "stages.prior.log_every=1"]
    words += [f"training.data={{kind: shards, shards: {folder / 'shards'}, validation_share: 0, bad_limit: 0.5}}"]
    words += ["stages.prior.objective={condition_drop: 0.3}", "--stage", "prior"]
    ends, logs = [], []
    for name, more in {"on the fly": [], "cached": [f"training.data.cache={folder / 'cache'}"]}.items():
        run = shutil.copytree(bare, folder / name)
        with pytest.MonkeyPatch.context() as patch:
            if more:
                patch.setattr(stream.ShardSource, "read", None)  # no picture is read
            assert trainer.main([*words, *more, "--run", str(run)]) == 0
        ends.append(state.load(state.newest(run / "state" / "prior")))
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append([(line["prior/error"], line["prior/norm"]) for line in lines if "prior/error" in line])
    assert len(logs[0]) == 20 and logs[1] == logs[0]
    for name in ("networks", "optimizers", "ema"):
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=0)


@pytest.fixture
def stage(encoders, tmp_path):
    prior = "{kind: unet, width: 16, in_channels: 3, channel_mult: [1, 2], attn_levels: [1], norm_groups: 4, "
    pixels = "parts={text: {kind: transformers_text, source: tiny/bert, text_length: 24}, prior: " + prior
    pixels += "blocks_per_level: 1, context_dim: WIDTH}}"

    def make(width: int = 16, *overrides: str):
        recipe, training = runs.load(
            "shapes/stable-diffusion-minilm", [pixels.replace("WIDTH", str(width)), *overrides]
        )
        checks.check(recipe, training, ["prior"], 1, tmp_path)
        config, source = training.stages["prior"], source_of(recipe, training.data)
        return DiffusionStage(recipe, config, source, tmp_path, 0, torch.device("cpu")), source

    return make


def test_the_stage_trains_the_prior_alone(stage):
    fit, source = stage(16, "stages.prior.objective={condition_drop: 0.5}")
    assert fit.network is fit.prior and list(fit.exported()) == ["prior"]
    seen = []
    fit.forward["prior"] = lambda x_t, t, condition, draws: seen.append(condition) or torch.zeros_like(x_t)
    batch = source.read(range(64))
    assert all(caption.isascii() for caption in batch.captions)
    list(fit.updates(batch, 0))
    whole, null = fit._condition(batch), fit._encoded(fit.text.null_text(1))
    dropped = seen[0].mask.sum(dim=1) == 2
    assert 16 < dropped.sum() < 48 and torch.equal(seen[0].tokens[~dropped], whole.tokens[~dropped])
    assert torch.equal(seen[0].tokens[dropped], null.tokens.expand(int(dropped.sum()), -1, -1))
    assert fit.measure(source.read(range(2)))["error"].shape == (2,)
    assert fit.preview(source.read(range(2))).width >= 128


def test_a_prior_of_another_width_and_a_stage_for_it_are_refused(stage):
    with pytest.raises(RecipeError, match="context_dim must be the width of parts.text.*got 24 and 16"):
        stage(24)
    with pytest.raises(RecipeError, match="bpe_dropout is of a vocabulary of `captions`, and parts.text has its own"):
        stage(16, "stages.prior.objective={bpe_dropout: 0.1}")
    recipe, _ = runs.load("shapes/stable-diffusion-minilm", ["frozen=[prior]"])
    with pytest.raises(RecipeError, match="stages.prior: prior is frozen; leave out this stage"):
        checks.stage_of(recipe, "prior")
    with pytest.raises(RecipeError, match="no part 'txt'; did you mean 'text'"):
        runs.load("shapes/stable-diffusion", ["frozen=[txt]"])
