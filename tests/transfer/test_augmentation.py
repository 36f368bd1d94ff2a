"""Changed copies of texts: seeded, negations as they are, nothing that is there already."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

import pytest

from ptengine.errors import InputError
from ptengine.transfer import Augmentation, augment
from ptengine.transfer.augmentation import changed_text

ROWS = [
    {"text": "the film was not good but the book was a very lovely one to read", "label": "pos", "n": 1},
    {"text": "手机不好用，电池也没有电", "label": "neg", "n": 2},
]


def test_copies_are_seeded_and_keep_label_and_other_columns() -> None:
    found = augment(ROWS, ["text"], Augmentation(copies=4, seed=3))
    assert found == augment(ROWS, ["text"], Augmentation(copies=4, seed=3))
    assert found.rows != augment(ROWS, ["text"], Augmentation(copies=4, seed=4)).rows
    # Each row's copies are its own: they do not depend on what other rows drew.
    assert found.rows[: found.origins.count(0)] == augment(ROWS[:1], ["text"], Augmentation(copies=4, seed=3)).rows
    texts = [row["text"] for row in [*ROWS, *found.rows]]
    assert len(set(texts)) == len(texts)
    for row, origin in zip(found.rows, found.origins, strict=True):
        assert {**row, "text": ""} == {**ROWS[origin], "text": ""}
        assert not set(row["text"].split()) - set(ROWS[0]["text"].split()) or origin == 1
    assert found.report.made == len(found.rows)
    assert found.report.made + found.report.dropped == 8


@pytest.mark.parametrize("settings", [Augmentation(delete=0.5, swap=0.0), Augmentation(delete=0.9, swap=0.9)])
def test_words_that_turn_a_statement_stay_where_they_are(settings: Augmentation) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        english = changed_text(ROWS[0]["text"], settings, draw).split()
        assert [word for word in english if word in ("not", "but")] == ["not", "but"]
        chinese = changed_text(ROWS[1]["text"], settings, draw)
        assert [c for c in chinese if c in "不没"] == ["不", "没"]
    assert changed_text("don't", settings, random.Random(0)) == "don't"


def test_rates_are_those_that_were_asked_for() -> None:
    words = [f"w{i}" for i in range(4000)]
    text = " ".join(words)
    left = changed_text(text, Augmentation(delete=0.25, swap=0.0), random.Random(0)).split()
    # A binomial share of 4000 has a standard deviation of 0.7 points.
    assert 1 - len(left) / 4000 == pytest.approx(0.25, abs=0.03)
    assert left == [word for word in words if word in set(left)]
    moved = changed_text(text, Augmentation(delete=0.0, swap=0.25), random.Random(0)).split()
    assert sorted(moved) == sorted(words)
    swaps = sum(one == "w" + str(int(other[1:]) + 1) for one, other in pairwise(moved))
    # A word moves once: of every 1 + 0.25 pairs that are asked, 0.25 change places.
    assert swaps / 4000 == pytest.approx(0.2, abs=0.03)


def test_a_word_stays_and_nothing_that_is_there_is_made_again() -> None:
    only = augment([{"text": "fine"}], ["text"], Augmentation(copies=5, delete=0.99))
    assert (only.rows, only.report.dropped) == ([], 5)
    made = augment([{"text": "fine film"}], ["text"], Augmentation(copies=20, delete=0.6, swap=0.5))
    assert {row["text"] for row in made.rows} <= {"fine", "film", "film fine"}
    assert len(made.rows) == len({row["text"] for row in made.rows}) > 0
    apart = augment([{"text": "fine film"}], ["text"], Augmentation(copies=20, delete=0.6), [{"text": "FILM"}])
    assert "film" not in {row["text"] for row in apart.rows}


@pytest.mark.parametrize(
    "bad",
    [{"copies": 0}, {"delete": 1.0}, {"swap": -0.1}, {"seed": -1}, {"delete": 0, "swap": 0}, {"copies": True}],
)
def test_settings_are_checked_when_made(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="of an augmentation"):
        Augmentation(**bad)


def test_rows_without_text_are_refused() -> None:
    with pytest.raises(InputError, match="row 1: expected a text in column 'text'"):
        augment([{"text": "a b"}, {"text": None}], ["text"], Augmentation())
    with pytest.raises(InputError, match="at least one text column"):
        augment(ROWS, [], Augmentation())


def test_punctuation_stays_where_it_is() -> None:
    """Full stops were left out and swapped with the characters beside them."""
    draw = random.Random(0)
    for text in ("味道很好。但是服务一般，环境不错。", "fine food , slow waiters ."):
        for _ in range(50):
            changed = changed_text(text, Augmentation(delete=0.0, swap=0.9), draw)
            assert [(i, x) for i, x in enumerate(changed) if x in "。，"] == [
                (i, x) for i, x in enumerate(text) if x in "。，"
            ]
            assert re.sub(r"\w", "", changed_text(text, Augmentation(delete=0.5, swap=0.0), draw)).replace(" ", "") == (
                re.sub(r"\w", "", text).replace(" ", "")
            )
