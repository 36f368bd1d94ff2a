"""linear_cross_entropy in plain PyTorch, one pass over the vocabulary.

The head is to the hidden states what keys and values are to queries: the gradient of log-sum-exp is the mean of the
weight's rows under the softmax, so it can be accumulated beside the log-sum-exp itself, tile of vocabulary by tile,
with a running maximum, as attention does (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3). Each tile of
logits is made once, used for both and overwritten: two matrix products in all and no recomputation in backward. What
is kept for backward is one [n, d] tensor.
"""

from __future__ import annotations

import torch

from ptengine.kernels import onednn
from ptengine.kernels.linear_cross_entropy.products import add_product, narrower_dtype, precision, product

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


def rows(
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
    dtype = precision(hidden)
    n, d = hidden.shape
    loss = torch.empty(n, dtype=dtype, device=hidden.device)  # [n]
    gradient = torch.zeros(n if with_gradient else 0, d, dtype=dtype, device=hidden.device)  # [n, d]
    kept = labels != ignore_index  # [n]
    for start in range(0, n, MAX_TILE_ROWS):
        tile = slice(start, min(start + MAX_TILE_ROWS, n))
        loss[tile] = _tile_of_rows(
            hidden[tile],
            weight,
            labels[tile].where(kept[tile], 0),
            bias,
            softcap,
            label_smoothing,
            z_loss,
            gradient[tile] if with_gradient else None,
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
    operand, dtype = operand_dtype(hidden, weight), precision(hidden)
    n, (vocabulary, d) = hidden.shape[0], weight.shape
    columns = tile_columns(n, d, copies_weight=operand != weight.dtype, buffers=1 if softcap is None else 2)
    hidden = hidden.to(operand)  # [r, d]

    maximum = torch.full((n, 1), -torch.inf, dtype=dtype, device=hidden.device)
    total = torch.zeros_like(maximum)  # sum of exp(logit - maximum)
    # A label that no tile contains (possible only where check_label_range cannot look) makes the loss NaN.
    picked = torch.full_like(maximum, torch.nan)
    logit_sum = torch.zeros_like(maximum)
    # Gradient of logit_sum: the same row for all rows, unless the softcap's slope differs from one to the next.
    uniform = hidden.new_zeros(1 if softcap is None else n, d, dtype=dtype) if label_smoothing > 0.0 else None
    label_slope = torch.ones_like(maximum)
    by_onednn = onednn.takes(hidden, weight)  # which gives every tile memory of its own
    buffer = torch.empty(0 if by_onednn else n, min(columns, vocabulary), dtype=dtype, device=hidden.device)

    for start in range(0, vocabulary, columns):
        head = weight[start : start + columns].to(operand)  # [c, d]
        width = head.shape[0]
        if by_onednn:
            logits = onednn.linear(hidden, head)  # [r, c]
        else:
            # The last, narrower tile gets the buffer's memory as a contiguous [r, c].
            logits = buffer.view(-1)[: n * width].view(n, width)
            product(hidden, head.t(), logits)  # [r, d] @ [d, c] -> [r, c]
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
                    uniform.add_(head.sum(dim=0, dtype=dtype))
                else:
                    add_product(slope, head, uniform)  # [r, c] @ [c, d]

        previous, maximum = maximum, torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
        pivot = maximum.masked_fill(maximum == -torch.inf, 0.0)  # all -inf so far (a bias that masks): exp gives 0
        rescale = (previous - pivot).exp_()  # [r, 1]
        weights = logits.sub_(pivot).exp_()  # [r, c]
        total.mul_(rescale).add_(weights.sum(dim=1, keepdim=True))
        if gradient is not None:
            if start > 0:
                gradient.mul_(rescale)
            weights = weights if slope is None else weights.mul_(slope)
            if by_onednn:
                gradient.add_(onednn.linear(weights, head.t()))  # [r, c] @ [c, d]
            else:
                add_product(weights, head, gradient)
        del logits, weights  # or oneDNN's next tile would be made beside this one

    lse = maximum + total.log()  # [r, 1]
    loss = (1.0 - label_smoothing) * (lse - picked) + z_loss * lse.square()
    if label_smoothing > 0.0:
        loss = loss + label_smoothing * (lse - logit_sum / vocabulary)
    if gradient is not None:
        gradient.mul_((1.0 + 2.0 * z_loss * lse) / total)
        of_label = weight[labels.clamp(0, vocabulary - 1)].to(dtype)  # [r, d]
        gradient.addcmul_(of_label, label_slope, value=label_smoothing - 1.0)
        if uniform is not None:
            gradient.sub_(uniform, alpha=label_smoothing / vocabulary)
    return loss.squeeze(1)


def operand_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the matrix products are taken.

    On CUDA the narrower of the two, for the tensor cores. Elsewhere the precision itself: converting a tile of a
    half-precision weight costs far less than a half-precision product does where the instruction set has none.
    """
    return narrower_dtype(hidden, weight) if hidden.device.type == "cuda" else precision(hidden)


def tile_columns(rows: int, d: int, *, copies_weight: bool, buffers: int) -> int:
    """How many words of the vocabulary one tile takes."""
    widest = FEW_ROWS_TILE_COLUMNS if rows <= FEW_ROWS else MAX_TILE_COLUMNS
    columns = min(widest, TILE_ELEMENTS // (buffers * max(rows, 1)))
    if copies_weight:  # the converted tile of the weight is workspace as well
        columns = min(columns, max(MIN_TILE_COLUMNS, TILE_ELEMENTS // max(d, 1)))
    return columns
