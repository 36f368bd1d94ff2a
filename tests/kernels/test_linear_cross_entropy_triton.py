"""linear_cross_entropy's Triton kernels: under the interpreter on a CPU, on the GPU where there is one.

Values and gradients are held against float64, in memory that holds NaN, with the error of plain PyTorch in the same
dtype as the measure; the rest is the operator's contract.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ptengine.kernels import dispatch
from ptengine.kernels.dispatch import resolve_backend
from ptengine.kernels.launch import DTYPES, INTERPRETED
from ptengine.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    operators,
    products,
    tiles,
)

from .prefix_attention_cases import check_error
from .test_linear_cross_entropy import OPTIONS, LargestAllocation, inputs, loss_and_gradient

pytest.importorskip("triton")

from ptengine.kernels.linear_cross_entropy import triton_path

# The interpreter computes with numpy, which remarks on every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [options | {"bias": with_bias} for options, with_bias in itertools.product(OPTIONS, (False, True))]


def on_device(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().to(DEVICE) for x in tensors)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would demand an environment variable
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def chunks_of(words: int, tile_rows: int = triton_path.MAX_TILE_ROWS) -> Iterator[None]:
    """Chunks of so many words, in blocks of 32 or more, and tiles of so many rows."""
    block = next(block for block in (512, 256, 128, 64, 32) if words % block == 0)
    tile = tiles.Tile(rows=32 if INTERPRETED else 1, columns=block, warps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_path, "chunk_tile", lambda architecture, rows: tile)
        patch.setattr(triton_path, "chunk_columns", lambda vocabulary, bytes_per_word, block: words)
        patch.setattr(triton_path, "MAX_TILE_ROWS", tile_rows)
        yield


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> torch.Tensor:
    """As models compute it: logits in the tensors' dtype, the rest in float32."""
    logits = F.linear(hidden, weight, bias)  # [n, V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    loss = loss + (z_loss * logits.logsumexp(1).square()).where(labels != -100, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (labels != -100).sum().clamp(min=1)


def check(
    n: int,
    d: int,
    vocabulary: int,
    dtype: torch.dtype,
    case: dict[str, Any],
    reductions: tuple[str, ...] = ("none",),
    **kwargs: Any,
) -> None:
    """The kernels against float64 and plain PyTorch, in poisoned memory."""
    hidden, weight, labels, bias = on_device(*inputs(n, d, vocabulary, dtype, **kwargs))
    if case["label_smoothing"] == 0.0 or case["softcap"] is not None:  # else the loss is infinite
        removed = torch.arange(vocabulary, device=DEVICE) % 3 == 1
        removed[labels.clamp(min=0)] = False
        bias = bias.masked_fill(removed, -torch.inf)
    case = case | {"bias": bias if case["bias"] else None}
    double = case | {"bias": bias.double() if case["bias"] is not None else None}
    for reduction in reductions:
        with poisoned():
            got = loss_and_gradient(
                linear_cross_entropy, hidden, weight, labels, backend="triton", reduction=reduction, **case
            )
        stock = loss_and_gradient(plain, hidden, weight, labels, reduction=reduction, **case)
        exact = loss_and_gradient(
            linear_cross_entropy_reference, hidden.double(), weight.double(), labels, reduction=reduction, **double
        )
        assert [x.dtype for x in got] == [torch.float32, dtype]
        sizes = rounded(hidden, weight, bias, case["z_loss"], n if reduction == "sum" else 1)
        for what, factor, size, *tensors in zip(
            ("loss", "gradient"), (1.5, 3.0), sizes, got, stock, exact, strict=True
        ):
            check_error(*tensors, factor, f"{what}, {reduction}", size)


def rounded(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, z_loss: float, rows: int
) -> tuple[float | None, float | None]:
    """How large the numbers are that are rounded on the way to the loss and to its gradient, each for its dtype.

    A dot product is rounded relatively to its terms, not to its value, and the error of so few numbers that plain
    PyTorch makes is no measure. None, the size of the result, where there are enough.
    """
    if hidden.shape[0] * weight.shape[0] >= 1000 or hidden.shape[0] == 0:
        return None, None
    terms = (hidden.double().abs() @ weight.double().abs().T).max().item() + math.log(weight.shape[0]) + 1.0
    terms += bias.double().abs().nan_to_num(posinf=0.0).max().item()
    of_logit = 1.0 + 2.0 * z_loss * terms  # the loss's derivative by a logit, at most
    in_float32 = torch.finfo(torch.float32).eps / torch.finfo(hidden.dtype).eps * terms
    return rows * terms * of_logit, weight.abs().max().item() * of_logit * (1.0 + in_float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "words"), [(1, None), (5, None), (1000, None), (4097, None), (1000, 512), (4097, 512), (4097, 1536)]
)
@pytest.mark.parametrize("n", [0, 1, 7, 33])
def test_every_shape(n: int, vocabulary: int, words: int | None, dtype: torch.dtype) -> None:
    """In one chunk as shipped, and in several, of which the last has one word of 4097 or 488 of 1000."""
    case = CASES[(n + vocabulary + (words or 0) // 512) % len(CASES)]
    if words is None:
        check(n, 24, vocabulary, dtype, case)
    else:
        with chunks_of(words):
            check(n, 24, vocabulary, dtype, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case: dict[str, Any], ignored: bool, dtype: torch.dtype) -> None:
    with chunks_of(64, tile_rows=5):
        check(7, 16, 70, dtype, case, ("mean", "sum") if dtype == torch.float32 else ("none",), ignored=ignored)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 20),
    d=st.integers(1, 90),
    vocabulary=st.integers(1, 200),
    words=st.sampled_from([32, 64, 96, 256]),
    tile_rows=st.integers(5, 21),
    case=st.sampled_from(CASES),
    scale=st.sampled_from([0.01, 1.0, 3.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    n: int, d: int, vocabulary: int, words: int, tile_rows: int, case: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    with chunks_of(words, tile_rows):
        check(n, d, vocabulary, dtype, case, scale=scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_torch_backend(case: dict[str, Any]) -> None:
    hidden, weight, labels, bias = on_device(*inputs(19, 16, 300, torch.float32))
    case = case | {"bias": bias if case["bias"] else None}
    with chunks_of(128):
        got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="triton", **case)
    expected = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="torch", **case)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_same_bits_every_time(case: dict[str, Any]) -> None:
    hidden, weight, labels, bias = on_device(*inputs(33, 48, 300, torch.float16))
    case = case | {"bias": bias if case["bias"] else None, "backend": "triton"}
    with chunks_of(128):
        first = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **case)
        for _ in range(3 if INTERPRETED else 250):
            again = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **case)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter_and_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    hidden, weight, labels, bias = on_device(*inputs(6, 8, 90, dtype))
    hidden = hidden[:1].expand(6, 8)
    options: dict[str, Any] = {"backend": "triton", "softcap": 4.0, "label_smoothing": 0.1}
    wide = torch.stack([weight, weight], dim=2)
    with chunks_of(64):
        expected = loss_and_gradient(linear_cross_entropy, hidden.contiguous(), weight, labels, bias=bias, **options)
        for strided in (weight.T.contiguous().T, wide[..., 0], wide[:, :, 1].T.contiguous().T):
            arguments = (hidden, strided, labels.repeat_interleave(2)[::2], bias.repeat_interleave(3)[1::3])
            before = [x.clone() for x in arguments]
            got = loss_and_gradient(linear_cross_entropy, *arguments[:3], bias=arguments[3], **options)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert all(torch.equal(x, y) for x, y in zip(before, arguments, strict=True))
        same = weight[:1].expand(90, 8)
        got = loss_and_gradient(linear_cross_entropy, hidden, same, labels, **options)
        expected = loss_and_gradient(linear_cross_entropy, hidden, same.contiguous(), labels, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", itertools.permutations(DTYPES, 2), ids=str)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The products are in the narrower: what hidden or the head loses by that is not counted as the kernels' error."""
    hidden, weight, labels, bias = on_device(*inputs(9, 32, 200))
    hidden, weight, bias = hidden.to(dtypes[0]), weight.to(dtypes[1]), bias.to(dtypes[1])
    narrow = products.narrower_dtype(hidden, weight)
    exact = loss_and_gradient(
        linear_cross_entropy_reference, hidden.to(narrow).double(), weight.to(narrow).double(), labels,
        bias=bias.double(),
    )  # fmt: skip
    with chunks_of(64):
        got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, bias=bias, backend="triton")
    assert got[1].dtype == hidden.dtype
    eps = torch.finfo(narrow).eps
    torch.testing.assert_close([x.double() for x in got], list(exact), rtol=0.0, atol=2 * eps)


def test_float16_keeps_words_far_below_the_maximum() -> None:
    """A row that is learned well: all other words are 18 below the label's, where exp is 0 in float16.

    Their part is the whole gradient: without the weights' scale it is off by a factor of ten.
    """
    weight = torch.zeros(4097, 2, dtype=torch.float16)
    weight[0, 0] = 18.0
    weight[1:, 1] = 1.0
    hidden, weight, labels = on_device(torch.tensor([[1.0, 0.0]]).half(), weight, torch.tensor([0]))
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="triton")
    exact = loss_and_gradient(linear_cross_entropy_reference, hidden.double(), weight.double(), labels)
    torch.testing.assert_close(got[1].double()[0, 1], exact[1][0, 1], rtol=2e-2, atol=0.0)


def test_softcap_is_exact_near_0_and_far_away() -> None:
    """With one word and the z-loss alone, the loss is the square of the capped logit."""
    cap = 3.0
    ratios = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 0.2499, 0.25, 0.2501, 0.5, 1.0, 3.0, 8.0, 30.0, 1e4, torch.inf])
    hidden = (cap * torch.cat([ratios, -ratios])).unsqueeze(1)  # [28, 1]
    hidden, weight, labels = on_device(hidden, torch.ones(1, 1), torch.zeros(28, dtype=torch.int64))
    options: dict[str, Any] = {"softcap": cap, "z_loss": 1.0, "reduction": "none"}
    got, gradient = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="triton", **options)
    capped = cap * torch.tanh(hidden.double() / cap)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), capped.square().squeeze(1), rtol=8 * eps, atol=0.0)
    of_loss = torch.linspace(0.5, 1.5, 28, dtype=torch.float64, device=DEVICE).unsqueeze(1)
    slope = 1.0 - (capped / cap).square()
    torch.testing.assert_close(gradient.double(), 2.0 * capped * slope * of_loss, rtol=8 * eps, atol=4 * eps)


def test_nan_and_infinite_rows_are_nan_and_no_other() -> None:
    hidden, weight, labels, _ = on_device(*inputs(40, 3, 90, torch.float32, ignored=False))
    weight = weight.abs()
    hidden[1, 0], hidden[17, 0] = torch.nan, torch.inf
    with chunks_of(32):
        loss, gradient = loss_and_gradient(
            linear_cross_entropy, hidden, weight, labels, reduction="none", backend="triton"
        )
    assert loss.isnan().nonzero().flatten().tolist() == [1, 17]
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [1, 17]


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_ignored_rows_may_hold_anything(case: dict[str, Any]) -> None:
    """A NaN in an ignored row (padding that attended to nothing) reaches neither the loss nor a gradient."""
    hidden, weight, labels, _ = on_device(*inputs(20, 3, 90, torch.float32))
    case = case | {"bias": None, "backend": "triton"}
    with chunks_of(64):
        expected = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **case)
        hidden[labels == -100] = torch.nan
        got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **case)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_all_words_removed_gives_nan() -> None:
    hidden, weight, labels, bias = on_device(*inputs(3, 3, 40, torch.float32, ignored=False))
    with chunks_of(32):
        loss, gradient = loss_and_gradient(
            linear_cross_entropy, hidden, weight, labels, bias=torch.full_like(bias, -torch.inf), reduction="none",
            backend="triton",
        )  # fmt: skip
    assert loss.isnan().all()
    assert gradient.isnan().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_words_removed_over_whole_chunks(smoothing: float) -> None:
    """The running maximum stays -inf over the first chunk: the pivot must not turn -inf - -inf into NaN.

    With smoothing the loss is infinite, as is the mean of the logits; the gradient is not.
    """
    hidden, weight, labels, bias = on_device(*inputs(3, 3, 100, torch.float32, ignored=False))
    labels.fill_(70)
    bias[:40] = -torch.inf
    options: dict[str, Any] = {"bias": bias, "label_smoothing": smoothing}
    with chunks_of(32):
        got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="triton", **options)
    expected = loss_and_gradient(linear_cross_entropy_reference, hidden, weight, labels, **options)
    assert got[0].isinf() == (smoothing > 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_unlooked_at_label_out_of_range_gives_nan(case: dict[str, Any]) -> None:
    """What a device other than a CPU computes, where the check would have to wait for it."""
    hidden, weight, _, _ = on_device(*inputs(4, 3, 90, torch.float32))
    (labels,) = on_device(torch.tensor([2, 90, -5, 89]))
    with chunks_of(64), torch.no_grad():
        loss, gradient = triton_path.rows(
            hidden, weight, labels, None, case["softcap"], case["label_smoothing"], case["z_loss"], -100, True
        )
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("n", [0, 4])
def test_mean_over_no_label_is_zero(n: int) -> None:
    hidden, weight, labels, _ = on_device(*inputs(n, 3, 8, torch.float32))
    labels.fill_(-1)
    loss, gradient = loss_and_gradient(
        linear_cross_entropy, hidden, weight, labels, ignore_index=-1, label_smoothing=0.1, z_loss=0.1, backend="triton"
    )
    assert loss == 0.0
    assert gradient.shape == (n, 3)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = on_device(*inputs(6, 16, 33, dtype))
    expected = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend="triton")
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_second_derivative_is_an_error() -> None:
    hidden, weight, labels, _ = on_device(*inputs(4, 3, 8, torch.float32))
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, backend="triton")
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward"):
        torch.autograd.grad(gradient.sum(), hidden)


def test_without_a_gradient_there_is_one_product_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, _ = on_device(*inputs(4, 3, 100, torch.float32))
    calls: list[str] = []
    for name in ("product", "add_product"):
        inner = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, inner=inner, name=name: (calls.append(name), inner(*args))[1])
    with chunks_of(64):
        expected = linear_cross_entropy(hidden.requires_grad_(), weight, labels, backend="triton")
        assert calls == ["product", "product", "product", "add_product"]
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, labels, backend="triton"), expected)
    assert calls[4:] == ["product", "product"]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("softcap", "smoothing"), [(None, 0.0), (None, 0.1), (2.0, 0.1)])
def test_workspace_is_bounded(
    softcap: float | None, smoothing: float, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor inside is larger than the bound, though n x V, or the copy of the head, is several times as much."""
    monkeypatch.setattr(triton_path, "WORKSPACE_BYTES", 2**17)
    tile = tiles.Tile(rows=256 if INTERPRETED else 1, columns=64, warps=1)
    monkeypatch.setattr(triton_path, "chunk_tile", lambda architecture, rows: tile)
    hidden, weight, labels, _ = on_device(*inputs(*((10, 64, 1650) if copied else (250, 8, 3301)), torch.float32))
    if copied:
        weight = torch.stack([weight, weight], dim=2)[..., 0]
    with LargestAllocation() as largest, torch.no_grad():
        triton_path.rows(hidden, weight, labels, None, softcap, smoothing, 0.0, -100, True)
    assert 2**15 <= largest.bytes <= 2**17


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
def test_shipped_tiles_fit_the_workspace(name: str) -> None:
    """And are what the kernels assume: powers of two, not narrower than a program's threads."""
    assert tiles.FEW_ROWS <= triton_path.MAX_TILE_ROWS
    for rows in (1, tiles.FEW_ROWS - 1, tiles.FEW_ROWS, triton_path.MAX_TILE_ROWS):
        for tile in (tiles.chunk_tile(name, rows), tiles.finish_tile(name)):
            assert tile.columns & (tile.columns - 1) == tile.rows & (tile.rows - 1) == 0
            assert tile.columns >= tile.warps * (64 if name == "gfx942" else 32)
        for weights, itemsize, vocabulary in itertools.product((0, 1, 2), (2, 4), (1, 50257, 256000)):
            per_word = rows * (4 + weights * itemsize)
            block = tiles.chunk_tile(name, rows).columns
            columns = triton_path.chunk_columns(vocabulary, per_word, block)
            assert columns % block == 0
            assert columns * per_word <= triton_path.WORKSPACE_BYTES
            assert columns >= vocabulary or 2 * (columns + block) * per_word > triton_path.WORKSPACE_BYTES


def test_few_rows_are_one_chunk() -> None:
    """GPT-2's and Llama 3's vocabularies with as many labelled rows as a batch of classification has."""
    for vocabulary, rows in ((50257, 128), (128256, 64)):
        block = tiles.chunk_tile("sm_90", rows).columns
        assert triton_path.chunk_columns(vocabulary, rows * 6, block) >= vocabulary


@pytest.mark.parametrize("n", [0, 5])
def test_opcheck(n: int) -> None:
    hidden, weight, labels, bias = on_device(*inputs(n, 3, 40, torch.float32))
    with chunks_of(32):
        for options in ((None, None, 0.0, 0.0), (bias, 2.0, 0.1, 0.01)):
            leaf = hidden.clone().requires_grad_()
            torch.library.opcheck(operators.rows, (leaf, weight, labels, *options, -100, True, True))
            torch.library.opcheck(operators.rows, (hidden, weight, labels, *options, -100, False, True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction: str) -> None:
    torch.compiler.reset()
    hidden, weight, labels, _ = on_device(*inputs(9, 4, 17, torch.float32))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"reduction": reduction, "backend": "triton", "softcap": 2.0}
    got = loss_and_gradient(compiled, hidden, weight, labels, **options)
    expected = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **options)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_in_a_cuda_graph() -> None:
    """And nothing on the way waits for the device, which would be an error here."""
    hidden, weight, labels, bias = on_device(*inputs(40, 64, 5000, torch.float16))
    hidden.requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1, backend="triton")
        return loss, torch.autograd.grad(loss, hidden)[0]

    with chunks_of(1024):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        with torch.no_grad():
            hidden.mul_(0.5)
        expected = step()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_float64_is_refused_and_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, _ = on_device(*inputs(3, 3, 8))
    with pytest.raises(ValueError, match=r"triton implementation of linear_cross_entropy takes .* not float64"):
        linear_cross_entropy(hidden, weight, labels, backend="triton")
    monkeypatch.setattr(dispatch, "_WARNED", set())
    with pytest.warns(UserWarning, match="takes the slower PyTorch path: .* not float64"):
        assert resolve_backend(None, torch.device("cuda"), "linear_cross_entropy", dtype=torch.float64) == "torch"
    assert resolve_backend(None, torch.device("cuda"), "linear_cross_entropy", dtype=torch.float16) == "triton"


@pytest.mark.skipif(not INTERPRETED, reason="the kernels take bfloat16 on a GPU")
def test_frozen_tensors_in_bfloat16_are_refused_by_the_interpreter() -> None:
    """The dispatcher looks at hidden alone; the interpreter would compute nonsense from the others."""
    hidden, weight, labels, bias = inputs(3, 3, 8, torch.float32)
    with pytest.raises(ValueError, match="takes a weight in float16, float32 here, not in bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels, backend="triton")
    with pytest.raises(ValueError, match="takes a bias in float16, float32 here, not in bfloat16"):
        linear_cross_entropy(hidden, weight, labels, bias=bias.bfloat16(), backend="triton")


def test_checks_the_labels_on_a_cpu() -> None:
    hidden, weight, labels, _ = inputs(3, 3, 8, torch.float32, ignored=False)
    labels[2] = 8
    with pytest.raises(ValueError, match=r"labels in \[0, 8\) or ignore_index -100, got 8 at row 2"):
        operators.rows(hidden, weight, labels, None, None, 0.0, 0.0, -100, True, True)
