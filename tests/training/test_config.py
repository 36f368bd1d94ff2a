"""Every bad setting is one clear error that names the field, before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest

from ptengine.errors import InputError
from ptengine.training import TrainingConfig

BAD_VALUES: list[tuple[str, Any]] = [
    ("output_dir", ""),
    ("output_dir", None),
    ("num_train_epochs", 0),
    ("num_train_epochs", float("nan")),
    ("num_train_epochs", "3"),
    ("max_steps", 0),
    ("max_steps", -2),
    ("max_steps", 2.5),
    ("per_device_train_batch_size", 0),
    ("per_device_train_batch_size", True),
    ("per_device_eval_batch_size", -1),
    ("gradient_accumulation_steps", 0),
    ("learning_rate", 0.0),
    ("learning_rate", float("inf")),
    ("learning_rate", True),
    ("head_learning_rate", -1e-3),
    ("weight_decay", -0.1),
    ("optim", "sgd"),
    ("lr_scheduler_type", "step"),
    ("warmup_steps", -1),
    ("warmup_ratio", 1.0),
    ("warmup_ratio", -0.1),
    ("max_grad_norm", 0),
    ("label_smoothing_factor", 1.0),
    ("bf16", "yes"),
    ("seed", -1),
    ("seed", 1.0),
    ("eval_strategy", "always"),
    ("save_strategy", None),
    ("save_steps", 0),
    ("save_total_limit", 0),
    ("logging_steps", 0),
    ("load_best_model_at_end", 1),
    ("metric_for_best_model", ""),
    ("greater_is_better", 1),
    ("early_stopping_patience", 0),
    ("report_to", "wandb"),
    ("gradient_checkpointing", None),
    ("disable_tqdm", "no"),
    ("max_length", 0),
    ("truncation", "left"),
]

BAD_COMBINATIONS: list[tuple[str, dict[str, Any]]] = [
    ("warmup_ratio", {"warmup_steps": 3, "warmup_ratio": 0.1}),
    ("warmup_steps", {"max_steps": 5, "warmup_steps": 6}),
    ("eval_steps", {"eval_strategy": "steps"}),
    ("eval_steps", {"eval_steps": 10}),
    ("eval_steps", {"eval_strategy": "epoch", "eval_steps": 10}),
    ("early_stopping_patience", {"eval_strategy": "no", "early_stopping_patience": 2}),
    ("metric_for_best_model", {"eval_strategy": "no", "metric_for_best_model": "accuracy"}),
    ("load_best_model_at_end", {"eval_strategy": "no", "load_best_model_at_end": True}),
    ("metric_for_best_model", {"greater_is_better": True}),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=lambda part: repr(part))
def test_bad_value_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        TrainingConfig(**{"output_dir": "out", field: value})
    message = str(caught.value)
    assert f"expected {field}," in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize(("field", "settings"), BAD_COMBINATIONS, ids=lambda part: repr(part))
def test_bad_combination_names_field(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=field):
        TrainingConfig(output_dir="out", **settings)


def test_good_values_pass(tmp_path: Any) -> None:
    config = TrainingConfig(
        output_dir=tmp_path,
        max_steps=10,
        warmup_steps=10,
        learning_rate=1,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="f1",
        greater_is_better=False,
        early_stopping_patience=1,
    )
    assert config.output_dir == str(tmp_path)
