"""What benchmarks/tune_tiles.py tries, on which shapes, what to try next, and what was found: nothing here is run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor
from tune_workers import Shape, Tile, label

from ptengine.kernels.prefix_attention.tiles import Backward, Forward

__all__ = [
    "HEADS",
    "SHOWN",
    "Candidate",
    "Stage",
    "candidates",
    "combinations",
    "neighbours",
    "record",
    "shapes_of",
    "winners",
]

_TOKENS = 16384
_LENGTHS = (64, 512, 2048, 128, 256, 32)  # the most telling first
_VIRTUAL = (128, 512, 16)
HEADS = {64: (12, 12), 128: (32, 8), 256: (16, 16)}
_DECODE_ROWS, _CACHE = 64, 512
_REGISTERS = {"forward": 160, "query": 160, "key": 192}  # accumulators of one thread, more would spill
_SHARED = 227 * 1024
SHOWN = 5  # of every ranking
_COMBINED = 1.3  # choices of warps and stages this far from the best are not combined


@dataclass
class Candidate:
    tile: Tile
    origin: str  # table, grid, combined or refined
    error: str | None = None
    compile_seconds: float | None = None
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # by shape
    repeats: dict[str, int] = field(default_factory=dict)
    state: str = "queued"  # then compiled, screened, failed, or left out

    def record(self) -> dict[str, Any]:
        return {"name": label(self.tile), **asdict(self)}


@dataclass
class Stage:
    part: str
    dim: int
    decode: bool
    shapes: list[Shape]
    deadline: float
    candidates: list[Candidate] = field(default_factory=list)
    table: dict[str, Tile] = field(default_factory=dict)  # by shape
    limits: dict[str, float] = field(default_factory=dict)
    reference: list[Tensor] | None = None
    left_out: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def name(self) -> str:
        return f"{self.part} D={self.dim}{' decode' if self.decode else ''}"

    @property
    def screening(self) -> list[Shape]:
        return [shape for shape in self.shapes if shape.virtual == self.shapes[0].virtual]

    def groups(self) -> dict[str, list[Shape]]:
        found: dict[str, list[Shape]] = {}
        for shape in self.shapes:
            name = "T<=64" if shape.length <= 64 else "T 65..256" if shape.length <= 256 else "T>256"
            if shape.part == "forward":  # a row's queries fit one tile
                short = shape.length * shape.heads // shape.kv_heads <= 64
                name = "decode" if shape.cache else "short" if short else f"long {name}"
            found.setdefault(name, []).append(shape)
        return found

    def ranked(self, shapes: Sequence[Shape]) -> list[tuple[float, Candidate]]:
        """Candidates timed on all of the shapes, by the geometric mean of their time over the best one there."""
        names = [shape.name for shape in shapes]
        timed = [x for x in self.candidates if x.state != "failed" and all(name in x.seconds for name in names)]
        best = {name: min(x.seconds[name] for x in timed) for name in names if timed}
        means = [(statistics.geometric_mean(x.seconds[name] / best[name] for name in names), x) for x in timed]
        return sorted(means, key=lambda pair: pair[0])


def shapes_of(part: str, dim: int, decode: bool, tiny: bool) -> list[Shape]:
    heads, kv_heads = (2, 1) if tiny else HEADS[dim]
    if decode:
        rows, cache, virtual = (2, 32, 16) if tiny else (_DECODE_ROWS, _CACHE, _VIRTUAL[0])
        return [Shape(part, heads, kv_heads, dim, rows, 1, virtual, cache)]
    tokens, lengths, virtuals = (32, (16, 32), (16,)) if tiny else (_TOKENS, _LENGTHS, _VIRTUAL)
    return [Shape(part, heads, kv_heads, dim, tokens // t, t, p) for p, t in product(virtuals, lengths)]


def candidates(current: Tile, dim: int, decode: bool, itemsize: int) -> list[Tile]:
    """Those to try instead of the table's tile, the likelier first."""
    if isinstance(current, Forward):
        return list(dict.fromkeys(forward_candidates(current, dim, decode, itemsize)))
    return list(dict.fromkeys(backward_candidates(current, dim, itemsize)))


def forward_candidates(current: Forward, dim: int, decode: bool, itemsize: int) -> list[Tile]:
    found: list[Tile] = []
    for stages, warps, m, n in product((2, 3, 1), (4, 8), (16,) if decode else (64, 128, 32), (64, 32, 128)):
        fits = (m * dim + stages * 2 * n * dim) * itemsize <= _SHARED
        wasteful = warps == 8 and (n < 64 if decode else m < 64)
        if fits and not wasteful and m * (dim + n) <= _REGISTERS["forward"] * 32 * warps:
            found.append(replace(current, block_m=m, block_n=n, num_warps=warps, num_stages=stages))
    return found


def backward_candidates(current: Backward, dim: int, itemsize: int) -> list[Tile]:
    """For each choice of warps, stages and order a base, then each part varied alone around it."""
    found: list[Tile] = []
    orders: list[tuple[bool, tuple[tuple[int, int], ...]]] = [(False, ((32, 64), (64, 64), (32, 128), (64, 128)))]
    query_tiles = ((64, 32), (64, 64), (128, 32), (128, 64), (64, 128))
    if dim > 128:
        query_tiles = ((64, 32), (32, 32), (64, 64), (128, 32), (32, 64))
        orders = [(True, ((32, 32), (16, 32), (64, 32), (32, 16))), (False, ((32, 64), (16, 64)))]
    for (swapped, key_tiles), stages, warps in product(orders, (2, 3, 1), (8, 4)):
        queries = [tile for tile in query_tiles if _fits("query", tile, dim, warps, stages, itemsize)]
        keys = [tile for tile in key_tiles if _fits("key", tile, dim, warps, stages, itemsize)]
        if not queries or not keys:
            continue
        query, key, prefix = queries[0], keys[0], keys[0]
        if (current.num_warps, current.swapped) == (warps, swapped):
            query, key = (current.query_m, current.query_n), (current.key_m, current.key_n)
            prefix = (current.prefix_m, current.prefix_n)
        base = replace(current, num_warps=warps, num_stages=stages, swapped=swapped)
        varied = [(query, key, prefix), *((x, key, prefix) for x in queries)]
        varied += [(query, x, prefix) for x in keys] + [(query, key, x) for x in keys]
        found += [_with_parts(base, *parts) for parts in varied]
    return found


def _fits(part: str, tile: tuple[int, int], dim: int, warps: int, stages: int, itemsize: int) -> bool:
    m, n = tile
    held, streamed = (m, n) if part == "query" else (n, m)  # two operands of each
    sums = (1 if part == "query" else 2) * held * dim + 2 * m * n
    shared = (2 * held * dim + 2 * stages * streamed * dim + (0 if part == "query" else 2 * m * n)) * itemsize
    return sums <= _REGISTERS[part] * 32 * warps and shared <= _SHARED


def _with_parts(base: Backward, query: tuple[int, int], key: tuple[int, int], prefix: tuple[int, int]) -> Backward:
    return replace(
        base, query_m=query[0], query_n=query[1], key_m=key[0], key_n=key[1], prefix_m=prefix[0], prefix_n=prefix[1]
    )


def combinations(ranked: Sequence[tuple[float, Tile]]) -> list[Tile]:
    """Of tiles by their time over the best: for each promising choice of warps and stages, its parts' best together."""
    families: dict[tuple[int, int, bool], list[Backward]] = {}
    for mean, tile in ranked:
        if isinstance(tile, Backward):
            family = (tile.num_warps, tile.num_stages, tile.swapped)
            if family in families or mean <= _COMBINED * ranked[0][0]:
                families.setdefault(family, []).append(tile)
    found: list[Tile] = []
    for tiles in families.values():
        # The base is what most share; the best among those that differ from it in one part has that part's best.
        common = [statistics.mode(map(part, tiles)) for part in _PARTS]
        base = _with_parts(tiles[0], common[0], common[1], common[2])
        best = []
        for part in _PARTS:
            others = [other for other in _PARTS if other is not part]
            alone = [tile for tile in tiles if all(other(tile) == other(base) for other in others)]
            best.append(part(alone[0] if alone else base))
        found.append(_with_parts(base, best[0], best[1], best[2]))
    return found


def neighbours(best: Tile, known: Sequence[Tile]) -> list[Tile]:
    """Each part of the best tile exchanged for all that were tried with as many warps and stages."""
    found: list[Tile] = []
    for tile in known:
        if isinstance(best, Backward) and isinstance(tile, Backward):
            query, key, prefix = _query(best), _key(best), _prefix(best)
            if _with_parts(tile, query, key, prefix) == best:
                found.append(_with_parts(best, _query(tile), key, prefix))
                found.append(_with_parts(best, query, _key(tile), prefix))
                found.append(_with_parts(best, query, key, _prefix(tile)))
    return found


def _query(tile: Backward) -> tuple[int, int]:
    return tile.query_m, tile.query_n


def _key(tile: Backward) -> tuple[int, int]:
    return tile.key_m, tile.key_n


def _prefix(tile: Backward) -> tuple[int, int]:
    return tile.prefix_m, tile.prefix_n


_PARTS = (_query, _key, _prefix)


def winners(stage: Stage) -> dict[str, dict[str, Any]]:
    """By group: the winner, its mean against the best at each shape, and the means of the table's tiles."""
    found = {}
    for group, shapes in stage.groups().items():
        timed = [shape for shape in shapes if any(shape.name in x.seconds for x in stage.candidates)]
        ranked = stage.ranked(timed) if timed else []
        if ranked:
            tables = {label(stage.table[shape.name]) for shape in shapes}
            found[group] = {
                "winner": label(ranked[0][1].tile), "mean": ranked[0][0], "shapes": [shape.name for shape in timed],
                "table": {label(x.tile): mean for mean, x in ranked if label(x.tile) in tables},
                "next": {label(x.tile): mean for mean, x in ranked[1:SHOWN]},
            }  # fmt: skip
    return found


def record(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name, "part": stage.part, "dim": stage.dim, "decode": stage.decode, "finished": stage.finished,
        "shapes": [
            {**asdict(shape), "name": shape.name, "limit": stage.limits.get(shape.name)} for shape in stage.shapes
        ],
        "table": {name: label(tile) for name, tile in stage.table.items()},
        "groups": winners(stage), "left_out": stage.left_out,
        "candidates": [candidate.record() for candidate in stage.candidates],
    }  # fmt: skip
