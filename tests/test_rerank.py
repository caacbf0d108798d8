"""Ranking: order, ties, cosines, and open_clip checkpoints from a local folder or file."""

import json
import sys

import pytest
import torch
from PIL import Image

from kartina.pipeline.rerank import OpenCLIPScorer, clip_scores, rank
from kartina.pipeline.text_to_image import TextToImage
from kartina.tokenizers.clip_towers import CLIP

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def test_rank_breaks_ties_by_place():
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.5], [0.3, 0.3, 0.3, 0.3], [-1.0, -2.0, 0.0, -0.5]])
    assert rank(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2], [2, 3, 0]]
    assert rank(torch.zeros(1, 1000), 1000).tolist() == [list(range(1000))]


@pytest.mark.parametrize("scores, keep", [(torch.zeros(2, 3), 0), (torch.zeros(2, 3), 4), (torch.zeros(3), 1)])
def test_rank_refuses(scores, keep):
    with pytest.raises(ValueError, match="keep"):
        rank(scores, keep)


def test_rank_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        rank(torch.tensor([[0.0, float("nan")]]), 1)


def test_scores_are_cosines():
    torch.manual_seed(0)
    clip = CLIP(8, 16, 8, 16, 1, 2, 20, 6, 8, 1, 2)
    images, text = torch.rand(5, 3, 16, 16) * 2 - 1, torch.randint(0, 20, (5, 6))
    scores = clip_scores(clip, images, text)
    expected = (clip.encode_image(images, True) * clip.encode_text(text, True)).sum(1)
    torch.testing.assert_close(scores, expected.detach())
    assert scores.shape == (5,)
    assert not scores.requires_grad
    with pytest.raises(ValueError, match="one caption"):
        clip_scores(clip, images, text[:4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"])
    path = tmp_path_factory.mktemp("tiny")
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS})
    (path / "open_clip_config.json").write_text(text)
    return path, model.eval()


def _pictures() -> list[Image.Image]:
    noise = torch.randint(0, 256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in noise]


def test_scorer_reads_a_local_folder(folder):
    import open_clip

    path, model = folder
    captions = ["a red circle", "two blue squares", "a green triangle"]
    scores = OpenCLIPScorer(path).score(_pictures(), captions, batch_size=2)
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in _pictures()])
    image = pixels.view(3, 16, 16, 3).permute(0, 3, 1, 2) / 127.5 - 1
    text = open_clip.SimpleTokenizer(context_length=12)(captions)
    expected = (model.encode_image(image, normalize=True) * model.encode_text(text, normalize=True)).sum(1)
    torch.testing.assert_close(scores, expected.detach(), atol=1e-5, rtol=0)


def test_scorer_reads_an_architecture_and_a_file(folder, tmp_path):
    import open_clip

    path, _ = folder
    (tmp_path / "kartina-tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path)
    scorer = OpenCLIPScorer("kartina-tiny", path / "open_clip_model.safetensors")
    expected = OpenCLIPScorer(path).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in scorer.model.state_dict().items())
    with pytest.raises(ValueError, match="could not load 'kartina-tiny'"):
        OpenCLIPScorer("kartina-tiny")
    with pytest.raises(ValueError, match="one caption per picture"):
        scorer.score(_pictures(), ["a"])
    assert scorer.score([], []).shape == (0,)


def test_pictures_of_published_systems_are_ranked(folder, tmp_path, tiny_stable_diffusion):
    tiny_stable_diffusion("sd1").save_pretrained(tmp_path / "there")
    scorer = OpenCLIPScorer(folder[0])
    system = TextToImage.load(tmp_path / "there", reranker=scorer)
    painted = system("a red ring", candidates=3, keep=3, num_steps=2)
    scores = [painting.clip_score for painting in painted]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    assert scores == pytest.approx(
        scorer.score([each.image for each in painted], ["a red ring"] * 3).tolist(), abs=1e-5
    )
    assert [each.seed for each in system("a red ring", candidates=3, num_steps=2)] == [painted[0].seed]


def test_scorer_refuses_what_it_cannot_read(folder, tmp_path):
    path, _ = folder
    with pytest.raises(ValueError, match="architecture as the name"):
        OpenCLIPScorer(path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="open_clip_config.json"):
        OpenCLIPScorer(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        OpenCLIPScorer(tmp_path / "absent")
    for whole in (f"local-dir:{path}", "hf-hub:own/clip", f"{path}/"):
        with pytest.raises(ValueError, match="has weights of its own, 'fine.pt' would not be read"):
            OpenCLIPScorer(whole, "fine.pt")
    with pytest.raises(ValueError, match="could not load 'no-such-net'"):
        OpenCLIPScorer("no-such-net")


def test_scorer_never_runs_a_pickle(folder, tmp_path):
    """A weights file that is a pickle with code is refused, and the code does not run."""
    import shutil

    path, _ = folder
    evil, trace = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    shutil.copy(path / "open_clip_config.json", evil)

    class Code:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    torch.save({"state_dict": Code()}, evil / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="could not load"):
        OpenCLIPScorer(evil)
    assert not trace.exists()


def test_a_config_cannot_ask_for_remote_code(folder, tmp_path):
    import json
    import shutil

    path, _ = folder
    evil = shutil.copytree(path, tmp_path / "evil")
    config = json.loads((evil / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (evil / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="could run foreign code"):
        OpenCLIPScorer(evil)


def test_missing_open_clip_is_said_clearly(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        OpenCLIPScorer("ViT-B-32", "openai")
