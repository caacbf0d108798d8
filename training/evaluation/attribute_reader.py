"""A small network that reads the attributes of a picture: the ruler of resynthesis, so no loss ever uses it.

It is trained on real labelled pictures alone, each field with a softmax of its own, and sees them softened and with
noise now and then, so that it reads what a decoder makes too. Half of the held-out pictures are among them: a reader
that knew no such composition would read hair that a hat hides by the clothes. Its own accuracy on the other half stands
beside whatever it says.

B pictures of 3 x S x S, F fields, V values of all fields together.

It does not know the models that it judges. No paper.
"""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ...pipeline.terminal import progress_bar
from ...pipeline.whole_file import save_tensors
from ..data.labelled import Labelled, read_labelled

_SMALLEST = 4  # pixels a side, at which the convolutions end
_WIDTH, _STEPS, _BATCH, _RATE = 32, 700, 64, 2e-3


class AttributeReader(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> logits (B, V); see `read`. fields: {field: its values}."""

    def __init__(self, fields: dict[str, list[str]], size: int) -> None:
        super().__init__()
        self.fields, self.size = fields, size
        layers: list[nn.Module] = []
        side, width = size, 3
        while side > _SMALLEST:
            following = min(64, max(_WIDTH, 2 * width)) if layers else _WIDTH
            layers += [nn.Conv2d(width, following, 3, stride=2, padding=1), nn.GroupNorm(4, following), nn.SiLU()]
            side, width = (side + 1) // 2, following
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.out = nn.Linear(width * side * side, sum(map(len, fields.values())))

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.features(image))

    def split(self, logits: Tensor) -> list[Tensor]:
        """(B, V) -> for each field (B, its values)."""
        return list(logits.split([len(values) for values in self.fields.values()], dim=1))

    @torch.no_grad()
    def read(self, image: Tensor) -> Tensor:
        """The likeliest value of each field, int64 (B, F)."""
        parts = [self.split(self(some.clamp(-1, 1))) for some in image.split(256)]
        return torch.cat([torch.stack([logits.argmax(1) for logits in part], dim=1) for part in parts])


def reader_of(data: Path | str, size: int) -> AttributeReader:
    """The reader of a folder of labelled shards, in evaluation mode: the one that lies there, or a new one, kept there.

    Raises ValueError like `read_labelled`.
    """
    folder = Path(data)
    path = folder / f"attribute_reader_{size}.safetensors"
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() if folder.is_dir() else ""
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            if known.get("manifest") == digest:
                reader = AttributeReader(json.loads(known["fields"]), size)
                reader.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return reader.eval().requires_grad_(False)
    except (OSError, SafetensorError):
        pass  # there is none yet
    shown, held_out = read_labelled(folder, size), read_labelled(folder / "held_out", size)
    half = len(held_out.pixels) // 2
    pixels = torch.cat([shown.pixels, held_out.pixels[:half]])
    reader = train_reader(Labelled(shown.fields, pixels, torch.cat([shown.labels, held_out.labels[:half]])))
    try:
        save_tensors(path, reader.state_dict(), {"manifest": digest, "fields": json.dumps(reader.fields)})
    except OSError as error:
        warnings.warn(f"the reader of attributes is trained anew at each start: {error}", stacklevel=2)
    return reader


def judged_half(held_out: Labelled) -> Labelled:
    """The second half of held-out pictures: those that a reader of `reader_of` never saw."""
    half = len(held_out.pixels) // 2
    return Labelled(held_out.fields, held_out.pixels[half:], held_out.labels[half:])


def train_reader(data: Labelled, steps: int | None = None, seed: int = 0) -> AttributeReader:
    """A new reader, trained on labelled pictures; deterministic in the seed on one machine."""
    steps = steps or _STEPS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = AttributeReader(data.fields, data.pixels.shape[1])
        optimizer = torch.optim.AdamW(reader.parameters(), _RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        with progress_bar("training the reader of attributes", transient=True) as report:
            for step in range(steps):
                rows = torch.randint(len(data.pixels), (_BATCH,))
                logits = reader.split(reader(_softened(data.images(rows))))
                losses = [
                    F.cross_entropy(part, labels) for part, labels in zip(logits, data.labels[rows].T, strict=True)
                ]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
                report(step + 1, steps)
    return reader.eval().requires_grad_(False)


def _softened(image: Tensor) -> Tensor:
    """Half of the images (B, 3, S, S) mixed with their 3 x 3 mean, then all with some Gaussian noise."""
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(image), 1, 1, 1) * (torch.rand(len(image), 1, 1, 1) < 0.5)
    return image + share * (soft - image) + 0.1 * torch.rand(len(image), 1, 1, 1) * torch.randn_like(image)
