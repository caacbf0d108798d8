"""Where paintings go."""

import pytest

from kartina.pipeline import gallery


def test_nothing_is_painted_over(tmp_path):
    assert gallery.targets(tmp_path, 2) == [tmp_path / "0000.png", tmp_path / "0001.png"]
    for name in ("0000.png", "0007.png", "grid-0000.png", "cat.png", "12x.png"):
        (tmp_path / name).touch()
    assert gallery.targets(tmp_path, 2) == [tmp_path / "0008.png", tmp_path / "0009.png"]
    assert gallery.targets(tmp_path, 4, grid=True) == [tmp_path / "grid-0001.png"]
    assert gallery.targets(tmp_path, 1) == [tmp_path / "0010.png"]  # another's, while these are not written yet
    assert gallery.targets(tmp_path / "a.png", 2) == [tmp_path / "a.png", tmp_path / "a-1.png"]


def test_other_kinds_of_picture_and_closed_places_are_refused(tmp_path):
    for name in ("a.jpg", "a.TIFF"):
        with pytest.raises(ValueError, match="written as PNG"):
            gallery.check_target(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        gallery.check_target(tmp_path / "file" / "a.png")
    gallery.check_target(tmp_path / "new")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
