"""What a task asks of a step and of an evaluation: the loss that is trained, and the numbers that judge the result.

One class per kind of task. Knows the patched backbone, prompts and encoded rows; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import PackedLoss, label_hidden, label_log_probs, packed_loss, seq2seq_log_probs, seq2seq_loss
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch, sources_and_targets
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.data import (
    BoundVerbalizer,
    ClassificationTask,
    EmbeddingTask,
    EncodedRow,
    GenerationTask,
    MaskedClassificationTask,
    QuestionAnsweringTask,
    Seq2SeqClassificationTask,
    Seq2SeqTask,
    SequenceClassificationTask,
    Task,
    TokenClassificationTask,
)
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.training.answer_objective import AnswerObjective
from ptengine.training.embedding_objective import EmbeddingObjective, LabelledEmbeddingObjective
from ptengine.training.encoder_objectives import MaskedObjective, SequenceObjective
from ptengine.training.objective_base import (
    BaseObjective,
    EvalResult,
    Objective,
    class_result,
    label_scores,
    lower,
    perplexity,
)
from ptengine.training.token_objective import EntityObjective, TokenObjective

__all__ = ["EvalResult", "Objective", "make_objective"]


def make_objective(task: Task, model: Any, spec: BackboneSpec, tokenizer: Any, bf16: bool) -> Objective:
    """The objective of `task` on `model`.

    Raises:
        InputError: no tokenizer, `bf16` with weights in float16, the task is for the other kind of backbone, or the
            model has not the head it needs.
    """
    if not callable(tokenizer):
        raise InputError(f"expected tokenizer, that of the model, got {type(tokenizer).__name__}")
    if bf16 and spec.word_embeddings.weight.dtype == torch.float16:
        raise InputError("expected bf16=False with a model in float16, which bfloat16 autocast does not take, got True")
    if task.backbone_kind != spec.kind:
        raise InputError(
            f"expected a task for {spec.kind} models with model type {spec.model_type!r}, got {type(task).__name__}, "
            f"which is for {task.backbone_kind} models{_better_task(spec)}"
        )
    if isinstance(task, EmbeddingTask):
        make = EmbeddingObjective if task.label_column is None else LabelledEmbeddingObjective
        return make(model, spec, bf16, task.temperature)
    if isinstance(task, QuestionAnsweringTask):
        _require_head(model, "QuestionAnswering")
        return AnswerObjective(model, spec, bf16, task.max_answer_length)
    if isinstance(task, TokenClassificationTask):
        _require_head(model, "TokenClassification")
    if isinstance(task, SequenceClassificationTask | TokenClassificationTask):
        classes = getattr(model.config, "num_labels", None)
        if classes != len(task.labels):
            raise InputError(
                f"expected a model whose head has the task's {len(task.labels)} labels (num_labels), got {classes}"
            )
        if isinstance(task, TokenClassificationTask):
            return (EntityObjective if task.has_entities else TokenObjective)(model, spec, bf16, task.labels)
        return SequenceObjective(model, spec, bf16, task)
    if spec.lm_head is None:
        raise InputError(f"expected a model with a language-modelling head, got {type(model).__name__}")
    if isinstance(task, ClassificationTask):
        return _WordObjective(model, spec, bf16, task, task.verbalizer.bind(tokenizer))
    if isinstance(task, Seq2SeqClassificationTask):
        return _Seq2SeqWordObjective(model, spec, bf16, task, task.bind(tokenizer))
    if isinstance(task, Seq2SeqTask):
        return _Seq2SeqObjective(model, spec, bf16)
    if isinstance(task, GenerationTask):
        return _TextObjective(model, spec, bf16)
    if isinstance(task, MaskedClassificationTask):
        return MaskedObjective(model, spec, bf16, task.bind(tokenizer))
    raise InputError(f"expected a task of ptengine.data, got {type(task).__name__}")


def _better_task(spec: BackboneSpec) -> str:
    return ": an encoder-decoder takes Seq2SeqTask or Seq2SeqClassificationTask" if spec.kind == "seq2seq" else ""


def _require_head(model: Any, name: str) -> None:
    """Heads differ in nothing but their classes' names before they run."""
    if not type(model).__name__.endswith(f"For{name}"):
        raise InputError(f"expected a model with the head of AutoModelFor{name}, got {type(model).__name__}")


class _TargetObjective(BaseObjective):
    """The loss stands on labelled tokens."""

    def count_labels(self, batch: PackedBatch) -> int:
        return 0 if batch.labels is None else int((batch.labels != IGNORE_INDEX).sum())

    def loss(self, prompt: Prompt | None, batch: PackedBatch, label_smoothing: float) -> Tensor:
        lowered = lower(prompt)
        with self._autocast():
            return self._loss(lowered, batch, label_smoothing).loss

    def _loss(self, lowered: LoweredPrompt | None, batch: PackedBatch, label_smoothing: float) -> PackedLoss:
        return packed_loss(self._model, lowered, batch, label_smoothing=label_smoothing)


class _TextObjective(_TargetObjective):
    """Generation: the loss of the target's tokens under teacher forcing."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    default_metric: ClassVar[str] = "loss"

    @torch.no_grad()
    def evaluate(
        self,
        prompt: Prompt | None,
        rows: Sequence[EncodedRow],
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        lowered = lower(prompt)
        total, count = 0.0, 0
        for part in self._batches(rows, batch_size, check):
            with self._autocast():
                result = self._loss(lowered, self.collate(part), 0.0)
            total += result.loss.item() * result.num_labels
            count += result.num_labels
        loss = total / count
        return EvalResult({"loss": loss, "perplexity": perplexity(loss)}, [], len(rows))


class _SourcesAndTargets(_TargetObjective):
    """The rows of an encoder-decoder, each a source and a target."""

    def collate(self, rows: Sequence[EncodedRow]) -> PackedBatch:
        lengths = torch.tensor([row.prompt_length for row in rows], device=self._device)  # [B]
        return replace(super().collate(rows), source_lengths=lengths)

    def _loss(self, lowered: LoweredPrompt | None, batch: PackedBatch, label_smoothing: float) -> PackedLoss:
        return seq2seq_loss(self._model, lowered, *sources_and_targets(batch), label_smoothing=label_smoothing)


class _Seq2SeqObjective(_SourcesAndTargets, _TextObjective):
    """Generation by an encoder-decoder."""


class _WordObjective(_TargetObjective):
    """Classification by words: a label's score is the log of the sum of its words' probabilities."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "weighted_f1")
    default_metric: ClassVar[str] = "accuracy"

    def __init__(
        self,
        model: Any,
        spec: BackboneSpec,
        bf16: bool,
        task: ClassificationTask | Seq2SeqClassificationTask,
        bound: BoundVerbalizer,
    ) -> None:
        super().__init__(model, spec, bf16)
        self._task = task
        self._bound = bound

    @torch.no_grad()
    def evaluate(
        self,
        prompt: Prompt | None,
        rows: Sequence[EncodedRow],
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        lowered = lower(prompt)
        score = self._score_tokens if self._bound.single_token else self._score_words
        # Every word of every row is a row of its own where words have several tokens: the same memory per batch.
        size = max(batch_size // self._bound.rows_per_text, 1)
        total, count = 0.0, 0
        predicted: list[int] = []
        for part in self._batches(rows, size, check):
            words, loss, labels = score(lowered, part)  # [B, W]
            classes = label_scores(words, self._bound)  # [B, C]
            predicted += classes.argmax(dim=1).tolist()
            total += loss
            count += labels
        return class_result(total / count, rows, predicted, self._bound.labels)

    def _score_tokens(self, lowered: LoweredPrompt | None, rows: Sequence[EncodedRow]) -> tuple[Tensor, float, int]:
        """Words of one token: one forward over the text. Scores lack the row's log normaliser, equal for all words."""
        with self._autocast():
            found = label_hidden(self._model, lowered, self.collate(rows))
            logits = vocabulary_logits(self._spec, found.hidden).float()  # [B, V]
        loss = F.cross_entropy(logits, found.labels, reduction="sum").item()
        words = torch.tensor([word[0] for word in self._bound.words], device=self._device)  # [W]
        return logits[:, words], loss, len(rows)  # [B, W]

    def _score_words(self, lowered: LoweredPrompt | None, rows: Sequence[EncodedRow]) -> tuple[Tensor, float, int]:
        """Words of several tokens: one row per word, log probabilities summed over its tokens."""
        candidates = [candidate for row in rows for candidate in self._task.candidates(row, self._bound)]
        with self._autocast():
            log_probs, at = self._log_probs(lowered, self.collate(candidates))  # [n], [n]
        sums = torch.zeros(len(candidates), device=self._device).index_add(0, at.long(), log_probs.float())  # [B * W]
        words = sums.view(len(rows), -1)  # [B, W]
        # The loss is that of training: on the tokens of the first word of the row's label.
        first = [self._bound.first_word(row.class_id) for row in rows]
        picked = words[torch.arange(len(rows)), torch.tensor(first)]  # [B]
        return words, -picked.sum().item(), sum(len(self._bound.words[word]) for word in first)

    def _log_probs(self, lowered: LoweredPrompt | None, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return label_log_probs(self._model, lowered, batch)


class _Seq2SeqWordObjective(_SourcesAndTargets, _WordObjective):
    """The same of an encoder-decoder, whose words end with an EOS and so have at least two tokens."""

    def _log_probs(self, lowered: LoweredPrompt | None, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return seq2seq_log_probs(self._model, lowered, *sources_and_targets(batch))
