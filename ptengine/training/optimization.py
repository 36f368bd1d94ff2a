"""Optimiser and learning-rate schedule of a run, and their state as plain tensors and json values.

Knows parameters and settings only: no model, no data, no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ptengine.configuration import TrainingConfig
from ptengine.errors import InputError

__all__ = [
    "load_optimizer_state",
    "load_schedule_state",
    "make_optimizer",
    "make_schedule",
    "optimizer_state",
    "schedule_state",
    "warmup_steps",
]


def make_optimizer(
    config: TrainingConfig,
    prompt: Sequence[nn.Parameter],
    head: Sequence[nn.Parameter],
    learning_rate: float,
    factors: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of `config.optim` over the prompt's parameters and, with their own rate, the head's.

    `factors` are of the learning rate, one for each of the prompt's parameters; None means 1 for all.
    """
    by_factor: dict[float, list[nn.Parameter]] = {1.0: []} if prompt else {}
    for parameter, factor in zip(prompt, factors or [1.0] * len(prompt), strict=True):
        by_factor.setdefault(factor, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "lr": learning_rate * factor} for factor, members in by_factor.items() if members
    ]
    if head:
        groups.append({"params": list(head), "lr": config.head_learning_rate})
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=config.weight_decay)
    # torch.optim.Adafactor always scales the rate by the parameter's size; the prompt-tuning recipe turns that off.
    from transformers.optimization import Adafactor

    return Adafactor(
        groups, lr=learning_rate, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False
    )


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Optimiser steps of warm-up; `InputError` where they exceed the run."""
    steps = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if steps > total_steps:
        raise InputError(f"expected warmup_steps of at most the run's {total_steps} steps, got {steps}")
    return steps


def make_schedule(config: TrainingConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The schedule of `config.lr_scheduler_type`, to be stepped once after every optimiser step."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps(config, total_steps), num_training_steps=total_steps
    )


def schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    """State as json values. The rate is a function of the step, so the functions themselves are not part of it."""
    return {name: value for name, value in schedule.state_dict().items() if name != "lr_lambdas"}


def load_schedule_state(schedule: LRScheduler, state: dict[str, Any]) -> None:
    schedule.load_state_dict({**state, "lr_lambdas": [None] * len(schedule.optimizer.param_groups)})


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state into tensors, named ``<parameter index>.<key>``, and json values.

    Parameters are numbered in the order of the groups, as in `Optimizer.state_dict`.
    """
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in full["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                # Adafactor's RMS and AdamW's step are tensors that later steps change in place.
                tensors[f"{index}.{key}"] = value.detach().to("cpu", copy=True)
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"values": values, "groups": full["param_groups"]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `optimizer_state` took, to the last bit.

    `Optimizer.load_state_dict` casts floating-point state to the parameter's dtype; all trained parameters are float32,
    as is their state, so the cast changes nothing.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    for number, entries in plain["values"].items():
        state.setdefault(int(number), {}).update(entries)
    fresh = optimizer.state_dict()["param_groups"]
    # json has no tuples: betas and eps come back as lists.
    groups = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in saved.items()}
        for saved, now in zip(plain["groups"], fresh, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
