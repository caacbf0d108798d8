"""The order in which pictures are packed and read: whatever a folder is sorted by, what is read together is mixed."""

import numpy as np
from PIL import Image
from test_packing import packed

from kartina.training import packing
from kartina.training import run as runs
from kartina.training.sources import source_of, validation_of
from kartina.training.stream import ShardSource


def test_a_folder_that_is_sorted_by_class_is_packed_mixed(tmp_path):
    """The stream mixes a few shards, and k-means, BPE and a latent scale read the first positions."""
    for k in range(8):
        (tmp_path / "in" / f"class-{k}").mkdir(parents=True)
        for n in range(40):
            picture_of = tmp_path / "in" / f"class-{k}" / f"{n:03d}.png"
            Image.new("RGB", (8, 8), (k, n, 0)).save(picture_of)
            picture_of.with_suffix(".txt").write_text(f"class {k}")
    packing.pack_folder(tmp_path / "in", tmp_path / "out", samples_per_shard=10)
    source = ShardSource(tmp_path / "out", size=8, seed=0)
    share = np.bincount([int(c[-1]) for c in source.read(range(40)).captions], minlength=8) / 40
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert entropy > 0.9 * np.log(8), share  # in the order of the folder 40 samples are of one to four classes
    words = [
        f"training.data.shards={tmp_path / 'out'}",
        "training.data.window=20",
        "training.data.validation_share=0.2",
    ]
    recipe, training = runs.load("own/dalle", words)
    for wide in (source_of(recipe, training.data), validation_of(recipe, training.data)):
        assert wide.window == 20 and len({wide.place(k)[0] for k in range(40)}) > 12  # of 32 shards, with 4 about 5
    packing.pack_folder(tmp_path / "in", tmp_path / "again", samples_per_shard=10)
    assert [*packed(tmp_path / "again")] == [*packed(tmp_path / "out")]
