"""Options that several commands share, and what their texts mean.

Turns text into values and refuses what is no value; whether a value fits the model or the data is checked where it is
used. The options of a training run are made from the fields of `TrainingConfig`, so each is written once.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ptengine.errors import InputError

__all__ = [
    "DTYPES",
    "absolute",
    "add_config_arguments",
    "add_model_arguments",
    "check_output",
    "choice",
    "config_options",
    "flag",
    "number",
    "read_json",
    "read_label_words",
    "refuse",
    "require",
    "seed",
    "unescape",
    "whole",
]

DTYPES = ("float32", "bfloat16", "float16")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `low`, and at most `high` where there is one."""
    expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def seed(text: str) -> int:
    """An argparse type: a seed, in the range of `TrainingConfig.seed`."""
    from ptengine.configuration import MOST_SEED

    return whole(0, MOST_SEED)(text)


def number(text: str) -> float:
    """An argparse type: a number; its range is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def choice(*names: str) -> Callable[[str], str]:
    """An argparse type: one of `names`."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return convert


def flag(name: str) -> str:
    """How a field is spelled on the command line."""
    return "--" + name.replace("_", "-")


def refuse(args: argparse.Namespace, chosen: str, *names: str) -> None:
    """Refuse those of the options `names` that were given, since nothing reads them with `chosen`."""
    for option in _given(args, names):
        raise InputError(f"expected no {option} with {chosen}, got both")


def require(args: argparse.Namespace, needed: str, *names: str) -> None:
    """Refuse those of the options `names` that were given, since nothing reads them without `needed`."""
    for option in _given(args, names):
        raise InputError(f"expected {needed} with {option}, got {option} alone")


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of the options whose default, None or a switch that is off, was replaced."""
    values = {name: getattr(args, name) for name in names}
    return [flag(name) for name, value in values.items() if value is not None and value is not False]


def unescape(text: str) -> str:
    r"""A shell passes ``\n`` and ``\t`` as two characters each; here they become a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def read_json(path: str | Path, what: str) -> Any:
    """The content of the json file `path`.

    Raises:
        InputError: there is no such file, or it is no json.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"expected {what}, got {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"expected {what} as json, got {str(path)!r}: {error}") from error


def read_label_words(text: str, option: str = "--label-words") -> dict[str, Any]:
    """``'ham= ham,spam= spam'``, or the path of a json file ``{"ham": " ham", "spam": [" spam", " junk"]}``.

    Raises:
        InputError: an entry without ``=``, a label twice, or a file that holds no object; names `option`.
    """
    if text.endswith(".json"):
        words = read_json(text, f"{option}, a json file of labels and words")
        if not isinstance(words, dict):
            raise InputError(f"expected {option}, a json object from label to word, got {type(words).__name__}")
        return words
    words = {}
    for entry in text.split(","):
        label, equals, word = entry.partition("=")
        if not equals or not label:
            raise InputError(f"expected {option} as 'label=word,label=word' or a .json file, got {entry!r} in {text!r}")
        if label in words:
            raise InputError(f"expected different labels in {option}, got {label!r} twice")
        words[label] = unescape(word)
    return words


def check_output(folder: str | Path, option: str = "--output", hint: str = "") -> None:
    """Refuse a folder to write to that holds anything; `hint` is what to do about it."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"expected {option}, a new or empty folder, got {str(folder)!r}, which is "
            f"{f'not empty{hint}' if path.is_dir() else 'no folder'}"
        )


def absolute(path: str | None) -> str | None:
    """`path` as it can be found again from any folder."""
    return None if path is None else str(Path(path).resolve())


def add_model_arguments(
    parser: argparse.ArgumentParser, default: str, tokenizer: str = "the model's", dtype: str = DTYPES[0]
) -> None:
    """Which frozen model; `default`, `tokenizer` and `dtype` say what is taken where an option is not given."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH", help=f"folder of a transformers checkpoint (default: {default})")
    group.add_argument("--tokenizer", metavar="PATH", help=f"folder of its tokenizer (default: {tokenizer})")
    group.add_argument(
        "--dtype", type=choice(*DTYPES), metavar="NAME", help=f"of the model: {', '.join(DTYPES)} (default: {dtype})"
    )
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_config_arguments(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ("output_dir",)) -> None:
    """One option for every field of `TrainingConfig`; those not given keep the field's own default."""
    from ptengine.configuration import TrainingConfig

    group = parser.add_argument_group("training")
    hints, texts = typing.get_type_hints(TrainingConfig), _attribute_texts(TrainingConfig.__doc__ or "")
    for field in fields(TrainingConfig):
        if field.name in leave_out:
            continue
        kinds = [kind for kind in _members(hints[field.name]) if kind is not type(None)]
        optional = len(kinds) < len(_members(hints[field.name]))
        default = "" if field.default is MISSING or field.default is None else f" (default: {field.default})"
        text = (texts.get(field.name, "") + default).replace("%", "%%")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kinds == [bool] and not optional:
            group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(
                flag(field.name), type=_converter(kinds[0], optional), metavar=_METAVARS[kinds[0]], **options
            )


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `TrainingConfig` that were given."""
    from ptengine.configuration import TrainingConfig

    given = vars(args)
    return {field.name: given[field.name] for field in fields(TrainingConfig) if field.name in given}


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME", bool: "yes|no"}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _converter(kind: Any, optional: bool) -> Callable[[str], Any]:
    """Text to a field's value; ``none`` where the field may be None."""

    def convert(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if kind is str:
            return text
        if kind is bool and text.lower() in ("yes", "no"):
            return text.lower() == "yes"
        try:
            if kind is not bool:
                return kind(text)
        except ValueError:
            pass
        expected = {int: "a whole number", float: "a number", bool: "yes or no"}[kind]
        raise argparse.ArgumentTypeError(f"expected {expected}{' or none' if optional else ''}, got {text!r}")

    return convert


def _attribute_texts(docstring: str) -> dict[str, str]:
    """The ``Attributes:`` of a docstring: name to text, as one line without code marks."""
    section = inspect.cleandoc(docstring).partition("Attributes:")[2]  # from Python 3.13 on they come so
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*?)(?=^ {4}\w|\Z)", section, re.DOTALL | re.MULTILINE)
    return {name: re.sub(r"``?", "", " ".join(text.split())) for names, text in entries for name in names.split(", ")}
