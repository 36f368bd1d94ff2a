"""How many elements one program of gated_activation's Triton kernels takes, and with how many threads.

Imports no Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ptengine.kernels.launch import power_of_two, threads_per_wave


class Tile(NamedTuple):
    columns: int  # a power of two
    warps: int


@lru_cache(maxsize=64)
def tile(architecture: str, columns: int) -> Tile:
    """2048 elements, or a whole row where that is less; 16 a thread: two loads of 16 bytes from each half tensor.

    The same rule for every architecture, since nothing is reused: only bytes in flight count.
    """
    block = min(power_of_two(columns), 2048)
    return Tile(block, max(block // 16 // threads_per_wave(architecture), 1))
