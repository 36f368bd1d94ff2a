"""Verbalisers: the words a causal model answers with, for each label.

A word is whatever text follows the template, usually with its leading blank (" spam"); it may be several tokens. Knows
a tokenizer, no data and no model.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ptengine.data.cells import described, label_name, listed
from ptengine.data.encoding import closed_targets
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BoundVerbalizer", "Verbalizer", "distinct_labels"]


def distinct_labels(labels: Sequence[object], what: str) -> tuple[str, ...]:
    """Label names as text; refuses fewer than two, repeated ones, those that differ in nothing but the Unicode form of
    their letters, and what is neither text nor a whole number."""
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise InputError(f"expected a list of labels for {what}, got {described(labels)}")
    names: list[str] = []
    forms: set[str] = set()
    for label in labels:
        name = label_name(label)
        if name is None or not name:
            raise InputError(f"expected labels of {what} as text or whole numbers, got {described(label)}")
        if name in names:
            raise InputError(f"expected different labels for {what}, got {name!r} twice")
        form = unicodedata.normalize("NFC", name)
        if form in forms:
            raise InputError(
                f"expected different labels for {what}, got {name!r} twice, composed (NFC) and decomposed: bring the "
                "data into one form"
            )
        forms.add(form)
        names.append(name)
    if len(names) < 2:
        raise InputError(f"expected at least two labels for {what}, got {listed(names) or 'none'}")
    return tuple(names)


@dataclass(frozen=True)
class BoundVerbalizer:
    """A verbaliser in one tokenizer's tokens.

    No word's tokens begin with another word's tokens, so the words are disjoint continuations of a text: a label's
    probability is the sum of its words', and p(word) the product over its tokens, with no end token needed.

    Attributes:
        labels: C label names; the position is the class id.
        token_ids: per label, per word, its tokens.
    """

    labels: tuple[str, ...]
    token_ids: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of all W words, label by label: the order of `ClassificationTask.candidates`."""
        return tuple(word for words in self.token_ids for word in words)

    @property
    def word_labels(self) -> tuple[int, ...]:
        """The class id of each of `words`."""
        return tuple(class_id for class_id, words in enumerate(self.token_ids) for _ in words)

    @property
    def single_token(self) -> bool:
        """Whether every word is one token: one forward over the text then scores all labels."""
        return all(len(word) == 1 for word in self.words)

    @property
    def rows_per_text(self) -> int:
        """Rows that scoring lays out for a text: one, or one for every word where words have several tokens."""
        return 1 if self.single_token else len(self.words)

    def first_word(self, class_id: int | None) -> int:
        """The position among `words` of the label's first word, which training uses."""
        if class_id is None:
            raise ValueError("expected a row with a label, got none")
        return self.word_labels.index(class_id)

    @property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return max(len(word) for word in self.words)


@dataclass(frozen=True, init=False)
class Verbalizer:
    """Label to word, or to several words: ``Verbalizer({"ham": " ham", "spam": [" spam", " junk"]})``.

    The order of the labels gives the class ids. Training uses a label's first word; scoring uses all of them. Labels
    may be given as text or whole numbers and are kept as text.

    Attributes:
        words: label name to its words.

    Raises:
        InputError: no mapping, fewer than two labels, the same label twice, a label without words, an empty word, or a
            word that is not text.
    """

    words: Mapping[str, tuple[str, ...]]

    def __init__(self, words: Mapping[str, str | Sequence[str]]) -> None:
        if not isinstance(words, Mapping):
            raise InputError(f"expected a verbaliser as a mapping from label to word, got {described(words)}")
        names = distinct_labels(list(words), "a verbaliser")
        checked = {name: _checked_words(name, given) for name, given in zip(names, words.values(), strict=True)}
        object.__setattr__(self, "words", checked)

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> Verbalizer:
        """Each label named by itself after a blank: "ham" by " ham"."""
        return cls({name: f" {name}" for name in distinct_labels(labels, "a verbaliser")})

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names; the position is the class id."""
        return tuple(self.words)

    def bind(self, tokenizer: PreTrainedTokenizerBase, *, as_targets: bool = False) -> BoundVerbalizer:
        """The words in a tokenizer's tokens, each tokenised on its own without special tokens.

        Args:
            tokenizer: of the model that names the labels.
            as_targets: with the special tokens around them, the EOS among them, as an encoder-decoder writes a target.
                No word then begins with another's tokens, so "yes" and "yesterday" may stand beside each other.

        Raises:
            InputError: a word of no tokens or with an unknown token; or a word whose tokens equal, or begin with, those
                of another word. The latter is refused rather than mended with an end token: "yes" could never score
                below "yesterday", and which words are at fault depends on the tokenizer.
        """
        flat = [(label, word) for label, words in self.words.items() for word in words]
        encoded = tokenizer([word for _, word in flat], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [tuple(ids) for ids in encoded]
        for (label, word), ids in zip(flat, tokens, strict=True):
            if not ids:
                raise InputError(f"expected a word of at least one token for label {label!r}, got {word!r}")
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise InputError(
                    f"expected words that the tokenizer knows, got {word!r} of label {label!r}, which holds the "
                    f"unknown token {tokenizer.unk_token!r}"
                )
        if as_targets:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    "expected a tokenizer with an EOS token to end words with, got "
                    f"{type(tokenizer).__name__} without one"
                )
            targets = closed_targets(tokenizer, [word for _, word in flat], [tokenizer.eos_token_id])
            tokens = [tuple(ids) for ids in targets]
        order = sorted(range(len(flat)), key=tokens.__getitem__)
        # In this order a sequence stands right before the first of those that begin with it.
        for one, other in pairwise(order):
            if tokens[other][: len(tokens[one])] == tokens[one]:
                same = tokens[other] == tokens[one]
                raise InputError(
                    "expected words of which none begins with another's tokens, got "
                    f"{flat[one][1]!r} of label {flat[one][0]!r} and {flat[other][1]!r} of label {flat[other][0]!r}: "
                    f"{'the same tokens' if same else 'tokens'} {list(tokens[one])}"
                    f"{'' if same else f' and {list(tokens[other])}'}"
                )
        remaining = iter(tokens)
        return BoundVerbalizer(
            labels=self.labels,
            token_ids=tuple(tuple(next(remaining) for _ in words) for words in self.words.values()),
        )


def _checked_words(label: str, given: str | Sequence[str]) -> tuple[str, ...]:
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not words:
        raise InputError(f"expected a word or a list of words for label {label!r}, got {described(given)}")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"expected words that are not empty for label {label!r}, got {described(word)}")
    return tuple(words)
