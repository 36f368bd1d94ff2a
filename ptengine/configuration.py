"""What a training run is told: one dataclass, with the field names users know from transformers.

Every field is checked when the object is made, so a run never starts on a bad value. Knows nothing of models, prompts
or data; what depends on them is checked by the trainer. Outside `ptengine.training`, which imports torch, so that the
command line can make its options of the fields at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptengine.checks import check_flags, check_whole, is_whole
from ptengine.errors import InputError

__all__ = ["MOST_SEED", "TrainingConfig"]

MOST_SEED = 2**32 - 1
"""The greatest seed that numpy and scikit-learn take; torch and Python take greater ones."""

# Far beyond use; float32 still holds what optimisers make of them: rate times decay (Adafactor), or the rate times a
# prompt's own factor and divided by 0.1 (AdamW's first step).
_LIMITS = {"learning_rate": 1e28, "head_learning_rate": 1e28, "weight_decay": 1e10}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run of `ptengine.Trainer`.

    Attributes:
        output_dir: folder of everything the run writes: ``log.jsonl``, ``checkpoint-<step>/``, ``best/``, ``prompt/``,
            ``curve.png``.
        num_train_epochs: passes over the training data, fractions allowed, one step at least; ignored where `max_steps`
            is given.
        max_steps: optimiser steps; -1 means as many as `num_train_epochs` asks for.
        per_device_train_batch_size: rows of one micro-batch (one forward and backward).
        per_device_eval_batch_size: rows of one evaluation batch.
        gradient_accumulation_steps: micro-batches per optimiser step. The loss of a step is the mean over all labels of
            all its micro-batches, so it equals one large batch whatever the rows' lengths. The last step of an epoch
            takes the micro-batches that are left.
        learning_rate: peak rate of the prompt; None takes the prompt method's own default
            (`Prompt.default_learning_rate`), which is scaled to the backbone's word embeddings.
        head_learning_rate: peak rate of a trainable classification head, for tasks that have one.
        weight_decay: decoupled weight decay of the prompt and the head.
        optim: ``"adamw"`` (betas 0.9 and 0.999) or ``"adafactor"`` with an external rate: no relative step, no
            parameter scaling, no first moment, update clipping at 1.0. Lester et al. (2021, section 3) train T5 prompts
            with it at a constant rate of 0.3 and weight decay 1e-5: ``optim="adafactor", learning_rate=0.3,
            weight_decay=1e-5, lr_scheduler_type="constant"``; 0.3 is relative to T5's large word embeddings.
        lr_scheduler_type: ``"constant"``, ``"linear"`` (to zero) or ``"cosine"`` (to zero), after the warm-up.
        warmup_steps: optimiser steps over which the rate grows linearly from zero; excludes `warmup_ratio`.
        warmup_ratio: the same as a fraction of all steps, in [0, 1).
        max_grad_norm: gradients of a step are scaled down to this norm over prompt and head together; None for never.
        label_smoothing_factor: in [0, 1): weight of the uniform distribution in the training loss.
        bf16: run the backbone under bfloat16 autocast; prompt, head and optimiser stay in float32. Works on CPU too.
        seed: of the order of rows and of every random number drawn while training; from 0 to 4294967295.
        eval_strategy: ``"no"``, ``"steps"`` (every `eval_steps`, and after the last step) or ``"epoch"``; None means
            ``"epoch"`` where evaluation data is given and ``"no"`` otherwise.
        eval_steps: optimiser steps between evaluations; required by, and only allowed with, ``eval_strategy="steps"``.
        save_strategy: ``"steps"``, ``"epoch"`` or ``"no"``: when checkpoints are written. Except with ``"no"`` the last
            step is always saved. A signal (SIGTERM, SIGINT) saves in any case.
        save_steps: optimiser steps between checkpoints, for ``save_strategy="steps"``.
        save_total_limit: complete checkpoints kept, the newest and that of the best prompt always among them; None
            keeps all.
        logging_steps: optimiser steps between lines of the log.
        load_best_model_at_end: put the weights of the best evaluation into the prompt (and head) when training ends;
            otherwise they stay those of the last step. ``best/`` is written either way.
        metric_for_best_model: name of an evaluation metric; None takes the task's own (``"accuracy"`` for
            classification, ``"loss"`` for texts to write, ``"f1"`` for answers, ``"accuracy"`` or ``"entity_f1"`` for
            labels of words, ``"mrr"`` or ``"average_precision"`` for embeddings).
        greater_is_better: direction of `metric_for_best_model`; None means smaller for names that contain ``loss`` or
            ``perplexity`` and greater for all others.
        early_stopping_patience: stop after this many evaluations in a row without a new best; None for never.
        report_to: ``"none"`` or ``"tensorboard"`` (events in ``output_dir/tensorboard``).
        gradient_checkpointing: recompute the backbone's layers in the backward pass instead of keeping activations.
        disable_tqdm: no progress bar; without it there is one where standard error is a terminal.
        max_length: longest text in tokens, virtual tokens not counted; None means what the backbone's positions leave
            beside the prompt.
        truncation: cut texts that are longer; otherwise such a row is an error.
    """

    output_dir: str
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optim: str = "adamw"
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_grad_norm: float | None = 1.0
    label_smoothing_factor: float = 0.0
    bf16: bool = False
    seed: int = 42
    eval_strategy: str | None = None
    eval_steps: int | None = None
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    logging_steps: int = 10
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    report_to: str = "none"
    gradient_checkpointing: bool = False
    disable_tqdm: bool = False
    max_length: int | None = None
    truncation: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.output_dir, str) or hasattr(self.output_dir, "__fspath__")) or not str(self.output_dir):
            raise _wrong("output_dir", "the path of a folder", self.output_dir)
        object.__setattr__(self, "output_dir", str(self.output_dir))
        _number(self, "num_train_epochs", "a number above 0", low=0, low_open=True)
        if not is_whole(self.max_steps) or (self.max_steps != -1 and self.max_steps < 1):
            raise InputError(
                "expected max_steps, -1 (as many as num_train_epochs asks for) or a whole number of at least 1, "
                f"got {self.max_steps!r}"
            )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "save_steps",
            "logging_steps",
        ):
            check_whole(name, getattr(self, name))
        for name in ("eval_steps", "save_total_limit", "early_stopping_patience", "max_length"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_whole("seed", self.seed, 0, MOST_SEED)
        if self.learning_rate is not None:
            _number(self, "learning_rate", "None or a number above 0", low=0, low_open=True)
        _number(self, "head_learning_rate", "a number above 0", low=0, low_open=True)
        _number(self, "weight_decay", "a number of at least 0", low=0)
        for name, limit in _LIMITS.items():
            if (getattr(self, name) or 0) >= limit:
                raise _wrong(name, f"a number below {limit:g}", getattr(self, name))
        _number(self, "warmup_ratio", "a number in [0, 1)", low=0, high=1)
        _number(self, "label_smoothing_factor", "a number in [0, 1)", low=0, high=1)
        if self.max_grad_norm is not None:
            _number(self, "max_grad_norm", "None or a number above 0", low=0, low_open=True)
        _choice(self, "optim", ("adamw", "adafactor"))
        _choice(self, "lr_scheduler_type", ("constant", "linear", "cosine"))
        _choice(self, "eval_strategy", ("no", "steps", "epoch", None))
        _choice(self, "save_strategy", ("no", "steps", "epoch"))
        _choice(self, "report_to", ("none", "tensorboard"))
        flags = ("bf16", "load_best_model_at_end", "gradient_checkpointing", "disable_tqdm", "truncation")
        check_flags(**{name: getattr(self, name) for name in flags})
        if self.greater_is_better is not None and not isinstance(self.greater_is_better, bool):
            raise _wrong("greater_is_better", "None, True or False", self.greater_is_better)
        if self.metric_for_best_model is not None and (
            not isinstance(self.metric_for_best_model, str) or not self.metric_for_best_model
        ):
            raise _wrong("metric_for_best_model", "None or the name of a metric", self.metric_for_best_model)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise InputError(
                "expected warmup_steps or warmup_ratio, "
                f"got both (warmup_steps={self.warmup_steps}, warmup_ratio={self.warmup_ratio})"
            )
        if self.max_steps != -1 and self.warmup_steps > self.max_steps:
            raise InputError(f"expected warmup_steps of at most max_steps={self.max_steps}, got {self.warmup_steps}")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise InputError("expected eval_steps with eval_strategy='steps', got None")
        if self.eval_strategy != "steps" and self.eval_steps is not None:
            raise InputError(
                f"expected eval_steps only with eval_strategy='steps', "
                f"got eval_steps={self.eval_steps} with eval_strategy={self.eval_strategy!r}"
            )
        if self.eval_strategy == "no":
            for name in ("early_stopping_patience", "metric_for_best_model", "load_best_model_at_end"):
                if getattr(self, name):
                    raise InputError(
                        f"expected eval_strategy 'steps' or 'epoch' for {name}={getattr(self, name)!r}, got 'no'"
                    )
        if self.greater_is_better is not None and self.metric_for_best_model is None:
            raise InputError("expected metric_for_best_model with greater_is_better, got None")


def _wrong(name: str, expected: str, value: Any) -> InputError:
    return InputError(f"expected {name}, {expected}, got {value!r}")


def _number(
    config: TrainingConfig, name: str, expected: str, low: float, high: float = math.inf, low_open: bool = False
) -> None:
    """Require a finite number in [low, high), or (low, high) with `low_open`."""
    value = getattr(config, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value < high or (low_open and value == low):
        raise _wrong(name, expected, value)


def _choice(config: TrainingConfig, name: str, choices: Sequence[str | None]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise _wrong(name, "one of " + ", ".join(repr(choice) for choice in choices), value)
