"""Templates: the text of a row, with columns named in braces.

Knows rows as mappings only: no data set, no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ptengine.data.cells import listed, place, text_value
from ptengine.errors import InputError

__all__ = ["Template"]

# Leftmost first: an escape, a placeholder, or a brace that belongs to neither.
_TOKENS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A text with placeholders, such as ``Template("Message: {text}\\nLabel:")``.

    ``{name}`` stands for the value of column ``name``, taken literally: blanks, dots and colons belong to the name.
    ``{{`` and ``}}`` stand for braces. Values are inserted once and never read as template text.

    Attributes:
        text: the template as written.

    Raises:
        InputError: braces that do not pair (with their position), ``{}``, or no placeholder at all.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"expected a template as text, got {type(self.text).__name__}")
        if not self.columns:
            raise InputError(f"expected a template with a column in braces such as '{{text}}', got {self.text!r}")

    @cached_property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """The template in order: (literal text, False) and (column name, True)."""
        parts: list[tuple[str, bool]] = []
        literal, at = "", 0
        for match in _TOKENS.finditer(self.text):
            literal += self.text[at : match.start()]
            at = match.end()
            found = match.group()
            if found in ("{{", "}}"):
                literal += found[0]
            elif match.group(1):
                parts += [(literal, False), (match.group(1), True)]
                literal = ""
            elif match.group(1) == "":
                raise InputError(
                    f"expected a column name in the braces at character {match.start()} of the template, "
                    f"got '{{}}' in {self.text!r}"
                )
            else:
                raise InputError(
                    f"expected paired braces (write {{{{ or }}}} for a brace itself), got a lone {found!r} at "
                    f"character {match.start()} of the template {self.text!r}"
                )
        parts.append((literal + self.text[at:], False))
        return tuple(part for part in parts if part[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, each once, in order of appearance."""
        return tuple(dict.fromkeys(name for name, is_column in self.parts if is_column))

    def render(self, row: Mapping[str, Any], index: int, source_name: str = "data") -> str:
        """The text of one row. Numbers are written as `str` writes them.

        Args:
            row: column name to value.
            index: the row's number, for errors.
            source_name: what errors call the data.

        Raises:
            InputError: the row lacks a column (lists those it has), or a value is null or neither text nor number.
        """
        return "".join(self.pieces(row, index, source_name))

    def pieces(self, row: Mapping[str, Any], index: int, source_name: str = "data") -> list[str]:
        """The text of one row in pieces, one for each of `parts`."""
        pieces = []
        for part, is_column in self.parts:
            if is_column and part not in row:
                raise InputError(
                    f"{place(source_name, index)}: expected column {part!r} of the template, "
                    f"got the columns {listed(list(row))}"
                )
            pieces.append(text_value(row[part], part, source_name, index) if is_column else part)
        return pieces
