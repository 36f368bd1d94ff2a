"""prefix_concat in plain PyTorch: prefix and rows are written where they belong, nothing is expanded first."""

from __future__ import annotations

import torch

from ptengine.kernels.prefix_concat.checks import check_prompt_range


def prefix_concat_torch(
    prefix: torch.Tensor, rows: torch.Tensor, *, prompt_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """As `prefix_concat`, arguments checked."""
    return _concat(prefix, rows, prompt_ids)


@torch.library.custom_op("ptengine::prefix_concat", mutates_args=())
def _concat(prefix: torch.Tensor, rows: torch.Tensor, prompt_ids: torch.Tensor | None) -> torch.Tensor:
    check_prompt_range(prompt_ids, prefix.shape[0])
    batch, heads, length, dim = rows.shape
    virtual = prefix.shape[-3]
    out = rows.new_empty(batch, heads, virtual + length, dim)
    head = out[:, :, :virtual]  # [B, H_kv, P, D]
    if prompt_ids is None:
        head.copy_(prefix.transpose(0, 1))  # [H_kv, P, D], broadcast over B
    else:
        torch.index_select(prefix.to(rows.dtype).transpose(1, 2), 0, prompt_ids, out=head)
    out[:, :, virtual:].copy_(rows)
    return out


@_concat.register_fake
def _(prefix, rows, prompt_ids):  # type: ignore[no-untyped-def]
    batch, heads, length, dim = rows.shape
    return rows.new_empty(batch, heads, prefix.shape[-3] + length, dim)


@torch.library.custom_op("ptengine::prefix_concat_sum", mutates_args=())
def _sum(of_head: torch.Tensor, prompt_ids: torch.Tensor | None, prompts: int, dtype: torch.dtype) -> torch.Tensor:
    """of_head [B, H_kv, P, D] summed over rows to [P, H_kv, D], or over the rows of each prompt to [N, P, H_kv, D].

    Sums are taken in float32 or better and rounded to `dtype` at the end. `prompts` is N, and is not read where
    `prompt_ids` is None.
    """
    precision = torch.float64 if of_head.dtype == torch.float64 else torch.float32
    if prompt_ids is None:
        # Within one reduction PyTorch accumulates halves in float32 anyway; asking for it would take a slower path.
        summed = of_head.sum(dim=0, dtype=of_head.dtype if dtype == of_head.dtype else precision)  # [H_kv, P, D]
    else:
        summed = of_head.new_zeros(prompts, *of_head.shape[1:], dtype=precision)  # [N, H_kv, P, D]
        if of_head.device.type == "cpu":
            for row, prompt in enumerate(prompt_ids.tolist()):
                summed[prompt].add_(of_head[row])
        else:
            # Sorts by index and adds in that order: deterministic off the CPU, where index_add_ is not.
            summed.index_put_((prompt_ids.long(),), of_head.to(precision), accumulate=True)
    return summed.to(dtype).transpose(-3, -2).contiguous()


@_sum.register_fake
def _(of_head, prompt_ids, prompts, dtype):  # type: ignore[no-untyped-def]
    _, heads, virtual, dim = of_head.shape
    shape = (virtual, heads, dim) if prompt_ids is None else (prompts, virtual, heads, dim)
    return of_head.new_empty(shape, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    prefix, _, prompt_ids = inputs
    ctx.save_for_backward(prompt_ids)
    ctx.prompts, ctx.virtual, ctx.dtype = prefix.shape[0], prefix.shape[-3], prefix.dtype


def _differentiate(ctx, of_out):  # type: ignore[no-untyped-def]
    (prompt_ids,) = ctx.saved_tensors
    needs_prefix, needs_rows, _ = ctx.needs_input_grad
    of_prefix = _sum(of_out[:, :, : ctx.virtual], prompt_ids, ctx.prompts, ctx.dtype) if needs_prefix else None
    # A view, as torch.cat's own gradient: whoever keeps it copies it.
    return of_prefix, of_out[:, :, ctx.virtual :] if needs_rows else None, None


_concat.register_autograd(_differentiate, setup_context=_setup_context)
