"""prefix_concat on the reference and the PyTorch path: values, gradients, rotation, the operator's contract, memory.

The Triton kernel, packed rows and paged caches have files of their own, which take their inputs from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptengine.kernels.prefix_concat import operators, prefix_concat, prefix_concat_reference, torch_path

from .prefix_attention_cases import check_error, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the tests of kernels; those here are for CPUs
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(
    prompts: int | None, virtual: int, batch: int, length: int, dtype: torch.dtype = torch.float64, heads: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """prefix [P, H_kv, 3] (or [N, P, H_kv, 3]), rows [B, H_kv, T, 3] as a model's view of [B, T, H_kv, 3], ids."""
    generator = torch.Generator().manual_seed(virtual * 1009 + batch * 31 + length)
    shape = (virtual, heads, 3) if prompts is None else (prompts, virtual, heads, 3)
    prefix = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    rows = torch.randn(batch, length, heads, 3, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2)
    ids = None if prompts is None else torch.randint(prompts, (batch,), generator=generator, dtype=torch.int32)
    return prefix, rows.requires_grad_(), ids


def wide(
    virtual: int, batch: int, length: int, dtype: torch.dtype, prompts: int | None = None, heads: int = 2, dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `inputs` with more channels and always the same ids: of 3 prompts, rows 0, 1, 2 read 1, 2 and 2."""
    many = () if prompts is None else (prompts,)
    prefix = noise(*many, virtual, heads, dim, dtype=dtype, seed=2)
    rows = noise(batch, length, heads, dim, dtype=dtype, seed=3).transpose(1, 2)
    return prefix, rows, None if prompts is None else (torch.arange(batch) ** 2 + 1) % prompts


def rotary(*tokens: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """cos and sin [*tokens, width] that are neither of unit length nor equal in their halves: all four parts matter."""
    return {name: noise(*tokens, width, dtype=dtype, seed=seed) for seed, name in enumerate(("cos", "sin"))}


def widened(keywords: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, indices as they are."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in keywords.items()
    }


def on_device(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.to(DEVICE) for x in tensors)


def options_for(ids: torch.Tensor | None, tokens: tuple[int, ...], width: int, dtype: torch.dtype) -> dict[str, Any]:
    tables = rotary(*tokens, width=width, dtype=dtype) if width else {}
    return {"prompt_ids": ids} | {name: x.to(DEVICE) for name, x in tables.items()}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(function: Any, prefix: torch.Tensor, rows: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Output and both gradients, for a gradient of the output that differs everywhere."""
    leaves = prefix.detach().requires_grad_(), rows.detach().requires_grad_()
    out = function(*leaves, **kwargs)
    of_out = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, of_out)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_by_hand(backend: str) -> None:
    prefix, rows, ids = inputs(3, 2, 4, 5)
    assert ids is not None
    out = prefix_concat(prefix, rows, prompt_ids=ids, backend=backend)
    one = prefix_concat(prefix[1], rows, backend=backend)
    for b in range(4):
        for h in range(2):
            assert torch.equal(out[b, h, :2], prefix[ids[b], :, h])
            assert torch.equal(one[b, h, :2], prefix[1, :, h])
            assert torch.equal(out[b, h, 2:], rows[b, h])
            assert torch.equal(one[b, h, 2:], rows[b, h])


@pytest.mark.parametrize("prompts", [None, 1, 4])
@pytest.mark.parametrize(
    ("virtual", "batch", "length"), [(5, 3, 7), (0, 3, 7), (5, 3, 0), (5, 0, 7), (0, 0, 0), (1, 1, 1)]
)
def test_equals_reference(prompts: int | None, virtual: int, batch: int, length: int) -> None:
    prefix, rows, ids = inputs(prompts, virtual, batch, length)
    got = run(prefix_concat, prefix, rows, prompt_ids=ids)
    expected = run(prefix_concat_reference, prefix, rows, prompt_ids=ids)
    assert got[0].is_contiguous()
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-13, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.one_of(st.none(), st.integers(1, 4)),
    virtual=st.integers(0, 6),
    batch=st.integers(0, 5),
    length=st.integers(0, 6),
    heads=st.integers(1, 3),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_any_shape_and_dtype_equals_reference(
    prompts: int | None, virtual: int, batch: int, length: int, heads: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    prefix, rows, ids = inputs(prompts, virtual, batch, length, heads=heads)
    prefix, rows = prefix.detach().to(dtypes[0]), rows.detach().to(dtypes[1])
    got = run(prefix_concat, prefix, rows, prompt_ids=ids)
    expected = run(prefix_concat_reference, prefix, rows, prompt_ids=ids)
    assert [x.dtype for x in got] == [dtypes[1], dtypes[0], dtypes[1]]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    torch.testing.assert_close(got[1], expected[1], rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prompts", [None, 3])
def test_prefix_gradient_is_summed_in_float32(dtype: torch.dtype, prompts: int | None) -> None:
    """Over 600 rows: as close to float64 as one rounding of the sum, and no further off than expand + cat."""
    prefix, rows, ids = inputs(prompts, 4, 600, 1, dtype)
    of_out = torch.rand(600, 2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.5

    def gradient(function: Any, *tensors: torch.Tensor, of_out: torch.Tensor = of_out) -> torch.Tensor:
        return torch.autograd.grad(function(*tensors, prompt_ids=ids), tensors[0], of_out)[0]

    exact = gradient(prefix_concat_reference, prefix.double(), rows.double(), of_out=of_out.double())
    plain = (gradient(prefix_concat_reference, prefix, rows) - exact).abs().max()
    ours = (gradient(prefix_concat, prefix, rows) - exact).abs().max()
    rounding = exact.abs().max() * (torch.finfo(dtype).eps / 2 + 600 * torch.finfo(torch.float32).eps / 2)
    assert ours <= rounding
    assert ours <= 3 * plain + rounding


def test_a_prompt_nobody_reads_has_gradient_zero() -> None:
    prefix, rows, _ = inputs(3, 2, 4, 1)
    _, of_prefix, _ = run(prefix_concat, prefix, rows, prompt_ids=torch.tensor([2, 0, 2, 2]))
    assert of_prefix.flatten(1).any(1).tolist() == [True, False, True]


def test_one_bad_row_stays_in_its_prompt() -> None:
    """A NaN in the gradient of one row reaches its own prompt and no other."""
    prefix, rows, _ = inputs(2, 2, 2, 1)
    out = prefix_concat(prefix, rows, prompt_ids=torch.tensor([0, 1]))
    of_out = torch.ones_like(out)
    of_out[1] = torch.nan
    (of_prefix,) = torch.autograd.grad(out, prefix, of_out)
    assert of_prefix.flatten(1).isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("prompts", [None, 3])
def test_gradcheck(prompts: int | None, turned: bool, backend: str) -> None:
    prefix, rows, ids = inputs(prompts, 2, 3, 2)
    options = {"prompt_ids": ids, "backend": backend, **(rotary(3, 2, width=2) if turned else {})}
    assert torch.autograd.gradcheck(lambda p, r: prefix_concat(p, r, **options), (prefix, rows))


@pytest.mark.parametrize("prompts", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("virtual", "length", "width"), [(2, 4, 0), (0, 4, 0), (2, 0, 0), (2, 4, 2)])
def test_opcheck(prompts: int | None, dtype: torch.dtype, virtual: int, length: int, width: int) -> None:
    prefix, rows, ids = inputs(prompts, virtual, 5, length, dtype)
    tables = tuple(rotary(5, length, width=width, dtype=dtype).values()) if width else (None, None)
    torch.library.opcheck(operators._dense, (prefix, rows, ids, *tables, False))
    of_out = torch.randn(5, 2, virtual + length, 3, dtype=dtype)
    torch.library.opcheck(operators._sum, (of_out[:, :, :virtual], ids, prompts or 0, torch.float32, False))
    if width:
        torch.library.opcheck(operators._rotate_back, (of_out[:, :, virtual:], *tables, False))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("prompts", [None, 3])
def test_compiles_as_one_graph(compiler: str, turned: bool, prompts: int | None) -> None:
    torch.compiler.reset()
    prefix, rows, ids = inputs(prompts, 2, 4, 3, torch.float32)
    options = {"prompt_ids": ids, **(rotary(3, width=2, dtype=torch.float32) if turned else {})}
    compiled = torch.compile(prefix_concat, fullgraph=True, backend=compiler)
    torch.testing.assert_close(run(compiled, prefix, rows, **options), run(prefix_concat, prefix, rows, **options))


def test_strides_do_not_matter_and_nothing_is_shared() -> None:
    prefix, rows = (x.detach() for x in inputs(None, 2, 4, 5)[:2])
    expanded = rows[:1].expand(4, -1, -1, -1)  # stride 0
    strided = prefix.flip(0).transpose(0, 1).contiguous().transpose(0, 1)
    out = prefix_concat(strided, expanded)
    assert torch.equal(out, prefix_concat_reference(strided, expanded))
    kept = rows.clone()
    out.zero_()
    assert torch.equal(rows, kept)


def test_gradients_accumulate_apart() -> None:
    """The gradient of rows is a view of the incoming one: adding to a leaf's gradient must not write through it."""
    prefix, rows, _ = inputs(None, 2, 4, 5)
    out = prefix_concat(prefix, rows)
    of_out = torch.ones_like(out)
    for _ in range(3):
        out.backward(of_out, retain_graph=True)
    assert of_out.eq(1.0).all()
    assert rows.grad is not None
    assert rows.grad.eq(3.0).all()


def test_prefix_is_not_summed_unless_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, rows, _ = inputs(None, 2, 4, 5)
    monkeypatch.setattr(torch_path, "sum_rows", lambda *args: pytest.fail("summed"))
    prefix_concat(prefix.detach(), rows).sum().backward()
    with pytest.raises(pytest.fail.Exception, match="summed"):
        prefix_concat(prefix, rows).sum().backward()


def test_keeps_nothing_but_the_ids() -> None:
    prefix, rows, ids = inputs(3, 2, 4, 5)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        prefix_concat(prefix, rows, prompt_ids=ids)
        prefix_concat(prefix[0], rows)
    assert ids is not None
    assert sum(x.numel() for x in saved if x.is_floating_point()) == 0
    assert [x.data_ptr() for x in saved if not x.is_floating_point()] == [ids.data_ptr()]


@pytest.mark.parametrize("prompts", [None, 3])
def test_same_bits_every_time(prompts: int | None) -> None:
    prefix, rows, ids = wide(64, 48, 32, torch.float32, prompts, heads=8)
    options = {"prompt_ids": ids, **rotary(32, width=6, dtype=torch.float32)}
    first = run(prefix_concat, prefix, rows, **options)
    for _ in range(20):
        again = run(prefix_concat, prefix, rows, **options)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 6, 16])
@pytest.mark.parametrize("length", [0, 1, 17, 64])
@pytest.mark.parametrize("virtual", [0, 1, 7, 100])
def test_rotation(virtual: int, length: int, width: int, dtype: torch.dtype) -> None:
    """Against float64, at most 1.5 times (gradients 3 times) as far off as the specification in the same dtype."""
    prefix, rows, ids = wide(virtual, 4, length, dtype, prompts=3 if length == 17 else None)
    options = {"prompt_ids": ids, **rotary(*(() if length == 17 else (4,)), length, width=width, dtype=dtype)}
    with poisoned():
        got = run(prefix_concat, prefix, rows, **options, backend="torch")
    stock = run(prefix_concat_reference, prefix, rows, **options)
    exact = run(prefix_concat_reference, prefix.double(), rows.double(), **widened(options))
    for name, factor, *tensors in zip(("out", "prefix", "rows"), (1.5, 3.0, 3.0), got, stock, exact, strict=True):
        check_error(*tensors, factor, name)
    assert torch.equal(got[0][:, :, :virtual], stock[0][:, :, :virtual])
    assert torch.equal(got[0][..., width:], stock[0][..., width:])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rotation_is_that_of_transformers(backend: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    prefix, rows, _ = wide(5, 3, 7, torch.float64)
    angle = torch.outer(torch.arange(5, 12).double(), 10000.0 ** -(torch.arange(8) / 8).double()).repeat(1, 2)
    cos, sin = angle.cos().expand(3, -1, -1), angle.sin().expand(3, -1, -1)  # as its rotary module returns them
    expected, _ = apply_rotary_pos_emb(rows, rows, cos, sin)
    out = prefix_concat(prefix, rows, cos=cos, sin=sin, backend=backend)
    torch.testing.assert_close(out[:, :, 5:], expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(out[1, :, :5], prefix.transpose(0, 1))


def test_rotation_is_rounded_once() -> None:
    """In bfloat16 the result is that of float32 to half a unit in the last place; transformers rounds four times."""
    prefix, rows, _ = wide(1, 8, 64, torch.bfloat16)
    tables = rotary(64, width=16, dtype=torch.float32)
    out = prefix_concat(prefix, rows, **tables)[:, :, 1:]
    once = prefix_concat(prefix.double(), rows.double(), **widened(tables))[:, :, 1:]
    assert ((out.double() - once).abs() <= once.abs() * torch.finfo(torch.bfloat16).eps / 2 * 1.001 + 1e-6).all()


def test_prefix_gradient_is_the_sum_of_single_rows() -> None:
    prefix, rows, ids = wide(7, 5, 3, torch.float64, prompts=3)
    assert ids is not None
    tables = rotary(5, 3, width=6)
    of_out = noise(5, 2, 10, 16)

    def gradient(chosen: slice) -> torch.Tensor:
        leaf = prefix.detach().requires_grad_()
        own = {name: x[chosen] for name, x in tables.items()}
        out = prefix_concat(leaf, rows[chosen], prompt_ids=ids[chosen], **own)
        return torch.autograd.grad(out, leaf, of_out[chosen])[0]

    parts = sum((gradient(slice(b, b + 1)) for b in range(5)), torch.zeros_like(prefix))
    torch.testing.assert_close(gradient(slice(None)), parts, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("prompts", [1, 2, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_by_prompt_on_a_cpu(prompts: int, dtype: torch.dtype) -> None:
    of_head = noise(32, 2, 9, 16, dtype=dtype)[:, :, :7]
    ids = torch.arange(32) * 5 % prompts
    with poisoned():
        got = torch_path.sum_rows(of_head, ids, prompts, dtype)
    exact = torch.stack([of_head[ids == prompt].double().sum(0).transpose(0, 1) for prompt in range(prompts)])
    assert got.is_contiguous()
    check_error(got, exact.to(dtype), exact, 1.5)
    if prompts == 32:  # one reader each: nothing is added, so nothing is rounded
        assert torch.equal(got.double(), exact)


P1, PN, R = torch.zeros(2, 4, 3), torch.zeros(5, 2, 4, 3), torch.zeros(6, 4, 7, 3)
IDS = torch.zeros(6, dtype=torch.int64)
ANGLES = torch.zeros(7, 2)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": R[0]}, r"rows of shape \[B, H_kv, T, D\], got \[4, 7, 3\]"),
    ({"prefix": P1[0]}, r"prefix of shape \[P, H_kv, D\], got \[4, 3\]"),
    ({"prefix": PN}, r"prompt_ids with a prefix of shape \[5, 2, 4, 3\]"),
    ({"prompt_ids": IDS}, r"prefix of shape \[N >= 1, P, H_kv, D\] \(prompt_ids was given\), got \[2, 4, 3\]"),
    ({"prefix": PN[:0], "prompt_ids": IDS}, r"prefix of shape \[N >= 1, .* got \[0, 2, 4, 3\]"),
    ({"prefix": P1[:, :3]}, r"prefix with rows' H_kv = 4 and D = 3, got \[2, 3, 3\]"),
    ({"prefix": P1[..., :2]}, r"prefix with rows' H_kv = 4 and D = 3, got \[2, 4, 2\]"),
    ({"prefix": P1.int()}, "prefix in float64, .*, got torch.int32"),
    ({"rows": R.bool()}, "rows in float64, .*, got torch.bool"),
    ({"prefix": P1.to("meta")}, "prefix on rows' device cpu, got meta"),
    ({"prefix": PN, "prompt_ids": IDS.float()}, "prompt_ids of dtype torch.int32 or torch.int64, got torch.float32"),
    ({"prefix": PN, "prompt_ids": IDS[:5]}, r"prompt_ids of shape \[B = 6\], got \[5\]"),
    ({"prefix": PN, "prompt_ids": IDS.to("meta")}, "prompt_ids on rows' device cpu, got meta"),
    ({"prefix": PN, "prompt_ids": IDS - 1}, r"prompt_ids in \[0, 5\), got -1 at row 0"),
    ({"prefix": PN, "prompt_ids": IDS + 5}, r"prompt_ids in \[0, 5\), got 5 at row 0"),
    ({"cos": ANGLES}, "expected both cos and sin or neither, got cos alone"),
    ({"sin": ANGLES}, "expected both cos and sin or neither, got sin alone"),
    (
        {"cos": ANGLES[:6], "sin": ANGLES[:6]},
        r"shape \[T, D_rot\] or \[B, T, D_rot\] for rows \[6, 4, 7, 3\], got \[6, 2\]",
    ),
    ({"cos": ANGLES, "sin": ANGLES[None]}, r"cos and sin of one shape .*, got \[7, 2\] and \[1, 7, 2\]"),
    ({"cos": ANGLES.int(), "sin": ANGLES}, "cos in float64, .*, got torch.int32"),
    ({"cos": ANGLES, "sin": ANGLES.to("meta")}, "sin on rows' device cpu, got meta"),
    ({"cos": ANGLES[:, :1], "sin": ANGLES[:, :1]}, "an even D_rot from 2 to D = 3, got 1"),
    ({"cos": ANGLES.repeat(1, 2), "sin": ANGLES.repeat(1, 2)}, "an even D_rot from 2 to D = 3, got 4"),
    ({"backend": "fast"}, "expected a backend of 'reference', 'torch', 'triton', got 'fast'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bad_arguments_have_one_clear_error(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments = {"prefix": P1, "rows": R, "backend": backend} | wrong
    with pytest.raises(ValueError, match=message):
        prefix_concat(**arguments)


def test_compiled_code_still_checks_the_ids() -> None:
    """The check sits inside the operator: in the public function the compiler would have dropped it."""
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"prompt_ids in \[0, 5\), got -1 at row 0"):
        torch.compile(prefix_concat, fullgraph=True, backend="eager")(PN, R, prompt_ids=IDS - 1)
