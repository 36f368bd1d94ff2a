"""Prompt words: what a domain's texts talk about, and what a frozen model attends to in them.

Words serve as hard prompts (`with_words`) and as the first numbers of soft ones (`words_prompt`). English and the like
is cut at blanks and punctuation; Chinese, Japanese and Korean runs, which have none, give every piece of two to four
characters, of which overlapping ones are thinned out after ranking. Knows texts, a tokenizer and a frozen model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.data import Template
from ptengine.data.metrics import IDEOGRAPHS
from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt
from ptengine.transfer.attention_received import attention_received

__all__ = ["CJK", "PromptWord", "attention_words", "domain_terms", "in_text", "segments", "with_words", "words_prompt"]

CJK = f"{IDEOGRAPHS}\uac00-\ud7af"
"""Ranges of a character class: letters of Chinese, Japanese and Korean."""

_RUNS = re.compile(rf"([{CJK}]+)|([^\W_{CJK}]+(?:['’-][^\W_{CJK}]+)*)")
_PIECES = (2, 3, 4)
_PRIOR_SIZE = 500.0
_BASELINE_WEIGHT = 5.0


@dataclass(frozen=True)
class PromptWord:
    """Attributes: `text`; `score`, greater is better; `count`, how often it stands in the target's texts."""

    text: str
    score: float
    count: int


def segments(text: str) -> list[tuple[str, int, int]]:
    """Candidate words of `text`, lower-cased, each with its span [start, end) in characters."""
    found: list[tuple[str, int, int]] = []
    for match in _RUNS.finditer(text):
        start, end = match.span()
        if match.group(2):
            found.append((match.group().lower(), start, end))
            continue
        sizes = [size for size in _PIECES if size <= end - start] or [end - start]
        found += [(text[i : i + size], i, i + size) for size in sizes for i in range(start, end - size + 1)]
    return found


def domain_terms(
    target: Sequence[str],
    background: Sequence[str],
    *,
    top_k: int = 20,
    measure: str = "log_odds",
    min_count: int = 2,
    stop_words: frozenset[str] = ENGLISH_STOP_WORDS,
) -> list[PromptWord]:
    """Words that set the target's texts apart from the background's, best first.

    Args:
        target, background: texts of the two sides.
        top_k: at most as many.
        measure: ``"log_odds"``: z scores of the log odds ratio with an informative Dirichlet prior, the counts of both
            sides together (Monroe, Colaresi and Quinn 2008, equations 15, 16, 22), which rare words cannot win.
            ``"tfidf"``: mean tf-idf over the target's texts minus that over the background's.
        min_count: least count in the target's texts.
        stop_words: left out.

    Raises:
        InputError: no texts on a side, an unknown measure, a number below 1, no word that is frequent enough, or only
            one word in all texts.
    """
    check_whole("top_k", top_k)
    check_whole("min_count", min_count)
    if measure not in ("log_odds", "tfidf"):
        raise InputError(f"expected measure, one of log_odds, tfidf, got {measure!r}")
    if not target or not background:
        raise InputError(f"expected texts on both sides, got {len(target)} and {len(background)}")

    def cut(text: str) -> list[str]:
        return [word for word, _, _ in segments(text) if word not in stop_words]

    mine, theirs = (Counter(word for text in texts for word in cut(text)) for texts in (target, background))
    frequent = [word for word in mine if mine[word] >= min_count]
    if not frequent:
        raise InputError(f"expected a word that stands {min_count} times in the target's texts, got none")
    if len(mine | theirs) < 2:
        raise InputError(f"expected at least two different words in the texts to compare, got {frequent[0]!r} alone")
    scores = _log_odds(mine, theirs) if measure == "log_odds" else _tfidf(target, background, cut)
    ranked = [PromptWord(word, scores[word], mine[word]) for word in frequent]
    return _thinned(sorted(ranked, key=lambda word: (-word.score, word.text)))[:top_k]


def attention_words(
    model: Any,
    tokenizer: Any,
    target: Sequence[str],
    background: Sequence[str],
    *,
    top_k: int = 20,
    layers: Sequence[int] | None = None,
    min_count: int = 2,
    max_tokens: int = 128,
    diversity: float = 0.3,
    stop_words: frozenset[str] = ENGLISH_STOP_WORDS,
) -> list[PromptWord]:
    """Words the frozen model attends to more in the target's texts than words are attended to in the background's.

    A word's score is the mean of `attention_received` over its tokens and occurrences, divided by the same in the
    background, which cancels sinks, positions and what every text attends to. A word that is rare there is compared
    with the background's mean over all words. Words are then taken one by one, each for (1 - diversity) of its score
    less `diversity` times its likeness to those taken (maximal marginal relevance, Carbonell and Goldstein 1998).

    Args:
        model, tokenizer: the frozen backbone, unpatched, and its fast tokenizer.
        target, background: texts of the two sides.
        top_k, min_count, stop_words: as in `domain_terms`.
        layers: as in `attention_received`.
        max_tokens: texts are cut to as many.
        diversity: in [0, 1); likeness is the cosine of mean word embeddings, and scores are scaled to at most 1.

    Raises:
        InputError: as `domain_terms` and `attention_received`; a tokenizer without character offsets.
        UnsupportedModelError: as `attention_received`.
    """
    for name, value in (("top_k", top_k), ("min_count", min_count), ("max_tokens", max_tokens)):
        check_whole(name, value)
    if not 0 <= diversity < 1:
        raise InputError(f"expected diversity, a number in [0, 1), got {diversity!r}")
    if not target or not background:
        raise InputError(f"expected texts on both sides, got {len(target)} and {len(background)}")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"expected a fast tokenizer, which knows where tokens stand, got {type(tokenizer).__name__}")

    def received(texts: Sequence[str]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for text in texts:
            for word, value in _word_attention(model, tokenizer, text, layers, max_tokens):
                if word not in stop_words:
                    found.setdefault(word, []).append(value)
        return found

    mine, theirs = received(target), received(background)
    if not theirs:
        raise InputError("expected words in the background's texts, got none")
    usual = float(np.mean([value for values in theirs.values() for value in values]))
    scores = {}
    for word, values in mine.items():
        if len(values) < min_count:
            continue
        others = theirs.get(word, [])
        baseline = (sum(others) + _BASELINE_WEIGHT * usual) / (len(others) + _BASELINE_WEIGHT)
        scores[word] = float(np.mean(values)) / baseline
    if not scores:
        raise InputError(f"expected a word that stands {min_count} times in the target's texts, got none")
    ranked = [PromptWord(word, score, len(mine[word])) for word, score in scores.items()]
    ranked = _thinned(sorted(ranked, key=lambda word: (-word.score, word.text)))
    return _diverse(ranked, _embedded(model, tokenizer, [word.text for word in ranked]), top_k, diversity)


def with_words(template: str, words: Sequence[PromptWord | str]) -> Template:
    """A hard prompt: `template` with ``{words}`` filled, commas between them, the other columns left for the rows.

    Raises:
        InputError: no words, no ``{words}``, or a template that `Template` refuses.
    """
    if not words or "{words}" not in template:
        raise InputError(f"expected words and a template with {{words}}, got {len(words)} words and {template!r}")
    said = ", ".join(_text(word) for word in words)
    return Template(template.replace("{words}", said.replace("{", "{{").replace("}", "}}")))


def words_prompt(
    model: Any, tokenizer: Any, words: Sequence[PromptWord | str], num_virtual_tokens: int, seed: int = 0
) -> SoftPrompt:
    """A soft prompt that starts from words: one virtual token each, the mean of its tokens' embeddings, the first
    `num_virtual_tokens` of them; what is left is sampled from the vocabulary.

    Words are embedded after a blank, as they stand inside a text, but for those of scripts without blanks.

    Raises:
        InputError: no words, or as `SoftPrompt`.
    """
    if not words:
        raise InputError("expected at least one word to start from, got none")
    texts = [in_text(_text(word)) for word in words][:num_virtual_tokens]
    return SoftPrompt(
        model, num_virtual_tokens, init="class_labels", class_labels=texts, tokenizer=tokenizer, seed=seed
    )


def _word_attention(
    model: Any, tokenizer: Any, text: str, layers: Sequence[int] | None, max_tokens: int
) -> list[tuple[str, float]]:
    """Every candidate word of a text with the mean attention its tokens receive."""
    encoded = tokenizer(
        text, add_special_tokens=True, return_offsets_mapping=True, truncation=True, max_length=max_tokens
    )
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if not ids:
        return []
    values = attention_received(model, ids, layers).tolist()
    by_character: dict[int, list[float]] = {}
    for (start, end), value, token in zip(spans, values, ids, strict=True):
        if token not in tokenizer.all_special_ids:
            for position in range(start, end):
                by_character.setdefault(position, []).append(value)
    mean = {position: math.fsum(x) / len(x) for position, x in by_character.items()}
    return [
        (word, math.fsum(mean[i] for i in range(start, end)) / (end - start))
        for word, start, end in segments(text)
        if all(i in mean for i in range(start, end))
    ]


def _log_odds(mine: Counter[str], theirs: Counter[str]) -> dict[str, float]:
    both = mine + theirs
    sizes, whole = (mine.total(), theirs.total()), both.total()
    scores = {}
    for word, count in both.items():
        prior = _PRIOR_SIZE * count / whole
        odds = [
            math.log((side[word] + prior) / (size + _PRIOR_SIZE - side[word] - prior))
            for side, size in zip((mine, theirs), sizes, strict=True)
        ]
        scores[word] = (odds[0] - odds[1]) / math.sqrt(1 / (mine[word] + prior) + 1 / (theirs[word] + prior))
    return scores


def _tfidf(target: Sequence[str], background: Sequence[str], cut: Callable[[str], list[str]]) -> dict[str, float]:
    vectorizer = TfidfVectorizer(analyzer=cut, sublinear_tf=True)
    table = vectorizer.fit_transform([*target, *background])  # [texts, words]
    gap = np.asarray(table[: len(target)].mean(axis=0) - table[len(target) :].mean(axis=0))[0]
    return dict(zip(vectorizer.get_feature_names_out(), gap.tolist(), strict=True))


def _thinned(ranked: Sequence[PromptWord]) -> list[PromptWord]:
    """Without pieces of a run that hold a better piece, or are held by one."""
    kept: list[PromptWord] = []
    for word in ranked:
        nested = any(word.text in other.text or other.text in word.text for other in kept if _is_run(other.text))
        if not (_is_run(word.text) and nested):
            kept.append(word)
    return kept


def _diverse(ranked: Sequence[PromptWord], vectors: Tensor, top_k: int, diversity: float) -> list[PromptWord]:
    likeness = vectors @ vectors.T  # [n, n]
    most = max(word.score for word in ranked)
    left = list(range(len(ranked)))
    taken: list[int] = []
    while left and len(taken) < top_k:

        def worth(i: int) -> float:
            near = max((float(likeness[i, j]) for j in taken), default=0.0)
            return (1 - diversity) * ranked[i].score / most - diversity * near

        best = max(left, key=worth)
        taken.append(best)
        left.remove(best)
    return [ranked[i] for i in taken]


def _embedded(model: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """Unit vectors [n, d] of the words' mean embeddings."""
    table = backbone_spec(model).word_embeddings.weight.detach().float().cpu()
    ids = tokenizer([in_text(word) for word in words], add_special_tokens=False)["input_ids"]
    return F.normalize(torch.stack([table[torch.tensor(row)].mean(dim=0) for row in ids]), dim=1)  # [n, d]


def _text(word: PromptWord | str) -> str:
    return word.text if isinstance(word, PromptWord) else word


def in_text(word: str) -> str:
    """`word` as it stands inside a text: after a blank, but for scripts without."""
    return word if _is_run(word) else f" {word}"


def _is_run(text: str) -> bool:
    return re.fullmatch(rf"[{CJK}]+", text) is not None
