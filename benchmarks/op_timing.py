"""What the benchmarks of single operations share: interleaved timing, peak memory, measured limits, one table.

Nothing here knows an operation. `side by side` means: every repeat runs each contender once, so that whatever else
the machine does falls on all of them, and the median is reported.

On a CPU a call is timed by the clock and finds caches as the contender before it left them. On CUDA it is timed by
events on the device, with the L2 cache flushed before every call; what the host cannot launch in time counts. `--graph`
adds the time of a short call among several captured in one CUDA graph: no launch overhead, but the L2 cache is NOT
flushed between them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib.metadata
import io
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import ptengine
from ptengine.files import write_atomic, write_json_atomic

Contender = Callable[[], Any]
Case = Any  # each benchmark has its own
Row = dict[str, Any]

_FLUSH_BYTES = 2**28  # several times the largest L2 cache
_GRAPH_CALLS = 10
_GRAPH_REPLAYS = 6
_GRAPH_LONGEST = 1e-3  # seconds: above, launching no longer shows
_TIMING = {
    "cpu": "CPU paths; wall clock",
    "cuda": "CUDA events, L2 flushed before every call; graph: calls captured in one CUDA graph, L2 not flushed",
}


class Refused(Exception):
    """A contender that cannot take a case, and why."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of each contender: median and the quantiles 0.2 and 0.8, after one run that is not counted."""
    samples = _event_samples if device.type == "cuda" else clock_samples
    return {name: _quantiles(values) for name, values in samples(contenders, repeats, device).items()}


def clock_samples(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every repeat of each contender in turn, by the clock, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _event_samples(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, list[float]]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()  # also gives the host time to launch what follows
            start.record()
            contender()
            end.record()
            if repeat > 0:
                events[name].append((start, end))
        synchronize(device)
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def graph_seconds(contender: Contender, device: torch.device) -> float:
    """Median seconds of one call among `_GRAPH_CALLS` captured in one CUDA graph; nothing flushes the L2 cache.

    The contender must have run before on the current stream, which must not be the default one.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        for _ in range(_GRAPH_CALLS):
            contender()
    events = []
    for _ in range(_GRAPH_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events[1:]) / _GRAPH_CALLS


def peak_bytes(contender: Contender, device: torch.device) -> int | None:
    """The most memory one run holds above what was held before it; None where the platform cannot tell.

    On CUDA what PyTorch allocated; on Linux the resident set, workspaces of the matrix library included.
    """
    contender()  # what is allocated once and kept is not counted
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender()
        return torch.cuda.max_memory_allocated(device) - before
    return resident_peak(contender) if platform.system() == "Linux" else None


def resident_peak(contender: Contender) -> int:
    """Peak resident memory during one run above what is resident before it, in bytes (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_bytes("VmRSS")
    contender()
    return _status_bytes("VmHWM") - before


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of a few."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    best = _best_seconds(lambda: torch.mm(left, right), device)
    return 2 * size**3 / best


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy much larger than any cache; the best of a few."""
    source = torch.randn(2**30 // 4 if device.type == "cuda" else 2**27 // 4, device=device)
    target = torch.empty_like(source)
    best = _best_seconds(lambda: target.copy_(source), device)
    return 2 * source.numel() * 4 / best


def environment(device: torch.device) -> dict[str, Any]:
    """Where the figures come from. A checkout without .git takes its revision from PTENGINE_REVISION."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    found = {
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ptengine": ptengine.__version__,
        "git": _git_revision(),
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        found |= {
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "triton": package_version("triton"),
            "transformers": package_version("transformers"),
        }
    return found


def arguments(
    description: str, repeats: int, extend: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """--json, --csv, --png, --repeats, --seconds, --graph, --threads, --device, --dtype: the same for every operation.

    `extend` may add a benchmark's own.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the rows here (needs matplotlib)")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs per contender (default %(default)s)")
    parser.add_argument("--seconds", type=float, help="start no case that would end later; says what it left out")
    parser.add_argument("--graph", action="store_true", help="on CUDA: short calls in a CUDA graph too")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA, float32 on a CPU"
    )
    if extend is not None:
        extend(parser)
    options = parser.parse_args()
    options.started = time.monotonic()
    if options.repeats < 2:
        parser.error(f"expected --repeats of at least 2, got {options.repeats}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"expected a CUDA device for --device {options.device}, got none")
    if options.graph and device.type != "cuda":
        parser.error(f"expected --device cuda with --graph, got {options.device}")
    if options.dtype is None:
        options.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def compare(
    options: argparse.Namespace,
    cases: Iterable[Case],
    contenders: Iterable[str],
    peer: str | Sequence[str],
    prepare: Callable[[Case, str], Contender],
    limit_seconds: Callable[[Case], float],
    *,
    describe: Callable[[Case], Row] | None = None,
    draw: Callable[[Path, Sequence[Row], str], None] | None = None,
) -> None:
    """Measure every contender on every case and report them; exits with 1 if one of ptengine's failed.

    Args:
        options: of `arguments`.
        cases: each with a `name`, the most telling first: `--seconds` may leave the last ones out.
        contenders: names; ratios are against the fastest of `peer` that runs. Those of ptengine begin with its name.
        prepare: one run of a contender on a case; raises `Refused` where there is none. Whatever else it or the run
            raises is recorded as well.
        limit_seconds: the shortest time the machine's measured rates allow a case.
        describe: more columns of a case's rows; from `flops` among them TFLOP/s are derived.
        draw: the picture for `--png`; bars of all cases if not given.
    """
    device = torch.device(options.device)
    peers = [peer] if isinstance(peer, str) else list(peer)
    cases, names, rows, left_out = list(cases), list(contenders), [], []
    durations: list[float] = []
    # A stream of its own: what is captured in a graph must have run on the stream that is captured.
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
    with stream:
        for position, case in enumerate(cases):
            begun = time.monotonic()
            expected = statistics.median(durations) if durations else 0.0
            if options.seconds is not None and begun - options.started + expected > options.seconds:
                left_out = [case.name for case in cases[position:]]
                break
            found = _measure(options, case, names, peers, prepare, device)
            limit, more = limit_seconds(case), describe(case) if describe else {}
            rows += [_with_limit(row | more, limit) for row in found]
            durations.append(time.monotonic() - begun)
            write(options, rows, left_out)
    report(options, rows, left_out)
    if options.png is not None:
        _draw(options, rows, draw)
    broken = [row for row in rows if "error" in row and row["contender"].startswith("ptengine")]
    if broken:
        raise SystemExit(f"expected ptengine to run every case, got {len(broken)} that failed")


def _measure(
    options: argparse.Namespace,
    case: Case,
    names: Sequence[str],
    peers: Sequence[str],
    prepare: Callable[[Case, str], Contender],
    device: torch.device,
) -> list[Row]:
    """The rows of one case, one for each contender, in their order."""
    runs: dict[str, Contender] = {}
    rows: dict[str, Row] = {name: {"case": case.name, "contender": name} for name in names}
    for name in names:
        try:
            run = prepare(case, name)
            run()
            synchronize(device)
        except Refused as refusal:
            rows[name]["refused"] = str(refusal)
        except Exception as error:
            rows[name]["error"] = first_line(error)
        else:
            runs[name] = run
    if runs:
        timings = interleaved(runs, options.repeats, device)
        theirs = [timings[name]["median_s"] for name in peers if name in timings]
        for name, run in runs.items():
            ratio = min(theirs) / timings[name]["median_s"] if theirs else None
            rows[name] |= {**timings[name], "peer_over_this": ratio, "peak_bytes": peak_bytes(run, device)}
            if options.graph and timings[name]["median_s"] < _GRAPH_LONGEST:
                rows[name] |= _graph_columns(run, device)
    return list(rows.values())


def _graph_columns(run: Contender, device: torch.device) -> Row:
    try:
        return {"graph_s": graph_seconds(run, device)}
    except Exception as error:  # stock operations may wait for the device, which no graph allows
        synchronize(device)
        return {"graph_error": first_line(error)}


def _with_limit(row: Row, limit: float) -> Row:
    row = row | {"limit_s": limit}
    if "median_s" in row:
        row["percent_of_limit"] = 100 * limit / row["median_s"]
        if "flops" in row:
            row["tflops"] = row["flops"] / row["median_s"] / 1e12
    if "graph_s" in row:
        row["graph_percent_of_limit"] = 100 * limit / row["graph_s"]
    return row


def report(options: argparse.Namespace, rows: Sequence[Row], left_out: Sequence[str] = ()) -> None:
    """Print the rows as a table and what was left out; write what `arguments` were asked to write."""
    device = torch.device(options.device)
    print(f"{headline(environment(device))}; {options.dtype}")
    print(_TIMING[device.type])
    header = ["case", "contender", "median ms", "20-80 %", "peer / this", "% of limit", "peak MiB"]
    header += ["graph ms"] if options.graph else []
    table = [header]
    for row in rows:
        if "median_s" not in row:
            reason = row.get("refused") or row.get("error") or ""
            table.append([row["case"], row["contender"], *[""] * (len(header) - 3), reason[:70]])
            continue
        ratio, memory, graph = row["peer_over_this"], row["peak_bytes"], row.get("graph_s")
        line = [
            row["case"],
            row["contender"],
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['q20_s'] * 1e3:.3f}-{row['q80_s'] * 1e3:.3f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row['percent_of_limit']:.0f}",
            "-" if memory is None else f"{memory / 2**20:.1f}",
        ]
        table.append(line + ([("-" if graph is None else f"{graph * 1e3:.3f}")] if options.graph else []))
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if left_out:
        print(f"left out for want of time ({options.seconds:.0f} s): {len(left_out)} cases, {', '.join(left_out)}")
    write(options, rows, left_out)


def write(options: argparse.Namespace, rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """The JSON and CSV files that were asked for; called after every case, so that a run cut short leaves them."""
    device = torch.device(options.device)
    if options.json is not None:
        document = {
            "environment": environment(device),
            "dtype": options.dtype,
            "timing": _TIMING[device.type],
            "left_out": list(left_out),
            "rows": list(rows),
        }
        write_json_atomic(options.json, document)
    if options.csv is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(options.csv, text.getvalue().encode())


def headline(found: dict[str, Any]) -> str:
    """One line for people of `environment`."""
    parts = [found["device"], f"torch {found['torch']}"]
    parts += [f"{name} {found[name]}" for name in ("driver", "triton") if found.get(name)]
    return "; ".join([*parts, f"git {found['git']}", f"load {found['load_average']:.1f}"])


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _draw(
    options: argparse.Namespace, rows: Sequence[Row], draw: Callable[[Path, Sequence[Row], str], None] | None
) -> None:
    import bench_plots  # not needed, nor matplotlib, where nothing is drawn

    title = f"{headline(environment(torch.device(options.device)))}; {options.dtype}"
    (draw or bench_plots.bars)(options.png, rows, title)


def _quantiles(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median_s": statistics.median(values), "q20_s": fifths[0], "q80_s": fifths[-1]}


def _best_seconds(contender: Contender, device: torch.device, repeats: int = 5) -> float:
    samples = _event_samples if device.type == "cuda" else clock_samples
    return min(samples({"": contender}, repeats, device)[""])


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected a line {field} in /proc/self/status, got none")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache
def _driver_version() -> str | None:
    return _first_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


@lru_cache
def _git_revision() -> str:
    given = os.environ.get("PTENGINE_REVISION")
    return given or _first_output(["git", "describe", "--always", "--dirty"]) or "unknown"


def _first_output(command: list[str]) -> str | None:
    """The first line a command prints, None where it fails or is not installed."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None
