"""What benchmarks/gpu_suite.sh writes down: whether there is a GPU, and `summary.json`, stage by stage.

    gpu_report.py check DIR                  notes the machine; exit 2 and one line where it has no CUDA device
    gpu_report.py status DIR STAGE           prints a stage's status in DIR/summary.json, or "none"; also "none" where
                                             another revision, machine or release of torch or Triton had it
    gpu_report.py record DIR STAGE ...       adds a stage's result
    gpu_report.py finish DIR                 prints the summary; exit 1 if a stage failed, 3 if one was cut

Statuses: passed; failed; cut (out of time, and nothing seen to fail); skipped (a tool is missing, the notes say
which). Knows what stages left behind, not what they do.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"
SKIPPED = 77  # exit status of a stage whose tool is missing
OUT_OF_TIME = (124, 137)  # of `timeout`
_LONGEST_MESSAGE = 600
_TOLD_APART = ("git", "device", "driver", "python", "torch", "triton", "transformers")
"""What of the environment a stage must share to count as run."""


def check(folder: Path) -> int:
    """Imports torch, which costs seconds, as nothing else here does."""
    import torch

    if not torch.cuda.is_available():
        print(f"expected a CUDA device, torch {torch.__version__} finds none: nothing was run", file=sys.stderr)
        return 2
    from op_timing import environment, headline, package_version

    found = environment(torch.device("cuda")) | {"peft": package_version("peft")}
    print(headline(found))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, read(folder) | {"environment": found})
    return 0


def status(folder: Path, stage: str) -> str:
    summary = read(folder)
    found = summary["stages"].get(stage)
    return "none" if found is None or found.get("ran_on") != ran_on(summary) else str(found["status"])


def ran_on(summary: dict[str, Any]) -> dict[str, Any]:
    environment = summary.get("environment", {})
    return {name: environment.get(name) for name in _TOLD_APART}


def read(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stages": {}}


def write(folder: Path, summary: dict[str, Any]) -> None:
    half_written = folder / f".{SUMMARY}"
    half_written.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    half_written.replace(folder / SUMMARY)


def tests_of(junit: Path) -> dict[str, Any]:
    """Counts and what failed; of a run cut short what there is, possibly nothing."""
    if not junit.exists():
        return {"tests": 0, "failed": []}
    counts: Counter[str] = Counter()
    broken = []
    for case in ElementTree.parse(junit).iter("testcase"):
        fault = next((x for kind in ("failure", "error") for x in case.iter(kind)), None)
        kind = "failed" if fault is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if fault is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            broken.append({"test": name, "message": (fault.get("message") or "")[:_LONGEST_MESSAGE]})
    return {"tests": counts.total(), **{f"num_{kind}": n for kind, n in sorted(counts.items())}, "failed": broken}


def left_out_of(results: list[Path]) -> dict[str, list[str]]:
    """What each benchmark left out for want of time; a file that is missing says so."""
    found = {}
    for path in results:
        if not path.exists():
            found[path.name] = ["everything: it wrote no results"]
        elif left_out := json.loads(path.read_text(encoding="utf-8"))["left_out"]:
            found[path.name] = left_out
    return found


def status_of(exits: list[int], details: dict[str, Any]) -> str:
    """Of a stage whose commands ended so."""
    if details.get("failed") or any(code not in (0, SKIPPED, *OUT_OF_TIME) for code in exits):
        return "failed"
    if any(code in OUT_OF_TIME for code in exits):
        return "cut"
    return "skipped" if SKIPPED in exits else "passed"


def record(options: argparse.Namespace) -> int:
    details: dict[str, Any] = {}
    if options.junit is not None:
        details |= tests_of(options.junit)
    if options.results:
        details["left_out"] = left_out_of(options.results)
    if options.note:
        details["notes"] = options.note
    outcome = status_of(options.exit, details)
    summary = read(options.folder)
    figures = {"seconds": options.seconds, "budget_seconds": options.budget, "exits": options.exit}
    summary["stages"][options.stage] = {"status": outcome, **figures, **details, "ran_on": ran_on(summary)}
    write(options.folder, summary)
    print(f"{options.stage}: {outcome} after {options.seconds} s of {options.budget} s")
    return 0


def finish(folder: Path) -> int:
    stages = read(folder)["stages"]
    for name, stage in stages.items():
        counts = ", ".join(f"{key.removeprefix('num_')} {n}" for key, n in stage.items() if key.startswith("num_"))
        print(f"{name:12} {stage['status']:8} {stage['seconds']:4} s  {counts}".rstrip())
        for fault in stage.get("failed", []):
            print(f"    {fault['test']}")
        for path, left_out in stage.get("left_out", {}).items():
            print(f"    {path}: left out {len(left_out)}, the first {left_out[0]}")
        for note in stage.get("notes", []):
            print(f"    {note}")
    statuses = {stage["status"] for stage in stages.values()}
    return 1 if "failed" in statuses else 3 if "cut" in statuses else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("check", "status", "record", "finish"):
        sub = verbs.add_parser(verb)
        sub.add_argument("folder", type=Path)
        if verb in ("status", "record"):
            sub.add_argument("stage")
        if verb == "record":
            sub.add_argument("--exit", type=int, nargs="+", required=True, help="of the stage's commands")
            sub.add_argument("--seconds", type=int, required=True)
            sub.add_argument("--budget", type=int, required=True)
            sub.add_argument("--junit", type=Path)
            sub.add_argument("--results", type=Path, nargs="+", default=[], help="JSON of benchmarks")
            sub.add_argument("--note", action="append", default=[])
    options = parser.parse_args()
    if options.verb == "check":
        return check(options.folder)
    if options.verb == "status":
        print(status(options.folder, options.stage))
        return 0
    return record(options) if options.verb == "record" else finish(options.folder)


if __name__ == "__main__":
    raise SystemExit(main())
