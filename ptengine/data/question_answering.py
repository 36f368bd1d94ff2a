"""Questions answered by a stretch of a text: long texts in overlapping windows, answers as positions of tokens.

Knows data and a tokenizer; no model and no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset

from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.checks import check_whole, is_whole
from ptengine.data.cells import described, place, text_value
from ptengine.data.checks import check_column
from ptengine.data.encoding import AnswerWindow, EncodedRow, EncodedSplit, check_max_tokens, plain_columns
from ptengine.data.tasks import Task
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["QuestionAnsweringTask"]


@dataclass(frozen=True)
class QuestionAnsweringTask(Task):
    """An encoder reads question and text, and a trained head points at the answer's first and last token (SQuAD).

    The tokenizer joins question and text with its special tokens and segment ids. A text that is too long for one row
    is read in windows, each a row of its own, which share `stride` tokens; question and text are never cut. In a window
    without the whole answer the head is to point at the row's first token, as BERT is trained (Devlin et al. 2019,
    arXiv 1810.04805). The answer to a row is the best stretch of at most `max_answer_length` tokens of the text in any
    of its windows, by the sum of the two logits.

    Attributes:
        question_column, context_column: text.
        answer_column: the answer as it stands in the text; or SQuAD's ``{"text": [...], "answer_start": [...]}``, of
            which all are references and the first is trained.
        start_column: the answer's first character in the text, from 0; None takes the answer's first occurrence.
        stride: tokens of the text that neighbouring windows share.
        max_answer_length: the longest answer given, in tokens.
    """

    question_column: str = "question"
    context_column: str = "context"
    answer_column: str = "answer"
    start_column: str | None = None
    stride: int = 64
    max_answer_length: int = 30

    kind: ClassVar[str] = "question_answering"
    backbone_kind: ClassVar[str] = "encoder"
    trains_head: ClassVar[bool] = True
    auto_class: ClassVar[str | None] = "AutoModelForQuestionAnswering"

    def __post_init__(self) -> None:
        columns = ["question_column", "context_column", "answer_column"]
        columns += [] if self.start_column is None else ["start_column"]
        for name in columns:
            check_column(getattr(self, name), name)
        if len({getattr(self, name) for name in columns}) < len(columns):
            raise InputError(f"expected columns apart from each other, got {[getattr(self, name) for name in columns]}")
        check_whole("stride", self.stride, 0)
        check_whole("max_answer_length", self.max_answer_length)

    @property
    def columns(self) -> tuple[str, ...]:
        start = () if self.start_column is None else (self.start_column,)
        return (*self.text_columns, self.answer_column, *start)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.question_column, self.context_column)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`. Nothing is cut, with or without `truncation`: a row of the data may be several rows here.

        Raises:
            InputError: also an answer that does not stand in its text, a question that leaves no room for a window of
                more than `stride` tokens, or a slow tokenizer.
        """
        check_max_tokens(max_tokens)
        if not tokenizer.is_fast:
            raise InputError(
                f"{source_name}: expected a fast tokenizer (it says which characters a token covers), got "
                f"{type(tokenizer).__name__}"
            )
        values = plain_columns(dataset, self.columns, source_name)
        questions, contexts = (
            [text_value(value, column, source_name, index) for index, value in enumerate(values[column])]
            for column in (self.question_column, self.context_column)
        )
        rows: list[EncodedRow] = []
        for index, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            start = None if self.start_column is None else values[self.start_column][index]
            answers, begin = self._answers(values[self.answer_column][index], start, context, source_name, index)
            # Tokens leave white space at a text's ends out: with it no token would cover an answer there.
            begin += len(answers[0]) - len(answers[0].lstrip())
            span = (begin, begin + len(answers[0].strip()))
            windows = self._windows(tokenizer, question, context, max_tokens, source_name, index)
            rows += [_row(windows, number, index, context, span, answers) for number in range(len(windows.encodings))]
        return EncodedSplit(rows, 0)

    def _windows(
        self, tokenizer: PreTrainedTokenizerBase, question: str, context: str, max_tokens: int, source: str, index: int
    ) -> Any:
        options: dict[str, Any] = {"return_attention_mask": False, "return_offsets_mapping": True, "verbose": False}
        whole = tokenizer([question], [context], **options)
        if len(whole["input_ids"][0]) <= max_tokens:
            return whole
        text = sum(part == 1 for part in whole.sequence_ids(0))
        room = max_tokens - (len(whole["input_ids"][0]) - text)
        if room <= self.stride:
            raise InputError(
                f"{place(source, index)}: expected room for more than stride={self.stride} tokens of the text beside "
                f"the question, got {max(room, 0)} of the {max_tokens} that a row may have"
            )
        return tokenizer(
            [question], [context], truncation="only_second", max_length=max_tokens, stride=self.stride,
            return_overflowing_tokens=True, **options,
        )  # fmt: skip

    def _answers(
        self, value: Any, start: Any, context: str, source_name: str, index: int
    ) -> tuple[tuple[str, ...], int]:
        """The acceptable answers, the trained one first, and where that begins in the text."""
        where = place(source_name, index)
        texts: Any = value
        starts: Any = [start]
        if isinstance(value, dict):
            texts, starts = value.get("text"), value.get("answer_start")
            if start is not None:
                raise InputError(f"{where}: expected no start_column beside answers with their own starts, got both")
        elif isinstance(value, str):
            texts = [value]
        if not isinstance(texts, list) or not texts or not all(isinstance(x, str) and x.strip() for x in texts):
            raise InputError(f"{where}: expected an answer in column {self.answer_column!r}, got {described(value)}")
        begin = starts[0] if isinstance(starts, list) and starts else None
        if begin is None and not isinstance(value, dict) and self.start_column is None:
            begin = context.find(texts[0])
        if not is_whole(begin):
            raise InputError(
                f"{where}: expected the answer's first character as a whole number, got {described(begin)}"
            )
        if begin < 0 or context[begin : begin + len(texts[0])] != texts[0]:
            raise InputError(
                f"{where}: expected the answer {described(texts[0])} in column {self.context_column!r}"
                + (f" from character {begin} on" if begin >= 0 else "")
            )
        return tuple(texts), begin


def _row(
    windows: Any, number: int, index: int, context: str, span: tuple[int, int], answers: Sequence[str]
) -> EncodedRow:
    tokens = windows["input_ids"][number]
    segments = windows.get("token_type_ids")
    offsets = [
        tuple(offset) if part == 1 else None
        for offset, part in zip(windows["offset_mapping"][number], windows.sequence_ids(number), strict=True)
    ]
    return EncodedRow(
        input_ids=tokens,
        labels=[IGNORE_INDEX] * len(tokens),
        index=index,
        prompt_length=len(tokens),
        token_type_ids=None if segments is None else segments[number],
        references=tuple(answers),
        window=AnswerWindow(context, offsets, _tokens_of(span, offsets)),
    )


def _tokens_of(span: tuple[int, int], offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last of the tokens that cover the characters `span`; the row's first where it is not whole in them."""
    text = [(at, offset) for at, offset in enumerate(offsets) if offset is not None and offset[0] < offset[1]]
    inside = [at for at, (begin, end) in text if begin < span[1] and end > span[0]]
    if not inside or text[0][1][0] > span[0] or text[-1][1][1] < span[1]:
        return 0, 0
    return inside[0], inside[-1]
