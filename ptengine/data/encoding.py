"""Rows of tokens: templated text through a tokenizer in batches, and cut to length where that is allowed.

Knows templates and tokenizers; what a row is for is the tasks' matter, what a model is nobody's here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ptengine.checks import check_whole
from ptengine.data.cells import described, label_name, listed, place
from ptengine.data.sources import check_columns, class_name
from ptengine.data.templates import Template
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "AnswerWindow",
    "EncodedRow",
    "EncodedSplit",
    "EncodedTexts",
    "check_max_tokens",
    "class_ids",
    "closed_targets",
    "encode_texts",
    "plain_columns",
    "special_tokens",
    "token_lists",
    "too_long",
]


@dataclass(frozen=True, slots=True)
class AnswerWindow:
    """What a row of T tokens has of a text that holds the answer to a question.

    Attributes:
        context: the whole text.
        offsets: of every token the characters of the text that it covers, begin and end; None for all others.
        answer: the first and the last token of the answer; (0, 0) where the window has not all of it.
    """

    context: str
    offsets: list[tuple[int, int] | None]
    answer: tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row of T tokens.

    Attributes:
        input_ids: T token ids.
        labels: T token ids (or class ids), each standing AT its own position as in transformers; -100 where there is no
            label.
        index: the row's number in its data set, from 0.
        prompt_length: tokens before the target, or, for an encoder-decoder, of the source, behind which the target is;
            T for a row without a target.
        class_id: position of the row's label among the task's labels, or None.
        token_type_ids: T segment ids, or None where the tokenizer has none.
        references: all acceptable targets of a generation row, or answers, as text; empty for other tasks.
        virtual_at: before which of the T tokens each virtual token of the prompt stands, T for behind the last; None
            where all stand before the row.
        window: of a row of question answering.
        pair_ids: token ids of the text that a row of an embedding task is paired with.
    """

    input_ids: list[int]
    labels: list[int]
    index: int
    prompt_length: int
    class_id: int | None = None
    token_type_ids: list[int] | None = None
    references: tuple[str, ...] = ()
    virtual_at: list[int] | None = None
    window: AnswerWindow | None = None
    pair_ids: list[int] | None = None


@dataclass(frozen=True)
class EncodedTexts:
    """Templated texts in tokens.

    Attributes:
        tokens: per row.
        virtual_at: per row as in `EncodedRow`.
        truncated: how many rows were cut.
    """

    tokens: list[list[int]]
    virtual_at: list[list[int] | None]
    truncated: int


@dataclass(frozen=True)
class EncodedSplit:
    """All rows of one data set, in its order.

    Attributes:
        rows: one `EncodedRow` per row of the data.
        truncated: how many of them were cut to fit.
    """

    rows: list[EncodedRow]
    truncated: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index]

    def __iter__(self) -> Iterator[EncodedRow]:
        return iter(self.rows)


def check_max_tokens(max_tokens: int, special: int = 0) -> None:
    """Refuse a room that is no whole number, or that a text's `special` tokens fill."""
    check_whole("max_tokens (the model's context minus the prompt)", max_tokens)
    if special >= max_tokens:
        raise InputError(f"expected max_tokens above the {special} special tokens of every row, got {max_tokens}")


def plain_columns(dataset: Dataset, needed: Sequence[str], source_name: str) -> dict[str, list[Any]]:
    """The needed columns as lists of Python values, whatever format the data set is set to."""
    check_columns(dataset, needed, source_name)
    if dataset.num_rows == 0:
        raise InputError(f"{source_name}: expected at least one row, got an empty split")
    columns: dict[str, list[Any]] = dataset.with_format(None).select_columns(list(dict.fromkeys(needed)))[:]
    return columns


def class_ids(
    dataset: Dataset, values: Sequence[Any], column: str, labels: Sequence[str], source_name: str
) -> list[int]:
    """Labels to positions in `labels`; the whole numbers of a `datasets.ClassLabel` column stand for its names."""
    feature = dataset.features[column]
    positions = {label: position for position, label in enumerate(labels)}
    ids = []
    for index, value in enumerate(values):
        value = class_name(feature, value)
        name = label_name(value)
        if name not in positions:
            raise InputError(
                f"{place(source_name, index)}: expected one of the labels {listed(labels)} in column {column!r}, "
                f"got {described(value)}"
            )
        ids.append(positions[name])
    return ids


def closed_targets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ending: Sequence[int]) -> list[list[int]]:
    """Texts as an encoder-decoder writes them: tokenised as targets (`text_target`), special tokens included, and with
    `ending` behind those in which the tokenizer itself has put none of it."""
    encoded: list[list[int]] = tokenizer(
        text_target=list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return [target if set(ending) <= set(target) else [*target, *ending] for target in encoded]


def token_lists(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The texts' tokens, all in one call, without special tokens."""
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it of its own accord: a BOS or [CLS], an EOS or [SEP], or
    nothing.

    Raises:
        InputError: it does more to a text than that, or makes tokens of none.
    """
    probe, bare = _probe(tokenizer)
    full: list[int] = tokenizer(probe, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError(
        f"expected a tokenizer that only adds special tokens around a text, got {type(tokenizer).__name__}, which "
        f"turns {probe!r} into {full} with them and {bare} without"
    )


def _probe(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A text that has tokens of its own, and those: a letter, or a token of a vocabulary without it."""
    around = tokenizer("")["input_ids"]
    others = sorted(set(tokenizer.get_vocab().values()).difference(around))
    for text in chain("a", (str(tokenizer.decode([token])) for token in others)):
        [bare] = token_lists(tokenizer, [text])
        if bare:
            return text, bare
    raise InputError(
        f"expected a tokenizer that makes tokens of a text, got {type(tokenizer).__name__}, which makes none even of "
        "those of its vocabulary"
    )


def too_long(source_name: str, index: int, length: int, max_tokens: int, detail: str) -> InputError:
    return InputError(
        f"{place(source_name, index)}: expected at most {max_tokens} tokens (max_length, or the model's context "
        f"minus the prompt), got {length} ({detail})"
    )


def encode_texts(
    template: Template,
    columns: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    reserved: Sequence[int],
    max_tokens: int,
    truncation: bool,
    source_name: str,
    enclosed: bool = False,
    closed: bool = False,
) -> EncodedTexts:
    """Render and tokenise every row.

    A row's tokens are what the tokenizer puts in front of a text (a BOS, if it does that) and the text's own; nothing
    is added behind, so a target may follow, unless the text is `closed`. A template that begins with that BOS itself,
    as one made of a chat template may, gets no second one. Virtual tokens that open the template stand before the BOS,
    as every prompt without a place does. With `enclosed` the tokenizer's special tokens stand around the whole
    template, its virtual tokens included: [CLS] template [SEP].

    With `truncation`, a row that is too long loses the end of its longest column, and nothing else: of the template's
    placeholders, the one with most characters in that row (the first of equals) drops its last tokens, whole ones,
    until the row fits, and the row is tokenised anew. Virtual tokens and the mask are never cut.

    Args:
        columns: column name to values, all of the template's columns among them.
        reserved: per row, the tokens that will follow.
        max_tokens: of a row with its reserve; virtual tokens do not count.
        enclosed: see above.
        closed: whether a row ends with what the tokenizer puts behind a text (an EOS, if it does that); `enclosed` ones
            do.

    Raises:
        InputError: a value that is no text; a row longer than `max_tokens` with its reserve, unless cut; a row that
            does not fit even without its longest column; truncation with a tokenizer that has no offsets (a slow one).
    """
    count = len(reserved)
    mask = tokenizer.mask_token if template.num_masks else ""
    pieces = [
        template.pieces({column: columns[column][i] for column in template.columns}, i, source_name, mask)
        for i in range(count)
    ]
    leading, trailing = special_tokens(tokenizer)
    if leading and not enclosed and _begins_with(template, leading, tokenizer):
        leading = []
    if not (enclosed or closed):
        trailing = []
    special = len(leading) + len(trailing)
    segments = _segments(template)
    flat = token_lists(tokenizer, ["".join(row[segment]) for row in pieces for segment in segments])
    texts = [flat[i * len(segments) : (i + 1) * len(segments)] for i in range(count)]
    room = [max_tokens - special - taken for taken in reserved]
    over = [i for i in range(count) if sum(map(len, texts[i])) > room[i]]
    if over:
        limit = _Limit(tokenizer, special, room, reserved, max_tokens, source_name)
        if not truncation:
            raise limit.exceeded(over[0], texts[over[0]], "and truncation is off")
        _cut(template, segments, pieces, texts, over, limit)
    is_inside = template.num_virtual_tokens is not None and (enclosed or not template.is_behind_prompt)
    return EncodedTexts(
        tokens=[[*leading, *(token for segment in row for token in segment), *trailing] for row in texts],
        virtual_at=[_places(template, row, len(leading), enclosed) if is_inside else None for row in texts],
        truncated=len(over),
    )


def _begins_with(template: Template, leading: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text that opens the template begins with these tokens."""
    opening = template.parts[0].text if template.parts[0].kind == "text" else ""
    [tokens] = token_lists(tokenizer, [opening])
    return tokens[: len(leading)] == list(leading)


def _segments(template: Template) -> list[slice]:
    """The runs of the template's parts between its places of virtual tokens, one more than there are places."""
    ends = [slot for slot, part in enumerate(template.parts) if part.kind == "prompt"]
    return [slice(begin, end) for begin, end in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True)]


def _places(template: Template, segments: Sequence[list[int]], leading: int, enclosed: bool) -> list[int]:
    """Where the virtual tokens between the segments of one row stand, behind `leading` tokens or before them."""
    places: list[int] = []
    before, remaining, opening = leading if enclosed else 0, iter(segments), not enclosed
    for part in template.parts:
        if part.kind != "prompt":
            before, opening = before + (leading if opening else 0), False
            continue
        before += len(next(remaining))
        places += [before] * part.size
    return places


@dataclass(frozen=True)
class _Limit:
    """How long rows may be: `room` for each row's own text beside `special` tokens and its reserve."""

    tokenizer: PreTrainedTokenizerBase
    special: int
    room: Sequence[int]
    reserved: Sequence[int]
    max_tokens: int
    source_name: str

    def exceeded(self, index: int, segments: Sequence[list[int]], why: str) -> InputError:
        text, reserve = self.special + sum(map(len, segments)), self.reserved[index]
        detail = f"text {text} + target {reserve}, {why}" if reserve else f"text {text}, {why}"
        return too_long(self.source_name, index, text + reserve, self.max_tokens, detail)


def _cut(
    template: Template,
    segments: Sequence[slice],
    pieces: list[list[str]],
    texts: list[list[list[int]]],
    over: Sequence[int],
    limit: _Limit,
) -> None:
    """Shorten the rows `over` of `pieces` and `texts` in place, as `encode_texts` says."""
    tokenizer = limit.tokenizer
    if not tokenizer.is_fast:
        raise InputError(
            f"{limit.source_name}: expected a fast tokenizer for truncation (it says which characters a token covers), "
            f"got {type(tokenizer).__name__}"
        )
    slots = [slot for slot, part in enumerate(template.parts) if part.kind == "column"]
    longest = {i: max(slots, key=lambda slot, row=pieces[i]: len(row[slot])) for i in over}  # type: ignore[misc]
    home = {
        i: next(n for n, part in enumerate(segments) if part.stop is None or slot < part.stop)
        for i, slot in longest.items()
    }
    pending = list(over)
    while pending:
        encoded = tokenizer(
            ["".join(pieces[i][segments[home[i]]]) for i in pending],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        still = []
        for i, ids, spans in zip(pending, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            texts[i][home[i]] = ids
            excess = sum(map(len, texts[i])) - limit.room[i]
            if excess <= 0:
                continue
            slot = longest[i]
            value = pieces[i][slot]
            if not value:
                column = template.parts[slot].text
                raise limit.exceeded(i, texts[i], f"even with its column {column!r} cut away")
            begin = sum(map(len, pieces[i][segments[home[i]].start : slot]))
            # Cutting before a token that starts in the value drops at least one character: every pass gets shorter.
            starts = [start for start, _ in spans if begin <= start < begin + len(value)]
            keep = starts[-excess] - begin if excess <= len(starts) else 0
            pieces[i][slot] = value[:keep]
            still.append(i)
        pending = still
