"""What the bounds of packed rows must be, for every operation that takes cu_seqlens. Knows lists, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["brief", "check_bounds"]


def check_bounds(bounds: Sequence[int], total: int, max_seqlen: int) -> None:
    """Raise ValueError unless `bounds`, the values of cu_seqlens, ascend from 0 to `total` by at most `max_seqlen`."""
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"expected cu_seqlens ascending from 0 to {total}, got {brief(bounds)}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"expected max_seqlen of at least the longest row ({max(lengths)}), got {max_seqlen}")


def brief(values: Sequence[int]) -> str:
    """The first few values, for an error message."""
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
