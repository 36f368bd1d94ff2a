"""Tasks: what a row of data asks of a model and what counts as its answer.

A task turns a data set into rows of tokens with labels. It knows data and a tokenizer; never a model, a prompt or an
optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from datasets import Dataset

from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.data.cells import described, place, text_value
from ptengine.data.checks import check_column, check_masks, expect, refuse_leak
from ptengine.data.encoding import (
    EncodedRow,
    EncodedSplit,
    check_max_tokens,
    class_ids,
    encode_texts,
    plain_columns,
    token_lists,
    too_long,
)
from ptengine.data.templates import Template
from ptengine.data.verbalizers import BoundVerbalizer, Verbalizer, distinct_labels
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ClassificationTask",
    "GenerationTask",
    "LabelledTask",
    "SequenceClassificationTask",
    "Task",
    "VerbalizedTask",
    "head_labels",
    "placed_virtual_tokens",
    "row_labels",
    "with_every_word",
    "with_target",
]


@runtime_checkable
class Task(Protocol):
    """What every task offers.

    Attributes:
        kind: such as "classification" or "generation", one for each class of task.
        backbone_kind: the models it is for, "causal", "encoder" or "seq2seq" (encoder-decoders).
        trains_head: whether a head of the model is trained beside the prompt, so that it is saved and loaded with it.
        auto_class: the class of transformers that loads a model for it; None is one with a language-modelling head.
    """

    kind: ClassVar[str]
    backbone_kind: ClassVar[str]
    trains_head: ClassVar[bool] = False
    auto_class: ClassVar[str | None] = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a data set must have."""
        ...

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that it reads, without that of the answer: text, or lists of words."""
        ...

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """Tokenise and label every row.

        Args:
            max_tokens: the longest row allowed, target included: the model's context minus the prompt's P.
            truncation: cut rows that are too long instead of refusing them.
            source_name: what errors call the data, such as its file.

        Raises:
            InputError: a missing column, an empty split, a value or label that is not what the task expects, a row that
                is too long; names the row and the column.
        """
        ...


@dataclass(frozen=True)
class VerbalizedTask(Task):
    """What the tasks share whose label a model names by one of the label's words: `ClassificationTask`,
    `MaskedClassificationTask`, `Seq2SeqClassificationTask`."""

    template: Template
    verbalizer: Verbalizer
    label_column: str = "label"

    def __post_init__(self) -> None:
        expect(self.template, Template, "template")
        expect(self.verbalizer, Verbalizer, "verbalizer")
        check_column(self.label_column, "label_column")
        refuse_leak(self.template, self.label_column, "label")

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.text_columns, self.label_column)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self.template.columns

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names; a row's `class_id` is a position here."""
        return self.verbalizer.labels


@dataclass(frozen=True)
class ClassificationTask(VerbalizedTask):
    """A causal model reads the text and names the label: the template's text, then the label's word.

    The loss stands on the word's tokens only. Text and word are tokenised apart and joined, so the word's tokens are
    exactly the verbaliser's. The text starts with whatever the tokenizer puts in front of a text (a BOS, if it does
    that); nothing stands between text and word and no EOS follows.

    Room is kept for the longest word in every row, so all candidates of a row fit wherever the row does. For how a text
    is cut see `ptengine.data.encoding.encode_texts`. Virtual tokens that the template places behind text run in every
    row; those before all text are shared by the rows, as a prompt is whose template names no place.
    """

    kind: ClassVar[str] = "classification"
    backbone_kind: ClassVar[str] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masks(self.template, 0, "which masked language models fill in (MaskedClassificationTask)")

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`. A row's target is the first word of its label."""
        check_max_tokens(max_tokens)
        bound = self.verbalizer.bind(tokenizer)
        values = plain_columns(dataset, self.columns, source_name)
        ids = class_ids(dataset, values[self.label_column], self.label_column, self.labels, source_name)
        texts = encode_texts(
            self.template,
            values,
            tokenizer,
            reserved=[bound.longest] * len(ids),
            max_tokens=max_tokens,
            truncation=truncation,
            source_name=source_name,
        )
        rows = [
            with_target(text, bound.token_ids[class_id][0], index, class_id=class_id, virtual_at=virtual_at)
            for index, (text, class_id, virtual_at) in enumerate(zip(texts.tokens, ids, texts.virtual_at, strict=True))
        ]
        return EncodedSplit(rows, texts.truncated)

    def candidates(self, row: EncodedRow, bound: BoundVerbalizer) -> list[EncodedRow]:
        """The row once per word of the verbaliser, in the order of ``bound.words``.

        Each has the row's text and index, the word as its labelled target and the word's label as `class_id`. The log
        probability of a word is the sum over its labelled tokens; a label's, the log-sum-exp over its words.
        """
        return with_every_word(row, bound)


@dataclass(frozen=True)
class GenerationTask(Task):
    """A causal model reads the text and writes the target: the template's text, then the target column, then EOS.

    The loss stands on the target's tokens only, the EOS among them. The target is tokenised apart, exactly as written,
    and joined: a separator (a newline, say) belongs at the end of the template, a blank before a word at the start of
    the target, for tokenizers whose words begin with one. The target is never cut.

    Attributes:
        template: the text before the target.
        target_column: text, not empty.
        end_with_eos: close the target with the tokenizer's EOS, so that the model learns to stop.
        references_column: where the data has this column, its texts (a list, or one) are what metrics compare with;
            elsewhere the target alone is.
    """

    template: Template
    target_column: str = "target"
    end_with_eos: bool = True
    references_column: str = "references"

    kind: ClassVar[str] = "generation"
    backbone_kind: ClassVar[str] = "causal"

    def __post_init__(self) -> None:
        expect(self.template, Template, "template")
        check_column(self.target_column, "target_column")
        check_column(self.references_column, "references_column")
        refuse_leak(self.template, self.target_column, "target")
        check_masks(self.template, 0, "which masked language models fill in")
        if not self.template.is_behind_prompt:
            raise InputError(
                "expected virtual tokens before the text of a generation template, where generation has them, got "
                f"{self.template.text!r}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.text_columns, self.target_column)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self.template.columns

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`; also refuses an empty target, and `end_with_eos` with a tokenizer that has no EOS."""
        check_max_tokens(max_tokens)
        ending = self.ending(tokenizer)
        values, answers, references = self.read(dataset, source_name)
        targets = [tokens + ending for tokens in token_lists(tokenizer, answers)]
        texts = encode_texts(
            self.template,
            values,
            tokenizer,
            reserved=[len(target) for target in targets],
            max_tokens=max_tokens,
            truncation=truncation,
            source_name=source_name,
        )
        rows = [
            with_target(text, target, index, references=references[index])
            for index, (text, target) in enumerate(zip(texts.tokens, targets, strict=True))
        ]
        return EncodedSplit(rows, texts.truncated)

    def ending(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What closes a target: the tokenizer's EOS, or nothing."""
        if not self.end_with_eos:
            return []
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"expected a tokenizer with an EOS token to end targets with, got {type(tokenizer).__name__} "
                "without one; set end_with_eos=False"
            )
        return [tokenizer.eos_token_id]

    def read(self, dataset: Dataset, source_name: str) -> tuple[dict[str, list[Any]], list[str], list[tuple[str, ...]]]:
        """The columns that are needed, the targets, and all acceptable targets of every row."""
        has_references = self.references_column in dataset.column_names
        needed = (*self.columns, self.references_column) if has_references else self.columns
        values = plain_columns(dataset, needed, source_name)
        answers = [
            _target_text(value, self.target_column, source_name, index)
            for index, value in enumerate(values[self.target_column])
        ]
        references: list[tuple[str, ...]] = [(answer,) for answer in answers]
        if has_references:
            references = [
                _references(value, self.references_column, source_name, index)
                for index, value in enumerate(values[self.references_column])
            ]
        return values, answers, references


@dataclass(frozen=True)
class SequenceClassificationTask(Task):
    """An encoder reads one text, or a pair, and a trained head on top of it gives the class.

    The tokenizer adds its special tokens and segment ids. Rows carry a `class_id` and no labelled tokens. With
    truncation the tokenizer's own ``longest_first`` cuts the longer of the two texts, on its `truncation_side`.

    Attributes:
        labels: the label names, at least two; a row's `class_id` is a position here.
    """

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    labels: tuple[str, ...] = ()

    kind: ClassVar[str] = "sequence_classification"
    backbone_kind: ClassVar[str] = "encoder"
    trains_head: ClassVar[bool] = True
    auto_class: ClassVar[str | None] = "AutoModelForSequenceClassification"

    def __post_init__(self) -> None:
        for name in ("text_column", "label_column"):
            check_column(getattr(self, name), name)
        if self.text_pair_column is not None:
            check_column(self.text_pair_column, "text_pair_column")
        if self.label_column in (self.text_column, self.text_pair_column):
            raise InputError(f"expected a label column apart from the text, got {self.label_column!r} for both")
        object.__setattr__(self, "labels", distinct_labels(self.labels, "sequence classification"))

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.text_columns, self.label_column)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text_column, *(() if self.text_pair_column is None else (self.text_pair_column,)))

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`. The special tokens count towards `max_tokens`."""
        special = tokenizer.num_special_tokens_to_add(pair=self.text_pair_column is not None)
        check_max_tokens(max_tokens, special)
        values = plain_columns(dataset, self.columns, source_name)
        ids = class_ids(dataset, values[self.label_column], self.label_column, self.labels, source_name)
        texts = [
            [text_value(value, column, source_name, index) for index, value in enumerate(values[column])]
            for column in self.columns[:-1]
        ]
        encoded = _encode_pairs(tokenizer, texts)
        tokens, segments = encoded["input_ids"], encoded.get("token_type_ids")
        over = [index for index, row in enumerate(tokens) if len(row) > max_tokens]
        if over and not truncation:
            detail = f"{special} special ones among them, and truncation is off"
            raise too_long(source_name, over[0], len(tokens[over[0]]), max_tokens, detail)
        if over:
            cut = _encode_pairs(
                tokenizer,
                [[column[index] for index in over] for column in texts],
                truncation="longest_first",
                max_length=max_tokens,
            )
            for position, index in enumerate(over):
                tokens[index] = cut["input_ids"][position]
                if segments is not None:
                    segments[index] = cut["token_type_ids"][position]
        rows = [
            EncodedRow(
                input_ids=row,
                labels=[IGNORE_INDEX] * len(row),
                index=index,
                prompt_length=len(row),
                class_id=ids[index],
                token_type_ids=None if segments is None else segments[index],
            )
            for index, row in enumerate(tokens)
        ]
        return EncodedSplit(rows, len(over))


LabelledTask: TypeAlias = VerbalizedTask | SequenceClassificationTask
"""A row has one of the task's labels, which a model says by a word or by a head."""


def row_labels(task: LabelledTask, dataset: Dataset, source_name: str) -> list[str]:
    """The label of every row.

    Raises:
        InputError: there is no column of labels, or a row has none of the task's.
    """
    column = task.label_column
    values = plain_columns(dataset, (column,), source_name)[column]
    return [task.labels[i] for i in class_ids(dataset, values, column, task.labels, source_name)]


def placed_virtual_tokens(task: Task) -> int | None:
    """The virtual tokens that the task's template places; None where it has no template or names no place."""
    template = getattr(task, "template", None)
    return template.num_virtual_tokens if isinstance(template, Template) else None


def head_labels(task: Task) -> tuple[str, ...]:
    """The labels that the outputs of a task's head stand for; none of one that points at tokens."""
    return tuple(getattr(task, "labels", ()))


def _encode_pairs(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], **options: Any) -> dict[str, Any]:
    return dict(tokenizer(*texts, return_attention_mask=False, verbose=False, **options))


def with_every_word(row: EncodedRow, bound: BoundVerbalizer) -> list[EncodedRow]:
    """The row once per word of the verbaliser, each with the word as its target and the word's label."""
    text = row.input_ids[: row.prompt_length]
    return [
        with_target(text, word, row.index, class_id=class_id, virtual_at=row.virtual_at)
        for word, class_id in zip(bound.words, bound.word_labels, strict=True)
    ]


def with_target(
    text: list[int],
    target: Sequence[int],
    index: int,
    *,
    class_id: int | None = None,
    references: tuple[str, ...] = (),
    virtual_at: list[int] | None = None,
) -> EncodedRow:
    return EncodedRow(
        input_ids=[*text, *target],
        labels=[IGNORE_INDEX] * len(text) + list(target),
        index=index,
        prompt_length=len(text),
        class_id=class_id,
        references=references,
        virtual_at=virtual_at,
    )


def _target_text(value: Any, column: str, source_name: str, index: int) -> str:
    text = text_value(value, column, source_name, index)
    if not text.strip():
        raise InputError(f"{place(source_name, index)}: expected a target in column {column!r}, got {described(text)}")
    return text


def _references(value: Any, column: str, source_name: str, index: int) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise InputError(
            f"{place(source_name, index)}: expected a text or a list of texts in column {column!r}, "
            f"got {described(value)}"
        )
    return tuple(_target_text(text, column, source_name, index) for text in texts)
