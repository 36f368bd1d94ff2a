"""Rows from wherever they lie: a file, a list or a data set, always as a `datasets.Dataset`.

Reading is left to `datasets` and `json`; this room adds one clear error per defect and leaves no cache behind.
Knows nothing of templates, labels or tokens.
"""

from __future__ import annotations

import contextlib
import csv
import json
import numbers
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, Features, Value
from datasets.features.features import generate_from_arrow_type
from pandas.errors import ParserWarning
from pyarrow.parquet import ParquetFile

from ptengine.data.cells import described, listed, place
from ptengine.errors import InputError

__all__ = ["check_columns", "class_name", "load_rows", "name_of", "named_rows"]

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Dataset, *, name: str = "train"
) -> Dataset:
    """Read rows into memory.

    Args:
        source: one of
            a path, whose suffix decides:
                ``.csv``: comma-separated, a header line, UTF-8. Every cell is text exactly as written (``007`` and
                ``NA`` stay so); an empty cell is null. A row shorter than the header has nulls at its end; a line
                with nothing in it is no row.
                ``.jsonl``: one object a line; ``.json``: a list of objects, or one object a line. UTF-8. Otherwise as a
                sequence of dicts;
                ``.parquet``; a column of a type that datasets does not know, such as a map, is left out with a warning;
            a sequence of dicts: a key that a row lacks is null; values of several types may stand in one column and
            stay what they are (ints beside floats alone become floats);
            a `datasets.Dataset`, returned as it is.
        name: what errors call data that has no file name.

    Returns:
        A data set of at least one row. Files are held in memory: no cache is left anywhere.

    Raises:
        InputError: no such file, unknown suffix, malformed content (with the line where known), no rows, a value
            that no column can hold (with its row), a `DatasetDict` (lists its splits), or a source of another type.
    """
    if isinstance(source, str | os.PathLike):
        return _load_file(Path(source))
    if isinstance(source, Mapping) and all(isinstance(part, Dataset) for part in source.values()) and source:
        raise InputError(
            f"{name}: expected one data set, got a {type(source).__name__} with the splits {listed(list(source))}; "
            "pass one of them"
        )
    if isinstance(source, Dataset):
        if source.num_rows == 0:
            raise InputError(f"{name}: expected at least one row, got a data set without rows")
        return source
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return _from_rows(source, name)
    raise InputError(
        f"{name}: expected a path, a list of dicts or a datasets.Dataset, got an object of type {type(source).__name__}"
    )


def name_of(source: object, name: str) -> str:
    """What errors call `source`: its path where it is a file, else `name`."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else name


def named_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows as dicts, in which a class of a `datasets.ClassLabel` column has its name, and -1 is null."""
    features = {name: feature for name, feature in dataset.features.items() if _has_classes(feature)}
    return [
        {**row, **{name: _named(feature, row[name]) for name, feature in features.items()}}
        for row in dataset.with_format(None)
    ]


def _has_classes(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.List) and _has_classes(feature.feature)
    )


def _named(feature: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, datasets.List):
        return [_named(feature.feature, one) for one in value]
    return class_name(feature, value)


def class_name(feature: Any, value: Any) -> Any:
    """The name of a class of a `datasets.ClassLabel` column, None for the -1 by which it says "no label"; any other
    value as it is."""
    if not isinstance(feature, datasets.ClassLabel) or not isinstance(value, int):
        return value
    return feature.int2str(value) if value >= 0 else None


def check_columns(dataset: Dataset, needed: Sequence[str], source_name: str) -> None:
    """Refuse a data set that lacks one of the needed columns, naming the columns it has."""
    missing = [column for column in dict.fromkeys(needed) if column not in dataset.column_names]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise InputError(
            f"{source_name}: expected column{plural} {listed(missing)}, got the columns {listed(dataset.column_names)}"
        )


def _from_rows(rows: Sequence[Any], name: str) -> Dataset:
    if not rows:
        raise InputError(f"{name}: expected at least one row, got an empty {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"{place(name, index)}: expected a dict of columns, got {described(row)}")
        if not row or not all(isinstance(key, str) for key in row):
            raise InputError(f"{place(name, index)}: expected columns named by strings, got the keys {list(row)}")
    columns = {
        column: [row.get(column) for row in rows] for column in dict.fromkeys(key for row in rows for key in row)
    }
    # Values of several types in a column stay what they are; a column no task reads must not spoil the others.
    mixed = {column: _as_json(values, column, name) for column, values in columns.items() if _is_mixed(values)}
    try:
        dataset = Dataset.from_dict(columns | mixed)
    except Exception as error:  # pyarrow's, datasets' and Python's own types, none of which says where
        for column, values in columns.items():
            for index, value in enumerate([] if column in mixed else values):
                try:
                    pyarrow.array([value])
                except Exception as cause:
                    raise InputError(
                        f"{place(name, index)}: expected text, a number or a list in column {column!r}, "
                        f"got {described(value)}: {_first_line(cause)}"
                    ) from error
        raise InputError(f"{name}: expected columns of text, numbers or lists, got {_first_line(error)}") from error
    for column in mixed:
        dataset = dataset.cast_column(column, _ExactJson())
    return dataset


class _ExactJson(datasets.Json):
    """Values of several types, each as JSON; datasets' own makes 0.30000000000000004 of 0.3, and 1 of the text "01"."""

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)

    def cast_storage(self, storage: pyarrow.Array) -> pyarrow.Array:
        """Also what `Dataset.map` gives back, which datasets would take for encoded where it happens to be JSON."""
        if isinstance(storage, pyarrow.JsonArray):
            return storage
        return _json_array([None if value is None else json.dumps(value) for value in storage.to_pylist()])


def _is_mixed(values: Sequence[Any]) -> bool:
    """Whether a column of one type would refuse some of the values, or fill up their dicts with nulls."""
    levels = [values]
    while levels:
        present = [value for value in levels.pop() if value is not None]
        kinds = {_kind(value) for value in present}
        if len(kinds) > 1:
            return True
        if kinds == {list}:
            levels.append([member for value in present for member in value])
        if kinds == {dict}:
            keys = {frozenset(value) for value in present}
            if len(keys) > 1:
                return True
            levels += [[value[key] for value in present] for key in keys.pop()]
    return False


# bool before the numbers, of which it is one.
_KINDS: dict[type, tuple[type, ...]] = {
    str: (str,), bool: (bool, np.bool_), float: (numbers.Real,), list: (list, tuple), dict: (Mapping,),
}  # fmt: skip


def _kind(value: Any) -> type:
    return next((kind for kind, types in _KINDS.items() if isinstance(value, types)), object)


def _as_json(values: Sequence[Any], column: str, name: str) -> pyarrow.Array:
    """A column of JSON; encoded here, since datasets takes text that happens to be JSON (``01``) for encoded before."""
    texts: list[str | bytes | None] = []
    for index, value in enumerate(values):
        try:
            texts.append(None if value is None else json.dumps(value, ensure_ascii=False, default=_plain).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{place(name, index)}: expected text, a number, a list or a dict of such in column {column!r}, which "
                f"has values of several types, got {described(value)}: {error}"
            ) from error
    return _json_array(texts)


def _json_array(texts: Sequence[str | bytes | None]) -> pyarrow.Array:
    return pyarrow.array(texts, pyarrow.string()).cast(pyarrow.json_())


def _plain(value: Any) -> Any:
    """numpy's values as Python's, for `json`."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"no json value: {type(value).__name__}")


def _load_file(path: Path) -> Dataset:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file ending in {', '.join(_READERS)}, got {path.suffix!r}")
    if not path.exists():
        raise InputError(f"{path}: expected a file, but there is none of this name")
    if not path.is_file():
        raise InputError(f"{path}: expected a file, got a directory or device")
    _check_bytes(path, text=reader != "parquet")
    if reader == "json":
        return _from_rows(_json_objects(path), str(path))
    options = _csv_options(path) if reader == "csv" else _parquet_options(path)
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="ptengine-") as cache:
            # A plain name in a folder of our own: datasets would read brackets and stars in the user's as patterns.
            link = Path(cache) / f"rows.{reader}"
            link.symlink_to(path.resolve())
            dataset = getattr(Dataset, f"from_{reader}")(str(link), cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:  # datasets wraps pandas', pyarrow's and its own types, several per defect
        found = _csv_defect(path) if reader == "csv" else None
        if found is None and "no data" in str(error):
            found = ": expected at least one row, got none"
        raise InputError(f"{path}{found or f': expected a {reader} file, got: {_first_line(error)}'}") from error
    if dataset.num_rows == 0:
        raise InputError(f"{path}: expected at least one row, got none")
    return dataset


def _check_bytes(path: Path, text: bool) -> None:
    """A file that can be read and is not blank; UTF-8 where it is text, which the json reader would only find late."""
    blank = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                blank = blank and not line.strip()
                if not text:
                    break
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}: expected UTF-8 text, got the byte 0x{line[error.start]:02x}"
                    ) from error
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from error
    if blank:
        raise InputError(f"{path}: expected at least one row, got an empty file")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of datasets; what goes wrong becomes an exception."""
    verbosity, bars_were_off = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # pandas only warns when it drops cells beyond the header's columns.
            warnings.simplefilter("error", ParserWarning)
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()


def _csv_options(path: Path) -> dict[str, Any]:
    header: list[str] = []
    empty = []
    with path.open(encoding="utf-8-sig", newline="") as file, _cells_of_any_size():
        reader = csv.reader(file)
        try:
            for index, record in enumerate(reader):
                header = header or record
                if not record:
                    empty.append(index)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: expected well-formed csv, got: {error}") from error
    if not header:
        raise InputError(f"{path}: expected at least one row, got an empty file")
    # pandas writes its index under an empty name and reads it back under this one.
    names = [column or f"Unnamed: {index}" for index, column in enumerate(header)]
    doubled = [column for column in dict.fromkeys(names) if names.count(column) > 1]
    if doubled:
        raise InputError(f"{path}, line 1: expected columns of different names, got more than one {listed(doubled)}")
    # Types are never guessed from a csv: "NA" and "007" are words, and one odd row must not retype a column.
    return {
        "features": Features({column: Value("string") for column in names}),
        "column_names": names,
        "header": 0,
        "index_col": False,
        "keep_default_na": False,
        "na_values": [""],
        # pandas takes lines of blanks for empty; in a file of one column they are cells.
        "skip_blank_lines": False,
        "skiprows": empty,
    }


def _parquet_options(path: Path) -> dict[str, Any]:
    try:
        with ParquetFile(path) as file:
            schema, about = file.schema_arrow, file.metadata
            sizes = [about.row_group(index).num_rows for index in range(about.num_row_groups)]
    except Exception as error:  # pyarrow's own types and Python's
        raise InputError(f"{path}: expected a parquet file, got: {_first_line(error)}") from error
    if not schema.names or not any(sizes):
        raise InputError(f"{path}: expected at least one row, got none")
    doubled = [column for column in dict.fromkeys(schema.names) if schema.names.count(column) > 1]
    if doubled:
        raise InputError(f"{path}: expected columns of different names, got more than one {listed(doubled)}")
    options: dict[str, Any] = {"batch_size": max(sizes)}  # by default that of the first group, which may be empty
    unknown = [field for field in schema if not _has_feature(field.type)]
    if not unknown:
        return options
    types = ", ".join(f"{field.name!r} of type {field.type}" for field in unknown)
    if len(unknown) == len(schema):
        raise InputError(f"{path}: expected a column of a type that datasets knows, got {types}")
    # A column no task reads must not spoil the others.
    warnings.warn(f"{path}: left out {types}, which datasets does not know", stacklevel=4)
    known = pyarrow.schema([field for field in schema if field not in unknown], schema.metadata)
    return options | {"columns": known.names, "features": Features.from_arrow_schema(known)}


def _has_feature(kind: pyarrow.DataType) -> bool:
    try:
        generate_from_arrow_type(kind)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """`csv` refuses cells of more than 131072 characters, which pandas reads."""
    limit = csv.field_size_limit(2**31 - 1)  # what a C long holds everywhere
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_defect(path: Path) -> str | None:
    """Where a csv file that pandas refused goes wrong; pandas does not always say."""
    width, line = None, 1
    with path.open(encoding="utf-8-sig", newline="") as file, _cells_of_any_size():
        reader = csv.reader(file, strict=True)
        try:
            for record in reader:
                if record and width is None:
                    width = len(record)
                elif width is not None and len(record) > width:
                    return f", line {line}: expected {width} fields as in the header, got {len(record)}"
                line = reader.line_num + 1
        except csv.Error as error:
            return f", line {line}: expected well-formed csv, got: {error} (is a quote left open?)"
    return None


def _json_objects(path: Path) -> list[Any]:
    """The entries of a JSON list, or of a file with one object a line.

    Read with `json`, not through `datasets`, whose reader turns text that looks like a date into dates.
    """
    # Neither newline translation nor splitlines(): JSON strings may hold the Unicode line separators as they are.
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise InputError(f"{path}: expected JSON that is nested less deeply, got: {error}") from error
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object a line is welcome in .json too
                raise InputError(
                    f"{path}, line {error.lineno}, column {error.colno}: expected JSON, got: {error.msg}"
                ) from error
        else:
            return value if isinstance(value, list) else [value]
    objects = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError as error:
            raise InputError(
                f"{path}, line {number}: expected JSON that is nested less deeply, got: {error}"
            ) from error
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}, column {error.colno}: expected a JSON object, got: {error.msg}"
            ) from error
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object of columns, got {described(value)}")
        objects.append(value)
    return objects


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
