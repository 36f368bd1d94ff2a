"""The ahead-of-time gate of benchmarks/compile_tiles.py: what it records, what it measures, and what it refuses.

Kernels cannot be compiled in this process, where Triton interprets, so toy kernels are compiled in one of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import aot_rules
import compile_tiles
import pytest
from aot_rules import Measured, Row, read_table, regressions, stale, violations, write_table
from aot_ttir import Dot

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# ----------------------------------------------------------------------------------------- what is allowed

LIMIT = 227 * 1024


def row(target="sm_90", tile="BLOCK=64", **measured):
    known = {"registers": 128, "shared": 4096, "tensor_core": {"HGMMA": 8}, "warps": 4}
    known["dots"] = [Dot(64, 64, 64, "bf16", "ieee")]
    return Row(target, "toy", "product", tile, Measured(**{**known, **measured}))


def test_a_sound_kernel_passes():
    assert violations(row(), LIMIT) == []
    assert regressions(row(), row().kept()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (row(stack=8), "expected no spills, got 8 bytes of stack, 0 loads and stores"),
        (row(spills=2), "expected no spills, got 0 bytes of stack, 2 loads and stores"),
        (row(shared=LIMIT + 1), f"expected at most {LIMIT} bytes of shared memory, got {LIMIT + 1}"),
        (row(narrow=["kernel.py:1: why"]), "kernel.py:1: why"),
        (row(error="OutOfResources: x"), "expected to compile, got OutOfResources: x"),
        (row(tensor_core={}), "expected HGMMA instructions for its dots, got none"),
        (row(tensor_core={"HMMA": 4}), "expected HGMMA instructions for its dots, got 4 HMMA"),
        (row("sm_80", tensor_core={}), "expected HMMA instructions for its dots, got none"),
        (row("sm_100", tensor_core={}), "expected UTCHMMA or HMMA instructions for its dots, got none"),
        (row("gfx942", tensor_core={}), "expected MFMA instructions for its dots, got none"),
    ],
)
def test_what_no_kernel_may_do_is_told(changed, said):
    assert violations(changed, LIMIT) == [said]


@pytest.mark.parametrize(
    "sound",
    [
        row(tensor_core={"HMMA": 4}, dots=[Dot(16, 64, 64, "bf16", "ieee")]),  # too few rows for wgmma
        row(tensor_core={"HMMA": 4}, warps=2),  # no warp group
        row(tensor_core={}, dots=[Dot(64, 64, 64, "f32", "ieee")]),  # exact products have no tensor cores
        row(tensor_core={}, dots=[]),
        row("gfx942", tensor_core={"MFMA": 4}, stack=16, spills=3),
        row("gfx942", error="too much shared memory"),
    ],
)
def test_what_cannot_be_had_is_not_asked_for(sound):
    assert violations(sound, LIMIT) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (row(registers=137), "expected at most 128 + 8 registers, got 137"),
        (row(shared=4097), "expected shared of at most 4096 as before, got 4097"),
        (row(stack=8), "expected stack of at most 0 as before, got 8"),
        (row(spills=1), "expected spills of at most 0 as before, got 1"),
        (row(tensor_core={}), "expected 8 HGMMA as before, got none"),
        (row(tensor_core={"HMMA": 64}), "expected 8 HGMMA as before, got 64 HMMA"),
        (row(tensor_core={"HGMMA": 4, "HMMA": 32}), "expected 8 HGMMA as before, got 4 HGMMA, 32 HMMA"),
        (row(error="ValueError: x"), "expected to compile as before, got ValueError: x"),
        (row(tile="BLOCK=128"), "expected the table's tile BLOCK=64, got BLOCK=128: --write-table"),
    ],
)
def test_what_is_worse_than_the_table_is_told(changed, said):
    assert regressions(changed, row().kept()) == [said]


def test_what_is_better_than_the_table_or_within_the_slack_passes():
    assert regressions(row(registers=136), row().kept()) == []
    assert regressions(row(registers=64, shared=0), row().kept()) == []
    assert regressions(row(tensor_core={"HGMMA": 8}), row(tensor_core={"HMMA": 64}).kept()) != []  # the table is old
    assert regressions(row("gfx942", error="a"), row("gfx942", error="b").kept()) == []
    assert regressions(row("gfx942"), row("gfx942", error="b").kept()) != []


def test_spills_that_are_in_the_table_may_differ_by_a_few_with_the_machine_that_compiles():
    """Regression: one AMD kernel has 964 spilled registers where one machine compiles it and 968 where another does."""
    kept = row("gfx942", stack=1168, spills=964).kept()
    assert regressions(row("gfx942", stack=1172, spills=968), kept) == []
    said = regressions(row("gfx942", stack=1168, spills=981), kept)
    assert said == ["expected spills of at most 964 + 16 as before, got 981"]


def test_a_row_without_a_table_and_a_table_without_a_row_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_rules, "TABLE", tmp_path / "resources.json")
    assert regressions(row(), None) == ["expected a row in the table, got none: --write-table"]
    other = row("sm_80")
    write_table("3.9.0", [row(), other])
    write_table("3.6.0", [row(registers=200)])
    table = read_table()
    assert table["3.9.0"]["sm_90"]["toy"]["product"] == row().kept()
    assert table["3.6.0"]["sm_90"]["toy"]["product"]["registers"] == 200
    assert stale(table, "3.9.0", [row(), other], ["sm_80", "sm_90"], ["toy"]) == []
    gone = stale(table, "3.9.0", [row()], ["sm_80", "sm_90"], ["toy"])
    assert gone == ["sm_80 toy product: expected a kernel for this row of the table, got none: --write-table"]
    assert stale(table, "3.9.0", [row()], ["sm_90"], ["toy"]) == []  # other targets were not looked at
    renamed = deepcopy(row())
    renamed.name = "renamed"
    write_table("3.9.0", [renamed])  # replaces what its target and operation had, and nothing else
    assert list(read_table()["3.9.0"]["sm_90"]["toy"]) == ["renamed"]
    assert list(read_table()["3.9.0"]["sm_80"]["toy"]) == ["product"]


def test_consumer_gpus_were_given_tiles_that_do_not_fit():
    """What sm_86 and its like take of sm_80 must fit their 99 KiB of shared memory; the rest has entries of sm_86."""
    for release, targets in read_table().items():
        for operation, kernels in targets["sm_80"].items():
            for name, kept in kernels.items():
                taken = targets["sm_86"].get(operation, {}).get(name, kept)
                assert taken["shared"] <= 99 * 1024, (release, operation, name)


# ----------------------------------------------------------------------------------------- toy kernels, compiled

TOY = """
import torch
import triton
import triton.language as tl
from ptengine.kernels import launch


@triton.jit
def product(
    x_ptr, y_ptr, out_ptr, bias_ptr, stride_x, stride_y, columns, scale, flag, M: tl.constexpr, N: tl.constexpr
):
    o_m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    o_n = tl.arange(0, N)
    b_x = tl.load(x_ptr + o_m[:, None] * stride_x + o_n[None, :])  # [M, N]
    b_y = tl.load(y_ptr + o_n.to(tl.int64)[:, None] * stride_y + o_n[None, :])  # [N, N]
    acc = tl.dot(b_x, b_y) * scale + columns  # [M, N]
    if bias_ptr is not None:
        acc += 1.0
    if flag:
        acc += 1.0
    tl.store(out_ptr + o_m[:, None] * N + o_n[None, :], acc)


@triton.jit
def spilling(x_ptr, out_ptr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(x_ptr + o_n)  # [N]
    tl.store(out_ptr + o_n, tl.exp(b_x - tl.max(b_x, 0)))


@triton.jit
def narrow(x_ptr, stride, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(x_ptr + tl.program_id(0) * stride + o_n, o_n.to(tl.float32))


def run_product(dtype=torch.bfloat16):
    x, y = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
    out = torch.zeros(64, 64)
    wide = launch.multiprocessors(x.device) // 132
    m = {"sm_80": 16, "sm_90": 64, "gfx942": 32}[launch.architecture(x.device)]
    for _ in range(2):
        product[(1,)](x, y, out, None, 64, 2**33, wide, 0.5, True, M=m, N=64, num_warps=4, enable_fp_fusion=True)


def run_spilling():
    spilling[(1,)](torch.zeros(8192), torch.zeros(8192), N=8192, num_warps=1, enable_fp_fusion=True)


def run_narrow():
    narrow[(1,)](torch.zeros(64), 48, N=64, num_warps=1, enable_fp_fusion=True)


@triton.jit
def wrong(x_ptr, N: tl.constexpr):
    tl.static_assert(N == 0, "of no use")


def run_wrong():
    wrong[(1,)](torch.zeros(64), N=64, enable_fp_fusion=True)


def run_nothing():
    pass


def run_broken():
    raise ValueError("a launcher's own")
"""

SCRIPT = """
import importlib, json, os, sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
import aot_calls, aot_measure, aot_rules, compile_tiles, torch, triton
from aot_calls import Call
from aot_capture import TARGETS, record
import toy
from ptengine.kernels import dispatch, launch

result = {"release": triton.__version__}
calls = [
    Call("product", toy.run_product), Call("spilling", toy.run_spilling), Call("narrow", toy.run_narrow),
    Call("again", toy.run_product), Call("elsewhere", toy.run_broken, ("sm_100",)),
    Call("wrong", toy.run_wrong, ("sm_80",)), Call("nothing", toy.run_nothing), Call("broken", toy.run_broken),
]
targets = [TARGETS[name] for name in ("sm_80", "sm_90", "gfx942")]
rows, result["faults"] = compile_tiles.compile_all({"toy": calls}, targets, jobs=1)
result["rows"] = {f"{row.target} {row.name}": asdict(row) for row in rows}
result["violations"] = {
    f"{row.target} {row.name}": aot_rules.violations(row, TARGETS[row.target].shared_limit) for row in rows
}
(one,) = record(TARGETS["sm_90"], toy.run_product)
result["signature"] = one.signature
result["divisible"] = sorted(one.function.arg_names[path[0]] for path, found in one.attributes.items() if found)
result["constants"] = {one.function.arg_names[path[0]]: repr(value) for path, value in one.constants.items()}


def kernels(lengths, **options):
    call = partial(aot_calls._packed, torch.bfloat16, 32, 8, 128, lengths=lengths, **options)
    return sorted(one.key for one in record(TARGETS["sm_90"], call))


result["kernels of other lengths"] = [
    kernels(lengths, window=lengths[0] - 9, prefix=prefix)
    for prefix in ("rows", "N prompts")
    for lengths in ((100, 257, 1, 129), (96, 272, 16, 16))
]

# Every entry of every table of tiles is asked for by some call.
asked = set()


class Watched(dict):
    def __init__(self, name, table):
        super().__init__((key, Watched((*name, key), value) if isinstance(value, dict) else value)
                         for key, value in table.items())
        self.name = name

    def __getitem__(self, key):
        asked.add((*self.name, key))
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def entries(self):
        for key, value in self.items():
            yield from value.entries() if isinstance(value, Watched) else [(*self.name, key)]


tables = []
for operation in aot_calls.CALLS:
    module = importlib.import_module(f"ptengine.kernels.{operation}.tiles")
    for name, table in list(vars(module).items()):
        if isinstance(table, dict) and not name.startswith("__"):
            tables.append(Watched((operation, name), table))
            setattr(module, name, tables[-1])
compile_tiles._record_all(aot_calls.CALLS, TARGETS.values())
entries = [entry for table in tables for entry in table.entries() if "interpret" not in str(entry).lower()]
result["tiles"] = len(entries)
result["tiles without a call"] = [str(entry) for entry in entries if entry not in asked]

# What is left in the modules that were first imported while they were deceived.
pretended = [f"{name}.{key}" for name, module in list(sys.modules.items()) if name.startswith("ptengine")
             for key, value in vars(module).items() if getattr(value, "__module__", None) == "aot_capture"]
result["left"] = pretended
result["architecture"] = launch.architecture(torch.device("cpu"))

# The whole gate, on the sound kernel alone.
aot_rules.TABLE = Path(sys.argv[1])
aot_calls.CALLS = {"toy": [calls[0]]}
only = ["--targets", "sm_90", "--jobs", "1"]
result["status without a table"] = compile_tiles.main(only)
result["status of writing it"] = compile_tiles.main([*only, "--write-table"])
result["status with it"] = compile_tiles.main(only)
table = json.loads(aot_rules.TABLE.read_text())
table[triton.__version__]["sm_90"]["toy"]["product product"]["registers"] -= 9
aot_rules.TABLE.write_text(json.dumps(table))
result["status of a regression"] = compile_tiles.main(only)

aot_calls.CALLS = {"toy": [calls[2]]}
result["status without its kernel"] = compile_tiles.main(only)
result["status of a fault"] = compile_tiles.main([*only, "--write-table"])
result["bad arguments"] = []
for arguments in (["--targets", "sm_1,sm_90"], ["--only", "nothing"]):
    try:
        compile_tiles.main(arguments)
    except SystemExit as left:
        result["bad arguments"].append(left.code)

# A compiler that takes its process with it.
working = aot_measure.compile_launch
aot_measure.compile_launch = lambda one, target: os.abort() if one.function is toy.spilling else working(one, target)
rows, _ = compile_tiles.compile_all({"toy": calls[:3]}, targets[1:2], jobs=1)
result["crash"] = [row.measured.error for row in rows]
Path(sys.argv[2]).write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    (folder / "toy.py").write_text(TOY)
    (folder / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "script.py", "table.json", "result.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text()) | {"output": done.stdout, "errors": done.stderr}


@needs_triton
def test_a_launch_is_recorded_as_triton_would_compile_it(toy):
    assert toy["signature"] == {
        "x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "bias_ptr": "constexpr",
        "stride_x": "i32", "stride_y": "i64", "columns": "constexpr", "scale": "fp32", "flag": "u1",
        "M": "constexpr", "N": "constexpr",
    }  # fmt: skip
    assert toy["divisible"] == ["out_ptr", "stride_x", "stride_y", "x_ptr", "y_ptr"]
    assert toy["constants"] == {"bias_ptr": "None", "columns": "1", "M": "64", "N": "64"}


@needs_triton
def test_attention_is_not_compiled_anew_for_other_lengths(toy):
    """Triton specialises counts for 1 and multiples of 16 unless told not to: seconds of waiting for many a batch."""
    rows, other_rows, prompts, other_prompts = toy["kernels of other lengths"]
    assert rows == other_rows
    assert prompts == other_prompts
    assert len(rows) == 4


@needs_triton
def test_a_kernel_is_compiled_once_for_each_target_with_the_tile_of_that_target(toy):
    names = ["product product", "spilling spilling", "narrow narrow"]
    rows = [f"{target} {name}" for target in ("sm_80", "sm_90", "gfx942") for name in names]
    rows.insert(3, "sm_80 wrong wrong")
    assert list(toy["rows"]) == rows
    tiles = {name: found["tile"] for name, found in toy["rows"].items() if "product" in name}
    assert tiles["sm_80 product product"].startswith("M=16 N=64 num_warps=4")
    assert tiles["sm_90 product product"].startswith("M=64 N=64 num_warps=4")


@needs_triton
def test_resources_are_read_and_belong_to_their_kernel(toy):
    measured = {name: found["measured"] for name, found in toy["rows"].items()}
    assert [name for name, m in measured.items() if m["error"] is not None] == ["sm_80 wrong wrong"]
    assert all(m["registers"] > 0 for m in measured.values() if m["error"] is None)
    for target, kind in (("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "MFMA")):
        product, spilling, narrow = (measured[f"{target} {name} {name}"] for name in ("product", "spilling", "narrow"))
        assert list(product["tensor_core"]) == [kind]
        assert product["stack"] == product["spills"] == 0
        assert product["shared"] > 0
        if target != "gfx942":  # which has twice the registers
            assert spilling["stack"] > 0
            assert spilling["spills"] > 0
        assert spilling["tensor_core"] == narrow["tensor_core"] == {}


@needs_triton
def test_the_gate_tells_a_spill_a_narrow_offset_and_a_failed_call(toy):
    line = 1 + next(number for number, line in enumerate(TOY.splitlines()) if "* stride + o_n" in line)
    for target in ("sm_80", "sm_90", "gfx942"):
        told = {name: toy["violations"][f"{target} {name} {name}"] for name in ("product", "spilling", "narrow")}
        assert told["product"] == []
        assert told["narrow"] == [f"toy.py:{line}: a 32-bit product moves a pointer"]
        assert [fault.partition(",")[0] for fault in told["spilling"]] == (
            [] if target == "gfx942" else ["expected no spills"]
        )
        assert f"{target} toy nothing: expected a kernel to be launched, got none" in toy["faults"]
        assert f"{target} toy broken: ValueError: a launcher's own" in toy["faults"]
    assert len(toy["faults"]) == 6
    (told,) = toy["violations"]["sm_80 wrong wrong"]
    assert told.startswith("expected to compile, got CompileTimeAssertionFailure: ")
    assert "of no use" in told
    assert "\n" not in told


@needs_triton
def test_the_gate_fails_on_a_fault_on_a_regression_and_on_a_table_that_is_old(toy):
    assert toy["status without a table"] == 1
    assert toy["status of writing it"] == 0
    assert toy["status with it"] == 0
    assert toy["status of a regression"] == 1
    assert toy["status without its kernel"] == 1
    assert toy["status of a fault"] == 1
    assert f"triton {toy['release']}: passed" in toy["output"]
    assert "sm_90 toy product product: expected a row in the table, got none: --write-table" in toy["output"]
    assert "sm_90 toy product product: expected at most " in toy["output"]
    assert "sm_90 toy product product: expected a kernel for this row of the table, got none" in toy["output"]


@needs_triton
def test_a_crash_of_the_compiler_costs_its_own_kernel_only(toy):
    assert toy["crash"] == [None, "a crash of the compiler", None]


@needs_triton
def test_every_shipped_tile_is_compiled_for_some_call(toy):
    assert toy["tiles"] > 0
    assert toy["tiles without a call"] == []


@needs_triton
def test_nothing_stays_deceived(toy):
    assert toy["left"] == []
    assert toy["architecture"] == "interpreter"


def test_bad_arguments_are_one_clear_line(capsys):
    with pytest.raises(SystemExit) as left:
        compile_tiles.main(["--jobs", "0"])
    assert left.value.code == 2
    assert "expected --jobs of at least 1, got 0" in capsys.readouterr().err


@needs_triton
def test_an_unknown_name_is_one_clear_line(toy):
    assert toy["bad arguments"] == [2, 2]
    assert "expected --targets of sm_80, sm_86, sm_90, sm_100, gfx942, got sm_1" in toy["errors"]
    assert "expected --only of toy, got nothing" in toy["errors"]
