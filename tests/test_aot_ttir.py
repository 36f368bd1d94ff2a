"""What benchmarks/aot_ttir.py reads out of a kernel's TTIR: its dots, and offsets that a large tensor may overflow."""

from __future__ import annotations

import pytest
from aot_ttir import Dot, dots, narrow_offsets

PROGRAM = """
#loc = loc("/somewhere/kernel.py":10:0)
#loc2 = loc("/somewhere/kernel.py":12:20)
#loc3 = loc("o_m"(#loc2))
#loc4 = loc(callsite(#loc3 at #loc))
module {{
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> loc(#loc), %stride: i32 loc(#loc)) attributes {{noinline = false}} {{
    %c64_i32 = arith.constant 64 : i32 loc(#loc)
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %cst = arith.constant dense<128> : tensor<64x1xi32> loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %range = tt.make_range {{end = 64 : i32, start = 0 : i32}} : tensor<64xi32> loc(#loc)
{body}
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""
FAULT = ["kernel.py:12: a 32-bit product moves a pointer"]


def faults(body):
    return narrow_offsets(PROGRAM.format(body=body))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            """%o = arith.muli %pid, %stride : i32 loc(#loc4)
            %p = tt.addptr %x_ptr, %o : !tt.ptr<f32>, i32 loc(#loc)""",
            FAULT,
            id="an index times a stride",
        ),
        pytest.param(
            """%o = arith.muli %pid, %stride : i32 loc(#loc4)
            %w = arith.extsi %o : i32 to i64 loc(#loc)
            %p = tt.addptr %x_ptr, %w : !tt.ptr<f32>, i64 loc(#loc)""",
            FAULT,
            id="widened too late",
        ),
        pytest.param(
            """%w = arith.extsi %pid : i32 to i64 loc(#loc)
            %s = arith.extsi %stride : i32 to i64 loc(#loc)
            %o = arith.muli %w, %s : i64 loc(#loc4)
            %p = tt.addptr %x_ptr, %o : !tt.ptr<f32>, i64 loc(#loc)""",
            [],
            id="widened in time",
        ),
        pytest.param(
            """%o = arith.muli %pid, %c64_i32 : i32 loc(#loc4)
            %p = tt.addptr %x_ptr, %o : !tt.ptr<f32>, i32 loc(#loc)""",
            FAULT,
            id="an index times a block, never widened",
        ),
        pytest.param(
            """%b = arith.muli %pid, %c64_i32 : i32 loc(#loc4)
            %w = arith.extsi %b : i32 to i64 loc(#loc)
            %s = arith.extsi %stride : i32 to i64 loc(#loc)
            %o = arith.muli %w, %s : i64 loc(#loc)
            %p = tt.addptr %x_ptr, %o : !tt.ptr<f32>, i64 loc(#loc)""",
            [],
            id="an index times a block, widened where it is one",
        ),
        pytest.param(
            """%b = arith.muli %pid, %c64_i32 : i32 loc(#loc)
            %o = arith.muli %b, %c64_i32 : i32 loc(#loc4)
            %w = arith.extsi %o : i32 to i64 loc(#loc)
            %p = tt.addptr %x_ptr, %w : !tt.ptr<f32>, i64 loc(#loc)""",
            FAULT,
            id="a block's index times a constant stride, widened too late",
        ),
        pytest.param(
            """%e = tt.expand_dims %range {axis = 1 : i32} : tensor<64xi32> -> tensor<64x1xi32> loc(#loc)
            %o = arith.muli %e, %cst : tensor<64x1xi32> loc(#loc4)
            %q = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<64x1x!tt.ptr<f32>> loc(#loc)
            %p = tt.addptr %q, %o : tensor<64x1x!tt.ptr<f32>>, tensor<64x1xi32> loc(#loc)""",
            [],
            id="bounded by the tile",
        ),
        pytest.param(
            """%r = arith.remsi %pid, %c64_i32 : i32 loc(#loc)
            %o = arith.muli %r, %c64_i32 : i32 loc(#loc4)
            %p = tt.addptr %x_ptr, %o : !tt.ptr<f32>, i32 loc(#loc)""",
            [],
            id="bounded by a remainder",
        ),
        pytest.param(
            """%t = arith.muli %pid, %c64_i32 : i32 loc(#loc4)
            %m = arith.minsi %t, %stride : i32 loc(#loc)
            %p = tt.addptr %x_ptr, %m : !tt.ptr<f32>, i32 loc(#loc)""",
            [],
            id="bounded by a minimum",
        ),
        pytest.param(
            """%t = arith.muli %pid, %c64_i32 : i32 loc(#loc4)
            %m = arith.maxsi %t, %stride : i32 loc(#loc)
            %p = tt.addptr %x_ptr, %m : !tt.ptr<f32>, i32 loc(#loc)""",
            FAULT,
            id="not bounded by a maximum",
        ),
        pytest.param(
            """%t = arith.muli %stride, %c64_i32 : i32 loc(#loc4)
            %r = arith.divsi %pid, %t : i32 loc(#loc)
            %p = tt.addptr %x_ptr, %r : !tt.ptr<f32>, i32 loc(#loc)""",
            [],
            id="a divisor",
        ),
        pytest.param(
            """%t = arith.muli %stride, %c64_i32 : i32 loc(#loc4)
            %s = scf.for %k = %c0_i32 to %pid step %c64_i32 iter_args(%o = %c0_i32) -> (i32)  : i32 {
              %q = tt.addptr %x_ptr, %o : !tt.ptr<f32>, i32 loc(#loc)
              %n = arith.addi %o, %t : i32 loc(#loc)
              scf.yield %n : i32 loc(#loc)
            } loc(#loc)""",
            FAULT,
            id="carried round a loop",
        ),
        pytest.param(
            """%s = scf.if %flag -> (i32) {
              %t = arith.muli %stride, %pid : i32 loc(#loc4)
              scf.yield %t : i32 loc(#loc)
            } else {
              scf.yield %pid : i32 loc(#loc)
            } loc(#loc)
            %p = tt.addptr %x_ptr, %s : !tt.ptr<f32>, i32 loc(#loc)""",
            FAULT,
            id="out of a branch",
        ),
        pytest.param(
            """scf.if %flag {
              %t = arith.muli %stride, %pid : i32 loc(#loc4)
              tt.store %x_ptr, %t : !tt.ptr<f32> loc(#loc)
            } else {
              %t = arith.addi %stride, %pid : i32 loc(#loc)
              %p = tt.addptr %x_ptr, %t : !tt.ptr<f32>, i32 loc(#loc)
            } loc(#loc)""",
            [],
            id="a name of the branch beside",
        ),
    ],
)
def test_a_product_that_may_overflow_before_it_moves_a_pointer_is_found(body, expected):
    assert faults(body) == expected


def test_dots_are_read_with_their_precision():
    text = """
      %a = tt.dot %x, %y, %z, inputPrecision = tf32x3 : tensor<64x16xf32> * tensor<16x32xf32> -> tensor<64x32xf32>
      %b = tt.dot %x, %y, %z : tensor<128x64xbf16> * tensor<64x8xbf16> -> tensor<128x8xf32> loc(#l)
    """
    assert dots(text) == [Dot(64, 32, 16, "f32", "tf32x3"), Dot(128, 8, 64, "bf16", "ieee")]
