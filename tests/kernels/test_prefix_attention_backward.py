"""prefix_attention, backward: gradients of the PyTorch path against autograd through the fp64 specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen, torch_path

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
    plain_varlen,
    prefixes,
)

PROMPTS = index(0, 1, -1, 2, 1)  # of the five rows of LENGTHS
SIZES = index(16, 3, 0)
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def run(tensors: list[Any], lengths: tuple[int, ...], backend: str, **options: Any) -> list[Tensor]:
    """Gradients of every tensor in fresh leaves."""
    inputs = leaves(*tensors)
    prefix = inputs[3:] or [None, None]
    out = prefix_attention_varlen(
        *inputs[:3], *prefix, cumulative(lengths), max(lengths, default=0), backend=backend, **options
    )
    assert isinstance(out, Tensor)
    return gradients(out, inputs)


def compare(tensors: list[Tensor], lengths: tuple[int, ...], rows: list[Any], index_options: Any, options: Any) -> None:
    """The PyTorch path and plain PyTorch, both in the tensors' dtype, against the specification in fp64."""
    got = run(tensors, lengths, "torch", **index_options, **options)
    exact = run([x.double() for x in tensors], lengths, "reference", **index_options, **options)
    inputs = leaves(*tensors)
    stock = gradients(plain_varlen(*inputs[:3], [row and row(inputs) for row in rows], lengths, **options), inputs)
    # What cancels to nothing (a query that sees one key has no gradient) still rounds like what it was summed from.
    size = max(x.abs().max().item() for x in exact if x.numel())
    for name, ours, theirs, reference in zip(NAMES, got, stock, exact, strict=False):
        assert ours.dtype == tensors[0].dtype
        check_error(ours, theirs, reference, 3.0, name, size)


def whole_prefix(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[3], inputs[4]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [0, 1, 7, 16, 100])
def test_every_shape(size: int, heads: tuple[int, int], dim: int, causal: bool) -> None:
    tensors = packed(heads=heads, dim=dim, dtype=torch.float32)
    tensors += prefixes(size, heads=heads, dim=dim, dtype=torch.float32)
    compare(tensors, LENGTHS, [whole_prefix] * 5, {}, {"causal": causal})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_and_dtype(option: str, dtype: torch.dtype) -> None:
    tensors = packed(dtype=dtype) + prefixes(16, dtype=dtype)
    compare(tensors, LENGTHS, [whole_prefix] * 5, {}, OPTIONS[option](4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "window", "softcap", "everything"])
def test_several_prompts(option: str, dtype: torch.dtype) -> None:
    """A prompt without readers, and the slots beyond a prompt's length, get a gradient of zero."""
    tensors = packed(dtype=dtype) + prefixes(4, 16, dtype=dtype)
    sizes = index(16, 3, 0, 5)

    def one(n: int) -> Any:
        return None if n < 0 else lambda inputs: (inputs[3][n, : sizes[n]], inputs[4][n, : sizes[n]])

    chosen = {"prompt_ids": PROMPTS, "prefix_lengths": sizes}
    compare(tensors, LENGTHS, [one(n) for n in PROMPTS.tolist()], chosen, OPTIONS[option](4))
    for grad in run(tensors, LENGTHS, "torch", **chosen)[3:]:
        assert grad[1, :3].any()
        assert not grad[1, 3:].any()
        assert not grad[2:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "softcap", "everything"])
def test_rows_as_prefixes(option: str, dtype: torch.dtype) -> None:
    """The gradient of a row that is read includes its readers'."""
    lengths, readers = (7, 3, 20, 0, 33, 5, 0, 2), index(-1, -1, -1, 0, 0, 1, -1, 6)
    starts = cumulative(lengths).tolist()

    def one(n: int) -> Any:
        return None if n < 0 else lambda inputs: tuple(x[starts[n] : starts[n + 1]] for x in inputs[1:3])

    compare(packed(lengths, dtype=dtype), lengths, [one(n) for n in readers.tolist()], {"prefix_rows": readers},
            OPTIONS[option](4))  # fmt: skip


@pytest.mark.parametrize("option", ["causal", "softcap", "everything"])
@pytest.mark.parametrize("dim_v", [8, 24])
def test_values_of_another_width(dim_v: int, option: str) -> None:
    tensors = packed(dim_v=dim_v, dtype=torch.float32) + prefixes(7, dim_v=dim_v, dtype=torch.float32)
    compare(tensors, LENGTHS, [whole_prefix] * 5, {}, OPTIONS[option](4))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("q_len", "k_len"), [(9, 9), (1, 9), (4, 9), (0, 9)])
@pytest.mark.parametrize("padding", [{}, {"key_starts": index(0, 3, 8), "key_lengths": index(9, 8, 9)}])
def test_dense(option: str, q_len: int, k_len: int, padding: dict[str, Tensor]) -> None:
    tensors = [noise(3, heads, length, 16, seed=length) for heads, length in ((4, q_len), (2, k_len), (2, k_len))]
    tensors += prefixes(2, 5)
    chosen = {"prompt_ids": index(1, -1, 0), "prefix_lengths": index(5, 2)}
    results = []
    for backend in ("torch", "reference"):
        inputs = leaves(*tensors)
        out = prefix_attention(*inputs, backend=backend, **padding, **chosen, **OPTIONS[option](4))  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        results.append(gradients(out, inputs))
    for name, got, exact in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_without_queries_are_zero() -> None:
    """Regression: without queries nothing wrote the gradients of keys and values, which were left uninitialised."""
    for _ in range(20):
        junk = [torch.full((3, 2, 9, 16), float("nan"), dtype=torch.float64) for _ in range(4)]
        del junk  # its memory is the likeliest to be handed out next
        inputs = leaves(noise(3, 4, 0, 16), noise(3, 2, 9, 16), noise(3, 2, 9, 16), *prefixes(5))
        out = prefix_attention(*inputs)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        for grad in gradients(out, inputs):
            assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prefix_gradient_is_the_sum_over_rows(dtype: torch.dtype) -> None:
    q, k, v = packed(dtype=dtype)
    prefix = prefixes(7, dtype=dtype)
    out = prefix_attention_varlen(q, k, v, *(shared := leaves(*prefix)), cumulative(LENGTHS), 129)
    assert isinstance(out, Tensor)
    weights = noise(*out.shape, dtype=dtype, seed=9)
    together = torch.autograd.grad(out, shared, weights)
    apart = [torch.zeros_like(x, dtype=torch.float64) for x in prefix]
    for start, length in zip(cumulative(LENGTHS).tolist(), LENGTHS, strict=False):
        row = slice(start, start + length)
        own = leaves(*prefix)
        one = prefix_attention_varlen(q[row], k[row], v[row], *own, cumulative((length,)), length)
        assert isinstance(one, Tensor)
        for total, grad in zip(apart, torch.autograd.grad(one, own, weights[row]), strict=True):
            total += grad
    for got, exact in zip(together, apart, strict=True):
        tolerance = 20 * torch.finfo(dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance)


def test_prefix_equals_concatenation() -> None:
    """A prefix in front of a row is the row with the prefix put in it: results and every gradient."""
    lengths, size = (17, 5, 30), 7
    inputs = leaves(*packed(lengths), *prefixes(size))
    out = prefix_attention_varlen(*inputs, cumulative(lengths), 30)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    longer, rows, text = [], leaves(*packed(lengths), *prefixes(size)), []
    for start, length in zip(cumulative(lengths).tolist(), lengths, strict=False):
        row = slice(start, start + length)
        filler = rows[0].new_zeros(size, 4, 16)
        longer.append(
            (torch.cat([filler, rows[0][row]]), torch.cat([rows[3], rows[1][row]]), torch.cat([rows[4], rows[2][row]]))
        )
        text.append(torch.arange(start + size * (len(text) + 1), start + size * (len(text) + 1) + length))
    q, k, v = (torch.cat(parts) for parts in zip(*longer, strict=True))
    whole = prefix_attention_varlen(q, k, v, None, None, cumulative([n + size for n in lengths]), 30 + size)
    assert isinstance(whole, Tensor)
    inside = whole[torch.cat(text)]
    torch.testing.assert_close(out, inside, rtol=1e-12, atol=1e-12)
    for got, exact in zip(gradients(out, inputs), gradients(inside, rows), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_permuting_rows_permutes_results(order: tuple[int, ...]) -> None:
    tensors = packed(dtype=torch.float32) + prefixes(3, 16, dtype=torch.float32)
    starts = cumulative(LENGTHS).tolist()
    take = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in order])
    results = []
    for permutation, ids in ((torch.arange(sum(LENGTHS)), PROMPTS), (take, PROMPTS[list(order)])):
        inputs = leaves(*(x[permutation] for x in tensors[:3]), *tensors[3:])
        lengths = LENGTHS if len(results) == 0 else tuple(LENGTHS[row] for row in order)
        out = prefix_attention_varlen(*inputs, cumulative(lengths), 129, prompt_ids=ids, prefix_lengths=SIZES)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        back = torch.empty_like(out).index_copy(0, permutation, out)
        grads = gradients(back, inputs)
        rows = [torch.empty_like(x).index_copy(0, permutation, x) for x in grads[:3]]
        results.append([back.detach(), *rows, *grads[3:]])
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(
            after, before, rtol=0, atol=8 * torch.finfo(torch.float32).eps * before.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    tensors = packed(dtype=dtype) + prefixes(3, 16, dtype=dtype)
    chosen = {"prompt_ids": PROMPTS, "prefix_lengths": SIZES}
    first = run(tensors, LENGTHS, "torch", **chosen)
    for _ in range(20):
        for again, before in zip(run(tensors, LENGTHS, "torch", **chosen), first, strict=True):
            assert torch.equal(again, before)


def test_layouts_do_not_matter() -> None:
    """Non-contiguous and stride-0 inputs, and gradients handed in that way, give what contiguous copies give."""
    lengths = (5, 16, 0, 9)
    exact = run([*packed(lengths), *prefixes(7)], lengths, "torch")
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in (*packed(lengths), *prefixes(7))]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (*packed(lengths), *prefixes(7))]
    for tensors in (strided, turned):
        assert not tensors[0].is_contiguous()
        inputs = [x.requires_grad_() for x in tensors]
        out = prefix_attention_varlen(*inputs, cumulative(lengths), 16)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        for got, expected in zip(gradients(out, inputs), exact, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    flat = [noise(1, *x.shape[1:]).expand_as(x) for x in (*packed(lengths), *prefixes(7))]
    for backend in ("torch", "reference"):
        inputs = leaves(*flat)
        expanded = [x.requires_grad_() for x in flat]
        outs = [
            prefix_attention_varlen(*x, cumulative(lengths), 16, backend=backend)  # type: ignore[arg-type]
            for x in (inputs, expanded)
        ]
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-14)
        everywhere = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(outs[0])  # type: ignore[arg-type]
        pairs = [torch.autograd.grad(out, x, everywhere) for out, x in zip(outs, (inputs, expanded), strict=True)]
        for got, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_nothing_to_differentiate() -> None:
    for lengths in ((), (0, 0)):
        for grad in run([*packed(lengths), *prefixes(7)], lengths, "torch"):
            assert not grad.any()


@pytest.mark.parametrize("dense", [False, True])
def test_rows_are_skipped_where_only_the_prefix_needs_a_gradient(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer of a frozen backbone: one rectangle per prompt runs backward, none of the rows'."""
    calls = []
    original = torch_path.block_backward

    def counted(grad: Tensor, q: Tensor, k: Tensor, *args: Any) -> Any:
        calls.append((q.shape[2], k.shape[2]))
        return original(grad, q, k, *args)

    monkeypatch.setattr(torch_path, "block_backward", counted)
    grads = []
    for needed in (slice(0, 5), slice(3, 5)):
        if dense:
            inputs = leaves(noise(3, 4, 9, 16), noise(3, 2, 9, 16), noise(3, 2, 9, 16), *prefixes(7))
            out = prefix_attention(*[x.requires_grad_(i in range(5)[needed]) for i, x in enumerate(inputs)])  # type: ignore[arg-type]
        else:
            inputs = leaves(*packed(), *prefixes(7))
            for i, x in enumerate(inputs):
                x.requires_grad_(i in range(5)[needed])
            out = prefix_attention_varlen(*inputs, cumulative(LENGTHS), 129)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        calls.clear()
        grads.append(gradients(out, inputs[needed]))
    tokens = 27 if dense else sum(LENGTHS)
    assert calls == [(tokens, 7)]
    for alone, among in zip(grads[1], grads[0][3:], strict=True):
        assert torch.equal(alone, among)


def test_rows_need_no_prefix_gradient() -> None:
    """A frozen prefix: the rows' gradients are the same, the prefix gets none."""
    tensors = [*packed(), *prefixes(7)]
    exact = run(tensors, LENGTHS, "torch")
    rows = leaves(*tensors[:3])
    out = prefix_attention_varlen(*rows, *tensors[3:], cumulative(LENGTHS), 129)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    for got, expected in zip(gradients(out, rows), exact, strict=False):
        assert torch.equal(got, expected)


@settings(deadline=None, derandomize=True, max_examples=40, database=None)
@given(data=st.data())
def test_any_packed_batch(data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    heads, dim = (kv_heads * groups, kv_heads), data.draw(st.sampled_from([1, 8, 11]))
    options = data.draw(st.sampled_from(sorted(OPTIONS)).map(lambda name: OPTIONS[name](heads[0])))
    tensors = packed(lengths, heads, dim)
    if data.draw(st.booleans()):
        count, size = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 20))
        tensors += prefixes(count, size, heads=heads, dim=dim)
        options["prompt_ids"] = index(*(data.draw(st.integers(-1, count - 1)) for _ in lengths))
        options["prefix_lengths"] = index(*(data.draw(st.integers(0, size)) for _ in range(count)))
    else:
        ids: list[int] = []
        for row in range(len(lengths)):
            ids.append(data.draw(st.sampled_from([n for n in range(-1, row) if n < 0 or ids[n] < 0])))
        options["prefix_rows"] = index(*ids)
    pairs = zip(run(tensors, lengths, "torch", **options), run(tensors, lengths, "reference", **options), strict=True)
    for got, exact in pairs:
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
