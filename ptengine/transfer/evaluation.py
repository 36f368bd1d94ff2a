"""A prompt judged on labelled rows: the usual scores, by label too, and which rows were right, for paired intervals.

Knows tasks with labels and the frozen model; nothing of transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ptengine.data import LabelledTask
from ptengine.prompts.base import Prompt
from ptengine.training import evaluate

__all__ = ["Judged", "LabelScores", "baselines", "judge"]


@dataclass(frozen=True)
class LabelScores:
    """Attributes: `precision`, `recall` and `f1` of one label, fractions (0 where undefined), and its gold rows,
    `support`."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Judged:
    """Attributes:
    metrics: those of `ptengine.training.evaluate`: accuracy, macro, micro and weighted F1 and the loss in nats.
    by_label: label to its scores, in the task's order.
    confusion: rows are gold labels, columns predicted ones, both in the task's order.
    correct: per row 1.0 where it was labelled right.
    """

    metrics: Mapping[str, float]
    by_label: Mapping[str, LabelScores]
    confusion: Sequence[Sequence[int]]
    correct: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """Json values, without the single rows."""
        return {
            "metrics": dict(self.metrics),
            "by_label": {name: asdict(scores) for name, scores in self.by_label.items()},
            "confusion": [list(row) for row in self.confusion],
        }


def judge(
    model: Any,
    tokenizer: Any,
    task: LabelledTask,
    rows: Sequence[Mapping[str, Any]],
    prompt: Prompt | None,
    **options: Any,
) -> Judged:
    """Score `prompt`, or the frozen model without one, on `rows`; `options` and errors as `training.evaluate`."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    result = evaluate(model, prompt, task, rows, tokenizer, **options)
    labels = list(task.labels)
    gold = [str(row[task.label_column]) for row in rows]
    scores = precision_recall_fscore_support(gold, result.predictions, labels=labels, zero_division=0)
    by_label = {
        name: LabelScores(float(precision), float(recall), float(f1), int(support))
        for name, precision, recall, f1, support in zip(labels, *scores, strict=True)
    }
    return Judged(
        metrics=result.metrics,
        by_label=by_label,
        confusion=confusion_matrix(gold, result.predictions, labels=labels).tolist(),
        correct=tuple(float(said == label) for said, label in zip(result.predictions, gold, strict=True)),
    )


def baselines(
    rows: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]], task: LabelledTask
) -> dict[str, float]:
    """Test accuracy of what needs no language model, trained on `rows`: the most frequent label, and naive Bayes.

    The latter counts character n-grams of one to three, which serves languages with and without blanks.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    def texts(data: Sequence[Mapping[str, Any]]) -> list[str]:
        return ["\n".join(str(row[column]) for column in task.text_columns) for row in data]

    labels, gold = ([str(row[task.label_column]) for row in data] for data in (rows, test))
    models = {
        "majority class": DummyClassifier(strategy="most_frequent"),
        "bag of characters": make_pipeline(CountVectorizer(analyzer="char", ngram_range=(1, 3)), MultinomialNB()),
    }
    return {name: float(model.fit(texts(rows), labels).score(texts(test), gold)) for name, model in models.items()}
