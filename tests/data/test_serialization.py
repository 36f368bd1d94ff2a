"""Tasks as json: every kind there is, and values that are the same before a file and after it."""

from __future__ import annotations

import inspect
import json

import pytest

from ptengine import data
from ptengine.data import (
    ClassificationTask,
    EmbeddingTask,
    GenerationTask,
    MaskedClassificationTask,
    QuestionAnsweringTask,
    Seq2SeqClassificationTask,
    Seq2SeqTask,
    SequenceClassificationTask,
    Task,
    Template,
    TokenClassificationTask,
    Verbalizer,
)
from ptengine.data.serialization import task_from_json, task_to_json

WORDS = Verbalizer({"bad": " poor", "good": [" fine", " great"]})
TASKS = [
    ClassificationTask(Template("{text}"), WORDS, "stars"),
    MaskedClassificationTask(Template("{text} {mask}"), WORDS),
    Seq2SeqClassificationTask(Template("{text}"), WORDS),
    GenerationTask(Template("{a} {b}"), "text", end_with_eos=False),
    Seq2SeqTask(Template("{a}"), "text", references_column="all"),
    SequenceClassificationTask("a", "b", "y", ("no", "yes")),
    QuestionAnsweringTask(start_column="start", stride=8),
    TokenClassificationTask(labels=("O", "B-PER")),
    EmbeddingTask("a", "b", "same", "1", temperature=0.1),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_task_is_the_same_before_a_file_and_after_it(task: Task) -> None:
    """Tuples of labels would not equal the lists of a plan that was saved, and no run could go on."""
    written = task_to_json(task)
    read = json.loads(json.dumps(written))
    assert read == written
    assert task_from_json(read) == task
    assert set(task.text_columns) <= set(task.columns)


def test_every_kind_of_task_is_tried() -> None:
    classes = (getattr(data, name) for name in data.__all__)
    kinds = {cls.kind for cls in classes if inspect.isclass(cls) and Task in cls.__mro__ and hasattr(cls, "kind")}
    assert kinds == {task.kind for task in TASKS}
