"""Pictures: 8-bit conversion, grids with labels, and PNG metadata."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from kartina.pipeline import images as module
from kartina.pipeline.editing import mask_of
from kartina.pipeline.images import PHOTOS, grid, read_metadata, read_picture, save_png, to_pil, to_uint8, upright
from kartina.training.samples import decode_picture


def test_every_byte_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.permute(0, 2, 3, 1))


def test_values_are_clamped_and_axes_moved():
    image = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    out = to_uint8(image)
    assert out.shape == (2, 4, 5, 3)
    assert out[1, 2, 3].tolist() == [0, 128, 255]
    pictures = to_pil(image)
    assert [p.size for p in pictures] == [(5, 4)] * 2
    assert pictures[0].getpixel((0, 0)) == (0, 128, 255)


def test_half_precision_and_gradients_are_accepted():
    assert to_uint8(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)).min() == 255


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4), torch.full((1, 3, 2, 2), torch.nan)])
def test_bad_pictures_are_refused(image):
    with pytest.raises(ValueError, match="pictures must be"):
        to_uint8(image)


def test_grid_places_pictures_row_by_row():
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]]).view(3, 3, 1, 1).expand(3, 3, 4, 6)
    sheet = grid(colours, columns=2, scale=3)
    assert sheet.size == (2 * (18 + 8) + 8, 2 * (12 + 8) + 8)
    assert sheet.getpixel((8, 8)) == (255, 0, 0)
    assert sheet.getpixel((8 + 18 + 8, 8)) == (0, 255, 0)
    assert sheet.getpixel((8, 8 + 12 + 8)) == (0, 0, 255)
    assert sheet.getpixel((40, 35)) == (255, 255, 255)
    assert ImageChops.difference(sheet, grid(to_pil(colours), columns=2, scale=3)).getbbox() is None


def test_pictures_of_other_sizes_are_enlarged_by_whole_numbers():
    blue, red = Image.new("RGB", (10, 10), "blue"), Image.new("RGB", (4, 2), "red")
    sheet = grid([blue, red], columns=2, scale=2)
    assert sheet.size == (2 * (20 + 8) + 8, 20 + 2 * 8)
    cell = sheet.crop((36, 8, 56, 28))
    inside = cell.crop((0, 5, 20, 15))
    assert inside.getcolors() == [(200, (255, 0, 0))]
    assert cell.getchannel("G").getcolors() == [(200, 0), (200, 255)]


def test_labels_stand_below_their_picture_and_inside_its_width():
    white = torch.ones(2, 3, 64, 64)
    sheet = grid(
        white, 2, ["a very long caption that must be wrapped somewhere, Donaudampfschifffahrt", ""], [0.25, 0.5]
    )
    ink = ImageChops.invert(sheet.convert("L")).getbbox()
    assert ink[1] >= 8 + 64
    left = ImageChops.invert(sheet.crop((0, 0, 8 + 64, sheet.height)).convert("L"))
    assert left.getbbox()[2] <= 8 + 64 + 1
    assert ImageChops.invert(sheet.crop((8 + 64 + 1, 0, 80, sheet.height)).convert("L")).getbbox() is None
    assert grid(white, 2, ["кот", "кит"]).tobytes() != grid(white, 2, ["кот", "кот"]).tobytes()


def test_every_letter_of_a_caption_is_drawn(monkeypatch):
    """Wrapped lines hold the whole caption, in both languages, and none is wider than its picture."""
    drawn = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, words, **k: (drawn.append(words), text(self, at, words, **k))
    )
    captions = ["a small red ring right of a large blue square on an orange background", "маленький ромб под ёлкой"]
    grid(torch.ones(2, 3, 32, 32), 2, captions, [0.25, 0.5], scale=5)
    font = module.load_font(14)
    assert (
        " ".join(drawn).replace("CLIP 0.250 ", "") == f"{captions[0]} {module._drawable(captions[1], font)} CLIP 0.500"
    )
    assert max(font.getlength(line) for line in drawn) <= 160


def test_without_a_cyrillic_font_captions_are_transliterated(monkeypatch):
    font = ImageFont.load_default(12)
    if module._covers(font, "ж"):
        pytest.skip("Pillow's own font has learnt Cyrillic")
    assert module._drawable("Два щенка, two \N{SNOWMAN}", font) == "Dva shchenka, two ?"
    monkeypatch.setattr(module, "load_font", lambda size: ImageFont.load_default(size))
    white = torch.ones(1, 3, 64, 64)
    assert grid(white, 1, ["кот"]).tobytes() == grid(white, 1, ["kot"]).tobytes()


@pytest.mark.parametrize(
    "arguments",
    [{"columns": 0}, {"columns": 1, "scale": 0}, {"columns": 1, "captions": ["a"]}, {"columns": 1, "scores": [1.0]}],
)
def test_bad_grids_are_refused(arguments):
    with pytest.raises(ValueError, match="a grid needs"):
        grid(torch.zeros(2, 3, 4, 4), **arguments)
    with pytest.raises(ValueError, match="at least one picture"):
        grid([], 1)


def test_metadata_survives(tmp_path):
    metadata = {"caption": "красный круг \N{SNOWMAN}", "seed": 7, "scores": [0.5, 1e-9], "nested": {"a": None}}
    path = tmp_path / "a.png"
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    save_png(picture, path, {"old": True})
    save_png(picture, path, metadata)
    assert read_metadata(path) == metadata
    assert Image.open(path).getpixel((2, 1)) == (1, 2, 3)
    assert os.listdir(tmp_path) == ["a.png"]


def test_unwritable_paths_are_one_clear_error(tmp_path):
    picture = Image.new("RGB", (2, 2))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "absent" / "a.png", tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OSError, match="cannot write .*existing, writable folder"):
            save_png(picture, path, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
    with pytest.raises(ValueError, match="end in .png"):
        save_png(picture, tmp_path / "a.jpg", {})
    with pytest.raises(ValueError, match="JSON"):
        save_png(picture, tmp_path / "a.png", {"x": float("nan")})


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (2, 2)), path, {"n": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (2, 2)), path, {"n": 2})
    assert read_metadata(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["a.png"]


def test_foreign_files_are_refused(tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (2, 2)).save(plain)
    with pytest.raises(ValueError, match="holds no text"):
        read_metadata(plain)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="must be a PNG"):
        read_metadata(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="no picture"):
        read_metadata(tmp_path / "absent.png")


def test_users_pictures_are_read_as_training_reads_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = {
        "clear.png": (Image.new("RGBA", (8, 4), (255, 0, 0, 0)), (255, 255, 255)),
        "grey.png": (Image.fromarray(np.full((4, 8), 20000, dtype=np.uint16)), (77, 77, 77)),
        "clear-grey.png": (Image.new("LA", (8, 4), (10, 0)), (255, 255, 255)),
        "turned.jpg": (Image.new("L", (4, 8), 90), (90, 90, 90)),
        "lossless.webp": (Image.new("RGB", (8, 4), (200, 10, 30)), (200, 10, 30)),
    }
    for name, (picture, color) in odd.items():
        path = tmp_path / name
        picture.save(path, lossless=True, **({"exif": exif} if name == "turned.jpg" else {}))
        found = read_picture(path, PHOTOS)
        assert (found.mode, found.size, found.getpixel((3, 2))) == ("RGB", (8, 4), color), name
        assert found.tobytes() == decode_picture(path.read_bytes()).tobytes()


def test_a_photo_is_turned_once(tmp_path):
    """Also where one that was read is read again: `kartina edit` hands over what it read."""
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture = Image.effect_noise((8, 4), 90).convert("RGB")
        picture.save(tmp_path / "photo.png", exif=exif)
        found = read_picture(tmp_path / "photo.png", PHOTOS)
        expected = ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))
        assert found.tobytes() == upright(found).tobytes() == expected.tobytes()


def test_a_mask_is_white_where_it_is_painted_and_transparent_is_not(tmp_path):
    mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 16))
    mask.save(tmp_path / "mask.png")
    read = read_picture(tmp_path / "mask.png", PHOTOS, under="black")
    for found in (mask_of(mask, (16, 16), 16), mask_of(read, (16, 16), 16)):
        assert found[:, :, :8].all() and not found[:, :, 8:].any()
