"""Metrics: values known by hand, and units."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from ptengine.data import classification_metrics, generation_metrics


@pytest.mark.filterwarnings("error")
def test_classification_by_hand() -> None:
    """ham: precision 2/3, recall 1, F1 0.8; spam: precision 1, recall 1/2, F1 2/3; "other" never occurs."""
    scores = classification_metrics([0, 0, 1, 1], [0, 0, 0, 1], ["ham", "spam", "other"])
    assert scores == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (0.8 + 2 / 3) / 2, "micro_f1": 0.75, "weighted_f1": (0.8 + 2 / 3) / 2}
    )
    scores = classification_metrics([0, 0, 0, 1], [0, 0, 0, 0], ["ham", "spam"])
    assert scores["macro_f1"] == pytest.approx((6 / 7) / 2)  # a label never hit counts 0
    assert scores["weighted_f1"] == pytest.approx(0.75 * 6 / 7)


def test_perfect_generation_and_units() -> None:
    texts = ["The Eagle is a cheap coffee shop.", "It is near Burger King in the city centre."]
    scores = generation_metrics([f" {text}\n" for text in texts], [[text] for text in texts])
    assert scores == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 1, "exact_match": 1})


def test_nothing_right() -> None:
    scores = generation_metrics(["", "xyz"], [["one two"], ["three", "four"]])
    assert scores == pytest.approx({"bleu": 0, "chrf": 0, "rouge_l": 0, "exact_match": 0})


def test_any_reference_will_do_and_their_number_may_differ() -> None:
    references = [["something else entirely here", "the cat sat on the mat"], ["a dog ran over the hill"]]
    scores = generation_metrics(["the cat sat on the mat", "a dog ran over the hill"], references)
    assert scores == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 1, "exact_match": 1})
    half = generation_metrics(["the cat sat on the mat", "no"], references)
    assert half["exact_match"] == 0.5
    assert half["rouge_l"] == pytest.approx(0.5)


def test_rouge_equals_the_library_on_english() -> None:
    pairs = [("The_cat's 2nd mat -- sat", "the cat sat on 2 mats"), ("It's a PUB, near X.", "a pub near x; it is")]
    expected = sum(RougeScorer(["rougeL"]).score(b, a)["rougeL"].fmeasure for a, b in pairs) / 2
    assert generation_metrics([a for a, _ in pairs], [[b] for _, b in pairs])["rouge_l"] == pytest.approx(expected)


def test_chinese() -> None:
    """rouge-score's own tokenizer drops everything outside ASCII and scored equal Chinese texts 0."""
    assert generation_metrics(["深度学习"], [["深度学习"]])["rouge_l"] == 1
    assert generation_metrics(["深度"], [["深度学习"]])["rouge_l"] == pytest.approx(2 / 3)
    texts, references = ["我们提出一种新的方法"], [["我们提出一种方法"]]
    assert generation_metrics(texts, references)["bleu"] < 1  # one "word" for 13a
    assert generation_metrics(texts, references, bleu_tokenizer="zh")["bleu"] > 50


def test_a_full_stop_is_no_word() -> None:
    """Every Chinese sentence had one in common with every other."""
    for one, other in (("好。", "坏。"), ("「好」", "「坏」"), ("好、", "坏、"), ("ア・", "イ・"), ("good.", "bad.")):
        assert generation_metrics([one], [[other]])["rouge_l"] == 0
    assert generation_metrics(["人々。"], [["人々"]])["rouge_l"] == pytest.approx(1)
