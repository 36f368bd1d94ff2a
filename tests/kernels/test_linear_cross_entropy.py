"""linear_cross_entropy: values and gradients against float64, the operator's contract, its memory.

The Triton kernels have a file of their own, which takes its inputs from here.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ptengine.kernels import onednn
from ptengine.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    operators,
    products,
    torch_path,
)

OPTIONS = [
    {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
    for softcap, smoothing, z_loss in itertools.product((None, 2.0), (0.0, 0.2), (0.0, 0.01))
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows and of vocabulary, the last of each narrower, at sizes a test can afford."""
    monkeypatch.setattr(torch_path, "MAX_TILE_ROWS", 4)
    monkeypatch.setattr(torch_path, "FEW_ROWS_TILE_COLUMNS", 5)


def inputs(
    n: int, d: int, vocabulary: int, dtype: torch.dtype = torch.float64, *, ignored: bool = True, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1009 + d * 31 + vocabulary)
    hidden, weight, bias = (
        (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)
        for shape in ((n, d), (vocabulary, d), (vocabulary,))
    )
    labels = torch.randint(vocabulary, (n,), generator=generator)
    if ignored:
        labels[1::3] = -100
    return hidden.requires_grad_(), weight, labels, bias


def loss_and_gradient(function: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    leaf = hidden.detach().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), leaf)
    return loss.detach(), gradient


def stock(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Plain PyTorch, as a Hugging Face causal model computes it."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(hidden.dtype, torch.float32)), labels, **kwargs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_torch_cross_entropy(reduction: str, smoothing: float, backend: str) -> None:
    hidden, weight, labels, _ = inputs(13, 6, 29)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = loss_and_gradient(stock, hidden, weight, labels, **options)
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, backend=backend, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reference_formula_by_hand() -> None:
    """One row, every option, written out."""
    hidden, weight, labels, bias = inputs(1, 3, 4, ignored=False)
    logits = 2.0 * torch.tanh((weight @ hidden[0] + bias) / 2.0)
    lse = logits.exp().sum().log()
    expected = 0.8 * (lse - logits[labels[0]]) + 0.2 * (lse - logits).mean() + 0.01 * lse**2
    got = linear_cross_entropy_reference(
        hidden, weight, labels, bias=bias, softcap=2.0, label_smoothing=0.2, z_loss=0.01, reduction="none"
    )
    torch.testing.assert_close(got[0], expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_reference_in_float64(
    options: dict[str, Any], with_bias: bool, reduction: str, small_tiles: None
) -> None:
    hidden, weight, labels, bias = inputs(11, 6, 23)
    options = options | {"bias": bias if with_bias else None, "reduction": reduction}
    expected = loss_and_gradient(linear_cross_entropy_reference, hidden, weight, labels, **options)
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 12),
    d=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    tile_rows=st.integers(1, 13),
    tile_columns=st.integers(1, 41),
    options=st.sampled_from(OPTIONS),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
)
def test_any_shape_equals_reference(
    n: int, d: int, vocabulary: int, tile_rows: int, tile_columns: int, options: dict[str, Any], scale: float
) -> None:
    hidden, weight, labels, _ = inputs(n, d, vocabulary, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_path, "MAX_TILE_ROWS", tile_rows)
        patch.setattr(torch_path, "FEW_ROWS_TILE_COLUMNS", tile_columns)
        got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, reduction="none", **options)
    expected = loss_and_gradient(linear_cross_entropy_reference, hidden, weight, labels, reduction="none", **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN: {onednn.missing()}")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_by_onednn(
    options: dict[str, Any], with_bias: bool, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile is one that oneDNN multiplies twice; the bounds of the next test."""
    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 1)
    tiles, original = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *args: tiles.append(args[0].shape) or original(*args))
    hidden, weight, labels, bias = inputs(11, 6, 23, torch.float32)
    bias = bias if with_bias else None
    exact, plain = (
        loss_and_gradient(
            linear_cross_entropy_reference, hidden.to(dtype), weight.to(dtype), labels, reduction="none", **options,
            bias=None if bias is None else bias.to(dtype),
        )
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, reduction="none", bias=bias, **options)
    assert len(tiles) == 3 * 5 * 2  # 3 of rows, 5 of words
    for truth, theirs, ours, factor in zip(exact, plain, got, (1.5, 3.0), strict=True):
        floor = truth.abs().max() * torch.finfo(ours.dtype).eps
        assert (ours - truth).abs().max() <= factor * (theirs - truth).abs().max() + floor


@pytest.mark.parametrize("operands", ["as shipped", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d", "vocabulary"), [(7, 64, 5003), (96, 128, 20011), (24, 1024, 9001)])
def test_error_is_at_most_that_of_plain_pytorch(
    dtype: torch.dtype, operands: str, n: int, d: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: 1.5x the error of the same-dtype stock computation in the loss, 3x in the gradient.

    The floors are one rounding of the result to its own dtype, where the stock computation happens to hit it. "half"
    takes the products in the tensors' own dtype, which a CPU does not choose for itself, over many tiles.
    """
    if operands == "half":
        monkeypatch.setattr(torch_path, "tile_columns", lambda *args, **kwargs: 128)
        monkeypatch.setattr(torch_path, "operand_dtype", lambda hidden, weight: weight.dtype)
    hidden, weight, labels, _ = inputs(n, d, vocabulary, dtype, ignored=False, scale=0.3)
    exact = loss_and_gradient(
        linear_cross_entropy_reference, hidden.double(), weight.double(), labels, reduction="none"
    )
    peer = loss_and_gradient(stock, hidden, weight, labels, reduction="none")
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, reduction="none")
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    for truth, plain, ours, factor in zip(exact, peer, got, (1.5, 3.0), strict=True):
        floor = truth.abs().max() * torch.finfo(ours.dtype).eps
        assert (ours - truth).abs().max() <= factor * (plain - truth).abs().max() + floor


def test_half_products_are_added_up_in_float32() -> None:
    """Between 256 and 512 bfloat16 steps by 2: a running sum in it would lose a 1 from every tile."""
    total, one = torch.full((1, 1), 256.0), torch.ones(1, 1)
    for _ in range(5):
        products.add_product(one, one.bfloat16(), total)
    assert total.item() == 261.0


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("native", [False, True])
def test_mixed_dtypes(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native:
        monkeypatch.setattr(torch_path, "operand_dtype", lambda hidden, weight: torch.bfloat16)
    hidden, weight, labels, _ = inputs(9, 32, 301)
    hidden, weight = hidden.detach().to(hidden_dtype), weight.to(weight_dtype)
    exact = loss_and_gradient(linear_cross_entropy_reference, hidden.double(), weight.double(), labels)
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    assert got[1].dtype == hidden_dtype
    torch.testing.assert_close([x.double() for x in got], list(exact), rtol=2e-2, atol=2e-2 if native else 2e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(options: dict[str, Any], reduction: str, small_tiles: None) -> None:
    hidden, weight, labels, bias = inputs(6, 3, 8)
    assert torch.autograd.gradcheck(
        lambda x: linear_cross_entropy(x, weight, labels, bias=bias, reduction=reduction, **options), hidden
    )


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(n: int, dtype: torch.dtype, small_tiles: None) -> None:
    hidden, weight, labels, bias = inputs(n, 3, 8, dtype)
    for options in ((None, None, 0.0, 0.0), (bias, 2.0, 0.1, 0.01)):
        torch.library.opcheck(operators.rows, (hidden, weight, labels, *options, -100, True, False))
        torch.library.opcheck(operators.rows, (hidden.detach(), weight, labels, *options, -100, False, False))
    gradient = torch.randn(n, 3, dtype=products.precision(hidden))
    torch.library.opcheck(operators.backward, (gradient, gradient[:, 0], dtype))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(compiler: str, reduction: str) -> None:
    torch.compiler.reset()
    hidden, weight, labels, _ = inputs(9, 4, 17, torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    got = loss_and_gradient(compiled, hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(
        got, loss_and_gradient(linear_cross_entropy, hidden, weight, labels, reduction=reduction)
    )


def test_compiled_code_still_checks_the_labels() -> None:
    """The check sits inside the operator: in the public function the compiler would have dropped it."""
    torch.compiler.reset()
    hidden, weight, labels, _ = inputs(3, 4, 17, torch.float32, ignored=False)
    labels[2] = 17
    with pytest.raises(ValueError, match=r"labels in \[0, 17\) or ignore_index -100, got 17 at row 2"):
        torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")(hidden, weight, labels)


def test_keeps_one_row_of_hidden_size_per_label() -> None:
    """Saved for backward: at most [n, d] and [n], never [n, V] nor the weight."""
    hidden, weight, labels, _ = inputs(50, 8, 3001, torch.float32)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.requires_grad
    bytes_kept = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}.values())
    assert 50 * 8 * 4 <= bytes_kept <= 50 * 8 * 4 + 50 * 8


class LargestAllocation(TorchDispatchMode):
    """The largest storage that any operator allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        allocates = all(returned.alias_info is None for returned in func._schema.returns)
        if isinstance(result, torch.Tensor) and func.namespace in ("aten", "mkldnn") and allocates:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("dtype", "least_weight"), [(torch.float32, 2**60), (torch.float32, 1), (torch.bfloat16, 1)], ids=str
)
@pytest.mark.parametrize(("softcap", "smoothing"), [(None, 0.0), (2.0, 0.1)])
def test_workspace_is_one_tile(
    dtype: torch.dtype,
    least_weight: int,
    softcap: float | None,
    smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No tensor inside the operator is larger than a tile, though n x V is 40 times as much; by oneDNN and without."""
    monkeypatch.setattr(onednn, "LEAST_WEIGHT", least_weight)
    monkeypatch.setattr(onednn, "MOST_ROWS", 1000)
    monkeypatch.setattr(torch_path, "TILE_ELEMENTS", 2**14)
    monkeypatch.setattr(torch_path, "FEW_ROWS_TILE_COLUMNS", 64)
    hidden, weight, labels, _ = inputs(200, 8, 3301, dtype)
    with LargestAllocation() as largest, torch.no_grad():
        torch_path.rows(hidden, weight, labels, None, softcap, smoothing, 0.0, -100, True)
    assert 2**14 <= largest.bytes <= 2**14 * 4


@pytest.mark.parametrize("rows", [1, 64, 65, 512, 2048])
@pytest.mark.parametrize("d", [64, 768, 8192])
def test_shipped_tiles_fit_the_workspace(rows: int, d: int) -> None:
    for copies_weight, buffers in itertools.product((False, True), (1, 2)):
        columns = torch_path.tile_columns(rows, d, copies_weight=copies_weight, buffers=buffers)
        assert torch_path.MIN_TILE_COLUMNS <= columns <= torch_path.MAX_TILE_COLUMNS
        assert buffers * rows * columns <= torch_path.TILE_ELEMENTS


def test_same_bits_every_time() -> None:
    hidden, weight, labels, _ = inputs(300, 32, 4001, torch.float32)
    first = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    for _ in range(20):
        again = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("n", [0, 4])
def test_mean_over_no_label_is_zero(backend: str, n: int) -> None:
    hidden, weight, _, _ = inputs(n, 3, 8)
    labels = torch.full((n,), -1)
    loss, gradient = loss_and_gradient(
        linear_cross_entropy, hidden, weight, labels, ignore_index=-1, label_smoothing=0.1, z_loss=0.1, backend=backend
    )
    assert loss == 0.0
    assert gradient.shape == (n, 3)
    assert not gradient.any()


def test_ignored_rows_may_hold_anything() -> None:
    """A NaN in an ignored row (padding that attended to nothing) reaches neither the loss nor the gradient."""
    hidden, weight, labels, _ = inputs(5, 3, 8)
    expected = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1][labels != -100], expected[1][labels != -100])


def test_nan_and_removed_words() -> None:
    hidden, weight, labels, _ = inputs(3, 3, 8, ignored=False)
    labels.fill_(7)
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    loss, gradient = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_bias_of_minus_infinity_over_whole_tiles(small_tiles: None) -> None:
    """The running maximum stays -inf over the first tile: the pivot must not turn -inf - -inf into NaN."""
    hidden, weight, labels, bias = inputs(3, 3, 17, ignored=False)
    labels.fill_(12)
    bias[:7] = -torch.inf
    expected = loss_and_gradient(linear_cross_entropy_reference, hidden, weight[7:], labels - 7, bias=bias[7:])
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, bias=bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels, _ = inputs(6, 8, 50, torch.float32, scale=100.0)
    exact = loss_and_gradient(linear_cross_entropy_reference, hidden.double(), weight.double(), labels)
    got = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    torch.testing.assert_close([x.double() for x in got], list(exact), rtol=1e-5, atol=1e-2)


def test_unlooked_at_label_out_of_range_gives_nan() -> None:
    """What a device other than a CPU computes, where the check would have to wait for it."""
    hidden, weight, _, _ = inputs(3, 3, 8)
    with torch.no_grad():
        loss = torch_path._tile_of_rows(
            hidden, weight, torch.tensor([2, 8, -5]), None, None, 0.0, 0.0, torch.zeros_like(hidden)
        )
    assert loss.isnan().tolist() == [False, True, True]


def test_strides_do_not_matter_and_inputs_stay_as_they_are() -> None:
    hidden, weight, labels, bias = (x.detach() for x in inputs(6, 4, 9))
    strided = (
        torch.stack([hidden, hidden], dim=2)[..., 0],
        weight.T.contiguous().T,
        labels.repeat_interleave(2)[::2],
    )
    before = [x.clone() for x in (*strided, bias)]
    expected = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, bias=bias)
    torch.testing.assert_close(loss_and_gradient(linear_cross_entropy, *strided, bias=bias), expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (*strided, bias), strict=True))

    row = hidden[:1].clone().requires_grad_()
    linear_cross_entropy(row.expand(6, 4), weight, labels).backward()
    leaf = hidden[:1].repeat(6, 1).requires_grad_()
    linear_cross_entropy(leaf, weight, labels).backward()
    assert row.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(row.grad, leaf.grad.sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "operand_dtype", lambda hidden, weight: weight.dtype)
    hidden, weight, labels, _ = inputs(6, 16, 33, dtype)
    expected = linear_cross_entropy(hidden, weight, labels, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, backend=backend)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, hidden)[0], torch.autograd.grad(expected, hidden)[0])


def test_no_gradient_is_computed_unless_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, _ = inputs(4, 3, 8)
    gradients: list[torch.Tensor | None] = []
    inner = torch_path._tile_of_rows

    def spy(*args: Any) -> torch.Tensor:
        gradients.append(args[-1])
        return inner(*args)

    monkeypatch.setattr(torch_path, "_tile_of_rows", spy)
    expected = linear_cross_entropy(hidden, weight, labels)
    assert gradients.pop() is not None
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), expected)
    loss = linear_cross_entropy(hidden.detach(), weight, labels)
    assert gradients == [None, None]
    assert not loss.requires_grad


def test_head_may_require_grad_where_none_is_taken() -> None:
    hidden, weight, labels, _ = inputs(4, 3, 8)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)


def test_second_derivative_is_an_error() -> None:
    """It would otherwise come out as zero, since the gradient is kept as a constant."""
    hidden, weight, labels, _ = inputs(4, 3, 8)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward"):
        torch.autograd.grad(gradient.sum(), hidden)


H, W, Y = torch.zeros(4, 3), torch.zeros(8, 3), torch.zeros(4, dtype=torch.int64)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(2, 2, 3)}, r"hidden of shape \[n, d\], got \[2, 2, 3\]"),
    ({"weight": torch.zeros(3, 8)}, r"weight of shape \[V >= 1, d = 3\], got \[3, 8\]"),
    ({"weight": torch.zeros(8)}, r"weight of shape .*, got \[8\]"),
    ({"weight": torch.zeros(0, 3)}, r"weight of shape .*, got \[0, 3\]"),
    ({"labels": Y[:3]}, r"labels of shape \[n = 4\], got \[3\]"),
    ({"labels": Y.int()}, "labels of dtype torch.int64, got torch.int32"),
    ({"labels": Y + 8}, r"labels in \[0, 8\) or ignore_index -100, got 8 at row 0"),
    ({"labels": Y - 1}, r"labels in \[0, 8\) or ignore_index -100, got -1 at row 0"),
    ({"bias": torch.zeros(7)}, r"bias of shape \[V = 8\], got \[7\]"),
    ({"hidden": Y[:, None].expand(4, 3)}, "hidden in float64, .*, got torch.int64"),
    ({"weight": W.double()}, "weight and hidden both or neither in float64, got torch.float64, torch.float32"),
    ({"bias": torch.zeros(8).double()}, "bias and hidden both or neither in float64"),
    ({"weight": W.to("meta")}, "weight on hidden's device cpu, got meta"),
    ({"labels": Y.to("meta")}, "labels on hidden's device cpu, got meta"),
    ({"weight": W.clone().requires_grad_()}, r"a frozen head \(weight.requires_grad False\)"),
    ({"bias": torch.zeros(8).requires_grad_()}, r"a frozen head \(bias.requires_grad False\)"),
    ({"softcap": 0.0}, "softcap None or finite and above 0, got 0.0"),
    ({"softcap": float("inf")}, "softcap None or finite and above 0, got inf"),
    ({"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\), got 1.0"),
    ({"label_smoothing": -0.1}, r"label_smoothing in \[0, 1\), got -0.1"),
    ({"z_loss": -1.0}, "z_loss finite and at least 0, got -1.0"),
    ({"z_loss": float("nan")}, "z_loss finite and at least 0, got nan"),
    ({"reduction": "avg"}, "reduction 'mean', 'sum' or 'none', got 'avg'"),
    ({"backend": "cuda"}, "expected a backend of 'reference', 'torch', 'triton', got 'cuda'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bad_arguments_have_one_clear_error(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments = {"hidden": H, "weight": W, "labels": Y, "backend": backend} | wrong
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_hidden_states_without_a_dimension_divided_by_zero() -> None:
    """In 16 bits, whose weight is read in tiles; the loss of logits that are all 0 is log V."""
    hidden, weight = torch.empty(3, 0, dtype=torch.bfloat16), torch.empty(7, 0, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 3, 6]), backend="torch")
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)
