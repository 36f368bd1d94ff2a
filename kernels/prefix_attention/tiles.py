"""Tile sizes by architecture, element width, head dimension and regime: a table, never tuned at run time.

Regimes of the forward kernel: "decode", a tile holds all queries of a row and they are few, so the keys are split;
"short", they fit one tile; "medium", rows of up to 256 tokens, and "long", everything else. An architecture that is not
in the table takes the entry of its nearest older relative. The 16-bit entries of sm_90 were chosen by their times on an
H200 among those without spills (benchmarks/tune_tiles.py); the others are not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ptengine.kernels.launch import nearest_architecture

__all__ = ["Backward", "Forward", "architectures", "backward_tile", "forward_tile", "sources"]


@dataclass(frozen=True)
class Forward:
    """BLOCK_M packed queries by BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Backward:
    """Queries by keys in each of the three parts of the backward kernel, which share warps and stages."""

    query_m: int  # gradient of the queries: a tile of queries, passing over keys
    query_n: int
    key_m: int  # gradient of a row's keys and values: a tile of keys, passing over queries
    key_n: int
    prefix_m: int  # gradient of a prefix: a tile of it, passing over all queries that read it
    prefix_n: int
    num_warps: int
    num_stages: int
    swapped: bool = False  # gradients of keys as [D, N], for blocks of fewer than 64 keys


# Keys: architecture, bits of an element, head dimension rounded up to a power of two (64 serves 16 and 32 as well).
# Every entry compiles without spills, on its architecture and each supported release of Triton, for packed rows as for
# a prefix given apart (benchmarks/compile_tiles.py). fp32 products are exact and run on no tensor core.
_FORWARD: dict[tuple[str, int, int], dict[str, Forward]] = {
    ("sm_80", 16, 64): {
        "decode": Forward(16, 64, 4, 3), "short": Forward(64, 64, 4, 2), "long": Forward(128, 64, 8, 3),
    },
    ("sm_80", 16, 128): {
        "decode": Forward(16, 64, 4, 2), "short": Forward(64, 32, 8, 2), "long": Forward(64, 64, 8, 2),
    },
    ("sm_80", 16, 256): {
        "decode": Forward(16, 32, 4, 2), "short": Forward(64, 32, 8, 2), "long": Forward(64, 32, 8, 2),
    },
    ("sm_80", 32, 64): {
        "decode": Forward(16, 32, 4, 1), "short": Forward(32, 32, 4, 2), "long": Forward(32, 32, 4, 2),
    },
    ("sm_80", 32, 128): {
        "decode": Forward(16, 16, 4, 2), "short": Forward(16, 16, 4, 1), "long": Forward(16, 16, 4, 1),
    },
    ("sm_80", 32, 256): {
        "decode": Forward(16, 16, 8, 1), "short": Forward(16, 16, 8, 1), "long": Forward(16, 16, 8, 1),
    },
    ("sm_90", 16, 64): {
        "decode": Forward(16, 64, 4, 3), "short": Forward(64, 32, 4, 3), "medium": Forward(64, 32, 4, 3),
        "long": Forward(64, 64, 4, 3),
    },
    ("sm_90", 16, 128): {
        "decode": Forward(16, 64, 4, 2), "short": Forward(64, 16, 4, 4), "medium": Forward(64, 16, 4, 4),
        "long": Forward(128, 64, 8, 3),
    },
    ("sm_90", 16, 256): {
        "decode": Forward(16, 64, 4, 2), "short": Forward(64, 16, 4, 3), "long": Forward(128, 32, 8, 3),
    },
    ("sm_90", 32, 64): {
        "decode": Forward(16, 16, 4, 1), "short": Forward(16, 16, 4, 2), "long": Forward(32, 16, 4, 1),
    },
    ("sm_90", 32, 128): {
        "decode": Forward(16, 16, 4, 1), "short": Forward(32, 16, 8, 1), "long": Forward(32, 16, 8, 1),
    },
    ("sm_100", 16, 64): {
        "decode": Forward(16, 64, 4, 3), "short": Forward(64, 64, 4, 3), "long": Forward(128, 64, 8, 3),
    },
    ("sm_100", 16, 128): {
        "decode": Forward(16, 64, 4, 2), "short": Forward(64, 16, 4, 4), "medium": Forward(64, 16, 4, 4),
        "long": Forward(128, 64, 8, 3),
    },
    ("sm_100", 16, 256): {
        "decode": Forward(16, 32, 4, 3), "short": Forward(64, 32, 8, 2), "long": Forward(64, 32, 8, 2),
    },
    ("sm_100", 32, 128): {
        "decode": Forward(16, 16, 4, 2), "short": Forward(16, 16, 4, 2), "long": Forward(16, 16, 4, 2),
    },
}  # fmt: skip

_BACKWARD: dict[tuple[str, int, int], Backward] = {
    ("sm_80", 16, 64): Backward(64, 32, 32, 64, 32, 64, 8, 2),
    ("sm_80", 16, 128): Backward(64, 64, 64, 64, 32, 64, 8, 2),
    ("sm_80", 16, 256): Backward(64, 32, 32, 32, 32, 32, 8, 2, swapped=True),
    ("sm_80", 32, 64): Backward(32, 16, 16, 32, 16, 32, 8, 1),
    ("sm_80", 32, 128): Backward(32, 16, 16, 32, 16, 32, 8, 1),
    ("sm_80", 32, 256): Backward(16, 16, 16, 16, 16, 16, 16, 1),
    ("sm_86", 16, 256): Backward(64, 32, 32, 32, 32, 32, 8, 1, swapped=True),
    ("sm_90", 32, 128): Backward(16, 16, 16, 32, 16, 32, 8, 1),
    ("sm_90", 16, 64): Backward(64, 64, 32, 64, 32, 64, 4, 1),
    ("sm_90", 16, 128): Backward(128, 64, 32, 128, 32, 128, 8, 3),
    ("sm_90", 16, 256): Backward(32, 32, 16, 32, 16, 32, 4, 3, swapped=True),
    ("sm_100", 32, 64): Backward(32, 16, 16, 32, 16, 32, 4, 1),
    ("sm_100", 16, 256): Backward(64, 32, 32, 32, 32, 32, 8, 1, swapped=True),
}
# Rows of up to 64 tokens: smaller tiles, of which several run side by side.
_SHORT_BACKWARD: dict[tuple[str, int, int], Backward] = {
    ("sm_90", 16, 128): Backward(64, 32, 16, 64, 32, 64, 4, 2),
}
# Where scores are bent or masked beyond causality, or heads fill their block only in part, more registers are taken.
_BENT_BACKWARD: dict[tuple[str, int, int], Backward] = {
    ("sm_90", 16, 128): Backward(64, 32, 32, 64, 32, 64, 8, 2),
}
# The interpreter's time is in the number of blocks; small ones so that short tests see several.
_INTERPRETED_FORWARD = {
    "decode": Forward(16, 16, 4, 1), "short": Forward(32, 32, 4, 1), "medium": Forward(64, 32, 4, 1),
    "long": Forward(64, 64, 4, 1),
}  # fmt: skip
_INTERPRETED_BACKWARD = Backward(32, 32, 64, 32, 64, 32, 4, 1)


def forward_tile(architecture: str, bits: int, dim: int, regime: str) -> Forward:
    """The forward tile for elements of `bits` bits and a head dimension of `dim`, a power of two."""
    if architecture == "interpreter":
        return _INTERPRETED_FORWARD[regime]
    entry = _FORWARD[_key(_FORWARD, architecture, bits, dim)]
    return entry.get(regime, entry["long"])


def backward_tile(architecture: str, bits: int, dim: int, longest: int, plain: bool) -> Backward:
    """The backward tiles, arguments as in `forward_tile`.

    `longest` is the longest row in tokens; `plain` means no window, bias or cap, and heads of `dim`.
    """
    if architecture == "interpreter":
        return _INTERPRETED_BACKWARD
    key = _key(_BACKWARD, architecture, bits, dim)
    if not plain:
        return _BENT_BACKWARD.get(key, _BACKWARD[key])
    return _SHORT_BACKWARD.get(key, _BACKWARD[key]) if longest <= 64 else _BACKWARD[key]


def architectures() -> set[str]:
    """Those with entries of their own for half-precision elements."""
    return {known for known, bits, _ in _FORWARD if bits == 16}


def sources(architecture: str) -> set[str]:
    """Whose entries an architecture takes, each for some dtype, head dimension and direction."""
    tables: tuple[Mapping[tuple[str, int, int], object], ...] = (_FORWARD, _BACKWARD)
    return {_key(table, architecture, bits, dim)[0] for table in tables for _, bits, dim in table}


def _key(table: Mapping[tuple[str, int, int], object], architecture: str, bits: int, dim: int) -> tuple[str, int, int]:
    width = max(dim, 64)
    has = {known for known, known_bits, known_dim in table if (known_bits, known_dim) == (bits, width)}
    return nearest_architecture(architecture, has), bits, width
