"""The tasks of encoder-decoders: sources, targets and label words as the tokenizer makes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset

from ptengine.data import EncodedRow, Seq2SeqClassificationTask, Seq2SeqTask, Template, Verbalizer
from ptengine.data.serialization import task_from_json, task_to_json
from ptengine.errors import InputError

from .test_tasks import check_target, text_of


def test_row_by_hand(wordwise: Any) -> None:
    """Source and target each with what the tokenizer puts around a text, and no second EOS."""
    dataset = Dataset.from_dict(
        {"source": ["a film", "bad"], "target": ["very good", "film"], "references": [["x", "y"], ["z"]]}
    )
    split = Seq2SeqTask(Template("{source} :")).encode(dataset, wordwise, max_tokens=9)
    first, second = [1, 7, 6, 10, 2], [1, 4, 10, 2]
    assert list(split) == [
        EncodedRow([*first, 1, 5, 3, 2], [-100] * 5 + [1, 5, 3, 2], 0, 5, references=("x", "y")),
        EncodedRow([*second, 1, 6, 2], [-100] * 4 + [1, 6, 2], 1, 4, references=("z",)),
    ]


def test_targets_end_once(bytewise: Any) -> None:
    """This tokenizer puts no EOS behind a text; a source gets none, and a target one."""
    dataset = Dataset.from_dict({"source": ["a=1"], "target": ["One."]})
    row = Seq2SeqTask(Template("{source}\n")).encode(dataset, bytewise, max_tokens=5)[0]
    assert text_of(bytewise, row.input_ids[: row.prompt_length]) == "a=1\n"
    check_target(row, [*bytewise("One.")["input_ids"], bytewise.eos_token_id])
    bare = Seq2SeqTask(Template("{source}\n"), end_with_eos=False).encode(dataset, bytewise, max_tokens=5)[0]
    check_target(bare, bytewise("One.")["input_ids"])


def test_sources_alone_are_cut(wordwise: Any) -> None:
    """The special tokens stay; a target that is too long is refused."""
    dataset = Dataset.from_dict({"source": ["a film it was very bad"], "target": ["good film"]})
    task = Seq2SeqTask(Template("{source} :"))
    row = task.encode(dataset, wordwise, max_tokens=6, truncation=True)[0]
    assert row.input_ids[: row.prompt_length] == [1, 7, 6, 8, 10, 2]
    with pytest.raises(InputError, match=r"expected at most 6 tokens .*got 9 \(text 9, and truncation is off\)"):
        task.encode(dataset, wordwise, max_tokens=6)
    with pytest.raises(InputError, match=r"got 4 \(the target, which is never cut\)"):
        task.encode(dataset, wordwise, max_tokens=3, truncation=True)


def test_virtual_tokens_stand_before_the_source(wordwise: Any) -> None:
    """Where they stand without a place, before the special tokens; elsewhere they are refused."""
    dataset = Dataset.from_dict({"source": ["a film"], "target": ["good"]})
    plain = Seq2SeqTask(Template("{source} :")).encode(dataset, wordwise, max_tokens=9)
    placed = Seq2SeqTask(Template("{prompt:3}{source} :")).encode(dataset, wordwise, max_tokens=9)
    assert list(placed) == list(plain)
    with pytest.raises(InputError, match="before the text of a generation template"):
        Seq2SeqTask(Template("{source}{prompt:3} :"))


def test_json() -> None:
    task = Seq2SeqTask(Template("{source} :"), "t", False, "r")
    assert task_from_json(task_to_json(task)) == task
    assert task_to_json(task)["kind"] == "seq2seq"


WORDS = Verbalizer({"0": ["bad", "very bad"], "1": "good"})


def test_a_word_is_written_as_a_target_is(wordwise: Any) -> None:
    dataset = Dataset.from_dict({"source": ["a film", "it was"], "label": ["1", "0"]})
    task = Seq2SeqClassificationTask(Template("{source} :"), WORDS)
    rows = list(task.encode(dataset, wordwise, max_tokens=9))
    texts = Seq2SeqTask(Template("{source} :"), "label").encode(
        Dataset.from_dict({"source": ["a film", "it was"], "label": ["good", "bad"]}), wordwise, max_tokens=9
    )
    assert [row.input_ids for row in rows] == [row.input_ids for row in texts]
    assert [row.labels for row in rows] == [row.labels for row in texts]
    assert [(row.class_id, row.prompt_length) for row in rows] == [(1, 5), (0, 5)]
    candidates = task.candidates(rows[0], task.bind(wordwise))
    source = [1, 7, 6, 10, 2]
    assert [c.input_ids for c in candidates] == [[*source, 1, 4, 2], [*source, 1, 5, 4, 2], [*source, 1, 3, 2]]
    assert [c.class_id for c in candidates] == [0, 0, 1]


def test_a_word_may_begin_with_another(bytewise: Any) -> None:
    """They end, so "1" is no beginning of "10" as it is in a causal model's verbaliser."""
    verbalizer = Verbalizer({"one": "1", "ten": "10"})
    with pytest.raises(InputError, match="none begins with another's tokens"):
        verbalizer.bind(bytewise)
    end = bytewise.eos_token_id
    (one,), (ten,) = Seq2SeqClassificationTask(Template("{source}"), verbalizer).bind(bytewise).token_ids
    assert (one, ten) == ((*bytewise("1")["input_ids"], end), (*bytewise("10")["input_ids"], end))
    with pytest.raises(InputError, match="the same tokens"):
        Verbalizer({"one": "1", "other": "1"}).bind(bytewise, as_targets=True)


def test_words_and_templates_that_an_encoder_decoder_cannot_take(wordwise: Any) -> None:
    with pytest.raises(InputError, match=r"\{mask\}"):
        Seq2SeqClassificationTask(Template("{source} {mask}"), WORDS)
    with pytest.raises(InputError, match="before the text of an encoder-decoder's template"):
        Seq2SeqClassificationTask(Template("{source} {prompt:2}"), WORDS)
    dataset = Dataset.from_dict({"source": ["a film"], "label": ["1"]})
    task = Seq2SeqClassificationTask(Template("{source}"), WORDS)
    with pytest.raises(InputError, match="expected words of at most 3 tokens, got one of 4"):
        task.encode(dataset, wordwise, max_tokens=3)
    with pytest.raises(InputError, match="'dull' of label '0', which holds the unknown token"):
        Seq2SeqClassificationTask(Template("{source}"), Verbalizer({"0": "dull", "1": "good"})).bind(wordwise)
    endless = copy.deepcopy(wordwise)
    endless.eos_token = None
    with pytest.raises(InputError, match="a tokenizer with an EOS token to end words with"):
        task.bind(endless)


def test_classification_json() -> None:
    task = Seq2SeqClassificationTask(Template("{source} :"), WORDS, "says")
    assert task_from_json(task_to_json(task)) == task
    assert task_to_json(task)["kind"] == "seq2seq_classification"
