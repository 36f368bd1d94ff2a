"""What a compiled kernel may use, and how it may differ from the table kept in the repository.

The table, `results/resources.json`, holds for each Triton release, target, operation and tile the registers of a
thread, the shared memory of a program and the tensor-core instructions. It is a floor: what gets worse than it fails,
and so does a table that no longer describes the tiles. Imports no Triton, so it can be tested anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aot_ttir import Dot

from ptengine.files import write_atomic

__all__ = [
    "SLACK",
    "TABLE",
    "TENSOR_CORE",
    "Measured",
    "Row",
    "read_table",
    "regressions",
    "stale",
    "violations",
    "write_table",
]

TABLE = Path(__file__).parent / "results" / "resources.json"
# Registers are handed out eight at a time, so fewer more cost nothing.
SLACK = 8
# Of stack and spills where the table has some, which NVIDIA's kernels never have: what LLVM allocates for AMD differs
# by a few with the machine that compiles.
SPILL_SLACK = 16
# Matrix instructions from the fastest kind to the slowest: tcgen05 of sm_100, wgmma of sm_90, mma.sync, AMD's mfma.
TENSOR_CORE = ("UTCHMMA", "HGMMA", "HMMA", "MFMA")
# Tiles are made for NVIDIA. Elsewhere one that does not compile, or that spills, is told in the table and is no fault.
GUEST = "gfx"

Kept = dict[str, Any]  # a row of the table
Table = dict[str, dict[str, dict[str, dict[str, Kept]]]]  # Triton release, target, operation, row


@dataclass
class Measured:
    """What one compiled kernel uses."""

    registers: int = 0  # of a thread
    stack: int = 0  # bytes of local memory of a thread
    spills: int = 0  # instructions that store to it or load from it
    shared: int = 0  # bytes of a program
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions of each kind
    dots: list[Dot] = field(default_factory=list)
    warps: int = 0
    narrow: list[str] = field(default_factory=list)  # offsets that may overflow, with their place
    error: str | None = None  # why it does not compile; everything above is then empty
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage


@dataclass
class Row:
    """One kernel of one call on one target."""

    target: str
    operation: str
    name: str
    tile: str
    measured: Measured

    def kept(self) -> Kept:
        """Its row of the table."""
        m = self.measured
        row: Kept = {"tile": self.tile}
        if m.error is not None:
            return {**row, "error": True}
        row |= {"registers": m.registers, "shared": m.shared, "tensor_core": m.tensor_core}
        return row if m.stack == m.spills == 0 else {**row, "stack": m.stack, "spills": m.spills}


def violations(row: Row, shared_limit: int) -> list[str]:
    """What is wrong with a row whatever the table says."""
    m = row.measured
    guest = row.target.startswith(GUEST)
    if m.error is not None:
        return [] if guest else [f"expected to compile, got {m.error}"]
    faults = list(m.narrow)
    if (m.stack or m.spills) and not guest:
        faults.append(f"expected no spills, got {m.stack} bytes of stack, {m.spills} loads and stores")
    if m.shared > shared_limit and not guest:
        faults.append(f"expected at most {shared_limit} bytes of shared memory, got {m.shared}")
    wanted = _wanted(row)
    if wanted and not any(m.tensor_core.get(kind) for kind in wanted):
        faults.append(f"expected {' or '.join(wanted)} instructions for its dots, got {_instructions(m.tensor_core)}")
    return faults


def _wanted(row: Row) -> tuple[str, ...]:
    """The tensor-core instructions of which there must be some; none without a dot that they can take."""
    m = row.measured
    if not any(dot.element != "f32" or dot.precision != "ieee" for dot in m.dots):
        return ()
    if row.target.startswith(GUEST):
        return ("MFMA",)
    if row.target == "sm_90" and any(
        dot.m >= 64 and dot.n % 8 == 0 and dot.element in ("f16", "bf16") and m.warps % 4 == 0 for dot in m.dots
    ):
        return ("HGMMA",)
    return {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA")}.get(row.target, ("UTCHMMA", "HMMA"))


def regressions(row: Row, kept: Kept | None) -> list[str]:
    """What is worse than in the table, or not in it."""
    if kept is None:
        return ["expected a row in the table, got none: --write-table"]
    if kept["tile"] != row.tile:
        return [f"expected the table's tile {kept['tile']}, got {row.tile}: --write-table"]
    m = row.measured
    if m.error is not None:
        return [] if kept.get("error") else [f"expected to compile as before, got {m.error}"]
    if kept.get("error"):
        return ["expected to fail as before, got it compiled: --write-table"]
    faults = []
    if m.registers > kept["registers"] + SLACK:
        faults.append(f"expected at most {kept['registers']} + {SLACK} registers, got {m.registers}")
    for name in ("shared", "stack", "spills"):
        most = kept.get(name, 0)
        if getattr(m, name) > most + (SPILL_SLACK if most and name != "shared" else 0):
            allowed = f"{most} + {SPILL_SLACK}" if most and name != "shared" else most
            faults.append(f"expected {name} of at most {allowed} as before, got {getattr(m, name)}")
    before = kept["tensor_core"]
    lost = set(before) - set(m.tensor_core)
    joined = set(m.tensor_core) - set(before)
    if lost or (before and joined and max(map(TENSOR_CORE.index, joined)) > min(map(TENSOR_CORE.index, before))):
        faults.append(f"expected {_instructions(before)} as before, got {_instructions(m.tensor_core)}")
    return faults


def _instructions(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


def read_table() -> Table:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


def write_table(release: str, rows: list[Row]) -> None:
    """Put `rows` into the table of a Triton release, in place of all rows of their targets and operations."""
    table = read_table()
    column = table.setdefault(release, {})
    for target, operation in {(row.target, row.operation) for row in rows}:
        column.setdefault(target, {})[operation] = {}
    for row in rows:
        column[row.target][row.operation][row.name] = row.kept()
    TABLE.parent.mkdir(exist_ok=True)
    write_atomic(TABLE, _text(table, depth=4).encode() + b"\n")


def _text(value: Any, depth: int, indent: str = "") -> str:
    """JSON with one row of the table a line, so that a difference between two versions can be read."""
    if depth == 0:
        return json.dumps(value)
    inner = indent + " "
    parts = [f"{inner}{json.dumps(key)}: {_text(value[key], depth - 1, inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


def stale(
    table: Table, release: str, rows: Iterable[Row], targets: Iterable[str], operations: Iterable[str]
) -> list[str]:
    """Rows of the table that nothing measured corresponds to, among those of the targets and operations measured."""
    seen = {(row.target, row.operation, row.name) for row in rows}
    wanted = set(operations)
    return [
        f"{target} {operation} {name}: expected a kernel for this row of the table, got none: --write-table"
        for target in targets
        for operation, names in table.get(release, {}).get(target, {}).items()
        if operation in wanted
        for name in names
        if (target, operation, name) not in seen
    ]
