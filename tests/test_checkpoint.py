"""Model folders are strict, and checkpoints survive a torn write."""

import copy
import json
import pickle

import pytest
import torch

from kartina.pipeline import checkpoint
from kartina.pipeline.recipe import Recipe, build
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training import state
from kartina.training.optim import EMA, rate
from kartina.training.run import Optimizer

RECIPE = Recipe(name="tests/linear", paper="none", image_size=8, parts={})
DVAE = {"kind": "dvae", "image_size": 8, "num_codes": 7, "width": 4, "init_width": 4, "num_groups": 2}
DALLE = {"kind": "dalle", "text_vocab": 260, "text_length": 6, "num_codes": 7, "grid": [4, 4], "width": 8, "depth": 2}
SYSTEM = Recipe(
    name="tests/system",
    paper="none",
    image_size=8,
    captions={"vocab_size": 260, "context_length": 6},
    parts={"tokenizer": DVAE, "prior": DALLE | {"num_heads": 2}},
)


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_part(tmp_path, RECIPE, "prior", {"w": torch.arange(6.0).view(2, 3)}, trained_against={})
    return tmp_path


def test_weights_come_back(folder):
    assert torch.equal(checkpoint.load_weights(folder, "prior")["w"], torch.arange(6.0).view(2, 3))


def test_the_hash_sees_names_types_shapes_and_bytes():
    w = torch.arange(6.0)
    variants = [{"w": w}, {"v": w}, {"w": w.half()}, {"w": w.view(2, 3)}, {"w": w + 1}]
    assert len({checkpoint.part_hash(v) for v in variants}) == len(variants)
    assert checkpoint.part_hash({"a": w, "b": w + 1}) == checkpoint.part_hash({"b": w + 1, "a": w})


def test_an_untrained_part_is_named(folder):
    with pytest.raises(checkpoint.ModelError, match="clip.*not trained"):
        checkpoint.load_weights(folder, "clip")


def test_a_truncated_file_is_refused(folder):
    path = folder / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(checkpoint.ModelError, match="not a whole safetensors"):
        checkpoint.load_weights(folder, "prior")


def test_altered_weights_are_refused(folder):
    path = folder / "prior.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoint.ModelError, match="differ from the hash"):
        checkpoint.load_weights(folder, "prior")


def test_a_pickle_is_never_read(folder):
    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    (folder / "prior.safetensors").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(checkpoint.ModelError, match="pickles are never read"):
        checkpoint.load_weights(folder, "prior")


@pytest.fixture
def system(tmp_path):
    """A model folder with fresh weights of SYSTEM."""
    CaptionTokenizer.train(["a red ring", "кольцо"], 260, 6).save(tmp_path / "captions.json")
    for part in SYSTEM.parts:
        checkpoint.save_part(tmp_path, SYSTEM, part, checkpoint.export(build(SYSTEM, part)))
    return tmp_path


def altered(part, **arguments):
    """SYSTEM with other arguments of one part."""
    return SYSTEM.model_copy(update={"parts": {**SYSTEM.parts, part: SYSTEM.parts[part] | arguments}})


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_a_part_comes_back_as_it_was_exported(system, part):
    module = checkpoint.load_part(system, SYSTEM, part)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert checkpoint.part_hash(checkpoint.export(module)) == checkpoint.read_card(system)["parts"][part]["hash"]
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters())


def test_the_memory_format_changes_neither_hash_nor_weights(system, monkeypatch):
    from kartina.tokenizers.dvae import DiscreteVAE

    start = DiscreteVAE.__init__

    def channels_last(self, *arguments, **keywords):
        start(self, *arguments, **keywords)
        self.to(memory_format=torch.channels_last)

    plain = checkpoint.load_part(system, SYSTEM, "tokenizer")
    monkeypatch.setattr(DiscreteVAE, "__init__", channels_last)
    module = checkpoint.load_part(system, SYSTEM, "tokenizer")
    weight = module.decoder.groups[0][0].branch[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    digest = checkpoint.read_card(system)["parts"]["tokenizer"]["hash"]
    assert checkpoint.part_hash(checkpoint.export(module)) == digest
    exported = checkpoint.export(copy.deepcopy(module).half(), torch.float32)  # half would round the smallest away
    assert all(value.is_contiguous() for value in exported.values())
    state = module.state_dict()
    assert checkpoint.part_hash(state) == checkpoint.part_hash(plain.state_dict())
    assert checkpoint.save_part(system, SYSTEM, "tokenizer", state) == checkpoint.part_hash(state)
    assert all(value.is_contiguous() for value in checkpoint.load_weights(system, "tokenizer").values())


@pytest.mark.parametrize(
    ("part", "arguments", "message"),
    [
        ("tokenizer", {"width": 10_000_000}, "width asks for more than the weights hold"),
        ("tokenizer", {"width": 400}, "does not fit its recipe in 74 tensors"),
        ("tokenizer", {"num_groups": 10**12}, "num_groups asks for more"),
        ("prior", {"width": 10_000_000}, "width asks for more"),
        ("prior", {"depth": 10_000_000}, "depth asks for more"),
        ("prior", {"depth": 6000}, "depth asks for more"),
        ("tokenizer", {"blocks_per_group": 900}, "asks for more tensors than the file holds"),
        ("prior", {"depth": 3}, "does not fit its recipe in .* first blocks.2"),
        ("prior", {"grid": [10_000_000, 4]}, "grid asks for more"),
        ("prior", {"grid": [[4, 4], [4, 4]]}, "grid asks for more"),
        ("prior", {"grid": 4}, "cannot be built"),
        ("prior", {"width": "wide"}, "cannot be built"),
        ("prior", {"num_heads": 0}, "cannot be built"),
        ("prior", {"shift": [100]}, "must stay within"),
        ("prior", {"shift": [1] * 1000}, "at most one for two channels"),
        ("prior", {"shift": [0]}, "whole numbers >= 1"),
    ],
)
def test_a_hostile_recipe_is_refused_before_it_takes_memory(system, monkeypatch, part, arguments, message):
    def build_on_meta(recipe, part):
        if not torch.empty(1).is_meta:
            pytest.fail("the part was built for real")
        return build(recipe, part)

    monkeypatch.setattr(checkpoint, "build", build_on_meta)
    parts = {**SYSTEM.parts, part: SYSTEM.parts[part] | arguments}
    with pytest.raises(checkpoint.ModelError, match=message):
        checkpoint.load_part(system, SYSTEM.model_copy(update={"parts": parts}), part)
    assert torch.is_grad_enabled()


def test_yaml_that_unfolds_without_end_is_refused(system):
    loaded = checkpoint.load_recipe(system)
    assert loaded == SYSTEM.model_copy(update={"sampling": loaded.sampling}) and loaded.sampling["top_p"] is None
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
    for text, message in (
        (bomb + "name: *a60\n", "aliases"),
        ("[" * 2000, "not readable as YAML"),
        ("#" * 2**16, "expected at most"),
    ):
        (system / "recipe.yaml").write_text(text)
        with pytest.raises(checkpoint.ModelError, match=message):
            checkpoint.load_recipe(system)


@pytest.mark.parametrize(
    ("vocabulary", "context", "message"),
    [(300, 6, "expected 260 tokens and a context of 6"), (260, 7, "got 26. and 7")],
)
def test_captions_of_other_sizes_are_refused(system, vocabulary, context, message):
    captions = ["a red ring", "a blue square", "кольцо"] * 2
    CaptionTokenizer.train(captions, vocabulary, context).save(system / "captions.json")
    checkpoint.load_part(system, SYSTEM, "tokenizer")
    with pytest.raises(checkpoint.ModelError, match=message):
        checkpoint.load_part(system, SYSTEM, "prior")
    (system / "captions.json").write_text("{")
    with pytest.raises(checkpoint.ModelError, match="no caption tokenizer"):
        checkpoint.load_part(system, SYSTEM, "prior")


def test_a_recipe_whose_captions_do_not_fit_its_prior_is_refused(system):
    CaptionTokenizer.train(["a red ring"], 258, 6).save(system / "captions.json")
    recipe = SYSTEM.model_copy(update={"captions": SYSTEM.captions.model_copy(update={"vocab_size": 258})})
    with pytest.raises(checkpoint.ModelError, match="prior reads 6 tokens of 260, the captions have 6 of 258"):
        checkpoint.load_part(system, recipe, "prior")


@pytest.mark.parametrize("name", ["recipe.yaml", "captions.json", "prior.safetensors", "card.json"])
def test_links_out_of_the_folder_are_refused(system, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / name
    (system / name).rename(outside)
    (system / name).symlink_to(outside)
    with pytest.raises(checkpoint.ModelError, match=f"{name} is a link that leaves"):
        checkpoint.read_card(system)
    with pytest.raises(checkpoint.ModelError, match=f"{name} is a link that leaves"):
        checkpoint.load_recipe(system)


@pytest.mark.parametrize(
    "entry", [{"../../prior": {"hash": ""}}, {"prior": {}}, {"prior": {"hash": "", "trained_against": []}}]
)
def test_a_card_with_foreign_parts_is_refused(system, entry):
    card = json.loads((system / "card.json").read_text())
    (system / "card.json").write_text(json.dumps(card | {"parts": entry}))
    with pytest.raises(checkpoint.ModelError, match="a table of parts"):
        checkpoint.read_card(system)


def test_what_was_measured_belongs_to_the_weights(system):
    before = checkpoint.read_card(system)
    captions = {"exact": 9, "S3": 7}
    checkpoint.save_measured(system, "judge --few", {"exact": 0.5, "S3": 0.1}, device="cpu", captions=captions)
    few = {"judge --few": {"device": "cpu", "captions": captions, "figures": {"exact": 0.5, "S3": 0.1}}}
    assert checkpoint.read_card(system) == before | {"measured": few}
    checkpoint.save_measured(system, "judge", {"exact": 0.6}, captions={"exact": 5})
    few["judge --few"]["figures"].pop("exact")  # measured again, so it stands once; the other figure stays
    few["judge --few"]["captions"] = {"S3": 7}  # of what is left
    again = {"judge": {"captions": {"exact": 5}, "figures": {"exact": 0.6}}}
    assert checkpoint.read_card(system) == before | {"measured": few | again}
    checkpoint.save_part(system, SYSTEM, "tokenizer", checkpoint.export(build(SYSTEM, "tokenizer")))
    assert "measured" not in checkpoint.read_card(system)


def test_a_later_format_is_refused(folder):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"format": 99}))
    with pytest.raises(checkpoint.ModelError, match="format"):
        checkpoint.read_card(folder)


def test_the_newest_whole_state_is_taken(tmp_path):
    state.save(tmp_path, {"at": 10, "step": 10, "w": torch.ones(3)})
    state.save(tmp_path, {"at": 20, "step": 20, "w": torch.ones(3)})
    torn = tmp_path / "step-00000030"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    assert state.load(state.newest(tmp_path))["step"] == 20
    (tmp_path / "step-00000020" / "state.pt").write_bytes(b"rotten")
    assert state.load(state.newest(tmp_path))["step"] == 10
    # The damaged one counts no longer as one to keep, and its step is saved again.
    state.save(tmp_path, {"at": 20, "step": 20, "w": torch.ones(3)}, keep=1)
    assert [path.name for path in state.complete(tmp_path)] == ["step-00000020"]
    assert state.load(state.newest(tmp_path))["step"] == 20
    state.save(tmp_path, {"at": 10, "step": 10, "w": torch.ones(3)})
    for step in (10, 20):
        (tmp_path / f"step-000000{step}" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        state.load(state.newest(tmp_path))


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        state.save(tmp_path, {"at": step, "step": step}, keep=2)
    assert [p.name for p in state.complete(tmp_path)] == ["step-00000002", "step-00000003"]
    for step in (99_999_999, 10**8, 10**8 + 1):  # whose numbers are longer
        state.save(tmp_path, {"at": step, "step": step}, keep=2)
    assert [p.name for p in state.complete(tmp_path)] == ["step-100000000", "step-100000001"]


def test_ema_is_the_closed_form():
    torch.manual_seed(0)
    module, decay = torch.nn.Linear(3, 2), 0.9
    ema, expected = EMA(module, decay), module.weight.detach().clone()
    for n in range(100):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * module.weight.detach()
    assert torch.allclose(ema.average["weight"], expected, atol=1e-5)
    assert not torch.allclose(ema.average["weight"], module.weight)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    config = Optimizer(lr=1.0, warmup=10, decay=0.5)
    curve = [rate(step, 100, config) for step in range(101)]
    assert curve[0] == pytest.approx(0.1) and curve[9:51] == [1.0] * 42
    assert curve[75] == pytest.approx(0.5) and curve[100] == pytest.approx(0.0)
