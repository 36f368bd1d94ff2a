"""The tasks of encoder-decoders: the encoder reads the template's text, the decoder writes the target or label's word.

Knows data and a tokenizer, as all tasks do; never a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset

from ptengine.data.checks import check_masks
from ptengine.data.encoding import (
    EncodedRow,
    EncodedSplit,
    EncodedTexts,
    check_max_tokens,
    class_ids,
    closed_targets,
    encode_texts,
    plain_columns,
    too_long,
)
from ptengine.data.tasks import GenerationTask, VerbalizedTask, with_every_word, with_target
from ptengine.data.templates import Template
from ptengine.data.verbalizers import BoundVerbalizer
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Seq2SeqClassificationTask", "Seq2SeqTask"]


@dataclass(frozen=True)
class Seq2SeqTask(GenerationTask):
    """An encoder-decoder reads the text and writes the target: the template's text is the source.

    Source and target are tokenised as the tokenizer does it for a text and for a target (`text_target`), special tokens
    included: `</s>` behind both for T5, the language codes of mBART. The loss stands on the target's tokens, which the
    decoder reads shifted by one as its stock model shifts labels. A row's `input_ids` are the source's
    (`prompt_length` of them) and behind them the target's.

    Attributes:
        template: the source.
        target_column, references_column: as of `GenerationTask`.
        end_with_eos: close a target with the tokenizer's EOS where the tokenizer itself has put none.
    """

    kind: ClassVar[str] = "seq2seq"
    backbone_kind: ClassVar[str] = "seq2seq"

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`; `max_tokens` is the longest source and the longest target, each. Targets are never cut."""
        check_max_tokens(max_tokens)
        ending = self.ending(tokenizer)
        values, answers, references = self.read(dataset, source_name)
        targets = closed_targets(tokenizer, answers, ending)
        for index, target in enumerate(targets):
            if len(target) > max_tokens:
                raise too_long(source_name, index, len(target), max_tokens, "the target, which is never cut")
        sources = _sources(self.template, values, len(targets), tokenizer, max_tokens, truncation, source_name)
        rows = [
            with_target(source, target, index, references=references[index])
            for index, (source, target) in enumerate(zip(sources.tokens, targets, strict=True))
        ]
        return EncodedSplit(rows, sources.truncated)


@dataclass(frozen=True)
class Seq2SeqClassificationTask(VerbalizedTask):
    """An encoder-decoder reads the text and writes the label's word, as T5 casts classification (Raffel et al. 2020,
    arXiv 1910.10683) and as prompt tuning and SPoT do (Lester et al. 2021, arXiv 2104.08691).

    The loss is that of `Seq2SeqTask` with the label's first word as the target: on all of the word's tokens as the
    tokenizer writes a target, its EOS among them. A label's score is the log of the sum of its words' probabilities,
    each the product over these tokens; nothing is generated, so a label is always one of the verbaliser's. A row's
    `input_ids` are the source's (`prompt_length` of them) and behind them the word's.

    Raises:
        InputError: a template with a ``{mask}`` or with places for virtual tokens, which stand before the source here.
    """

    kind: ClassVar[str] = "seq2seq_classification"
    backbone_kind: ClassVar[str] = "seq2seq"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masks(self.template, 0, "which masked language models fill in (MaskedClassificationTask)")
        if not self.template.is_behind_prompt:
            raise InputError(
                f"expected virtual tokens before the text of an encoder-decoder's template, got {self.template.text!r}"
            )

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundVerbalizer:
        """The verbaliser in tokens, each word with the special tokens of a target; raises as `Verbalizer.bind`."""
        return self.verbalizer.bind(tokenizer, as_targets=True)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`; `max_tokens` is the longest source and the longest word, each. Words are never cut."""
        check_max_tokens(max_tokens)
        bound = self.bind(tokenizer)
        if bound.longest > max_tokens:
            raise InputError(f"expected words of at most {max_tokens} tokens, got one of {bound.longest}")
        values = plain_columns(dataset, self.columns, source_name)
        ids = class_ids(dataset, values[self.label_column], self.label_column, self.labels, source_name)
        sources = _sources(self.template, values, len(ids), tokenizer, max_tokens, truncation, source_name)
        rows = [
            with_target(source, bound.token_ids[class_id][0], index, class_id=class_id)
            for index, (source, class_id) in enumerate(zip(sources.tokens, ids, strict=True))
        ]
        return EncodedSplit(rows, sources.truncated)

    def candidates(self, row: EncodedRow, bound: BoundVerbalizer) -> list[EncodedRow]:
        """The row once per word of the verbaliser, as `ClassificationTask.candidates`."""
        return with_every_word(row, bound)


def _sources(
    template: Template,
    values: dict[str, list[Any]],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    truncation: bool,
    source_name: str,
) -> EncodedTexts:
    return encode_texts(
        template,
        values,
        tokenizer,
        reserved=[0] * count,
        max_tokens=max_tokens,
        truncation=truncation,
        source_name=source_name,
        closed=True,
    )
