"""Cleaning: each defect is dropped for its own reason, and what is left is what was good."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset

from ptengine.errors import InputError
from ptengine.transfer.cleaning import Cleaning, clean, normalized


def cleaned(rows: list[dict[str, Any]], **more: Any) -> Any:
    settings = Cleaning(**{name: more.pop(name) for name in list(more) if name in Cleaning.__dataclass_fields__})
    return clean(rows, text_columns=["text"], label_column="label", settings=settings, **more)


GOOD = {"text": "fine", "label": "pos"}


def test_every_defect_has_its_reason_and_its_rows() -> None:
    rows = [
        GOOD,
        {"text": None, "label": "pos"},
        {"text": "  ", "label": "pos"},
        {"text": "poor", "label": None},
        {"text": " Fine ", "label": "pos"},
        {"text": "so so", "label": "pos"},
        {"text": "SO  SO", "label": "neg"},
        {"text": "x" * 30, "label": "neg"},
        {"text": "dull", "label": "neg", "other": 3},
        {"text": "in the test", "label": "neg"},
    ]
    found = cleaned(rows, max_characters=20, apart_from=[{"text": "In The Test"}])
    assert found.rows == [GOOD, {"text": "dull", "label": "neg"}]
    report = found.report
    assert (report.rows, report.kept) == (10, 2)
    assert report.examples == {
        "a text is missing": [1, 2],
        "the label is missing": [3],
        "a text has more than 20 characters": [7],
        "a duplicate of an earlier row": [4],
        "the text occurs with several labels": [5, 6],
        "the text is also in the rows to keep apart": [9],
    }
    assert report.dropped == {reason: len(found) for reason, found in report.examples.items()}
    assert report.labels_before == {"None": 1, "neg": 4, "pos": 5}
    assert report.labels_after == {"neg": 1, "pos": 1}
    assert report.longest == 4
    json.dumps(report.to_json())
    assert report.lines()[0] == "data: 2 of 10 rows kept"


def test_normal_forms() -> None:
    decomposed, full = "cafe\u0301", "ＡＢＣ１２３，ﬁne"
    assert normalized(decomposed, "NFC") == "café"
    assert normalized(full, "NFC") == full
    assert normalized(full, "NFKC") == "ABC123,fine"
    assert normalized("a\u200b b\x07\t c\r\nd  e", "NFC") == "a b c\nd e"
    assert normalized(" a\u200b ", "none") == " a\u200b "
    found = cleaned([{"text": "质量　很好！", "label": "正面"}, GOOD], normalization="NFKC")
    assert found.rows[0] == {"text": "质量 很好!", "label": "正面"}
    assert found.report.normalized == 1


def test_duplicates_are_seen_through_case_blanks_and_width() -> None:
    rows = [{"text": text, "label": "a"} for text in ("Ｇood 1", "good１", "GOOD  1")]
    assert cleaned(rows, normalization="none").rows == rows[:1]


def test_long_texts_can_be_cut() -> None:
    found = cleaned(
        [{"text": "很好很好", "label": "a"}, {"text": "好", "label": "a"}], max_characters=2, too_long="cut"
    )
    assert [row["text"] for row in found.rows] == ["很好", "好"]
    assert (found.report.cut, found.report.dropped) == (1, {})
    blank = [{"text": "   good", "label": "a"}, {"text": "good", "label": "a"}]
    found = cleaned(blank, normalization="none", max_characters=2, too_long="cut")
    assert [row["text"] for row in found.rows] == ["go"]
    assert (found.report.cut, found.report.dropped) == (1, {"a text is blank in its first 2 characters": 1})


def test_balance_and_draws_are_seeded() -> None:
    rows = [{"text": f"t{i}", "label": "a" if i % 3 else "b"} for i in range(30)]
    found = cleaned(rows, balance="downsample")
    assert Counter(row["label"] for row in found.rows) == {"a": 10, "b": 10}
    few = cleaned(rows, per_label=4, seed=1)
    assert Counter(row["label"] for row in few.rows) == {"a": 4, "b": 4}
    assert few.rows == cleaned(rows, per_label=4, seed=1).rows
    assert few.rows != cleaned(rows, per_label=4, seed=2).rows
    numbers = [int(row["text"][1:]) for row in few.rows]
    assert numbers == sorted(numbers)


def test_a_csv_file_of_several_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,context,y\nwho,"in, out",1\nwho,,1\nwhat,"in, out",0\n', encoding="utf-8")
    found = clean(path, text_columns=["q", "context"], label_column="y")
    assert found.rows == [{"q": "who", "context": "in, out", "y": "1"}, {"q": "what", "context": "in, out", "y": "0"}]
    assert found.report.source == str(path)
    pairs = clean([{"source": "a", "target": "b"}] * 2, text_columns=["source", "target"])
    assert pairs.report.labels_after == {}
    assert pairs.report.kept == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="'text'"):
        cleaned([{"tekst": "a", "label": "b"}])
    with pytest.raises(InputError, match=r"none of 1: a text is missing \(1\)$"):  # it said Counter({...})
        cleaned([{"text": "", "label": "b"}])
    with pytest.raises(InputError, match="column 'text'"):
        cleaned([{"text": ["a"], "label": "b"}])
    with pytest.raises(InputError, match="label column"):
        clean([GOOD], text_columns=["text"], settings=Cleaning(balance="downsample"))
    with pytest.raises(InputError, match="at least one text column"):
        clean([GOOD], text_columns=[])
    with pytest.raises(InputError, match="expected max_characters with too_long='cut'"):  # nothing was cut
        Cleaning(too_long="cut")
    for bad in ({"normalization": "NFD"}, {"too_long": "keep"}, {"per_label": 0}, {"balance": "up"}, {"seed": -1}):
        with pytest.raises(InputError, match="expected"):
            Cleaning(**bad)  # type: ignore[arg-type]


def test_classes_of_a_dataset_have_their_names() -> None:
    """They became the numbers by which datasets stores them."""
    rows = Dataset.from_list([{"text": "a b", "label": 0}, {"text": "c d", "label": 1}])
    named = rows.cast_column("label", ClassLabel(names=["spam", "ham"]))
    found = clean(named, text_columns=["text"], label_column="label").rows
    assert [row["label"] for row in found] == ["spam", "ham"]


def test_rows_were_kept_apart_by_the_names_of_columns_only() -> None:
    """Texts of other columns, in another order, or in more or fewer of them are the same texts."""
    rows = [{"review": text, "about": about, "label": "pos"} for text, about in (("fine", "film"), ("dull", "book"))]

    def left(others: list[dict[str, str]], columns: list[str]) -> list[str]:
        found = clean(
            rows, text_columns=["review", "about"], label_column="label", apart_from=others, apart_columns=columns
        )
        return [row["review"] for row in found.rows]

    assert left([{"a": "Film", "b": "FINE "}], ["a", "b"]) == ["dull"]
    assert left([{"text": "fine"}], ["text"]) == ["dull"]
    assert left([{"a": "no", "b": "film", "c": "fine"}], ["a", "b", "c"]) == ["dull"]
    assert left([{"a": "fine", "b": "book"}], ["a", "b"]) == ["fine", "dull"]


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x85", "\x1f"])
def test_words_around_a_control_character_that_is_white_space_were_joined(mark: str) -> None:
    assert normalized(f"good{mark}bad", "NFC") == "good bad"


def test_an_accent_behind_an_invisible_character_stayed_apart() -> None:
    assert normalized("cafe\u200b\u0301", "NFC") == "caf\u00e9"


def test_a_label_of_another_type_was_called_missing() -> None:
    """As pandas writes whole numbers beside a missing one: all rows went, and nothing said why."""
    with pytest.raises(
        InputError, match=r"row 1 .*a label as text or a whole number in column 'label', got float 1\.0"
    ):
        cleaned([{"text": "a", "label": float("nan")}, {"text": "b", "label": 1.0}])
