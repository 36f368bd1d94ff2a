"""The options that describe a task, and the task they describe.

Which kind of task it is follows from the options that are given; options of two kinds are refused.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ptengine.commands.options import read_label_words, refuse, require, unescape, whole
from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.data import LabelledTask, Task, Template, VerbalizedTask, Verbalizer

__all__ = ["add_task_arguments", "classification_task", "labelled_task", "make_task"]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What a row asks of the model: kinds of task, told apart by the options given."""
    group = parser.add_argument_group(
        "task",
        "classification by words: --template (and --label-words); generation: --template and --target-column; "
        "classification by a trained head, for BERT models: --text-column; answers in a text, for BERT models: "
        "--question-column; labels of words, for BERT models: --tokens-column; embeddings, for BERT models: "
        "--embedding",
    )
    group.add_argument(
        "--template",
        metavar="TEXT",
        help=r"text of a row, such as 'Review: {text}\nGood or bad?'; {mask} is the blank of a masked language model, "
        "{prompt:10} the place of ten virtual tokens (default: before the text)",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="the template is what the user says to an instruction-tuned model: its chat template goes around it, and "
        "labels of the data are their own words, without a blank",
    )
    group.add_argument("--system", metavar="TEXT", help="what the system says first, with --chat")
    group.add_argument(
        "--label-words",
        metavar="WORDS",
        help="'ham= ham,spam= spam' or a .json file (default: each label of the data after a blank)",
    )
    group.add_argument("--label-column", metavar="NAME", help="column of the label (default: label)")
    group.add_argument("--target-column", metavar="NAME", help="column of the text to write")
    group.add_argument("--text-column", metavar="NAME", help="column of the text to classify")
    group.add_argument("--text-pair-column", metavar="NAME", help="column of a second text")
    group.add_argument(
        "--embedding", action="store_true", help="embeddings: texts of two columns that match are to be near"
    )
    group.add_argument("--positive-label", metavar="NAME", help="label of pairs that match (default: all pairs do)")
    group.add_argument("--tokens-column", metavar="NAME", help="column of a list of words to label")
    group.add_argument("--tags-column", metavar="NAME", help="column of their labels (default: tags)")
    group.add_argument("--question-column", metavar="NAME", help="column of a question that a text answers")
    group.add_argument("--context-column", metavar="NAME", help="column of that text (default: context)")
    group.add_argument("--answer-column", metavar="NAME", help="column of the answer in it (default: answer)")
    group.add_argument("--start-column", metavar="NAME", help="column of the answer's first character (default: found)")
    group.add_argument("--stride", type=whole(0), metavar="N", help="tokens that windows of a text share (default: 64)")
    group.add_argument("--max-answer-length", type=whole(1), metavar="N", help="of an answer, in tokens (default: 30)")


_QUESTION_OPTIONS = (
    "question_column", "context_column", "answer_column", "start_column", "stride", "max_answer_length",
)  # fmt: skip


def make_task(args: argparse.Namespace) -> Task:
    """The task that the options describe; options of another kind of task are refused."""
    from ptengine.commands.loading import is_seq2seq
    from ptengine.data import (
        EmbeddingTask,
        GenerationTask,
        Seq2SeqTask,
        SequenceClassificationTask,
        Template,
        TokenClassificationTask,
        Verbalizer,
    )

    if not args.chat:
        require(args, "--chat", "system")
    if any(getattr(args, name) is not None for name in _QUESTION_OPTIONS):
        return _question_task(args)
    if args.embedding:
        refuse(args, "--embedding", "template", "label_words", "target_column", "tokens_column", "tags_column", "chat")
        label = (args.label_column or "label") if args.positive_label is not None else args.label_column
        columns = (args.text_column or "text", args.text_pair_column or "text_pair")
        return EmbeddingTask(*columns, label, args.positive_label)
    require(args, "--embedding", "positive_label")
    if args.tokens_column is not None:
        others = ("template", "chat", "label_words", "label_column", "target_column", "text_column", "text_pair_column")
        refuse(args, "--tokens-column", *others)
        tags_column = args.tags_column or "tags"
        return TokenClassificationTask(args.tokens_column, tags_column, _labels(args.train, tags_column))
    require(args, "--tokens-column", "tags_column")
    if args.text_column is not None:
        refuse(args, "--text-column", "template", "label_words", "target_column", "chat")
        label_column = args.label_column or "label"
        return SequenceClassificationTask(
            args.text_column, args.text_pair_column, label_column, _labels(args.train, label_column)
        )
    if args.template is None:
        require(args, "--template", "chat")
        raise InputError("expected --template (or --text-column for a BERT model), got neither")
    template = _chat(args) if args.chat else Template(unescape(args.template))
    if args.target_column is not None:
        refuse(args, "--target-column", "label_words", "label_column", "text_pair_column")
        return (Seq2SeqTask if is_seq2seq(args.model) else GenerationTask)(template, args.target_column)
    refuse(args, "--template", "text_pair_column")
    label_column = args.label_column or "label"
    if args.label_words is not None:
        verbalizer = Verbalizer(read_label_words(args.label_words))
    else:
        labels = _labels(args.train, label_column)
        verbalizer = Verbalizer({name: name for name in labels}) if args.chat else Verbalizer.from_labels(labels)
    return _word_task(args.model, template, verbalizer, label_column)


def _chat(args: argparse.Namespace) -> Template:
    from ptengine.commands.loading import load_tokenizer
    from ptengine.data import chat_template

    messages = [{"role": "user", "content": unescape(args.template)}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": unescape(args.system)})
    return chat_template(load_tokenizer(args.tokenizer, args.model), messages)


def labelled_task(args: argparse.Namespace, data: str, words_option: str = "--label-words") -> LabelledTask:
    """Classification by words (--template, --label-words) or by a head (--text-column), whose labels are those of the
    file `data` as cleaning leaves them. Errors call the option of the words `words_option`."""
    from ptengine.data import SequenceClassificationTask

    label_column = args.label_column or "label"
    if args.text_column is not None:
        refuse(args, "--text-column", "template", "label_words")
        labels = _labels(data, label_column, skip_missing=True)
        return SequenceClassificationTask(args.text_column, args.text_pair_column, label_column, labels)
    refuse(args, "--template", "text_pair_column")
    for option, value in (("--template", args.template), (words_option, args.label_words)):
        if value is None:
            raise InputError(
                f"expected --template and {words_option} (or --text-column for a BERT model), got no {option}"
            )
    return classification_task(args.model, args.template, args.label_words, label_column, words_option)


def classification_task(
    model: str | None, template: str, label_words: str, label_column: str, option: str = "--label-words"
) -> VerbalizedTask:
    """The task of ``--template``, ``--label-words`` and ``--label-column`` on the model of ``--model``. Errors as
    `read_label_words`."""
    from ptengine.data import Template, Verbalizer

    words = Verbalizer(read_label_words(label_words, option))
    return _word_task(model, Template(unescape(template)), words, label_column)


def _word_task(model: str | None, template: Template, verbalizer: Verbalizer, label_column: str) -> VerbalizedTask:
    """Classification by words: an encoder-decoder's, or, with a ``{mask}`` in the template, that of a masked language
    model."""
    from ptengine.commands.loading import is_seq2seq
    from ptengine.data import ClassificationTask, MaskedClassificationTask, Seq2SeqClassificationTask

    make: type[VerbalizedTask] = MaskedClassificationTask if template.num_masks else ClassificationTask
    if is_seq2seq(model):
        make = Seq2SeqClassificationTask
    return make(template, verbalizer, label_column)


def _question_task(args: argparse.Namespace) -> Task:
    from ptengine.data import QuestionAnsweringTask

    given = {name: getattr(args, name) for name in _QUESTION_OPTIONS if getattr(args, name) is not None}
    if "question_column" not in given:
        require(args, "--question-column", *given)
    others = ("template", "chat", "label_words", "label_column", "target_column", "text_column", "text_pair_column")
    refuse(args, "--question-column", *others)
    return QuestionAnsweringTask(**given)


def _labels(path: str, column: str, skip_missing: bool = False) -> tuple[str, ...]:
    """The labels of a file: those its column declares, else the distinct ones, sorted; -100 is the label of no word.

    With `skip_missing` they are read as `ptengine.transfer.cleaning` leaves them: none that is missing or blank, and
    without blanks around them."""
    from datasets import ClassLabel

    from ptengine.backbone.packing import IGNORE_INDEX
    from ptengine.data import check_columns, load_rows
    from ptengine.data.cells import described, is_null, label_name, place

    rows = load_rows(path)
    check_columns(rows, [column], path)
    feature = getattr(rows.features[column], "feature", rows.features[column])  # that of a list's members
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    found = set()
    for index, value in enumerate(rows[column]):
        for one in [tag for tag in value if tag != IGNORE_INDEX] if isinstance(value, list) else [value]:
            name = "" if is_null(one) else label_name(one)
            if skip_missing and name is not None:
                name = name.strip()
                if not name:
                    continue
            if not name:
                raise InputError(f"{place(path, index)}: expected a label in column {column!r}, got {described(one)}")
            found.add(name)
    return tuple(sorted(found))
