"""Tile sizes of linear_cross_entropy's Triton kernels, by architecture and regime. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptengine.kernels.launch import nearest_architecture

# With fewer rows there are too few programs to keep the memory busy unless each has all the threads it can.
FEW_ROWS = 512


@dataclass(frozen=True)
class Tile:
    rows: int  # of hidden, per program
    columns: int  # words of the vocabulary, or of the width of hidden, per step of a loop; a program's threads at least
    warps: int
    registers: int | None = None  # a thread may take; None leaves it to the compiler

    @property
    def options(self) -> dict[str, Any]:
        """What a launch takes beside the kernel's arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}  # which not every compiler knows
        return {"num_warps": self.warps, "enable_fp_fusion": True} | limit


# The chunk kernel streams logits, once from memory and once from cache: 8 a thread in flight. One row a program,
# except in the interpreter, whose cost is by operation and not by element. Left alone, ptxas spills a register or two
# of some variants to fit one more program on a multiprocessor; with a limit named it does not.
CHUNK_TILES: dict[tuple[str, str], Tile] = {
    ("sm_80", "few"): Tile(rows=1, columns=8192, warps=32, registers=64),
    ("sm_80", "many"): Tile(rows=1, columns=2048, warps=8, registers=96),
    ("sm_90", "few"): Tile(rows=1, columns=8192, warps=32, registers=64),
    ("sm_90", "many"): Tile(rows=1, columns=2048, warps=8, registers=96),
    ("sm_100", "few"): Tile(rows=1, columns=8192, warps=32, registers=64),
    ("sm_100", "many"): Tile(rows=1, columns=2048, warps=8, registers=96),
    ("gfx942", "few"): Tile(rows=1, columns=8192, warps=16),
    ("gfx942", "many"): Tile(rows=1, columns=2048, warps=4),
    ("interpreter", "few"): Tile(rows=16, columns=512, warps=1),
    ("interpreter", "many"): Tile(rows=64, columns=512, warps=1),
}
# The last kernel streams the gradient, [n, d], once.
FINISH_TILES: dict[str, Tile] = {
    "sm_80": Tile(rows=1, columns=1024, warps=4),
    "sm_90": Tile(rows=1, columns=1024, warps=4),
    "sm_100": Tile(rows=1, columns=1024, warps=4),
    "gfx942": Tile(rows=1, columns=1024, warps=4),
    "interpreter": Tile(rows=16, columns=64, warps=1),
}


def chunk_tile(architecture: str, rows: int) -> Tile:
    """Of the chunk kernel, for a chunk of so many rows."""
    return CHUNK_TILES[nearest_architecture(architecture, FINISH_TILES), "few" if rows < FEW_ROWS else "many"]


def finish_tile(architecture: str) -> Tile:
    """Of the last kernel."""
    return FINISH_TILES[nearest_architecture(architecture, FINISH_TILES)]


def architectures() -> set[str]:
    """Those with entries of their own."""
    return set(FINISH_TILES)
