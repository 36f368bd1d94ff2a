"""prefix_concat_varlen, all implementations: each row of the result is what prefix_concat makes of that row alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptengine.kernels import launch
from ptengine.kernels.prefix_concat import (
    operators,
    prefix_concat_reference,
    prefix_concat_varlen,
    prefix_concat_varlen_reference,
)

from .prefix_attention_cases import check_error, noise
from .test_prefix_concat import DEVICE, on_device, poisoned, rotary, widened
from .test_prefix_concat_triton import FirstProgramOnly

pytest.importorskip("triton")

# Every dtype on the PyTorch path; the kernels in those they take here.
PATHS = [("torch", x) for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
PATHS += [("triton", x) for x in launch.DTYPES]
LENGTHS = (17, 0, 40, 1)
IDS = (2, 0, 2, -1)


def cumulative(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)


def index(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def packed(
    virtual: int, lengths: Sequence[int], dtype: torch.dtype, prompts: int | None = None, heads: int = 2, dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """prefix [P, H_kv, D] or [N, P, H_kv, D], and rows [total, H_kv, D]."""
    many = () if prompts is None else (prompts,)
    prefix = noise(*many, virtual, heads, dim, dtype=dtype, seed=2)
    return on_device(prefix, noise(sum(lengths), heads, dim, dtype=dtype, seed=3))


def tables(tokens: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.to(DEVICE) for name, x in rotary(tokens, width=width, dtype=dtype).items()} if width else {}


def row_by_row(
    prefix: torch.Tensor, rows: torch.Tensor, cu_seqlens: torch.Tensor, _: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: the dense specification for one row at a time."""
    ids, sizes = options.get("prompt_ids"), options.get("prefix_lengths")
    bounds, outs = cu_seqlens.tolist(), [rows[:0]]
    for row, (start, end) in enumerate(pairwise(bounds)):
        prompt = 0 if ids is None else int(ids[row])
        own = (prefix if ids is None else prefix[prompt])[: None if sizes is None else int(sizes[prompt])]
        angles = {name: options[name][start:end] for name in ("cos", "sin") if name in options}
        one = rows[start:end].transpose(0, 1)[None]  # [1, H_kv, T, D]
        outs.append(prefix_concat_reference(own[:0] if prompt < 0 else own, one, **angles)[0].transpose(0, 1))
    return torch.cat(outs), cumulative([len(out) for out in outs[1:]], cu_seqlens.dtype)


def run(function: Any, prefix: torch.Tensor, rows: torch.Tensor, *args: Any, **options: Any) -> list[torch.Tensor]:
    """Output, its cu_seqlens and both gradients, for a gradient of the output that differs everywhere."""
    leaves = prefix.detach().requires_grad_(), rows.detach().requires_grad_()
    out, cu_seqlens_out = function(*leaves, *args, **options)
    assert not cu_seqlens_out.requires_grad
    of_out = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    given = torch.autograd.grad(out, leaves, of_out, allow_unused=True, materialize_grads=True)
    return [out.detach(), cu_seqlens_out, *given]


def check(
    backend: str, prefix: torch.Tensor, rows: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, **options: Any
) -> None:
    with poisoned():
        got = run(prefix_concat_varlen, prefix, rows, cu_seqlens, longest, backend=backend, **options)
    stock = run(row_by_row, prefix, rows, cu_seqlens, longest, **options)
    exact = run(row_by_row, prefix.double(), rows.double(), cu_seqlens, longest, **widened(options))
    assert got[0].is_contiguous()
    assert got[1].dtype == cu_seqlens.dtype
    assert got[1].tolist() == exact[1].tolist()
    for what, factor, i in (("out", 1.5, 0), ("prefix", 3.0, 2), ("rows", 3.0, 3)):
        check_error(got[i], stock[i], exact[i], factor, what)
    width = options["cos"].shape[-1] if "cos" in options else 0
    assert torch.equal(got[0][..., width:], stock[0][..., width:])
    assert torch.equal(got[3][..., width:], stock[3][..., width:])


@pytest.mark.parametrize(("backend", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("width", [0, 6, 16])
@pytest.mark.parametrize("virtual", [0, 1, 7, 100])
def test_one_prompt(virtual: int, width: int, backend: str, dtype: torch.dtype) -> None:
    prefix, rows = packed(virtual, LENGTHS, dtype)
    check(backend, prefix, rows, cumulative(LENGTHS), 40, **tables(len(rows), width, dtype))


@pytest.mark.parametrize(("backend", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("sizes", [None, (7, 0, 3)])
@pytest.mark.parametrize("ids", [IDS, (1, 1, 1, 1), (-1, -1, -1, -1)])
def test_several_prompts(ids: tuple[int, ...], sizes: tuple[int, ...] | None, backend: str, dtype: torch.dtype) -> None:
    prefix, rows = packed(7, LENGTHS, dtype, prompts=3)
    options = {"prompt_ids": index(ids), **tables(len(rows), 6, dtype)}
    if sizes is not None:
        options["prefix_lengths"] = index(sizes)
        for prompt, size in enumerate(sizes):  # padding is never read
            prefix[prompt, size:] = torch.nan
    check(backend, prefix, rows, cumulative(LENGTHS, torch.int64), 70, **options)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_one_prompt_shorter_than_its_tensor(backend: str) -> None:
    prefix, rows = packed(9, LENGTHS, torch.float32)
    check(backend, prefix, rows, cumulative(LENGTHS), 40, prefix_lengths=index([4]))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_drawing_in_the_docstring(backend: str) -> None:
    prefix = torch.tensor([[100.0, torch.nan], [200.0, 201.0]], device=DEVICE)[..., None, None]
    rows = torch.arange(6.0, device=DEVICE)[:, None, None]
    out, cu_seqlens_out = prefix_concat_varlen(
        prefix, rows, index([0, 3, 4, 6]), 3,
        prompt_ids=index([1, -1, 0]), prefix_lengths=index([1, 2]), backend=backend,
    )  # fmt: skip
    assert out.flatten().tolist() == [200.0, 201.0, 0.0, 1.0, 2.0, 3.0, 100.0, 4.0, 5.0]
    assert cu_seqlens_out.tolist() == [0, 5, 6, 9]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("virtual", [0, 3])
def test_nothing_but_prefixes_or_not_even_rows(virtual: int, lengths: tuple[int, ...], backend: str) -> None:
    prefix, rows = packed(virtual, lengths, torch.float32)
    check(backend, prefix, rows, cumulative(lengths), 0)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=4),
    prompts=st.one_of(st.none(), st.integers(1, 4)),
    sizes=st.tuples(st.integers(0, 20), st.integers(1, 2), st.integers(1, 18)),
    half=st.integers(0, 9),
    dtypes=st.tuples(st.sampled_from(launch.DTYPES), st.sampled_from(launch.DTYPES)),
    data=st.data(),
)
def test_any_rows(
    lengths: list[int],
    prompts: int | None,
    sizes: tuple[int, int, int],
    half: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    data: Any,
) -> None:
    virtual, heads, dim = sizes
    prefix, rows = packed(virtual, lengths, dtypes[1], prompts, heads, dim)
    options: dict[str, Any] = tables(len(rows), 2 * min(half, dim // 2), dtypes[1])
    if prompts is not None:
        draw = st.lists(st.integers(-1, prompts - 1), min_size=len(lengths), max_size=len(lengths))
        options["prompt_ids"] = index(data.draw(draw))
    if data.draw(st.booleans()):
        draw = st.lists(st.integers(0, virtual), min_size=prompts or 1, max_size=prompts or 1)
        options["prefix_lengths"] = index(data.draw(draw))
    operands = prefix.to(dtypes[0]), rows, cumulative(lengths), max(lengths, default=0)
    with poisoned():
        results = [run(prefix_concat_varlen, *operands, backend=name, **options) for name in ("torch", "triton")]
    expected = run(row_by_row, *operands, **options)
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
    for got in results:
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        torch.testing.assert_close(got, expected, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("turned", [False, True])
def test_gradcheck(turned: bool, backend: str) -> None:
    prefix, rows = packed(3, (2, 0, 3, 1), torch.float64, prompts=2, heads=1, dim=5)
    options = {"prompt_ids": index([1, 0, -1, 1]), "prefix_lengths": index([3, 2]), "backend": backend}
    options |= tables(6, 4, torch.float64) if turned else {}
    leaves = prefix.requires_grad_(), rows.requires_grad_()
    cu = cumulative((2, 0, 3, 1))
    assert torch.autograd.gradcheck(lambda p, r: prefix_concat_varlen(p, r, cu, 3, **options)[0], leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend: str) -> None:
    prefix, rows = packed(9, LENGTHS, torch.float32, prompts=3)
    options = {"prompt_ids": index(IDS), "prefix_lengths": index([9, 4, 2]), **tables(len(rows), 6, torch.float32)}
    plain = run(prefix_concat_varlen, prefix, rows, cumulative(LENGTHS), 40, backend=backend, **options)
    options = {name: x.repeat_interleave(2, 0)[::2].mT.contiguous().mT if x.dim() == 2 else
               x.repeat_interleave(2)[::2] for name, x in options.items()}  # fmt: skip
    again = run(
        prefix_concat_varlen, prefix.mT.contiguous().mT, rows.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        cumulative(LENGTHS).repeat_interleave(2)[::2], 40, backend=backend, **options,
    )  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    out, _ = prefix_concat_varlen(
        prefix[:, :1].expand(-1, 9, -1, -1), rows[:1].expand_as(rows), cumulative(LENGTHS), 40,
        backend=backend, prompt_ids=index(IDS),
    )  # fmt: skip
    copied, _ = prefix_concat_varlen(
        prefix[:, :1].repeat(1, 9, 1, 1), rows[:1].repeat(len(rows), 1, 1), cumulative(LENGTHS), 40,
        backend=backend, prompt_ids=index(IDS),
    )  # fmt: skip
    assert torch.equal(out, copied)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_bits_every_time(backend: str) -> None:
    prefix, rows = packed(20, LENGTHS, torch.float32, prompts=3, heads=1)
    operands = prefix, rows, cumulative(LENGTHS), 40
    options = {"backend": backend, "prompt_ids": index(IDS), **tables(len(rows), 6, torch.float32)}
    first = run(prefix_concat_varlen, *operands, **options)
    for _ in range(250 if DEVICE == "cuda" else 3):
        again = run(prefix_concat_varlen, *operands, **options)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_permuting_rows_permutes_results(backend: str) -> None:
    """And the gradient of the prefix stays the sum over them."""
    order = [3, 0, 2, 1]
    prefix, rows = packed(5, LENGTHS, torch.float32, prompts=3)
    pieces = [rows.split(LENGTHS)[row] for row in order]
    cu, moved = cumulative(LENGTHS), cumulative([LENGTHS[row] for row in order])
    leaf = prefix.requires_grad_()
    out, ends = prefix_concat_varlen(leaf, rows, cu, 40, prompt_ids=index(IDS), backend=backend)
    again, ends_moved = prefix_concat_varlen(
        leaf, torch.cat(pieces), moved, 40, prompt_ids=index([IDS[row] for row in order]), backend=backend
    )  # fmt: skip
    parts = out.split(ends.diff().tolist())
    assert torch.equal(again, torch.cat([parts[row] for row in order]))
    assert ends_moved.diff().tolist() == ends.diff()[order].tolist()
    of_out = noise(*out.shape, dtype=torch.float32).to(DEVICE)
    of_parts = of_out.split(ends.diff().tolist())
    (of_prefix,) = torch.autograd.grad(out, leaf, of_out)
    (of_prefix_moved,) = torch.autograd.grad(again, leaf, torch.cat([of_parts[row] for row in order]))
    torch.testing.assert_close(of_prefix_moved, of_prefix, rtol=1e-6, atol=1e-6)
    assert torch.equal(of_prefix[0], of_parts[1][:5])  # one reader, and two whose sum has one order
    torch.testing.assert_close(of_prefix[2], of_parts[0][:5] + of_parts[2][:5], rtol=1e-6, atol=1e-6)


def test_unknown_prompts_count_as_none_where_values_are_not_checked() -> None:
    from ptengine.kernels.prefix_concat import triton_path

    prefix, rows = packed(3, (2, 1, 2), torch.float32, prompts=2)
    operands = prefix, rows, cumulative((2, 1, 2)), 2
    out, ends = triton_path.concat_packed(*operands, index([7, 0, -5]), None, None, None, 8)
    expected, expected_ends = triton_path.concat_packed(*operands, index([-1, 0, -1]), None, None, None, 8)
    assert torch.equal(out, expected)
    assert torch.equal(ends, expected_ends)


def test_a_program_writes_its_own_tile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for dense rows; here the prefix ends before its tensor does."""
    from ptengine.kernels.prefix_concat import triton_path

    monkeypatch.setattr(triton_path, "concat_packed_kernel", FirstProgramOnly(triton_path.concat_packed_kernel))
    prefix, rows = packed(7, (2, 1), torch.float32)
    with poisoned():
        out, _ = triton_path.concat_packed(prefix, rows, cumulative((2, 1)), 2, None, index([3]), None, None, 9)
    assert torch.equal(out[:3], prefix[:3])
    assert out[3:].isnan().all()


def test_a_result_too_short_is_not_run_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong out_tokens on a GPU, where nobody counts, loses tokens and touches no memory of others."""
    from ptengine.kernels.prefix_concat import triton_path

    prefix, rows = packed(3, (2, 1, 2), torch.float32)
    operands = prefix, rows, cumulative((2, 1, 2)), 2, None, None, None, None
    expected, _ = triton_path.concat_packed(*operands, 14)
    around = torch.full((14, 2, 16), torch.nan, device=DEVICE)
    plain = torch.Tensor.new_empty

    def new_empty(x: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        return around[:7] if shape == (7, 2, 16) else plain(x, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    short, _ = triton_path.concat_packed(*operands, 7)
    assert torch.equal(short, expected[:7])
    assert around[7:].isnan().all()


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_opcheck(counted: bool, kernel: bool) -> None:
    prefix, rows = packed(3, (2, 0, 3), torch.float32, prompts=2, heads=1, dim=6)
    cu, ids, angles = cumulative((2, 0, 3)), index([1, -1, 0]), tuple(tables(5, 4, torch.float32).values())
    leaves = prefix.requires_grad_(), rows.requires_grad_()
    torch.library.opcheck(operators._packed, (*leaves, cu, 3, ids, None, *angles, 11 if counted else None, kernel))
    if counted:
        of_out, ends = torch.randn(11, 1, 6, device=DEVICE), index([0, 5, 5, 11])
        torch.library.opcheck(operators._packed_sum, (of_out, ends, ids, None, 2, 3, torch.float16, kernel))
        torch.library.opcheck(operators._packed_own, (of_out, cu, ends, 5, 3, *angles, kernel))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", ["known", "given", "data-dependent"])
def test_compiles_as_one_graph(count: str, backend: str) -> None:
    torch.compiler.reset()
    prefix, rows = packed(3, (2, 0, 3), torch.float32, None if count == "known" else 2, heads=1, dim=6)
    options: dict[str, Any] = {"backend": backend, **tables(5, 4, torch.float32)}
    if count != "known":
        options["prompt_ids"] = index([1, -1, 0])
    if count == "given":
        options["out_tokens"] = 11
    compiled = torch.compile(prefix_concat_varlen, fullgraph=True, backend="aot_eager")
    operands = prefix, rows, cumulative((2, 0, 3)), 3
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=count == "data-dependent"):
        got = run(compiled, *operands, **options)
    torch.testing.assert_close(got, run(prefix_concat_varlen, *operands, **options))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a CPU never waits for itself")
@pytest.mark.parametrize("prompts", [None, 3])
def test_the_gpu_is_never_waited_for(prompts: int | None) -> None:
    prefix, rows = packed(5, LENGTHS, torch.float16, prompts)
    options: dict[str, Any] = tables(len(rows), 6, torch.float16)
    if prompts is not None:
        options |= {"prompt_ids": index(IDS), "out_tokens": len(rows) + 15}
    leaves, cu = (prefix.requires_grad_(), rows.requires_grad_()), cumulative(LENGTHS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_concat_varlen(*leaves, cu, 40, **options)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


P1, PN, R = torch.zeros(2, 4, 3), torch.zeros(5, 2, 4, 3), torch.zeros(6, 4, 3)
CU, PROMPTS, SIZES, ANGLES = torch.tensor([0, 4, 4, 6]), torch.tensor([0, -1, 4]), torch.tensor([2] * 5), R[:, 0, :2]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": R[None]}, r"rows of shape \[total, H_kv, D\], got \[1, 6, 4, 3\]"),
    ({"rows": R[:, :0], "prefix": P1[:, :0]}, r"rows with H_kv and D of at least 1, got \[6, 0, 3\]"),
    ({"prefix": P1[:, :3]}, r"prefix with rows' H_kv = 4 and D = 3, got \[2, 3, 3\]"),
    ({"prefix": PN}, r"prompt_ids with a prefix of shape \[5, 2, 4, 3\]"),
    ({"cu_seqlens": CU.float()}, "cu_seqlens of dtype torch.int32 or torch.int64, got torch.float32"),
    ({"cu_seqlens": CU[:0]}, r"cu_seqlens of shape \[R \+ 1\], got \[0\]"),
    ({"cu_seqlens": CU.to("meta")}, "cu_seqlens on rows' device cpu, got meta"),
    ({"cu_seqlens": CU + 1}, r"cu_seqlens ascending from 0 to 6, got \[1, 5, 5, 7\]"),
    ({"cu_seqlens": CU.flip(0)}, r"cu_seqlens ascending from 0 to 6, got \[6, 4, 4, 0\]"),
    ({"max_seqlen": 3}, r"max_seqlen of at least the longest row \(4\), got 3"),
    ({"max_seqlen": -1}, "max_seqlen of at least 0, got -1"),
    ({"prefix": PN, "prompt_ids": PROMPTS[:2]}, r"prompt_ids of shape \[R = 3\], got \[2\]"),
    ({"prefix": PN, "prompt_ids": PROMPTS - 1}, r"prompt_ids in \[-1, 5\), got -2 at row 1"),
    ({"prefix": PN, "prompt_ids": PROMPTS + 1}, r"prompt_ids in \[-1, 5\), got 5 at row 2"),
    ({"prefix": PN, "prompt_ids": PROMPTS, "prefix_lengths": SIZES[:3]}, r"prefix_lengths of shape \[N = 5\], got \[3"),
    ({"prefix": PN, "prompt_ids": PROMPTS, "prefix_lengths": SIZES + 1}, r"lengths in \[0, 3\), got 3 at prompt 0"),
    ({"prefix_lengths": SIZES}, r"prefix_lengths of shape \[N = 1\], got \[5\]"),
    ({"prefix_lengths": -SIZES[:1]}, r"prefix_lengths in \[0, 3\), got -2 at prompt 0"),
    ({"cos": ANGLES, "sin": ANGLES[:4]}, r"cos and sin of one shape \[total, D_rot\] .*, got \[6, 2\] and \[4, 2\]"),
    ({"cos": ANGLES[None], "sin": ANGLES[None]}, r"shape \[total, D_rot\] for rows \[6, 4, 3\], got \[1, 6, 2\]"),
    ({"out_tokens": 11}, "out_tokens = 12, tokens and prefixes together, got 11"),
    ({"prefix": PN, "prompt_ids": PROMPTS, "out_tokens": 12}, "out_tokens = 10, .*, got 12"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on a CPU")
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_bad_arguments_have_one_clear_error(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments = {"prefix": P1, "rows": R, "cu_seqlens": CU, "max_seqlen": 4, "backend": backend} | wrong
    with pytest.raises(ValueError, match=message):
        prefix_concat_varlen(**arguments)


def test_the_reference_is_exported() -> None:
    prefix, rows = packed(3, (2, 1), torch.float64)
    expected = prefix_concat_varlen(prefix, rows, cumulative((2, 1)), 2, backend="reference")
    for got, want in zip(prefix_concat_varlen_reference(prefix, rows, cumulative((2, 1)), 2), expected, strict=True):
        assert torch.equal(got, want)
