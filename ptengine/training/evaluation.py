"""Judging a prompt, or the frozen model without one, on a data set: the same numbers that training sees, and texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ptengine.backbone.generation import generate_in_batches
from ptengine.backbone.modes import eval_mode
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_flags, check_whole
from ptengine.configuration import TrainingConfig
from ptengine.data import EncodedRow, GenerationTask, Task, generation_metrics
from ptengine.data.metrics import check_bleu_tokenizer
from ptengine.data.sources import name_of
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.training.freezing import frozen, head_parameters
from ptengine.training.objective import EvalResult, make_objective
from ptengine.training.preparation import (
    DataSource,
    check_evaluation,
    check_head,
    check_places,
    check_prompt,
    encode,
    room_for_text,
    row_limits,
)
from ptengine.training.run import HEAD_NAME

__all__ = ["evaluate", "evaluation_options", "load_head"]


def evaluation_options(config: TrainingConfig) -> dict[str, Any]:
    """Keyword arguments with which `evaluate` treats rows as a run of `config` does."""
    return {
        "batch_size": config.per_device_eval_batch_size,
        **row_limits(config),
        "bf16": config.bf16,
    }


def evaluate(
    model: Any,
    prompt: Prompt | None,
    task: Task,
    data: DataSource,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    truncation: bool = False,
    bf16: bool = False,
    generate: bool = False,
    max_new_tokens: int = 64,
    bleu_tokenizer: str = "13a",
) -> EvalResult:
    """Evaluate `prompt` on `data`.

    Classification scores every label's words and takes the best label (nothing is generated). Generation is scored
    under teacher forcing, and with `generate` also by what the model writes, greedily, for each row.

    Args:
        model: a transformers model; it is patched and put in eval mode for the call, and put back.
        prompt: None evaluates the frozen model with the template's text only.
        task: what a row asks of the model.
        data: a path, a list of dicts or a `datasets.Dataset`.
        tokenizer: the model's tokenizer.
        batch_size: rows per forward.
        max_length, truncation, bf16: as in `TrainingConfig`.
        generate: write texts for a `GenerationTask` or a `Seq2SeqTask`, up to what ends the model's or the task's.
        max_new_tokens: longest text written.
        bleu_tokenizer: see `ptengine.data.generation_metrics`.

    Raises:
        InputError: as `ptengine.Trainer`; `generate` with a task that writes no text.
    """
    check_whole("batch_size", batch_size)
    check_whole("max_new_tokens", max_new_tokens)
    check_flags(truncation=truncation, bf16=bf16, generate=generate)
    check_bleu_tokenizer(bleu_tokenizer)
    if generate and not isinstance(task, GenerationTask):
        raise InputError(f"expected a GenerationTask with generate=True, got {type(task).__name__}")
    if not isinstance(task, Task):
        raise InputError(f"expected task, a task of ptengine.data, got {type(task).__name__}")
    spec = backbone_spec(model)
    check_prompt(prompt, model)
    check_places(task, prompt)
    check_head(task, prompt)
    objective = make_objective(task, model, spec, tokenizer, bf16)
    rows = encode(
        task, data, tokenizer, prompt, spec, name="data", max_length=max_length, truncation=truncation
    ).rows  # fmt: skip
    check_evaluation(objective, rows, batch_size, name_of(data, "data"), "batch_size")
    if generate:
        _check_room(rows, room_for_text(spec, prompt, None), max_new_tokens, task.backbone_kind == "seq2seq")
    with frozen(model), nullcontext() if prompt is None else eval_mode(prompt):
        result = objective.evaluate(prompt, rows, batch_size)
        if generate:
            assert isinstance(task, GenerationTask)
            with torch.autocast(spec.word_embeddings.weight.device.type, torch.bfloat16, enabled=bf16):
                texts = generate_in_batches(
                    model,
                    prompt,
                    [row.input_ids[: row.prompt_length] for row in rows],
                    tokenizer,
                    batch_size,
                    task.ending(tokenizer),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                )
            scores = generation_metrics(texts, [row.references for row in rows], bleu_tokenizer=bleu_tokenizer)
            result = replace(result, metrics=result.metrics | scores, predictions=texts)
    return result


def load_head(directory: str | os.PathLike[str], model: Any) -> None:
    """Put the classification head that training wrote to `directory` (``prompt/`` or ``best/``) into `model`.

    Raises:
        InputError: there is no ``head.safetensors``, it is damaged, or it does not fit the model's head; the model is
            then as it was.
    """
    path = Path(directory) / HEAD_NAME
    if not path.is_file():
        raise InputError(f"expected the file {str(path)!r}, which does not exist")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise InputError(f"expected a safetensors file, got {str(path)!r}: {error}") from error
    head = head_parameters(model)
    wanted = {name: list(parameter.shape) for name, parameter in head.items()}
    got = {name: list(tensor.shape) for name, tensor in saved.items()}
    if wanted != got:
        raise InputError(f"expected a head with {wanted} as in the model, got {got} in {str(path)!r}")
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(saved[name])


def _check_room(rows: Sequence[EncodedRow], room: int, new: int, apart: bool) -> None:
    """Refuse a text without room for `new` tokens behind it, or, where those stand `apart` from it, for either."""
    if apart:
        if 1 + new > room:
            raise InputError(f"expected max_new_tokens of at most {room - 1}, the positions of a target, got {new}")
        return
    if new >= room:
        raise InputError(
            f"expected max_new_tokens of at most {room - 1} (the backbone's positions minus the prompt and one token "
            f"of text), got {new}"
        )
    for row in rows:
        if not 1 <= row.prompt_length <= room - new:
            raise InputError(
                f"data, row {row.index} (counting from 0): expected a text of 1 to {room - new} tokens (the backbone's "
                f"positions minus the prompt and max_new_tokens={new}), got {row.prompt_length}"
            )
