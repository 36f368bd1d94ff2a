"""The GPU script and its benchmarks, as far as a machine without a GPU can tell.

The script runs here against an interpreter that stands in for Python: it says that there is a GPU, and pretends to run
tests and benchmarks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import bench_end_to_end
import bench_linear_cross_entropy
import bench_plots
import bench_prefix_attention
import gpu_report
import op_timing
import pytest
import torch

from ptengine.files import make_directory

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STAGES = ["tests", "determinism", "sanitizer", "kernels", "end_to_end"]
CPU = torch.device("cpu")

# What the stand-in does for each script it is given. `$LOG` lists what it was asked to run.
STAND_IN = r"""#!/usr/bin/env bash
set -eu
script=${1##*/}
if [[ $script == gpu_report.py ]]; then
    if [[ $2 != check ]]; then exec "$REAL" "$@"; fi
    mkdir -p "$3"
    exit 0
fi
if [[ $1 == -c ]]; then exit 1; fi
[[ $1 != -m ]] || script=pytest
echo "$script $* caching=${PYTORCH_NO_CUDA_MEMORY_CACHING:-} path=$PYTHONPATH" >>"$LOG"
while (($#)); do
    case $1 in
        --json) echo "{\"left_out\": [${LEFT_OUT:-}]}" >"$2" ;;
        --png | --csv) echo picture >"$2" ;;
        --junit-xml=*) echo "$JUNIT" >"${1#*=}" ;;
    esac
    shift
done
if [[ " ${SLOW:-} " == *" $script "* ]]; then sleep 60; fi
if [[ " ${BROKEN:-} " == *" $script "* ]]; then exit 1; fi
"""
JUNIT = '<testsuites><testsuite><testcase classname="a" name="b"/>{}</testsuite></testsuites>'
SANITIZER = '#!/usr/bin/env bash\necho "sanitizer $*" >>"$LOG"\necho "${SAYS:-}"\nshift 4\nexec "$@"\n'


class Suite:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "log"
        (folder / "bin").mkdir()
        self.script("python", STAND_IN)

    def script(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHON": str(self.folder / "bin" / "python"),
            "REAL": sys.executable, "LOG": str(self.log), "JUNIT": JUNIT.format(""), "OUT": str(self.out),
        }  # fmt: skip
        command = ["bash", str(BENCHMARKS / "gpu_suite.sh"), *arguments]
        return subprocess.run(
            command, env=environment | variables, cwd=self.folder, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def stages(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.out / "summary.json").read_text())["stages"]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_every_stage_runs_and_is_not_run_again(suite: Suite) -> None:
    suite.script("compute-sanitizer", SANITIZER)
    done = suite.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: stage["status"] for name, stage in suite.stages().items()} == dict.fromkeys(STAGES, "passed")
    asked = "\n".join(suite.asked())
    for name in (
        "-k not (bitwise or same_bits) ", "-k bitwise or same_bits ", "bench_prefix_attention.py",
        "bench_linear_cross_entropy.py", "bench_prefix_concat.py", "bench_end_to_end.py", "--tool memcheck",
        "--tool racecheck",
    ):  # fmt: skip
        assert name in asked
    # At most eight files come back from the machine this is written for.
    assert len(list(suite.out.rglob("*"))) == 8
    with tarfile.open(suite.out / "details.tar.gz") as details:
        assert {"./tests.xml", "./tests.log", "./prefix_concat.png"} <= set(details.getnames())

    done = suite.run()
    assert done.returncode == 0
    assert suite.asked() == []
    assert done.stdout.count("passed before") == len(STAGES)
    with tarfile.open(suite.out / "details.tar.gz") as details:
        assert "./tests.xml" in details.getnames()


def test_named_stages_run_alone_and_again(suite: Suite) -> None:
    for _ in range(2):
        done = suite.run("--only", "end_to_end,determinism", "--out", "elsewhere")
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line.split()[0] for line in suite.asked()] == ["pytest", "bench_end_to_end.py"]
    suite.out = suite.folder / "elsewhere"
    assert set(suite.stages()) == {"determinism", "end_to_end"}
    # Alone they get the time of the stages that are left out.
    assert suite.stages()["end_to_end"]["budget_seconds"] > 300


def test_what_failed_fails_the_suite_and_is_run_again(suite: Suite) -> None:
    fault = '<testcase classname="tests.x" name="t"><failure message="1 is not 2">trace</failure></testcase>'
    done = suite.run("--only", "tests,kernels", JUNIT=JUNIT.format(fault), BROKEN="pytest bench_prefix_concat.py")
    assert done.returncode == 1
    tests = suite.stages()["tests"]
    assert tests["status"] == "failed"
    assert tests["failed"] == [{"test": "tests.x::t", "message": "1 is not 2"}]
    assert (tests["num_passed"], tests["num_failed"]) == (1, 1)
    assert suite.stages()["kernels"]["status"] == "failed"
    assert "tests.x::t" in done.stdout
    done = suite.run()
    assert done.returncode == 0, done.stdout
    assert {line.split()[0] for line in suite.asked()} >= {"pytest", "bench_prefix_concat.py"}


def test_a_failed_test_fails_the_stage_even_if_time_ran_out() -> None:
    assert gpu_report.status_of([124], {"failed": [{"test": "t"}]}) == "failed"
    assert gpu_report.status_of([124], {"failed": []}) == "cut"
    assert gpu_report.status_of([0, 77], {}) == "skipped"
    assert gpu_report.status_of([0, 77, 99], {}) == "failed"


def test_what_another_revision_had_run_counted_as_run(suite: Suite) -> None:
    """Its figures stood beside the new revision's name."""
    for environment, asked in (({"git": "old"}, True), ({"git": "old", "load_average": 1.0}, False), ({}, True)):
        summary = json.loads((suite.out / "summary.json").read_text()) if suite.out.exists() else {"stages": {}}
        gpu_report.write(make_directory(suite.out), summary | {"environment": environment})
        assert suite.run().returncode == 0
        assert bool(suite.asked()) == asked


def test_out_of_time_is_said(suite: Suite) -> None:
    done = suite.run("--only", "determinism,end_to_end", "--minutes", "1", SLOW="pytest")
    assert done.returncode == 3, done.stdout + done.stderr
    assert suite.stages()["determinism"]["status"] == "cut"
    assert suite.stages()["end_to_end"]["status"] == "passed"
    done = suite.run("--only", "kernels", LEFT_OUT='"a case", "another"')
    assert suite.stages()["kernels"]["left_out"]["prefix_concat.json"] == ["a case", "another"]
    assert "left out 2, the first a case" in done.stdout


@pytest.mark.parametrize("says", [None, "Error: Device not supported. Please refer to the documentation"])
def test_a_sanitizer_that_cannot_run_is_skipped_and_said(suite: Suite, says: str | None) -> None:
    if says is not None:
        suite.script("compute-sanitizer", SANITIZER)
    done = suite.run("--only", "sanitizer", SAYS=says or "", BROKEN="sanitize_case.py" if says is None else "")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = suite.stages()["sanitizer"]
    assert stage["status"] == "skipped"
    assert ("not on PATH" if says is None else "does not support this device") in done.stdout
    assert all("caching=1" in line for line in suite.asked()[2::2])


def test_refuses_bad_usage_before_any_work(suite: Suite) -> None:
    for arguments in (["--only", "nothing"], ["--minutes", "0"], ["--what", "x"], ["--out"]):
        done = suite.run(*arguments)
        assert done.returncode == 2
        assert "expected" in done.stderr
    assert not suite.out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refuses_to_run_without_cuda(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_suite.sh")], env=environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_checkout_runs_where_it_is_not_installed(tmp_path: Path) -> None:
    """And where the data packages are missing: neither kernels nor benchmarks need them."""
    code = """
import sys
for name in ("datasets", "rouge_score", "rich", "tensorboard", "pytest_benchmark"):
    sys.modules[name] = None
import ptengine, bench_end_to_end, bench_prefix_attention, bench_linear_cross_entropy, bench_prefix_concat
from ptengine.kernels.prefix_attention import prefix_attention
import sanitize_case
assert not any("editable" in str(finder) for finder in sys.meta_path)
print(ptengine.__file__)
"""
    root = BENCHMARKS.parent
    packages = {str(Path(module.__file__).parents[1]) for module in (torch, pytest) if module.__file__}
    path = os.pathsep.join([str(root), str(BENCHMARKS), *packages])
    # -S: no .pth file is read, so that no editable installation is found.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(root)


def test_all_repeated_tests_are_in_the_determinism_stage() -> None:
    kernels = BENCHMARKS.parent / "tests" / "kernels"
    script = (BENCHMARKS / "gpu_suite.sh").read_text()
    files = [path for path in sorted(kernels.glob("test_*.py")) if '"triton"' in path.read_text()]
    repeated = 0
    for path in files:
        text = path.read_text()
        for function in re.findall(r"^def test_.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL):
            if re.search(r"range\(.*\b250\b", function):
                repeated += 1
                assert f"tests/kernels/{path.name}" in script, f"{path.name} repeats but is not in gpu_suite.sh"
                assert re.match(r"def test_\w*(bitwise|same_bits)", function), function.split("(")[0]
    assert repeated >= 4


# ------------------------------------------------------------------------------------------ the benchmarks


def options(tmp_path: Path, **changes: object) -> argparse.Namespace:
    given = {
        "device": "cpu", "dtype": "float32", "repeats": 2, "seconds": None, "graph": False, "started": 0.0,
        "json": tmp_path / "rows.json", "csv": tmp_path / "rows.csv", "png": tmp_path / "rows.png",
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


def test_a_contender_that_refuses_or_fails_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"slow": 4.0, "fast": 2.0, "ptengine": 1.0}

    def interleaved(runs: dict[str, op_timing.Contender], *_: object) -> dict[str, dict[str, float]]:
        return {name: {"median_s": seconds[name], "q20_s": 1.0, "q80_s": 1.0} for name in runs}

    monkeypatch.setattr(op_timing, "interleaved", interleaved)

    def prepare(case: SimpleNamespace, name: str) -> op_timing.Contender:
        if name == "picky":
            raise op_timing.Refused("no such mask")
        if name == "broken":
            raise RuntimeError("out of memory\nmore")
        return list

    names = ["picky", "broken", "slow", "fast", "ptengine"]
    case = SimpleNamespace(name="one")
    op_timing.compare(
        options(tmp_path), [case], names, names[:4], prepare, lambda case: 0.5, describe=lambda case: {"flops": 4e12}
    )
    document = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["contender"]: row for row in document["rows"]}
    assert rows["picky"]["refused"] == "no such mask"
    assert rows["broken"]["error"] == "RuntimeError: out of memory"
    assert rows["fast"]["peer_over_this"] == 1.0  # against the fastest peer that ran
    assert rows["ptengine"]["peer_over_this"] == 2.0
    assert rows["slow"]["percent_of_limit"] == 12.5
    assert rows["slow"]["tflops"] == 1.0
    assert "CPU paths" in document["timing"]
    assert (tmp_path / "rows.csv").read_text().count("\n") == 6
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert "no such mask" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1 that failed"):
        op_timing.compare(
            options(tmp_path), [case], ["fast", "ptengine x"], "fast",
            lambda case, name: prepare(case, "fast" if name == "fast" else "broken"), lambda case: 1e-9,
        )  # fmt: skip


class FakeEvent:
    """Of a device whose clock ticks whenever something is recorded on it."""

    journal: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.journal.append("event")
        self.at = len(self.journal)

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(FakeEvent, "journal", found, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return found


def test_the_cache_is_flushed_before_every_call_on_cuda(journal: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flush = SimpleNamespace(zero_=lambda: journal.append("flush"))
    monkeypatch.setattr(op_timing.torch, "empty", lambda size, dtype, device: flush)
    contenders: dict[str, op_timing.Contender] = {name: partial(journal.append, name) for name in ("a", "b")}
    samples = op_timing._event_samples(contenders, 3, CPU)
    assert journal == ["flush", "event", "a", "event", "flush", "event", "b", "event"] * 4
    # The first run is not counted; the flush lies outside what is timed. Milliseconds become seconds.
    assert samples == {"a": [0.002] * 3, "b": [0.002] * 3}


def test_a_graph_holds_several_calls_and_nothing_else(journal: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[str] = []
    graph = SimpleNamespace(replay=lambda: journal.extend(captured))

    @contextlib.contextmanager
    def capture(given: object, stream: str) -> Iterator[None]:
        assert (given, stream) == (graph, "the current one")
        before = list(journal)
        yield
        captured.extend(journal[len(before) :])

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    seconds = op_timing.graph_seconds(lambda: journal.append("call"), CPU)
    assert set(captured) == {"call"}
    assert seconds == pytest.approx((len(captured) + 1) / len(captured) / 1e3)


def test_a_call_that_no_graph_allows_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_timing, "graph_seconds", Mock(side_effect=RuntimeError("stream is capturing")))
    assert op_timing._graph_columns(list, CPU) == {"graph_error": "RuntimeError: stream is capturing"}


def test_a_sweep_stops_in_time_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(op_timing.time, "monotonic", lambda: next(clock))
    cases = [SimpleNamespace(name=f"case {i}") for i in range(9)]
    given = options(tmp_path, seconds=45.0, png=None)
    op_timing.compare(given, cases, ["ptengine"], "ptengine", lambda case, name: list, lambda case: 1.0)
    document = json.loads((tmp_path / "rows.json").read_text())
    done = [row["case"] for row in document["rows"]]
    assert 1 <= len(done) < 9
    assert done + document["left_out"] == [case.name for case in cases]
    assert f"left out for want of time (45 s): {9 - len(done)} cases" in capsys.readouterr().out


PREFIX = [
    bench_prefix_attention.Case("T=9", (9, 9, 9), heads, kv_heads, 16, 5, phase)
    for heads, kv_heads in ((4, 2), (2, 2))
    for phase in ("forward", "forward+backward", "backward", "first layer")
]


@pytest.mark.parametrize("case", PREFIX, ids=lambda case: case.name)
def test_all_contenders_compute_the_same(case: bench_prefix_attention.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways that a CPU lacks refuse; all others agree, on the same operands, in the results that a loss reads."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, of_out = (
        torch.randn(3, 9, x, 16, generator=generator) for x in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    prefix = [torch.randn(5, case.kv_heads, 16, generator=generator) for _ in range(2)]
    own_q = torch.randn(5, case.heads, 16, generator=generator)
    results, refused = {}, []
    for name in bench_prefix_attention.CONTENDERS:
        try:
            given = bench_prefix_attention.operands(case, name, CPU, torch.float32)
        except bench_prefix_attention.Refused:
            refused.append(name)
            continue
        apart = list(zip((q, k, v), (own_q, *prefix), strict=True))
        if name == "ptengine rows":
            tensors = [torch.cat([p, x.flatten(0, 1)]) for x, p in apart]
            weights = torch.cat([torch.zeros_like(own_q), of_out.flatten(0, 1)])
        elif name == "ptengine packed":
            tensors, weights = [x.flatten(0, 1) for x in (q, k, v)] + prefix, of_out.flatten(0, 1)
        elif name.startswith("in every row"):
            tensors = [torch.cat([p.expand(3, -1, -1, -1), x], 1).transpose(1, 2) for x, p in apart]
            weights = torch.cat([torch.zeros(3, 5, *of_out.shape[2:]), of_out], 1).transpose(1, 2)
        else:
            tensors, weights = [x.transpose(1, 2) for x in (q, k, v)] + prefix, of_out.transpose(1, 2)
        assert [x.shape for x in tensors] == [x.shape for x in given.tensors]
        assert weights.shape == given.of_out.shape
        same = bench_prefix_attention.Operands(tensors, given.rows, weights, given.function)
        monkeypatch.setattr(bench_prefix_attention, "operands", Mock(return_value=same))
        try:
            found = bench_prefix_attention.prepare(case, name, CPU, torch.float32)()
        except (bench_prefix_attention.Refused, NotImplementedError):
            refused.append(name)
            continue
        finally:
            monkeypatch.undo()
        first = found if case.phase == "forward" else found[-1] if len(found) == 2 else found[0]
        if case.phase == "first layer":
            results[name] = first
            continue
        if name == "ptengine rows":
            first = first[5:]
        elif name.startswith("in every row"):
            first = first[:, :, 5:]
        results[name] = first.transpose(1, 2).flatten(0, 1) if first.dim() == 4 else first
    assert {"expand+cat+SDPA", "expand+cat eager", "expand+cat flash", "ptengine dense", "ptengine packed"} <= set(
        results
    )
    assert ("ptengine rows" in results) == (case.phase != "first layer")
    assert "expand+cat cuDNN" in refused
    exact = results["expand+cat eager"]
    for name, found in results.items():
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))


def test_the_sweep_is_whole_and_its_first_cases_tell_most() -> None:
    cases = bench_prefix_attention.sweep()
    assert len({case.name for case in cases}) == len(cases) == 3 * 5 * 8 * 3
    assert {case.virtual for case in cases} == {16, 64, 128, 256, 512}
    assert {max(case.lengths) for case in cases} == {32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert {sum(case.lengths) for case in cases} == {16384}
    for begin, phase in ((0, "forward+backward"), (120, "forward"), (240, "backward")):
        part = cases[begin : begin + 120]
        assert {case.phase for case in part} == {phase}
        assert [bench_prefix_attention.telling(case) for case in part] == [True] * 27 + [False] * 93
        assert {case.shape for case in part[:27]} == {"32/8/128", "12/12/64", "16/16/256"}


def test_where_a_case_is_not_telling_the_slow_ways_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prefix_attention, "operands", lambda *_: pytest.fail("expected no operands"))
    case = next(case for case in bench_prefix_attention.sweep() if not bench_prefix_attention.telling(case))
    with pytest.raises(op_timing.Refused, match="measured at P in"):
        bench_prefix_attention.prepare(case, "expand+cat eager", torch.device("cuda"), torch.bfloat16)


def test_the_limit_of_attention_counts_what_must_be_done() -> None:
    case = bench_prefix_attention.Case("", (10, 20), 4, 2, 8, 5, "forward")
    pairs = 30 * 5 + (100 + 400) / 2
    assert case.flops == 4 * 4 * 8 * pairs
    assert case.limit_seconds(1.0, 1e30, 2) == case.flops
    moved = 30 * (4 + 2 + 2 + 4) + 5 * (2 + 2)
    assert case.limit_seconds(1e30, 1.0, 2) == moved * 8 * 2


def test_plots_of_attention_are_drawn_from_part_of_a_sweep(tmp_path: Path) -> None:
    rows = [
        {"contender": name, "median_s": 1e-3, "tflops": 1.0, "percent_of_limit": 40.0, **case.describe()}
        for case in bench_prefix_attention.sweep()[:40]
        for name in ("expand+cat flash", "ptengine packed")
    ]
    refused = {"contender": "ptengine rows", "refused": "no", **PREFIX[0].describe()}
    for name, given in (("some", [*rows, refused]), ("none", [])):
        path = tmp_path / f"{name}.png"
        bench_prefix_attention.draw(path, given, "title")
        assert path.stat().st_size > 1000


def test_losses_of_all_heads_agree() -> None:
    case = bench_linear_cross_entropy.Case(7, 16, 40)
    found = [
        bench_linear_cross_entropy.prepare(case, function, "cpu", torch.float32)()[0]
        for function in bench_linear_cross_entropy.contenders(CPU).values()
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_both_sides_train_alike_over_shared_weights(tmp_path: Path) -> None:
    model = bench_end_to_end.make_model(bench_end_to_end.TINY, CPU, torch.float32)
    copied = bench_end_to_end.sharing_weights(model)
    for x, y in zip(model.state_dict().values(), copied.state_dict().values(), strict=True):
        assert x.data_ptr() == y.data_ptr()
    saved: list[dict[str, object]] = []
    result = bench_end_to_end.run(
        bench_end_to_end.TINY, bench_end_to_end.TINY, CPU, torch.float32, 2, None, saved.append
    )
    assert not bench_end_to_end.failed(result)
    assert result["left_out"] == []
    for losses in result["losses"].values():
        assert len(losses) == bench_end_to_end.LOSS_STEPS
        assert losses[-1] < losses[0]
    # Sums in another order; AdamW's steps stay far below the learning rate's power to spread them.
    assert result["loss_largest_difference"] < 1e-4
    assert {row["side"] for row in result["steps"] if row["tokens_per_second"] > 0} == set(bench_end_to_end.SIDES)
    assert len(result["prompts"]) == 2 * len(bench_end_to_end.PROMPTS)
    assert len(saved) > 5
    bench_plots.end_to_end(tmp_path / "p.png", result, "title")
    assert "of its memory" in "\n".join(bench_end_to_end.table(result))


def test_an_end_to_end_run_without_time_says_so() -> None:
    result = bench_end_to_end.run(bench_end_to_end.TINY, None, CPU, torch.float32, 2, 0.0, lambda result: None)
    assert len(result["left_out"]) == 2 * 2 + 2 + 2 * len(bench_end_to_end.PROMPTS) + 2
    assert "left out for want of time" in bench_end_to_end.table(result)[-1]


def test_an_error_of_one_side_is_a_result() -> None:
    out_of_memory = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    assert bench_end_to_end.measure(out_of_memory, 1, 1, CPU) == {"error": "OutOfMemoryError: CUDA out of memory"}
