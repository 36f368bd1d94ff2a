"""How many rows one program of rms_norm's Triton kernels takes, and with how many threads. Imports no Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# A row is one block, and the backward pass holds three of them: more channels would not fit in the registers.
MAX_CHANNELS = 16384


class Tile(NamedTuple):
    rows: int
    columns: int  # the row's channels, rounded up to a power of two
    warps: int


@lru_cache(maxsize=64)
def tile(architecture: str, channels: int) -> Tile:
    """2048 elements a program or one row, 16 elements a thread: two loads of 16 bytes in flight from each half tensor.

    The same rule for every architecture, since nothing is reused: only bytes in flight count. AMD's waves are twice as
    wide, and a program has at most 1024 threads everywhere.
    """
    columns = 1 << max(channels - 1, 0).bit_length()
    rows = max(2048 // columns, 1)
    threads = 64 if architecture.startswith("gfx") else 32
    return Tile(rows, columns, max(min(rows * columns // 16, 1024) // threads, 1))
