"""Tasks as json values and back, so that a saved prompt can say what it was tuned for.

Knows the fields of the tasks; no files, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from ptengine.data.cells import described, listed
from ptengine.data.embedding_tasks import EmbeddingTask
from ptengine.data.masked_tasks import MaskedClassificationTask
from ptengine.data.question_answering import QuestionAnsweringTask
from ptengine.data.seq2seq_task import Seq2SeqClassificationTask, Seq2SeqTask
from ptengine.data.tasks import ClassificationTask, GenerationTask, SequenceClassificationTask, Task, VerbalizedTask
from ptengine.data.templates import Template
from ptengine.data.token_tasks import TokenClassificationTask
from ptengine.data.verbalizers import Verbalizer
from ptengine.errors import InputError

__all__ = ["task_from_json", "task_to_json"]


def task_to_json(task: Task) -> dict[str, Any]:
    """`task` as json values; `task_from_json` gives an equal task back. The order of labels is kept.

    Raises:
        InputError: not a task of `ptengine.data`.
    """
    if isinstance(task, VerbalizedTask):
        return {
            "kind": task.kind,
            "template": task.template.text,
            "label_words": {label: list(words) for label, words in task.verbalizer.words.items()},
            "label_column": task.label_column,
        }
    if isinstance(task, GenerationTask):
        return {
            "kind": task.kind,
            "template": task.template.text,
            "target_column": task.target_column,
            "end_with_eos": task.end_with_eos,
            "references_column": task.references_column,
        }
    if isinstance(task, EmbeddingTask | QuestionAnsweringTask | SequenceClassificationTask | TokenClassificationTask):
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(task).items()}
        return {"kind": task.kind, **values}
    raise InputError(f"expected a task of ptengine.data, got {type(task).__name__}")


def task_from_json(value: Any) -> Task:
    """The task that `task_to_json` wrote.

    Raises:
        InputError: not an object, an unknown kind, fields missing or too many, or a field that its task refuses.
    """
    if not isinstance(value, Mapping) or value.get("kind") not in _KINDS:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        raise InputError(f"expected a task of the kind {' or '.join(_KINDS)}, got {described(kind)}")
    make, names = _KINDS[value["kind"]]
    if set(value) != {"kind", *names}:
        raise InputError(
            f"expected a {value['kind']} task with the fields {', '.join(names)}, got {listed([*map(str, value)])}"
        )
    return make(**{name: value[name] for name in names})


def _classification(template: Any, label_words: Any, label_column: Any, make: type[VerbalizedTask]) -> Task:
    return make(Template(template), Verbalizer(label_words), label_column)


def _generation(
    template: Any, target_column: Any, end_with_eos: Any, references_column: Any, make: type[GenerationTask]
) -> Task:
    if not isinstance(end_with_eos, bool):
        raise InputError(f"expected end_with_eos as true or false, got {described(end_with_eos)}")
    return make(Template(template), target_column, end_with_eos, references_column)


_NAMING = ("template", "label_words", "label_column")
_WRITING = ("template", "target_column", "end_with_eos", "references_column")
_KINDS: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
    **{
        cls.kind: (partial(_classification, make=cls), _NAMING)
        for cls in (ClassificationTask, MaskedClassificationTask, Seq2SeqClassificationTask)
    },
    **{cls.kind: (partial(_generation, make=cls), _WRITING) for cls in (GenerationTask, Seq2SeqTask)},
    **{
        cls.kind: (cls, tuple(field.name for field in fields(cls)))
        for cls in (EmbeddingTask, QuestionAnsweringTask, SequenceClassificationTask, TokenClassificationTask)
    },
}
