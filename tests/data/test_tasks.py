"""Tasks: rows of tokens with the right labels, in three kinds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.data import (
    ClassificationTask,
    EncodedRow,
    GenerationTask,
    Seq2SeqTask,
    SequenceClassificationTask,
    Task,
    Template,
    Verbalizer,
    load_rows,
)
from ptengine.errors import InputError

SMS = ClassificationTask(
    Template("Message: {text}\nLabel:"), Verbalizer({"ham": " ham", "spam": [" spam", " unwanted junk"]})
)
FILM = ClassificationTask(Template("it was {text} :"), Verbalizer({"neg": "bad", "pos": ["very good", "film"]}))


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def check_target(row: EncodedRow, target: list[int]) -> None:
    assert row.input_ids[row.prompt_length :] == target
    assert row.labels == [IGNORE_INDEX] * row.prompt_length + target
    assert len(row.labels) == len(row.input_ids)


# Classification on a causal model


def test_classification_row_by_hand(wordwise: Any) -> None:
    """BOS as the tokenizer has it in front, its EOS left out, the label's first word as the target."""
    split = FILM.encode(Dataset.from_dict({"text": ["a film", "bad"], "label": ["pos", "neg"]}), wordwise, max_tokens=9)
    assert split.truncated == 0
    assert list(split) == [
        EncodedRow([1, 8, 9, 7, 6, 10, 5, 3], [-100] * 6 + [5, 3], index=0, prompt_length=6, class_id=1),
        EncodedRow([1, 8, 9, 4, 10, 4], [-100] * 5 + [4], index=1, prompt_length=5, class_id=0),
    ]
    assert len(split) == 2
    assert split[1] is split.rows[1]


def test_no_bos_where_the_tokenizer_adds_none(bytewise: Any) -> None:
    split = SMS.encode(Dataset.from_dict({"text": ["hi"], "label": ["spam"]}), bytewise, max_tokens=99)
    assert text_of(bytewise, split[0].input_ids) == "Message: hi\nLabel: spam"
    check_target(split[0], bytewise(" spam")["input_ids"])


def test_a_tokenizer_without_the_letter_a_had_its_bos_behind_the_text() -> None:
    """A Chinese one, without unknown tokens."""

    def made(*words: str) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(["<s>", "</s>", *words])}, merges=[]))
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")

    rows = Dataset.from_dict({"text": ["好的"], "target": ["坏"]})
    split = GenerationTask(Template("{text}")).encode(rows, made("好", "的", "坏"), max_tokens=9)
    assert split[0].input_ids == [0, 2, 3, 4, 1]
    with pytest.raises(InputError, match="expected a tokenizer that makes tokens of a text, got"):
        GenerationTask(Template("{text}")).encode(rows, made(), max_tokens=9)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_real_classification(shared: Path, stories: Any, name: str) -> None:
    path = shared / "data" / "sms_spam" / f"{name}.jsonl"
    split = SMS.encode(load_rows(path), stories, max_tokens=2000, source_name=str(path))
    bound = SMS.verbalizer.bind(stories)
    source = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [row.index for row in split] == list(range(len(source)))
    for row, raw in zip(split, source, strict=True):
        assert SMS.labels[row.class_id or 0] == raw["label"]
        check_target(row, list(bound.token_ids[row.class_id or 0][0]))
        alone = stories(f"Message: {raw['text']}\nLabel:")["input_ids"]  # a BOS in front and nothing behind
        assert row.input_ids[: row.prompt_length] == alone
        assert alone[0] == stories.bos_token_id


def test_real_rows_quickly(shared: Path, stories: Any) -> None:
    task = ClassificationTask(
        Template("Question: {text}\nIt asks for"),
        Verbalizer.from_labels(["abbreviation", "description", "entity", "human", "location", "number"]),
    )
    dataset = load_rows(shared / "data" / "trec6" / "train.jsonl")
    start = time.perf_counter()
    split = task.encode(dataset, stories, max_tokens=500)
    assert time.perf_counter() - start < 5  # 0.2 s on a quiet machine; row by row it takes several seconds
    assert len(split) == dataset.num_rows


def test_candidates(wordwise: Any) -> None:
    bound = FILM.verbalizer.bind(wordwise)
    row = FILM.encode(Dataset.from_dict({"text": ["a film"], "label": ["pos"]}), wordwise, max_tokens=9)[0]
    candidates = FILM.candidates(row, bound)
    assert [one.class_id for one in candidates] == list(bound.word_labels) == [0, 1, 1]
    for one, word in zip(candidates, bound.words, strict=True):
        check_target(one, list(word))
        assert one.input_ids[: one.prompt_length] == row.input_ids[: row.prompt_length]
        assert one.index == row.index
    assert candidates[1] == row


def test_labels_of_every_kind(wordwise: Any) -> None:
    """Text, whole numbers, bools, and the numbers of a ClassLabel column, which stand for its names."""
    template = Template("{text}")
    for words, labels in (({"0": "bad", "1": "good"}, [1, 0]), ({"False": "bad", "True": "good"}, [True, False])):
        dataset = Dataset.from_dict({"text": ["a", "a"], "label": labels})
        split = ClassificationTask(template, Verbalizer(words)).encode(dataset, wordwise, max_tokens=9)
        assert [row.class_id for row in split] == [1, 0]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    dataset = Dataset.from_dict({"text": ["a", "a"], "label": [0, 1]}, features=features)
    assert [row.class_id for row in FILM.encode(dataset, wordwise, max_tokens=9)] == [1, 0]


def test_a_data_sets_format_does_not_matter(wordwise: Any) -> None:
    """With set_format("torch") the columns came as tensors, which are no text and no numbers."""
    task = ClassificationTask(Template("{a}"), Verbalizer({"0": "bad", "1": "good"}))
    dataset = Dataset.from_dict({"a": [5, 6], "label": [0, 1]})
    plain = task.encode(dataset, wordwise, max_tokens=9)
    assert task.encode(dataset.with_format("torch"), wordwise, max_tokens=9) == plain


# Length


def test_room_is_kept_for_the_longest_word(wordwise: Any) -> None:
    """Text 6 tokens and longest word 2: fits 8, although this row's own word is one token."""
    dataset = Dataset.from_dict({"text": ["a film"], "label": ["neg"]})
    assert len(FILM.encode(dataset, wordwise, max_tokens=8)[0].input_ids) == 7
    with pytest.raises(InputError, match=r"row 0 .*at most 7 tokens .*got 8 \(text 6 \+ target 2"):
        FILM.encode(dataset, wordwise, max_tokens=7)


def test_cutting_takes_the_end_of_the_longest_column_only(bytewise: Any) -> None:
    task = GenerationTask(Template("{a}|{b}|\n"), end_with_eos=False)
    dataset = Dataset.from_dict(
        {"a": ["abc", "0123456789", "short"], "b": ["0123456789", "xyz", "s"], "target": ["TARGET", "T", "T"]}
    )
    split = task.encode(dataset, bytewise, max_tokens=16, truncation=True)
    assert [text_of(bytewise, row.input_ids) for row in split] == [
        "abc|0123|\nTARGET",
        "012345678|xyz|\nT",
        "short|s|\nT",
    ]
    assert split.truncated == 2
    check_target(split[0], bytewise("TARGET")["input_ids"])


def test_the_first_of_equally_long_columns_is_cut(bytewise: Any) -> None:
    task = GenerationTask(Template("{a}{b}"), end_with_eos=False)
    dataset = Dataset.from_dict({"a": ["aaaa"], "b": ["bbbb"], "target": ["T"]})
    assert text_of(bytewise, task.encode(dataset, bytewise, max_tokens=6, truncation=True)[0].input_ids) == "abbbbT"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40), st.integers(14, 60))
def test_cut_rows_fit_and_keep_the_rest(bytewise: Any, value: str, max_tokens: int) -> None:
    """A prefix of the column, whole characters, and the next character would have been too much."""
    task = GenerationTask(Template("In: {text}\nOut:"), end_with_eos=True)
    dataset = Dataset.from_dict({"text": [value], "target": ["x"]})
    split = task.encode(dataset, bytewise, max_tokens=max_tokens, truncation=True)
    row = split[0]
    assert len(row.input_ids) <= max_tokens
    check_target(row, [*bytewise("x")["input_ids"], bytewise.eos_token_id])
    text = text_of(bytewise, row.input_ids[: row.prompt_length])
    assert text.startswith("In: ")
    assert text.endswith("\nOut:")
    kept = text[len("In: ") : -len("\nOut:")]
    assert value.startswith(kept)
    assert split.truncated == (kept != value)
    if kept != value:
        assert len(row.input_ids) + len(value[len(kept)].encode()) > max_tokens


def test_cutting_real_text(shared: Path, stories: Any) -> None:
    task = GenerationTask(Template("Abstract: {source}\nSummary:"))
    path = shared / "data" / "scitldr" / "test.jsonl"
    dataset = load_rows(path)
    full = task.encode(dataset, stories, max_tokens=5000)
    split = task.encode(dataset, stories, max_tokens=300, truncation=True)
    assert split.truncated == sum(len(row.input_ids) > 300 for row in full) > 100
    for row, whole in zip(split, full, strict=True):
        check_target(row, whole.input_ids[whole.prompt_length :])
        if len(whole.input_ids) <= 300:
            assert row == whole
            continue
        assert 290 <= len(row.input_ids) <= 300
        text = stories.decode(row.input_ids[1 : row.prompt_length])
        assert text.startswith("Abstract: ")
        assert text.endswith("\nSummary:")
        assert text[len("Abstract: ") : -len("\nSummary:")] in dataset[row.index]["source"]


# Generation


def test_generation_labels_the_target_and_the_eos(bytewise: Any) -> None:
    dataset = Dataset.from_dict({"source": ["a=1"], "target": ["One."]})
    row = GenerationTask(Template("{source}\n")).encode(dataset, bytewise, max_tokens=99)[0]
    check_target(row, [*bytewise("One.")["input_ids"], bytewise.eos_token_id])
    assert text_of(bytewise, row.input_ids[: row.prompt_length]) == "a=1\n"
    assert row.class_id is None
    assert row.references == ("One.",)
    open_ended = GenerationTask(Template("{source}\n"), end_with_eos=False)
    check_target(open_ended.encode(dataset, bytewise, max_tokens=99)[0], bytewise("One.")["input_ids"])


def test_references_of_real_data(shared: Path, stories: Any) -> None:
    task = GenerationTask(Template("{source}\n"))
    folder = shared / "data" / "e2e_nlg"
    train = task.encode(load_rows(folder / "train.jsonl"), stories, max_tokens=1000)
    assert {len(row.references) for row in train} == {1}
    test = load_rows(folder / "test.jsonl")
    split = task.encode(test, stories, max_tokens=1000)
    assert [list(row.references) for row in split] == test["references"][:]
    for row, target in zip(split, test["target"], strict=True):
        check_target(row, [*stories(target, add_special_tokens=False)["input_ids"], stories.eos_token_id])


# Sequence classification on an encoder


def test_sequence_classification_equals_the_tokenizer(shared: Path, bert: Any) -> None:
    task = SequenceClassificationTask(labels=("objective", "subjective"))
    dataset = load_rows(shared / "data" / "subj" / "validation.jsonl")
    split = task.encode(dataset, bert, max_tokens=512)
    for row, raw in zip(split, dataset, strict=True):
        alone = bert(raw["text"])
        assert row.input_ids == alone["input_ids"]
        assert row.token_type_ids == alone["token_type_ids"]
        assert row.labels == [IGNORE_INDEX] * len(row.input_ids)
        assert row.prompt_length == len(row.input_ids)
        assert task.labels[row.class_id or 0] == raw["label"]


def test_pairs_are_cut_by_the_longer(shared: Path, bert: Any) -> None:
    task = SequenceClassificationTask(text_pair_column="text_pair", labels=("entailment", "not entailment"))
    assert task.columns == ("text", "text_pair", "label")
    dataset = load_rows(shared / "data" / "rte" / "validation.jsonl")
    labels = tuple(sorted(set(dataset["label"])))
    task = SequenceClassificationTask(text_pair_column="text_pair", labels=labels)
    full = task.encode(dataset, bert, max_tokens=512)
    split = task.encode(dataset, bert, max_tokens=64, truncation=True)
    assert split.truncated == sum(len(row.input_ids) > 64 for row in full) > 20
    for row, whole, raw in zip(split, full, dataset, strict=True):
        assert len(row.input_ids) == min(len(whole.input_ids), 64)
        assert len(row.token_type_ids or []) == len(row.input_ids)
        pair = bert(raw["text_pair"], add_special_tokens=False)["input_ids"]
        if len(pair) < 25:  # the shorter of the two stays whole
            assert row.input_ids[-len(pair) - 1 : -1] == pair
            assert sum(row.token_type_ids or []) == len(pair) + 1


# All tasks


@pytest.mark.parametrize(
    ("task", "kind", "backbone_kind", "columns"),
    [
        (SMS, "classification", "causal", ("text", "label")),
        (GenerationTask(Template("{b} {a}"), "t"), "generation", "causal", ("b", "a", "t")),
        (Seq2SeqTask(Template("{b} {a}"), "t"), "seq2seq", "seq2seq", ("b", "a", "t")),
        (SequenceClassificationTask(labels=("a", "b")), "sequence_classification", "encoder", ("text", "label")),
    ],
)
def test_the_common_protocol(task: Task, kind: str, backbone_kind: str, columns: tuple[str, ...]) -> None:
    assert isinstance(task, Task)
    assert (task.kind, task.backbone_kind, task.columns) == (kind, backbone_kind, columns)


def test_encoding_does_not_warn_of_the_tokenizers_own_limit(bert: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer logged a warning about model_max_length although max_tokens is checked here."""
    dataset = Dataset.from_dict({"text": ["word " * 600], "label": ["a"]})
    SequenceClassificationTask(labels=("a", "b")).encode(dataset, bert, max_tokens=1000)
    ClassificationTask(Template("{text}"), Verbalizer.from_labels(["a", "b"])).encode(dataset, bert, max_tokens=1000)
    assert not caplog.records
