"""linear_cross_entropy in plain PyTorch, one pass over the vocabulary, as a torch.library operator.

The head is to the hidden states what keys and values are to queries: the gradient of log-sum-exp is the mean of the
weight's rows under the softmax, so it can be accumulated beside the log-sum-exp itself, tile of vocabulary by tile,
with a running maximum, as attention does (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3). Each tile of
logits is made once, used for both and overwritten: two matrix products in all and no recomputation in backward. What
is kept for backward is one [n, d] tensor.
"""

from __future__ import annotations

import torch

from ptengine.kernels.linear_cross_entropy.checks import check_label_range

# Elements of a tile of logits: 32 MiB of fp32.
TILE_ELEMENTS = 2**23
MAX_TILE_ROWS = 2048
# Narrow tiles stay in cache between the two products, wide ones need fewer operator calls, each of which waits for the
# slowest thread. From 2048 to 16384 columns the work of 512 rows grows by 7 %, while the calls fall by a factor of 8.
MAX_TILE_COLUMNS = 8192
# With few rows the products are bound by reading the weight, so cache counts for more and calls cost less.
FEW_ROWS = 64
FEW_ROWS_TILE_COLUMNS = 4096
MIN_TILE_COLUMNS = 1024  # however wide the model


def linear_cross_entropy_torch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """As `linear_cross_entropy`, arguments checked."""
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    loss, _ = _rows(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, ignore_index, with_gradient)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (labels != ignore_index).sum().clamp(min=1)


@torch.library.custom_op("ptengine::linear_cross_entropy_rows", mutates_args=())
def _rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row [n] and its gradient with respect to that row of hidden [n, d] ([0, d] if not asked for)."""
    check_label_range(labels, weight.shape[0], ignore_index)
    precision = _precision(hidden)
    n, d = hidden.shape
    loss = torch.empty(n, dtype=precision, device=hidden.device)  # [n]
    gradient = torch.zeros(n if with_gradient else 0, d, dtype=precision, device=hidden.device)  # [n, d]
    kept = labels != ignore_index  # [n]
    # Operands as they are: autocast would round them a second time, and only some of the calls below.
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n, MAX_TILE_ROWS):
            rows = slice(start, min(start + MAX_TILE_ROWS, n))
            loss[rows] = _tile_of_rows(
                hidden[rows],
                weight,
                labels[rows].where(kept[rows], 0),
                bias,
                softcap,
                label_smoothing,
                z_loss,
                gradient[rows] if with_gradient else None,
            )
    loss.masked_fill_(~kept, 0.0)
    if with_gradient:
        gradient.masked_fill_(~kept.unsqueeze(1), 0.0)
    return loss, gradient


def _tile_of_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Loss [r] of r rows; adds their gradient to `gradient` [r, d], which is zero, unless it is None."""
    operand, precision = operand_dtype(hidden, weight), _precision(hidden)
    n, (vocabulary, d) = hidden.shape[0], weight.shape
    columns = tile_columns(n, d, copies_weight=operand != weight.dtype, buffers=1 if softcap is None else 2)
    hidden = hidden.to(operand)  # [r, d]

    maximum = torch.full((n, 1), -torch.inf, dtype=precision, device=hidden.device)
    total = torch.zeros_like(maximum)  # sum of exp(logit - maximum)
    # A label that no tile contains (possible only where check_label_range cannot look) makes the loss NaN.
    picked = torch.full_like(maximum, torch.nan)
    logit_sum = torch.zeros_like(maximum)
    # Gradient of logit_sum: the same row for all rows, unless the softcap's slope differs from one to the next.
    uniform = hidden.new_zeros(1 if softcap is None else n, d, dtype=precision) if label_smoothing > 0.0 else None
    label_slope = torch.ones_like(maximum)
    buffer = torch.empty(n, min(columns, vocabulary), dtype=precision, device=hidden.device)

    for start in range(0, vocabulary, columns):
        head = weight[start : start + columns].to(operand)  # [c, d]
        width = head.shape[0]
        # The last, narrower tile gets the buffer's memory as a contiguous [r, c].
        logits = buffer.view(-1)[: n * width].view(n, width)
        _product(hidden, head.t(), logits)  # [r, d] @ [d, c] -> [r, c]
        if bias is not None:
            logits.add_(bias[start : start + columns])
        local = (labels - start).unsqueeze(1)  # [r, 1]
        inside = (local >= 0) & (local < width)
        local = local.clamp_(0, width - 1)
        slope = None
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = torch.addcmul(logits.new_ones(()), logits, logits, value=-1)  # [r, c]: d capped / d raw
            logits.mul_(softcap)
            label_slope = torch.where(inside, slope.gather(1, local), label_slope)
        picked = torch.where(inside, logits.gather(1, local), picked)
        if label_smoothing > 0.0:
            logit_sum.add_(logits.sum(dim=1, keepdim=True))
            if uniform is not None and gradient is not None:
                if slope is None:
                    uniform.add_(head.sum(dim=0, dtype=precision))
                else:
                    _add_product(uniform, slope, head)  # [r, c] @ [c, d]

        previous, maximum = maximum, torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
        pivot = maximum.masked_fill(maximum == -torch.inf, 0.0)  # all -inf so far (a bias that masks): exp gives 0
        rescale = (previous - pivot).exp_()  # [r, 1]
        weights = logits.sub_(pivot).exp_()  # [r, c]
        total.mul_(rescale).add_(weights.sum(dim=1, keepdim=True))
        if gradient is not None:
            if start > 0:
                gradient.mul_(rescale)
            _add_product(gradient, weights if slope is None else weights.mul_(slope), head)  # [r, c] @ [c, d]

    lse = maximum + total.log()  # [r, 1]
    loss = (1.0 - label_smoothing) * (lse - picked) + z_loss * lse.square()
    if label_smoothing > 0.0:
        loss = loss + label_smoothing * (lse - logit_sum / vocabulary)
    if gradient is not None:
        gradient.mul_((1.0 + 2.0 * z_loss * lse) / total)
        of_label = weight[labels.clamp(0, vocabulary - 1)].to(precision)  # [r, d]
        gradient.addcmul_(of_label, label_slope, value=label_smoothing - 1.0)
        if uniform is not None:
            gradient.sub_(uniform, alpha=label_smoothing / vocabulary)
    return loss.squeeze(1)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """out = left @ right, without a temporary where the dtypes agree."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _add_product(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """accumulator += left @ right, the product taken in right's dtype."""
    if right.dtype == accumulator.dtype:
        accumulator.addmm_(left, right)
    else:
        accumulator.add_(torch.mm(left.to(right.dtype), right))


def _precision(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of logits, sums and results."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def operand_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the matrix products are taken.

    On a CPU the precision itself: converting a tile of a half-precision weight costs far less than a half-precision
    product does where the instruction set has none. Elsewhere the narrower of the two, for the tensor cores.
    """
    if hidden.device.type == "cpu":
        return _precision(hidden)
    return weight.dtype if weight.dtype.itemsize < hidden.dtype.itemsize else hidden.dtype


def tile_columns(rows: int, d: int, *, copies_weight: bool, buffers: int) -> int:
    """How many words of the vocabulary one tile takes."""
    widest = FEW_ROWS_TILE_COLUMNS if rows <= FEW_ROWS else MAX_TILE_COLUMNS
    columns = min(widest, TILE_ELEMENTS // (buffers * max(rows, 1)))
    if copies_weight:  # the converted tile of the weight is workspace as well
        columns = min(columns, max(MIN_TILE_COLUMNS, TILE_ELEMENTS // d))
    return columns


@_rows.register_fake
def _(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, ignore_index, with_gradient):  # type: ignore[no-untyped-def]
    n, d = hidden.shape
    precision = _precision(hidden)
    return hidden.new_empty(n, dtype=precision), hidden.new_empty(n if with_gradient else 0, d, dtype=precision)


@torch.library.custom_op("ptengine::linear_cross_entropy_backward", mutates_args=())
def _backward(gradient: torch.Tensor, of_loss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the kept gradient [n, d] times the gradient of their loss [n].

    An operator without a derivative, so that a second differentiation is an error instead of a wrong number.
    """
    return (gradient * of_loss.unsqueeze(1)).to(dtype)


@_backward.register_fake
def _(gradient, of_loss, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _differentiate(ctx, of_loss, _of_gradient):  # type: ignore[no-untyped-def]
    (gradient,) = ctx.saved_tensors
    return _backward(gradient, of_loss, ctx.dtype), *[None] * 8


_rows.register_autograd(_differentiate, setup_context=_setup_context)
