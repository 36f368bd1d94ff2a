"""An advisor: which prompt method, how long, how fast and for how many steps to start with, and why.

Rules with their sources, applied to what is known before training: the model's size and kind, the task, the number of
examples. It trains nothing and looks at no data; what it says is where a search should begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.checks import check_whole
from ptengine.data import GenerationTask, Task, VerbalizedTask
from ptengine.data.tasks import placed_virtual_tokens
from ptengine.errors import InputError
from ptengine.prompts.facts import backbone_facts
from ptengine.prompts.initialization import RATE
from ptengine.prompts.prefix import flat_rate

__all__ = ["Reason", "Recommendation", "recommend"]

_FEW, _LARGE = 200, 10_000_000_000  # examples; parameters
_BATCH = 8  # rows, the default of TrainingConfig
_FEWEST_STEPS, _MOST_STEPS, _EPOCHS = 300, 30_000, 4

_LESTER = "Lester et al. 2021, arXiv 2104.08691"
_LI = "Li and Liang 2021, arXiv 2101.00190"
_LIU = "Liu et al. 2021, arXiv 2110.07602 (P-tuning v2)"
_OWN = "ptengine, benchmarks/results"


@dataclass(frozen=True)
class Reason:
    """Attributes:
    choice: which field of the recommendation it is about.
    text: why.
    source: paper, or our own measurement.
    """

    choice: str
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.choice}: {self.text} [{self.source}]"


@dataclass(frozen=True)
class Recommendation:
    """Where to start.

    ``ptengine.prompts.create(found.method, model, tokenizer=tokenizer, **found.options)`` makes the prompt;
    `learning_rate` and `max_steps` are fields of `TrainingConfig`.

    Attributes:
        method: name of a prompt method, as `ptengine.prompts.create` takes it.
        num_virtual_tokens: P.
        options: keyword arguments of the method's class, `num_virtual_tokens` included.
        learning_rate: of AdamW.
        max_steps: optimiser steps with batches of 8 rows.
        reasons: why, choice by choice.
    """

    method: str
    num_virtual_tokens: int
    options: dict[str, Any]
    learning_rate: float
    max_steps: int
    reasons: list[Reason] = field(default_factory=list)

    def __str__(self) -> str:
        head = (
            f"{self.method}, {self.num_virtual_tokens} virtual tokens, learning rate {self.learning_rate:.2g}, "
            f"{self.max_steps} steps"
        )
        return "\n".join([head, *(f"- {reason}" for reason in self.reasons)])


def recommend(model: Any, task: Task, n_examples: int) -> Recommendation:
    """A method and settings to start with, and the reasons.

    Args:
        model: the frozen backbone; read, not changed.
        task: what a row asks of it: a task of `ptengine.data`.
        n_examples: training rows there are.

    Raises:
        InputError: `task` is none or for another kind of model, or `n_examples` is no whole number of at least 1.
        UnsupportedModelError: the model is of no supported type.
    """
    spec = backbone_spec(model)
    if not isinstance(task, Task):
        raise InputError(f"expected task, a task of ptengine.data, got {type(task).__name__}")
    if task.backbone_kind != spec.kind:
        raise InputError(
            f"expected a task for {spec.kind} models with model type {spec.model_type!r}, got {type(task).__name__}"
        )
    check_whole("n_examples", n_examples)
    reasons: list[Reason] = []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    method = _method(spec, task, n_examples, parameters, reasons)
    count = _length(spec, task, n_examples, reasons)
    options: dict[str, Any] = {"num_virtual_tokens": count} | _start(method, task, count, reasons)
    return Recommendation(
        method=method,
        num_virtual_tokens=count,
        options=options,
        learning_rate=_rate(method, model, n_examples, reasons),
        max_steps=_steps(n_examples, reasons),
        reasons=reasons,
    )


def _method(spec: BackboneSpec, task: Task, n_examples: int, parameters: int, reasons: list[Reason]) -> str:
    def because(method: str, text: str, source: str) -> str:
        reasons.append(Reason("method", text, source))
        return method

    if spec.value_dim != spec.head_dim:
        return because(
            "soft_prompt", "this model's values are not as wide as its keys, which a prefix needs", "ptengine.Prefix"
        )
    if spec.no_prefix is not None:
        return because("soft_prompt", f"this model takes no prefix: {spec.no_prefix}", "ptengine.Prefix")
    if placed_virtual_tokens(task) is not None:
        return because(
            "soft_prompt",
            "the template places virtual tokens, which keys and values cannot be",
            "ptengine.data.Template",
        )
    if spec.kind == "encoder":
        return because(
            "prefix",
            "keys and values in every layer reach a bidirectional encoder where virtual tokens at its input hardly do, "
            "and are shared by all rows",
            _LIU,
        )
    if isinstance(task, GenerationTask):
        return because("prefix", "for writing texts prefixes come close to fine-tuning with 0.1 % of its numbers", _LI)
    if parameters >= _LARGE:
        return because(
            "soft_prompt", "from about 10 billion parameters on virtual tokens are as good as fine-tuning", _LESTER
        )
    if n_examples < _FEW:
        return because(
            "soft_prompt",
            "few examples: fewer numbers to learn, and a start at the words of the labels helps most where the model "
            "is small; a prefix may do as well, so try it too",
            _LESTER,
        )
    return because(
        "prefix",
        f"below 10 billion parameters and from {_FEW} examples on, layers of keys and values learn more than virtual "
        "tokens (SMS Spam, 800 rows: 94.9 against 91.4 % accuracy)",
        f"{_LIU}; {_OWN}/quality_causal.json",
    )


def _length(spec: BackboneSpec, task: Task, n_examples: int, reasons: list[Reason]) -> int:
    placed = placed_virtual_tokens(task)
    if placed is not None:
        reasons.append(Reason("num_virtual_tokens", "as many as the template places", "ptengine.data.Template"))
        return placed
    if isinstance(task, GenerationTask):
        wanted, text, source = 10, "best for table-to-text in the paper; a summary wants up to 200", _LI
    else:
        wanted, text = 20, "beyond 20 virtual tokens gains are marginal, and simple labels want no more"
        source = f"{_LESTER}; {_LIU}"
    if n_examples < _FEW and not isinstance(task, GenerationTask):
        wanted, text = 10, "half of the usual 20 for few examples; " + text
    most = max(spec.max_positions // 4, 1)
    if wanted > most:
        wanted, text, source = most, "a quarter of the model's positions, the rest is for texts", "the model"
    reasons.append(Reason("num_virtual_tokens", text, source))
    return wanted


def _start(method: str, task: Task, count: int, reasons: list[Reason]) -> dict[str, Any]:
    """The options that say where the first numbers come from."""
    if method != "soft_prompt":
        reasons.append(
            Reason(
                "options",
                "a random start, small on purpose; with few examples a text that describes the task is better: "
                "init='text', on a causal model",
                _LI,
            )
        )
        return {"init": "random"}
    if isinstance(task, VerbalizedTask):
        words = [words[0] for words in task.verbalizer.words.values()][:count]
        reasons.append(Reason("options", "a start at the labels' words is the best of the three tried", _LESTER))
        return {"init": "class_labels", "class_labels": words}
    reasons.append(Reason("options", "a start at words of the vocabulary, which the model knows", _LESTER))
    return {"init": "sampled_vocab"}


def _rate(method: str, model: Any, n_examples: int, reasons: list[Reason]) -> float:
    facts = backbone_facts(model)
    if method == "prefix":
        reasons.append(
            Reason(
                "learning_rate", "0.03 on tiny models, falling with the width to 0.005 on large ones", "ptengine.Prefix"
            )
        )
        return flat_rate(facts)
    reasons.append(
        Reason(
            "learning_rate",
            f"{RATE} of the standard deviation of the word embeddings: Adam moves every element by about the rate, so "
            "it must be relative to their scale",
            f"{_LESTER} (0.3, with T5's large embeddings)",
        )
    )
    return RATE * facts.embedding_std


def _steps(n_examples: int, reasons: list[Reason]) -> int:
    epochs = _EPOCHS * math.ceil(n_examples / _BATCH)
    steps = min(max(_FEWEST_STEPS, epochs), _MOST_STEPS)
    text = {
        _FEWEST_STEPS: "prompts learn slowly: few examples are seen many times; evaluate often and keep the best",
        _MOST_STEPS: "as many as the paper trains at most",
    }.get(steps, f"{_EPOCHS} passes over the data in batches of {_BATCH}")
    reasons.append(Reason("max_steps", text, f"{_LESTER}; {_OWN}/quality_causal.json"))
    return steps
