"""Prompt ensembles: several prompts on the same rows in one batch, whose probabilities are averaged.

Knows tasks, prompts and the frozen model; trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone import backbone_spec
from ptengine.backbone.lowering import LoweredPrompt, TextDependentTokens, VirtualTokens
from ptengine.backbone.modes import lowered_as_used
from ptengine.backbone.spec import BackboneSpec
from ptengine.checks import check_flags, check_whole
from ptengine.data import (
    BoundVerbalizer,
    EncodedRow,
    GenerationTask,
    LabelledTask,
    Seq2SeqTask,
    SequenceClassificationTask,
    Task,
)
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training import EvalResult
from ptengine.training.freezing import frozen
from ptengine.training.objective import make_objective
from ptengine.training.objective_base import class_result, perplexity
from ptengine.training.preparation import DataSource, check_own_head, check_places, check_prompt, encode, room_for_text
from ptengine.transfer.arithmetic import normalized_weights
from ptengine.transfer.word_scores import (
    WordTask,
    bound_words,
    class_log_probs,
    head_log_probs,
    row_batches,
    target_log_probs,
    word_log_probs,
)

__all__ = ["evaluate_ensemble", "likelihood_weights"]


def evaluate_ensemble(
    model: Any,
    prompts: Sequence[Prompt],
    task: Task,
    data: DataSource,
    tokenizer: Any,
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    truncation: bool = False,
    bf16: bool = False,
) -> EvalResult:
    """Evaluate the mixture p(y | x) = sum_j w_j p(y | P_j, x) of several prompts; nothing is generated.

    Classification averages the labels' probabilities, each prompt's normalised over the labels; the loss is that of the
    mixture over the whole vocabulary (over the labels, where heads say them). Generation averages the probability of
    every target token under teacher forcing. With one prompt both equal `ptengine.training.evaluate`.

    Args:
        model: a transformers model; patched and in eval mode for the call, then put back.
        prompts: at least one, all virtual tokens or all prefixes; of a task with a trained head each a `HeadedPrompt`.
        task: classification by words or by a head, or generation.
        data, tokenizer, max_length, truncation, bf16: as in `evaluate`.
        weights: w, one per prompt, of at least 0 and not all 0; they are divided by their sum. None weighs all alike;
            `likelihood_weights` gives those of held-back rows.
        batch_size: rows per forward, copies for the prompts counted.

    Returns:
        As `evaluate`, of the mixture: loss, perplexity for generation, metrics and predictions for classification.

    Raises:
        InputError: no prompts, prompts of different kinds or of another backbone, weights that are not as described,
            another kind of task, or as `evaluate`.
    """
    log_w = torch.tensor(normalized_weights(len(prompts), weights), dtype=torch.float64).log()  # [N]
    work = _checked(model, prompts, task, data, tokenizer, batch_size, max_length, truncation, bf16)
    total, count = 0.0, 0
    predicted: list[int] = []
    for part in work.scored():
        total -= torch.logsumexp(log_w[:, None] + part.targets, dim=0).sum().item()
        count += part.num_tokens
        if part.classes is not None:
            labels = torch.logsumexp(log_w[:, None, None] + part.classes, dim=0)  # [B, C]
            predicted += labels.argmax(dim=1).tolist()
    loss = total / count
    if isinstance(task, LabelledTask):
        return class_result(loss, work.rows, predicted, task.labels)
    return EvalResult({"loss": loss, "perplexity": perplexity(loss)}, [], len(work.rows))


def likelihood_weights(
    model: Any,
    prompts: Sequence[Prompt],
    task: Task,
    data: DataSource,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    truncation: bool = False,
    bf16: bool = False,
) -> tuple[float, ...]:
    """Weights of an ensemble from rows that no prompt was trained on: w_j proportional to exp(-loss_j).

    That is the geometric mean over labelled tokens of what prompt j gives them, so the weights do not depend on how
    many rows there are. Arguments and errors as in `evaluate_ensemble`.
    """
    work = _checked(model, prompts, task, data, tokenizer, batch_size, max_length, truncation, bf16)
    sums, count = torch.zeros(len(prompts), dtype=torch.float64), 0
    for part in work.scored():
        sums += part.targets.sum(dim=1)
        count += part.num_tokens
    return tuple((sums / count).softmax(dim=0).tolist())


@dataclass(frozen=True)
class _Part:
    """What N prompts think of some rows, fp64 on the CPU.

    Attributes:
        targets: log p of each target (a label's first word, or a token), [N, n].
        classes: log p of each label among the labels, [N, B, C]; None for a generation task.
        num_tokens: labelled tokens in `targets`, over which a loss is a mean.
    """

    targets: Tensor
    classes: Tensor | None
    num_tokens: int


@dataclass(frozen=True)
class _Work:
    """Checked prompts and rows of one call."""

    model: Any
    spec: BackboneSpec
    prompts: Sequence[LoweredPrompt]
    heads: Sequence[HeadedPrompt]
    task: Task
    bound: BoundVerbalizer | None
    rows: Sequence[EncodedRow]
    batch_size: int
    bf16: bool

    def scored(self) -> Iterator[_Part]:
        several = 1 if self.bound is None else self.bound.rows_per_text
        size = max(self.batch_size // (len(self.prompts) * several), 1)
        with frozen(self.model), torch.no_grad():
            for rows in row_batches(self.rows, size):
                if self.heads:
                    yield self._heads(rows)
                else:
                    yield self._tokens(rows) if self.bound is None else self._labels(rows, self.bound)

    def _heads(self, rows: Sequence[EncodedRow]) -> _Part:
        classes = (
            head_log_probs(self.model, self.spec, self.prompts, self.heads, rows, self.bf16).double().cpu()
        )  # [N, B, C]
        gold = torch.tensor([row.class_id for row in rows])  # [B]
        return _Part(classes[:, torch.arange(len(rows)), gold], classes, len(rows))

    def _tokens(self, rows: Sequence[EncodedRow]) -> _Part:
        found, _ = target_log_probs(self.model, self.spec, self.prompts, rows, self.bf16)  # [N * n]
        targets = found.double().cpu().view(len(self.prompts), -1)  # [N, n]
        return _Part(targets, None, targets.shape[1])

    def _labels(self, rows: Sequence[EncodedRow], bound: BoundVerbalizer) -> _Part:
        assert isinstance(self.task, WordTask)
        words = word_log_probs(self.model, self.spec, self.prompts, self.task, bound, rows, self.bf16)  # [N, B, W]
        words = words.double().cpu()
        first = [bound.first_word(row.class_id) for row in rows]
        targets = words[:, torch.arange(len(rows)), torch.tensor(first)]  # [N, B]
        return _Part(targets, class_log_probs(words, bound), sum(len(bound.words[word]) for word in first))


def _checked(
    model: Any,
    prompts: Sequence[Prompt],
    task: Task,
    data: DataSource,
    tokenizer: Any,
    batch_size: int,
    max_length: int | None,
    truncation: bool,
    bf16: bool,
) -> _Work:
    if not isinstance(task, WordTask | SequenceClassificationTask | GenerationTask | Seq2SeqTask):
        raise InputError(f"expected a task of labels or of texts to write for an ensemble, got {type(task).__name__}")
    if not prompts:
        raise InputError("expected at least one prompt for an ensemble, got none")
    check_whole("batch_size", batch_size)
    check_flags(truncation=truncation, bf16=bf16)
    for prompt in prompts:
        if prompt is None:
            raise InputError("expected prompts for an ensemble, got None among them")
        check_prompt(prompt, model)
        check_places(task, prompt)
        check_own_head(task, prompt)
    heads = [prompt for prompt in prompts if isinstance(prompt, HeadedPrompt)]
    spec = backbone_spec(model)
    make_objective(task, model, spec, tokenizer, bf16)  # refuses what no task can be scored on
    with torch.no_grad():
        lowered = [lowered_as_used(prompt.fold()) for prompt in prompts]
    given = {VirtualTokens if isinstance(prompt, TextDependentTokens) else type(prompt) for prompt in lowered}
    kinds = sorted(kind.__name__ for kind in given)
    if len(kinds) > 1:
        raise InputError(f"expected prompts of one kind for an ensemble, got {' and '.join(kinds)}")
    room = min(room_for_text(spec, prompt, max_length) for prompt in prompts)
    rows = encode(
        task, data, tokenizer, prompts[0], spec, name="data", max_length=room, truncation=truncation
    ).rows  # fmt: skip
    return _Work(model, spec, lowered, heads, task, bound_words(task, tokenizer), rows, batch_size, bf16)
