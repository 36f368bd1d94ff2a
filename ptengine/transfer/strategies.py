"""How a target prompt learns from others: settings, checked when they are made.

Ideas that combine freely: where the first numbers come from (`Initialize`), and losses beside the target's own
(`Joint`, `Anchor`, `Distill`, `SelfTrain`). `Guard` says how the result is checked. Knows numbers and names only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ptengine.checks import check_flags, check_whole
from ptengine.errors import InputError
from ptengine.transfer.augmentation import Augmentation
from ptengine.transfer.domains import DOMAIN_MEASURES
from ptengine.transfer.similarity import PROMPT_MEASURES

__all__ = ["Anchor", "Distill", "Guard", "Initialize", "Joint", "SelfTrain", "Strategy", "rate_name"]

COMBINATIONS = ("best", "mean", "weighted", "task_vectors")
SCHEDULES = ("constant", "linear", "cosine")

_MOST_RATE = 1e6  # times a method's own learning rate: beyond any use, and far from overflow


@dataclass(frozen=True)
class Initialize:
    """Where a target prompt starts (SPoT, Vu et al. 2022, arXiv 2110.07904, section 5).

    Attributes:
        combine: ``"best"``: the bank's best match as it is. ``"mean"``: the plain mean of the `top_k` best.
            ``"weighted"``: their mean weighted by similarity, or by exp(-loss), exp(-distance) under a measure whose
            smaller values are better.
            ``"task_vectors"``: P0 + `scale` * (weighted mean of P_s - P0), for prompts trained from one P0
            (Belanec et al. 2024, arXiv 2408.01119, equation 3).
        top_k: matches that are combined; 1 with ``"best"``.
        measure: how the bank is searched: ``"shot_loss"``, a distance between the shots' texts and the sources'
            (`DOMAIN_MEASURES`), or a cosine, for which a prompt is first tuned on the shots.
        scale: of the task vectors' sum.
        fresh: train from a fresh prompt instead; what is combined then only teaches (`Distill`, `Anchor`) and is the
            candidate ``"source"``, as in PANDA.
    """

    combine: str = "best"
    top_k: int = 1
    measure: str = "shot_loss"
    scale: float = 1.0
    fresh: bool = False

    def __post_init__(self) -> None:
        _choice("combine", self.combine, COMBINATIONS)
        _choice("measure", self.measure, ("shot_loss", *DOMAIN_MEASURES, *PROMPT_MEASURES))
        check_whole("top_k", self.top_k, 1)
        if self.combine == "best" and self.top_k != 1:
            raise InputError(f"expected top_k=1 with combine='best', got {self.top_k}")
        _number("scale", self.scale, 0)
        check_flags(fresh=self.fresh)


@dataclass(frozen=True)
class Joint:
    """Train on source and target at once: the step's loss is a * L_source + (1 - a) * L_target.

    Both losses are means over the labels of a batch of their own, so a does not depend on how many rows either has.
    With a = 0 in every step the run equals training on the target alone, with a = 1 on the source alone.

    Attributes:
        source_weight: a, in [0, 1], in the first step.
        schedule: ``"constant"``, or from `source_weight` to `end_weight` along a line or half a cosine.
        end_weight: a in the last step, for the schedules that move.
    """

    source_weight: float = 0.5
    schedule: str = "constant"
    end_weight: float = 0.0

    def __post_init__(self) -> None:
        _number("source_weight", self.source_weight, 0, 1)
        _number("end_weight", self.end_weight, 0, 1)
        _choice("schedule", self.schedule, SCHEDULES)

    def weight(self, step: int, total_steps: int) -> float:
        """a in optimiser step `step`, counted from 0."""
        if self.schedule == "constant":
            return self.source_weight
        done = step / max(total_steps - 1, 1)
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.source_weight + done * (self.end_weight - self.source_weight)


@dataclass(frozen=True)
class Anchor:
    """Stay near the start: adds weight * |P - P_start|^2 / |P_start|^2 over all numbers the backbone reads; a head is
    free.

    Relative to the start's own size, so that one weight suits every model.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        _number("anchor weight", self.weight, 0)


@dataclass(frozen=True)
class Distill:
    """Answer as the source prompt does: adds lambda * mean squared difference of the logits at the labels, over labels
    and vocabulary (over rows and classes with a head), to the target's loss (PANDA, Zhong et al. 2022, arXiv
    2208.10160: L = L_CE + lambda L_KD).

    The teacher is the source prompt (or the combination of several) untouched. PANDA proper trains a fresh prompt
    (``Initialize(fresh=True)``) and takes for lambda how alike the two tasks are; without a similarity lambda is
    `weight`.

    Attributes:
        weight: what lambda is, or is multiplied by.
        similarity: None, or a cosine of two prompts (`PROMPT_MEASURES`): lambda = weight * max(cosine, 0) between the
            teacher and a prompt tuned on the shots alone, so that a source unlike the target teaches little. PANDA
            takes the cosine of task embeddings that such prompts lead to; here it is taken of the prompts themselves.
    """

    weight: float = 1.0
    similarity: str | None = None

    def __post_init__(self) -> None:
        _number("distill weight", self.weight, 0)
        if self.similarity is not None:
            _choice("distill similarity", self.similarity, PROMPT_MEASURES)


@dataclass(frozen=True)
class SelfTrain:
    """Learn from unlabelled target texts what the source prompt, untouched, says of them: the step's loss has
    (1 - u) * L_target + u * L_unlabelled in the place of L_target.

    The teacher's probabilities p_c of the labels, once for every text, give the targets t_c, proportional to
    p_c^(1/T); L_unlabelled = -sum_c t_c log q_c, q_c the student's probability of the label's first word, or of the
    label where a head says it. A sharp T and a high threshold make it self-training; changed copies of the texts for
    the student make it learn consistency (Sohn et al. 2020, arXiv 2001.07685; Xie et al. 2020, arXiv 1904.12848).

    Attributes:
        share: u, in [0, 1]; with 1 the labels of the shots are not trained on and serve the guard alone.
        threshold: texts count on which the teacher's most probable label has at least this probability.
        temperature: T, at least 0; 0 takes the most probable label for true.
        views: changed copies that the student reads instead of the text; None for the text itself.
    """

    share: float = 0.5
    threshold: float = 0.9
    temperature: float = 0.0
    views: Augmentation | None = None

    def __post_init__(self) -> None:
        _number("self-training share", self.share, 0, 1)
        _number("self-training threshold", self.threshold, 0, 1)
        _number("self-training temperature", self.temperature, 0)
        if self.views is not None and not isinstance(self.views, Augmentation):
            raise InputError(f"expected views, an Augmentation or None, got {type(self.views).__name__}")


@dataclass(frozen=True)
class Strategy:
    """A way to transfer. Attributes: `initialize`, and the losses beside the target's own, None for none."""

    initialize: Initialize = field(default_factory=Initialize)
    joint: Joint | None = None
    anchor: Anchor | None = None
    distill: Distill | None = None
    self_train: SelfTrain | None = None

    def __post_init__(self) -> None:
        kinds = {
            "initialize": Initialize, "joint": Joint, "anchor": Anchor, "distill": Distill, "self_train": SelfTrain,
        }  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (name == "initialize" or value is not None):
                raise InputError(f"expected {name}, a {kind.__name__}, got {type(value).__name__}")
        if self.initialize.fresh and self.distill is None and self.anchor is None:
            raise InputError(
                "expected distill or anchor with initialize.fresh, so that the source teaches, got neither"
            )


@dataclass(frozen=True)
class Guard:
    """Detect negative transfer by cross-validation on the target shots, and choose what to keep.

    Every fold trains the transferred prompt and the scratch prompt on the other folds and scores both, and the start
    untouched, on the rows held back. Scratch is kept unless another is better: in accuracy where that differs by more
    than one standard error, else in loss; by two standard errors where the start untouched is clearly worse than
    scratch or no better than guessing (`ptengine.transfer.guard.decide`).

    Attributes:
        folds: parts the shots are cut into, at least 2; every class needs as many rows.
        min_gain: by how much the score must be better besides, a fraction for accuracy; 0 asks for no more.
        scratch_rates: learning rates of scratch, as multiples of the method's own, at most 1e6, which differ in their
            first six digits; the best counts.
        scratch_init: how scratch starts, an init of the prompt's method that needs no further arguments.
    """

    folds: int = 4
    min_gain: float = 0.0
    scratch_rates: tuple[float, ...] = (1.0,)
    scratch_init: str = "random"

    def __post_init__(self) -> None:
        check_whole("folds", self.folds, 2)
        _number("min_gain", self.min_gain, 0)
        if not isinstance(self.scratch_rates, tuple) or not self.scratch_rates:
            raise InputError(f"expected scratch_rates, a tuple of numbers above 0, got {self.scratch_rates!r}")
        for rate in self.scratch_rates:
            _number("scratch_rates", rate, 0, _MOST_RATE)
            if rate == 0:
                raise InputError(f"expected scratch_rates, different numbers above 0, got {self.scratch_rates!r}")
        if len({rate_name(rate) for rate in self.scratch_rates}) < len(self.scratch_rates):
            raise InputError(
                "expected scratch_rates that differ in their first six digits, by which their folders are called, got "
                f"{self.scratch_rates!r}"
            )


def rate_name(rate: float) -> str:
    """What the run of scratch at this multiple of the method's learning rate is called."""
    return f"{rate:g}"


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"expected {name}, one of {', '.join(allowed)}, got {value!r}")


def _number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good or not math.isfinite(value):
        raise InputError(f"expected {name}, a number from {low:g} to {high:g}, got {value!r}")
