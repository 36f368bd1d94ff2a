"""Judging: per-label scores and the confusion matrix against counts by hand."""

from __future__ import annotations

from types import ModuleType

import pytest

from ptengine.training import evaluate
from ptengine.transfer.evaluation import judge


def test_scores_follow_from_the_predictions(tiny: ModuleType) -> None:
    model, tokens, task, rows = tiny.gpt2(), tiny.tokenizer(), tiny.words_task(), tiny.rows(30, 4)
    prompt = tiny.soft(model, 2)
    judged = judge(model, tokens, task, rows, prompt, batch_size=8)
    said = evaluate(model, prompt, task, rows, tokens, batch_size=8).predictions
    pairs = [(row["label"], predicted) for row, predicted in zip(rows, said, strict=True)]
    assert judged.correct == tuple(float(gold == predicted) for gold, predicted in pairs)
    assert judged.confusion == [[pairs.count((gold, other)) for other in task.labels] for gold in task.labels]
    for name in task.labels:
        hits = pairs.count((name, name))
        called = sum(predicted == name for _, predicted in pairs)
        support = sum(gold == name for gold, _ in pairs)
        scores = judged.by_label[name]
        assert scores.support == support
        assert scores.recall == pytest.approx(hits / support)
        assert scores.precision == pytest.approx(hits / called if called else 0)
    assert judged.metrics["accuracy"] == pytest.approx(sum(judged.correct) / 30)
