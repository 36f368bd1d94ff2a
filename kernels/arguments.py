"""What kinds of values the operations take. Reads no element of a tensor, so it never waits for a device."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_flags", "check_numbers", "check_optional_tensors", "check_tensors", "check_whole"]

# Every layer asks for every token: what is common comes first, before the abstract classes, which are slow.
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)
_WHOLE = (int, torch.SymInt, Integral)
_FLAGS = (bool, torch.SymBool)


def check_tensors(**arguments: Any) -> None:
    """Refuse what is no tensor, with a TypeError that names it; the others do the same for what they are called for."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name}, a tensor, got {type(value).__name__}")


def check_optional_tensors(**arguments: Any) -> None:
    """None is taken, too."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"expected {name}, a tensor or None, got {type(value).__name__}")


def check_numbers(**arguments: Any) -> None:
    """Python's, numpy's, and the compiler's symbols."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise TypeError(f"expected {name}, a number, got {value!r}")


def check_whole(**arguments: Any) -> None:
    """As `check_numbers`."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, _WHOLE):
            raise TypeError(f"expected {name}, a whole number, got {value!r}")


def check_flags(**arguments: Any) -> None:
    """``"no"`` would count as True."""
    for name, value in arguments.items():
        if not isinstance(value, _FLAGS):
            raise TypeError(f"expected {name}, True or False, got {value!r}")
