"""Token classification: labels at first tokens, and entities judged as wholes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from ptengine.data import TokenClassificationTask, entity_metrics
from ptengine.data.serialization import task_from_json, task_to_json
from ptengine.errors import InputError

LABELS = ("O", "B-PER", "I-PER")
TASK = TokenClassificationTask(labels=LABELS)
WORDS, TAGS = ["Wolfeschlegelstein", "met", "Bob", "Smith"], ["B-PER", "O", "B-PER", "I-PER"]


def data(tokens: Any = WORDS, tags: Any = TAGS) -> Dataset:
    return Dataset.from_dict({"tokens": [tokens], "tags": [tags]})


def test_labels_stand_at_the_first_token_of_every_word(bert: Any) -> None:
    [row] = TASK.encode(data(), bert, max_tokens=30)
    assert row.input_ids == bert(WORDS, is_split_into_words=True)["input_ids"]
    assert len(row.input_ids) > 2 + len(WORDS)
    tokens = bert.convert_ids_to_tokens(row.input_ids)
    assert [(token, label) for token, label in zip(tokens, row.labels, strict=True) if label != -100] == [
        ("wolfe", 1), ("met", 0), ("bob", 1), ("smith", 2),
    ]  # fmt: skip


def test_cutting_leaves_out_the_last_words(bert: Any) -> None:
    long = data(["film"] * 9, ["O"] * 8 + ["B-PER"])
    split = TASK.encode(long, bert, max_tokens=6, truncation=True)
    assert (split.truncated, split[0].labels) == (1, [-100, 0, 0, 0, 0, -100])
    with pytest.raises(InputError, match=r"row 0 .*at most 6 tokens .*got 11"):
        TASK.encode(long, bert, max_tokens=6)


def test_a_tokenizer_that_cuts_on_the_left_left_out_the_first_words(bert: Any) -> None:
    """And the rest of a cut word had its label."""
    left = copy.copy(bert)
    left.truncation_side = "left"
    for most in range(3, 11):
        rows = [TASK.encode(data(), one, max_tokens=most, truncation=True)[0] for one in (bert, left)]
        assert rows[0] == rows[1]
        assert rows[0].input_ids == bert(WORDS, is_split_into_words=True, truncation=True, max_length=most)["input_ids"]
        assert rows[0].labels[1] == 1


def test_numbers_of_a_label_column_stand_for_its_names(bert: Any) -> None:
    """In another order than the task's."""
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["I-PER", "O", "B-PER"]))})
    rows = Dataset.from_dict({"tokens": [["Bob", "met"]], "tags": [[2, 1]]}, features=features)
    assert TASK.encode(rows, bert, max_tokens=9)[0].labels == [-100, 1, 0, -100]


def test_words_without_a_label(bert: Any) -> None:
    """-100 was refused, or a label of its own."""
    task = TokenClassificationTask(labels=("0", "1"))
    [row] = task.encode(data(["Bob", "met", "film"], [1, -100, 0]), bert, max_tokens=9)
    assert row.labels == [-100, 1, -100, 0, -100]
    with pytest.raises(InputError, match=r"row 0 .*a label other than -100 within 9 tokens in column 'tags', got none"):
        task.encode(data(["Bob", "met"], [-100, -100]), bert, max_tokens=9)
    with pytest.raises(InputError, match="a label other than -100 within 3 tokens"):
        task.encode(data(["Bob", "met"], [-100, 1]), bert, max_tokens=3, truncation=True)


def test_json_round_trip() -> None:
    assert task_from_json(json.loads(json.dumps(task_to_json(TASK)))) == TASK


def test_entities_are_right_as_wholes() -> None:
    """Gold has 4; found are 4: one right, one too long, one of another name, and an I that begins one, right."""
    gold = ["B-A", "I-A", "O", "B-B", "O", "B-A", "O", "I-B"]
    found = ["B-A", "I-A", "O", "B-B", "I-B", "B-B", "O", "I-B"]
    assert entity_metrics([gold], [found]) == {"entity_precision": 0.5, "entity_recall": 0.5, "entity_f1": 0.5}
    assert entity_metrics([["B-A", "B-A"]], [["B-A", "I-A"]])["entity_f1"] == 0
    assert entity_metrics([["B-A"], ["O"]], [["B-A"], ["B-A"]]) == {
        "entity_precision": 0.5, "entity_recall": 1.0, "entity_f1": pytest.approx(2 / 3),
    }  # fmt: skip
    long = [["B-A", "I-A", "I-A", "I-B", "I-B"]]  # two entities
    assert entity_metrics(long, long) == {"entity_precision": 1.0, "entity_recall": 1.0, "entity_f1": 1.0}
    assert entity_metrics(long, [["B-A", "I-A", "I-A", "O", "I-B"]])["entity_f1"] == 0.5
    assert entity_metrics([["O"]], [["O"]])["entity_f1"] == 0


def test_bad_inputs(bert: Any) -> None:
    def refused(message: str, rows: Dataset, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            TASK.encode(rows, bert, **{"max_tokens": 60, "source_name": "dev.jsonl", **options})

    refused(r"dev.jsonl, row 0 .*a list of words in column 'tokens', got str", data("Bob met", ["O", "O"]))
    refused(r"row 0 .*a list of words .*got list \[\]", data([], []))
    refused(r"row 0 .*expected 4 labels in column 'tags', got list", data(tags=["O"]))
    refused(r"row 0 .*among 'O', 'B-PER', 'I-PER' .*got str 'B-LOC'", data(tags=["B-LOC"] * 4))
    refused(r"row 0 .*words of at least one token .*got ' '", data(["Bob", " "], ["O", "O"]))
    refused("max_tokens above the 2 special tokens", data(), max_tokens=2)
    with pytest.raises(InputError, match="at least two labels"):
        TokenClassificationTask()
    with pytest.raises(InputError, match="'a' for both"):
        TokenClassificationTask("a", "a", LABELS)
    with pytest.raises(InputError, match=r"predicted, row 0 .*expected 1 labels, got 2"):
        entity_metrics([["O"]], [["O", "O"]])
