"""What a kernel's TTIR says: which products it has, and whether an element offset can overflow 32 bits.

TTIR is the text Triton prints after inlining and simplifying: every value is assigned once, one operation a line, types
at the end. Nothing here knows an operation of ours, a GPU or how the text was made.

**The rule on offsets.** Tensors may hold more than 2**31 elements, so between an index and the pointer it moves there
is no 32-bit product that a large tensor could overflow. Values are followed backwards from each `tt.addptr`, with the
interval that is known of them at compile time. A 32-bit product whose interval does not fit in 32 bits is a fault. One
is let pass: an index times a constant, as in `program_id * BLOCK`, which is widened before it reaches the pointer and
whose factor is not itself such a product. That it may be too late even there, as in `(row * COLUMNS).to(tl.int64)`,
cannot be told from the text. A loaded value, a quotient, a remainder and a loop's counter are new indices: what they
were made from is not looked at. Nor is what a minimum was made from where one of its sides is free of such products.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Dot", "dots", "narrow_offsets"]

_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_RESULT = re.compile(r"^(%[\w$.-]+)(?::\d+)? = (.*)$")
_OPERATION = re.compile(r'^"?([\w.]+)"?')
_LOCATION = re.compile(r"\s+loc\((.*)\)$")
_PAIR = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)")
_SHAPE = re.compile(r"tensor<([\dx]+)x(\w+)>")
_INTEGER = re.compile(r"[\sx]i(\d+)>?$")

_Interval = tuple[int, int]  # the least and the greatest value
_ANY: _Interval = (-(2**31), 2**31 - 1)
_INDICES = {"tt.load", "counter", "arith.cmpi"} | {f"arith.{name}" for name in ("divsi", "divui", "remsi", "remui")}
_PASSING = {f"arith.{name}" for name in ("extsi", "extui", "trunci")} | {
    f"tt.{name}" for name in ("splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans")
}


@dataclass(frozen=True)
class Dot:
    """One product of tiles: [m, k] @ [k, n], the element type of its factors, and how 32-bit factors are rounded."""

    m: int
    n: int
    k: int
    element: str
    precision: str  # "ieee" where nothing is said


def dots(ttir: str) -> list[Dot]:
    """Every `tt.dot` of the text, in order."""
    result = []
    for line in ttir.splitlines():
        if " tt.dot " in line:
            (left, element), (right, _) = _SHAPE.findall(line)[:2]
            (m, k), n = (int(size) for size in left.split("x")[-2:]), int(right.split("x")[-1])
            precision = re.search(r"inputPrecision = (\w+)", line)
            result.append(Dot(m, n, k, element, precision.group(1) if precision else "ieee"))
    return result


def narrow_offsets(ttir: str) -> list[str]:
    """The faults against the rule above, as "file:line: what", without repetition; empty where there are none."""
    return list(dict.fromkeys(_Program(ttir).faults()))


@dataclass(eq=False)
class _Operation:
    name: str
    text: str = ""
    location: str = ""
    operands: list[_Value] = field(default_factory=list)
    # Of what has a region: where each result, or each value it carries round, may come from.
    sources: list[list[_Value]] = field(default_factory=list)

    @property
    def bits(self) -> int:
        """The width of the integers at the end of the text, those of the result; 0 for anything else."""
        found = _INTEGER.search(self.text)
        return int(found.group(1)) if found else 0


_Value = tuple[_Operation, int]  # an operation and the number of its result
_UNKNOWN: _Value = (_Operation("unknown"), 0)  # an argument of the kernel or of a block


class _Program:
    """The operations of a module and how they hang together."""

    def __init__(self, ttir: str) -> None:
        self._moves: list[_Operation] = []
        self._locations: dict[str, str] = {}
        self._intervals: dict[_Value, _Interval] = {}
        # By name as far as the text was read: regions side by side may use the same names.
        self._known: dict[str, _Operation | None] = {}
        self._regions: list[_Operation] = []
        for line in ttir.splitlines():
            self._read(line.strip())

    def _read(self, line: str) -> None:
        if line.startswith("#loc"):
            name, _, text = line.partition(" = loc(")
            self._locations[name] = text
            return
        found = _LOCATION.search(line)
        line = _LOCATION.sub("", line)
        if line.startswith("^"):
            self._known.update(dict.fromkeys(_VALUE.findall(line)))
        elif line.startswith("}"):
            if not line.endswith("{"):  # "} else {" goes on with the same operation
                self._regions.pop()
        else:
            assigned = _RESULT.match(line)
            body = assigned.group(2) if assigned else line
            kind = _OPERATION.match(body)
            if kind is not None:
                operation = _Operation(kind.group(1), body, found.group(1) if found else "")
                operation.operands = [self._value(name) for name in _VALUE.findall(body)]
                if assigned:
                    self._known[assigned.group(1)] = operation
                self._enter(operation)

    def _enter(self, operation: _Operation) -> None:
        """Take up an operation, and its region if it opens one."""
        if operation.name == "tt.addptr":
            self._moves.append(operation)
        elif operation.name == "scf.yield":
            sources = self._regions[-1].sources
            sources.extend([] for _ in operation.operands[len(sources) :])
            for known, value in zip(sources, operation.operands, strict=False):
                known.append(value)
        if not operation.text.endswith("{"):
            return
        if operation.name == "tt.func":
            self._known.update(dict.fromkeys(_VALUE.findall(operation.text)))
        elif operation.name == "scf.for":
            counter, start, end = _VALUE.findall(operation.text)[:3]
            bounds = [self._value(start), self._value(end)]
            self._known[counter] = _Operation("counter", location=operation.location, operands=bounds)
        for name, before in _PAIR.findall(operation.text.partition("(")[2]):
            operation.sources.append([self._value(before)])
            self._known[name] = _Operation("carried", location=operation.location, sources=operation.sources[-1:])
        self._regions.append(operation)

    def _value(self, name: str) -> _Value:
        name, _, number = name.partition("#")
        operation = self._known.get(name)
        return _UNKNOWN if operation is None else (operation, int(number or 0))

    def faults(self) -> Iterator[str]:
        """The 32-bit products that break the rule, for each pointer that one of them moves."""
        for move in self._moves:
            widened = move.bits == 64
            for product in self._products_below(move.operands[1]):
                index = widened and any(self._constant(factor) for factor in product.operands)
                if not index or any(self._products_below(factor) for factor in product.operands):
                    yield f"{self._place(product)}: a 32-bit product moves a pointer"

    def _products_below(self, value: _Value) -> list[_Operation]:
        """The 32-bit products that may overflow, among what `value` was computed from."""
        result, todo, seen = [], [value], set()
        while todo:
            value = todo.pop()
            operation, number = value
            if value in seen or operation.name in _INDICES:
                continue
            seen.add(value)
            if operation.name == "arith.minsi" and not all(self._products_below(side) for side in operation.operands):
                continue
            if operation.name == "arith.muli" and operation.bits == 32 and not _fits(self._interval_of(operation)):
                result.append(operation)
            if operation.sources:
                todo.extend(operation.sources[number])
            else:  # which of two values is chosen says nothing of their size
                todo.extend(operation.operands[1:] if operation.name == "arith.select" else operation.operands)
        return result

    def _constant(self, value: _Value) -> bool:
        low, high = self._interval(value)
        return low == high

    def _interval(self, value: _Value) -> _Interval:
        """Between which numbers a 32-bit integer lies at the least and at the most."""
        if value not in self._intervals:
            interval = self._interval_of(value[0])
            self._intervals[value] = interval if _fits(interval) else _ANY
        return self._intervals[value]

    def _interval_of(self, operation: _Operation) -> _Interval:
        name, text = operation.name, operation.text
        if name == "arith.constant":
            number = re.search(r"(?:dense<|constant )(-?\d+)>? :", text)
            return (int(number.group(1)), int(number.group(1))) if number else _ANY
        if name == "tt.make_range":
            start, end = (int(number) for number in re.findall(r"(?:start|end) = (-?\d+)", text))
            return min(start, end), max(start, end) - 1
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            return 0, _ANY[1]
        if name == "counter":
            (start, _), (_, end) = (self._interval(operand) for operand in operation.operands)
            return start, max(start, end - 1)
        if name in _PASSING:
            return self._interval(operation.operands[0])
        if name == "arith.select":
            chosen, other = (self._interval(operand) for operand in operation.operands[1:])
            return min(chosen[0], other[0]), max(chosen[1], other[1])
        if name.startswith("arith.") and len(operation.operands) == 2:
            return _arithmetic(
                name.removeprefix("arith."), *(self._interval(operand) for operand in operation.operands)
            )
        return _ANY

    def _place(self, operation: _Operation) -> str:
        """Where in the source an operation stands: "file:line"."""
        text = operation.location
        for _ in range(8):  # a name around a call site around a file
            found = re.search(r'"([^"]+)":(\d+):\d+', text)
            if found:
                return f"{found.group(1).rpartition('/')[2]}:{found.group(2)}"
            alias = re.search(r"#loc\d*", text)
            text = self._locations.get(alias.group(0), "") if alias else ""
        return "unknown line"


def _fits(interval: _Interval) -> bool:
    return interval[0] >= _ANY[0] and interval[1] <= _ANY[1]


def _arithmetic(name: str, left: _Interval, right: _Interval) -> _Interval:
    """The interval of an operation on two integers; of one that is not known here, any 32-bit number."""
    if name == "addi":
        return left[0] + right[0], left[1] + right[1]
    if name == "subi":
        return left[0] - right[1], left[1] - right[0]
    if name == "muli":
        corners = [a * b for a in left for b in right]
        return min(corners), max(corners)
    if name in ("minsi", "minui"):
        return min(left[0], right[0]), min(left[1], right[1])
    if name in ("maxsi", "maxui"):
        return max(left[0], right[0]), max(left[1], right[1])
    if name in ("divsi", "divui") and left[0] >= 0 and right[0] > 0:
        return left[0] // right[1], left[1] // right[0]
    if name in ("remsi", "remui") and right[0] > 0:
        return 0 if left[0] >= 0 else 1 - right[1], right[1] - 1
    if name == "andi" and right[0] >= 0:
        return 0, right[1]
    return _ANY
