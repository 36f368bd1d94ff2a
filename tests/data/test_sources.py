"""Sources: every form of data comes out as the same rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet

from ptengine.data import check_columns, load_rows, named_rows
from ptengine.errors import InputError

ROWS = [
    {"text": 'Hello, {you}\nand "me" 猫 \u2028 end', "label": "ham"},
    {"text": "NA", "label": "spam"},
    {"text": "007", "label": "ham"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".csv":
            Dataset.from_list(rows).to_csv(path, index=False)
        case ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet", "A [1]*?.csv", "A [1]*?.parquet"])
def test_files_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    """Also a name that `datasets` would read as a pattern, and csv cells that pandas would read as null or number."""
    path = write(tmp_path / name, ROWS)
    for source in (path, str(path)):
        assert load_rows(source).to_list() == ROWS
    assert load_rows(path).cache_files == []


def test_in_memory_forms() -> None:
    assert load_rows(ROWS).to_list() == ROWS
    assert load_rows(tuple(ROWS)).to_list() == ROWS
    dataset = Dataset.from_list(ROWS)
    assert load_rows(dataset) is dataset


def test_a_missing_key_is_null_wherever_it_first_appears(tmp_path: Path) -> None:
    """`Dataset.from_list` alone takes the columns of the first row and drops the others."""
    rows = [{"text": "a"}, {"text": "b", "label": "x"}]
    expected = [{"text": "a", "label": None}, {"text": "b", "label": "x"}]
    assert load_rows(rows).to_list() == expected
    assert load_rows(write(tmp_path / "a.jsonl", rows)).to_list() == expected


def test_csv_cells_are_text_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ufeff,text,label\n0,null,01\n1,,true\n\n2,None\n", encoding="utf-8")
    assert load_rows(path)[:] == {
        "Unnamed: 0": ["0", "1", "2"],
        "text": ["null", None, "None"],
        "label": ["01", "true", None],
    }


def test_csv_lines_of_blanks_are_cells(tmp_path: Path) -> None:
    """They were dropped, so that answers no longer lay beside their rows; lines of nothing are no rows."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'\r\ntext\r\nb\r\n  \r\n\r\n""\r\n"c\r\n\r\nd"\r\n\t\r\n\r\n')
    assert load_rows(path)["text"][:] == ["b", "  ", None, "c\r\n\r\nd", "\t"]
    path.write_text("text,label\n \na,b\n\n")
    assert load_rows(path).to_list() == [{"text": " ", "label": None}, {"text": "a", "label": "b"}]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.map_(pyarrow.string(), pyarrow.int32()),
        pyarrow.list_view(pyarrow.int32()),
        pyarrow.struct([("a", pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.int32())))]),
    ],
    ids=str,
)
def test_a_parquet_column_of_a_type_that_datasets_does_not_know(tmp_path: Path, kind: pyarrow.DataType) -> None:
    """It made the whole file unreadable, and was not named; the features of the others stay."""
    path = tmp_path / "a.parquet"
    dataset = Dataset.from_list(ROWS).cast_column("label", datasets.ClassLabel(names=["ham", "spam"]))
    table = dataset.data.table.append_column("odd", pyarrow.nulls(len(ROWS), kind))
    parquet.write_table(table, path)
    written = parquet.read_schema(path).field("odd").type
    with pytest.warns(UserWarning, match=re.escape(f"{path}: left out 'odd' of type {written}, which")):
        rows = load_rows(path)
    assert rows.features == dataset.features
    assert rows.to_list() == dataset.to_list()
    parquet.write_table(table.select(["odd"]), path)
    with pytest.raises(InputError, match="expected a column of a type that datasets knows, got 'odd' of type "):
        load_rows(path)


def test_parquet_whose_first_group_of_rows_is_empty(tmp_path: Path) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema) as file:
        for texts in ([], ["a", "b"]):
            file.write_table(pyarrow.table({"text": texts}, schema=schema))
    assert load_rows(tmp_path / "a.parquet").to_list() == [{"text": "a"}, {"text": "b"}]


def test_json_strings_that_look_like_dates_stay_text(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01", "label": "12:30:00"}]
    for name in ("a.jsonl", "a.json"):
        assert load_rows(write(tmp_path / name, rows)).to_list() == rows


def test_one_object_a_line_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    assert load_rows(path)["text"][:] == ["a", "b"]


def test_mixed_numbers_are_one_type() -> None:
    assert load_rows([{"x": 1}, {"x": 2.5}, {"x": None}])["x"][:] == [1.0, 2.5, None]


MIXED: dict[str, list[Any]] = {
    "strings that are json": ["01", "1", 1, "1e5", "007", "1.10", "null", "true", '"a"', "[1, 2]", "NaN"],
    "types": [1, "a", 0.57, True, None, ["b"], {"c": "d"}],
    "numbers": ["a", 0.3, 0.57, -6.289230917932447e299, 1.0, 10**20],
    "lists": [["01", 1], ["1", None], []],
    "nested": [[["01"]], [[1, "1e5"]]],
    "dicts": [{"a": "01"}, {"b": "1", "a": 0.3}, {}],
    "dicts in lists": [[{"a": "01"}, {"b": 0.3}], [{"a": 1}]],
}


@pytest.mark.parametrize("case", MIXED)
def test_values_beside_others_of_another_type_were_changed(tmp_path: Path, case: str) -> None:
    """A string that was JSON by itself came back as its value: labels "01" and "1" became one, 0.3 gained digits."""
    values = MIXED[case]
    rows = [{"x": value, "y": "007"} for value in values]
    for source in (rows, write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.json", rows)):
        dataset = load_rows(source)
        several, one_by_one = dataset.with_format(None).select_columns(["x"])[:]["x"], [row["x"] for row in dataset]
        assert [repr(value) for value in several] == [repr(value) for value in values]
        assert [repr(value) for value in one_by_one] == [repr(value) for value in values]
        assert dataset["y"][:] == ["007"] * len(values)


def test_numpy_values_beside_others() -> None:
    rows = [{"x": np.int64(3)}, {"x": "03"}, {"x": np.array([1.5])}]
    assert load_rows(rows)["x"][:] == [3, "03", [1.5]]


def test_real_data_fast_and_quiet(shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_rows(shared / "data" / "cb" / "train.jsonl")
    start = time.perf_counter()
    dataset = load_rows(shared / "data" / "sst2" / "train.jsonl")
    elapsed = time.perf_counter() - start
    assert dataset.num_rows == 5000
    assert set(dataset["label"]) == {"positive", "negative"}
    assert elapsed < 3  # 0.3 s on a quiet machine
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["sms_spam", "trec6", "e2e_nlg", "rte", "weibo_emotion_ewect"])
def test_real_data_whole(shared: Path, name: str) -> None:
    for path in sorted((shared / "data" / name).glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        assert load_rows(path).to_list() == [json.loads(line) for line in lines if line]


def test_restores_the_settings_of_datasets(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    with pytest.raises(InputError):
        load_rows(bad)
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == (verbosity, bars)


def test_leaves_no_cache_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ROWS)
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    code = f"from ptengine.data import load_rows; print(load_rows({str(path)!r})[1])"
    unset = ("HF_", "XDG_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(ROWS[1])
    assert not [found for found in home.rglob("*") if "datasets" in found.parts]
    assert not list(scratch.glob("ptengine*"))


def test_check_columns() -> None:
    dataset = load_rows(ROWS)
    check_columns(dataset, ["text", "label"], "train")
    with pytest.raises(InputError, match="train: expected columns 'a', 'b', got the columns 'text', 'label'"):
        check_columns(dataset, ["a", "text", "b", "a"], "train")


def test_a_dataset_of_mixed_values_may_be_mapped() -> None:
    """datasets took the text that came back for encoded, and could not read it."""
    rows = load_rows([{"text": "a", "label": "01"}, {"text": "b", "label": 2}, {"text": "c", "label": 0.3}])
    mapped = rows.map(lambda row: {"said": str(row["label"])})  # what is read is written again
    assert mapped[0] == {"text": "a", "label": "01", "said": "01"}


def test_classes_by_name() -> None:
    """Rows as dicts had the numbers, which tasks then took for labels: of others, where names are numbers, too."""
    labels = datasets.ClassLabel(names=["1", "0"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels, "tags": datasets.List(labels)})
    rows = [{"text": "a", "label": 0, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": None}]
    assert named_rows(datasets.Dataset.from_list(rows, features=features)) == [
        {"text": "a", "label": "1", "tags": ["1", "0"]},
        {"text": "b", "label": None, "tags": None},
    ]
