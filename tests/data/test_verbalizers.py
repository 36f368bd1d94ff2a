"""Verbalisers: labels to words to tokens."""

from __future__ import annotations

from typing import Any

import pytest

from ptengine.data import Verbalizer
from ptengine.errors import InputError


def test_words_and_class_ids() -> None:
    verbalizer = Verbalizer({"ham": " ham", "spam": [" spam", " junk"]})
    assert verbalizer.labels == ("ham", "spam")
    assert verbalizer.words == {"ham": (" ham",), "spam": (" spam", " junk")}
    assert Verbalizer.from_labels(["ham", "spam"]).words == {"ham": (" ham",), "spam": (" spam",)}
    assert Verbalizer({0: " no", 1: " yes"}).labels == ("0", "1")  # type: ignore[dict-item]


def test_binds_to_a_tokenizers_tokens(wordwise: Any) -> None:
    bound = Verbalizer({"neg": "bad", "pos": ["very good", "film"]}).bind(wordwise)
    assert bound.token_ids == (((4,),), ((5, 3), (6,)))
    assert bound.words == ((4,), (5, 3), (6,))
    assert bound.word_labels == (0, 1, 1)
    assert bound.longest == 2
    assert not bound.single_token
    assert Verbalizer({"neg": "bad", "pos": ["good", "film"]}).bind(wordwise).single_token


def test_words_hold_no_special_tokens(stories: Any) -> None:
    bound = Verbalizer.from_labels(["ham", "spam"]).bind(stories)
    assert stories.bos_token_id not in {token for word in bound.words for token in word}
    assert [stories.decode(word).strip() for word in bound.words] == ["ham", "spam"]


@pytest.mark.parametrize("words", [["ab", "a"], ["a", "abc", "ab"], ["b", "ab", "aa", "abba", "aab"]])
def test_refuses_a_word_that_begins_another(bytewise: Any, words: list[str]) -> None:
    """Without an end token "a" could never score below "ab", so the two are not comparable."""
    with pytest.raises(InputError, match="none begins with another's tokens"):
        Verbalizer({f"label {i}": word for i, word in enumerate(words)}).bind(bytewise)


def test_a_shared_beginning_is_fine(bytewise: Any) -> None:
    bound = Verbalizer({"a": ["abc", "abd"], "b": "aba"}).bind(bytewise)
    assert [bytewise.decode(word) for word in bound.words] == ["abc", "abd", "aba"]
