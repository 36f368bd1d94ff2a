"""Single values of a data set: what counts as text, what counts as a label, and how a row is named in an error.

Knows Python values only: no data set, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptengine.errors import InputError

__all__ = ["described", "is_null", "label_name", "listed", "place", "text_value"]

_SHOWN = 60


def place(source_name: str, index: int) -> str:
    """How errors name a row; rows are counted from 0, as `datasets` does."""
    return f"{source_name}, row {index} (counting from 0)"


def described(value: Any) -> str:
    """A value for an error message: its type and its beginning."""
    if is_null(value):
        return "an empty value (null)"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"


def listed(names: Sequence[str]) -> str:
    """Names for an error message: quoted, at most thirty."""
    shown = ", ".join(repr(name) for name in names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"


def text_value(value: Any, column: str, source_name: str, index: int) -> str:
    """The value of a text column: a str as it is, a number through str().

    Raises:
        InputError: null, NaN, a bool or anything else; names the row and the column.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_null(value):
        return str(value)
    raise InputError(
        f"{place(source_name, index)}: expected text or a number in column {column!r}, got {described(value)}"
    )


def label_name(value: Any) -> str | None:
    """The name of a label: a str as it is, an int or bool through str(); None for anything else."""
    return str(value) if isinstance(value, str | int) else None


def is_null(value: Any) -> bool:
    """Whether there is no value: None, or NaN, by which pandas says so."""
    return value is None or (isinstance(value, float) and value != value)
