"""Classification by what a masked language model writes into a blank.

Knows data and a tokenizer; no model and no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from datasets import Dataset

from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.data.cells import place
from ptengine.data.checks import check_masks
from ptengine.data.encoding import (
    EncodedRow,
    EncodedSplit,
    check_max_tokens,
    class_ids,
    encode_texts,
    plain_columns,
)
from ptengine.data.tasks import VerbalizedTask
from ptengine.data.verbalizers import BoundVerbalizer
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MaskedClassificationTask"]


@dataclass(frozen=True)
class MaskedClassificationTask(VerbalizedTask):
    """A masked language model fills the template's blank with the label's word: ``"{text} It was {mask}."``.

    Pattern and verbaliser of Schick and Schuetze (2021, arXiv 2001.07676); virtual tokens between the words, as in
    ``"{prompt:10} {text} It was {mask}. {prompt:5}"``, of Liu et al. (2021, arXiv 2103.10385). Every word is one token,
    predicted at the mask's own position; a label's score is the log-sum-exp over its words.

    The tokenizer's special tokens stand around the template, virtual tokens that it places included:
    [CLS] template [SEP]. A prompt whose template names no place stands before [CLS]. The mask is written as the
    tokenizer's mask token into the text, so that blanks around it are treated as the model knows them. For how a text
    is cut see `ptengine.data.encoding.encode_texts`; the mask stays.

    Raises:
        InputError: a template without exactly one ``{mask}``, or one that holds the label's column.
    """

    kind: ClassVar[str] = "masked_classification"
    backbone_kind: ClassVar[str] = "encoder"
    auto_class: ClassVar[str | None] = "AutoModelForMaskedLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masks(self.template, 1, "which the label's word fills in")

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundVerbalizer:
        """The verbaliser in tokens.

        Raises:
            InputError: as `Verbalizer.bind`; also a word of several tokens, or a tokenizer without a mask token.
        """
        if tokenizer.mask_token is None:
            raise InputError(
                f"expected a tokenizer with a mask token, got {type(tokenizer).__name__} without one: is it that of a "
                "masked language model?"
            )
        bound = self.verbalizer.bind(tokenizer)
        for words, texts in zip(bound.token_ids, self.verbalizer.words.values(), strict=True):
            for tokens, text in zip(words, texts, strict=True):
                if len(tokens) > 1:
                    raise InputError(f"expected words of one token, which one mask can hold, got {text!r}: {tokens}")
        return bound

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        truncation: bool = False,
        source_name: str = "data",
    ) -> EncodedSplit:
        """See `Task.encode`. The label stands at the mask: the first word of the row's label."""
        check_max_tokens(max_tokens)
        bound = self.bind(tokenizer)
        values = plain_columns(dataset, self.columns, source_name)
        ids = class_ids(dataset, values[self.label_column], self.label_column, self.labels, source_name)
        texts = encode_texts(
            self.template,
            values,
            tokenizer,
            reserved=[0] * len(ids),
            max_tokens=max_tokens,
            truncation=truncation,
            source_name=source_name,
            enclosed=True,
        )
        mask = tokenizer.mask_token_id
        rows = []
        for index, (tokens, class_id, virtual_at) in enumerate(zip(texts.tokens, ids, texts.virtual_at, strict=True)):
            if tokens.count(mask) != 1:
                raise InputError(
                    f"{place(source_name, index)}: expected text without the mask token {tokenizer.mask_token!r}, "
                    f"got {tokens.count(mask) - 1} besides the template's"
                )
            word = bound.token_ids[class_id][0][0]
            rows.append(
                EncodedRow(
                    input_ids=tokens,
                    labels=[word if token == mask else IGNORE_INDEX for token in tokens],
                    index=index,
                    prompt_length=len(tokens),
                    class_id=class_id,
                    virtual_at=virtual_at,
                )
            )
        return EncodedSplit(rows, texts.truncated)
