"""prefix_attention as an operator: gradcheck, opcheck, torch.compile, what it keeps, what may lie in padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

from .prefix_attention_cases import OPTIONS, cumulative, gradients, index, leaves, noise, packed, prefixes

LENGTHS = (3, 0, 5, 2)
OPS = torch.ops.ptengine

# Packed calls by name: how many prompts of how many tokens are given, and the index tensors.
PACKED: dict[str, tuple[tuple[int, ...] | None, dict[str, Tensor]]] = {
    "one prefix": ((4,), {}),
    "prompts": ((3, 4), {"prompt_ids": index(2, 0, -1, 0), "prefix_lengths": index(4, 0, 2)}),
    "rows": (None, {"prefix_rows": index(-1, 0, 0, -1)}),
    "no prefix": (None, {}),
}
DENSE: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "padded": {"key_starts": index(0, 2, 1), "key_lengths": index(5, 5, 4)},
    "prompts": {"prompt_ids": index(1, -1, 0), "prefix_lengths": index(3, 4)},
}


def packed_inputs(shape: tuple[int, ...] | None, **keywords: Any) -> list[Tensor]:
    return packed(LENGTHS, **keywords) + ([] if shape is None else prefixes(*shape, **keywords))


def packed_call(case: str, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of tensors alone, and tensors for it."""
    shape, indices = PACKED[case]

    def call(*tensors: Tensor) -> Any:
        prefix = tensors[3:] or (None, None)
        return prefix_attention_varlen(*tensors[:3], *prefix, cumulative(LENGTHS), 5, **indices, **options)

    return call, packed_inputs(shape, dim=4)


def dense_call(case: str, q_len: int = 3, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    indices = DENSE[case]
    tensors = [noise(3, heads, length, 4, seed=length) for heads, length in ((4, q_len), (2, 5), (2, 5))]
    shape = (2, 4) if case == "prompts" else (4,)

    def call(*tensors: Tensor) -> Any:
        return prefix_attention(*tensors, **indices, **options)  # type: ignore[arg-type]

    return call, tensors + prefixes(*shape, dim=4)


@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "softcap", "sinks", "everything"])
@pytest.mark.parametrize("case", PACKED)
def test_gradcheck_packed(case: str, option: str) -> None:
    call, tensors = packed_call(case, **OPTIONS[option](4))
    assert torch.autograd.gradcheck(call, leaves(*tensors), fast_mode=True)


@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "softcap", "everything"])
@pytest.mark.parametrize("case", DENSE)
def test_gradcheck_dense(case: str, option: str) -> None:
    call, tensors = dense_call(case, **OPTIONS[option](4))
    assert torch.autograd.gradcheck(call, leaves(*tensors), fast_mode=True)


def test_gradcheck_in_full() -> None:
    """Every entry of the Jacobian, once for each public function."""
    for call, tensors in (packed_call("rows"), dense_call("padded", q_len=2)):
        assert torch.autograd.gradcheck(call, leaves(*tensors))


def rules(option: str) -> tuple[Any, ...]:
    """The operators' plain arguments, in their order."""
    given = {"causal": True, "scale": 0.25, "window": None, "window_includes_prefix": True, "softcap": None}
    constants = {"sinks": None, "alibi_slopes": None, "relative_bias": None}
    return tuple((given | constants | OPTIONS[option](4)).values())


def passes(operator: Any, arguments: tuple[Any, ...]) -> None:
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def turned(x: Tensor) -> Tensor:
    """The same numbers in another layout."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


# What follows the rules: the longest row of packed calls, no kernel, deterministic.
PACKED_HOW, DENSE_HOW = (max(LENGTHS), False, True), (False, True)

# Layout, dtype and option: opcheck is slow, so each case runs with two sets that share nothing.
SETS = [(torch.clone, torch.float32, "causal"), (turned, torch.bfloat16, "everything")]


@pytest.mark.parametrize(("layout", "dtype", "option"), SETS, ids=["contiguous", "transposed"])
@pytest.mark.parametrize("case", PACKED)
def test_opcheck_packed(case: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, option: str) -> None:
    """Regression: gradients took the strides of their inputs where the fake operator promised contiguous ones."""
    shape, given = PACKED[case]
    shape = shape if shape is None or len(shape) == 2 else (1, *shape)
    indices = [given.get(name) for name in ("prompt_ids", "prefix_rows", "prefix_lengths")]
    tensors: list[Any] = [layout(x) for x in packed_inputs(shape, dtype=dtype)]
    tensors += [None, None] if shape is None else []
    common = (cumulative(LENGTHS), *indices)
    inputs = [None if x is None else x.detach().requires_grad_() for x in tensors]
    passes(OPS.prefix_attention_varlen.default, (*inputs, *common, *rules(option), *PACKED_HOW))
    out, lse = OPS.prefix_attention_varlen(*tensors, *common, *rules(option), *PACKED_HOW)
    for rows_need_grad in (True, False):
        passes(
            OPS.prefix_attention_varlen_backward.default,
            (torch.ones_like(out), *tensors, out, lse, *common, *rules(option), *PACKED_HOW, rows_need_grad),
        )


@pytest.mark.parametrize(("layout", "dtype", "option"), SETS, ids=["contiguous", "transposed"])
@pytest.mark.parametrize("case", DENSE)
def test_opcheck_dense(case: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, option: str) -> None:
    indices = [DENSE[case].get(name) for name in ("key_lengths", "key_starts", "prompt_ids", "prefix_lengths")]
    q, k, v, pk, pv = (x.to(dtype) for x in dense_call(case)[1])
    if pk.dim() == 3:
        pk, pv = pk[None], pv[None]
    tensors = [q.transpose(1, 2), *(layout(x) for x in (k, v, pk, pv))]  # queries are token-major inside
    inputs = [x.detach().requires_grad_() for x in tensors]
    passes(OPS.prefix_attention.default, (*inputs, *indices, *rules(option), *DENSE_HOW))
    out, lse = OPS.prefix_attention(*tensors, *indices, *rules(option), *DENSE_HOW)
    for rows_need_grad in (True, False):
        passes(
            OPS.prefix_attention_backward.default,
            (torch.ones_like(out), *tensors, out, lse, *indices, *rules(option), *DENSE_HOW, rows_need_grad),
        )


@pytest.mark.parametrize("case", [*(("packed", name) for name in PACKED), *(("dense", name) for name in DENSE)])
def test_compile(case: tuple[str, str]) -> None:
    """One graph without breaks, with the eager results."""
    make = packed_call if case[0] == "packed" else dense_call
    call, tensors = make(case[1], **OPTIONS["window"](4))
    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        inputs = leaves(*tensors)
        out = function(*inputs)
        results.append([out.detach(), *gradients(out, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def saved_bytes(rows: int, size: int) -> int:
    """Bytes that autograd keeps between the passes for `rows` rows of two tokens behind a prefix of `size`."""
    inputs = leaves(*packed([2] * rows, dtype=torch.float32), *prefixes(size, dtype=torch.float32))
    cu = cumulative([2] * rows)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = prefix_attention_varlen(*inputs, cu, 2)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return sum(kept.values())


def test_prefix_is_kept_once() -> None:
    """No copy per row outlives the call: a longer prefix costs its own bytes, however many rows read it."""
    own = 2 * (64 - 8) * 2 * 16 * 4  # keys and values of 56 more tokens, two heads of 16, fp32
    for rows in (1, 8, 64):
        assert saved_bytes(rows, 64) - saved_bytes(rows, 8) == own


@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "softcap", "everything"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_lies_beyond_a_prompt_is_not_read(option: str, poison: float) -> None:
    clean, sizes = packed_inputs((3, 6)), index(6, 0, 2)
    dirty = [x.clone() for x in clean]
    for x in dirty[3:]:
        x[1] = poison
        x[2, 2:] = poison
    results = []
    for tensors in (clean, dirty):
        inputs = leaves(*tensors)
        out = prefix_attention_varlen(
            *inputs, cumulative(LENGTHS), 5, prompt_ids=index(2, 0, -1, 1), prefix_lengths=sizes, **OPTIONS[option](4)
        )  # type: ignore[call-arg]
        assert isinstance(out, Tensor)
        results.append([out.detach(), *gradients(out, inputs)])
    for got, exact in zip(*results, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, exact)


@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "softcap", "everything"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("q_len", [5, 2, 1])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_lies_in_padding_is_not_read(option: str, poison: float, q_len: int, backend: str) -> None:
    """Regression: a weight of 0 times NaN is NaN, so padded queries, keys, values and gradients spoilt whole rows."""
    clean = [noise(3, heads, length, 16, seed=length) for heads, length in ((4, q_len), (2, 5), (2, 5))] + prefixes(4)
    padding = torch.tensor([[False] * 5, [True, True, False, False, True], [True] * 5])  # [B, Tk]
    bounds = {"key_starts": index(0, 2, 5), "key_lengths": index(5, 4, 5)}
    of_queries = padding[:, None, 5 - q_len :, None]  # [B, 1, Tq, 1]
    dirty = [
        x.masked_fill(of_queries if i == 0 else padding[:, None, :, None], poison) for i, x in enumerate(clean[:3])
    ]
    grad = noise(3, 4, q_len, 16, seed=8)
    results = []
    for tensors, weights in ((clean, grad), (dirty + clean[3:], grad.masked_fill(of_queries, poison))):
        inputs = leaves(*tensors)
        out = prefix_attention(*inputs, backend=backend, **bounds, **OPTIONS[option](4))  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, weights)])
    for got, exact in zip(*results, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, exact)


def test_rows_of_a_pack_do_not_see_each_other() -> None:
    """NaN in one row stays in it, in results and in gradients."""
    clean = packed((3, 9, 5, 4))
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[3:12] = float("nan")
    results = []
    for tensors in (clean, dirty):
        inputs = leaves(*tensors)
        out = prefix_attention_varlen(*inputs, None, None, cumulative((3, 9, 5, 4)), 9)
        assert isinstance(out, Tensor)
        results.append([out.detach(), *gradients(out, inputs)])
    for exact, got in zip(*results, strict=True):
        assert torch.equal(torch.cat([got[:3], got[12:]]), torch.cat([exact[:3], exact[12:]]))


def test_constants_get_no_gradient() -> None:
    q, k, v = packed(LENGTHS)
    given = {name: x.requires_grad_() for name, x in OPTIONS["everything"](4).items() if isinstance(x, Tensor)}
    for backend in ("torch", "reference"):
        out, lse = prefix_attention_varlen(
            *leaves(q, k, v), None, None, cumulative(LENGTHS), 5, return_lse=True, backend=backend, **given
        )  # type: ignore[call-arg]
        assert not lse.requires_grad
        out.sum().backward()
        assert all(x.grad is None for x in given.values())


def test_second_derivatives_are_refused() -> None:
    call, tensors = packed_call("one prefix")
    inputs = leaves(*tensors)
    (first,) = torch.autograd.grad(call(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), inputs[:1])
