"""Editing, interpolating and showing diffusion with tiny models: what stays, changes, reproduces, and is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from kartina import cli
from kartina.layers.random import normal
from kartina.pipeline import checkpoint
from kartina.pipeline.drawing import CodeDrawing
from kartina.pipeline.editing import EditDrawing, mask_of, square
from kartina.pipeline.images import read_metadata, read_picture
from kartina.pipeline.interpolation import between, lerp, slerp
from kartina.pipeline.recipe import Recipe, build, sampling_knobs
from kartina.pipeline.text_to_image import TextToImage, check_facts, metadata
from kartina.priors.condition import Condition
from kartina.priors.schedules import new_schedule
from kartina.tokenizers.captions import CaptionTokenizer
from kartina.training.show import diffusion

UNET = {"kind": "unet", "width": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "norm_groups": 4, "num_heads": 2,
        "attn_levels": [1]}  # fmt: skip
LATENT = {
    "tokenizer": {"kind": "autoencoder_kl", "image_size": 16, "width": 8, "channel_mult": [1, 2], "norm_groups": 2,
                  "blocks_per_level": 1, "latent_channels": 4, "attn_resolutions": []},
    "text": {"kind": "clip_text", "text_vocab": 262, "text_length": 14, "width": 16, "depth": 1, "num_heads": 2},
    "prior": UNET | {"in_channels": 4, "context_dim": 16},
}  # fmt: skip
MODELS = {
    "latents": LATENT,
    "latents, own text encoder": LATENT | {
        "text": {"kind": "caption_encoder", "text_vocab": 260, "text_length": 12, "width": 16, "depth": 1,
                 "num_heads": 2}},
    "latents, fills": LATENT | {"prior": UNET | {"in_channels": 9, "out_channels": 4, "context_dim": 16}},
    "pixels": {"prior": UNET | {"in_channels": 3, "context_dim": None}},
    "pixels, fills": {"prior": UNET | {"in_channels": 7, "out_channels": 3, "context_dim": None}},
}  # fmt: skip
RING, CIRCLE = "a red ring", "синий круг"


def make(parts, folder=None):
    """A system of random weights, also as a model folder."""
    recipe = Recipe(
        name="tests/tiny", paper="none", image_size=16, captions={"vocab_size": 260, "context_length": 12},
        diffusion={"schedule": "cosine", "num_timesteps": 50, "prediction": "v"}, parts=parts,
    )  # fmt: skip
    recipe = recipe.model_copy(update={"sampling": sampling_knobs(recipe, {"num_steps": 5}, "tests")})
    captions, built = CaptionTokenizer.train(["a ring"], 260, 12), {}
    for part in parts:
        torch.manual_seed(0)
        built[part] = build(recipe, part).eval()
        for parameter in built[part].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    if folder is not None:
        folder.mkdir()
        captions.save(folder / "captions.json")
        for part, network in built.items():
            identity = {"part": recipe.parts[part]}
            identity |= {"diffusion": recipe.diffusion.model_dump()} if part == "prior" else {}
            checkpoint.save_part(folder, recipe, part, checkpoint.export(network, torch.float32), identity=identity)
    return TextToImage(recipe, built, captions, "0" * 64)


@pytest.fixture(scope="module", params=list(MODELS))
def system(request):
    return make(MODELS[request.param])


@pytest.fixture(scope="module")
def latent():
    return make(LATENT)


def drawn(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def masked(box, size=(16, 16)):
    """White in (left, top, right, bottom)."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


PICTURE, MASK = drawn((16, 16)), masked((5, 4, 12, 9))


def pixels(paintings):
    images = [getattr(painting, "image", painting) for painting in paintings]
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_seeds_captions_and_strength_matter_and_a_batch_does_not(system):
    many = system.edit(PICTURE, [RING, CIRCLE], strength=0.6, seed=[3, 4], candidates=2, keep=2)
    assert [each.seed for each in many] == [3, 4, 4, 5]
    again = system.edit(PICTURE, CIRCLE, strength=0.6, seed=4)
    assert np.abs(pixels(again) - pixels(many[2:3])).max() <= 1
    assert (pixels(again) == pixels(system.edit(PICTURE, CIRCLE, strength=0.6, seed=4))).all()
    assert (pixels(many[2:3]) != pixels(many[3:])).any()
    assert (pixels(system.edit(PICTURE, CIRCLE, strength=0.8, seed=4)) != pixels(again)).any()
    if system.draw.text is not None:
        assert (pixels(many[1:2]) != pixels(many[2:3])).any()


def test_at_full_strength_it_paints_and_at_little_it_stays_near(system):
    assert (pixels(system.edit(PICTURE, RING, strength=1.0, seed=2)) == pixels(system(RING, seed=2))).all()
    reconstructed = pixels([system.edit(PICTURE, RING, strength=0.2, seed=2, sampler="ddim", num_steps=50)[0]])
    far = pixels(system.edit(PICTURE, RING, strength=1.0, seed=2, sampler="ddim", num_steps=50))
    with torch.no_grad():
        kept = system.decode(system.draw.encode(square(PICTURE, 16)[None]))
    kept = ((kept[0].permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)
    assert np.abs(reconstructed - kept).mean() < np.abs(far - kept).mean()


def test_nothing_but_what_is_masked_changes(system):
    found, before = pixels(system.edit(PICTURE, RING, mask=MASK, seed=1))[0], pixels([PICTURE])[0]
    inside = np.asarray(MASK) > 0
    assert (found[~inside] == before[~inside]).all() and np.abs(found - before)[inside].mean() > 5
    whole = masked((0, 0, 16, 16))
    everything = pixels(system.edit(PICTURE, RING, mask=whole, strength=0.6, seed=1))
    assert (everything == pixels(system.edit(PICTURE, RING, strength=0.6, seed=1))).all()


def test_where_the_mask_is_black_latents_are_kept(latent):
    image = square(PICTURE, 16)[None]
    knobs = sampling_knobs(latent.recipe, {}, "tests")
    with torch.no_grad():
        nothing = EditDrawing(latent.draw, image, torch.zeros(1, 1, 16, 16), 1.0, None)
        assert torch.equal(nothing([RING], [0], knobs, None), nothing.x_0)
        # Every place of the latents that a white pixel reaches into is painted, and no other.
        part = EditDrawing(latent.draw, image, mask_of(MASK, (16, 16), 16)[None], 1.0, None)
        changed = (part([RING], [0], knobs, None) != part.x_0).all(dim=1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 2:6] = True
    assert torch.equal(changed, expected)


def test_a_prior_that_fills_reads_the_mask_and_the_rest_of_the_picture():
    system, seen = make(MODELS["pixels, fills"]), []
    network = system.draw.prior
    system.draw.prior = copy.copy(network)
    system.draw.prior.forward = lambda x, t, condition: seen.append(condition.image) or network(x, t, condition)
    system.edit(PICTURE, RING, mask=MASK)
    white = torch.tensor(np.asarray(MASK) > 0).float()
    assert torch.equal(seen[0][0, 0], white) and torch.equal(seen[0][0, 1:], square(PICTURE, 16) * (1 - white))
    system(RING)
    assert torch.equal(seen[-1][0, 0], torch.ones(16, 16)) and not seen[-1][0, 1:].any()


@pytest.mark.parametrize("name", ["latents", "latents, fills", "pixels"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inverted_and_painted_under_the_same_caption_it_comes_back(name, strength):
    system = make(MODELS[name])
    edited = EditDrawing(system.draw, square(PICTURE, 16)[None] * 0.9, None, strength, RING)
    knobs = sampling_knobs(system.recipe, {"sampler": "ddim", "num_steps": 20}, "tests")
    with torch.no_grad():
        back = edited([RING], [0], knobs, None)
        assert (back - edited.x_0).abs().max() < 1e-3
        if system.draw.text is not None:
            assert (edited([CIRCLE], [0], knobs, None) - edited.x_0).abs().max() > 1e-2
    painted = system.edit(PICTURE, CIRCLE, invert=RING, strength=strength)[0]
    assert painted.facts["edit"]["invert"] == RING and painted.facts["knobs"]["sampler"] == "ddim"


def test_the_facts_of_an_edit_say_what_it_was(latent):
    facts = metadata(latent.edit(PICTURE, RING, mask=MASK)[0])
    assert set(facts["edit"]) == {"picture", "mask", "strength", "invert"} and facts["edit"]["strength"] == 1.0
    other = metadata(latent.edit(drawn((16, 16), 1), RING, mask=MASK)[0])
    assert other["edit"]["picture"] != facts["edit"]["picture"] and other["edit"]["mask"] == facts["edit"]["mask"]
    with pytest.raises(ValueError, match="an edited picture needs its source"):
        check_facts(facts)


def test_pictures_of_another_size_are_cropped_or_stretched():
    wide = drawn((48, 32))
    assert torch.equal(square(wide, 16, "crop"), square(wide.crop((8, 0, 40, 32)), 16, "crop"))
    assert not torch.equal(square(wide, 16, "stretch"), square(wide, 16, "crop"))
    mask = masked((0, 0, 48, 16), (48, 32))
    for how in ("crop", "stretch"):
        found = mask_of(mask, wide.size, 16, how)
        assert found.shape == (1, 16, 16) and found[:, :8].all() and not found[:, 8:].any()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"strength": 0.0}, r"strength must be in \(0, 1\]"),
        ({"strength": 1.5}, r"strength must be in \(0, 1\]"),
        ({"strength": float("nan")}, r"strength must be in \(0, 1\]"),
        ({"strength": 0.05}, "must be one step at least"),
        ({"image": drawn((20, 16))}, "16 x 16, got 20 x 16; resize it, or fit it"),
        ({"fit": "pad"}, "one of crop, stretch"),
        ({"mask": masked((0, 0, 4, 4), (8, 8))}, "the picture's size, 16 x 16, got 8 x 8"),
        ({"mask": masked((0, 0, 0, 0))}, "got black alone"),
        ({"mask": Image.linear_gradient("L").resize((16, 16))}, "black and white, got 50% of grey"),
        ({"sampler": "dimm"}, "did you mean 'ddim'"),
        ({"invert": RING, "sampler": "heun"}, "undone by the sampler ddim"),
        ({"invert": RING, "eta": 0.5}, "undone by the sampler ddim"),
        ({"invert": RING, "candidates": 2, "keep": 2}, "one candidate"),
        ({"prompts": " "}, "a prompt is empty"),
        ({"steps": 3}, "unknown key 'steps'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(latent, how, says):
    with pytest.raises(ValueError, match=says) as error:
        latent.edit(**{"image": PICTURE, "prompts": RING} | how)
    assert len(str(error.value).splitlines()) == 1


def test_numbers_that_are_not_finite_and_models_of_codes_are_refused(latent):
    broken = make(LATENT)
    broken.draw.prior.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="dpmpp_2m of 5 steps must end in finite numbers, got NaN"):
        broken.edit(PICTURE, RING)
    codes = copy.copy(latent)
    codes.draw = CodeDrawing.__new__(CodeDrawing)
    for refused in (lambda: codes.edit(PICTURE, RING), lambda: codes.interpolate(RING, CIRCLE)):
        with pytest.raises(ValueError, match="must have a diffusion prior"):
            refused()


# --- interpolation ----------------------------------------------------------------------------------------------------


def test_a_great_circle_keeps_the_size_of_noise_and_a_line_does_not():
    first, second = normal(0, 0, torch.arange(2), (4, 32, 32), "test").split(1)
    shares = torch.linspace(0, 1, 5)
    sizes = slerp(first, second, shares).flatten(1).std(dim=1)
    assert (sizes - 1).abs().max() < 0.03 and lerp(first, second, shares)[2].std() < 0.75
    torch.testing.assert_close(slerp(first, second, shares)[[0, 4]], torch.cat([first, second]))
    torch.testing.assert_close(slerp(first, first, shares), first.expand(5, -1, -1, -1))


def test_masks_on_the_way_have_the_tokens_of_both():
    tokens = torch.zeros(1, 3, 2)
    one, two = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    found = between(
        Condition(tokens=tokens, mask=one), Condition(tokens=tokens + 1, mask=two), torch.tensor([0, 0.5, 1])
    )
    assert torch.equal(found.mask, torch.cat([one, two, two])) and found.tokens[:, 0, 0].tolist() == [0, 0.5, 1]
    back = between(Condition(tokens=tokens, mask=two), Condition(tokens=tokens, mask=one), torch.tensor([0, 0.5, 1]))
    assert torch.equal(back.mask, torch.cat([two, two, one]))


@pytest.mark.parametrize("name", ["latents", "latents, own text encoder", "latents, fills"])
def test_the_ends_are_what_is_painted(name):
    system = make(MODELS[name])
    strip = pixels(system.interpolate(RING, CIRCLE, frames=4, seed=1, to_seed=7, micro_batch=3, guidance_scale=2.0))
    ends = pixels(system([RING, CIRCLE], seed=[1, 7], guidance_scale=2.0))
    assert np.abs(strip[[0, 3]] - ends).max() <= 1
    assert all((strip[i] != strip[i + 1]).any() for i in range(3))
    one_noise = pixels(system.interpolate(RING, CIRCLE, frames=2, seed=1))
    assert np.abs(one_noise[1:] - pixels(system(CIRCLE, seed=1))).max() <= 1


def test_frames_are_counted(latent):
    for frames in (1, 65):
        with pytest.raises(ValueError, match="frames must lie between 2 and 64"):
            latent.interpolate(RING, CIRCLE, frames=frames)


# --- what diffusion does ----------------------------------------------------------------------------------------------


def test_the_forward_process_has_the_mean_and_the_noise_of_its_numbers():
    schedule, x_0 = new_schedule(), torch.full((1, 3, 64, 64), 0.5)
    moments = diffusion.times(schedule, 6)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[moments]  # Ho 2020, section 4
    for t, kept, x_t in zip(moments, alpha_bar, diffusion.forward(schedule, x_0, moments, 0), strict=True):
        found = diffusion.numbers(schedule, t)
        assert found == pytest.approx({"t": t, "alpha_bar": kept, "snr": kept / (1 - kept)})
        assert x_t.mean().item() == pytest.approx(0.5 * kept**0.5, abs=0.04)
        assert x_t.std().item() == pytest.approx((1 - kept) ** 0.5, rel=0.03)
    for count in (1, 1001):
        with pytest.raises(ValueError, match="must number 2 to 1000"):
            diffusion.times(schedule, count)


def test_the_way_back_is_the_one_that_painting_goes(system):
    knobs = sampling_knobs(system.recipe, {}, "tests")
    with torch.no_grad():
        seen, end = diffusion.reverse(system.draw, RING, 3, knobs)
        assert torch.equal(end, system.draw([RING], [3], knobs, None))
    assert [t for t, _, _ in seen] == sorted({t for t, _, _ in seen}, reverse=True) and len(seen) == 5
    assert torch.equal(seen[0][1], normal(0, 0, torch.tensor([3]), system.draw.shape, "sampler start"))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a model, pictures and masks."""
    folder = tmp_path_factory.mktemp("desk")
    make(LATENT, folder / "model")
    PICTURE.save(folder / "a.png")
    drawn((40, 32)).save(folder / "photo.jpg")
    MASK.save(folder / "mask.png")
    return folder


def run(desk, monkeypatch, capsys, *words):
    """The exit code, and what is said in or by way of error."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr("sys.argv", ["kartina", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr()
    return exit_.value.code or 0, shown.out.strip() or shown.err


def test_the_commands(desk, monkeypatch, capsys, latent):
    model = ("--model", "model")
    edit = ("edit", "a.png", "--prompt", RING, *model, "--seed", "4", "--steps", "6")
    assert run(desk, monkeypatch, capsys, *edit, "--strength", "0.5", "--out", "e.png") == (0, "e.png")
    expected = latent.edit(PICTURE, RING, strength=0.5, seed=4, num_steps=6)
    assert (pixels([read_picture(desk / "e.png")]) == pixels(expected)).all()
    assert read_metadata(desk / "e.png")["edit"]["strength"] == 0.5
    assert run(desk, monkeypatch, capsys, *edit, "--mask", "mask.png", "--candidates", "2", "--out", "m.png")[0] == 0
    outside = np.asarray(MASK) == 0
    for name in ("m.png", "m-1.png"):
        assert (pixels([read_picture(desk / name)])[0][outside] == pixels([PICTURE])[0][outside]).all()
    assert run(desk, monkeypatch, capsys, *edit, "--invert", CIRCLE, "--out", "i.png") == (0, "i.png")
    photo = ("edit", "photo.jpg", "--prompt", RING, *model)
    assert run(desk, monkeypatch, capsys, *photo, "--fit", "crop", "--out", "p.png") == (0, "p.png")
    code, said = run(desk, monkeypatch, capsys, *photo)
    assert code == 2 and "got 40 x 32" in said and said.count("\n") == 1
    code, said = run(desk, monkeypatch, capsys, "reproduce", "e.png", *model)
    assert code == 2 and "an edited picture needs its source" in said
    strip = ("interpolate", RING, CIRCLE, *model, "--frames", "3", "--to-seed", "2", "--out", "s.png")
    assert run(desk, monkeypatch, capsys, *strip) == (0, "s.png")
    assert read_metadata(desk / "s.png")["seeds"] == [0, 2] and read_picture(desk / "s.png").width > 3 * 192


def test_showing_diffusion(desk, monkeypatch, capsys):
    show = ("show", "diffusion", "photo.jpg", "--out", "d.png")
    code, said = run(desk, monkeypatch, capsys, *show, "--model", "model", "--prompt", RING, "--timesteps", "4")
    assert code == 0 and said.startswith("tests/tiny\n") and said.endswith("d.png")
    shown = read_metadata(desk / "d.png")["timesteps"]["tests/tiny"]
    assert [row["t"] for row in shown] == [0, 16, 33, 49] and f"{shown[1]['alpha_bar']:.4g}" in said
    with_model = read_picture(desk / "d.png")
    code, said = run(desk, monkeypatch, capsys, *show, "--timesteps", "4", "--json")
    assert code == 0 and set(json.loads(said)["timesteps"]) == {"linear", "scaled_linear", "cosine"}
    assert with_model.height > read_picture(desk / "d.png").height  # four strips in place of three
    code, said = run(desk, monkeypatch, capsys, *show, "--model", "model", "--sampler", "dimm")
    assert code == 2 and "did you mean 'ddim'" in said
