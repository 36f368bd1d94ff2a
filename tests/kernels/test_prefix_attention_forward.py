"""prefix_attention, forward: the PyTorch path against the fp64 specification, in every dtype and with every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

from .prefix_attention_cases import (
    DTYPES,
    HEADS,
    LENGTHS,
    OPTIONS,
    check_error,
    cumulative,
    gradients,
    index,
    leaves,
    noise,
    packed,
    plain_row,
    plain_varlen,
    prefixes,
)

PROMPTS = index(0, 1, -1, 2, 1)  # of the five rows of LENGTHS
SIZES = index(16, 3, 0)


def both(tensors: list[Any], lengths: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """The PyTorch path in the tensors' dtype and the specification in fp64."""
    cu, longest = cumulative(lengths), max(lengths, default=0)
    wide = [None if x is None else x.double() for x in tensors]
    got = prefix_attention_varlen(*tensors, cu, longest, backend="torch", **options)
    exact = prefix_attention_varlen(*wide, cu, longest, backend="reference", **options)
    assert isinstance(got, Tensor)
    assert isinstance(exact, Tensor)
    return got, exact


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [0, 1, 7, 16, 100])
def test_every_shape(size: int, heads: tuple[int, int], dim: int, causal: bool) -> None:
    tensors = packed(heads=heads, dim=dim, dtype=torch.float32)
    tensors += prefixes(size, heads=heads, dim=dim, dtype=torch.float32)
    got, exact = both(tensors, LENGTHS, causal=causal)
    stock = plain_varlen(*tensors[:3], [(tensors[3], tensors[4])] * 5, LENGTHS, causal=causal)
    check_error(got, stock, exact, 1.5)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_above_zero_gave_nan(scale: float) -> None:
    """PyTorch's fused kernel scales the hidden scores of -inf, too."""
    tensors = leaves(*packed(dtype=torch.float32), *prefixes(7, dtype=torch.float32))
    got, exact = both(tensors, LENGTHS, scale=scale)
    stock = plain_varlen(*tensors[:3], [(tensors[3], tensors[4])] * 5, LENGTHS, scale=scale)
    check_error(got, stock, exact, 1.5)
    for ours, theirs in zip(gradients(got, tensors), gradients(exact, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_every_option_and_dtype(option: str, dtype: torch.dtype, heads: str) -> None:
    tensors = packed(heads=HEADS[heads], dtype=dtype) + prefixes(16, heads=HEADS[heads], dtype=dtype)
    keywords = OPTIONS[option](4)
    got, exact = both(tensors, LENGTHS, **keywords)
    assert got.dtype == dtype
    stock = plain_varlen(*tensors[:3], [(tensors[3], tensors[4])] * 5, LENGTHS, **keywords)
    check_error(got, stock, exact, 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "window", "softcap", "everything"])
def test_several_prompts(option: str, dtype: torch.dtype) -> None:
    tensors = packed(dtype=dtype) + prefixes(3, 16, dtype=dtype)
    keywords = OPTIONS[option](4)
    got, exact = both(tensors, LENGTHS, prompt_ids=PROMPTS, prefix_lengths=SIZES, **keywords)
    rows = [None if n < 0 else (tensors[3][n, : SIZES[n]], tensors[4][n, : SIZES[n]]) for n in PROMPTS.tolist()]
    check_error(got, plain_varlen(*tensors[:3], rows, LENGTHS, **keywords), exact, 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "window", "softcap", "everything"])
def test_rows_as_prefixes(option: str, dtype: torch.dtype) -> None:
    """Rows 0, 1 and 6 are read, row 2 neither reads nor is read; rows 3 and 6 are empty."""
    lengths, readers = (7, 3, 20, 0, 33, 5, 0, 2), index(-1, -1, -1, 0, 0, 1, -1, 6)
    tensors = packed(lengths, dtype=dtype)
    keywords = OPTIONS[option](4)
    got, exact = both([*tensors, None, None], lengths, prefix_rows=readers, **keywords)
    starts = cumulative(lengths).tolist()
    rows = [
        None if n < 0 else (tensors[1][starts[n] : starts[n + 1]], tensors[2][starts[n] : starts[n + 1]])
        for n in readers.tolist()
    ]
    check_error(got, plain_varlen(*tensors, rows, lengths, **keywords), exact, 1.5)


@pytest.mark.parametrize("option", ["causal", "softcap", "everything"])
@pytest.mark.parametrize("dim_v", [8, 24])
def test_values_of_another_width(dim_v: int, option: str) -> None:
    tensors = packed(dim_v=dim_v, dtype=torch.float32) + prefixes(7, dim_v=dim_v, dtype=torch.float32)
    keywords = OPTIONS[option](4)
    got, exact = both(tensors, LENGTHS, **keywords)
    assert got.shape == (sum(LENGTHS), 4, dim_v)
    check_error(got, plain_varlen(*tensors[:3], [(tensors[3], tensors[4])] * 5, LENGTHS, **keywords), exact, 1.5)


@pytest.mark.parametrize("option", OPTIONS)
def test_log_sum_exp(option: str) -> None:
    """It is that of the scores of prefix, row and sinks: exp(score - lse) sums to one over them."""
    q, k, v = packed()
    pk, pv = prefixes(7)
    keywords = OPTIONS[option](4)
    cu = cumulative(LENGTHS)
    _, exact = prefix_attention_varlen(q, k, v, pk, pv, cu, 129, return_lse=True, backend="reference", **keywords)
    _, lse = prefix_attention_varlen(q, k, v, pk, pv, cu, 129, return_lse=True, backend="torch", **keywords)
    assert lse.shape == (4, sum(LENGTHS))
    assert not lse.requires_grad
    torch.testing.assert_close(lse, exact, rtol=1e-12, atol=1e-12)
    if "window" not in keywords and "sinks" not in keywords:  # values of ones: out is one, whatever the weights
        ones = torch.ones_like(v), torch.ones_like(pv)
        out = prefix_attention_varlen(q, k, ones[0], pk, ones[1], cu, 129, backend="torch", **keywords)
        torch.testing.assert_close(out, torch.ones_like(out))
    single = q.float(), k.float(), v.float(), pk.float(), pv.float()
    assert prefix_attention_varlen(*single, cu, 129, return_lse=True, **keywords)[1].dtype == torch.float32


def dense_exact(
    tensors: list[Tensor], starts: list[int], ends: list[int], prompts: list[Any], **keywords: Any
) -> Tensor:
    """The stock way, row by row: each row's tokens cut out of the batch, padding left at zero."""
    q, k, v = tensors[:3]
    gap = k.shape[2] - q.shape[2]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for row, (start, end, prefix) in enumerate(zip(starts, ends, prompts, strict=True)):
        first = max(start, gap)
        if end <= first:
            continue
        pk, pv = (k[row, :, :0].transpose(0, 1), v[row, :, :0].transpose(0, 1)) if prefix is None else prefix
        tokens = (x[row, :, start:end].transpose(0, 1) for x in (k, v))
        queries = q[row, :, first - gap : end - gap].transpose(0, 1)
        one = plain_row(queries, *tokens, pk, pv, first=first - start, **keywords)
        out[row, :, first - gap : end - gap] = one.transpose(0, 1)
    return out


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("q_len", "k_len"), [(9, 9), (1, 9), (4, 9), (1, 1)])
@pytest.mark.parametrize("padding", ["none", "left", "right", "both sides", "row of padding"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dense(option: str, q_len: int, k_len: int, padding: str, backend: str) -> None:
    """A stock batch, a step of generation and a chunk of prefill, padded on any side, with a prompt per row or none."""
    tensors = [noise(3, heads, length, 16, seed=length) for heads, length in ((4, q_len), (2, k_len), (2, k_len))]
    pk, pv = prefixes(2, 5)
    starts, ends = {
        "none": ([0, 0, 0], [k_len] * 3),
        "left": ([0, 3, k_len - 1], [k_len] * 3),
        "right": ([0, 0, 0], [k_len, k_len - 1, 1]),
        "both sides": ([0, 2, 1], [k_len, k_len - 1, k_len]),
        "row of padding": ([0, k_len, 0], [k_len, k_len, 0]),
    }[padding]
    starts = [min(start, end) for start, end in zip(starts, ends, strict=True)]  # where the batch is of one slot
    keywords = OPTIONS[option](4)
    bounds: dict[str, Any] = {} if padding == "none" else {"key_starts": index(*starts), "key_lengths": index(*ends)}
    out, lse = prefix_attention(
        *tensors, pk, pv, prompt_ids=index(1, -1, 0), prefix_lengths=index(5, 2), backend=backend, return_lse=True,
        **bounds, **keywords,
    )  # fmt: skip
    exact = dense_exact(tensors, starts, ends, [(pk[1, :2], pv[1, :2]), None, (pk[0], pv[0])], **keywords)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    slots = torch.arange(k_len - q_len, k_len)
    real = (slots >= torch.tensor(starts)[:, None]) & (slots < torch.tensor(ends)[:, None])  # [B, Tq]
    assert lse.transpose(1, 2)[real].isfinite().all()
    assert (lse.transpose(1, 2)[~real] == float("-inf")).all()
    assert (out.transpose(1, 2)[~real] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_in_every_dtype(dtype: torch.dtype) -> None:
    tensors = [noise(3, heads, 40, 64, dtype=dtype, seed=heads) for heads in (4, 2, 2)] + prefixes(
        16, dim=64, dtype=dtype
    )
    got = prefix_attention(*tensors, key_starts=index(0, 7, 39))
    exact = prefix_attention(*(x.double() for x in tensors), key_starts=index(0, 7, 39), backend="reference")
    assert isinstance(got, Tensor)
    assert isinstance(exact, Tensor)
    assert got.dtype == dtype
    stock = dense_exact(tensors[:3], [0, 7, 39], [40] * 3, [(tensors[3], tensors[4])] * 3)
    check_error(got, stock, exact, 1.5)


def test_dense_equals_packed() -> None:
    lengths = (3, 9, 5)
    q, k, v = packed(lengths)
    pk, pv = prefixes(7)
    flat = prefix_attention_varlen(q, k, v, pk, pv, cumulative(lengths), 9)
    batch = [torch.zeros(3, x.shape[1], 9, 16, dtype=x.dtype) for x in (q, k, v)]
    for row, (begin, length) in enumerate(zip(cumulative(lengths).tolist(), lengths, strict=False)):
        for target, x in zip(batch, (q, k, v), strict=True):
            target[row, :, 9 - length :] = x[begin : begin + length].transpose(0, 1)
    out = prefix_attention(*batch, pk, pv, key_starts=index(6, 0, 4))
    rows = [out[row, :, 9 - length :].transpose(0, 1) for row, length in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(rows), flat, rtol=1e-12, atol=1e-12)


def test_nothing_to_do() -> None:
    """No rows, only rows of length 0, no queries, no batch."""
    pk, pv = prefixes(7)
    for lengths in ((), (0,), (0, 0, 0)):
        for prefix in ((pk, pv), (None, None)):
            for backend in ("reference", "torch"):
                out, lse = prefix_attention_varlen(
                    *packed(lengths), *prefix, cumulative(lengths), 0, backend=backend, return_lse=True
                )
                assert out.shape == (0, 4, 16)
                assert lse.shape == (4, 0)
    for batch, q_len, k_len in ((0, 3, 3), (2, 0, 5), (2, 0, 0)):
        tensors = [noise(batch, heads, length, 16) for heads, length in ((4, q_len), (2, k_len), (2, k_len))]
        for backend in ("reference", "torch"):
            assert prefix_attention(*tensors, pk, pv, backend=backend).shape == (batch, 4, q_len, 16)


def test_no_prompts_to_choose_from() -> None:
    """Regression: the specification looked into an empty stack of prompts for rows that read none."""
    tensors = packed((3, 2))
    for backend in ("reference", "torch"):
        none = prefix_attention_varlen(*tensors, None, None, cumulative((3, 2)), 3, backend=backend)
        got = prefix_attention_varlen(
            *tensors, *prefixes(0, 4), cumulative((3, 2)), 3, prompt_ids=index(-1, -1), backend=backend
        )
        torch.testing.assert_close(got, none, rtol=0, atol=0)


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(data=st.data())
def test_any_packed_batch(data: st.DataObject) -> None:
    """Generated shapes: any rows, prompts of any length chosen in any way, any options together."""
    lengths = tuple(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    heads, dim = (kv_heads * groups, kv_heads), data.draw(st.sampled_from([1, 8, 11]))
    count, size = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 20))
    keywords = data.draw(st.sampled_from(sorted(OPTIONS)).map(lambda name: OPTIONS[name](heads[0])))
    tensors = packed(lengths, heads, dim)
    mode = data.draw(st.sampled_from(["given", "rows", "none"]))
    if mode == "given":
        ids = data.draw(st.lists(st.integers(-1, count - 1), min_size=len(lengths), max_size=len(lengths)))
        sizes = data.draw(st.lists(st.integers(0, size), min_size=count, max_size=count))
        prefix: list[Any] = prefixes(count, size, heads=heads, dim=dim)
        keywords |= {"prompt_ids": index(*ids), "prefix_lengths": index(*sizes)}
        rows = [None if n < 0 else (prefix[0][n, : sizes[n]], prefix[1][n, : sizes[n]]) for n in ids]
    elif mode == "rows":
        prefix = [None, None]
        ids = [-1] * len(lengths)
        for row in range(1, len(lengths)):
            ids[row] = data.draw(st.sampled_from([n for n in range(-1, row) if n < 0 or ids[n] < 0]))
        starts = cumulative(lengths).tolist()
        rows = [None if n < 0 else tuple(x[starts[n] : starts[n + 1]] for x in tensors[1:]) for n in ids]  # type: ignore[misc]
        keywords |= {"prefix_rows": index(*ids)}
    else:
        prefix, rows = [None, None], [None] * len(lengths)
    got, exact = both([*tensors, *prefix], lengths, **keywords)
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    score_options = {key: value for key, value in keywords.items() if not key.startswith(("prompt", "prefix"))}
    torch.testing.assert_close(exact, plain_varlen(*tensors, rows, lengths, **score_options), rtol=1e-11, atol=1e-11)
