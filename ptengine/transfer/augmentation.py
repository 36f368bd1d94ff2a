"""Changed copies of texts that keep their labels: words left out or swapped, by a seed.

At low rates a label seldom changes (Wei and Zou 2019, arXiv 1901.11196, section 4), and words that turn a statement
round are neither left out nor moved. Knows rows of text; no tokenizer, no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.transfer.cleaning import text_key
from ptengine.transfer.words import CJK

__all__ = ["Augmentation", "AugmentationReport", "Augmented", "augment", "changed_text"]

_PIECES = re.compile(rf"\s+|[{CJK}]|[^\s{CJK}]+")
_TURNING = frozenset("不没沒无無非别別未勿莫否")
_TURNING_WORDS = frozenset(
    ["no", "not", "never", "none", "nothing", "nor", "neither", "without", "hardly", "barely", "cannot", "but", "less"]
)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a text; a word is what stands between blanks, or one Chinese, Japanese or Korean character;
    punctuation alone is none and stays.

    Attributes:
        copies: changed copies of every row, at least 1.
        delete: probability that a word is left out, in [0, 1).
        swap: probability that a word that has not moved changes places with the next, in [0, 1).
        seed: of what is drawn.
    """

    copies: int = 1
    delete: float = 0.1
    swap: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("copies", 1), ("seed", 0)):
            check_whole(f"{name} of an augmentation", getattr(self, name), least)
        for name in ("delete", "swap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError(f"expected {name} of an augmentation, a number in [0, 1), got {value!r}")
        if self.delete == self.swap == 0:
            raise InputError("expected delete or swap of an augmentation above 0, got 0 for both")


@dataclass(frozen=True)
class AugmentationReport:
    """Attributes: `rows` that came, changed copies that were `made`, copies that were `dropped` because no change was
    drawn or the text is there already, and the `settings`."""

    rows: int
    made: int
    dropped: int
    settings: Augmentation

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Augmented:
    """Attributes: `rows`, changed copies only, and for each the position of the row it is a copy of, its `origins`;
    the `report`."""

    rows: list[dict[str, Any]]
    origins: list[int]
    report: AugmentationReport


def augment(
    rows: Sequence[Mapping[str, Any]],
    text_columns: Sequence[str],
    settings: Augmentation,
    apart_from: Sequence[Mapping[str, Any]] = (),
) -> Augmented:
    """Changed copies of `rows`, all other columns as they are.

    A copy whose texts equal those of any row, of an earlier copy or of `apart_from` (as `ptengine.transfer.cleaning`
    compares duplicates) is dropped. The copies of a row depend on the seed, its position and its text alone.

    Raises:
        InputError: no text columns, or a row without one of them.
    """
    if not text_columns:
        raise InputError("expected at least one text column to augment, got none")
    for index, row in enumerate(rows):
        for column in text_columns:
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"row {index}: expected a text in column {column!r} to augment, got {row.get(column)!r}"
                )
    taken = {text_key(row, text_columns) for row in [*rows, *apart_from]}
    made: list[dict[str, Any]] = []
    origins: list[int] = []
    for index, row in enumerate(rows):
        draw = random.Random(f"{settings.seed} {index} {text_key(row, text_columns)}")
        for _ in range(settings.copies):
            copy = {**row, **{column: changed_text(row[column], settings, draw) for column in text_columns}}
            key = text_key(copy, text_columns)
            if key in taken:
                continue
            taken.add(key)
            made.append(copy)
            origins.append(index)
    dropped = len(rows) * settings.copies - len(made)
    return Augmented(made, origins, AugmentationReport(len(rows), len(made), dropped, settings))


def changed_text(text: str, settings: Augmentation, draw: random.Random) -> str:
    """`text` with words left out and neighbours swapped; at least one word stays, and those that negate as they are."""
    pieces = _PIECES.findall(text)
    words = [i for i, piece in enumerate(pieces) if any(map(str.isalnum, piece))]
    free = {i for i in words if not _turns(pieces[i])}
    moved = -1
    for one, other in pairwise(words):
        if one != moved and one in free and other in free and draw.random() < settings.swap:
            pieces[one], pieces[other], moved = pieces[other], pieces[one], other
    gone = {i for i in sorted(free) if draw.random() < settings.delete}
    if len(gone) == len(words) and words:
        gone.discard(draw.choice(words))
    kept = "".join(piece for i, piece in enumerate(pieces) if i not in gone)
    return re.sub(r"(\s)\s+", r"\1", kept).strip()


def _turns(piece: str) -> bool:
    word = piece.strip(".,;:!?\"'()").lower()
    return word in _TURNING_WORDS or word.endswith(("n't", "n’t")) or piece in _TURNING
