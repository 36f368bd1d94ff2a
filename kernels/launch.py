"""What the Triton kernels of all operations share: whether they can run, where, and on how wide a machine.

Imports neither Triton nor an operation, so it costs nothing where no kernel runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import torch

from ptengine.kernels.dispatch import register

__all__ = [
    "DEVICES",
    "DTYPES",
    "INTERPRETED",
    "architecture",
    "ceil_div",
    "compiled_or",
    "multiprocessors",
    "nearest_architecture",
    "power_of_two",
    "register_kernel",
    "threads_per_wave",
]

# Triton reads this variable when a kernel is defined, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter runs the kernels on CPU tensors, slowly: for tests.
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
# The interpreter computes bfloat16 wrongly and says nothing (triton issue 11584), so it is refused there.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)


def register_kernel(op: str, function: Callable[..., Any]) -> None:
    """Register `function` as the Triton implementation of `op`.

    `function` imports Triton when it is first called, inside a `torch.library` operator, where torch.compile does not
    look. Does nothing where Triton is not installed, as off Linux; the dispatcher then says that there is no kernel.
    """
    if importlib.util.find_spec("triton") is not None:
        register(op, "triton", function, devices=DEVICES, dtypes=DTYPES)


@lru_cache(maxsize=8)
def architecture(device: torch.device) -> str:
    """The key of the tile tables: "sm_90" for compute capability 9.0, "gfx942" on ROCm, "interpreter" on a CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side at the least; a small number under the interpreter."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compiled_or(backend: str) -> str:
    """`backend`, but "torch" for "triton" under torch.compile.

    For operations without a registered operator: the compiler fuses PyTorch's, and cannot look into a kernel's launch.
    """
    return "torch" if backend == "triton" and torch.compiler.is_compiling() else backend


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`. As `triton.cdiv`, whose call costs the host 2 us and more."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The least that is not below `count`, 1 at the least. For `triton.next_power_of_2`, for the same reason."""
    return 1 << (max(count, 1) - 1).bit_length()


def threads_per_wave(architecture: str) -> int:
    """The threads that run in step: a warp of NVIDIA's, or a wave of AMD's, twice as wide."""
    return 64 if architecture.startswith("gfx") else 32


# GeForce, RTX and the like of the generations of sm_80, sm_90 and sm_100.
_SMALL_SHARED = ("sm_86", "sm_89", "sm_120", "sm_121")


def nearest_architecture(architecture: str, known: Collection[str]) -> str:
    """The entry of a tile table that `architecture` takes: its own, else the newest that is not newer, else the oldest.

    One that is not NVIDIA's takes another of AMD's, or the oldest of NVIDIA's, whose tiles are the smallest. NVIDIA's
    with 99 KiB of shared memory a program take the entry of sm_86, the first of them, or of sm_80, whose other tiles
    fit: what newer data centres' GPUs hold does not.
    """
    if architecture in known:
        return architecture
    if architecture in _SMALL_SHARED:
        architecture = "sm_86"
    if not architecture.startswith("sm_") and any(name.startswith("gfx") for name in known):
        return min(name for name in known if name.startswith("gfx"))
    names = sorted((name for name in known if name.startswith("sm_")), key=_generation)
    older = [name for name in names if _generation(name) <= _generation(architecture)]
    return older[-1] if older else names[0]


def _generation(architecture: str) -> int:
    """90 of "sm_90", 0 of anything else."""
    return int(architecture.removeprefix("sm_")) if architecture.startswith("sm_") else 0
