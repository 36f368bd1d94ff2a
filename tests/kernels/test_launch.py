"""What the kernels share: the tables' fallback for GPUs they do not know, and what a machine without Triton sees."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from ptengine.kernels import dispatch, launch
from ptengine.kernels.launch import nearest_architecture
from ptengine.kernels.linear_cross_entropy import tiles as loss_tiles
from ptengine.kernels.prefix_attention import tiles as attention_tiles
from ptengine.kernels.prefix_concat import tiles as concat_tiles

KNOWN = {"sm_80", "sm_90", "sm_100", "gfx942", "interpreter"}


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ("sm_90", "sm_90"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_80"),
        ("sm_75", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx1100", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_unknown_architectures_take_the_nearest_entry(asked: str, taken: str) -> None:
    """Compared as numbers: as text sm_100 would be older than sm_80. The interpreter's tiles are nobody else's."""
    assert nearest_architecture(asked, KNOWN) == taken


def test_a_table_without_amd_gives_its_smallest_tiles() -> None:
    assert nearest_architecture("gfx942", {"sm_90", "sm_80", "interpreter"}) == "sm_80"


def test_every_table_serves_every_machine() -> None:
    for name in ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_121", "gfx942", "interpreter"):
        for bits in (16, 32):
            for dim in (16, 64, 128, 256):
                for longest in (64, 65):
                    tile = attention_tiles.backward_tile(name, bits, dim, longest, plain=bits == 16)
                    assert tile.num_warps in (4, 8, 16)
                for regime in ("decode", "short", "medium", "long"):
                    assert attention_tiles.forward_tile(name, bits, dim, regime).block_m >= 16
        assert loss_tiles.chunk_tile(name, 1).columns > 0
    for tiles in (attention_tiles, loss_tiles, concat_tiles):
        assert "sm_80" in tiles.architectures()


def test_block_counts_are_those_of_triton() -> None:
    triton = pytest.importorskip("triton")
    for count in (0, 1, 2, 3, 15, 16, 17, 4097):
        assert [launch.ceil_div(count, size) for size in (1, 7, 16)] == [
            triton.cdiv(count, size) for size in (1, 7, 16)
        ]
        assert launch.power_of_two(count) == max(triton.next_power_of_2(count), 1)


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_REGISTRY", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch.register("tiled", "torch", print)
    launch.register_kernel("tiled", print)
    assert dispatch.resolve_backend(None, torch.device("cuda"), "tiled") == "torch"
    with pytest.raises(ValueError, match="no Triton kernel is registered for tiled"):
        dispatch.resolve_backend("triton", torch.device("cuda"), "tiled")


def test_a_kernel_that_cannot_take_a_call_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the PyTorch path is never taken silently where a kernel exists."""
    monkeypatch.setattr(dispatch, "_REGISTRY", {})
    monkeypatch.setattr(dispatch, "_WARNED", set())
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.register("tiled", "torch", print)
    dispatch.register("tiled", "triton", print, devices=("cuda",), dtypes=(torch.float16,))
    cuda = torch.device("cuda")
    assert dispatch.resolve_backend(None, cuda, "tiled", dtype=torch.float16) == "triton"
    with pytest.warns(UserWarning, match="tiled takes the slower PyTorch path: .* takes float16 here, not float64"):
        assert dispatch.resolve_backend(None, cuda, "tiled", dtype=torch.float64) == "torch"
    with pytest.warns(UserWarning, match="heads too wide"):
        dispatch.resolve_backend(None, cuda, "tiled", dtype=torch.float16, no_kernel_because="heads too wide")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second warning, or one about what was forced, would be raised
        dispatch.resolve_backend(None, cuda, "tiled", dtype=torch.float64)
        assert dispatch.resolve_backend("torch", cuda, "tiled", dtype=torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match="heads too wide; expected one of 'torch', got 'triton'"):
        dispatch.resolve_backend("triton", cuda, "tiled", no_kernel_because="heads too wide")
