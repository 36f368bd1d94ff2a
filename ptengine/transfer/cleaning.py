"""Raw rows to rows one can train on, with a report of every row that was dropped or changed and why.

The steps, in order: keep the named columns; normalise the text; drop rows with a missing value; drop or cut texts that
are too long; drop duplicates, and texts that occur with several labels; drop rows that also stand in rows given to
keep apart (a test set); balance the classes. Knows rows of values; no tokenizer, no model.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from ptengine.checks import check_whole
from ptengine.data import check_columns, load_rows, named_rows
from ptengine.data.cells import described, is_null, label_name, place, text_value
from ptengine.data.sources import name_of
from ptengine.errors import InputError
from ptengine.training.preparation import DataSource

__all__ = ["Cleaned", "Cleaning", "CleaningReport", "clean", "text_key"]

Row = dict[str, Any]
SHOWN = 20
NOT_DRAWN = "not drawn, to balance or limit the labels"

_INVISIBLE = "\u200b\ufeff\u00ad"  # joiners stay: scripts and emoji need them


@dataclass(frozen=True)
class Cleaning:
    """What is done to the rows.

    Attributes:
        normalization: ``"NFC"`` (one way to write each letter; changes nothing one can see), ``"NFKC"`` (also
            full-width letters and digits, ligatures and the like to their plain forms: common in Chinese and Japanese
            text), or ``"none"``. With the first two, control characters and invisible spaces go and white space is
            collapsed to single blanks, line breaks excepted.
        max_characters: longest text column; None for no cap.
        too_long: ``"drop"`` such rows, or ``"cut"`` the text.
        balance: ``"none"``, or ``"downsample"``: as many rows of every label as of the rarest.
        per_label: at most this many rows of every label, drawn by `seed`; None for all.
        seed: of what is drawn.
    """

    normalization: str = "NFC"
    max_characters: int | None = None
    too_long: str = "drop"
    balance: str = "none"
    per_label: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "normalization": ("NFC", "NFKC", "none"),
            "too_long": ("drop", "cut"),
            "balance": ("none", "downsample"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"expected {name}, one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("max_characters", "per_label"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.too_long == "cut" and self.max_characters is None:
            raise InputError("expected max_characters with too_long='cut', got None")
        check_whole("seed", self.seed, 0)


@dataclass(frozen=True)
class CleaningReport:
    """What happened to the rows; row numbers are those of the source, from 0, at most twenty of each kind.

    Attributes:
        source: what the rows are called.
        rows: how many came.
        kept: how many are left.
        dropped: reason to how many rows it cost.
        examples: reason to the numbers of the first of them.
        normalized: rows whose text the normalisation changed.
        cut: rows whose text was cut.
        labels_before, labels_after: label to rows, before anything and at the end; empty without labels.
        longest: characters of the longest text kept, over all text columns.
    """

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    examples: Mapping[str, Sequence[int]]
    normalized: int
    cut: int
    labels_before: Mapping[str, int]
    labels_after: Mapping[str, int]
    longest: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.source}: {self.kept} of {self.rows} rows kept"]
        for reason, count in self.dropped.items():
            rows = ", ".join(str(row) for row in self.examples[reason])
            where = "" if reason == NOT_DRAWN else f" (rows {rows}{', ...' if count > SHOWN else ''})"
            lines.append(f"  {count} dropped: {reason}{where}")
        if self.normalized:
            lines.append(f"  {self.normalized} normalised")
        if self.cut:
            lines.append(f"  {self.cut} cut")
        if self.labels_after:
            lines.append("  labels: " + ", ".join(f"{name} {count}" for name, count in self.labels_after.items()))
        return lines


@dataclass(frozen=True)
class Cleaned:
    """Attributes: `rows`, with the named columns only, in the source's order; the `numbers` they have there, from 0;
    and the `report`."""

    rows: list[Row]
    numbers: list[int]
    report: CleaningReport

    @property
    def places(self) -> list[str]:
        """How errors name each row, so that it is found in the source."""
        return [place(self.report.source, number) for number in self.numbers]


def clean(
    data: DataSource,
    *,
    text_columns: Sequence[str],
    label_column: str | None = None,
    settings: Cleaning | None = None,
    apart_from: Sequence[Mapping[str, Any]] = (),
    apart_columns: Sequence[str] | None = None,
    name: str = "data",
) -> Cleaned:
    """Clean rows by `settings`.

    Args:
        data: csv, json, jsonl or parquet file, a list of dicts or a `datasets.Dataset`.
        text_columns: the columns a row must have text in.
        label_column: the column of the label, for classification; a row without one is dropped.
        settings: None means the defaults of `Cleaning`.
        apart_from: rows that must not be among those kept, such as the test set's; compared as duplicates are, by their
            texts without regard to case and white space, but in any order of the columns. Where one side has fewer
            columns, all its texts among those of the other make the two the same.
        apart_columns: the text columns of `apart_from`; None where they are called `text_columns`, too.
        name: what the report and errors call data that has no file name.

    Raises:
        InputError: a column is not there, a text or label of another type, no row is left, balancing without labels,
            or as `ptengine.data.load_rows`.
    """
    settings = Cleaning() if settings is None else settings
    if not text_columns:
        raise InputError("expected at least one text column to clean, got none")
    if label_column is None and (settings.balance != "none" or settings.per_label is not None):
        raise InputError("expected a label column to balance classes or draw rows per label, got None")
    dataset = load_rows(data, name=name)
    source = name_of(data, name)
    columns = [*dict.fromkeys([*text_columns, *([] if label_column is None else [label_column])])]
    check_columns(dataset, columns, source)
    raw: list[Row] = named_rows(dataset.select_columns(columns))
    work = _Work(settings, source, text_columns, label_column)
    kept = work.complete(raw)
    kept = work.capped(kept)
    kept = work.distinct(kept)
    kept = work.apart(kept, apart_from, text_columns if apart_columns is None else apart_columns)
    kept = work.balanced(kept)
    if not kept:
        why = ", ".join(f"{reason} ({count})" for reason, count in work.dropped.items())
        raise InputError(f"{source}: expected rows that are left after cleaning, got none of {len(raw)}: {why}")
    report = CleaningReport(
        source=source,
        rows=len(raw),
        kept=len(kept),
        dropped=dict(work.dropped),
        examples={reason: rows[:SHOWN] for reason, rows in work.examples.items()},
        normalized=work.normalized,
        cut=work.cut,
        labels_before=_counts([label_name(row[label_column]) for row in raw] if label_column else []),
        labels_after=_counts([row[label_column] for _, row in kept] if label_column else []),
        longest=max(len(row[column]) for _, row in kept for column in text_columns),
    )
    return Cleaned([row for _, row in kept], [number for number, _ in kept], report)


def text_key(row: Mapping[str, Any], text_columns: Sequence[str]) -> tuple[str, ...]:
    """What makes two rows duplicates: their texts, compatibility-normalised, without case and white space."""
    return tuple(
        "".join(unicodedata.normalize("NFKC", str(row.get(column, ""))).casefold().split()) for column in text_columns
    )


def _parts(row: Mapping[str, Any], columns: Sequence[str], count: int) -> Iterator[tuple[str, ...]]:
    """Every `count` of a row's texts, as `text_key` has them, without regard to their order."""
    return combinations(sorted(text_key(row, columns)), count)


class _Work:
    """The steps, each from numbered rows to those it keeps."""

    def __init__(self, settings: Cleaning, source: str, texts: Sequence[str], label: str | None) -> None:
        self.settings, self.source, self.texts, self.label = settings, source, texts, label
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[int]] = {}
        self.normalized = self.cut = 0

    def drop(self, index: int, reason: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, []).append(index)

    def complete(self, rows: Sequence[Row]) -> list[tuple[int, Row]]:
        kept = []
        for index, row in enumerate(rows):
            clean_row: Row = {}
            for column in self.texts:
                value = row[column]
                text = "" if is_null(value) else text_value(value, column, self.source, index)
                clean_row[column] = normalized(text, self.settings.normalization)
            if any(not text.strip() for text in clean_row.values()):
                self.drop(index, "a text is missing")
                continue
            if self.label is not None:
                label = "" if is_null(row[self.label]) else label_name(row[self.label])
                if label is None:
                    raise InputError(
                        f"{place(self.source, index)}: expected a label as text or a whole number in column "
                        f"{self.label!r}, got {described(row[self.label])}"
                    )
                if not label.strip():
                    self.drop(index, "the label is missing")
                    continue
                clean_row[self.label] = label.strip()
            self.normalized += any(clean_row[column] != str(row[column]) for column in self.texts)
            kept.append((index, clean_row))
        return kept

    def capped(self, rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Row]]:
        most = self.settings.max_characters
        kept = []
        for index, row in rows:
            long = [column for column in self.texts if most is not None and len(row[column]) > most]
            if long and self.settings.too_long == "drop":
                self.drop(index, f"a text has more than {most} characters")
                continue
            row = row | {column: row[column][:most] for column in long}
            if any(not row[column].strip() for column in long):
                self.drop(index, f"a text is blank in its first {most} characters")
                continue
            self.cut += bool(long)
            kept.append((index, row))
        return kept

    def distinct(self, rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Row]]:
        labels: dict[tuple[str, ...], set[str]] = {}
        for _, row in rows:
            labels.setdefault(text_key(row, self.texts), set()).add(row[self.label] if self.label else "")
        seen: set[tuple[str, ...]] = set()
        kept = []
        for index, row in rows:
            key = text_key(row, self.texts)
            if len(labels[key]) > 1:
                self.drop(index, "the text occurs with several labels")
            elif key in seen:
                self.drop(index, "a duplicate of an earlier row")
            else:
                seen.add(key)
                kept.append((index, row))
        return kept

    def apart(
        self, rows: Sequence[tuple[int, Row]], others: Sequence[Mapping[str, Any]], columns: Sequence[str]
    ) -> list[tuple[int, Row]]:
        fewest = min(len(self.texts), len(columns))
        taken = {part for other in others for part in _parts(other, columns, fewest)}
        kept = []
        for index, row in rows:
            if not taken.isdisjoint(_parts(row, self.texts, fewest)):
                self.drop(index, "the text is also in the rows to keep apart")
            else:
                kept.append((index, row))
        return kept

    def balanced(self, rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Row]]:
        if self.label is None or not rows:
            return list(rows)
        most = self.settings.per_label
        counts = Counter(row[self.label] for _, row in rows)
        if self.settings.balance == "downsample":
            most = min(counts.values()) if most is None else min(most, *counts.values())
        if most is None:
            return list(rows)
        order = list(range(len(rows)))
        random.Random(self.settings.seed).shuffle(order)
        taken: Counter[str] = Counter()
        chosen = set()
        for position in order:
            label = rows[position][1][self.label]
            if taken[label] < most:
                taken[label] += 1
                chosen.add(position)
        for position, (index, _) in enumerate(rows):
            if position not in chosen:
                self.drop(index, NOT_DRAWN)
        return [row for position, row in enumerate(rows) if position in chosen]


def normalized(text: str, form: str) -> str:
    """`text` in a Unicode normal form, without control characters and invisible spaces, blanks collapsed."""
    if form == "none":
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    plain = "".join(c for c in text if c.isspace() or (unicodedata.category(c) != "Cc" and c not in _INVISIBLE))
    # Only then: a letter and its accent may have stood apart.
    plain = unicodedata.normalize(form, plain)  # type: ignore[arg-type]
    return "\n".join(" ".join(line.split()) for line in plain.split("\n")).strip()


def _counts(labels: Sequence[str | None]) -> dict[str, int]:
    return {str(name): count for name, count in sorted(Counter(labels).items(), key=lambda item: str(item[0]))}
