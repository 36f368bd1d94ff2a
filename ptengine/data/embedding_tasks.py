"""Pairs of texts whose embeddings are to be near, or not.

Knows data and a tokenizer; no model and no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset

from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.checks import check_number
from ptengine.data.cells import described, label_name, place, text_value
from ptengine.data.checks import check_column
from ptengine.data.encoding import EncodedRow, EncodedSplit, check_max_tokens, plain_columns, too_long
from ptengine.data.sources import class_name
from ptengine.data.tasks import Task
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EmbeddingTask"]


@dataclass(frozen=True)
class EmbeddingTask(Task):
    """A text finds its pair among the pairs of the other rows of a batch, by the cosine of their embeddings.

    The loss of row i is -log softmax_j(cos(a_i, b_j) / temperature) at j = i, over the texts b_j of all rows of the
    micro-batch (van den Oord et al. 2018, arXiv 1807.03748; Gao et al. 2021, arXiv 2104.08821): large batches make it
    harder, and gradient accumulation does not. A batch has two rows at least: the last row of an epoch joins the batch
    before it where it would be alone. The b of a pair that does not match stands among the texts that are not to be
    found; such a row has no loss of its own, and the loss of a step is the mean over its pairs that match (0 without
    any). Embeddings are those of `ptengine.embed`.

    Attributes:
        text_column, text_pair_column: a and b, each a text by itself with the tokenizer's special tokens.
        label_column, positive_label: with both, rows with this label match and all others do not; with neither all do.
        temperature: above 0.
    """

    text_column: str = "text"
    text_pair_column: str = "text_pair"
    label_column: str | None = None
    positive_label: str | None = None
    temperature: float = 0.05

    kind: ClassVar[str] = "embedding"
    backbone_kind: ClassVar[str] = "encoder"
    auto_class: ClassVar[str | None] = "AutoModel"

    def __post_init__(self) -> None:
        for name in ("text_column", "text_pair_column"):
            check_column(getattr(self, name), name)
        if (self.label_column is None) != (self.positive_label is None):
            raise InputError(
                f"expected label_column and positive_label, both or neither, got {self.label_column!r} and "
                f"{self.positive_label!r}"
            )
        if self.label_column is not None:
            check_column(self.label_column, "label_column")
            positive = label_name(self.positive_label)
            if not positive:
                raise InputError(f"expected positive_label as text, got {described(self.positive_label)}")
            object.__setattr__(self, "positive_label", positive)
        if len(set(self.columns)) < len(self.columns):
            raise InputError(f"expected columns apart from each other, got {list(self.columns)}")
        check_number("temperature", self.temperature)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.text_columns, *(() if self.label_column is None else (self.label_column,)))

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text_column, self.text_pair_column)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`; `max_tokens` is that of each text. A row's `class_id` is 1 where its texts match."""
        special = tokenizer.num_special_tokens_to_add()
        check_max_tokens(max_tokens, special)
        values = plain_columns(dataset, self.columns, source_name)
        matches = [True] * dataset.num_rows
        if self.label_column is not None:
            matches = self._matches(dataset, values[self.label_column], source_name)
        cut: set[int] = set()
        sides = []
        for column in (self.text_column, self.text_pair_column):
            texts = [text_value(value, column, source_name, index) for index, value in enumerate(values[column])]
            options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
            tokens = tokenizer(texts, **options)["input_ids"]
            over = [index for index, row in enumerate(tokens) if len(row) > max_tokens]
            if over and not truncation:
                detail = f"of column {column!r}, {special} special ones among them, and truncation is off"
                raise too_long(source_name, over[0], len(tokens[over[0]]), max_tokens, detail)
            cut |= set(over)
            if over:
                tokens = tokenizer(texts, truncation=True, max_length=max_tokens, **options)["input_ids"]
            sides.append(tokens)
        rows = [
            EncodedRow(
                input_ids=one,
                labels=[IGNORE_INDEX] * len(one),
                index=index,
                prompt_length=len(one),
                class_id=int(matches[index]),
                pair_ids=other,
            )
            for index, (one, other) in enumerate(zip(*sides, strict=True))
        ]
        return EncodedSplit(rows, len(cut))

    def _matches(self, dataset: Dataset, values: list[Any], source_name: str) -> list[bool]:
        feature = dataset.features[self.label_column]  # type: ignore[index]
        names = []
        for index, value in enumerate(values):
            value = class_name(feature, value)
            name = label_name(value)
            if not name:
                raise InputError(
                    f"{place(source_name, index)}: expected a label in column {self.label_column!r}, "
                    f"got {described(value)}"
                )
            names.append(name)
        if self.positive_label not in names:
            raise InputError(
                f"{source_name}: expected the label {self.positive_label!r} of pairs that match in column "
                f"{self.label_column!r}, got none"
            )
        return [name == self.positive_label for name in names]
