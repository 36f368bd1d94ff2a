"""Compile every shipped tile of every Triton kernel ahead of time, without a GPU, and hold it to account.

    python benchmarks/compile_tiles.py --triton 3.6.0,3.9.0 --jobs 2      the whole gate; exit status 1 if it fails
    python benchmarks/compile_tiles.py --only prefix_attention --targets sm_90    with the Triton that is installed
    python benchmarks/compile_tiles.py --triton 3.6.0,3.9.0 --write-table         after tiles or kernels were changed

Checked for each kernel and target: it compiles; it spills nothing; its dots use tensor cores; its shared memory fits;
no 32-bit product moves a pointer; and, against `results/resources.json`, that nothing got worse. On gfx942, for which
no tile is made, a kernel may fail to compile or spill where the table says that it does.

With --triton each release is installed into a temporary folder, put first on the path of a process of its own; torch
stays the one that is installed. Triton keeps what it compiled in TRITON_CACHE_DIR, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_rules import Measured, Row, read_table, regressions, stale, violations, write_table

from ptengine.files import write_json_atomic

if TYPE_CHECKING:
    from aot_calls import Call
    from aot_capture import Launch, Target

# What the forked workers compile; kernels and their launches are not worth pickling.
_LAUNCHES: list[tuple[Launch, Target]] = []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"expected --jobs of at least 1, got {options.jobs}")
    if options.triton is not None:
        return _other_releases(options)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from aot_calls import CALLS
    from aot_capture import TARGETS

    for name, known in (("targets", TARGETS), ("only", CALLS)):
        unknown = [choice for choice in getattr(options, name) or () if choice not in known]
        if unknown:
            parser.error(f"expected --{name} of {', '.join(known)}, got {', '.join(unknown)}")
    targets = [TARGETS[name] for name in options.targets or TARGETS]
    calls = {name: CALLS[name] for name in options.only or CALLS}
    start = time.perf_counter()
    rows, faults = compile_all(calls, targets, options.jobs)
    _print_rows(rows)
    found = [(row, fault) for row in rows for fault in violations(row, TARGETS[row.target].shared_limit)]
    if options.write_table:
        write_table(triton.__version__, rows)
    else:
        table = read_table()
        column = table.get(triton.__version__, {})
        for row in rows:
            kept = column.get(row.target, {}).get(row.operation, {}).get(row.name)
            found += [(row, fault) for fault in regressions(row, kept)]
        faults += stale(table, triton.__version__, rows, [target.name for target in targets], calls)
    faults += _lines(found)
    spent: Counter[str] = Counter()
    for row in rows:
        spent.update(row.measured.seconds)
    wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = used.ru_utime + used.ru_stime
    print(f"triton {triton.__version__}: {len(rows)} kernels in {wall:.0f} s with {options.jobs} processes,", end=" ")
    print(f"{processors:.0f} s of processors:", ", ".join(f"{stage} {spent[stage]:.0f}" for stage in spent))
    if options.json is not None:
        report = {
            "seconds": wall,
            "processor_seconds": processors,
            "stages": spent,
            "faults": faults,
            "rows": [asdict(row) for row in rows],
        }
        write_json_atomic(options.json, {triton.__version__: report})
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"triton {triton.__version__}: {len(faults)} faults" if faults else f"triton {triton.__version__}: passed")
    return 1 if faults else 0


def compile_all(
    calls: Mapping[str, Sequence[Call]], targets: Sequence[Target], jobs: int
) -> tuple[list[Row], list[str]]:
    """Compile what the calls launch on each target, each different kernel once.

    Returns:
        A row for each kernel, named after the first call that launches it, and a line for each call that failed.
    """
    from aot_measure import read_instructions

    found, faults = _record_all(calls, targets)
    _LAUNCHES[:] = [(launch, target) for target, _, _, launch in found]
    results = _compile_forked(jobs)
    for target in targets:
        if target.triton.backend == "cuda":
            mine = [result for (_, owner), result in zip(_LAUNCHES, results, strict=True) if owner is target]
            read_instructions([measured for measured, _ in mine], [code for _, code in mine], target)
    rows = [
        Row(target.name, operation, name, launch.tile, measured)
        for (target, operation, name, launch), (measured, _) in zip(found, results, strict=True)
    ]
    return rows, faults


def _record_all(
    calls: Mapping[str, Sequence[Call]], targets: Sequence[Target]
) -> tuple[list[tuple[Target, str, str, Launch]], list[str]]:
    """Every different launch with its target, operation and name, and a line for each call that failed."""
    from aot_capture import record

    found: list[tuple[Target, str, str, Launch]] = []
    faults: list[str] = []
    for target in targets:
        seen: set[str] = set()
        for operation, listed in calls.items():
            names: Counter[str] = Counter()
            for call in listed:
                if call.targets is not None and target.name not in call.targets:
                    continue
                if target.calls is not None and call.name not in target.calls:
                    continue
                try:
                    launches = record(target, call.run)
                except Exception as error:  # a launcher may raise anything; the gate goes on and tells
                    faults.append(f"{target.name} {operation} {call.name}: {type(error).__name__}: {error}")
                    continue
                if not launches:
                    faults.append(f"{target.name} {operation} {call.name}: expected a kernel to be launched, got none")
                for launch in launches:
                    if launch.key not in seen:
                        seen.add(launch.key)
                        name = f"{call.name} {launch.function.__name__}"
                        names[name] += 1
                        number = f" {names[name]}" if names[name] > 1 else ""
                        found.append((target, operation, name + number, launch))
    return found, faults


def _compile_forked(jobs: int) -> list[tuple[Measured, bytes]]:
    """What each of `_LAUNCHES` gives, compiled in forked processes, since a compiler may take its process with it."""
    context = multiprocessing.get_context("fork")
    results: dict[int, tuple[Measured, bytes]] = {}
    with ProcessPoolExecutor(jobs, context) as pool:
        futures = {pool.submit(_compile, number): number for number in range(len(_LAUNCHES))}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                results[futures[future]] = future.result()
    for number in range(len(_LAUNCHES)):
        if number not in results:  # it crashed, or it waited when another one did
            with ProcessPoolExecutor(1, context) as pool:
                try:
                    results[number] = pool.submit(_compile, number).result()
                except BrokenProcessPool:
                    results[number] = Measured(error="a crash of the compiler"), b""
    return [results[number] for number in range(len(_LAUNCHES))]


def _compile(number: int) -> tuple[Measured, bytes]:
    from aot_measure import compile_launch

    return compile_launch(*_LAUNCHES[number])


def _lines(found: list[tuple[Row, str]]) -> list[str]:
    """A line for each fault; one that several kernels of an operation have is told once, with the first few of them."""
    titles: dict[tuple[str, str], list[str]] = {}
    for row, fault in found:
        titles.setdefault((row.operation, fault), []).append(_title(row))
    rest = {key: [f"{len(named) - 4} more"] if len(named) > 4 else [] for key, named in titles.items()}
    return [f"{'; '.join(named[:4] + rest[key])}: {key[1]}" for key, named in titles.items()]


def _title(row: Row) -> str:
    return f"{row.target} {row.operation} {row.name}"


def _print_rows(rows: list[Row]) -> None:
    width = max((len(_title(row)) for row in rows), default=0)
    print(f"{'':{width}}  registers stack spills shared  seconds  tensor cores; tile")
    for row in rows:
        m = row.measured
        figures = f"{m.registers:9} {m.stack:5} {m.spills:6} {m.shared:6}  {sum(m.seconds.values()):7.1f}"
        kinds = " ".join(f"{count} {kind}" for kind, count in m.tensor_core.items()) or "-"
        print(f"{_title(row):{width}}  {figures}  {m.error or kinds}; {row.tile}")


def _other_releases(options: argparse.Namespace) -> int:
    """Run this script once with each Triton release, and put their reports together."""
    reports: dict[str, Any] = {}
    status = 0
    for release in options.triton:
        with tempfile.TemporaryDirectory() as folder:
            path = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
            if release == importlib.metadata.version("triton"):
                path = path[1:]
            else:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
                subprocess.run([*pip, "--target", folder, f"triton=={release}"], check=True)
            report = Path(folder) / "report.json"
            command = [sys.executable, __file__, "--jobs", str(options.jobs), "--json", str(report)]
            command += ["--targets", ",".join(options.targets)] if options.targets else []
            command += ["--only", ",".join(options.only)] if options.only else []
            command += ["--write-table"] if options.write_table else []
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)})
            if done.returncode == 2:  # it has said what is wrong with the arguments
                return 2
            if not report.is_file():
                raise RuntimeError(f"expected the gate to run with triton {release}, got status {done.returncode}")
            status |= done.returncode
            found = json.loads(report.read_text())
            if list(found) != [release]:
                raise RuntimeError(f"expected triton {release}, got {list(found)}")
            reports |= found
    if options.json is not None:
        write_json_atomic(options.json, reports)
    return status


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=names, metavar="NAMES", help="sm_80, sm_90, ..., default: all")
    parser.add_argument("--only", type=names, metavar="NAMES", help="operations, default: all")
    parser.add_argument("--triton", type=names, metavar="RELEASES", help="default: the one that is installed")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured here")
    parser.add_argument("--write-table", action="store_true", help="keep what was measured as the new table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
