"""The operations in plain PyTorch: every token is written where it belongs, nothing is expanded first.

Called by `operators.py` with checked arguments and outside autograd. The packed functions work from lengths on the
host, so off the CPU they wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def concat(prefix: Tensor, rows: Tensor, prompt_ids: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """[B, H_kv, P + T, D]"""
    batch, heads, length, dim = rows.shape
    virtual = prefix.shape[-3]
    out = rows.new_empty(batch, heads, virtual + length, dim)
    head, own = out[:, :, :virtual], out[:, :, virtual:]  # [B, H_kv, P, D], [B, H_kv, T, D]
    if prompt_ids is None:
        head.copy_(prefix.transpose(0, 1))  # [H_kv, P, D], broadcast over B
    else:
        torch.index_select(prefix.to(rows.dtype).transpose(1, 2), 0, prompt_ids, out=head)
    if cos is None or sin is None:
        own.copy_(rows)
    else:
        _rotate_into(own, rows, cos.unsqueeze(-3), sin.unsqueeze(-3))
    return out


def concat_packed(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out_tokens: int,
) -> tuple[Tensor, Tensor]:
    """[out_tokens, H_kv, D] and its cu_seqlens."""
    if cos is not None and sin is not None:
        turned = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _rotate_into(turned, rows, cos.unsqueeze(-2), sin.unsqueeze(-2))
        rows = turned
    lengths = cu_seqlens.diff().tolist()
    prefix = prefix.to(rows.dtype)
    prompts = [prefix] if prompt_ids is None else list(prefix.unbind())
    if prefix_lengths is not None:
        prompts = [prompt[:size] for prompt, size in zip(prompts, prefix_lengths.tolist(), strict=True)]
    ids = [0] * len(lengths) if prompt_ids is None else prompt_ids.tolist()
    pieces, bounds = [rows[:0]], [0]
    for prompt, length, row in zip(ids, lengths, rows.split(lengths), strict=True):
        virtual = rows[:0] if prompt < 0 else prompts[prompt]
        pieces += [virtual, row]
        bounds.append(bounds[-1] + virtual.shape[0] + length)
    out = rows.new_empty(out_tokens, *rows.shape[1:])
    torch.cat(pieces, out=out)
    return out, torch.tensor(bounds, dtype=cu_seqlens.dtype, device=rows.device)


def concat_paged(
    prefix: Tensor,
    rows: Tensor,
    cache: Tensor,
    block_table: Tensor,
    prompt_ids: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Into cache [num_blocks, block_size, H_kv, D]."""
    num_blocks, block_size = cache.shape[:2]
    virtual = prefix.shape[-3]
    token = torch.arange(virtual + rows.shape[2], device=rows.device)  # [P + T]
    block = block_table[:, token // block_size].long()  # [B, P + T]
    # A negative index would count from the end; one past the end is an error on every device.
    block = torch.where(block < 0, num_blocks, block)
    slot = (token % block_size).expand_as(block)  # [B, P + T]
    if cos is not None and sin is not None:
        turned = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _rotate_into(turned, rows, cos.unsqueeze(-3), sin.unsqueeze(-3))
        rows = turned
    head = prefix if prompt_ids is None else prefix[prompt_ids.long()]  # [P, H_kv, D] or [B, P, H_kv, D]
    cache[block[:, :virtual], slot[:, :virtual]] = head.to(cache.dtype)
    cache[block[:, virtual:], slot[:, virtual:]] = rows.transpose(1, 2)


def sum_rows(of_head: Tensor, prompt_ids: Tensor | None, prompts: int, dtype: torch.dtype) -> Tensor:
    """of_head [B, H_kv, P, D] summed to [P, H_kv, D] or [N, P, H_kv, D]."""
    precision = _precision(of_head)
    if prompt_ids is None:
        # Within one reduction PyTorch accumulates halves in float32 anyway; asking for it would take a slower path.
        summed = of_head.sum(dim=0, dtype=of_head.dtype if dtype == of_head.dtype else precision)  # [H_kv, P, D]
        return summed.to(dtype).transpose(0, 1).contiguous()
    if of_head.device.type == "cpu":
        out = of_head.new_empty(prompts, of_head.shape[2], of_head.shape[1], of_head.shape[3], dtype=dtype)
        _sum_readers(out, prompt_ids.tolist(), of_head.transpose(1, 2).unbind())
        return out
    summed = of_head.new_zeros(prompts, *of_head.shape[1:], dtype=precision)  # [N, H_kv, P, D]
    # Sorts by index and adds in that order: deterministic off the CPU, where index_add_ is not.
    summed.index_put_((prompt_ids.long(),), of_head.to(precision), accumulate=True)
    return summed.to(dtype).transpose(1, 2).contiguous()


def rotate_back(of_own: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """of_own [B, H_kv, T, D] through the rotation's transpose."""
    batch, heads, length, dim = of_own.shape
    out = of_own.new_empty(batch, length, heads, dim).transpose(1, 2)
    _rotate_into(out, of_own, cos.unsqueeze(-3), sin.unsqueeze(-3), back=True)
    return out


def sum_packed(
    of_out: Tensor,
    cu_seqlens_out: Tensor,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    prompts: int,
    virtual: int,
    dtype: torch.dtype,
) -> Tensor:
    """The first tokens of each row of of_out [out_tokens, H_kv, D] summed to [P, H_kv, D] or [N, P, H_kv, D]."""
    starts = cu_seqlens_out.tolist()[:-1]
    ids = [0] * len(starts) if prompt_ids is None else prompt_ids.tolist()
    count = 1 if prompt_ids is None else prompts
    sizes = [virtual] * count if prefix_lengths is None else prefix_lengths.tolist()
    out = of_out.new_empty(count, virtual, *of_out.shape[1:], dtype=dtype)
    heads = [of_out[start : start + sizes[prompt]] for start, prompt in zip(starts, ids, strict=True)]
    _sum_readers(out, ids, heads)
    return out[0] if prompt_ids is None else out


def take_own(
    of_out: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_out: Tensor,
    total: int,
    max_seqlen: int,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The rows' own tokens [total, H_kv, D], the last of each row of of_out [out_tokens, H_kv, D]."""
    lengths, ends = cu_seqlens.diff().tolist(), cu_seqlens_out.tolist()[1:]
    out = of_out.new_empty(total, *of_out.shape[1:])
    torch.cat([of_out[:0], *[of_out[end - n : end] for n, end in zip(lengths, ends, strict=True)]], out=out)
    if cos is not None and sin is not None:
        _rotate_into(out, out.clone(), cos.unsqueeze(-2), sin.unsqueeze(-2), back=True)
    return out


def _sum_readers(out: Tensor, ids: Sequence[int], heads: Sequence[Tensor]) -> None:
    """out[n] = the sum of heads[b], [P_n, H_kv, D], over the rows b with ids[b] = n, ascending; 0 beyond P_n.

    A row whose id is no prompt's has no part in it.
    """
    readers: dict[int, list[Tensor]] = {}
    for prompt, head in zip(ids, heads, strict=True):
        readers.setdefault(prompt, []).append(head)
    for prompt in range(out.shape[0]):
        read = readers.get(prompt, [])
        size = read[0].shape[0] if read else 0
        if read:
            summed = read[0]
            if len(read) > 1:
                summed = summed.to(_precision(summed), copy=True)
                for head in read[1:]:
                    summed.add_(head)
            out[prompt, :size].copy_(summed)
        out[prompt, size:].zero_()


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Write x, its first D_rot channels turned, to `out`, which must not overlap it. cos and sin broadcast against it.

    `back` applies the transpose of the rotation instead, for any cos and sin, unit vectors or not.
    """
    precision, width = _precision(x), cos.shape[-1]
    out[..., width:].copy_(x[..., width:])
    turned = out[..., :width] if out.dtype == precision else x.new_empty(*x.shape[:-1], width, dtype=precision)
    first, second = x[..., :width].to(precision).chunk(2, dim=-1)
    cos_first, cos_second = cos.to(precision).chunk(2, dim=-1)
    sin_first, sin_second = sin.to(precision).chunk(2, dim=-1)
    if back:
        sin_first, sin_second = -sin_second, -sin_first
    new_first, new_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos_first, out=new_first).addcmul_(second, sin_first, value=-1)
    torch.mul(second, cos_second, out=new_second).addcmul_(first, sin_second)
    if out.dtype != precision:
        out[..., :width].copy_(turned)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
