"""Pictures of shapes in shards, for tests of what reads shards."""

import io
from pathlib import Path

from kartina.pipeline.images import to_pil
from kartina.training.data.shapes import ShapesSource
from kartina.training.shards import ShardWriter


def pack(out: Path, count: int, per_shard: int, first: int = 0, caption: str | None = None, broken: int | None = None):
    """The folder `out` of so many pictures, from the one numbered `first` on, with their captions.

    The picture `broken` of them is no picture; `caption` stands in place of the last one's.
    """
    batch = ShapesSource(jitter=0.0).read(range(first, first + count))
    with ShardWriter(out, per_shard) as writer:
        for k, picture in enumerate(to_pil(batch.image)):
            data = io.BytesIO()
            picture.save(data, "PNG")
            text = caption if caption and k == count - 1 else batch.captions[k]
            writer.write({"png": b"broken" if k == broken else data.getvalue(), "txt": text.encode()})
    return out
