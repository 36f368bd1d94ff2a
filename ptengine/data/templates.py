"""Templates: the text of a row, with columns named in braces, and the places of virtual tokens and of a mask.

Knows rows as mappings only: no data set, no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ptengine.data.cells import listed, place, text_value
from ptengine.errors import InputError

__all__ = ["Part", "Template", "split_template"]

# Leftmost first: an escape, a placeholder, or a brace that belongs to neither.
_TOKENS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


_PROMPT = re.compile(r"prompt:(.*)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One piece of a template.

    Attributes:
        kind: literal text, the value of a column, virtual tokens, or the mask.
        text: the literal text or the column's name; empty for the others.
        size: how many virtual tokens.
    """

    kind: Literal["text", "column", "prompt", "mask"]
    text: str = ""
    size: int = 0


def split_template(text: str) -> tuple[Part, ...]:
    """The parts of a text with placeholders, in order; no literal text is empty.

    Raises:
        InputError: as `Template`, but for a text without columns, which may be a part of one.
    """
    parts: list[Part] = []
    literal, at = "", 0
    for match in _TOKENS.finditer(text):
        literal += text[at : match.start()]
        at = match.end()
        found = match.group()
        if found in ("{{", "}}"):
            literal += found[0]
        elif match.group(1):
            parts += [Part("text", literal), _placeholder(match.group(1), text)]
            literal = ""
        elif match.group(1) == "":
            raise InputError(
                f"expected a column name in the braces at character {match.start()} of the template, "
                f"got '{{}}' in {text!r}"
            )
        else:
            raise InputError(
                f"expected paired braces (write {{{{ or }}}} for a brace itself), got a lone {found!r} at "
                f"character {match.start()} of the template {text!r}"
            )
    parts.append(Part("text", literal + text[at:]))
    return tuple(part for part in parts if part != Part("text"))


def _placeholder(name: str, text: str) -> Part:
    place = _PROMPT.fullmatch(name)
    if place is None:
        return Part("mask") if name == "mask" else Part("column", name)
    size = place.group(1)
    if not (size.isascii() and size.isdigit() and int(size)):
        raise InputError(
            f"expected virtual tokens as '{{prompt:10}}', a whole number of at least 1, got '{{{name}}}' in {text!r}"
        )
    return Part("prompt", size=int(size))


@dataclass(frozen=True)
class Template:
    """A text with placeholders, such as ``Template("Message: {text}\\nLabel:")``.

    ``{name}`` stands for the value of column ``name``, taken literally: blanks, dots and colons belong to the name.
    ``{prompt:10}`` stands for ten virtual tokens: the first ten of the prompt, the next place for those after them.
    ``{mask}`` stands for the token that a masked language model fills in. ``{{`` and ``}}`` stand for braces. Values
    are inserted once and never read as template text.

    Without a place the virtual tokens stand before the text. With places their sizes add up to the prompt's length, and
    the texts between them are tokenised apart.

    Attributes:
        text: the template as written.

    Raises:
        InputError: braces that do not pair (with their position), ``{}``, a place for no whole number of virtual
            tokens, or no column at all.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"expected a template as text, got {type(self.text).__name__}")
        if not self.columns:
            raise InputError(f"expected a template with a column in braces such as '{{text}}', got {self.text!r}")

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The template in order; no literal text is empty."""
        return split_template(self.text)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, each once, in order of appearance."""
        return tuple(dict.fromkeys(part.text for part in self.parts if part.kind == "column"))

    @property
    def num_masks(self) -> int:
        return sum(part.kind == "mask" for part in self.parts)

    @property
    def num_virtual_tokens(self) -> int | None:
        """The virtual tokens it places, or None where it places none: they then stand before the text."""
        return sum(part.size for part in self.parts) or None

    @property
    def is_behind_prompt(self) -> bool:
        """Whether all virtual tokens stand before the text."""
        behind_text = [part for i, part in enumerate(self.parts) if any(one.kind != "prompt" for one in self.parts[:i])]
        return all(part.kind != "prompt" for part in behind_text)

    def render(self, row: Mapping[str, Any], index: int, source_name: str = "data") -> str:
        """The text of one row, without virtual tokens. Numbers are written as `str` writes them.

        Args:
            row: column name to value.
            index: the row's number, for errors.
            source_name: what errors call the data.

        Raises:
            InputError: the row lacks a column (lists those it has), or a value is null or neither text nor number.
        """
        return "".join(self.pieces(row, index, source_name))

    def pieces(self, row: Mapping[str, Any], index: int, source_name: str = "data", mask: str = "") -> list[str]:
        """The text of one row in pieces, one for each of `parts`: `mask` for the mask, nothing for virtual tokens."""
        return [self._piece(part, row, index, source_name, mask) for part in self.parts]

    def _piece(self, part: Part, row: Mapping[str, Any], index: int, source_name: str, mask: str) -> str:
        if part.kind != "column":
            return mask if part.kind == "mask" else part.text
        if part.text not in row:
            raise InputError(
                f"{place(source_name, index)}: expected column {part.text!r} of the template, "
                f"got the columns {listed(list(row))}"
            )
        return text_value(row[part.text], part.text, source_name, index)
