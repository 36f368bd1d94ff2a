"""The public functions: the specification in words, the checks, and the choice of an implementation.

They know tensors only, no cache object and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels.dispatch import implementation, resolve_backend
from ptengine.kernels.launch import INTERPRETED
from ptengine.kernels.prefix_concat import checks
from ptengine.kernels.prefix_concat import operators as _operators  # noqa: F401 (registers the implementations)

__all__ = ["prefix_concat", "prefix_concat_paged", "prefix_concat_varlen"]


def prefix_concat(
    prefix: Tensor,
    rows: Tensor,
    *,
    prompt_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Put a shared prefix before every row: the keys or values a stock cache holds, written in one pass.

        out[b, h, :P] = prefix[:, h]                    one prompt
        out[b, h, :P] = prefix[prompt_ids[b], :, h]     N prompts
        out[b, h, P:] = rows[b, h]                      or, with cos and sin, rotary embedding on the way:
        out[b, h, P:, :D_rot] = x * cos + rotate_half(x) * sin    with x = rows[b, h, :, :D_rot]
        out[b, h, P:, D_rot:] = rows[b, h, :, D_rot:]

    rotate_half is Hugging Face's: [x1, x2] -> [-x2, x1] for the two halves of the D_rot channels; cos and sin are what
    the model's rotary module returns for the rows' positions, each used as it is. The prefix is never rotated: its keys
    are post-rotary already. The rotation is computed in float32 (float64 for float64 rows) and rounded once.

    The gradient of the prefix is the sum over the rows that read it, taken in float32 (float64 for float64 rows) and
    in a fixed order: the same call gives the same bits. A prompt that no row reads has gradient 0. The gradient of
    rows goes back through the rotation's transpose. cos and sin are constants.

    Args:
        prefix: [P, H_kv, D], or [N, P, H_kv, D] together with `prompt_ids`. float64, float32, bfloat16 or float16; it
            is rounded to rows' dtype, so a float32 prompt may go before bfloat16 rows.
        rows: [B, H_kv, T, D], of any of these dtypes. Any strides, 0 included. P, T and B may be 0.
        prompt_ids: int32 or int64 [B], each in [0, N): the prompt of a row. None with a [P, H_kv, D] prefix. -1 (no
            prompt) is refused, since the rows of the result would differ in length; `prefix_concat_varlen` takes it.
        cos: [T, D_rot], the same for all rows, or [B, T, D_rot]; D_rot even, 2 to D. Any of these dtypes.
        sin: as cos; None exactly when cos is.
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`.

    Returns:
        [B, H_kv, P + T, D], contiguous, in rows' dtype, sharing no memory with its arguments.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a shape, dtype or device that is not as above, or a prompt id out of range. Ids are looked at on a
            CPU only, since looking would make the host wait for the device. Elsewhere the PyTorch path leaves one that
            is out of range to PyTorch's own device-side assertion, and the kernel writes NaN in place of its prefix
            (and gives it no part in the gradient).
    """
    checks.check_dense(prefix, rows, prompt_ids)
    checks.check_rotary(rows, (rows.shape[0], rows.shape[2]), cos, sin)
    chosen = _choose("prefix_concat", backend, prefix, rows, cos, sin)
    return implementation("prefix_concat", chosen)(prefix, rows, prompt_ids=prompt_ids, cos=cos, sin=sin)


def prefix_concat_varlen(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    prompt_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    out_tokens: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed twin of `prefix_concat`: rows one after another, each becoming its prefix and then its own tokens.

        rows        a0 a1 a2 | b0 | c0 c1           cu_seqlens     0 3 4 6      prompt_ids 1 -1 0
        out   q0 q1 a0 a1 a2 | b0 | p0 c0 c1        cu_seqlens_out 0 5 6 9      prefix_lengths 1 2

    Rotation, gradients, rounding and determinism are as there. Entries of a prompt beyond its length are not read and
    have gradient 0.

    The number of tokens written, total + the sum of the rows' prefix lengths, is a shape, so the host must know it:

        neither prompt_ids nor prefix_lengths   total + R * P: known, nothing is read from the device
        out_tokens given                        that number: nothing is read from the device
        otherwise                               counted from prompt_ids and prefix_lengths: free on a CPU, on other
                                                devices the host waits for it once; under torch.compile it is a
                                                data-dependent size, which fullgraph needs to be allowed
                                                (torch._dynamo.config.capture_dynamic_output_shape_ops)

    The PyTorch path also reads the lengths themselves to the host; the kernel does not.

    Args:
        prefix: [P, H_kv, D], or [N, P, H_kv, D] together with `prompt_ids`; dtypes as for `prefix_concat`.
        rows: [total, H_kv, D]. Any strides, 0 included. P, total and the number of rows R may be 0.
        cu_seqlens: int32 or int64 [R + 1], ascending from 0 to total; rows of length 0 are allowed.
        max_seqlen: at least the longest row, without its prefix.
        prompt_ids: int32 or int64 [R], each in [-1, N): the prompt of a row, -1 for none. None with a [P, H_kv, D]
            prefix, which every row then reads.
        prefix_lengths: int32 or int64 [N] (N = 1 for a [P, H_kv, D] prefix), each in [0, P]; None means P.
        cos: [total, D_rot], one line for each token of rows; D_rot even, 2 to D.
        sin: as cos; None exactly when cos is.
        out_tokens: the exact number of tokens of the result, see above.
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`.

    Returns:
        out [out_tokens, H_kv, D], contiguous, in rows' dtype, sharing no memory with its arguments; and cu_seqlens_out
        [R + 1], in cu_seqlens' dtype, without gradient.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a shape, dtype or device that is not as above; or a wrong value in an index tensor, max_seqlen or
            out_tokens. Values are looked at on a CPU only. Elsewhere the kernel takes a prompt id out of range as -1
            and writes nothing beyond out_tokens; with a wrong cu_seqlens or max_seqlen, or an out_tokens that is too
            large, its result is undefined.
    """
    checks.check_packed(prefix, rows, cu_seqlens, max_seqlen, prompt_ids, prefix_lengths)
    checks.check_rotary(rows, (rows.shape[0],), cos, sin)
    if out_tokens is None and prompt_ids is None and prefix_lengths is None:
        out_tokens = rows.shape[0] + (cu_seqlens.shape[0] - 1) * prefix.shape[0]
    chosen = _choose("prefix_concat_varlen", backend, prefix, rows, cos, sin)
    return implementation("prefix_concat_varlen", chosen)(
        prefix, rows, cu_seqlens, max_seqlen,
        prompt_ids=prompt_ids, prefix_lengths=prefix_lengths, cos=cos, sin=sin, out_tokens=out_tokens,
    )  # fmt: skip


def prefix_concat_paged(
    prefix: Tensor,
    rows: Tensor,
    cache: Tensor,
    block_table: Tensor,
    *,
    prompt_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """The paged twin of `prefix_concat`: the same tokens, written in place into the blocks of a cache (vLLM's layout).

        token j of prefix + row b -> cache[block_table[b, j // block_size], j % block_size]

    All other slots are left as they are. For inference: no gradient flows, prefix and rows count as constants. Rows
    may share a block only where they write the same values to it, as the whole blocks of one prompt's prefix; two
    different values for one slot leave either. The host never waits for a device.

    Args:
        prefix: [P, H_kv, D], or [N, P, H_kv, D] together with `prompt_ids`; dtypes as for `prefix_concat`.
        rows: [B, H_kv, T, D]. Any strides, 0 included. P, T and B may be 0.
        cache: [num_blocks, block_size, H_kv, D], in rows' dtype and without requires_grad. Any strides under which no
            two entries share memory.
        block_table: int32 or int64 [B, max_blocks], max_blocks * block_size at least P + T. Only the first
            ceil((P + T) / block_size) entries of a row are read.
        prompt_ids, cos, sin, backend: as for `prefix_concat`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a shape, dtype or device that is not as above, or a prompt id or a block out of range. These are
            looked at on a CPU only. Elsewhere the PyTorch path leaves them to PyTorch's own device-side assertion; the
            kernel writes NaN for the prefix of such a prompt and nothing for such a block.
    """
    checks.check_dense(prefix, rows, prompt_ids)
    checks.check_rotary(rows, (rows.shape[0], rows.shape[2]), cos, sin)
    checks.check_cache(rows, cache, block_table, prefix.shape[-3] + rows.shape[2])
    chosen = _choose("prefix_concat_paged", backend, prefix, rows, cos, sin)
    implementation("prefix_concat_paged", chosen)(
        prefix.detach(), rows.detach(), cache, block_table, prompt_ids=prompt_ids, cos=cos, sin=sin
    )


def _choose(op: str, backend: str | None, prefix: Tensor, rows: Tensor, cos: Tensor | None, sin: Tensor | None) -> str:
    others = [x.dtype for x in (prefix, cos, sin) if x is not None]
    because = None
    if INTERPRETED and torch.bfloat16 in others:
        because = f"Triton's interpreter computes bfloat16 wrongly, which prefix, cos or sin of this {op} is in"
    return resolve_backend(backend, rows.device, op, dtype=rows.dtype, no_kernel_because=because)
