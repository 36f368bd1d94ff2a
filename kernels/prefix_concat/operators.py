"""The operations as `torch.library` operators, so that torch.compile, fake tensors and autograd see through them.

Each serves both implementations: its last argument says whether the Triton kernels or plain PyTorch do the work, and
everything else (shapes, what is kept, what needs a gradient) is the same for both. Eager calls skip the operators,
see `eager.shortcut`. Importing this module registers the implementations with the dispatcher.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptengine.kernels.dispatch import register
from ptengine.kernels.eager import shortcut
from ptengine.kernels.launch import register_kernel
from ptengine.kernels.prefix_concat import checks, reference, torch_path

__all__: list[str] = []


def _path(kernel: bool) -> ModuleType:
    """The module that does the work; Triton is imported here, where torch.compile does not look."""
    if not kernel:
        return torch_path
    from ptengine.kernels.prefix_concat import triton_path

    return triton_path


def _concat_dense(
    prefix: Tensor, rows: Tensor, prompt_ids: Tensor | None, cos: Tensor | None, sin: Tensor | None, kernel: bool
) -> Tensor:
    checks.check_prompt_values(prompt_ids, prefix.shape[0])
    return _path(kernel).concat(prefix, rows, prompt_ids, cos, sin)


_dense = torch.library.custom_op("ptengine::prefix_concat", mutates_args=())(_concat_dense)


@_dense.register_fake
def _(prefix: Tensor, rows: Tensor, *_: Any) -> Tensor:
    batch, heads, length, dim = rows.shape
    return rows.new_empty(batch, heads, prefix.shape[-3] + length, dim)


def _sum_dense(of_head: Tensor, prompt_ids: Tensor | None, prompts: int, dtype: torch.dtype, kernel: bool) -> Tensor:
    """of_head [B, H_kv, P, D] summed over rows to [P, H_kv, D], or over the rows of each prompt to [N, P, H_kv, D].

    Sums are taken in float32 or better and rounded to `dtype` at the end. `prompts` is N, and is not read where
    `prompt_ids` is None.
    """
    return _path(kernel).sum_rows(of_head, prompt_ids, prompts, dtype)


_sum = torch.library.custom_op("ptengine::prefix_concat_sum", mutates_args=())(_sum_dense)


@_sum.register_fake
def _(of_head: Tensor, prompt_ids: Tensor | None, prompts: int, dtype: torch.dtype, *_: Any) -> Tensor:
    heads, virtual, dim = of_head.shape[1:]
    shape = (virtual, heads, dim) if prompt_ids is None else (prompts, virtual, heads, dim)
    return of_head.new_empty(shape, dtype=dtype)


def _rotate_dense_back(of_own: Tensor, cos: Tensor, sin: Tensor, kernel: bool) -> Tensor:
    """of_own [B, H_kv, T, D] through the rotation's transpose. Token-major inside, as projections want it."""
    return _path(kernel).rotate_back(of_own, cos, sin)


_rotate_back = torch.library.custom_op("ptengine::prefix_concat_rotate_back", mutates_args=())(_rotate_dense_back)


@_rotate_back.register_fake
def _(of_own: Tensor, *_: Any) -> Tensor:
    batch, heads, length, dim = of_own.shape
    return of_own.new_empty(batch, length, heads, dim).transpose(1, 2)


_call_sum = shortcut(_sum, _sum_dense)
_call_rotate_back = shortcut(_rotate_back, _rotate_dense_back)


def _setup_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prefix, _, prompt_ids, cos, sin, kernel = inputs
    ctx.save_for_backward(prompt_ids, cos, sin)
    ctx.prompts, ctx.virtual, ctx.dtype, ctx.kernel = prefix.shape[0], prefix.shape[-3], prefix.dtype, kernel


def _differentiate_dense(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
    prompt_ids, cos, sin = ctx.saved_tensors
    of_prefix = of_rows = None
    if ctx.needs_input_grad[0]:
        of_prefix = _call_sum(of_out[:, :, : ctx.virtual], prompt_ids, ctx.prompts, ctx.dtype, ctx.kernel)
    if ctx.needs_input_grad[1]:
        # A view where there is no rotation, as torch.cat's own gradient: whoever keeps it copies it.
        of_rows = of_out[:, :, ctx.virtual :]
        if cos is not None:
            of_rows = _call_rotate_back(of_rows, cos, sin, ctx.kernel)
    return of_prefix, of_rows, None, None, None, None


_dense.register_autograd(_differentiate_dense, setup_context=_setup_dense)
_call_dense = shortcut(_dense, _concat_dense, _setup_dense, _differentiate_dense)


def _concat_packed(
    prefix: Tensor, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    prompt_ids: Tensor | None, prefix_lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    out_tokens: int | None, kernel: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.check_packed_values(prefix, rows, cu_seqlens, max_seqlen, prompt_ids, prefix_lengths)
    if out_tokens is None or rows.device.type == "cpu":
        counted = rows.shape[0] + _count_virtual(prefix, cu_seqlens, prompt_ids, prefix_lengths)
        checks.check_out_tokens(out_tokens, counted)
        out_tokens = counted
    return _path(kernel).concat_packed(
        prefix, rows, cu_seqlens, max_seqlen, prompt_ids, prefix_lengths, cos, sin, out_tokens
    )


_packed = torch.library.custom_op("ptengine::prefix_concat_varlen", mutates_args=())(_concat_packed)


@_packed.register_fake
def _(prefix: Tensor, rows: Tensor, cu_seqlens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out_tokens = rest[-2]
    if out_tokens is None:
        out_tokens = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(out_tokens, *rows.shape[1:]), cu_seqlens.new_empty(cu_seqlens.shape)


def _count_virtual(prefix: Tensor, cu_seqlens: Tensor, prompt_ids: Tensor | None, prefix_lengths: Tensor | None) -> int:
    """How many prefix tokens the rows have together. Off the CPU the host waits here, except without index tensors."""
    virtual = prefix.shape[-3]
    if prompt_ids is None:
        each: Any = virtual if prefix_lengths is None else prefix_lengths[0]
        return int(each) * (cu_seqlens.shape[0] - 1)
    known = (prompt_ids >= 0) & (prompt_ids < prefix.shape[0])  # [R]; out of range counts as none, as in the kernel
    if prefix_lengths is None:
        return int(known.sum()) * virtual
    return int((prefix_lengths[prompt_ids.clamp(0, prefix.shape[0] - 1)] * known).sum())


def _sum_packed(
    of_out: Tensor, cu_seqlens_out: Tensor, prompt_ids: Tensor | None, prefix_lengths: Tensor | None,
    prompts: int, virtual: int, dtype: torch.dtype, kernel: bool,
) -> Tensor:  # fmt: skip
    """As `_sum`, for packed rows: the first tokens of each row of of_out [out_tokens, H_kv, D]."""
    return _path(kernel).sum_packed(of_out, cu_seqlens_out, prompt_ids, prefix_lengths, prompts, virtual, dtype)


_packed_sum = torch.library.custom_op("ptengine::prefix_concat_varlen_sum", mutates_args=())(_sum_packed)


@_packed_sum.register_fake
def _(
    of_out: Tensor, cu_seqlens_out: Tensor, prompt_ids: Tensor | None, prefix_lengths: Tensor | None,
    prompts: int, virtual: int, dtype: torch.dtype, *_: Any,
) -> Tensor:  # fmt: skip
    shape = (virtual, *of_out.shape[1:]) if prompt_ids is None else (prompts, virtual, *of_out.shape[1:])
    return of_out.new_empty(shape, dtype=dtype)


def _take_own(
    of_out: Tensor, cu_seqlens: Tensor, cu_seqlens_out: Tensor, total: int, max_seqlen: int,
    cos: Tensor | None, sin: Tensor | None, kernel: bool,
) -> Tensor:  # fmt: skip
    """The rows' own tokens [total, H_kv, D] of of_out [out_tokens, H_kv, D], through the rotation's transpose."""
    return _path(kernel).take_own(of_out, cu_seqlens, cu_seqlens_out, total, max_seqlen, cos, sin)


_packed_own = torch.library.custom_op("ptengine::prefix_concat_varlen_own", mutates_args=())(_take_own)


@_packed_own.register_fake
def _(of_out: Tensor, cu_seqlens: Tensor, cu_seqlens_out: Tensor, total: int, *_: Any) -> Tensor:
    return of_out.new_empty(total, *of_out.shape[1:])


_call_packed_sum = shortcut(_packed_sum, _sum_packed)
_call_packed_own = shortcut(_packed_own, _take_own)


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prefix, rows, cu_seqlens, ctx.max_seqlen, prompt_ids, prefix_lengths, cos, sin, _, ctx.kernel = inputs
    ctx.save_for_backward(cu_seqlens, output[1], prompt_ids, prefix_lengths, cos, sin)
    ctx.prompts, ctx.virtual, ctx.dtype, ctx.total = prefix.shape[0], prefix.shape[-3], prefix.dtype, rows.shape[0]


def _differentiate_packed(ctx: Any, of_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    cu_seqlens, cu_seqlens_out, prompt_ids, prefix_lengths, cos, sin = ctx.saved_tensors
    of_prefix = of_rows = None
    if ctx.needs_input_grad[0]:
        of_prefix = _call_packed_sum(
            of_out, cu_seqlens_out, prompt_ids, prefix_lengths, ctx.prompts, ctx.virtual, ctx.dtype, ctx.kernel
        )
    if ctx.needs_input_grad[1]:
        of_rows = _call_packed_own(of_out, cu_seqlens, cu_seqlens_out, ctx.total, ctx.max_seqlen, cos, sin, ctx.kernel)
    return of_prefix, of_rows, *[None] * 8


_packed.register_autograd(_differentiate_packed, setup_context=_setup_packed)
_call_packed = shortcut(_packed, _concat_packed, _setup_packed, _differentiate_packed)


def _write_paged(
    prefix: Tensor, rows: Tensor, cache: Tensor, block_table: Tensor,
    prompt_ids: Tensor | None, cos: Tensor | None, sin: Tensor | None, kernel: bool,
) -> None:  # fmt: skip
    checks.check_prompt_values(prompt_ids, prefix.shape[0])
    checks.check_block_values(block_table, cache, prefix.shape[-3] + rows.shape[2])
    _path(kernel).concat_paged(prefix, rows, cache, block_table, prompt_ids, cos, sin)


_paged = torch.library.custom_op("ptengine::prefix_concat_paged", mutates_args=("cache",))(_write_paged)


@_paged.register_fake
def _(*_: Any) -> None:
    return None


_call_paged = shortcut(_paged, _write_paged, writes=2)


def _run_dense(
    prefix: Tensor, rows: Tensor, *, prompt_ids: Tensor | None, cos: Tensor | None, sin: Tensor | None, kernel: bool
) -> Tensor:
    out: Tensor = _call_dense(prefix, rows, prompt_ids, cos, sin, kernel)
    return out


def _run_packed(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out_tokens: int | None,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    out, cu_seqlens_out = _call_packed(
        prefix, rows, cu_seqlens, max_seqlen, prompt_ids, prefix_lengths, cos, sin, out_tokens, kernel
    )
    return out, cu_seqlens_out


def _run_paged(
    prefix: Tensor,
    rows: Tensor,
    cache: Tensor,
    block_table: Tensor,
    *,
    prompt_ids: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kernel: bool,
) -> None:
    _call_paged(prefix, rows, cache, block_table, prompt_ids, cos, sin, kernel)


for _op, _run, _specification in (
    ("prefix_concat", _run_dense, reference.prefix_concat_reference),
    ("prefix_concat_varlen", _run_packed, reference.prefix_concat_varlen_reference),
    ("prefix_concat_paged", _run_paged, reference.prefix_concat_paged_reference),
):
    register(_op, "reference", _specification)
    register(_op, "torch", partial(_run, kernel=False))
    register_kernel(_op, partial(_run, kernel=True))
