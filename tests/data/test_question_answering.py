"""Question answering: windows as the stock tokenizer makes them, answers as tokens, and the scores of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from ptengine.data import QuestionAnsweringTask, answer_metrics, load_rows
from ptengine.data.serialization import task_from_json, task_to_json
from ptengine.errors import InputError

CONTEXT = "Ann met Bob in Paris. Bob lives in Rome; Ann, in Oslo."
TASK = QuestionAnsweringTask(stride=3)


def data(answer: Any, **more: Any) -> Dataset:
    return Dataset.from_list([{"question": "Where does Ann live?", "context": CONTEXT, "answer": answer, **more}])


def answer_of(row: Any) -> str:
    first, last = row.window.answer
    return row.window.context[row.window.offsets[first][0] : row.window.offsets[last][1]]


def test_a_row_that_fits_is_the_stock_tokenizers(bert: Any) -> None:
    [row] = TASK.encode(data("Oslo"), bert, max_tokens=60)
    stock = bert("Where does Ann live?", CONTEXT)
    assert (row.input_ids, row.token_type_ids) == (stock["input_ids"], stock["token_type_ids"])
    assert (answer_of(row), row.references, row.index) == ("Oslo", ("Oslo",), 0)
    assert bert.decode(row.input_ids[row.window.answer[0]]) == "oslo"
    assert [offset is None for offset in row.window.offsets] == [i < 7 or i == 23 for i in range(24)]


def test_long_texts_are_windows_that_share_the_stride(bert: Any) -> None:
    """7 tokens of question and special ones, 1 at the end: 8 of 16 are text, 5 of them new in each window."""
    split = TASK.encode(data("Rome; Ann"), bert, max_tokens=16)
    stock = bert(
        "Where does Ann live?", CONTEXT, max_length=16, stride=3, truncation="only_second",
        return_overflowing_tokens=True,
    )  # fmt: skip
    assert [row.input_ids for row in split] == stock["input_ids"]
    assert {row.index for row in split} == {0}
    assert split.truncated == 0
    whole = [row for row in split if row.window.answer != (0, 0)]
    assert len(split) > 2
    assert whole
    assert all(answer_of(row) == "Rome; Ann" for row in whole)
    text = bert(CONTEXT, add_special_tokens=False)["input_ids"]
    inside = [row.input_ids[7:-1] for row in split]
    assert inside[0] + [token for window in inside[1:] for token in window[3:]] == text
    # A window that cuts the answer off has none of it.
    wanted = bert("Rome; Ann", add_special_tokens=False)["input_ids"]
    for row, tokens in zip(split, inside, strict=True):
        has = any(tokens[i : i + 3] == wanted for i in range(len(tokens)))
        assert has == (row.window.answer != (0, 0))


def test_where_the_answer_is_said_to_begin(bert: Any) -> None:
    """Bob stands twice: the first without a start, else the one that is meant, also in SQuAD's own form."""
    second = CONTEXT.index("Bob", 10)
    started = QuestionAnsweringTask(start_column="start")
    squad = {"text": ["Bob", "Bob lives"], "answer_start": [second, second]}
    cases = [(TASK, data("Bob")), (started, data("Bob", start=second)), (TASK, data(squad))]
    found = [task.encode(rows, bert, max_tokens=60)[0] for task, rows in cases]
    assert [row.window.offsets[row.window.answer[0]][0] for row in found] == [8, second, second]
    assert found[2].references == ("Bob", "Bob lives")


def test_white_space_at_a_texts_ends_made_an_answer_there_none(bert: Any) -> None:
    """No token covers it, so the answer was not whole in any window."""
    for context, answer in (("Ann lives in Oslo \n", "Oslo \n"), ("  Ann lives in Oslo", "  Ann")):
        rows = Dataset.from_list([{"question": "Where?", "context": context, "answer": answer}])
        [row] = TASK.encode(rows, bert, max_tokens=60)
        assert answer_of(row) == answer.strip()
        assert row.references == (answer,)


@pytest.mark.parametrize("name", ["xquad_en", "cmrc2018"])
def test_real_answers_stand_where_the_tokens_say(shared: Path, bert: Any, name: str) -> None:
    """Up to what the tokens cover: an answer may end within one."""
    rows = load_rows(shared / "data" / name / "validation.jsonl")
    split = QuestionAnsweringTask(stride=32).encode(rows, bert, max_tokens=200)
    assert {row.index for row in split} == set(range(len(rows)))
    assert len(split) > len(rows)
    found = {row.index for row in split if row.window.answer != (0, 0)}
    assert len(found) > 0.95 * len(rows)
    for row in split:
        if row.window.answer != (0, 0):
            assert row.references[0].strip() in answer_of(row)


def test_json_round_trip() -> None:
    task = QuestionAnsweringTask("q", "c", "a", "s", 5, 7)
    assert task_from_json(task_to_json(task)) == task


def test_metrics() -> None:
    """By hand: 'the' and punctuation go; 2 of 3 and of 2 words are shared: F1 0.8; Chinese characters are words."""
    assert answer_metrics(["The  Cat!"], [["dog", "cat"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert answer_metrics(["in New York"], [["New York"]])["f1"] == pytest.approx(0.8)
    assert answer_metrics(["《东京》的塔", "x"], [["东京塔。"], ["y"]]) == {
        "exact_match": 0.0, "f1": pytest.approx((2 * 3 / 7) / 2),
    }  # fmt: skip
    assert answer_metrics(["“北京”——首都…", "“Ab”"], [["北京首都"], ["Ab"]]) == {"exact_match": 0.5, "f1": 0.5}
    assert answer_metrics(["", "the"], [["a"], ["b"]]) == {"exact_match": 0.5, "f1": 0.5}


def test_bad_inputs(bert: Any) -> None:
    def refused(message: str, rows: Dataset, task: QuestionAnsweringTask = TASK, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            task.encode(rows, bert, **{"max_tokens": 60, "source_name": "dev.jsonl", **options})

    refused(r"dev.jsonl, row 0 .*the answer str 'Berlin' in column 'context'", data("Berlin"))
    refused(r"row 0 .*an answer in column 'answer', got an empty value", data(None))
    refused(r"row 0 .*an answer in column 'answer', got str ' '", data(" "))
    started = QuestionAnsweringTask(start_column="start")
    refused(r"row 0 .*the answer str 'Bob' .*from character 3 on", data("Bob", start=3), started)
    refused(r"row 0 .*first character as a whole number, got an empty value", data("Bob", start=None), started)
    refused(r"row 0 .*more than stride=3 tokens .*got 3 of the 11", data("Bob"), max_tokens=11)
    refused(r"row 0 .*more than stride=3 tokens .*got 0 of the 5", data("Bob"), max_tokens=5)
    with pytest.raises(InputError, match="columns apart"):
        QuestionAnsweringTask("a", "a")
    with pytest.raises(InputError, match="stride, a whole number of at least 0"):
        QuestionAnsweringTask(stride=-1)
    with pytest.raises(InputError, match=r"references, row 0 .*list of texts"):
        answer_metrics(["a"], ["abc"])
