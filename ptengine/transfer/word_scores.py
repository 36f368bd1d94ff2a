"""What a frozen model behind each of several prompts thinks of a task's labels: all prompts on the same rows at once.

Every row is laid into the batch once per prompt and reads its own: N prompts cost one forward over N times the texts.
Knows the patched backbone, lowered prompts and encoded rows; nothing of what the scores are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ptengine.backbone import (
    encoder_hidden,
    label_hidden,
    label_log_probs,
    masked_lm_logits,
    seq2seq_log_probs,
    sequence_head,
)
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.packing import PackedBatch, sources_and_targets
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.data import (
    BoundVerbalizer,
    ClassificationTask,
    EncodedRow,
    LabelledTask,
    MaskedClassificationTask,
    Seq2SeqClassificationTask,
    Task,
    collate,
)
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training.objective_base import label_scores

__all__ = [
    "WordTask",
    "bound_words",
    "class_log_probs",
    "head_log_probs",
    "row_batches",
    "target_log_probs",
    "unlabelled",
    "word_log_probs",
]

WordTask: TypeAlias = ClassificationTask | MaskedClassificationTask | Seq2SeqClassificationTask


def row_batches(rows: Sequence[EncodedRow], size: int) -> Iterator[Sequence[EncodedRow]]:
    """`rows` in order, at most `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def repeated(rows: Sequence[EncodedRow], times: int) -> tuple[PackedBatch, list[int]]:
    """The rows `times` over in one batch, prompt by prompt, and the prompt of each."""
    return collate([*rows] * times), [prompt for prompt in range(times) for _ in rows]


@torch.no_grad()
def target_log_probs(
    model: Any, spec: BackboneSpec, prompts: Sequence[LoweredPrompt], rows: Sequence[EncodedRow], bf16: bool
) -> tuple[Tensor, Tensor]:
    """log p of every target token of N copies of B rows, fp32 [N * n], and its row among them, int64 [N * n].

    Args:
        model, spec: a patched, frozen causal model or encoder-decoder.
        prompts: N of one kind.
        rows: B rows with targets.
        bf16: run the model under bfloat16 autocast.
    """
    batch, ids = repeated(rows, len(prompts))
    device = spec.word_embeddings.weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if spec.kind != "seq2seq":
            return label_log_probs(model, prompts, batch.to(device), prompt_ids=ids)
        lengths = torch.tensor([row.prompt_length for row in rows] * len(prompts))  # [N * B]
        pairs = sources_and_targets(replace(batch, source_lengths=lengths).to(device))
        return seq2seq_log_probs(model, prompts, *pairs, prompt_ids=ids)


@torch.no_grad()
def word_log_probs(
    model: Any,
    spec: BackboneSpec,
    prompts: Sequence[LoweredPrompt],
    task: WordTask,
    bound: BoundVerbalizer,
    rows: Sequence[EncodedRow],
    bf16: bool,
) -> Tensor:
    """log p(word | text) behind every prompt: fp32 [N, B, W], the W words in the order of ``bound.words``.

    Args:
        model, spec: a patched, frozen model of the task's kind.
        prompts: N of one kind.
        task, bound: the task and its verbaliser in the model's tokens.
        rows: B rows that the task encoded; their labels are not read.
        bf16: run the model under bfloat16 autocast.
    """
    shape = (len(prompts), len(rows), len(bound.words))
    device = spec.word_embeddings.weight.device
    if bound.single_token:
        batch, ids = repeated(rows, len(prompts))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if isinstance(task, MaskedClassificationTask):
                logits, _ = masked_lm_logits(model, prompts, batch.to(device), prompt_ids=ids)  # [N * B, V]
            else:
                found = label_hidden(model, prompts, batch.to(device), prompt_ids=ids)
                logits = vocabulary_logits(spec, found.hidden).float()  # [N * B, V]
        words = torch.tensor([word[0] for word in bound.words], device=logits.device)  # [W]
        return (logits[:, words] - logits.logsumexp(dim=1, keepdim=True)).view(shape)  # [N, B, W]
    assert not isinstance(task, MaskedClassificationTask)  # whose words are single tokens
    candidates = [candidate for row in rows for candidate in task.candidates(row, bound)]  # B * W
    log_probs, at = target_log_probs(model, spec, prompts, candidates, bf16)  # [n], [n]
    sums = torch.zeros(math.prod(shape), device=log_probs.device)  # [N * B * W]
    return sums.index_add(0, at.long(), log_probs.float()).view(shape)  # [N, B, W]


def class_log_probs(words: Tensor, bound: BoundVerbalizer) -> Tensor:
    """Log probabilities of the labels among themselves, from those of their words: [..., W] -> [..., C].

    A label has the sum of its words' probabilities; the labels' add up to 1.
    """
    return label_scores(words, bound).log_softmax(dim=-1)


@torch.no_grad()
def head_log_probs(
    model: Any,
    spec: BackboneSpec,
    prompts: Sequence[LoweredPrompt],
    heads: Sequence[HeadedPrompt],
    rows: Sequence[EncodedRow],
    bf16: bool,
) -> Tensor:
    """log p(label | text) of every prompt's own head: fp32 [N, B, C].

    Args:
        model, spec: a patched, frozen encoder with a head for classes.
        prompts: N of one kind.
        heads: whose heads they are read with.
        rows: B rows; their labels are not read.
        bf16: run the model under bfloat16 autocast.
    """
    batch, ids = repeated(rows, len(prompts))
    device = spec.word_embeddings.weight.device
    alone = collate(rows).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        hidden = encoder_hidden(model, prompts, batch.to(device), prompt_ids=ids)  # [N * n, d]
        logits = [
            sequence_head(model, own, alone, prompt.head_weights())  # [B, C]
            for own, prompt in zip(hidden.split(alone.num_tokens), heads, strict=True)
        ]
    return torch.stack(logits).float().log_softmax(dim=-1)  # [N, B, C]


def bound_words(task: Task, tokenizer: Any) -> BoundVerbalizer | None:
    """A task's words in the tokenizer's tokens; None of a task that has no words."""
    if isinstance(task, MaskedClassificationTask | Seq2SeqClassificationTask):
        return task.bind(tokenizer)
    return task.verbalizer.bind(tokenizer) if isinstance(task, ClassificationTask) else None


def unlabelled(rows: Sequence[Mapping[str, Any]], task: LabelledTask) -> list[dict[str, Any]]:
    """Rows that `task` can encode for scoring, whatever label they have or lack: every one gets the first label."""
    return [{**row, task.label_column: task.labels[0]} for row in rows]
