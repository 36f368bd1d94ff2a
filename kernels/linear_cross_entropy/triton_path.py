"""linear_cross_entropy with Triton kernels between cuBLAS products: chunks, buffers and launches.

The method is that of `torch_path`; what differs is that a chunk of logits is read and written by one kernel instead of
a dozen operators. Per chunk: logits = hidden @ head.T, the chunk kernel (state, weights, rescaled sums), sums +=
weights @ head. Then the last kernel. Imports Triton: to be imported where a kernel runs, not before.
"""

from __future__ import annotations

import torch

from ptengine.kernels.launch import architecture, ceil_div
from ptengine.kernels.linear_cross_entropy import products
from ptengine.kernels.linear_cross_entropy.tiles import chunk_tile, finish_tile
from ptengine.kernels.linear_cross_entropy.triton_kernels import chunk_kernel, finish_kernel

# Of the logits, the weights and, where it has to be copied, the head of one chunk.
WORKSPACE_BYTES = 64 * 2**20
# More rows read the head less often, fewer leave wider chunks, between which the sums are read and written. At 2048 the
# products are bound by arithmetic either way.
MAX_TILE_ROWS = 2048


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
    n, d = hidden.shape
    loss = hidden.new_empty(n, dtype=torch.float32)  # [n]
    gradient = hidden.new_empty(n if with_gradient else 0, d, dtype=torch.float32)  # [n, d]
    options = bias, softcap, label_smoothing, z_loss, ignore_index
    given = gradient if with_gradient else None
    tiles = ceil_div(n, MAX_TILE_ROWS)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        if tiles == 1:  # a view of the whole costs host time
            _tile_of_rows(hidden, weight, labels, *options, loss, given)
            return loss, gradient
        for i in range(tiles):
            tile = slice(i * n // tiles, (i + 1) * n // tiles)
            own = None if given is None else given[tile]
            _tile_of_rows(hidden[tile], weight, labels[tile], *options, loss[tile], own)
    return loss, gradient


def _tile_of_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    loss: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Fills `loss` [r] and, unless it is None, `gradient` [r, d]."""
    (n, d), vocabulary = hidden.shape, weight.shape[0]
    operand = products.narrower_dtype(hidden, weight)
    hidden = hidden.to(operand).contiguous()  # [r, d]
    # In float16 exp(logit - maximum) is 0 from 17 below the maximum on, and the gradient of a row that is learned well
    # is made of such words. Times half the largest float16, it is 0 from 28 on.
    weight_scale = 2.0**15 if operand == torch.float16 else 1.0
    smoothed = label_smoothing > 0.0
    # Smoothing needs the gradient of the logits' sum as well. The same product sums it, through more rows of weights:
    # the cap's slopes below the others, or without a cap one row of ones above them.
    ones, slopes = (0, 0) if not smoothed or gradient is None else (1, 0) if softcap is None else (0, n)
    stacked = ones + n + slopes if gradient is not None else 0

    kind = architecture(hidden.device)
    tile, last = chunk_tile(kind, n), finish_tile(kind)
    copied = d if _is_copied(weight, operand) else 0
    columns = chunk_columns(vocabulary, 4 * n + operand.itemsize * (stacked + copied), tile.columns)
    # Rows of whole blocks: the kernel needs no masks over columns, and every row is aligned.
    logits = hidden.new_empty(n, columns, dtype=torch.float32)  # [r, C]
    state = hidden.new_empty(n, 5, dtype=torch.float32)
    weights = sums = own_weights = own_sums = uniform = None
    if gradient is not None:
        own_weights = weights = hidden.new_empty(stacked, columns)  # [ones + r + slopes, C]
        # Without more rows the sums are made in the gradient's own memory.
        own_sums = sums = gradient if stacked == n else hidden.new_empty(stacked, d, dtype=torch.float32)
        if ones:
            weights[:ones] = weight_scale
            own_weights, own_sums = weights[ones:], sums[ones:]
        if smoothed:
            uniform = sums[:1] if ones else sums[n:]

    for start in range(0, vocabulary, columns):
        head = weight[start : start + columns].to(operand)  # [c, d]
        if copied:  # once for both products
            head = head.contiguous()
        width = head.shape[0]
        products.product(hidden, head.t(), logits[:, :width])  # [r, d] @ [d, c] -> [r, c]
        chunk_kernel[(ceil_div(n, tile.rows),)](
            logits,
            columns,
            bias,
            bias.stride(0) if bias is not None else 0,
            labels,
            labels.stride(0),
            state,
            own_weights,
            columns,
            own_sums,
            d,
            softcap,
            start,
            width,
            n,
            d,
            FIRST=start == 0,
            SMOOTHED=smoothed,
            WEIGHT_SCALE=weight_scale,
            BLOCK_N=tile.rows,
            BLOCK_C=tile.columns,
            **tile.options,
        )
        if weights is not None and sums is not None:
            # The first chunk overwrites whatever the memory held.
            multiply = products.product if start == 0 else products.add_product
            multiply(weights[:, :width], head, sums)  # [ones + r + slopes, c] @ [c, d]

    finish_kernel[(ceil_div(n, last.rows),)](
        state,
        labels,
        labels.stride(0),
        ignore_index,
        weight,
        weight.stride(0),
        weight.stride(1),
        own_sums,
        d,
        uniform,
        0 if ones else d,
        loss,
        gradient,
        d,
        label_smoothing,
        z_loss,
        n,
        vocabulary,
        d,
        SMOOTHED=smoothed,
        WEIGHT_SCALE=weight_scale,
        BLOCK_N=last.rows,
        BLOCK_D=last.columns,
        **last.options,
    )


def chunk_columns(vocabulary: int, bytes_per_word: int, block: int) -> int:
    """How many words one chunk takes: whole blocks, as many as the workspace holds, spread evenly over the chunks."""
    columns = max(WORKSPACE_BYTES // bytes_per_word // block, 1) * block
    chunks = ceil_div(vocabulary, columns)
    return ceil_div(ceil_div(vocabulary, chunks), block) * block


def _is_copied(weight: torch.Tensor, operand: torch.dtype) -> bool:
    """Whether the products work on a copy of each chunk: of another dtype, or with strides cuBLAS does not take."""
    (vocabulary, d), (stride_v, stride_d) = weight.shape, weight.stride()
    in_place = (stride_d == 1 and stride_v >= d) or (stride_v == 1 and stride_d >= vocabulary)
    return weight.dtype != operand or not in_place
