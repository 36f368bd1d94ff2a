"""`ptengine generate`: texts, or labels, for new rows behind a tuned prompt."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ptengine.commands import Outcome
from ptengine.commands.options import flag, number, require, seed, whole
from ptengine.commands.session import Session, add_prompt_argument, add_session_arguments, open_prompt
from ptengine.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from ptengine.data import GenerationTask

EXAMPLE = """  ptengine generate --prompt out --text "You have won a free phone, call now"
  ptengine generate --prompt out --column source="name[Aromi], food[Chinese]" --max-new-tokens 40
  ptengine generate --prompt out --data rows.jsonl --json"""

# As the help says. What the model came with would stand in the place of any that is left out.
_WRITING = {"max_new_tokens": 64, "num_beams": 1, "do_sample": False, "temperature": 1.0, "top_p": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_argument(parser)
    rows = parser.add_argument_group("rows", "one of:")
    rows.add_argument("--text", metavar="TEXT", action="append", help="the template's only column; may be repeated")
    rows.add_argument("--column", metavar="NAME=TEXT", action="append", help="one row, column by column")
    rows.add_argument("--data", metavar="FILE", help="rows of a csv, json, jsonl or parquet file")
    writing = parser.add_argument_group("writing", "for generation tasks; a classification task answers with a label")
    writing.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="longest text (default: 64)")
    writing.add_argument("--num-beams", type=whole(1), metavar="N", help="beams (default: 1)")
    writing.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    writing.add_argument("--temperature", type=number, metavar="X", help="of sampling, above 0 (default: 1)")
    writing.add_argument("--top-p", type=number, metavar="X", help="of sampling, above 0, at most 1 (default: 1)")
    writing.add_argument("--seed", type=seed, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="rows per forward (default: 32)")
    add_session_arguments(parser)


def run(args: argparse.Namespace) -> Outcome:
    sampling = _writing_options(args)
    given = [name for name in ("text", "column", "data") if getattr(args, name) is not None]
    if len(given) != 1:
        raise InputError(f"expected one of --text, --column and --data, got {' and '.join(given) or 'none'}")
    session = open_prompt(args)
    dataset = _rows(args, session)
    source = args.data or f"--{given[0]}"
    if session.task.kind in ("generation", "seq2seq"):
        texts = _write(session, dataset, source, args.batch_size, args.seed or 0, sampling)
    else:
        if sampling:
            unused = flag(next(iter(sampling)))
            raise InputError(f"expected {unused} for a generation task only, got a task of {session.task.kind}")
        texts = _label(session, dataset, source, args.batch_size)
    return Outcome({"command": "generate", "prompt": args.prompt, "texts": texts}, tuple(texts))


def _writing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of transformers' generate that were given."""
    for name, high in (("temperature", float("inf")), ("top_p", 1.0)):
        value = getattr(args, name)
        if value is not None and not 0 < value <= high:
            raise InputError(f"expected {flag(name)} above 0{' and at most 1' if high == 1 else ''}, got {value}")
    if not args.do_sample:
        require(args, "--do-sample", "temperature", "top_p", "seed")
    return {name: getattr(args, name) for name in _WRITING if getattr(args, name) not in (None, False)}


def _rows(args: argparse.Namespace, session: Session) -> Dataset:
    from ptengine.data import load_rows

    if args.data is not None:
        return load_rows(args.data)
    columns = _text_columns(session)
    if session.task.kind == "token_classification":
        option = "--text" if args.text is not None else "--column"
        raise InputError(f"expected --data with a list of words in column {columns[0]!r} of every row, got {option}")
    if args.text is not None:
        if len(columns) != 1:
            raise InputError(f"expected --column for each of {', '.join(columns)}, got --text")
        return load_rows([{columns[0]: text} for text in args.text], name="--text")
    row = {}
    for entry in args.column:
        name, equals, text = entry.partition("=")
        if not equals:
            raise InputError(f"expected --column as NAME=TEXT, got {entry!r}")
        if name not in columns or name in row:
            raise InputError(f"expected each of the columns {', '.join(columns)} once, got --column {name!r}")
        row[name] = text
    missing = [name for name in columns if name not in row]
    if missing:
        raise InputError(f"expected each of the columns {', '.join(columns)} once, got no --column {missing[0]!r}")
    return load_rows([row], name="--column")


def _text_columns(session: Session) -> tuple[str, ...]:
    """The columns of a row that are there before its answer is known."""
    if session.task.kind == "embedding":
        raise InputError("expected a task with an answer, got one of embeddings: ptengine.embed gives those in Python")
    return session.task.text_columns


def _label(session: Session, dataset: Dataset, source: str, batch_size: int) -> list[str]:
    from ptengine.backbone import backbone_spec
    from ptengine.data import QuestionAnsweringTask, TokenClassificationTask, check_columns
    from ptengine.training import evaluate
    from ptengine.training.preparation import encode

    columns = _text_columns(session)
    task: Any = session.task
    check_columns(dataset, columns, source)
    # Scoring needs some answer in every row; no prediction depends on it.
    column: str
    answers: list[Any]
    if isinstance(task, QuestionAnsweringTask):
        task = replace(task, start_column=None)
        column, answers = task.answer_column, _first_characters(dataset, task.context_column, source)
    elif isinstance(task, TokenClassificationTask):
        # What is no list of words is refused with its row when it is encoded.
        counts = [len(words) if isinstance(words, list) else 0 for words in dataset[task.tokens_column]]
        column, answers = task.tags_column, [[task.labels[0]] * count for count in counts]
    else:
        column, answers = task.label_column, [task.labels[0]] * len(dataset)
    rows = dataset.select_columns(list(columns)).add_column(column, answers)  # type: ignore[call-arg]
    spec = backbone_spec(session.model)
    split = encode(
        task, rows, session.tokenizer, session.prompt, spec, name=source, max_length=None, truncation=False
    )  # fmt: skip
    return evaluate(session.model, session.prompt, task, split, session.tokenizer, batch_size=batch_size).predictions


def _first_characters(dataset: Dataset, column: str, source: str) -> list[str]:
    """Of every text, which is its answer for want of a better one."""
    from ptengine.data.cells import described, place, text_value

    found = []
    for index, value in enumerate(dataset[column]):
        text = text_value(value, column, source, index).strip()
        if not text:
            raise InputError(f"{place(source, index)}: expected text in column {column!r}, got {described(value)}")
        found.append(text[:1])
    return found


def _write(
    session: Session, dataset: Dataset, source: str, batch_size: int, seed: int, options: dict[str, Any]
) -> list[str]:
    import torch

    from ptengine.backbone import backbone_spec
    from ptengine.backbone.generation import generate_in_batches
    from ptengine.data.encoding import encode_texts, plain_columns
    from ptengine.training.preparation import room_for_text

    task: GenerationTask = session.task  # type: ignore[assignment]
    options = _WRITING | options
    is_pair = task.kind == "seq2seq"  # the encoder reads the text alone
    columns = plain_columns(dataset, task.template.columns, source)
    rows = encode_texts(
        task.template,
        columns,
        session.tokenizer,
        reserved=[0 if is_pair else options["max_new_tokens"]] * len(dataset),
        max_tokens=room_for_text(backbone_spec(session.model), session.prompt, None),
        truncation=False,
        source_name=source,
        closed=is_pair,
    ).tokens
    torch.manual_seed(seed)
    ending = task.ending(session.tokenizer)
    return generate_in_batches(session.model, session.prompt, rows, session.tokenizer, batch_size, ending, **options)
