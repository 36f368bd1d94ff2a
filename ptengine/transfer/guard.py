"""The guard: whether a transfer helped, by cross-validation on the target's shots, and what to keep.

Knows rows, predictions and scores; how candidates are trained is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from ptengine.errors import InputError
from ptengine.training import EvalResult
from ptengine.transfer.measures import Interval, paired_interval
from ptengine.transfer.strategies import Guard

__all__ = ["SCRATCH", "SOURCE", "TRANSFERRED", "Decision", "Guess", "HeldOut", "decide", "folds", "pooled"]

SCRATCH, SOURCE, TRANSFERRED = "scratch", "source", "transferred"
_FOREIGN_ERRORS = 2.0


@dataclass(frozen=True)
class HeldOut:
    """What one candidate did on all shots, each scored while it was held back.

    Attributes:
        loss: mean in nats, over shots; of tasks without labels over tokens.
        correct: per shot, 1.0 where it was labelled right; None for tasks without labels.
    """

    loss: float
    correct: tuple[float, ...] | None

    @property
    def score(self) -> float:
        """Accuracy, or the loss with its sign turned: greater is better."""
        return -self.loss if self.correct is None else float(np.mean(self.correct))


@dataclass(frozen=True)
class Decision:
    """Attributes:
    chosen: the candidate to keep: ``"transferred"``, ``"source"`` (the start untouched) or ``"scratch"``.
    scratch: which of the scratch candidates counted as scratch.
    reason: a sentence for people.
    metric: what the scores are: ``"accuracy"`` or ``"negative loss"``.
    scores: candidate to score over all held-out shots, greater is better.
    losses: candidate to loss.
    gain: transferred over scratch, paired by shot; None for tasks without labels.
    negative_transfer: whether scratch scored better than transferred.
    """

    chosen: str
    scratch: str
    reason: str
    metric: str
    scores: Mapping[str, float]
    losses: Mapping[str, float]
    gain: Interval | None
    negative_transfer: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "scores": dict(self.scores), "losses": dict(self.losses)}


def folds(labels: Sequence[str] | None, count: int, parts: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """`count` rows cut `parts` ways: (rows to train on, rows held back), stratified by `labels` where there are any.

    Raises:
        InputError: fewer rows, or fewer of a label, than parts.
    """
    if labels is None:
        if count < parts:
            raise InputError(f"expected at least {parts} target shots for {parts} folds, got {count}")
        cut = KFold(parts, shuffle=True, random_state=seed).split(np.zeros(count))
    else:
        names, counts = np.unique(np.asarray(labels, dtype=object).astype(str), return_counts=True)
        if counts.min() < parts:
            rare = names[counts.argmin()]
            raise InputError(
                f"expected at least {parts} target shots of every label for {parts} folds, got {counts.min()} of "
                f"{str(rare)!r}; take fewer folds, or no guard"
            )
        cut = StratifiedKFold(parts, shuffle=True, random_state=seed).split(np.zeros(count), labels)
    return [(train.tolist(), held.tolist()) for train, held in cut]


def pooled(
    parts: Sequence[tuple[EvalResult, Sequence[int], Sequence[str] | None]], label_tokens: Mapping[str, int]
) -> HeldOut:
    """One candidate's results on its held-back parts: (result, row numbers, gold labels) each, put in row order.

    `label_tokens` says how many tokens the word of each label has. An evaluation's loss is the mean over them; a shot's
    is their sum, as that of a `Guess` is.
    """

    def total(result: EvalResult, gold: Sequence[str] | None) -> float:
        count = result.n if gold is None else sum(label_tokens[label] for label in gold)
        return result.metrics["loss"] * count

    loss = sum(total(result, gold) for result, _, gold in parts) / sum(result.n for result, _, _ in parts)
    correct: dict[int, float] = {}
    for result, rows, gold in parts:
        if gold is None:
            return HeldOut(loss, None)
        for row, said, label in zip(rows, result.predictions, gold, strict=True):
            correct[row] = float(said == label)
    return HeldOut(loss, tuple(correct[row] for row in sorted(correct)))


@dataclass(frozen=True)
class Guess:
    """What a model scores that knows nothing of rows but how often each label occurs.

    Attributes:
        accuracy: of saying the most frequent label every time.
        loss: mean in nats, of saying the labels' frequencies: their entropy.
    """

    accuracy: float
    loss: float

    @classmethod
    def of(cls, labels: Sequence[str]) -> Guess:
        shares = np.unique(np.asarray(labels, dtype=object).astype(str), return_counts=True)[1] / len(labels)
        return cls(float(shares.max()), float(-(shares * np.log(shares)).sum()))


def decide(settings: Guard, candidates: Mapping[str, HeldOut], guess: Guess | None = None) -> Decision:
    """What to keep of ``"transferred"``, ``"source"`` and the candidates whose names begin with ``"scratch"``.

    Few shots measure accuracy coarsely, so it decides between two candidates only where they differ by more than one
    standard error of the paired difference; otherwise the lower loss does. The best scratch candidate stands for
    scratch; what is better than it, by more than `min_gain` where that is set, is accepted. The start untouched is kept
    only where its accuracy beats that of the transferred prompt in this sense, which is trained again on all shots.

    A source that is untouched clearly worse than scratch knows another task, and so does one that is no better than a
    `guess` at the shots' labels (None: not asked), neither in loss nor by two standard errors in accuracy. What its
    transferred prompt seems to gain on a few shots is then mostly chance, so it must gain two standard errors.
    """
    scratch = max(
        (name for name in candidates if name.startswith(SCRATCH)),
        key=lambda name: (candidates[name].score, -candidates[name].loss),
    )
    base, moved = candidates[scratch], candidates[TRANSFERRED]

    foreign = _why_foreign(candidates[SOURCE], base, guess)

    def accepted(name: str) -> bool:
        enough = settings.min_gain == 0 or candidates[name].score - base.score > settings.min_gain
        convincing = foreign is None or _clear(candidates[name], base, errors=_FOREIGN_ERRORS)
        return enough and convincing and _better(candidates[name], base)

    keeps_source = accepted(SOURCE) and (
        not accepted(TRANSFERRED) or (_clear(candidates[SOURCE], moved) and _better(candidates[SOURCE], moved))
    )
    chosen = SOURCE if keeps_source else TRANSFERRED if accepted(TRANSFERRED) else scratch
    gain = None
    if moved.correct is not None and base.correct is not None:
        gain = paired_interval([moved.correct, base.correct], lambda a, b, axis=-1: (a - b).mean(axis))
    metric = "negative loss" if base.correct is None else "accuracy"
    return Decision(
        chosen=SCRATCH if chosen == scratch else chosen,
        scratch=scratch,
        reason=_reason(chosen, scratch, candidates, metric, settings, foreign),
        metric=metric,
        scores={name: held.score for name, held in candidates.items()},
        losses={name: held.loss for name, held in candidates.items()},
        gain=gain,
        negative_transfer=_better(base, moved),
    )


def _clear(one: HeldOut, other: HeldOut, errors: float = 1.0) -> bool:
    """Whether the accuracies differ by more than so many standard errors of the paired difference."""
    if one.correct is None or other.correct is None or len(one.correct) < 2:
        return False
    differences = np.subtract(one.correct, other.correct)
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return bool(abs(differences.mean()) > errors * error * (1 + 1e-9))  # a single shot is exactly one error: not clear


def _better(one: HeldOut, other: HeldOut) -> bool:
    return one.score > other.score if _clear(one, other) else one.loss < other.loss


def _why_foreign(source: HeldOut, scratch: HeldOut, guess: Guess | None) -> str | None:
    """What the source untouched falls short of, if it is of another task; None if it is not."""
    if _clear(source, scratch) and source.score < scratch.score:
        return "clearly worse than scratch"
    if guess is None or source.correct is None or source.loss < guess.loss:
        return None
    always = HeldOut(guess.loss, (guess.accuracy,) * len(source.correct))
    if _clear(source, always, errors=_FOREIGN_ERRORS) and source.score > guess.accuracy:
        return None
    return f"no better than guessing ({guess.accuracy:.3f}, loss {guess.loss:.3f})"


def _reason(
    chosen: str, scratch: str, candidates: Mapping[str, HeldOut], metric: str, settings: Guard, foreign: str | None
) -> str:
    named = {TRANSFERRED: "the transferred prompt", SOURCE: "the source prompt untouched", scratch: "scratch"}
    said = ", ".join(
        f"{words} {candidates[name].score:.3f} (loss {candidates[name].loss:.3f})" for name, words in named.items()
    )
    kept = f"{named[chosen]} is kept: {metric} on {settings.folds} held-back parts of the shots: {said}"
    if metric == "accuracy" and not _clear(candidates[TRANSFERRED], candidates[scratch]):
        kept += (
            "; accuracies of transferred and scratch are within one standard error, so the loss decides between them"
        )
    if foreign is not None:
        kept += f"; the source untouched is {foreign}, so two standard errors of gain are asked for"
    if chosen == TRANSFERRED:
        return kept
    if chosen == SOURCE:
        return f"{kept}; tuning it on the shots made it worse"
    return f"{kept}; no transfer was better than training from scratch"
