"""Captions that are longer than an encoder reads: counted, and told of.

It does not know tokens: what was cut comes as text.
"""

import warnings
from collections.abc import Mapping

_TOLD = 20  # captions of which warnings say that they are cut: those of a painter, but not all of a training


class Cuts:
    """`count` is how often a caption was longer than `limit` tokens; of the first 20 such captions a warning comes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self._told: set[str] = set()

    def add(self, lost: Mapping[str, str], times: int) -> None:
        """What was cut off each caption, and how often this was now; a caption is told of once."""
        self.count += times
        new = {caption: end for caption, end in lost.items() if caption not in self._told}
        named = dict(list(new.items())[: _TOLD - len(self._told)])
        self._told.update(named)
        if named:
            last = "; others are only counted" if len(self._told) == _TOLD else ""
            ends = "; ".join(repr(end.lstrip("\ufffd ")) for end in named.values())
            warnings.warn(
                f"captions longer than {self.limit} tokens are cut, here before {ends}; num_truncated counts "
                f"them{last}",
                stacklevel=3,
            )
