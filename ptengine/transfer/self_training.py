"""Unlabelled texts, taught by a prompt: its probabilities of the labels, where it is sure enough, become targets.

`teach` asks the teacher once; `SelfTrainTerm` is the student's loss. Knows tasks, prompts and the frozen backbone; no
optimiser and no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import (
    IGNORE_INDEX,
    backbone_spec,
    encoder_hidden,
    label_losses,
    masked_lm_losses,
    seq2seq_losses,
    sequence_head,
)
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.modes import lowered_as_used
from ptengine.backbone.packing import PackedBatch, sources_and_targets
from ptengine.data import (
    BoundVerbalizer,
    ClassificationTask,
    EncodedRow,
    LabelledTask,
    MaskedClassificationTask,
    Seq2SeqClassificationTask,
    SequenceClassificationTask,
    Task,
    check_columns,
    collate,
    load_rows,
)
from ptengine.data.serialization import task_to_json
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training import TrainingConfig
from ptengine.training.freezing import frozen
from ptengine.training.head_objective import own_head
from ptengine.training.identity import fingerprint_rows
from ptengine.training.preparation import DataSource, encode, row_limits
from ptengine.transfer.augmentation import augment
from ptengine.transfer.step_rows import StepRows
from ptengine.transfer.strategies import SelfTrain
from ptengine.transfer.word_scores import (
    WordTask,
    bound_words,
    class_log_probs,
    head_log_probs,
    row_batches,
    unlabelled,
    word_log_probs,
)

__all__ = ["NothingTaught", "SelfTrainTerm", "Taught", "teach", "unlabelled_rows"]


class NothingTaught(InputError):
    """No text counts: the teacher is sure enough of none, or none has a changed copy."""


@dataclass(frozen=True)
class Taught:
    """Texts with what a teacher says of them.

    Attributes:
        rows: encoded texts (or their changed copies), one for every label that has a target above 0.
        examples: for every text that counts the positions of its rows, and their targets, which add up to 1.
        texts: how many texts the teacher was asked about.
        kept: of how many it was sure enough.
        labels: label to how many of those it gave it to.
    """

    rows: Sequence[EncodedRow]
    examples: Sequence[tuple[Sequence[int], Sequence[float]]]
    texts: int
    kept: int
    labels: Mapping[str, int]

    @property
    def one_label(self) -> bool:
        """Whether the teacher gave all texts that count the same label: they then teach to say it and no more."""
        return sum(count > 0 for count in self.labels.values()) == 1

    def to_json(self) -> dict[str, Any]:
        return {"texts": self.texts, "kept": self.kept, "views": len(self.examples), "labels": dict(self.labels)}


def unlabelled_rows(task: Task, data: DataSource) -> list[dict[str, Any]]:
    """Texts without their labels, which are not read even where there are some.

    Raises:
        InputError: a task without labels, or as `ptengine.data.load_rows`; a column is missing.
    """
    if not isinstance(task, LabelledTask):
        raise InputError(f"expected a task of labels for self-training, got {type(task).__name__}")
    columns = [*task.text_columns]
    dataset = load_rows(data, name="unlabelled")
    check_columns(dataset, columns, "unlabelled")
    return unlabelled([dict(row) for row in dataset.with_format(None).select_columns(columns)], task)


def teach(
    model: Any,
    tokenizer: Any,
    task: LabelledTask,
    rows: Sequence[Mapping[str, Any]],
    teacher: Prompt,
    settings: SelfTrain,
    config: TrainingConfig,
) -> Taught:
    """What `teacher` says of `rows` (`unlabelled_rows`), made into targets as `settings` say.

    Args:
        config: its lengths, precision and evaluation batch size hold here, too.

    Raises:
        NothingTaught: the teacher is sure enough of no text, or no changed copy differs from it.
        InputError: as `training.evaluate`.
    """
    spec, bound = backbone_spec(model), bound_words(task, tokenizer)

    def encoded(some: Sequence[Mapping[str, Any]]) -> list[EncodedRow]:
        return encode(task, some, tokenizer, teacher, spec, name="unlabelled", **row_limits(config)).rows

    asked = encoded(rows)
    size = max(config.per_device_eval_batch_size // (1 if bound is None else bound.rows_per_text), 1)

    def said_of(part: Sequence[EncodedRow]) -> Tensor:
        """log p of the labels, [B, C]."""
        if bound is None:
            assert isinstance(teacher, HeadedPrompt)  # as every prompt of a bank for a task with a head
            return head_log_probs(model, spec, lowered, [teacher], part, config.bf16)[0]
        assert isinstance(task, WordTask)
        return class_log_probs(word_log_probs(model, spec, lowered, task, bound, part, config.bf16)[0], bound)

    with frozen(model), torch.no_grad():
        lowered = [lowered_as_used(teacher.fold())]
        log_p = torch.cat([said_of(part) for part in row_batches(asked, size)]).double().cpu()  # [n, C]
    sure = (log_p.max(dim=1).values.exp() >= settings.threshold).nonzero()[:, 0].tolist()
    if not sure:
        raise NothingTaught(
            f"expected an unlabelled text of which the source prompt is sure (threshold {settings.threshold:g}), got "
            f"none of {len(rows)}; of the clearest it is {float(log_p.max().exp()):.3f} sure"
        )
    targets = _targets(log_p[sure], settings.temperature)  # [kept, C]
    readings, origins = [asked[i] for i in sure], list(range(len(sure)))
    if settings.views is not None:
        views = augment([rows[i] for i in sure], task.text_columns, settings.views)
        if not views.rows:
            raise NothingTaught("expected changed copies of unlabelled texts to learn consistency from, got none")
        readings, origins = encoded(views.rows), views.origins
    examples: list[tuple[list[int], list[float]]] = []
    made: list[EncodedRow] = []
    for reading, origin in zip(readings, origins, strict=True):
        given = [(label, float(t)) for label, t in enumerate(targets[origin]) if t > 0]
        examples.append(([*range(len(made), len(made) + len(given))], [t for _, t in given]))
        made += [_answered(task, reading, label, bound) for label, _ in given]
    said = Counter(task.labels[label] for label in log_p[sure].argmax(dim=1).tolist())
    return Taught(made, examples, len(rows), len(sure), {label: said[label] for label in task.labels})


def _answered(task: LabelledTask, row: EncodedRow, label: int, bound: BoundVerbalizer | None) -> EncodedRow:
    """The row as it would be encoded if it had the label at position `label`."""
    if bound is None:
        return replace(row, class_id=label)
    word = bound.first_word(label)
    if isinstance(task, MaskedClassificationTask):
        (token,) = bound.words[word]
        return replace(row, class_id=label, labels=[x if x == IGNORE_INDEX else token for x in row.labels])
    assert isinstance(task, ClassificationTask | Seq2SeqClassificationTask)
    return task.candidates(row, bound)[word]


def _targets(log_p: Tensor, temperature: float) -> Tensor:
    """Proportional to p^(1/T), rows of [n, C] that add up to 1; one-hot for T = 0."""
    if temperature == 0:
        return torch.zeros_like(log_p).scatter(1, log_p.argmax(dim=1, keepdim=True), 1.0)
    return (log_p / temperature).softmax(dim=1)


class SelfTrainTerm:
    """The student's loss on taught texts, in the batches that a run on them alone would draw.

    Args:
        settings: of the strategy.
        taught: texts and targets.
        model: the frozen backbone, patched when the loss is taken.
        config: of the run.
        teacher: sha256 of the teacher's numbers.
    """

    def __init__(
        self, settings: SelfTrain, taught: Taught, model: Any, task: Task, config: TrainingConfig, teacher: str
    ) -> None:
        self.settings = settings
        self._taught, self._model, self._task, self._teacher = taught, model, task, teacher
        self._device = backbone_spec(model).word_embeddings.weight.device
        self._bf16 = config.bf16
        self._drawn = StepRows(len(taught.examples), config)

    def identity(self) -> dict[str, Any]:
        rows = fingerprint_rows(list(self._taught.rows))
        return {**asdict(self.settings), "teacher": self._teacher, "task": task_to_json(self._task), "rows": rows}

    def batches(self, step: int) -> list[tuple[PackedBatch, Tensor, float]]:
        """The micro-batches of a step: rows, their targets [rows], and the share of what the step's mean is over."""
        made: list[tuple[PackedBatch, Tensor, float]] = []
        for group in self._drawn(step):
            rows = [self._taught.rows[i] for text in group for i in self._taught.examples[text][0]]
            targets = [t for text in group for t in self._taught.examples[text][1]]
            batch = collate(rows)
            if self._task.backbone_kind == "seq2seq":
                batch = replace(batch, source_lengths=torch.tensor([row.prompt_length for row in rows]))
            batch = batch.to(self._device)
            weight = sum(t * self._count(row) for row, t in zip(rows, targets, strict=True))
            made.append((batch, torch.tensor(targets, device=self._device), weight))
        total = sum(weight for _, _, weight in made)
        return [(batch, targets, weight / total) for batch, targets, weight in made]

    def _count(self, row: EncodedRow) -> int:
        """How many losses `_losses` has of the row."""
        if isinstance(self._task, SequenceClassificationTask):
            return 1
        return sum(label != IGNORE_INDEX for label in row.labels)

    def loss(self, prompt: Prompt, batch: PackedBatch, targets: Tensor, label_smoothing: float) -> Tensor:
        """-sum_c t_c log q_c, the mean over labelled tokens, or rows with a head, each with its row's target; equal to
        the task's own loss where the targets are 0 and 1."""
        lowered = prompt.lower()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            losses, at = self._losses(prompt, lowered, batch, label_smoothing)  # [n], [n]
        weights = targets if at is None else targets[at]  # [n]
        return (losses.float() * weights).sum() / weights.sum()

    def _losses(
        self, prompt: Prompt, lowered: LoweredPrompt, batch: PackedBatch, label_smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy [n], and the row of each, int64 [n]; None where there is one of every row."""
        if isinstance(self._task, SequenceClassificationTask):
            logits = sequence_head(self._model, encoder_hidden(self._model, lowered, batch), batch, own_head(prompt))
            assert batch.row_labels is not None
            smoothed = F.cross_entropy(
                logits.float(), batch.row_labels, label_smoothing=label_smoothing, reduction="none"
            )
            return smoothed, None
        if isinstance(self._task, MaskedClassificationTask):
            return masked_lm_losses(self._model, lowered, batch, label_smoothing=label_smoothing)[0], None
        if isinstance(self._task, Seq2SeqClassificationTask):
            pairs = sources_and_targets(batch)
            return seq2seq_losses(self._model, lowered, *pairs, label_smoothing=label_smoothing)
        return label_losses(self._model, lowered, batch, label_smoothing=label_smoothing)
