"""Templates: what they render, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptengine.data import Template
from ptengine.errors import InputError

names = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1, max_size=8)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def test_renders_columns_escapes_and_numbers() -> None:
    template = Template("{{id}} {id}: {text}\n{customer rating} {text}")
    assert template.columns == ("id", "text", "customer rating")
    row = {"id": 7, "text": "a {text} }} b", "customer rating": 4.5, "unused": None}
    assert template.render(row, 0) == "{id} 7: a {text} }} b\n4.5 a {text} }} b"


def test_three_braces_are_a_brace_and_a_column() -> None:
    assert Template("{{{a}}}").render({"a": "x"}, 0) == "{x}"


@given(st.lists(st.tuples(texts, names, texts), min_size=1, max_size=5), texts)
def test_round_trip(parts: list[tuple[str, str, str]], tail: str) -> None:
    """Any literal, escaped, and any value come out as they went in, in order."""
    row = {name: value for _, name, value in parts}
    source = "".join(literal.replace("{", "{{").replace("}", "}}") + "{" + name + "}" for literal, name, _ in parts)
    template = Template(source + tail.replace("{", "{{").replace("}", "}}"))
    expected = "".join(literal + row[name] for literal, name, _ in parts) + tail
    assert template.render(row, 0) == expected
    assert "".join(template.pieces(row, 0)) == expected
    assert template.columns == tuple(dict.fromkeys(name for _, name, _ in parts))


@given(st.text("{}a", max_size=12))
def test_any_text_is_a_template_or_an_input_error(text: str) -> None:
    try:
        template = Template(text)
    except InputError:
        return
    assert "v" in template.render(dict.fromkeys(template.columns, "v"), 0)


def test_is_a_plain_record() -> None:
    template = Template("{text}")
    assert template == Template("{text}")
    assert dataclasses.asdict(template) == {"text": "{text}"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        template.text = "{other}"  # type: ignore[misc]
