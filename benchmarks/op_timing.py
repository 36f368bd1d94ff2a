"""What the benchmarks of single operations share: interleaved timing, peak memory, measured limits, one table.

Nothing here knows an operation. `side by side` means: every repeat runs each contender once, so that whatever else
the machine does falls on all of them, and the median is reported.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ptengine.files import write_json_atomic

Contender = Callable[[], Any]
Case = Any  # each benchmark has its own


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of each contender: median and the quantiles 0.2 and 0.8, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            contender()
            synchronize(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, values in seconds.items():
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        result[name] = {"median_s": statistics.median(values), "q20_s": fifths[0], "q80_s": fifths[-1]}
    return result


def peak_bytes(contender: Contender, device: torch.device) -> int | None:
    """The most memory one run holds above what was held before it; None where the platform cannot tell.

    On CUDA what PyTorch allocated; on Linux the resident set, workspaces of the matrix library included.
    """
    contender()  # what is allocated once and kept is not counted
    gc.collect()
    if device.type == "cuda":
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
    source = torch.randn(2**28 // 4 if device.type == "cuda" else 2**27 // 4, device=device)
    target = torch.empty_like(source)
    best = _best_seconds(lambda: target.copy_(source), device)
    return 2 * source.numel() * 4 / best


def environment(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ptengine": importlib.metadata.version("ptengine"),
        "git": _git_revision(),
        "load_average": os.getloadavg()[0],
    }


def arguments(description: str, repeats: int) -> argparse.Namespace:
    """--json, --repeats, --threads, --device, --dtype: the same for every operation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs per contender (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"expected --repeats of at least 2, got {options.repeats}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def compare(
    options: argparse.Namespace,
    cases: Iterable[Case],
    contenders: Iterable[str],
    peer: str,
    prepare: Callable[[Case, str], Contender],
    limit_seconds: Callable[[Case], float],
) -> None:
    """Measure every contender on every case and report them.

    Args:
        options: of `arguments`.
        cases: each with a `name`.
        contenders: names; `peer` is the one that ratios are against.
        prepare: one run of a contender on a case.
        limit_seconds: the shortest time the machine's measured rates allow a case.
    """
    device = torch.device(options.device)
    rows = []
    for case in cases:
        runs = {name: prepare(case, name) for name in contenders}
        timings = interleaved(runs, options.repeats, device)
        for name, run in runs.items():
            rows.append(
                {
                    "case": case.name,
                    "contender": name,
                    **timings[name],
                    "peer_over_this": timings[peer]["median_s"] / timings[name]["median_s"],
                    "limit_s": limit_seconds(case),
                    "peak_bytes": peak_bytes(run, device),
                }
            )
    report(options, rows)


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table; with --json write them too."""
    found = environment(torch.device(options.device))
    print(f"{found['device']}; torch {found['torch']}; load {found['load_average']:.1f}; {options.dtype}")
    header = ["case", "contender", "median ms", "20-80 %", "peer / this", "% of limit", "peak MiB"]
    table = [header]
    for row in rows:
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        spread = f"{row['q20_s'] * 1e3:.2f}-{row['q80_s'] * 1e3:.2f}"
        table.append(
            [
                row["case"],
                row["contender"],
                f"{row['median_s'] * 1e3:.2f}",
                spread,
                f"{row['peer_over_this']:.2f}",
                f"{100 * row['limit_s'] / row['median_s']:.0f}",
                memory,
            ]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if options.json is not None:
        write_json_atomic(options.json, {"environment": found, "dtype": options.dtype, "rows": list(rows)})


def _best_seconds(contender: Contender, device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        contender()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected a line {field} in /proc/self/status, got none")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _git_revision() -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
