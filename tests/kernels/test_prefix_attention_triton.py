"""prefix_attention, the Triton kernels, forward and backward together, against the fp64 specification.

On a CPU they run in Triton's interpreter (fp32 and fp16); on a GPU compiled, in bf16 too. Every comparison is
three-way: the error against fp64 may be 1.5 times (gradients: 3 times) that of plain PyTorch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptengine.kernels import launch
from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

from .prefix_attention_cases import (
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Looked up once, so that the module is collected without Triton too, and then says why nothing runs.
triton_path = pytest.importorskip("ptengine.kernels.prefix_attention.triton_path", reason="needs Triton (Linux)")

LENGTHS = (17, 0, 65, 1)
PROMPTS, SIZES = index(0, 1, -1, 2), index(16, 3, 0)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "group of three": (3, 1)}
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
RowPrefix = Callable[[list[Tensor]], tuple[Tensor, Tensor]] | None


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}


def run(
    tensors: Sequence[Tensor], lengths: tuple[int, ...], backend: str = "triton", **options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the gradient of every tensor; on the device that runs the kernels, results on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    inputs = [x.to(device).detach().requires_grad_() for x in tensors]
    out, lse = prefix_attention_varlen(
        *inputs[:3], *(inputs[3:] or [None, None]), cumulative(lengths).to(device), max(lengths, default=0),
        backend=backend, return_lse=True, **(on_device(options) if backend == "triton" else options),
    )  # fmt: skip
    weights = noise(*out.shape, dtype=out.dtype, seed=7).to(device)
    grads = torch.autograd.grad(out, inputs, weights, allow_unused=True, materialize_grads=True)
    return out.detach().cpu(), lse.cpu(), [x.cpu() for x in grads]


def compare(
    tensors: list[Tensor], lengths: tuple[int, ...], rows: list[RowPrefix], chosen: dict[str, Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Results and gradients, three-way. `chosen` says which prefix a row reads, `options` how scores are made."""
    out, lse, grads = run(tensors, lengths, **chosen, **options)
    exact, exact_lse, exact_grads = run([x.double() for x in tensors], lengths, "reference", **chosen, **options)
    inputs = leaves(*tensors)
    stock = plain_varlen(*inputs[:3], [row and row(inputs) for row in rows], lengths, **options)
    check_error(out, stock.detach(), exact, 1.5, "out")
    assert lse.dtype == torch.float32
    # Operands are exact, products and sums are fp32: a few of its roundings of the largest score.
    largest = max(8.0, *(x.abs().max().item() for x in (exact_lse,) if x.numel()), 0.0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=64 * torch.finfo(torch.float32).eps * largest)
    size = max((x.abs().max().item() for x in exact_grads if x.numel()), default=0.0)
    stock_grads = gradients(stock, inputs) if lengths else exact_grads
    for name, ours, theirs, reference in zip(NAMES, grads, stock_grads, exact_grads, strict=False):
        assert ours.dtype == tensors[0].dtype
        check_error(ours, theirs, reference, 3.0, name, size)


def whole_prefix(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[3], inputs[4]


def prompt(n: int, sizes: Tensor) -> RowPrefix:
    return None if n < 0 else lambda inputs: (inputs[3][n, : sizes[n]], inputs[4][n, : sizes[n]])


def source(n: int, lengths: tuple[int, ...]) -> RowPrefix:
    starts = cumulative(lengths).tolist()
    return None if n < 0 else lambda inputs: (
        inputs[1][starts[n] : starts[n + 1]], inputs[2][starts[n] : starts[n + 1]]
    )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [0, 1, 7, 16, 100])
def test_every_shape(size: int, heads: tuple[int, int], causal: bool) -> None:
    tensors = packed(LENGTHS, heads=heads, dtype=torch.float32) + prefixes(size, heads=heads, dtype=torch.float32)
    compare(tensors, LENGTHS, [whole_prefix] * 4, {}, {"causal": causal})


@pytest.mark.parametrize("lengths", [(0,), (1,), (17,), (64,), (129,), (2, 5, 1)], ids=str)
def test_every_length(lengths: tuple[int, ...]) -> None:
    tensors = packed(lengths, (2, 1), dtype=torch.float32) + prefixes(33, heads=(2, 1), dtype=torch.float32)
    compare(tensors, lengths, [whole_prefix] * len(lengths), {}, {})


def test_long_prefix() -> None:
    tensors = packed((20, 3), (1, 1), dtype=torch.float32) + prefixes(512, heads=(1, 1), dtype=torch.float32)
    compare(tensors, (20, 3), [whole_prefix] * 2, {}, {})


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(5, 5), (16, 16), (80, 80), (96, 96), (256, 256), (16, 40), (40, 16)])
def test_every_head_dimension(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    lengths = (19, 4)
    tensors = packed(lengths, (2, 1), dim, dim_v, dtype) + prefixes(9, heads=(2, 1), dim=dim, dim_v=dim_v, dtype=dtype)
    compare(tensors, lengths, [whole_prefix] * 2, {}, {})


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, dtype: torch.dtype) -> None:
    lengths = (17, 0, 40)
    tensors = packed(lengths, dtype=dtype) + prefixes(20, dtype=dtype)
    compare(tensors, lengths, [whole_prefix] * 3, {}, OPTIONS[option](4))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [2, 31, 32, 33, 34, 109])
def test_windows_that_end_where_a_block_does(window: int, causal: bool) -> None:
    """What is passed over is exactly what is outside the window, of the row and of the prefix; 109 hides one key."""
    tensors = packed((70,), (2, 1), dtype=torch.float32) + prefixes(40, heads=(2, 1), dtype=torch.float32)
    compare(tensors, (70,), [whole_prefix], {}, {"causal": causal, "window": window})


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 200), (40, 40)])
def test_large_scores_do_not_overflow(q_len: int, k_len: int) -> None:
    """exp of a score of hundreds is infinite in fp32; also where partial results of split keys are merged."""
    tensors = [noise(2, heads, length, 16, dtype=torch.float32, seed=7) for heads, length in ((2, q_len), (1, k_len))]
    tensors = [tensors[0], tensors[1], tensors[1].flip(-1)]
    out = prefix_attention(*(x.to(DEVICE) for x in tensors), None, None, scale=60.0, backend="triton")
    exact = prefix_attention(*(x.double() for x in tensors), None, None, scale=60.0, backend="reference")
    largest = 60 * (tensors[0].double().norm(dim=-1).max() * tensors[1].double().norm(dim=-1).max()).item()
    assert largest > 500
    # A weight's exponent carries the rounding of its score.
    torch.testing.assert_close(out.cpu().double(), exact, rtol=0, atol=8 * 2**-23 * largest)


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "window", "softcap", "everything"])
def test_several_prompts(option: str, dtype: torch.dtype) -> None:
    """Prompts of their own length, one without readers, one of length 0, a row that reads none."""
    tensors = packed(LENGTHS, dtype=dtype) + prefixes(4, 16, dtype=dtype)
    sizes = index(16, 3, 0, 5)
    chosen = {"prompt_ids": PROMPTS, "prefix_lengths": sizes}
    compare(tensors, LENGTHS, [prompt(n, sizes) for n in PROMPTS.tolist()], chosen, OPTIONS[option](4))
    for grad in run(tensors, LENGTHS, **chosen)[2][3:]:
        assert not grad[1].any()  # its only reader has no tokens
        assert not grad[2:].any()


def test_nothing_beyond_a_prompts_length() -> None:
    """Keys that share a block with a shorter prompt's last one are not seen and get a gradient of zero."""
    sizes = index(3, 16)
    tensors = packed((17, 20), dtype=torch.float32) + prefixes(2, 16, dtype=torch.float32)
    chosen = {"prompt_ids": index(0, 1), "prefix_lengths": sizes}
    compare(tensors, (17, 20), [prompt(0, sizes), prompt(1, sizes)], chosen, {})
    for grad in run(tensors, (17, 20), **chosen)[2][3:]:
        assert grad[0, :3].all()
        assert not grad[0, 3:].any()


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "window, prefix in view", "everything"])
def test_rows_as_prefixes(option: str, dtype: torch.dtype) -> None:
    """The gradient of a row that is read includes its readers'. Row 2 stands alone, rows 3 and 6 are empty."""
    lengths, readers = (7, 70, 20, 0, 33, 5, 0, 2), index(-1, -1, -1, 1, 0, 1, -1, 6)
    rows = [source(n, lengths) for n in readers.tolist()]
    compare(packed(lengths, (2, 1), dtype=dtype), lengths, rows, {"prefix_rows": readers}, OPTIONS[option](2))


@pytest.mark.parametrize("processors", [1, 8, 24])
def test_any_number_of_programs(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix's block is cut among as many programs as the device runs: not at all, or many times."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: processors)
    lengths, readers = (70, 5, 3, 20, 9), index(-1, -1, 0, 0, 1)
    rows = [source(n, lengths) for n in readers.tolist()]
    compare(packed(lengths, dtype=torch.float32), lengths, rows, {"prefix_rows": readers}, {})
    tensors = packed(LENGTHS, dtype=torch.float32) + prefixes(3, 70, dtype=torch.float32)
    rows = [prompt(n, index(70, 70, 70)) for n in PROMPTS.tolist()]
    compare(tensors, LENGTHS, rows, {"prompt_ids": PROMPTS}, {})


def test_many_rows() -> None:
    """Lengths are summed 128 rows at a time, and prompts are found likewise."""
    rows = 141
    lengths = tuple(row % 3 for row in range(rows))
    readers = [-1] * rows
    readers[3::2] = [1] * len(readers[3::2])
    readers[rows - 1] = rows - 2  # a prompt at the far end, beyond the first 128 rows
    readers[rows - 2] = -1
    chosen = {"prefix_rows": index(*readers)}
    compare(packed(lengths, (1, 1), dtype=torch.float32), lengths, [source(n, lengths) for n in readers], chosen, {})


PADDINGS: dict[str, Callable[[int], tuple[list[int], list[int]]]] = {
    "none": lambda size: ([0, 0, 0], [size] * 3),
    "left": lambda size: ([0, 3, size - 1], [size] * 3),
    "right": lambda size: ([0, 0, 0], [size, size - 1, 1]),
    "both sides": lambda size: ([0, 2, 1], [size, size - 1, size]),
    "row of padding": lambda size: ([0, size, 0], [size, size, 0]),
}


@pytest.mark.parametrize("option", ["causal", "bidirectional", "window", "sinks", "everything"])
@pytest.mark.parametrize(("q_len", "k_len"), [(40, 40), (1, 70), (4, 40), (1, 1)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_dense(option: str, q_len: int, k_len: int, padding: str) -> None:
    """A stock batch, a step of generation (whose keys are split) and a chunk of prefill, padded on any side."""
    starts, ends = PADDINGS[padding](k_len)
    starts = [min(start, end) for start, end in zip(starts, ends, strict=True)]
    bounds = {} if padding == "none" else {"key_starts": index(*starts), "key_lengths": index(*ends)}
    chosen = {"prompt_ids": index(1, -1, 0), "prefix_lengths": index(19, 2)} | bounds | OPTIONS[option](4)
    tensors = [noise(3, heads, length, 16, seed=length) for heads, length in ((4, q_len), (2, k_len), (2, k_len))]
    tensors += prefixes(2, 19)
    results = []
    for backend, dtype, device in (("triton", torch.float32, DEVICE), ("reference", torch.float64, "cpu")):
        inputs = [x.to(device, dtype).requires_grad_() for x in tensors]
        moved = on_device(chosen) if backend == "triton" else chosen
        out, lse = prefix_attention(*inputs, backend=backend, return_lse=True, **moved)  # type: ignore[arg-type]
        weights = noise(*out.shape, dtype=dtype, seed=7).to(device)
        results.append([x.detach().cpu() for x in (out, lse, *torch.autograd.grad(out, inputs, weights))])
    padded = results[1][1] == float("-inf")
    for name, got, exact in zip(("out", "lse", *NAMES), results[0], results[1], strict=True):
        if name == "lse":
            assert torch.equal(got == float("-inf"), padded)
            got, exact = got.masked_fill(padded, 0.0), exact.masked_fill(padded, 0.0)
        tolerance = 64 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance, msg=lambda s, n=name: f"{n}: {s}")
    assert (results[0][0][padded] == 0).all()


def test_dense_without_a_choice_of_prompts() -> None:
    """All rows read the one prefix: the kernel walks the batch without a sorted list of its tokens."""
    tensors = [noise(3, heads, 40, 16, seed=heads) for heads in (4, 2, 2)] + prefixes(70)
    results = []
    for backend, dtype, device in (("triton", torch.float32, DEVICE), ("reference", torch.float64, "cpu")):
        inputs = [x.to(device, dtype).requires_grad_() for x in tensors]
        bounds = {"key_starts": index(0, 7, 39).to(device), "window": 30}
        out = prefix_attention(*inputs, backend=backend, **bounds)  # type: ignore[arg-type]
        weights = noise(*out.shape, dtype=dtype, seed=7).to(device)
        results.append([x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, inputs, weights))])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=64 * torch.finfo(torch.float32).eps * exact.abs().max())


def test_padding_may_hold_anything() -> None:
    """NaN in padded slots of every input and of the incoming gradient reaches no result and no gradient."""
    tensors = [noise(2, heads, 33, 16, dtype=torch.float32, seed=heads) for heads in (4, 2, 2)]
    tensors += prefixes(2, 9, dtype=torch.float32)
    starts, ends = index(5, 0), index(33, 20)
    chosen = {"prompt_ids": index(0, 1), "prefix_lengths": index(9, 4)}
    results = []
    for poison in (0.0, float("nan")):
        inputs = [x.clone() for x in tensors]
        for x in inputs[:3]:
            x[0, :, :5] = poison
            x[1, :, 20:] = poison
        for x in inputs[3:]:
            x[1, 4:] = poison
        inputs = [x.to(DEVICE).requires_grad_() for x in inputs]
        bounds = on_device({"key_starts": starts, "key_lengths": ends} | chosen)
        out = prefix_attention(*inputs, backend="triton", **bounds)  # type: ignore[arg-type]
        weights = noise(*out.shape, dtype=torch.float32, seed=7)
        weights[0, :, :5] = poison
        weights[1, :, 20:] = poison
        results.append([out.detach(), *torch.autograd.grad(out, inputs, weights.to(DEVICE))])
    for clean, dirty in zip(*results, strict=True):
        assert dirty.isfinite().all()
        assert torch.equal(clean, dirty)


def test_workspaces_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces come uninitialised: filled with NaN beforehand, nothing of it is left or read."""
    tensors = packed(LENGTHS, dtype=torch.float32) + prefixes(3, 16, dtype=torch.float32)
    chosen = {"prompt_ids": PROMPTS, "prefix_lengths": SIZES, "window": 11}
    clean = [run(tensors, LENGTHS, **chosen), run(tensors[:3], LENGTHS, prefix_rows=index(-1, -1, 0, -1))]
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **keywords: Any) -> Tensor:
            x = make(*args, **keywords)
            return x.fill_(float("nan") if x.is_floating_point() else 2**30) if x.dtype != torch.bool else x

        return made

    monkeypatch.setattr(triton_path.torch, "empty", poisoned(empty))
    monkeypatch.setattr(triton_path.torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    dirty = [run(tensors, LENGTHS, **chosen), run(tensors[:3], LENGTHS, prefix_rows=index(-1, -1, 0, -1))]
    for before, after in zip(clean, dirty, strict=True):
        for x, y in zip([*before[:2], *before[2]], [*after[:2], *after[2]], strict=True):
            assert torch.equal(x, y)


def test_prefix_equals_concatenation() -> None:
    """A prefix in front of a row is the row with the prefix put in it."""
    length, size = 40, 23
    q, k, v = packed((length,), (2, 1), dtype=torch.float32)
    pk, pv = prefixes(size, heads=(2, 1), dtype=torch.float32)
    out = run([q, k, v, pk, pv], (length,))[0]
    filler = torch.zeros(size, 2, 16)
    whole = run([torch.cat([filler, q]), torch.cat([pk, k]), torch.cat([pv, v])], (length + size,))[0][size:]
    torch.testing.assert_close(out, whole, rtol=0, atol=8 * torch.finfo(torch.float32).eps * out.abs().max())


def test_prefix_gradient_is_the_sum_over_rows() -> None:
    tensors = packed(LENGTHS, dtype=torch.float32) + prefixes(7, dtype=torch.float32)
    together = run(tensors, LENGTHS)[2][3:]
    apart = [torch.zeros_like(x, dtype=torch.float64) for x in together]
    weights = noise(sum(LENGTHS), 4, 16, dtype=torch.float32, seed=7)
    for start, length in zip(cumulative(LENGTHS).tolist(), LENGTHS, strict=False):
        inputs = [x[start : start + length].to(DEVICE) for x in tensors[:3]]
        own = [x.to(DEVICE).requires_grad_() for x in tensors[3:]]
        bounds = cumulative((length,)).to(DEVICE)
        out = prefix_attention_varlen(*inputs, *own, bounds, length, backend="triton")
        for total, grad in zip(
            apart, torch.autograd.grad(out, own, weights[start : start + length].to(DEVICE)), strict=True
        ):
            total += grad.cpu()
    for got, exact in zip(together, apart, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=20 * 2**-23 * exact.abs().max().item())


def test_permuting_rows_permutes_results() -> None:
    """A row's result does not depend, to the bit, on where in the batch the row stands."""
    tensors = packed(LENGTHS, dtype=torch.float32) + prefixes(3, 16, dtype=torch.float32)
    out, lse, grads = run(tensors, LENGTHS, prompt_ids=PROMPTS, prefix_lengths=SIZES)
    order = [2, 0, 3, 1]
    starts = cumulative(LENGTHS).tolist()
    take = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in order])
    lengths = tuple(LENGTHS[row] for row in order)
    inputs = leaves(*(x[take] for x in tensors[:3]), *tensors[3:])
    moved = [x.to(DEVICE).detach().requires_grad_() for x in inputs]
    got, got_lse = prefix_attention_varlen(
        *moved, cumulative(lengths).to(DEVICE), 65, prompt_ids=PROMPTS[order].to(DEVICE),
        prefix_lengths=SIZES.to(DEVICE), backend="triton", return_lse=True,
    )  # fmt: skip
    weights = noise(*out.shape, dtype=torch.float32, seed=7)[take].to(DEVICE)
    got_grads = [x.cpu() for x in torch.autograd.grad(got, moved, weights)]
    assert torch.equal(got.detach().cpu(), out[take])
    assert torch.equal(got_lse.cpu(), lse[:, take])
    for name, ours, before in zip(NAMES, got_grads, grads, strict=True):
        if name.startswith("prefix"):  # summed in another order
            torch.testing.assert_close(ours, before, rtol=0, atol=8 * 2**-23 * before.abs().max().item())
        else:
            assert torch.equal(ours, before[take])


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    """250 repeats where they are cheap, on a GPU; each run of the interpreter is in one order anyway."""
    lengths = (70, 5, 3, 20, 9)
    tensors, readers = packed(lengths, dtype=dtype), index(-1, -1, 0, 0, 1)
    first = run(tensors, lengths, prefix_rows=readers)
    for _ in range(250 if DEVICE == "cuda" else 2):
        again = run(tensors, lengths, prefix_rows=readers)
        for x, y in zip([*first[:2], *first[2]], [*again[:2], *again[2]], strict=True):
            assert torch.equal(x, y)


def test_not_deterministic_is_as_exact() -> None:
    """With atomic additions only the order of a prefix's partial sums is left open."""
    tensors = packed(LENGTHS, dtype=torch.float32) + prefixes(7, dtype=torch.float32)
    compare(tensors, LENGTHS, [whole_prefix] * 4, {"deterministic": False}, {})


def test_layouts_do_not_matter() -> None:
    """Non-contiguous and stride-0 inputs give, to the bit, what contiguous copies give."""
    lengths = (5, 16, 0, 9)
    tensors = packed(lengths, dtype=torch.float32) + prefixes(7, dtype=torch.float32)
    expected = run(tensors, lengths)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in tensors]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    for variant in (strided, turned):
        assert not variant[0].is_contiguous()
        got = run(variant, lengths)
        for x, y in zip([*expected[:2], *expected[2]], [*got[:2], *got[2]], strict=True):
            assert torch.equal(x, y)
    flat = [x[:1].expand_as(x) for x in tensors]
    for x, y in zip(run(flat, lengths)[:2], run([x.contiguous() for x in flat], lengths)[:2], strict=True):
        assert torch.equal(x, y)


def test_strides_of_index_tensors_and_sinks_were_ignored() -> None:
    """The kernels step through them by one: rows were cut, and prompts chosen, by whatever lay between."""

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 77)], dim=1)[:, 0]

    lengths = (5, 16, 0, 9)
    tensors = packed(lengths, dtype=torch.float32) + prefixes(3, 7, dtype=torch.float32)
    sinks = noise(1, dtype=torch.float32).to(DEVICE).expand(tensors[0].shape[1])
    given = {"cu_seqlens": cumulative(lengths), "prompt_ids": index(0, 2, -1, 1), "prefix_lengths": index(7, 3, 1)}
    results = []
    for change in (strided, torch.clone):
        # On the device first: a move lays strided tensors out anew.
        changed = {name: change(x) for name, x in on_device(given).items()} | {"sinks": sinks}
        inputs = [x.to(DEVICE).requires_grad_() for x in tensors]
        out = prefix_attention_varlen(*inputs, max_seqlen=16, backend="triton", **changed)
        assert isinstance(out, Tensor)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    exact = prefix_attention_varlen(*[x.double() for x in tensors], max_seqlen=16, backend="reference",
                                    **(given | {"sinks": sinks.cpu()}))  # fmt: skip
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(results[0][0].cpu().double(), exact, rtol=0, atol=1e-5)

    q, k, v = noise(3, 4, 2, 16), noise(3, 2, 5, 16), noise(3, 2, 5, 16)
    bounds = {"key_lengths": index(5, 4, 3), "key_starts": index(0, 2, 1)}
    dense = [
        prefix_attention(
            *[x.float().to(DEVICE) for x in (q, k, v)], None, None, backend="triton",
            **{name: change(x) for name, x in on_device(bounds).items()},
        )
        for change in (strided, torch.clone)
    ]  # fmt: skip
    assert torch.equal(*dense)  # type: ignore[arg-type]


def test_only_the_prefix_part_runs_where_rows_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer of a frozen backbone neither queries nor rows' keys get a program, nor memory."""
    grids = []
    kernel = triton_path.backward_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    tensors = packed(LENGTHS, dtype=torch.float32) + prefixes(7, dtype=torch.float32)
    expected = run(tensors, LENGTHS)[2]
    monkeypatch.setattr(triton_path, "backward_kernel", Watched())
    inputs = [x.to(DEVICE) for x in tensors]
    for x in inputs[3:]:
        x.requires_grad_()
    out = prefix_attention_varlen(*inputs, cumulative(LENGTHS).to(DEVICE), 65, backend="triton")
    weights = noise(*out.shape, dtype=torch.float32, seed=7).to(DEVICE)
    grads = torch.autograd.grad(out, inputs[3:], weights)
    assert grids == [(2 * launch.multiprocessors(inputs[0].device),)]
    for got, exact in zip(grads, expected[3:], strict=True):
        assert torch.equal(got.cpu(), exact)


def test_backend_refuses_what_the_kernels_cannot_do() -> None:
    cu = cumulative((3,)).to(DEVICE)
    tensors = [x.to(DEVICE) for x in packed((3,)) + prefixes(2)]
    with pytest.raises(ValueError, match=r"takes float16, .*float32.*, not float64"):
        prefix_attention_varlen(*tensors, cu, 3, backend="triton")
    wide = packed((3,), dim=264, dtype=torch.float32) + prefixes(2, dim=264, dtype=torch.float32)
    tensors = [x.to(DEVICE) for x in wide]
    with pytest.raises(ValueError, match="heads of up to 256, not 264"):
        prefix_attention_varlen(*tensors, cu, 3, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="bf16 is refused only under the interpreter")
def test_interpreter_refuses_bf16() -> None:
    """The interpreter computes bf16 wrongly without a word (triton issue 11584)."""
    tensors = packed((3,), dtype=torch.bfloat16) + prefixes(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not bfloat16"):
        prefix_attention_varlen(*tensors, cumulative((3,)), 3, backend="triton")


@pytest.mark.parametrize("mode", ["apart", "rows", "dense"])
def test_operators_are_sound(mode: str) -> None:
    """Schema, fake kernels and autograd registration hold with the kernels behind them."""
    inputs = [x.to(DEVICE).requires_grad_() for x in packed((5, 9), (2, 1), dtype=torch.float32)]
    prefix = [x.to(DEVICE).requires_grad_() for x in prefixes(1, 4, heads=(2, 1), dtype=torch.float32)]
    rules = (True, 0.25, None, True, None, None, None, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if mode == "dense":
        batch = [x[:5].unflatten(0, (1, 5)) for x in inputs]
        args = (batch[0], *(x.transpose(1, 2) for x in batch[1:]), *prefix, None, None, None, None, *rules, True, True)
        torch.library.opcheck(torch.ops.ptengine.prefix_attention.default, args, test_utils=tests)
        return
    readers = index(-1, 0).to(DEVICE) if mode == "rows" else None
    prefix_args = (None, None) if mode == "rows" else tuple(prefix)
    cu = cumulative((5, 9)).to(DEVICE)
    args = (*inputs, *prefix_args, cu, None, readers, None, *rules, 9, True, True)
    torch.library.opcheck(torch.ops.ptengine.prefix_attention_varlen.default, args, test_utils=tests)


def test_compiles_without_a_graph_break() -> None:
    inputs = [x.to(DEVICE) for x in packed((5, 9), (2, 1), dtype=torch.float32)]
    prefix = [x.to(DEVICE).requires_grad_() for x in prefixes(4, heads=(2, 1), dtype=torch.float32)]
    cu = cumulative((5, 9)).to(DEVICE)

    def loss(pk: Tensor, pv: Tensor) -> Tensor:
        return prefix_attention_varlen(*inputs, pk, pv, cu, 9, backend="triton").square().sum()  # type: ignore[union-attr]

    expected = torch.autograd.grad(loss(*prefix), prefix)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, exact in zip(torch.autograd.grad(compiled(*prefix), prefix), expected, strict=True):
        torch.testing.assert_close(got, exact)


@settings(deadline=None, derandomize=True, max_examples=20, database=None)
@given(data=st.data())
def test_any_packed_batch(data: st.DataObject) -> None:
    """Generated shapes: any rows, prompts of any length chosen in any way, any options together."""
    lengths = tuple(data.draw(st.lists(st.integers(0, 50), max_size=5)))
    heads_kv, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (1, 2)]))
    heads, dim = (heads_kv * groups, heads_kv), data.draw(st.sampled_from([1, 8, 24]))
    options = data.draw(st.sampled_from(sorted(OPTIONS)).map(lambda name: OPTIONS[name](heads[0])))
    tensors = packed(lengths, heads, dim, dtype=torch.float32)
    mode = data.draw(st.sampled_from(["given", "rows", "none"]))
    rows: list[RowPrefix] = [None] * len(lengths)
    chosen: dict[str, Any] = {}
    if mode == "given":
        count, size = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
        ids = data.draw(st.lists(st.integers(-1, count - 1), min_size=len(lengths), max_size=len(lengths)))
        sizes = index(*data.draw(st.lists(st.integers(0, size), min_size=count, max_size=count)))
        tensors += prefixes(count, size, heads=heads, dim=dim, dtype=torch.float32)
        chosen = {"prompt_ids": index(*ids), "prefix_lengths": sizes}
        rows = [prompt(n, sizes) for n in ids]
    elif mode == "rows":
        ids = [-1] * len(lengths)
        for row in range(1, len(lengths)):
            ids[row] = data.draw(st.sampled_from([n for n in range(-1, row) if n < 0 or ids[n] < 0]))
        chosen = {"prefix_rows": index(*ids)}
        rows = [source(n, lengths) for n in ids]
    compare(tensors, lengths, rows, chosen, options)
