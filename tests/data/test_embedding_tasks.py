"""Embedding tasks: both texts as the stock tokenizer writes them, and which pairs match."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from ptengine.data import EmbeddingTask
from ptengine.data.serialization import task_from_json, task_to_json
from ptengine.errors import InputError

PLAIN = EmbeddingTask()
LABELLED = EmbeddingTask(label_column="label", positive_label="match")
DATA = Dataset.from_dict(
    {"text": ["a film", "no plot"], "text_pair": ["one film", "a plot at all"], "label": ["match", "no match"]}
)


def test_both_texts_are_the_stock_tokenizers(bert: Any) -> None:
    split = PLAIN.encode(DATA, bert, max_tokens=20)
    assert [row.input_ids for row in split] == bert(DATA["text"][:])["input_ids"]
    assert [row.pair_ids for row in split] == bert(DATA["text_pair"][:])["input_ids"]
    assert [row.class_id for row in split] == [1, 1]
    assert [row.class_id for row in LABELLED.encode(DATA, bert, max_tokens=20)] == [1, 0]


def test_either_text_may_be_cut(bert: Any) -> None:
    split = PLAIN.encode(DATA, bert, max_tokens=5, truncation=True)
    assert split.truncated == 1
    assert split[1].pair_ids == bert("a plot at")["input_ids"]
    with pytest.raises(InputError, match=r"row 1 .*at most 5 tokens .*got 6 \(of column 'text_pair'"):
        PLAIN.encode(DATA, bert, max_tokens=5)


def test_json_round_trip() -> None:
    for task in (PLAIN, LABELLED):
        assert task_from_json(json.loads(json.dumps(task_to_json(task)))) == task


def test_bad_inputs(bert: Any) -> None:
    for options, message in (
        ({"label_column": "label"}, "both or neither"),
        ({"positive_label": "match"}, "both or neither"),
        ({"label_column": "text", "positive_label": "x"}, "columns apart"),
        ({"text_pair_column": "text"}, "columns apart"),
        ({"temperature": 0}, "temperature, a number above 0"),
        ({"temperature": float("nan")}, "temperature, a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            EmbeddingTask(**options)  # type: ignore[arg-type]
    other = EmbeddingTask(label_column="label", positive_label="same")
    with pytest.raises(InputError, match=r"dev.jsonl: expected the label 'same' .*got none"):
        other.encode(DATA, bert, max_tokens=20, source_name="dev.jsonl")
    with pytest.raises(InputError, match="above the 2 special tokens"):
        PLAIN.encode(DATA, bert, max_tokens=2)


def test_a_class_that_says_no_label_counted_as_pairs_that_do_not_match(bert: Any) -> None:
    """-1 in a `ClassLabel` column: the other tasks refuse it."""
    labels = ClassLabel(names=["match", "other"])
    features = Features({"text": Value("string"), "text_pair": Value("string"), "label": labels})
    dataset = Dataset.from_dict({"text": ["a", "b"], "text_pair": ["a", "c"], "label": [0, -1]}, features=features)
    task = EmbeddingTask(label_column="label", positive_label="match")
    with pytest.raises(InputError, match=r"row 1 .*expected a label in column 'label', got an empty value"):
        task.encode(dataset, bert, max_tokens=20)
