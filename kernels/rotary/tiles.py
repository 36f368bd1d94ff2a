"""How many heads of a token one program of rotary's Triton kernel turns, and with how many threads.

Imports no Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Tile(NamedTuple):
    heads: int
    half: int  # pairs of channels, rounded up to a power of two
    rest: int  # channels that are copied, rounded up to a power of two
    warps: int


@lru_cache(maxsize=64)
def tile(architecture: str, heads: int, channels: int, turned: int, itemsize: int) -> Tile:
    """512 pairs, each thread with 16 bytes of first and of second channels; no more heads than `heads`.

    The same rule for every architecture, since nothing is reused: only bytes in flight count. AMD's waves are twice as
    wide.
    """
    half, rest = _power(turned // 2), _power(max(channels - turned, 1))
    block = min(max(512 // half, 1), _power(heads))
    threads = block * half * itemsize // 16
    return Tile(block, half, rest, min(max(threads // (64 if architecture.startswith("gfx") else 32), 1), 8))


def _power(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(count - 1, 0).bit_length()
