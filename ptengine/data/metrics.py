"""Metrics: how good predictions are, by the libraries everybody quotes.

Knows class ids and texts, no model. The libraries are imported on first use: they take seconds, and training without
evaluation needs none of them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ptengine.data.cells import described, place
from ptengine.errors import InputError

__all__ = [
    "IDEOGRAPHS",
    "answer_metrics",
    "check_bleu_tokenizer",
    "classification_metrics",
    "entity_metrics",
    "generation_metrics",
]

IDEOGRAPHS = (
    "\u2e80-\u2fff\u3005-\u3007\u3021-\u302f\u3031-\u303c\u3041-\u309f\u30a1-\u30fa\u30fc-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Ranges of a character class: Chinese characters and Japanese kana, without the punctuation among them."""
_IDEOGRAPH = re.compile(rf"[{IDEOGRAPHS}]")
_ANSWER_WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\s{IDEOGRAPHS}]+")
_BLEU_TOKENIZERS = ("13a", "zh", "intl", "char")


def classification_metrics(gold: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy and F1, by scikit-learn; all are fractions from 0 to 1.

    Args:
        gold, predicted: class ids, positions in `labels`, one per row.
        labels: the label names.

    Returns:
        ``accuracy``; ``macro_f1``, the plain mean of the labels' F1 scores, and ``weighted_f1``, their mean weighted by
        gold counts, both over the labels that occur in `gold` or `predicted` (0 for one never hit); ``micro_f1``, which
        equals accuracy when each row has one label.

    Raises:
        InputError: no rows, different lengths, or an id outside the labels.
    """
    _check_lengths(gold, predicted, "gold labels")
    for name, ids in (("gold", gold), ("predicted", predicted)):
        for index, value in enumerate(ids):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(labels):
                raise InputError(
                    f"{place(name, index)}: expected a class id from 0 to {len(labels) - 1}, got {described(value)}"
                )
    from sklearn.metrics import accuracy_score, f1_score

    scores = {"accuracy": float(accuracy_score(gold, predicted))}
    for average in ("macro", "micro", "weighted"):
        scores[f"{average}_f1"] = float(f1_score(gold, predicted, average=average))
    return scores


def generation_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, bleu_tokenizer: str = "13a"
) -> dict[str, float]:
    """Corpus BLEU and chrF (sacrebleu), ROUGE-L (rouge-score) and exact match.

    Args:
        predictions: one text per row.
        references: per row, one or more texts; rows may have different numbers of them.
        bleu_tokenizer: sacrebleu's name: "13a" (its default), "zh" for Chinese, "intl" or "char".

    Returns:
        ``bleu`` and ``chrf``, from 0 to 100 as sacrebleu gives them. ``rouge_l``, the mean over rows of the F measure
        against the best reference, and ``exact_match``, the share of rows equal to a reference up to white space at the
        ends, both fractions from 0 to 1. ROUGE-L compares lower-cased words, as rouge-score does, except that letters
        outside ASCII count and that every Chinese character or Japanese kana is a word.

    Raises:
        InputError: no rows, different lengths, a row without references, a value that is no text, or an unknown
            tokenizer.
    """
    _check_lengths(references, predictions, "rows of references")
    check_bleu_tokenizer(bleu_tokenizer)
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise InputError(f"{place('predictions', index)}: expected text, got {described(prediction)}")
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place('references', index)}: expected a list of texts, got {described(texts)}")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    most = max(len(texts) for texts in references)
    # sacrebleu wants streams, each with one reference of every row; None where a row has fewer.
    streams: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    # force: no warning on standard error about texts that look tokenised already.
    bleu = BLEU(tokenize=bleu_tokenizer, force=True).corpus_score(list(predictions), streams).score
    chrf = CHRF().corpus_score(list(predictions), streams).score
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = list(zip(predictions, references, strict=True))
    rouge = sum(scorer.score_multi(list(texts), text)["rougeL"].fmeasure for text, texts in pairs) / len(pairs)
    exact = sum(text.strip() in {reference.strip() for reference in texts} for text, texts in pairs) / len(pairs)
    return {"bleu": float(bleu), "chrf": float(chrf), "rouge_l": float(rouge), "exact_match": exact}


def check_bleu_tokenizer(name: object) -> None:
    if name not in _BLEU_TOKENIZERS:
        raise InputError(f"expected bleu_tokenizer among {', '.join(_BLEU_TOKENIZERS)}, got {name!r}")


def answer_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of answers as SQuAD has them (Rajpurkar et al. 2016, arXiv 1606.05250), fractions from 0 to 1.

    Compared in lower case without punctuation, articles (a, an, the) and repeated blanks, with the best reference of
    each row. F1 is that of the two bags of words; every Chinese character or Japanese kana is a word. Punctuation is
    that of ASCII, as in SQuAD's script, and that of Chinese and Japanese; in a text with their characters also what
    they share with other scripts (quotation marks, dashes, dots in the middle).

    Args:
        predictions: one text per row.
        references: per row, one or more texts.

    Raises:
        InputError: no rows, different lengths, or a row without references.
    """
    _check_lengths(references, predictions, "rows of references")
    exact = f1 = 0.0
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not texts or isinstance(texts, str):
            raise InputError(f"{place('references', index)}: expected a list of texts, got {described(texts)}")
        words = _answer_words(prediction)
        gold = [_answer_words(text) for text in texts]
        exact += max(float(one == words) for one in gold)
        f1 += max(_bag_f1(words, one) for one in gold)
    return {"exact_match": exact / len(predictions), "f1": f1 / len(predictions)}


def entity_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, over all rows, as at CoNLL (Tjong Kim Sang and De Meulder 2003).

    An entity is right where its first word, its last and its name are. It begins at B-name, and at I-name behind O or
    another name. All are fractions from 0 to 1, and 0 where nothing is found.

    Args:
        gold, predicted: per row, a label for each word: O, B-name or I-name.

    Raises:
        InputError: no rows, or different lengths.
    """
    _check_lengths(gold, predicted, "rows of gold labels")
    right = found = wanted = 0
    for index, (labels, others) in enumerate(zip(gold, predicted, strict=True)):
        if len(labels) != len(others):
            raise InputError(f"{place('predicted', index)}: expected {len(labels)} labels, got {len(others)}")
        one, other = _entities(labels), _entities(others)
        right, found, wanted = right + len(one & other), found + len(other), wanted + len(one)
    precision, recall = right / max(found, 1), right / max(wanted, 1)
    f1 = 2 * right / max(found + wanted, 1)
    return {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}


def _entities(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """First word, last word and name of each entity."""
    entities: list[tuple[int, int, str]] = []
    for at, label in enumerate(labels):
        mark, _, name = label.partition("-")
        if mark == "O":
            continue
        continues = mark == "I" and bool(entities) and entities[-1][1:] == (at - 1, name)
        if continues:
            entities[-1] = (entities[-1][0], at, name)
        else:
            entities.append((at, at, name))
    return set(entities)


def _answer_words(text: str) -> list[str]:
    least = "\u0080" if _IDEOGRAPH.search(text) else "\u3000"
    kept = "".join(letter for letter in text.lower() if not _is_punctuation(letter, least))
    return _ANSWER_WORD.findall(re.sub(r"\b(a|an|the)\b", " ", kept))


def _is_punctuation(letter: str, least: str) -> bool:
    """In ASCII, or in Unicode from `least` on."""
    return letter in string.punctuation or (letter >= least and unicodedata.category(letter).startswith("P"))


def _bag_f1(one: Sequence[str], other: Sequence[str]) -> float:
    shared = sum((Counter(one) & Counter(other)).values())
    if not one or not other:
        return float(one == other)
    return 2 * shared / (len(one) + len(other))


class _Words:
    """rouge-score's words for English; its own tokenizer drops every letter outside ASCII, so Chinese scored 0."""

    _word = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(text.lower())


def _check_lengths(expected: Sequence[object], predictions: Sequence[object], what: str) -> None:
    if not expected or not predictions:
        raise InputError(
            f"expected at least one row to score, got {len(expected)} {what} and {len(predictions)} predictions"
        )
    if len(expected) != len(predictions):
        raise InputError(f"expected one prediction for each of the {len(expected)} {what}, got {len(predictions)}")
