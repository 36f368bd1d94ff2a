"""Checks that several tasks make when they are built.

Knows templates and names of columns; no rows.
"""

from __future__ import annotations

from ptengine.data.cells import described
from ptengine.data.templates import Template
from ptengine.errors import InputError

__all__ = ["check_column", "check_masks", "expect", "refuse_leak"]


def expect(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise InputError(f"expected {name} as a {kind.__name__}, got {described(value)}")


def check_column(value: object, name: str) -> None:
    if not isinstance(value, str) or not value:
        raise InputError(f"expected {name} as the name of a column, got {described(value)}")


def refuse_leak(template: Template, column: str, role: str) -> None:
    if column in template.columns:
        raise InputError(
            f"expected a template without the {role} column {column!r} (the text would hold its own answer), "
            f"got {template.text!r}"
        )


def check_masks(template: Template, wanted: int, why: str) -> None:
    """Refuse a template with another number of masks than `wanted`."""
    if template.num_masks != wanted:
        raise InputError(
            f"expected a template with {'one {mask}' if wanted else 'no {mask}'}, {why}, got {template.num_masks} in "
            f"{template.text!r}"
        )
