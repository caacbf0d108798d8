"""Boolean attention masks of one stream: T text tokens, then an image's codes in raster order.

The row, column and convolutional masks are those of DALL-E (Ramesh 2021, arXiv 2102.12092, Appendix B.1 and Figure 11):
text sees the text before it, an image token sees all the text and a part of the image tokens before it, and itself.

T text tokens, h x w the image grid, Q queries, K keys. True means "may look".

A mask is computed from the positions of its queries and keys, never stored: the row of one query costs O(K) while
sampling, and a model built on the meta device has no buffer that could be left unfilled.

It does not know embeddings, heads or layers.
"""

from torch import Tensor


def _split(queries: Tensor, keys: Tensor, text_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grid indices (negative in the text) as (Q, 1) and (1, K), the causal mask, and which keys are text."""
    q = queries[:, None] - text_length
    k = keys[None, :] - text_length
    return q, k, k <= q, k < 0


def row(queries: Tensor, keys: Tensor, text_length: int, width: int) -> Tensor:
    """Text, and the last `width` + 1 image tokens including itself (Figure 11a): back to the one right above.

    queries: int64 (Q,) positions in the stream; keys: int64 (K,); width: columns of the grid. Returns bool (Q, K).
    """
    q, k, before, text = _split(queries, keys, text_length)
    return before & (text | (q - k <= width))


def column(queries: Tensor, keys: Tensor, text_length: int, width: int) -> Tensor:
    """Text, and the image tokens above in the same column and itself (Figure 11b). Arguments as in `row`."""
    q, k, before, text = _split(queries, keys, text_length)
    return before & (text | ((q - k) % width == 0))


def conv(queries: Tensor, keys: Tensor, text_length: int, width: int, kernel: int = 11) -> Tensor:
    """Text, and the earlier image tokens within a `kernel` x `kernel` window centred on itself (Figure 11d).

    The window ends at the border of the image: it does not wrap around. Arguments as in `row`; kernel: odd, >= 1,
    else ValueError. Returns bool (Q, K).
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"conv mask: the kernel must be odd and at least 1, got {kernel}; write e.g. kernel=11")
    q, k, before, text = _split(queries, keys, text_length)
    near_row = (q // width - k // width).abs() <= kernel // 2
    near_column = (q % width - k % width).abs() <= kernel // 2
    return before & (text | (near_row & near_column))
