"""prefix_concat_paged, all implementations: the tokens of prefix_concat in the slots of a cache, and in no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptengine.kernels import launch
from ptengine.kernels.prefix_concat import (
    operators,
    prefix_concat,
    prefix_concat_paged,
    prefix_concat_paged_reference,
    prefix_concat_reference,
)

from .prefix_attention_cases import check_error, noise
from .test_prefix_concat import DEVICE, on_device, options_for, rotary, wide, widened

pytest.importorskip("triton")

PATHS = [("torch", x) for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
PATHS += [("triton", x) for x in launch.DTYPES]


def empty_cache(rows: torch.Tensor, num_blocks: int, block_size: int) -> torch.Tensor:
    """Half of vLLM's [2, num_blocks, block_size, H_kv, D], all NaN."""
    shape = (2, num_blocks, block_size, rows.shape[1], rows.shape[3])
    return torch.full(shape, torch.nan, dtype=rows.dtype, device=rows.device)[1]


def table_for(batch: int, tokens: int, num_blocks: int, block_size: int) -> torch.Tensor:
    """Different blocks for all rows, in no order, one more column than is needed, which holds nonsense."""
    used = -(-tokens // block_size)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(tokens))[: batch * used]
    spare = torch.full((batch, 1), -7)
    return torch.cat([order.view(batch, used), spare], dim=1).to(DEVICE, torch.int32)


def slots(cache: torch.Tensor, block_table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rows' slots hold, [B, H_kv, tokens, D], and which slots are theirs, [num_blocks, block_size]."""
    size = cache.shape[1]
    blocks = [[int(row[j // size]) for j in range(tokens)] for row in block_table]
    found = [[cache[block, j % size] for j, block in enumerate(row)] for row in blocks]
    theirs = torch.zeros(cache.shape[:2], dtype=torch.bool)
    for row in blocks:
        for j, block in enumerate(row):
            theirs[block, j % size] = True
    batch, heads, dim = len(blocks), cache.shape[2], cache.shape[3]
    flat = [x for row in found for x in row] or [cache.new_zeros(heads, dim)][:0]
    held = torch.stack(flat) if flat else cache.new_zeros(0, heads, dim)
    return held.view(batch, tokens, heads, dim).transpose(1, 2), theirs.to(cache.device)


def check(backend: str, prefix: torch.Tensor, rows: torch.Tensor, block_size: int, options: dict[str, Any]) -> None:
    batch, _, length, _ = rows.shape
    tokens = prefix.shape[-3] + length
    num_blocks = batch * -(-tokens // block_size) + 3
    block_table = table_for(batch, tokens, num_blocks, block_size)
    cache = empty_cache(rows, num_blocks, block_size)
    assert prefix_concat_paged(prefix, rows, cache, block_table, backend=backend, **options) is None
    got, theirs = slots(cache, block_table, tokens)
    assert cache[~theirs].isnan().all()
    stock = prefix_concat_reference(prefix, rows, **options)
    exact = prefix_concat_reference(prefix.double(), rows.double(), **widened(options))
    check_error(got, stock, exact, 1.5)
    width = options["cos"].shape[-1] if "cos" in options else 0
    assert torch.equal(got[..., width:], stock[..., width:])
    assert torch.equal(got[:, :, : prefix.shape[-3]], stock[:, :, : prefix.shape[-3]])


@pytest.mark.parametrize(("backend", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize(("width", "block_size"), [(0, 16), (6, 16), (16, 5)])
@pytest.mark.parametrize("length", [0, 1, 17])
@pytest.mark.parametrize("virtual", [0, 1, 7, 100])
def test_every_shape(
    virtual: int, length: int, width: int, block_size: int, backend: str, dtype: torch.dtype
) -> None:  # fmt: skip
    prompts = 3 if (virtual + length) % 2 else None
    prefix, rows, ids = on_device(*wide(virtual, 2, length, dtype, prompts))
    check(backend, prefix, rows, block_size, options_for(ids, (2, length), width, dtype))


@settings(max_examples=20, deadline=None)
@given(
    backend=st.sampled_from(["reference", "torch", "triton"]),
    prompts=st.one_of(st.none(), st.integers(1, 3)),
    sizes=st.tuples(st.integers(0, 20), st.integers(0, 3), st.integers(0, 20), st.integers(1, 2), st.integers(1, 18)),
    half=st.integers(0, 9),
    block_size=st.integers(1, 40),
    dtype=st.sampled_from(launch.DTYPES),
)
def test_any_shape(
    backend: str,
    prompts: int | None,
    sizes: tuple[int, int, int, int, int],
    half: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    virtual, batch, length, heads, dim = sizes
    prefix, rows, ids = on_device(*wide(virtual, batch, length, dtype, prompts, heads, dim))
    check(backend, prefix, rows, block_size, options_for(ids, (length,), 2 * min(half, dim // 2), dtype))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend: str) -> None:
    """A cache with heads before slots, a table cut from a wider one, rows that share memory."""
    prefix, rows, ids = on_device(*wide(9, 3, 1, torch.float32, 2))
    rows = rows.expand(-1, -1, 10, -1)
    options = options_for(ids, (10,), 6, torch.float32)
    table = table_for(3, 19, 9, 8)
    cache = empty_cache(rows, 9, 8)
    prefix_concat_paged(prefix, rows, cache, table, backend=backend, **options)
    other = empty_cache(rows, 9, 8).permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    cut = table.repeat_interleave(2, 1)[:, ::2]
    prefix_concat_paged(prefix, rows.contiguous(), other, cut, backend=backend, **options)
    torch.testing.assert_close(other, cache, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_of_one_prompt_share_the_blocks_of_its_prefix(backend: str) -> None:
    prefix, rows, _ = on_device(*wide(8, 3, 5, torch.float32))
    cache = empty_cache(rows, 6, 4)
    table = torch.tensor([[4, 1, 0, 2], [4, 1, 3, 5], [4, 1, 3, 5]], dtype=torch.int32, device=DEVICE)
    prefix_concat_paged(prefix, rows[[0, 1, 1]], cache, table, backend=backend)
    held, _ = slots(cache, table, 13)
    assert torch.equal(held, prefix_concat_reference(prefix, rows[[0, 1, 1]]))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_no_gradient(backend: str) -> None:
    prefix, rows, _ = on_device(*wide(3, 2, 4, torch.float32))
    cache = empty_cache(rows, 4, 4)
    table = table_for(2, 7, 4, 4)
    prefix_concat_paged(prefix.requires_grad_(), rows.detach().requires_grad_(), cache, table, backend=backend)
    assert not cache.requires_grad


def test_same_bits_as_the_dense_kernel() -> None:
    prefix, rows, ids = on_device(*wide(20, 3, 33, torch.float32, 2))
    options = options_for(ids, (33,), 6, torch.float32) | {"backend": "triton"}
    cache, table = empty_cache(rows, 15, 16), table_for(3, 53, 15, 16)
    prefix_concat_paged(prefix, rows, cache, table, **options)
    assert torch.equal(slots(cache, table, 53)[0], prefix_concat(prefix, rows, **options))


def test_what_is_unknown_is_not_written_where_values_are_not_checked() -> None:
    """On a GPU nobody looks: blocks out of range are passed over, an unknown prompt's prefix is NaN."""
    from ptengine.kernels.prefix_concat import triton_path

    prefix, rows, _ = on_device(*wide(4, 2, 4, torch.float32, 2))
    cache = torch.zeros(3, 4, 2, 16, device=DEVICE)
    table = torch.tensor([[-1, 2], [0, 3]], dtype=torch.int32, device=DEVICE)
    triton_path.concat_paged(prefix, rows, cache, table, torch.tensor([0, 5], device=DEVICE), None, None)
    assert torch.equal(cache[2], rows[0].transpose(0, 1))
    assert cache[0].isnan().all()
    assert not cache[1].any()


def test_a_negative_block_does_not_count_from_the_end() -> None:
    """Regression: off the CPU, where nobody checks, indexing with -1 would have written to the last block."""
    from ptengine.kernels.prefix_concat import torch_path

    prefix, rows, _ = wide(4, 1, 4, torch.float32)
    cache, table = torch.zeros(3, 4, 2, 16), torch.tensor([[0, -1]])
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        torch_path.concat_paged(prefix, rows, cache, table, None, None, None)
    assert not cache[2].any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_cache_counts_as_changed(backend: str) -> None:
    """Autograd's version counter must move, so that a graph that needs the old cache notices."""
    prefix, rows, _ = on_device(*wide(3, 2, 4, torch.float32))
    cache = empty_cache(rows, 4, 4)
    before = cache._version
    prefix_concat_paged(prefix, rows, cache, table_for(2, 7, 4, 4), backend=backend)
    assert cache._version > before


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("width", [0, 6])
def test_opcheck(width: int, kernel: bool) -> None:
    prefix, rows, ids = on_device(*wide(3, 2, 4, torch.float32, 2))
    tables = tuple(x.to(DEVICE) for x in rotary(4, width=width).values()) if width else (None, None)
    cache, table = torch.zeros(4, 4, 2, 16, device=DEVICE), table_for(2, 7, 4, 4)
    torch.library.opcheck(operators._paged, (prefix, rows, cache, table, ids, *tables, kernel))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    torch.compiler.reset()
    prefix, rows, ids = on_device(*wide(3, 2, 4, torch.float32, 2))
    options, table = options_for(ids, (4,), 6, torch.float32), table_for(2, 7, 4, 4)

    def step(cache: torch.Tensor) -> torch.Tensor:
        prefix_concat_paged(prefix, rows, cache, table, backend=backend, **options)
        return cache.nan_to_num().sum()

    caches = [empty_cache(rows, 5, 4) for _ in range(2)]
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(caches[0]), step(caches[1]))
    torch.testing.assert_close(*caches, equal_nan=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a CPU never waits for itself")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gpu_is_never_waited_for(backend: str) -> None:
    prefix, rows, ids = on_device(*wide(3, 2, 4, torch.float16, 2))
    options, table = options_for(ids, (4,), 6, torch.float16), table_for(2, 7, 4, 4)
    cache = empty_cache(rows, 5, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_concat_paged(prefix, rows, cache, table, backend=backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


P1, R, C = torch.zeros(2, 4, 3), torch.zeros(6, 4, 7, 3), torch.zeros(20, 4, 4, 3)
T = torch.zeros(6, 3, dtype=torch.int32)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": R[0]}, r"rows of shape \[B, H_kv, T, D\], got \[4, 7, 3\]"),
    ({"cache": C[0]}, r"cache of shape \[num_blocks, block_size >= 1, H_kv = 4, D = 3\], got \[4, 4, 3\]"),
    ({"cache": C[:, :, :3]}, r"cache of shape .*, got \[20, 4, 3, 3\]"),
    ({"cache": C[:, :0]}, r"cache of shape .*, got \[20, 0, 4, 3\]"),
    ({"cache": C.double()}, "cache as rows, torch.float32 on cpu, got torch.float64 on cpu"),
    ({"cache": C.clone().requires_grad_()}, "a cache without requires_grad"),
    ({"cache": C[:1].expand(20, -1, -1, -1)}, r"a cache whose entries share no memory, got strides \[0, 12, 3, 1\]"),
    ({"block_table": T.float()}, "block_table of dtype torch.int32 or torch.int64 on cpu, got torch.float32"),
    ({"block_table": T.to("meta")}, "block_table of dtype torch.int32 or torch.int64 on cpu, got torch.int32 on meta"),
    ({"block_table": T[:, :2]}, r"shape \[B = 6, max_blocks >= 3\] for P \+ T = 9 tokens in blocks of 4, got \[6, 2\]"),
    ({"block_table": T[:5]}, r"shape \[B = 6, max_blocks >= 3\] .*, got \[5, 3\]"),
    ({"block_table": T - 1}, r"block_table in \[0, 20\), got -1 at entry 0"),
    ({"block_table": T + 20}, r"block_table in \[0, 20\), got 20 at entry 0"),
    ({"prefix": P1[None], "prompt_ids": T[:, 0] - 1}, r"prompt_ids in \[0, 1\), got -1 at row 0"),
    ({"cos": R[0, 0, :, :2]}, "expected both cos and sin or neither, got cos alone"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on a CPU")
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_bad_arguments_have_one_clear_error(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments = {"prefix": P1, "rows": R, "cache": C, "block_table": T, "backend": backend} | wrong
    with pytest.raises(ValueError, match=message):
        prefix_concat_paged(**arguments)


def test_the_reference_is_exported() -> None:
    prefix, rows = noise(3, 2, 4), noise(2, 2, 4, 4)
    caches = [torch.zeros(4, 4, 2, 4, dtype=torch.float64) for _ in range(2)]
    table = table_for(2, 7, 4, 4).cpu()
    prefix_concat_paged_reference(prefix, rows, caches[0], table)
    prefix_concat_paged(prefix, rows, caches[1], table, backend="reference")
    assert torch.equal(*caches)
