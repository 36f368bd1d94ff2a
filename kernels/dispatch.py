"""Which implementation of an operation runs: one rule for all of them.

An operation's package registers its implementations here when it is imported; its public function asks for one. A new
kernel slots in with one `register` call and no change to a caller. This room knows names and devices only: no tensors,
no shapes, no models.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BACKENDS", "ENVIRONMENT", "explain", "implementation", "operations", "register", "resolve_backend"]

BACKENDS = ("reference", "torch", "triton")
ENVIRONMENT = "PTENGINE_BACKEND"


@dataclass(frozen=True)
class _Entry:
    function: Callable[..., Any]
    devices: tuple[str, ...] | None  # device types it runs on; None for all
    dtypes: tuple[torch.dtype, ...] | None  # of the operation's first tensor; None for all


_REGISTRY: dict[str, dict[str, _Entry]] = {}
_WARNED: set[str] = set()  # messages already given


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Make `function` the implementation of `op` under `backend`.

    Args:
        op: the operation's name, the same as its package's.
        backend: one of `BACKENDS`.
        function: takes the arguments of the operation's public function, checked, without `backend`.
        devices: the device types (`"cpu"`, `"cuda"`) it runs on; None means all.
        dtypes: the dtypes of the operation's first tensor it takes; None means all.

    Raises:
        ValueError: the backend's name is unknown, or `op` already has an implementation under it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend of {_names(BACKENDS)}, got {backend!r}")
    entries = _REGISTRY.setdefault(op, {})
    if backend in entries:
        raise ValueError(f"expected one {backend!r} implementation of {op}, got a second")
    entries[backend] = _Entry(function, devices, dtypes)


def operations() -> tuple[str, ...]:
    """The operations whose packages have been imported, sorted."""
    return tuple(sorted(_REGISTRY))


def resolve_backend(
    requested: str | None,
    device: torch.device,
    op: str,
    *,
    dtype: torch.dtype | None = None,
    no_kernel_because: str | None = None,
) -> str:
    """Choose the backend of one call.

    `requested` (the caller's `backend=`) wins over the environment variable PTENGINE_BACKEND, which wins over the
    automatic choice: Triton on a CUDA (or ROCm) device where a kernel is registered that takes the call, PyTorch
    everywhere else. A choice that cannot be honoured is an error, never replaced by another one. Where the automatic
    choice on CUDA is not the kernel because of this call's dtype or shape, a warning says so, once for each reason.

    Args:
        requested: one of `BACKENDS`, or None.
        device: where the operation's tensors are.
        op: the operation's name.
        dtype: of the call's first tensor; None where it is not known yet.
        no_kernel_because: why the Triton kernel cannot take this call's shapes or options; None where it can.

    Returns:
        A backend that is registered for `op` and takes the call.

    Raises:
        ValueError: unknown operation or backend, or a backend that cannot take the call.
    """
    backend, reason = _choose(requested, device, op, dtype, no_kernel_because)
    slower = backend == "torch" and device.type == "cuda" and "triton" in _entries(op)
    message = f"{op} takes the slower PyTorch path: {reason}"
    if slower and _asked_for(requested)[0] is None and message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)
    return backend


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function registered for a backend that `resolve_backend` returned."""
    return _REGISTRY[op][backend].function


def explain(op: str, device: torch.device) -> str:
    """One line for people: the path a call without `backend=` takes on `device`, and why.

    A choice that would be refused (through PTENGINE_BACKEND) is described, not raised; an unknown `op` is an error.
    """
    _entries(op)
    try:
        backend, reason = _choose(None, device, op)
    except ValueError as error:
        return f"{op} on {device.type}: refused ({error})"
    return f"{op} on {device.type}: {backend} ({reason})"


def _choose(
    requested: str | None,
    device: torch.device,
    op: str,
    dtype: torch.dtype | None = None,
    no_kernel_because: str | None = None,
) -> tuple[str, str]:
    """The backend and the reason for it."""
    entries = _entries(op)
    requested, source = _asked_for(requested)

    def missing(backend: str) -> str | None:
        """Why `backend` cannot take the call; None where it can."""
        found = _missing(entries, backend, device, op, dtype)
        return found if found is not None or backend != "triton" else no_kernel_because

    if requested is None:
        kernel_missing = missing("triton")
        if device.type == "cuda" and kernel_missing is None:
            return "triton", "chosen by device"
        return "torch", f"chosen by device; {kernel_missing or 'Triton is automatic on cuda only'}"
    if requested not in BACKENDS:
        raise ValueError(f"{source}: expected a backend of {_names(BACKENDS)}, got {requested!r}")
    refusal = missing(requested)
    if refusal is not None:
        usable = [name for name in BACKENDS if missing(name) is None]
        raise ValueError(f"{source}: {refusal}; expected one of {_names(usable)}, got {requested!r}")
    return requested, f"chosen by {source}"


def _asked_for(requested: str | None) -> tuple[str | None, str]:
    """The backend that the caller, or else the environment, asks for, and in what words; None for neither."""
    if requested is not None:
        return requested, f"backend={requested!r}"
    forced = os.environ.get(ENVIRONMENT) or None  # set but empty counts as unset
    return forced, f"{ENVIRONMENT}={forced}"


def _missing(
    entries: dict[str, _Entry], backend: str, device: torch.device, op: str, dtype: torch.dtype | None
) -> str | None:
    """Why `backend` cannot serve `op` on `device` in `dtype`; None where it can."""
    entry = entries.get(backend)
    if entry is None:
        kind = "Triton kernel" if backend == "triton" else f"{backend} implementation"
        return f"no {kind} is registered for {op}"
    if entry.devices is not None and device.type not in entry.devices:
        return f"the {backend} implementation of {op} runs on {_names(entry.devices)}, not on {device.type}"
    if entry.dtypes is not None and dtype is not None and dtype not in entry.dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in entry.dtypes)
        return f"the {backend} implementation of {op} takes {names} here, not {str(dtype).removeprefix('torch.')}"
    return None


def _entries(op: str) -> dict[str, _Entry]:
    if op not in _REGISTRY:
        raise ValueError(f"expected an imported operation ({_names(operations()) or 'none is'}), got {op!r}")
    return _REGISTRY[op]


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(repr(name) for name in names)
