"""Record what the launchers would launch on a GPU, on a machine without one.

Inside `recording(target)` the launchers believe they run on `target`, take CPU tensors, and every Triton launch is
noted down with the specialisation Triton itself would give it, instead of being run. Outputs stay as they were
allocated.
Nothing here knows an operation of ours or compiles anything.

Needs TRITON_INTERPRET unset before Triton is imported, since interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ptengine.kernels import dispatch, launch

if triton.knobs.runtime.interpret:
    raise RuntimeError("expected TRITON_INTERPRET unset: interpreted kernels cannot be compiled")

__all__ = ["TARGETS", "Launch", "Target", "record", "recording"]


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what its launches may use."""

    name: str
    triton: GPUTarget
    multiprocessors: int
    shared_limit: int  # bytes of one program
    calls: frozenset[str] | None = None  # those whose tiles are not a relative's; None for all


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 108, 163 * 1024),
        Target("sm_86", GPUTarget("cuda", 86, 32), 84, 99 * 1024, frozenset({"bf16 D256 long"})),
        Target("sm_90", GPUTarget("cuda", 90, 32), 132, 227 * 1024),
        Target("sm_100", GPUTarget("cuda", 100, 32), 148, 227 * 1024),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 304, 64 * 1024),
    )
}


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would compile it for one launch."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    tile: str  # the kernel's compile-time arguments with its warps, stages and register limit, for people

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code on the same target."""
        return repr((self.function.cache_key, self.signature, self.constants, self.attributes, self.options))


def record(target: Target, call: Callable[[], object]) -> list[Launch]:
    """The different launches of one call on `target`, in the order of their first appearance."""
    with recording(target) as launches:
        call()
    return list({launch.key: launch for launch in launches}.values())


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches of the block in the list that is given."""
    launches: list[Launch] = []
    backend = make_backend(target.triton)

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(backend, function, args, kwargs))

    def architecture(device: torch.device) -> str:
        return target.name

    def multiprocessors(device: torch.device) -> int:
        return target.multiprocessors

    def resolve_backend(*args: Any, **kwargs: Any) -> str:
        return "triton"  # kernels refuse CPU tensors where they would really run

    original = JITFunction.run
    pretended = [
        (launch.architecture, architecture),
        (launch.multiprocessors, multiprocessors),
        (dispatch.resolve_backend, resolve_backend),
    ]
    try:
        JITFunction.run = run
        for old, new in pretended:
            _replace(old, new)
        yield launches
    finally:
        JITFunction.run = original
        for old, new in pretended:
            _replace(new, old)  # in modules imported meanwhile too


def _specialise(backend: Any, function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What `JITFunction.run` finds out before it compiles, by the same means."""
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialisation, options = binder(*args, **kwargs)
    options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialisation, options)
    shown = {param.name: bound[param.name] for param in function.params if param.is_constexpr}
    shown |= {name: getattr(options, name, None) for name in ("num_warps", "num_stages", "maxnreg")}
    tile = " ".join(f"{name}={getattr(value, 'value', value)}" for name, value in shown.items() if value is not None)
    return Launch(function, signature, constants, attributes, dict(options.__dict__), tile)


def _replace(old: object, new: object) -> None:
    """Put `new` where any module of ptengine holds `old`, since `from ... import` copies the name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ptengine.") and module is not None:
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
