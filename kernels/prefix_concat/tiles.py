"""How much one program of prefix_concat's Triton kernels moves: a table by architecture, element width and regime.

The kernels only move bytes, so a tile is a number of elements, cut into whole tokens by `tokens`. Imports no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ptengine.kernels.launch import architecture, nearest_architecture

__all__ = ["TILES", "Tile", "architectures", "tile", "tokens"]


@dataclass(frozen=True)
class Tile:
    elements: int  # of one program's block: tokens times channels, rounded up to a power of two
    num_warps: int
    num_stages: int = 1  # no kernel has a loop that is worth pipelining: what overlaps is unrolled
    rows: int = 1  # how many rows' loads a program that sums over rows has in flight


# Regimes: "copy" moves tokens as they are, "rotate" turns them on the way, "sum" adds over rows. 16 bytes a thread and
# load, four loads in flight for a copy; a sum has few programs, so each is small and keeps several rows in flight.
TILES: dict[tuple[str, int, str], Tile] = {
    ("sm_80", 16, "copy"): Tile(4096, 4),
    ("sm_80", 16, "rotate"): Tile(2048, 4),
    ("sm_80", 16, "sum"): Tile(512, 2, rows=8),
    ("sm_80", 32, "copy"): Tile(2048, 4),
    ("sm_80", 32, "rotate"): Tile(1024, 4),
    ("sm_80", 32, "sum"): Tile(256, 2, rows=8),
    ("interpreter", 16, "copy"): Tile(1024, 1),
    ("interpreter", 16, "rotate"): Tile(1024, 1),
    ("interpreter", 16, "sum"): Tile(1024, 1, rows=4),
    ("interpreter", 32, "copy"): Tile(1024, 1),
    ("interpreter", 32, "rotate"): Tile(1024, 1),
    ("interpreter", 32, "sum"): Tile(1024, 1, rows=4),
}


def tile(x: torch.Tensor, regime: str) -> Tile:
    """For a call whose tokens are in x's dtype and on its device."""
    return TILES[_entry(architecture(x.device)), 8 * x.element_size(), regime]


@lru_cache(maxsize=8)
def _entry(architecture: str) -> str:
    """Whose entries an architecture takes; the search costs as much as a launch."""
    return nearest_architecture(architecture, architectures())


def architectures() -> set[str]:
    """Those with entries of their own."""
    return {known for known, _, _ in TILES}


def tokens(elements: int, block_d: int) -> int:
    """How many tokens of `block_d` channels (a power of two) make up a block of so many elements; at least one."""
    return max(elements // block_d, 1)
