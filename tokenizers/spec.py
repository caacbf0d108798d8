"""What a tokenizer says of its output, so that a prior can be shaped before any image is encoded.

h, w the grid of codes; K the size of the codebook.

It does not know how the codes are made or what they decode to.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CodesSpec:
    """`kind` is "codes" for discrete codes; `shape` is (h, w); `vocabulary` is K, codes are int64 in [0, K)."""

    kind: str
    shape: tuple[int, int]
    vocabulary: int

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1 or self.vocabulary < 1:
            raise ValueError(
                "CodesSpec needs a shape (h, w) of positive sizes and a vocabulary of at least 1, "
                f"got shape {self.shape} and vocabulary {self.vocabulary}"
            )
