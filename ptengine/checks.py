"""Checks of single arguments, with one wording for all. Knows plain Python values: no model, no data, no prompt."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from ptengine.errors import InputError

__all__ = ["check_flags", "check_number", "check_whole", "is_whole"]


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether `value` is an int, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value`, if it is a whole number from `least` to `most`; `InputError` otherwise."""
    if not is_whole(value) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"expected {name}, a whole number {span}, got {value!r}")
    return value


def check_number(name: str, value: Any) -> float:
    """`value`, if it is a finite number above 0; `InputError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"expected {name}, a number above 0, got {value!r}")
    return float(value)


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False: ``"no"`` would count as True."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(f"expected {name}, True or False, got {flag!r}")
