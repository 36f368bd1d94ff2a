"""How many heads of a token one program of rotary's Triton kernel turns, and with how many threads.

Imports no Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ptengine.kernels.launch import power_of_two, threads_per_wave


class Tile(NamedTuple):
    heads: int
    half: int  # pairs of channels, rounded up to a power of two
    rest: int  # channels that are copied, rounded up to a power of two
    warps: int


@lru_cache(maxsize=64)
def tile(architecture: str, heads: int, channels: int, turned: int, itemsize: int) -> Tile:
    """512 pairs, each thread with 16 bytes of first and of second channels; no more heads than `heads`.

    The same rule for every architecture, since nothing is reused: only bytes in flight count.
    """
    half, rest = power_of_two(turned // 2), power_of_two(channels - turned)
    block = min(max(512 // half, 1), power_of_two(heads))
    threads = block * half * itemsize // 16
    return Tile(block, half, rest, min(max(threads // threads_per_wave(architecture), 1), 8))
