"""CLIP's towers and loss against open_clip, run live at a tiny size."""

import io
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kartina.tokenizers.clip_towers import CLIP
from kartina.training.objectives.clip import clamp_logit_scale, clip
from kartina.training.shards import ShardWriter
from kartina.training.stages.clip import CLIPStage
from kartina.training.stream import ShardSource

SIZES = dict(embed_dim=24, image_size=16, patch_size=4, vision_width=32, vision_depth=2, vision_heads=2)
SIZES |= dict(text_vocab=50, text_length=10, text_width=16, text_depth=2, text_heads=2)


@pytest.fixture(scope="module")
def reference():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=4, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=10, vocab_size=50, width=16, heads=2, layers=2)
    model = open_clip.CLIP(24, vision, text)
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a swapped pair
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1
    return image, torch.randint(0, 48, (6, 10), generator=generator)


def _features(batch: int = 6, seed: int = 2, wrong: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 + wrong, batch, 8, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(drawn, dim=-1)
    return unit[0], unit[1], unit[2:].transpose(0, 1)


def test_outputs_and_gradients_equal_open_clip(reference):
    import open_clip

    model = CLIP(**SIZES)
    model.load_state_dict(reference.state_dict(), strict=True)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    image, text = _inputs()
    text = model.frame(text[:, 2:], torch.tensor([0, 1, 4, 7, 8, 5]))
    ours, theirs = model(image, text), reference(image, text)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_image(image), reference.encode_image(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(text), reference.encode_text(text), atol=1e-5, rtol=0)
    (total, count), _ = clip(*ours, torch.arange(6)[:, None], None, torch.ones(6))
    (total / count).backward()
    open_clip.ClipLoss()(*theirs).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        limit = 1e-5 * max(1.0, float(expected[name].grad.abs().max()))
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=limit, rtol=0, msg=name)
        assert expected[name].grad.abs().max() > 0, name


def test_loss_equals_open_clip_in_float64():
    open_clip = pytest.importorskip("open_clip")
    image, text, _ = _features()
    scale = torch.tensor(9.0, dtype=torch.float64)
    (total, count), scalars = clip(image, text, scale, torch.arange(6)[:, None], None, torch.ones(6))
    torch.testing.assert_close(total / count, open_clip.ClipLoss()(image, text, scale), atol=1e-12, rtol=0)
    assert float(scalars["chance"]) == pytest.approx(math.log(6))
    assert float(scalars["loss"]) == pytest.approx(float(total / count))


def test_same_group_is_no_negative_and_wrong_captions_are():
    image, text, wrong = _features()
    groups = torch.tensor([0, 1, 0, 2, 3, 3])
    (total, count), _ = clip(image, text, torch.tensor(5.0), groups[:, None], wrong, torch.ones(6))
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j == i or groups[j] != groups[i]]
        captions = torch.cat([text[others], wrong[i]])
        found_text = torch.softmax(5 * captions @ image[i], 0)[others.index(i)]
        found_image = torch.softmax(5 * image[others] @ text[i], 0)[others.index(i)]
        expected -= float(found_text.log() + found_image.log()) / 2
    assert float(total) == pytest.approx(expected, abs=1e-12)
    assert float(count) == 6


def test_a_caption_that_is_true_of_an_image_is_no_negative_for_it():
    """Of image 0 captions 2 and 5 are true too, of image 3 caption 4; the other way round they are not."""
    image, text, _ = _features()
    groups = torch.tensor([[0, 2, 5], [1, 1, 1], [2, 2, 2], [3, 4, 3], [4, 4, 4], [5, 9, 5]])
    (total, _), _ = clip(image, text, torch.tensor(5.0), groups, None, torch.ones(6))
    true = {(0, 2), (0, 5), (3, 4)}
    expected = 0.0
    for i in range(6):
        captions = [j for j in range(6) if (i, j) not in true]
        images = [j for j in range(6) if (j, i) not in true]
        found_text = torch.softmax(5 * text[captions] @ image[i], 0)[captions.index(i)]
        found_image = torch.softmax(5 * image[images] @ text[i], 0)[images.index(i)]
        expected -= float(found_text.log() + found_image.log()) / 2
    assert float(total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("beside", "unread", "expected"), [(False, [], [1, 1, 1, 0]), (True, [], [0, 1, 1, 0]), (False, [1], [1, 1, 1, 1])]
)
def test_an_image_is_right_where_its_caption_beats_those_of_another_meaning_and_wrong_ones(beside, unread, expected):
    """On a circle the nearest is the likest. Captions 0 and 2 mean the same, caption 3 is true of image 1 too.

    Caption 1 is nearer to image 3 than its own, but counts only where its sample could be read.
    """

    def circle(angle):
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    images, captions = torch.tensor([0.0, 1.0, 0.1, 2.0]), torch.tensor([0.2, 1.1, 0.0, 1.02])
    wrong = circle(images[:, None] + torch.tensor([0.3, 0.15])) if beside else None
    stage = SimpleNamespace(
        network=None,
        _features=lambda network, batch: (circle(images), circle(captions), None, wrong),
        _meanings=lambda batch: [["a", "a"], ["b", "d"], ["a", "a"], ["d", "d"]],
    )
    weight = torch.ones(4).index_fill(0, torch.tensor(unread, dtype=torch.long), 0)
    assert CLIPStage.measure(stage, SimpleNamespace(weight=weight))["accuracy"].tolist() == expected


def test_all_captions_of_a_sample_reach_the_loss(tmp_path):
    """Of shards whose samples have several, whichever is drawn, and of one that cannot be read none."""
    told = [["an owl", "сова", "Bird"], ["an owl"], [f"caption {k}" for k in range(12)]]
    with ShardWriter(tmp_path / "shards") as writer:
        for captions in (*told, ["no picture"]):
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            data = file.getvalue() if captions != ["no picture"] else b"torn"
            writer.write({"png": data, "txt": "\n".join(captions).encode()})
    source = ShardSource(tmp_path / "shards", 32, 0)
    batch = source.read(range(source.size))
    rows = CLIPStage._meanings(SimpleNamespace(source=source), batch)
    assert sorted(map(list, batch.told)) == sorted([*told, []]) and {len(row) for row in rows} == {8}
    for row, drawn, known, weight in zip(rows, batch.captions, batch.told, batch.weight.tolist(), strict=True):
        assert row[0] == drawn.lower() and (drawn in known or not weight)
        assert set(row) <= {caption.lower() for caption in known or [""]}
        assert len(set(row)) == min(8, len(known) or 1) and (drawn == "") == (weight == 0)


def test_weightless_samples_change_nothing():
    image, text, wrong = _features()
    weight = torch.tensor([1.0, 1, 0.5, 1, 0, 0])
    image.requires_grad_(True)
    (total, count), scalars = clip(image, text, torch.tensor(5.0), torch.arange(6)[:, None], wrong, weight)
    (cut, _), fewer = clip(image[:4], text[:4], torch.tensor(5.0), torch.arange(4)[:, None], wrong[:4], weight[:4])
    torch.testing.assert_close(total, cut)
    torch.testing.assert_close(scalars, fewer)
    assert float(count) == 3.5
    (grad,) = torch.autograd.grad(total, image)
    assert grad[4:].abs().max() == 0
    assert grad.isfinite().all()


def test_one_group_only_is_finite():
    image, text, _ = _features()
    image.requires_grad_(True)
    (total, _), scalars = clip(image, text, torch.tensor(5.0), torch.zeros(6, 1).long(), None, torch.ones(6))
    total.backward()
    assert float(total.detach()) == pytest.approx(0, abs=1e-12)
    assert image.grad.isfinite().all()
    assert float(scalars["chance"]) == 0


def test_accuracy_and_chance_of_a_blind_and_a_perfect_model():
    same = torch.nn.functional.normalize(torch.ones(4, 8), dim=-1)
    weight, groups = torch.ones(4), torch.arange(4)[:, None]
    (total, count), blind = clip(same, same, torch.tensor(10.0), groups, same[:, None].expand(4, 2, 8), weight)
    assert float(blind["accuracy"]) == 0
    assert float(total / count) == pytest.approx(float(blind["chance"]), abs=1e-6)
    assert float(blind["chance"]) == pytest.approx((math.log(6) + math.log(4)) / 2)
    _, perfect = clip(torch.eye(4), torch.eye(4), torch.tensor(10.0), groups, None, weight)
    assert float(perfect["accuracy"]) == 1


def test_logit_scale_is_clamped_at_100():
    high, low = torch.nn.Parameter(torch.tensor(9.0)), torch.nn.Parameter(torch.tensor(1.0))
    clamp_logit_scale(high)
    clamp_logit_scale(low)
    assert float(high.detach().exp()) == pytest.approx(100)
    assert float(low.detach()) == 1


def test_framing_and_pooling():
    model = CLIP(**SIZES).double().eval()
    text = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8], [9, 9, 9, 9]])
    framed = model.frame(text, torch.tensor([2, 4, 0]))
    assert framed.tolist() == [[48, 5, 6, 49, 0, 0], [48, 5, 6, 7, 8, 49], [48, 49, 0, 0, 0, 0]]
    padded = torch.nn.functional.pad(framed, (0, 4))
    torch.testing.assert_close(model.encode_text(framed), model.encode_text(padded), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="start id 48"):
        model.frame(torch.tensor([[48, 3]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="lengths"):
        model.frame(text, torch.tensor([2, 5, 0]))


def test_edges_refuse():
    model = CLIP(**SIZES)
    with pytest.raises(ValueError, match="resize"):
        model.encode_image(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="T <= 10"):
        model.encode_text(torch.zeros(1, 11, dtype=torch.int64))
    with pytest.raises(ValueError, match="patch_size"):
        CLIP(**SIZES | {"patch_size": 5})
    with pytest.raises(ValueError, match="depth of at least 1"):
        CLIP(**SIZES | {"text_depth": 0})
    image, text, _ = _features()
    with pytest.raises(ValueError, match="weight"):
        clip(image, text[:3], torch.tensor(1.0), torch.arange(6)[:, None], None, torch.ones(6))


def test_painting_with_clip_imports_neither_open_clip_nor_the_compiler():
    code = (
        "import sys, kartina; kartina.TextToImage.load('shapes/dalle', device='cpu')(['a red square'], candidates=2);"
        "sys.exit('open_clip' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
