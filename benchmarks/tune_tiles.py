"""Find, ahead of time and on a GPU, the fastest tiles of prefix_attention for the table in its tiles.py.

    PYTHONPATH=. python benchmarks/tune_tiles.py --json tiles.json --seconds 240 --jobs 14
    PYTHONPATH=. python benchmarks/tune_tiles.py --json tiles.json --part backward --dim 128

Shapes are those of bench_prefix_attention.py: 16384 tokens in rows of one length T behind one prefix of P tokens, and
one query per row over caches. The forward tile is searched whole. The backward's three parts share only warps and
stages: each part's tile is varied alone around a base, for every choice of these; then for each group of shapes the
best parts are combined, and each part of the best combination is varied again. Every candidate is timed on the shapes
of one P; the five best of each shape, the combinations and the table's own on all shapes.

Worker processes compile, the GPU times meanwhile. Kernels are compiled for any lengths and counts, which the launchers
specialise for 1 and multiples of 16; registers and spills may differ by a little from theirs. A candidate that fails to
compile, to launch, or to give what the table's tile gives is recorded with the reason and left out.

A time is the median of CUDA events around one call of the launcher (helper kernels included), L2 flushed before each;
"% of limit" is bench_prefix_attention.py's. A group's winner has the smallest geometric mean, over the group's shapes,
of its time over the best time there. The JSON is written after every stage, on a signal, and every ten seconds; what
was left out for want of time it lists. With --device cpu (TRITON_INTERPRET=1) a tiny search shows that the script runs.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from op_timing import copy_rate, environment, first_line, headline, matmul_rate, synchronize
from torch import Tensor
from tune_candidates import (
    HEADS,
    SHOWN,
    Candidate,
    Stage,
    candidates,
    combinations,
    neighbours,
    record,
    shapes_of,
    winners,
)
from tune_workers import (
    Problem,
    Result,
    Shape,
    Task,
    Tile,
    Workers,
    count_compilations,
    current_tile,
    generalise,
    label,
    observed,
    using,
)

from ptengine.files import write_json_atomic
from ptengine.kernels import launch

_FLUSH_BYTES = 2**30  # long enough for the host to launch what is timed
_HANGS = 90.0  # seconds without a sign of life
_HOPELESS = 3.0  # times the best: not timed on further shapes
_TOLERANCE = 0.05  # of the largest element, between two tiles' results
# What each stage may have used of the time when it ends, the most valuable first: part, dimension, decode.
_STAGES = {
    ("backward", 128, False): 0.38, ("forward", 128, False): 0.55, ("forward", 128, True): 0.60,
    ("backward", 64, False): 0.76, ("forward", 64, False): 0.83, ("forward", 64, True): 0.87,
    ("backward", 256, False): 0.96, ("forward", 256, False): 0.98, ("forward", 256, True): 1.0,
}  # fmt: skip


class Stopped(BaseException):
    """A signal came."""


class Tuner:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.on_cuda = self.device.type == "cuda"
        self.seconds = math.inf if options.seconds is None else options.seconds - 4  # to print and to leave
        self.compilations: list[str] = []
        self.failure = ""
        self.beat = time.monotonic()
        self.written = time.monotonic()
        self.workers = Workers(options.jobs, self.dtype, self.device, options.compile_limit)
        if self.on_cuda:
            generalise()
            count_compilations(self.compilations)
        self.environment = environment(self.device)
        self.rates = matmul_rate(self.device, self.dtype), copy_rate(self.device)
        self.flush = torch.empty(_FLUSH_BYTES if self.on_cuda else 0, dtype=torch.int8, device=self.device)
        self.problem = Problem(self.dtype, self.device, random=True)
        self.tasks: dict[int, tuple[Stage, Candidate]] = {}
        self.ready: list[tuple[Stage, Candidate]] = []
        chosen = [key for key in _STAGES if key[0] in options.part and key[1] in options.dim]
        self.stages = [self._stage(*key) for key in chosen]

    def run(self) -> None:
        for stage in self.stages:
            try:
                self._plan(stage)
            except Exception as error:  # the table may not know a shape; the other stages go on
                stage.left_out.append(f"everything: {first_line(error)}")
        for stage in self.stages:
            self._wait(stage)
            if stage.part == "backward":
                self._combine(stage)
            self._finals(stage)
            stage.finished = True
            self.write()
            report(stage)
            self.environment["load_average_after"] = environment(self.device)["load_average"]

    def write(self) -> None:
        self.written = time.monotonic()
        data = {
            "environment": self.environment, "dtype": self.options.dtype, "seconds": self.written - self.started,
            "budget": self.options.seconds, "jobs": self.options.jobs, "failure": self.failure,
            "rates": dict(zip(("flops_per_second", "bytes_per_second"), self.rates, strict=True)),
            "worker_error": self.workers.started_error, "compiled_while_timing": self.compilations,
            "stages": [record(stage) for stage in self.stages],
        }  # fmt: skip
        write_json_atomic(self.options.json, data)

    def _stage(self, part: str, dim: int, decode: bool) -> Stage:
        chosen = [value for key, value in _STAGES.items() if key[0] in self.options.part and key[1] in self.options.dim]
        share = _STAGES[part, dim, decode] / max(chosen)
        shapes = shapes_of(part, dim, decode, tiny=not self.on_cuda)
        return Stage(part, dim, decode, shapes, self.started + self.seconds * share)

    def _plan(self, stage: Stage) -> None:
        """Hand the stage's candidates to the workers, the table's own first."""
        for shape in stage.shapes:
            stage.table[shape.name] = current_tile(stage.part, self.problem.call(shape))
            stage.limits[shape.name] = limit_seconds(shape, *self.rates, self.dtype.itemsize)
        self._submit(stage, stage.table.values(), "table")
        tiles = candidates(next(iter(stage.table.values())), stage.dim, stage.decode, self.dtype.itemsize)
        limit = len(tiles) if self.options.candidates is None else self.options.candidates
        stage.left_out += [f"{label(tile)}: beyond --candidates" for tile in tiles[limit:]]
        self._submit(stage, tiles[:limit], "grid")

    def _submit(self, stage: Stage, tiles: Iterable[Tile], origin: str) -> None:
        for tile in dict.fromkeys(tiles):
            if all(tile != known.tile for known in stage.candidates):
                candidate = Candidate(tile, origin)
                stage.candidates.append(candidate)
                number = len(self.tasks)
                self.tasks[number] = stage, candidate
                self.workers.submit(self.stages.index(stage), Task(number, tuple(stage.shapes), tile))

    def _collect(self, seconds: float) -> None:
        self.beat = time.monotonic()
        for result in self.workers.poll(seconds):
            self._note(result)

    def _note(self, result: Result) -> None:
        stage, candidate = self.tasks[result.task.number]
        candidate.compile_seconds = None if math.isnan(result.seconds) else result.seconds
        if result.error is not None:
            candidate.state, candidate.error = "failed", f"compiling: {result.error}"
        elif candidate.state == "queued":
            candidate.state = "compiled"
            self.ready.append((stage, candidate))

    def _wait(self, stage: Stage) -> None:
        """Screen whatever is compiled, this stage's first, until nothing of it is outstanding or its time is up."""
        finals = min(0.25 * (stage.deadline - time.monotonic()), 15.0)
        while any(x.state in ("queued", "compiled") for x in stage.candidates):
            if time.monotonic() > stage.deadline - finals:
                break
            self._collect(0.0 if self.ready else 0.1)
            if self.ready:
                # The table's own give the reference that the others are compared with.
                self.ready.sort(key=lambda pair: (self.stages.index(pair[0]), pair[1].origin != "table"))
                self._screen(*self.ready.pop(0))
        late = [number for number, (of, x) in self.tasks.items() if of is stage and x.state in ("queued", "compiled")]
        self.workers.withdraw(late)
        for number in late:
            candidate = self.tasks[number][1]
            stage.left_out.append(f"{label(candidate.tile)}: {candidate.state} when time was up")
            candidate.state = "left out"
        self.ready = [pair for pair in self.ready if pair[1].state == "compiled"]

    def _combine(self, stage: Stage) -> None:
        """Put the parts' best together, then vary each part of the best of that."""
        for refine in (False, True):
            for shapes in stage.groups().values():
                ranked = stage.ranked([shape for shape in shapes if shape in stage.screening])
                tiles = [(mean, candidate.tile) for mean, candidate in ranked]
                if tiles:
                    known = [x.tile for x in stage.candidates]
                    more = neighbours(tiles[0][1], known) if refine else combinations(tiles)
                    self._submit(stage, more, "refined" if refine else "combined")
            self._wait(stage)

    def _screen(self, stage: Stage, candidate: Candidate) -> None:
        for position, shape in enumerate(stage.screening):
            if not self._time(stage, candidate, shape, 0.01, check=position == 0):
                return
            best = min(x.seconds.get(shape.name, math.inf) for x in stage.candidates if x.state != "failed")
            if candidate.seconds[shape.name] > _HOPELESS * best and candidate.origin != "table":
                break
        candidate.state = "screened"

    def _finals(self, stage: Stage) -> None:
        """Time the best ones on all shapes, shape by shape, so that what is compared was measured together."""
        chosen: list[Candidate] = []
        for shape in stage.screening:
            chosen += [candidate for _, candidate in stage.ranked([shape])[:SHOWN]]
        chosen += [x for x in stage.candidates if x.origin in ("table", "combined") and x.state == "screened"]
        for shape in stage.shapes:
            for candidate in {id(x): x for x in chosen}.values():
                if time.monotonic() > stage.deadline:
                    stage.left_out.append(f"{label(candidate.tile)} on {shape.name}: time was up")
                elif candidate.state == "screened":
                    self._collect(0.0)
                    self._time(stage, candidate, shape, 0.03, check=False)

    def _time(self, stage: Stage, candidate: Candidate, shape: Shape, seconds: float, check: bool) -> bool:
        self.beat = time.monotonic()
        call = self.problem.call(shape)
        try:
            with using(candidate.tile):
                if check:
                    self._check(stage, candidate, call)
                median, repeats = self._median(call, seconds)
        except Exception as error:  # a launch may raise anything; the search goes on and tells
            candidate.state, candidate.error = "failed", f"{shape.name}: {first_line(error)}"[:300]
            candidate.seconds.clear()
            self._survive()
            return False
        candidate.seconds[shape.name], candidate.repeats[shape.name] = median, repeats
        if time.monotonic() - self.written > 10:
            self.write()
        return True

    def _check(self, stage: Stage, candidate: Candidate, call: Callable[[], list[Tensor]]) -> None:
        """Compare the results with the table's tile's, and note what the kernel takes."""
        with observed() as launches:
            results = [x.clone() for x in call()]
        synchronize(self.device)
        for name, kernel in launches:
            if name == f"{stage.part}_kernel":
                candidate.registers, candidate.spills = (
                    getattr(kernel, "n_regs", None),
                    getattr(kernel, "n_spills", None),
                )
                candidate.shared = kernel.metadata.shared
        if stage.reference is None:
            stage.reference = results
        for x, expected in zip(results, stage.reference, strict=True):
            furthest = (x.float() - expected.float()).abs().max().item() / expected.float().abs().max().item()
            if not furthest <= _TOLERANCE:
                raise ValueError(f"expected the results of {label(stage.candidates[0].tile)}, got {furthest:.2g} off")

    def _median(self, call: Callable[[], object], seconds: float) -> tuple[float, int]:
        """Seconds of one call and how many were timed, after two that were not."""
        for _ in range(2 if self.on_cuda else 1):
            first = self._samples(call, 1)[0]
        repeats = max(5, min(40, round(seconds / first))) if self.on_cuda else 1
        return statistics.median(self._samples(call, repeats)), repeats

    def _samples(self, call: Callable[[], object], repeats: int) -> list[float]:
        if not self.on_cuda:
            moments = [time.perf_counter()]
            for _ in range(repeats):
                call()
                moments.append(time.perf_counter())
            return [end - start for start, end in pairwise(moments)]
        events = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def _survive(self) -> None:
        """After some errors a process can use its device no more: then there is no going on."""
        try:
            synchronize(self.device)
        except Exception as error:
            raise Stopped(f"the device is lost: {first_line(error)}") from error


def limit_seconds(shape: Shape, flops: float, moved: float, itemsize: int) -> float:
    from bench_prefix_attention import Case

    if not shape.cache:
        lengths = (shape.length,) * shape.rows
        case = Case("", lengths, shape.heads, shape.kv_heads, shape.dim, shape.virtual, shape.part)  # type: ignore[arg-type]
        return case.limit_seconds(flops, moved, itemsize)
    of_products = 4 * shape.heads * shape.dim * shape.rows * (shape.virtual + shape.cache)
    elements = 2 * shape.rows * shape.heads + 2 * shape.kv_heads * (shape.rows * shape.cache + shape.virtual)
    return max(of_products / flops, elements * shape.dim * itemsize / moved)


def report(stage: Stage) -> None:
    """Print the best five of every shape and the table's own, then the winners of the groups and what went wrong."""
    print(f"\n{stage.name}: {len(stage.candidates)} candidates" + ("" if stage.finished else ", not finished"))
    for shape in stage.shapes:
        table = stage.table.get(shape.name)
        ranked = [candidate for _, candidate in stage.ranked([shape])]
        shown = ranked[:SHOWN] + [x for x in ranked[SHOWN:] if x.tile == table]
        for place, x in enumerate(shown):
            seconds = x.seconds[shape.name]
            figures = f"{seconds * 1e3:9.4f} ms {100 * stage.limits[shape.name] / seconds:4.0f} % of limit"
            uses = f"registers {x.registers} spills {x.spills} shared {x.shared}"
            mark = " <- table" if x.tile == table else ""
            print(f"  {shape.name if place == 0 else '':24} {figures}  {label(x.tile):42} {uses}{mark}")
    print_winners(stage)
    for x in stage.candidates:
        if x.state == "failed":
            print(f"  failed: {label(x.tile)}: {x.error}")
    if stage.left_out:
        print(f"  left out: {len(stage.left_out)}, {'; '.join(stage.left_out[:4])}", end="")
        print("; ..." if len(stage.left_out) > 4 else "")
    sys.stdout.flush()


def print_winners(stage: Stage) -> None:
    for group, found in winners(stage).items():
        tables = ", ".join(f"{name} {mean:.3f}" for name, mean in found["table"].items())
        print(f"  {stage.name}, {group}: {found['winner']} {found['mean']:.3f}; table: {tables or 'not timed'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts, dims = ("backward", "forward"), tuple(HEADS)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write everything here")
    parser.add_argument("--seconds", type=float, help="for all of it; says what it left out")
    parser.add_argument("--dim", type=lambda text: [int(x) for x in text.split(",")], default=list(dims))
    parser.add_argument("--part", type=lambda text: text.split(","), default=list(parts))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile, 0: none (default %(default)s)")
    parser.add_argument("--candidates", type=int, metavar="N", help="at most so many of each stage's grid")
    parser.add_argument("--compile-limit", type=float, default=60.0, metavar="SECONDS", help="for one candidate")
    options = parser.parse_args(arguments)
    for name, known in (("part", parts), ("dim", dims)):
        if unknown := [x for x in getattr(options, name) if x not in known]:
            parser.error(f"expected --{name} of {known}, got {unknown}")
    if (options.device == "cpu") != launch.INTERPRETED:
        parser.error(f"expected TRITON_INTERPRET=1 with --device cpu and only there, got --device {options.device}")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def watch(tuner: Tuner) -> None:
    """Where the device hangs, no signal gets through: then write what there is and leave, from another thread."""

    def look() -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - tuner.beat > _HANGS and not tuner.failure:
                tuner.failure = f"nothing happened for {_HANGS:.0f} s"
                tuner.write()
                print(tuner.failure, flush=True)
                tuner.workers.close()
                os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:  # once is enough: what follows writes what there is
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in numbers}
    tuner = None
    try:
        tuner = Tuner(options)
        print(f"{headline(tuner.environment)}; {options.dtype}", flush=True)
        if tuner.on_cuda:
            watch(tuner)
        tuner.run()
        failure = ""
    except (Stopped, Exception) as why:  # what was measured is worth keeping whatever happened
        failure = str(why) if isinstance(why, Stopped) else first_line(why)
        traceback.print_exc()
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
    if tuner is None:
        write_json_atomic(options.json, {"failure": failure, "stages": []})
    else:
        tuner.failure = failure
        tuner.write()
        tuner.workers.close()
        for stage in tuner.stages:
            if not stage.finished:
                report(stage)
        print("\nwinners, mean time over the best:")
        for stage in tuner.stages:
            print_winners(stage)
        compiled = sum(x.compile_seconds is not None for stage in tuner.stages for x in stage.candidates)
        print(f"{compiled} candidates compiled by workers, {len(tuner.compilations)} kernels while timing,", end=" ")
        print(f"{time.monotonic() - tuner.started:.0f} s")
    for number, handler in before.items():
        signal.signal(number, handler)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
