"""prefix_concat's Triton kernels for dense rows: under the interpreter on a CPU, on the GPU where there is one.

Copies must equal the specification bit for bit; what is computed, the rotation and the sums, is held against float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptengine.kernels.launch import DTYPES, INTERPRETED
from ptengine.kernels.prefix_concat import operators, prefix_concat, prefix_concat_reference

from .prefix_attention_cases import check_error, noise
from .test_prefix_concat import DEVICE, on_device, options_for, poisoned, run, wide, widened

pytest.importorskip("triton")

ROTATIONS = [0, 6, 16]  # of 16 channels


def check(prefix: torch.Tensor, rows: torch.Tensor, options: dict[str, Any]) -> None:
    """The kernels against the specification, in memory that holds NaN: output, prefix gradient, rows' gradient."""
    with poisoned():
        got = run(prefix_concat, prefix, rows, **options, backend="triton")
    stock = run(prefix_concat_reference, prefix, rows, **options)
    exact = run(prefix_concat_reference, prefix.double(), rows.double(), **widened(options))
    assert [x.dtype for x in got] == [rows.dtype, prefix.dtype, rows.dtype]
    assert got[0].is_contiguous()
    for name, factor, *tensors in zip(("out", "prefix", "rows"), (1.5, 3.0, 3.0), got, stock, exact, strict=True):
        check_error(*tensors, factor, name)
    virtual, width = prefix.shape[-3], 0 if options.get("cos") is None else options["cos"].shape[-1]
    assert torch.equal(got[0][:, :, :virtual], stock[0][:, :, :virtual])
    assert torch.equal(got[0][..., width:], stock[0][..., width:])
    assert torch.equal(got[2][..., width:], stock[2][..., width:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", ROTATIONS)
@pytest.mark.parametrize("length", [0, 1, 17, 64])
@pytest.mark.parametrize("virtual", [0, 1, 7, 100])
def test_every_shape(virtual: int, length: int, width: int, dtype: torch.dtype) -> None:
    """With one prompt, or three of which one is read twice and one never."""
    prompts = 3 if (virtual + length) % 2 else None
    prefix, rows, ids = on_device(*wide(virtual, 3, length, dtype, prompts))
    check(prefix, rows, options_for(ids, (3, length) if length == 17 else (length,), width, dtype))


@pytest.mark.parametrize(("heads", "dim", "width"), [(1, 128, 64), (8, 3, 2), (2, 80, 32), (1, 96, 96), (2, 1, 0)])
@pytest.mark.parametrize("prompts", [None, 2])
def test_heads_and_widths(prompts: int | None, heads: int, dim: int, width: int) -> None:
    prefix, rows, ids = on_device(*wide(5, 3, 20, torch.float16, prompts, heads, dim))
    check(prefix, rows, options_for(ids, (3, 20), width, torch.float16))


@pytest.mark.parametrize("prompts", [1, 3, 20])
def test_more_rows_than_are_read_together(prompts: int) -> None:
    """Groups of rows with no reader, some, and all; the last group is not full."""
    prefix, rows, ids = on_device(*wide(3, 19, 0, torch.float32, prompts, heads=1, dim=4))
    check(prefix, rows, {"prompt_ids": ids})
    check(prefix, rows, {"prompt_ids": ids.sort().values.int()})


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.one_of(st.none(), st.integers(1, 4)),
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 4), st.integers(0, 40), st.integers(1, 3), st.integers(1, 20)),
    half=st.integers(0, 10),
    dtypes=st.tuples(st.sampled_from([*DTYPES, torch.float64]), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    batched=st.booleans(),
)
def test_any_shape_and_dtype(
    prompts: int | None,
    sizes: tuple[int, int, int, int, int],
    half: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    batched: bool,
) -> None:
    virtual, batch, length, heads, dim = sizes
    prefix, rows, ids = on_device(*wide(virtual, batch, length, dtypes[1], prompts, heads, dim))
    width = 2 * min(half, dim // 2)
    options = options_for(ids, (batch, length) if batched else (length,), width, dtypes[2])
    with poisoned():
        got = run(prefix_concat, prefix.to(dtypes[0]), rows, **options, backend="triton")
    expected = run(prefix_concat, prefix.to(dtypes[0]), rows, **options, backend="torch")
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    eps = max(torch.finfo(dtype).eps for dtype in (rows.dtype, torch.float32))
    torch.testing.assert_close(got, expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize(("prompts", "width"), [(None, 6), (2, 0)])
def test_strides_do_not_matter(prompts: int | None, width: int) -> None:
    """Channels far apart, tokens backwards in memory, rows and tokens that share memory, and such gradients."""
    prefix, rows, ids = on_device(*wide(9, 4, 33, torch.float32, prompts))
    options = options_for(ids, (4, 33), width, torch.float32)
    plain = run(prefix_concat, prefix, rows, **options, backend="triton")
    transposed = {name: x if x is None or x.dim() == 1 else x.mT.contiguous().mT for name, x in options.items()}
    if ids is not None:
        transposed["prompt_ids"] = ids.repeat_interleave(2)[::2]
    again = run(
        prefix_concat, prefix.mT.contiguous().mT, rows.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        **transposed, backend="triton",
    )  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    shared = rows[:1, :, :1].expand(4, -1, 33, -1)
    out = prefix_concat(prefix[..., :1, :].expand_as(prefix), shared, **options, backend="triton")
    copied = prefix_concat(
        prefix[..., :1, :].expand_as(prefix).clone(), shared.clone(), **options, backend="triton"
    )  # fmt: skip
    assert torch.equal(out, copied)
    leaves = prefix.detach().requires_grad_(), rows.detach().requires_grad_()
    out = prefix_concat(*leaves, **options, backend="triton")
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), leaves)  # strides 0 everywhere
    assert all(torch.equal(x, y) for x, y in zip(ones, expanded, strict=True))


def test_cos_and_sin_may_lie_differently() -> None:
    prefix, rows, _ = on_device(*wide(2, 4, 5, torch.float32))
    options = options_for(None, (5,), 6, torch.float32)
    expected = prefix_concat(prefix, rows, **options, backend="triton")
    options["sin"] = options["sin"].mT.contiguous().mT
    assert torch.equal(prefix_concat(prefix, rows, **options, backend="triton"), expected)
    options["cos"] = options["cos"][:1].expand(4, 5, -1)  # strides 0
    options["sin"] = options["sin"][:1].expand(4, 5, -1)
    expanded = prefix_concat(prefix, rows, **options, backend="triton")
    options |= {name: options[name].contiguous() for name in ("cos", "sin")}
    assert torch.equal(expanded, prefix_concat(prefix, rows, **options, backend="triton"))


@pytest.mark.parametrize("far", ["rows", "channels"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """Elements 2^31 and more from the first; almost none of the memory is touched."""
    step = 2**30 + 8 if far == "rows" else 2**28 + 8  # in 32 bits, unlike its products
    strides = (step, 32, 10, 1) if far == "rows" else (16, 8, 2, step)
    size = 1 + sum((n - 1) * stride for n, stride in zip((3, 2, 3, 10), strides, strict=True))
    rows = torch.empty(size, dtype=torch.float16, device=DEVICE).as_strided((3, 2, 3, 10), strides)
    values = noise(3, 2, 3, 10, dtype=torch.float16).to(DEVICE)
    rows.copy_(values)
    prefix, _, _ = on_device(*wide(1, 1, 1, torch.float16, dim=10))
    options = options_for(None, (3,), 4, torch.float16)
    out = prefix_concat(prefix, rows, **options, backend="triton")
    assert torch.equal(out, prefix_concat(prefix, values, **options, backend="triton"))


@pytest.mark.parametrize("prompts", [None, 3])
def test_same_bits_every_time(prompts: int | None) -> None:
    prefix, rows, ids = on_device(*wide(40, 9, 17, torch.float32, prompts, heads=1))
    options = options_for(ids, (17,), 6, torch.float32)
    first = run(prefix_concat, prefix, rows, **options, backend="triton")
    for _ in range(250 if DEVICE == "cuda" else 2):
        again = run(prefix_concat, prefix, rows, **options, backend="triton")
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_permuting_rows_permutes_results() -> None:
    prefix, rows, ids = on_device(*wide(5, 11, 6, torch.float32, 3, heads=1))
    options = options_for(ids, (11, 6), 6, torch.float32)
    order = torch.tensor([3, 9, 0, 10, 1, 2, 8, 4, 7, 6, 5], device=DEVICE)
    leaves = prefix.requires_grad_(), rows.detach().requires_grad_()
    of_out = noise(11, 1, 11, 16, dtype=torch.float32).to(DEVICE)
    out = prefix_concat(*leaves, **options, backend="triton")
    of_prefix, of_rows = torch.autograd.grad(out, leaves, of_out)
    leaves = prefix, rows[order].detach().requires_grad_()
    moved = prefix_concat(*leaves, **{name: x[order] for name, x in options.items()}, backend="triton")
    of_prefix_moved, of_rows_moved = torch.autograd.grad(moved, leaves, of_out[order])
    assert torch.equal(moved, out[order])
    assert torch.equal(of_rows_moved, of_rows[order])
    torch.testing.assert_close(of_prefix_moved, of_prefix, rtol=1e-6, atol=4e-6)


def test_prefix_gradient_is_summed_in_float32() -> None:
    """300 rows in float16, a prompt in float32: no further from float64 than that many roundings to float32."""
    prefix, rows, _ = on_device(*wide(1, 300, 0, torch.float16, heads=1))
    of_out = torch.rand(300, 1, 1, 16, generator=torch.Generator().manual_seed(0)).half().to(DEVICE) + 0.5
    leaf = prefix.float().requires_grad_()
    (got,) = torch.autograd.grad(prefix_concat(leaf, rows, backend="triton"), leaf, of_out)
    exact = of_out.double().sum(0).transpose(0, 1)
    assert (got.double() - exact).abs().max() <= exact.abs().max() * 300 * torch.finfo(torch.float32).eps / 2


def test_one_bad_row_stays_in_its_prompt() -> None:
    """A NaN in the gradient of one row reaches its own prompt and no other."""
    prefix, rows, _ = on_device(*wide(2, 4, 1, torch.float32, 2))
    leaf = prefix.requires_grad_()
    out = prefix_concat(leaf, rows, prompt_ids=torch.tensor([0, 1, 0, 0], device=DEVICE), backend="triton")
    of_out = torch.ones_like(out)
    of_out[1] = torch.nan
    (of_prefix,) = torch.autograd.grad(out, leaf, of_out)
    assert of_prefix.flatten(1).isnan().all(1).tolist() == [False, True]


def test_unknown_prompts_are_marked_where_values_are_not_checked() -> None:
    """On a GPU nobody looks at the ids: such a row gets NaN for a prefix, its own tokens, and no say in a gradient."""
    from ptengine.kernels.prefix_concat import triton_path

    prefix, rows, _ = on_device(*wide(3, 4, 2, torch.float32, 2))
    ids = torch.tensor([1, 2, -1, 0], device=DEVICE)
    out = triton_path.concat(prefix, rows, ids, None, None)
    assert out[:, :, :3].isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert torch.equal(out[:, :, 3:], rows)
    summed = triton_path.sum_rows(torch.ones_like(out[:, :, :3]), ids, 2, torch.float32)
    assert summed.eq(1.0).all()


@pytest.mark.parametrize("prompts", [None, 3])
@pytest.mark.parametrize("width", [0, 6])
def test_opcheck(prompts: int | None, width: int) -> None:
    prefix, rows, ids = on_device(*wide(2, 3, 4, torch.float32, prompts))
    options = options_for(ids, (4,), width, torch.float32)
    tables = options.get("cos"), options.get("sin")
    leaves = prefix.requires_grad_(), rows.detach().requires_grad_()
    torch.library.opcheck(operators._dense, (*leaves, ids, *tables, True))
    of_out = torch.randn(3, 2, 6, 16, device=DEVICE)
    torch.library.opcheck(operators._sum, (of_out[:, :, :2], ids, prompts or 0, torch.float16, True))
    if width:
        torch.library.opcheck(operators._rotate_back, (of_out[:, :, 2:], *tables, True))


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    prefix, rows, ids = on_device(*wide(2, 4, 3, torch.float32, 3))
    options = options_for(ids, (3,), 6, torch.float32) | {"backend": "triton"}
    compiled = torch.compile(prefix_concat, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, prefix, rows, **options), run(prefix_concat, prefix, rows, **options))


def test_rows_of_tokens_are_not_touched_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant prefix is not summed; constant rows are not turned back."""
    from ptengine.kernels.prefix_concat import triton_path

    prefix, rows, _ = on_device(*wide(2, 3, 4, torch.float32))
    options = options_for(None, (4,), 6, torch.float32)
    monkeypatch.setattr(triton_path, "sum_rows", lambda *args: pytest.fail("summed"))
    prefix_concat(prefix, rows.detach().requires_grad_(), **options, backend="triton").sum().backward()
    monkeypatch.undo()
    monkeypatch.setattr(triton_path, "rotate_back", lambda *args: pytest.fail("turned"))
    prefix_concat(prefix.requires_grad_(), rows.detach(), **options, backend="triton").sum().backward()


class FirstProgramOnly:
    """Stands in for a kernel and runs one program a head of each launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self.kernel[(1, grid[1])]


def test_a_program_writes_its_own_tile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a tile of the prefix that ran on into the row's own tokens was mended by the next program, which on a
    GPU may come first."""
    from ptengine.kernels.prefix_concat import triton_path

    monkeypatch.setattr(triton_path, "concat_kernel", FirstProgramOnly(triton_path.concat_kernel))
    prefix, rows, _ = on_device(*wide(7, 2, 5, torch.float32))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what lies beyond a prefix is read as NaN
    out = triton_path.concat(prefix, rows, None, None, None)
    assert torch.equal(out[0, :, :7], prefix.transpose(0, 1))
    assert not out[0, :, 7:].any()
    assert not out[1].any()


class _NoLaunch:
    """Stands in for a kernel and takes any launch."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def test_the_host_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the arguments and the launch no value of a tensor is asked for, which on a GPU would be a wait."""
    from ptengine.kernels.prefix_concat import triton_path

    for name in ("concat_kernel", "concat_packed_kernel", "sum_kernel", "own_kernel"):
        monkeypatch.setattr(triton_path, name, _NoLaunch())
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__index__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"asked for {name}"))
    prefix, rows = torch.zeros(3, 5, 2, 4), torch.zeros(4, 2, 6, 4)
    ids, cu, tables = torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.int32), [torch.zeros(6, 2)] * 2
    triton_path.concat(prefix, rows, ids, *tables)
    triton_path.concat_paged(prefix, rows, torch.zeros(9, 16, 2, 4), torch.zeros(4, 1, dtype=torch.int32), ids, *tables)
    triton_path.concat_packed(prefix, rows[:, 0, 0, None], cu, 6, ids, torch.zeros(3, dtype=torch.int32), *tables, 24)
    triton_path.sum_rows(rows, ids, 3, torch.float32)
    triton_path.rotate_back(rows, *tables)
    triton_path.sum_packed(prefix[0], cu, ids, None, 3, 5, torch.float32)
    triton_path.take_own(prefix[0], cu, cu, 6, 6, *tables)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a CPU never waits for itself")
def test_the_gpu_is_never_waited_for() -> None:
    prefix, rows, ids = on_device(*wide(5, 4, 6, torch.float16, 3))
    options = options_for(ids, (6,), 6, torch.float16)
    leaves = prefix.requires_grad_(), rows.detach().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_concat(*leaves, **options, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which refuses bfloat16")
def test_bfloat16_is_refused_under_the_interpreter() -> None:
    prefix, rows, _ = wide(2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="takes float16, float32 here, not bfloat16"):
        prefix_concat(prefix, rows.bfloat16(), backend="triton")
    with pytest.raises(ValueError, match="computes bfloat16 wrongly, which prefix, cos or sin"):
        prefix_concat(prefix.bfloat16(), rows, backend="triton")
    angles = torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="computes bfloat16 wrongly, which prefix, cos or sin"):
        prefix_concat(prefix, rows, cos=angles, sin=angles, backend="triton")


def test_float64_is_refused() -> None:
    prefix, rows, _ = on_device(*wide(2, 3, 4, torch.float64))
    with pytest.raises(ValueError, match=r"the triton implementation of prefix_concat takes .*, not float64"):
        prefix_concat(prefix, rows, backend="triton")
