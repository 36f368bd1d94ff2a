"""Bad data: each defect is one InputError of one line that says where it is, what was expected and what came."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from ptengine.data import (
    ClassificationTask,
    EncodedRow,
    GenerationTask,
    SequenceClassificationTask,
    ShuffledBatches,
    Template,
    Verbalizer,
    classification_metrics,
    collate,
    generation_metrics,
    load_rows,
)
from ptengine.errors import InputError


def refused(action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "expected" in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


FILES = {
    "empty.jsonl": (b"", ["at least one row"]),
    "bom_only.csv": (b"\xef\xbb\xbf\n", ["at least one row"]),  # a traceback
    "blank.csv": (b"\n  \n", ["at least one row"]),
    "empty.parquet": (b"", ["at least one row"]),
    "header_only.csv": (b"text,label\n", ["at least one row"]),
    "no_entries.json": (b"[]", ["at least one row"]),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": oops}\n', ["line 3, column 10", "JSON object"]),
    "cut_short.json": (b'[{"text": "a"},\n {"text": "b"', ["line 2", "expected JSON"]),
    "broken_line.json": (b'{"text": "a"}\n{"text": \n', ["line 2"]),
    "list_line.jsonl": (b'{"text": "a"}\n[1, 2]\n', ["line 2", "object", "list [1, 2]"]),
    "numbers.json": (b'[{"text": "a"}, 3]', ["row 1", "dict", "int 3"]),
    "scalar.json": (b'"text"', ["row 0", "str 'text'"]),
    "no_columns.jsonl": (b'{"a": 1}\n{}\n', ["row 1", "columns"]),
    "surrogate.jsonl": (b'{"text": "a"}\n{"text": "\\ud83d"}\n', ["row 1", "'text'"]),
    "surrogate_mixed.jsonl": (b'{"text": 1}\n{"text": "\\ud83d"}\n', ["row 1", "'text'", "surrogates"]),
    # A traceback: json's own RecursionError.
    "deep.jsonl": (b'{"text": "a"}\n{"text": ' + b"[" * 200_000 + b"}\n", ["line 2", "nested less deeply"]),
    "deep.json": (b"[" * 200_000, ["nested less deeply"]),
    "huge.jsonl": (b'{"id": 1}\n{"id": 100000000000000000000}\n', ["row 1", "'id'", "int 1000"]),
    "latin1.jsonl": ('{"text": "a"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"), ["line 2", "UTF-8", "0xe9"]),
    "latin1.csv": ("text\na\nb\ncaf\u00e9\n".encode("latin-1"), ["line 4", "UTF-8", "0xe9"]),
    "extra_cell.csv": (b'text,label\n"a\nb",1\nb,2,3\n', ["line 4", "2 fields", "got 3"]),
    "extra_everywhere.csv": (b"text,label\na,1,2\nb,2,3\n", ["line 2", "2 fields", "got 3"]),
    # The csv module's limit of 131072 characters in a cell was blamed, which nothing else has.
    "extra_behind_large.csv": (b"text,label\n" + b"a" * 140_000 + b",1\nb,2,3\n", ["line 3", "2 fields", "got 3"]),
    "doubled_large.csv": (b"a" * 140_000 + b",b,b\nc,d,e\n", ["line 1", "different names", "'b'"]),
    "open_quote.csv": (b'text,label\na,1\n"b,2\nc,3\n', ["line 3", "quote"]),
    "doubled.csv": (b"text,label,text\na,b,c\n", ["line 1", "different names", "'text'"]),
    "words.parquet": (b"not parquet at all", ["parquet"]),
    "rows.tsv": (b"text\tlabel\na\tb\n", [".csv, .json, .jsonl, .parquet", "'.tsv'"]),
    "rows": (b"text\n", [".csv", "''"]),
}


TABLES = {
    "no rows": (pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), ["expected at least one row, got none"]),
    "no columns": (pyarrow.table({}), ["expected at least one row, got none"]),
    "a name twice": (
        pyarrow.Table.from_arrays([["a"], ["b"], ["c"]], names=["text", "label", "text"]), ["different names", "'text'"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_parquet_was_blamed_for_what_is_in_it(tmp_path: Path, case: str) -> None:
    table, parts = TABLES[case]
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path)
    refused(lambda: load_rows(path), str(path), *parts)


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Also without a word on any stream: `datasets` logged the error on its own before it raised."""
    content, parts = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    records: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("datasets").addHandler(listener)
    try:
        refused(lambda: load_rows(path), str(path), *parts)
    finally:
        logging.getLogger("datasets").removeHandler(listener)
    assert not records
    assert capfd.readouterr() == ("", "")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(lambda: load_rows(tmp_path / "none.jsonl"), "none.jsonl", "there is none")
    (tmp_path / "folder.csv").mkdir()
    refused(lambda: load_rows(tmp_path / "folder.csv"), "folder.csv", "directory")


ROWS = Dataset.from_dict({"text": ["a"]})
SOURCES: dict[str, tuple[Any, list[str]]] = {
    "no rows": ([], ["at least one row", "empty list"]),
    "not dicts": ([{"a": 1}, "b"], ["row 1", "str 'b'"]),
    "number keys": ([{1: "a"}], ["row 0", "[1]"]),
    "splits": (DatasetDict({"train": ROWS, "test": ROWS}), ["DatasetDict", "'train', 'test'"]),
    "empty data set": (ROWS.select([]), ["at least one row"]),
    "columns": ({"text": ["a"]}, ["type dict"]),
    "number": (3, ["type int"]),
    "nothing": (None, ["type NoneType"]),
    "a date among texts": ([{"a": "b"}, {"a": date(2020, 1, 1)}], ["row 1", "'a'", "several types", "date"]),
    "a stream": (ROWS.to_iterable_dataset(), ["type IterableDataset"]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources(case: str) -> None:
    source, parts = SOURCES[case]
    refused(lambda: load_rows(source, name="eval"), "eval", *parts)


TEMPLATES: dict[str, tuple[Any, list[str]]] = {
    "open": ("a {text", ["lone '{'", "character 2"]),
    "closed": ("{text} }", ["lone '}'", "character 7"]),
    "nested": ("{a{b}}", ["lone '{'", "character 0"]),
    "nameless": ("x {} {text}", ["column name", "character 2"]),
    "constant": ("no column {{text}}", ["column in braces"]),
    "empty": ("", ["column in braces"]),
    "not text": (3, ["as text", "int"]),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case: str) -> None:
    source, parts = TEMPLATES[case]
    refused(lambda: Template(source), *parts)


VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({"body": "a", "label": "b"}, ["'text'", "'body', 'label'"]),
    "null": ({"text": None}, ["'text'", "null"]),
    "nan": ({"text": float("nan")}, ["'text'", "null"]),
    "bool": ({"text": True}, ["'text'", "bool True"]),
    "list": ({"text": ["a"]}, ["'text'", "list ['a']"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str) -> None:
    row, parts = VALUES[case]
    refused(lambda: Template("{text}").render(row, 17, "data.csv"), "data.csv, row 17", *parts)


VERBALIZERS: dict[str, tuple[Any, list[str]]] = {
    "empty": ({}, ["at least two labels", "none"]),
    "one label": ({"a": " a"}, ["at least two labels", "'a'"]),
    "a list": (["a", "b"], ["mapping", "list"]),
    "no words": ({"a": [], "b": " b"}, ["'a'", "list []"]),
    "empty word": ({"a": " a", "b": ""}, ["'b'", "str ''"]),
    "blank word": ({"a": " a", "b": ["b", " \n"]}, ["'b'", "not empty"]),
    "number": ({"a": " a", "b": 3}, ["'b'", "int 3"]),
    "number in list": ({"a": [" a", 3], "b": "b"}, ["'a'", "int 3"]),
    "odd label": ({"a": " a", 1.5: "b"}, ["float 1.5"]),
    "twice": ({"1": " a", 1: "b"}, ["'1' twice"]),
}


@pytest.mark.parametrize("case", VERBALIZERS)
def test_verbalizers(case: str) -> None:
    words, parts = VERBALIZERS[case]
    refused(lambda: Verbalizer(words), *parts)


def test_labels_without_words() -> None:
    refused(lambda: Verbalizer.from_labels(["a", "a"]), "'a' twice")
    refused(lambda: Verbalizer.from_labels(["\u00e9", "e\u0301"]), "twice, composed (NFC) and decomposed")
    refused(lambda: Verbalizer.from_labels("ab"), "list of labels", "str 'ab'")  # type: ignore[arg-type]
    refused(lambda: SequenceClassificationTask(labels=("a",)), "at least two labels")
    refused(lambda: SequenceClassificationTask(), "at least two labels")


WORDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown": ({"a": "good", "b": "bad splendid"}, ["'bad splendid'", "'b'", "'<unk>'"]),
    "same": ({"a": "good film", "b": "good  film"}, ["'a'", "'b'", "same tokens [3, 6]"]),
    "same label": ({"a": ["good", "good"], "b": "bad"}, ["same tokens [3]"]),
    "prefix": ({"a": "very good", "b": "very"}, ["'very'", "'very good'", "[5] and [5, 3]"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_in_tokens(wordwise: PreTrainedTokenizerBase, case: str) -> None:
    words, parts = WORDS[case]
    refused(lambda: Verbalizer(words).bind(wordwise), *parts)


SENTIMENT = ClassificationTask(Template("it was {text} :"), Verbalizer({"neg": "bad", "pos": "good"}))
WRITING = GenerationTask(Template("it was {text} :"))
ENCODING = SequenceClassificationTask(text_pair_column="pair", labels=("neg", "pos"))
NAMES = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
ODD_NAMES = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "mixed"])})
TOO_LONG = {"text": ["a", "a very very film"], "label": ["pos", "neg"]}

SPLITS: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "no text": (SENTIMENT, {"body": ["a"], "label": ["pos"]}, {}, ["'text'", "'body', 'label'"]),
    "no label": (SENTIMENT, {"text": ["a"]}, {}, ["column 'label'", "the columns 'text'"]),
    "no target": (WRITING, {"text": ["a"]}, {}, ["column 'target'"]),
    "no pair": (ENCODING, {"text": ["a"], "label": ["pos"]}, {}, ["column 'pair'"]),
    "no rows": (SENTIMENT, {"text": [], "label": []}, {}, ["at least one row", "empty split"]),
    "null text": (SENTIMENT, {"text": ["a", None], "label": ["pos", "pos"]}, {}, ["row 1", "'text'", "null"]),
    "null label": (SENTIMENT, {"text": ["a", "a"], "label": ["pos", None]}, {}, ["row 1", "'label'", "null"]),
    "other label": (SENTIMENT, {"text": ["a"], "label": ["Pos"]}, {}, ["row 0", "'neg', 'pos'", "str 'Pos'"]),
    "number label": (SENTIMENT, {"text": ["a"], "label": [1]}, {}, ["row 0", "'neg', 'pos'", "int 1"]),
    "float label": (SENTIMENT, {"text": ["a"], "label": [1.0]}, {}, ["row 0", "float 1.0"]),
    "list label": (SENTIMENT, {"text": ["a"], "label": [["pos"]]}, {}, ["row 0", "list ['pos']"]),
    "unlabelled": (
        SENTIMENT,
        Dataset.from_dict({"text": ["a"], "label": [-1]}, features=NAMES),
        {},
        ["row 0", "'label'", "null"],
    ),
    "other class": (
        SENTIMENT,
        Dataset.from_dict({"text": ["a"], "label": [1]}, features=ODD_NAMES),
        {},
        ["row 0", "'neg', 'pos'", "str 'mixed'"],
    ),
    "encoder label": (
        ENCODING,
        {"text": ["a"], "pair": ["a"], "label": ["good"]},
        {},
        ["row 0", "'neg', 'pos'", "str 'good'"],
    ),
    "encoder pair": (ENCODING, {"text": ["a"], "pair": [None], "label": ["pos"]}, {}, ["row 0", "'pair'", "null"]),
    "null target": (WRITING, {"text": ["a"], "target": [None]}, {}, ["row 0", "'target'", "null"]),
    "blank target": (WRITING, {"text": ["a"], "target": [" "]}, {}, ["row 0", "'target'", "str ' '"]),
    "no references": (
        WRITING,
        {"text": ["a", "a"], "target": ["a", "a"], "references": [["a"], []]},
        {},
        ["row 1", "'references'", "list []"],
    ),
    "null reference": (
        WRITING,
        {"text": ["a"], "target": ["a"], "references": [["a", None]]},
        {},
        ["row 0", "'references'", "null"],
    ),
    "too long": (SENTIMENT, TOO_LONG, {"max_tokens": 8}, ["row 1", "at most 8", "got 9", "text 8 + target 1"]),
    "too long for a pair": (
        ENCODING,
        {"text": ["a", "a a a"], "pair": ["a", "a a"], "label": ["pos", "pos"]},
        {"max_tokens": 7},
        ["row 1", "at most 7", "got 8", "3 special"],
    ),
    "target too long": (
        WRITING,
        {"text": ["a"], "target": ["good " * 9]},
        {"max_tokens": 8, "truncation": True},
        ["row 0", "at most 8", "got 14", "target 10", "'text' cut away"],
    ),
    "rest too long": (
        SENTIMENT,
        TOO_LONG,
        {"max_tokens": 4, "truncation": True},
        ["row 0", "at most 4", "got 5", "'text' cut away"],
    ),
    "no room": (
        ENCODING,
        {"text": ["a"], "pair": ["a"], "label": ["pos"]},
        {"max_tokens": 3, "truncation": True},
        ["max_tokens", "3 special tokens", "got 3"],
    ),
    "zero": (SENTIMENT, TOO_LONG, {"max_tokens": 0}, ["max_tokens", "got 0"]),
    "negative": (WRITING, {"text": ["a"], "target": ["a"]}, {"max_tokens": -3}, ["max_tokens", "got -3"]),
    "fraction": (SENTIMENT, TOO_LONG, {"max_tokens": 8.5}, ["max_tokens", "got 8.5"]),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits(wordwise: PreTrainedTokenizerBase, case: str) -> None:
    task, rows, options, parts = SPLITS[case]
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
    where = [] if "max_tokens" in parts else ["dev.jsonl"]
    refused(
        lambda: task.encode(dataset, wordwise, **{"max_tokens": 50, "source_name": "dev.jsonl", **options}),
        *where,
        *parts,
    )


def test_no_eos(bert: PreTrainedTokenizerBase) -> None:
    dataset = Dataset.from_dict({"text": ["a"], "target": ["a"]})
    refused(lambda: WRITING.encode(dataset, bert, max_tokens=50), "EOS", "end_with_eos=False")


TASKS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "template as text": (
        lambda: ClassificationTask("{text}", SENTIMENT.verbalizer),  # type: ignore[arg-type]
        ["template", "Template", "str '{text}'"],
    ),
    "words as a dict": (
        lambda: ClassificationTask(SENTIMENT.template, {"a": "b"}),  # type: ignore[arg-type]
        ["verbalizer", "Verbalizer", "dict"],
    ),
    "label in the text": (
        lambda: ClassificationTask(Template("{text} {label}"), SENTIMENT.verbalizer),
        ["'label'", "its own answer"],
    ),
    "target in the text": (lambda: GenerationTask(Template("{target}")), ["'target'", "its own answer"]),
    "no column name": (lambda: GenerationTask(Template("{a}"), ""), ["target_column", "str ''"]),
    "text as label": (lambda: SequenceClassificationTask("a", None, "a", ("x", "y")), ["'a' for both"]),
}


@pytest.mark.parametrize("case", TASKS)
def test_tasks(case: str) -> None:
    action, parts = TASKS[case]
    refused(action, *parts)


METRICS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "no rows": (lambda: classification_metrics([], [], ["a", "b"]), ["at least one row", "got 0"]),
    "lengths": (lambda: classification_metrics([0, 1], [0], ["a", "b"]), ["2 gold labels", "got 1"]),
    "gold class": (lambda: classification_metrics([0, 2], [0, 1], ["a", "b"]), ["gold, row 1", "0 to 1", "int 2"]),
    "predicted name": (
        lambda: classification_metrics([0], ["a"], ["a", "b"]),  # type: ignore[list-item]
        ["predicted, row 0", "str 'a'"],
    ),
    "no texts": (lambda: generation_metrics([], []), ["at least one row"]),
    "text lengths": (lambda: generation_metrics(["a"], [["a"], ["b"]]), ["2 rows of references", "got 1"]),
    "no reference": (lambda: generation_metrics(["a", "b"], [["a"], []]), ["references, row 1", "list []"]),
    "bare reference": (lambda: generation_metrics(["a"], ["abc"]), ["references, row 0", "str 'abc'"]),
    "no text": (
        lambda: generation_metrics([None], [["a"]]),  # type: ignore[list-item]
        ["predictions, row 0", "null"],
    ),
    "tokenizer": (lambda: generation_metrics(["a"], [["a"]], bleu_tokenizer="jp"), ["13a, zh", "'jp'"]),
}


@pytest.mark.parametrize("case", METRICS)
def test_metrics(case: str) -> None:
    action, parts = METRICS[case]
    refused(action, *parts)


BATCHES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "no rows": (lambda: ShuffledBatches(0, 1, 0), ["num_rows", "at least 1", "got 0"]),
    "no batch": (lambda: ShuffledBatches(1, 0, 0), ["batch_size", "got 0"]),
    "seed": (lambda: ShuffledBatches(1, 1, -1), ["seed", "at least 0", "got -1"]),
    "fraction": (lambda: ShuffledBatches(1, 2.0, 0), ["batch_size", "got 2.0"]),  # type: ignore[arg-type]
    "bool": (lambda: ShuffledBatches(True, 2, 0), ["num_rows", "got True"]),
    "nothing to pack": (lambda: collate([]), ["at least one row"]),
    "two tasks": (
        lambda: collate([EncodedRow([1], [1], 4, 0, class_id=0), EncodedRow([1], [1], 7, 0)]),
        ["one task", "class_id", "row 7"],
    ),
    "two kinds": (
        lambda: collate([EncodedRow([1], [1], 4, 0), EncodedRow([1], [1], 7, 0, token_type_ids=[0])]),
        ["one task", "token_type_ids", "row 4"],
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches(case: str) -> None:
    action, parts = BATCHES[case]
    refused(action, *parts)


STATES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rows": ({"num_rows": 11}, ["num_rows=10", "got 11"]),
    "batch size": ({"batch_size": 4}, ["batch_size=3", "got 4"]),
    "seed": ({"seed": 2}, ["seed=1", "got 2"]),
    "position": ({"batch_index": 4}, ["batch_index below 4", "got 4"]),
    "epoch": ({"epoch": -1}, ["epoch", "got -1"]),
}


@pytest.mark.parametrize("case", STATES)
def test_states(case: str) -> None:
    change, parts = STATES[case]
    batches = ShuffledBatches(10, 3, 1)
    refused(lambda: batches.load_state_dict({**batches.state_dict(), **change}), *parts)
    refused(lambda: batches.load_state_dict({"epoch": 0}), "entries", "['epoch']")
