"""What must be equal for a run to go on exactly: settings, data, prompt, head and backbone, as json values.

A checkpoint carries this description. Going on with another one would still run, but the losses would no longer be
those of the uninterrupted run, so it is refused. Knows no files and no optimiser.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.quantized import stored_parts
from ptengine.configuration import TrainingConfig
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt

__all__ = ["FREE_SETTINGS", "environment", "fingerprint_model", "fingerprint_rows", "require_same_run", "run_identity"]

FREE_SETTINGS = (
    "output_dir",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "load_best_model_at_end",
    "report_to",
    "disable_tqdm",
)
"""Settings that may change between a checkpoint and its resumption: no loss depends on them."""

_LENGTH_SETTINGS = ("max_steps", "num_train_epochs")
_PAST = ("num_virtual_tokens", "init", "projection_size", "default_learning_rate")  # or told by shapes and settings


def run_identity(
    config: TrainingConfig,
    learning_rate: float,
    prompt: Prompt | None,
    head: Mapping[str, Tensor],
    model: str,
    train: dict[str, Any],
    evaluation: dict[str, Any],
    step_loss: dict[str, Any],
) -> dict[str, Any]:
    """Describe a run.

    `model` comes from `fingerprint_model`, `train` and `evaluation` from `fingerprint_rows`, `step_loss` from
    `StepLoss.identity`.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    # The length of the run may change where the rate of a step does not depend on it.
    if config.lr_scheduler_type == "constant" and not config.warmup_ratio:
        for name in _LENGTH_SETTINGS:
            del settings[name]
    settings["learning_rate"] = learning_rate
    # Causes before what follows from them: a prompt's own learning rate depends on its method and its model.
    return {
        "model": {"fingerprint": model},
        "prompt": {
            "method": getattr(prompt, "method", None),
            **_settings(prompt),
            **_shapes(prompt.state_dict() if prompt is not None else {}),
        },
        "head": _shapes(head),
        "config": settings,
        "train_data": train,
        "eval_data": evaluation,
        "step_loss": step_loss,
    }


def require_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` naming the first thing that differs between a checkpoint and the run at hand."""
    for section, fields in now.items():
        before = saved.get(section, {})
        for name in {**before, **fields}:
            then, here = before.get(name), fields.get(name)
            if name in _LENGTH_SETTINGS and section == "config" and (name in before) != (name in fields):
                continue  # the schedule differs too, and is what will be named
            if then != here:
                raise InputError(
                    f"expected {section} {name}={then!r} as in the checkpoint {where}, got {here!r}; "
                    "with another value the run would not go on exactly: start a new run in another output_dir"
                )


def environment(device: torch.device) -> dict[str, Any]:
    """Facts that decide rounding: equal losses are promised only where these are equal."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def fingerprint_rows(rows: Iterable[Any]) -> dict[str, Any]:
    """Number and sha256 of encoded rows, in order; each is a dataclass of json values."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def fingerprint_model(model: nn.Module, skip: set[str] | frozenset[str] = frozenset()) -> str:
    """A sha256 over names, shapes, dtypes and 64 evenly spread elements of every parameter but those in `skip`.

    Enough to tell two models or two checkpoints of one model apart without reading all of their weights.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        for part in stored_parts(parameter):
            flat = part.detach().reshape(-1)
            picked = flat[:: max(flat.numel() // 64, 1)][:64].to("cpu", torch.float64)
            digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def _settings(prompt: Prompt | None) -> dict[str, Any]:
    """What decides the formula besides the tensors' shapes; where a prompt started from is past."""
    return {} if prompt is None else _without_past(prompt.config())


def _without_past(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of the prompt inside another one, too."""
    return {
        name: _without_past(value) if isinstance(value, dict) else value
        for name, value in described.items()
        if name not in _PAST
    }


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: list(tensor.shape) for name, tensor in state.items()}
