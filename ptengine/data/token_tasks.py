"""Token classification: one label for every word of a row.

Knows data and a tokenizer; no model and no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset

from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.data.cells import described, label_name, listed, place
from ptengine.data.checks import check_column
from ptengine.data.encoding import EncodedRow, EncodedSplit, check_max_tokens, plain_columns, too_long
from ptengine.data.sources import class_name
from ptengine.data.tasks import Task
from ptengine.data.verbalizers import distinct_labels
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenClassificationTask"]


@dataclass(frozen=True)
class TokenClassificationTask(Task):
    """An encoder reads a list of words, and a trained head gives each its label (named entities, parts of speech).

    The label stands at a word's first token (Devlin et al. 2019, arXiv 1810.04805, section 5.3); its other tokens and
    the special ones have none. Nor has a word whose label is the number -100: no loss, metric or prediction has it.
    With truncation the last words of a row that is too long are left out.

    Attributes:
        tokens_column: a list of words per row.
        tags_column: a list of labels, one for each word.
        labels: the label names, at least two; the position is the class id.
    """

    tokens_column: str = "tokens"
    tags_column: str = "tags"
    labels: tuple[str, ...] = ()

    kind: ClassVar[str] = "token_classification"
    backbone_kind: ClassVar[str] = "encoder"
    trains_head: ClassVar[bool] = True
    auto_class: ClassVar[str | None] = "AutoModelForTokenClassification"

    def __post_init__(self) -> None:
        for name in ("tokens_column", "tags_column"):
            check_column(getattr(self, name), name)
        if self.tokens_column == self.tags_column:
            raise InputError(f"expected columns apart from each other, got {self.tokens_column!r} for both")
        object.__setattr__(self, "labels", distinct_labels(self.labels, "token classification"))

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.text_columns, self.tags_column)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.tokens_column,)

    @property
    def has_entities(self) -> bool:
        """Whether the labels mark entities: O, and B-name or I-name."""
        return all(label == "O" or label[:2] in ("B-", "I-") for label in self.labels)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`. `labels` of a row are class ids.

        Raises:
            InputError: also other numbers of words and labels, no label but -100 in what a row keeps, a word that the
                tokenizer makes nothing of, or a tokenizer that does not take words (a slow one, or a byte-level one
                without ``add_prefix_space=True``).
        """
        special = tokenizer.num_special_tokens_to_add()
        check_max_tokens(max_tokens, special)
        values = plain_columns(dataset, self.columns, source_name)
        words = [self._words(value, source_name, index) for index, value in enumerate(values[self.tokens_column])]
        classes = [
            self._classes(dataset, value, len(words[index]), source_name, index)
            for index, value in enumerate(values[self.tags_column])
        ]
        options = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
        try:
            encoded = tokenizer(words, **options)
            owners = [encoded.word_ids(index) for index in range(len(words))]
        except (AssertionError, ValueError) as error:
            raise InputError(
                f"expected a fast tokenizer that takes words (byte-level ones with add_prefix_space=True), got "
                f"{type(tokenizer).__name__}: {error}"
            ) from error
        for index, owner in enumerate(owners):
            lost = set(range(len(words[index]))) - {word for word in owner if word is not None}
            if lost:
                raise InputError(
                    f"{place(source_name, index)}: expected words of at least one token in column "
                    f"{self.tokens_column!r}, got {words[index][min(lost)]!r}"
                )
        over = [index for index, owner in enumerate(owners) if len(owner) > max_tokens]
        if over and not truncation:
            detail = f"{special} special ones among them, and truncation is off"
            raise too_long(source_name, over[0], len(owners[over[0]]), max_tokens, detail)
        segments = encoded.get("token_type_ids")
        rows = []
        for index, tokens in enumerate(encoded["input_ids"]):
            kept = _kept(owners[index], max_tokens)  # tokenizers with truncation_side="left" cut the first words
            labels = _at_first_tokens(owners[index], classes[index])
            rows.append(
                EncodedRow(
                    input_ids=[tokens[i] for i in kept],
                    labels=[labels[i] for i in kept],
                    index=index,
                    prompt_length=len(kept),
                    token_type_ids=None if segments is None else [segments[index][i] for i in kept],
                )
            )
        for row in rows:
            if all(label == IGNORE_INDEX for label in row.labels):
                raise InputError(
                    f"{place(source_name, row.index)}: expected a label other than {IGNORE_INDEX} within {max_tokens} "
                    f"tokens in column {self.tags_column!r}, got none"
                )
        return EncodedSplit(rows, len(over))

    def _words(self, value: Any, source_name: str, index: int) -> list[str]:
        if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
            raise InputError(
                f"{place(source_name, index)}: expected a list of words in column {self.tokens_column!r}, "
                f"got {described(value)}"
            )
        return value

    def _classes(self, dataset: Dataset, value: Any, count: int, source_name: str, index: int) -> list[int]:
        where = place(source_name, index)
        if not isinstance(value, list) or len(value) != count:
            raise InputError(f"{where}: expected {count} labels in column {self.tags_column!r}, got {described(value)}")
        feature = getattr(dataset.features[self.tags_column], "feature", None)
        classes = []
        for one in value:
            if one == IGNORE_INDEX:
                classes.append(IGNORE_INDEX)
                continue
            one = class_name(feature, one)
            name = label_name(one)
            if name not in self.labels:
                raise InputError(
                    f"{where}: expected labels among {listed(self.labels)} in column {self.tags_column!r}, "
                    f"got {described(one)}"
                )
            classes.append(self.labels.index(name))
        return classes


def _kept(owners: list[int | None], most: int) -> list[int]:
    """Positions of a row's tokens without the last ones of its words that are too many; special tokens stay."""
    of_words = [position for position, owner in enumerate(owners) if owner is not None]
    cut = {*of_words[len(of_words) - max(len(owners) - most, 0) :]}
    return [position for position in range(len(owners)) if position not in cut]


def _at_first_tokens(owners: list[int | None], classes: list[int]) -> list[int]:
    """The class of each word at its first token, -100 at all others."""
    labels, before = [], None
    for owner in owners:
        labels.append(IGNORE_INDEX if owner is None or owner == before else classes[owner])
        before = owner
    return labels
