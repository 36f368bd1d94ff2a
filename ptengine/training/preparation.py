"""From what a user hands over to encoded rows that fit beside the prompt, or one clear error."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from datasets import Dataset

from ptengine.backbone.lowering import GatedTokens, KeyValuePrefix, VirtualTokens
from ptengine.backbone.spec import BackboneSpec
from ptengine.checks import check_whole
from ptengine.configuration import TrainingConfig
from ptengine.data import EncodedRow, EncodedSplit, Task, load_rows
from ptengine.data.cells import place
from ptengine.data.encoding import too_long
from ptengine.data.sources import name_of
from ptengine.data.tasks import head_labels, placed_virtual_tokens
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import backbone_facts
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training.objective_base import Objective

__all__ = [
    "DataSource",
    "check_batches",
    "check_checkpointing",
    "check_evaluation",
    "check_head",
    "check_own_head",
    "check_places",
    "check_prompt",
    "encode",
    "for_task",
    "room_for_text",
    "row_limits",
]

DataSource: TypeAlias = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Dataset | EncodedSplit


def check_prompt(prompt: Prompt | None, model: Any) -> None:
    """Refuse what is no prompt, and a prompt that was made for another backbone."""
    if prompt is None:
        return
    if not isinstance(prompt, Prompt):
        raise InputError(f"expected a ptengine prompt, got {type(prompt).__name__}")
    prompt.facts.require_same(backbone_facts(model), "the prompt")


def check_head(task: Task, prompt: Prompt | None) -> None:
    """Refuse a head that is the prompt's own where the task has none, or other labels."""
    if not isinstance(prompt, HeadedPrompt):
        return
    if not task.trains_head:
        raise InputError(f"expected a task with a trained head for a HeadedPrompt, got {type(task).__name__}")
    wanted, got = list(prompt.labels), list(head_labels(task))
    if wanted != got:
        raise InputError(f"expected a task with the labels of the prompt's head, {wanted}, got {got}")


def check_own_head(task: Task, prompt: Prompt) -> None:
    """As `check_head`; also refuse a prompt without a head where the task trains one and the model's own is no part of
    what is kept or compared."""
    check_head(task, prompt)
    if task.trains_head and not isinstance(prompt, HeadedPrompt):
        raise InputError(
            f"expected a HeadedPrompt, a prompt with its head, of a task with a trained head, got "
            f"{type(prompt).__name__}"
        )


def for_task(model: Any, prompt: Prompt, task: Task, seed: int) -> Prompt:
    """`prompt`, with a new head of its own where `task` trains one."""
    return HeadedPrompt(model, prompt, head_labels(task), seed=seed) if task.trains_head else prompt


def check_places(task: Task, prompt: Prompt | None) -> None:
    """Refuse a prompt that does not fill the places which the task's template has for virtual tokens."""
    placed = placed_virtual_tokens(task)
    if placed is None or prompt is None:
        return
    if isinstance(prompt.lower(), KeyValuePrefix | GatedTokens):
        raise InputError(
            f"expected a prompt of virtual tokens for the {placed} that the template places, got "
            f"{type(prompt).__name__}, which stands before all text or beside it"
        )
    if prompt.num_virtual_tokens != placed:
        raise InputError(
            f"expected a prompt of {placed} virtual tokens, as many as the template places, got "
            f"{prompt.num_virtual_tokens}"
        )


def check_batches(objective: Objective, num_rows: int, batch_size: int, source_name: str, setting: str) -> None:
    """Refuse batches of fewer rows than have a loss; `setting` is what errors call `batch_size`."""
    least = objective.least_rows
    if batch_size < least:
        raise InputError(
            f"expected {setting} of at least {least}, since texts find their pairs among the others of a batch, got "
            f"{batch_size}"
        )
    if num_rows < least:
        raise InputError(
            f"{source_name}: expected at least {least} rows, since texts find their pairs among the others of a batch, "
            f"got {num_rows}"
        )


def check_evaluation(
    objective: Objective, rows: Sequence[EncodedRow], batch_size: int, source_name: str, setting: str
) -> None:
    """As `check_batches`; also refuse rows on which a metric is undefined."""
    check_batches(objective, len(rows), batch_size, source_name, setting)
    objective.check_evaluable(rows, source_name)


def check_checkpointing(spec: BackboneSpec, prompt: Prompt | None, gradient_checkpointing: bool) -> None:
    """Refuse layers that run again where a prefix stands before the target: they are given no cache to count by."""
    if not gradient_checkpointing or spec.kind != "seq2seq" or prompt is None:
        return
    if isinstance(prompt.lower(), KeyValuePrefix):
        raise InputError(
            "expected gradient_checkpointing=False with a prefix in an encoder-decoder, whose layers count positions "
            "by a cache that they are not given when they run again, got True"
        )


def room_for_text(spec: BackboneSpec, prompt: Prompt | None, max_length: int | None) -> int:
    """Tokens a row may have: `max_length`, or what the prompt and the positions beside its P virtual tokens allow.

    For an encoder-decoder that is a source, and a target.

    Raises:
        InputError: the prompt leaves no room, or `max_length` is more than it leaves or no whole number of at least 1.
    """
    if max_length is not None:
        check_whole("max_length", max_length)
    taken = 0 if prompt is None else prompt.num_positions
    reach = None if prompt is None else prompt.max_text_length
    room = spec.max_positions - taken
    if room < 1:
        raise InputError(
            f"expected a prompt of fewer virtual tokens than the backbone's {spec.max_positions} positions, got {taken}"
        )
    if max_length is not None and max_length > room:
        raise InputError(
            f"expected max_length of at most {room} (the backbone's {spec.max_positions} positions minus {taken} "
            f"virtual tokens), got {max_length}"
        )
    if max_length is not None and reach is not None and max_length > reach:
        raise InputError(f"expected max_length of at most {reach}, the longest text of the prompt, got {max_length}")
    if max_length is not None:
        return max_length
    return room if reach is None else min(room, reach)


class RowLimits(TypedDict):
    """Of `encode`, `ptengine.training.evaluate` and whatever else reads rows."""

    max_length: int | None
    truncation: bool


def row_limits(config: TrainingConfig) -> RowLimits:
    """How long the rows of a run of `config` may be, and whether longer ones are cut."""
    return {"max_length": config.max_length, "truncation": config.truncation}


def encode(
    task: Task,
    data: DataSource,
    tokenizer: Any,
    prompt: Prompt | None,
    spec: BackboneSpec,
    *,
    name: str,
    max_length: int | None,
    truncation: bool,
) -> EncodedSplit:
    """Read and encode `data` for the room beside `prompt`; errors call it by its path, or by `name` where it has none.

    Rows that were cut are counted in a warning. What is encoded already, by the same task and tokenizer, is taken as it
    is.

    Raises:
        InputError: as `room_for_text`, `load_rows` and `Task.encode`; also a row whose target nothing stands before,
            unless `prompt` has virtual tokens to predict it from; a token or segment id beyond those that the backbone
            embeds; and an encoded row that is too long.
    """
    max_tokens = room_for_text(spec, prompt, max_length)
    source_name = name_of(data, name)
    if isinstance(data, EncodedSplit):
        split = data
        for row in split:
            length = len(row.input_ids)
            if task.backbone_kind == "seq2seq":  # the two parts stand in rows of their own
                length = max(row.prompt_length, length - row.prompt_length)
            if length > max_tokens:
                raise too_long(source_name, row.index, length, max_tokens, "encoded before")
    else:
        dataset = load_rows(data, name=source_name)
        split = task.encode(dataset, tokenizer, max_tokens=max_tokens, truncation=truncation, source_name=source_name)
        if split.truncated:
            warnings.warn(
                f"{source_name}: {split.truncated} of {len(split)} rows were cut to {max_tokens} tokens", stacklevel=3
            )
    segments = getattr(spec.base_model.config, "type_vocab_size", None) or None  # where it reads any
    for row in split:
        highest = max([*row.input_ids, *(row.pair_ids or ())], default=0)
        if highest >= spec.vocab_size:
            raise InputError(
                f"{place(source_name, row.index)}: expected token ids below {spec.vocab_size}, the words that the "
                f"backbone embeds, got {highest}: is the tokenizer the backbone's own?"
            )
        segment = max(row.token_type_ids or (), default=0)
        if segments is not None and segment >= segments:
            raise InputError(
                f"{place(source_name, row.index)}: expected segment ids (token_type_ids) below {segments}, those that "
                f"the backbone embeds, got {segment}: is the tokenizer the backbone's own?"
            )
    if task.backbone_kind != "encoder" and (prompt is None or not isinstance(prompt.lower(), VirtualTokens)):
        for row in split:
            if row.prompt_length == 0:
                raise InputError(
                    f"{place(source_name, row.index)}: expected at least one token before the target, got an empty "
                    "text; only virtual tokens that no text changes can take its place"
                )
    return split
