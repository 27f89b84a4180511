"""The lengths that rows are padded to if not any is allowed."""

from __future__ import annotations

from typing import Tuple

BUCKETS = (16, 32, 64, 128, 256, 512)


def few_lengths(max_length: int) -> Tuple[int, ...]:
    """Return the buckets below `max_length`, and `max_length` itself."""
    return tuple(sorted({n for n in BUCKETS if n < max_length} | {max_length}))
