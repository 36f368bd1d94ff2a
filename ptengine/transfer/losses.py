"""The loss of a transfer: target, source, unlabelled texts, anchor and distillation, as one `StepLoss` of training.

Everything it reads beside the step's own rows is fixed when it is made: source rows come in an order that follows from
the seed and the number of the step, so a resumed run goes on exactly. Knows prompts, objectives and encoded rows; no
files and no optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import label_hidden, masked_lm_logits, seq2seq_logits
from ptengine.backbone.lowering import GatedTokens, LoweredPrompt, TextDependentTokens, VirtualTokens
from ptengine.backbone.packing import PackedBatch, sources_and_targets
from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.data import SequenceClassificationTask, Task
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.training import TrainingConfig
from ptengine.training.encoder_objectives import SequenceObjective
from ptengine.training.objective import Objective
from ptengine.training.preparation import DataSource, check_prompt
from ptengine.training.step_loss import LossPart, MicroBatch, StepInfo
from ptengine.transfer.bank import weights_sha256
from ptengine.transfer.self_training import SelfTrainTerm, Taught
from ptengine.transfer.step_rows import TaskRows
from ptengine.transfer.strategies import Anchor, Distill, Joint, Strategy

__all__ = ["TransferLoss"]


class TransferLoss:
    """The step's loss of `strategy`: a * L_source + (1 - a) * T [+ anchor], T = (1 - u) * (L_target [+ distillation]) +
    u * L_unlabelled.

    Args:
        strategy: which terms; its `initialize` is not read.
        model, tokenizer: the frozen backbone.
        start: the prompt that `Anchor` and `Distill` refer to, and whose length the source rows must fit beside.
        config: of the run; its batch sizes, seed, lengths and precision also hold for the source.
        task: the target's, for `SelfTrain`, and for `Distill` where the task trains a head.
        source_task, source_data: for `Joint`.
        likeness: what `Distill` multiplies its weight by.
        taught: what `start` says of unlabelled texts (`ptengine.transfer.self_training.teach`), for `SelfTrain`.

    Raises:
        InputError: source rows missing where `Joint` needs them, or whatever is wrong with them; `SelfTrain` without
            its task or taught texts.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        model: Any,
        tokenizer: Any,
        start: Prompt,
        config: TrainingConfig,
        task: Task | None = None,
        source_task: Task | None = None,
        source_data: DataSource | None = None,
        likeness: float = 1.0,
        taught: Taught | None = None,
    ) -> None:
        check_prompt(start, model)
        spec = backbone_spec(model)
        frozen = start.fold()
        self._source: _SourceTerm | None = None
        if strategy.joint is not None:
            if source_task is None or source_data is None:
                raise InputError("expected the source's task and rows to train on source and target, got none")
            rows = TaskRows(source_task, source_data, model, tokenizer, frozen, config, "source")
            self._source = _SourceTerm(strategy.joint, rows)
        self._unlabelled: SelfTrainTerm | None = None
        if strategy.self_train is not None:
            if taught is None or task is None:
                raise InputError("expected the target's task and taught texts for self-training, got none")
            self._unlabelled = SelfTrainTerm(
                strategy.self_train, taught, model, task, config, weights_sha256(frozen)
            )  # fmt: skip
        self._anchor = None if strategy.anchor is None else _AnchorTerm(strategy.anchor, frozen)
        head: SequenceObjective | None = None
        if isinstance(task, SequenceClassificationTask):
            head = SequenceObjective(model, spec, config.bf16, task)
        self._distill = (
            None
            if strategy.distill is None
            else _DistillTerm(strategy.distill, likeness, model, spec, frozen, config.bf16, head)
        )

    def identity(self) -> dict[str, Any]:
        terms = {
            "joint": self._source, "anchor": self._anchor, "distill": self._distill, "self_train": self._unlabelled,
        }  # fmt: skip
        return {name: term.identity() for name, term in terms.items() if term is not None}

    def parts(
        self, objective: Objective, prompt: Prompt | None, batches: Sequence[MicroBatch], info: StepInfo
    ) -> Iterator[LossPart]:
        assert prompt is not None  # the trainer has one: `start` was checked
        terms = [*self._of_target(objective, prompt, batches, info), *self._of_source(prompt, info)]
        for index, term in enumerate(terms):
            if index:
                info.check()
            yield LossPart(term.loss() * term.weight, term.rows, term.num_tokens)
        if self._anchor is not None:
            yield LossPart(self._anchor.loss(prompt), (), 0)

    def _of_target(
        self, objective: Objective, prompt: Prompt, batches: Sequence[MicroBatch], info: StepInfo
    ) -> Iterator[_Term]:
        """Labelled and unlabelled rows of the target."""
        whole = 1 - self._source_share(info)
        unlabelled = 0.0 if self._unlabelled is None else self._unlabelled.settings.share
        smoothing = info.label_smoothing
        if whole * (1 - unlabelled) > 0:
            of_batch = objective.loss if self._distill is None else self._distill.loss
            for part in batches:
                loss = partial(of_batch, prompt, part.batch, smoothing)
                yield _Term(loss, part.share * (whole * (1 - unlabelled)), part.rows, part.batch.num_tokens)
        if self._unlabelled is not None and whole * unlabelled > 0:
            for batch, targets, portion in self._unlabelled.batches(info.step):
                loss = partial(self._unlabelled.loss, prompt, batch, targets, smoothing)
                yield _Term(loss, portion * (whole * unlabelled), (), batch.num_tokens)

    def _of_source(self, prompt: Prompt, info: StepInfo) -> Iterator[_Term]:
        share = self._source_share(info)
        if self._source is None or share == 0:
            return
        for part in self._source.rows.batches(info.step):
            loss = partial(self._source.rows.objective.loss, prompt, part.batch, info.label_smoothing)
            yield _Term(loss, part.share * share, (), part.batch.num_tokens)

    def _source_share(self, info: StepInfo) -> float:
        return 0.0 if self._source is None else self._source.settings.weight(info.step, info.total_steps)


@dataclass(frozen=True)
class _Term:
    """A part of a step's loss before it is computed; see `LossPart`."""

    loss: Callable[[], Tensor]
    weight: float
    rows: Sequence[int]
    num_tokens: int


class _SourceTerm:
    def __init__(self, settings: Joint, rows: TaskRows) -> None:
        self.settings = settings
        self.rows = rows

    def identity(self) -> dict[str, Any]:
        return {**asdict(self.settings), **self.rows.identity()}


class _AnchorTerm:
    def __init__(self, settings: Anchor, start: Prompt) -> None:
        self._settings = settings
        self._start = [tensor.detach() for tensor in _numbers(start.lower())]
        self._sha256 = weights_sha256(start)
        self._square = sum(float(tensor.double().square().sum()) for tensor in self._start)
        if self._square == 0:
            raise InputError("expected a start other than all zeros to stay near, got one")

    def identity(self) -> dict[str, Any]:
        return {**asdict(self._settings), "start": self._sha256}

    def loss(self, prompt: Prompt) -> Tensor:
        now = _numbers(prompt.lower())
        moved = [(a - b.to(a.device)).square().sum() for a, b in zip(now, self._start, strict=True)]
        return torch.stack(moved).sum() * (self._settings.weight / self._square)


class _DistillTerm:
    def __init__(
        self,
        settings: Distill,
        likeness: float,
        model: Any,
        spec: BackboneSpec,
        start: Prompt,
        bf16: bool,
        head: SequenceObjective | None,
    ) -> None:
        if spec.lm_head is None and head is None:
            raise InputError(
                "expected a model with a language-modelling head, or a task of sequence classification, to distil, got "
                f"{type(model).__name__} without such a task"
            )
        self._settings = settings
        self._weight = settings.weight * likeness
        self._model = model
        self._spec = spec
        self._bf16 = bf16
        self._head = head
        # A teacher answers without the noise of its training.
        self._teacher = start.to(spec.word_embeddings.weight.device).eval()
        self._sha256 = weights_sha256(start)

    def identity(self) -> dict[str, Any]:
        return {**asdict(self._settings), "teacher": self._sha256, "lambda": self._weight}

    def loss(self, prompt: Prompt, batch: PackedBatch, label_smoothing: float) -> Tensor:
        """Cross-entropy and distillation of one micro-batch from one forward of each prompt."""
        logits, labels = self._logits(prompt, batch)  # [n, V], or [B, C] of a head, and [n]
        with torch.no_grad():
            wanted, _ = self._logits(self._teacher, batch)  # [n, V]
        task = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return task + self._weight * F.mse_loss(logits, wanted)

    def _logits(self, prompt: Prompt, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        if self._head is not None:
            assert batch.row_labels is not None
            return self._head.logits(prompt, batch), batch.row_labels
        lowered = prompt.lower()
        device = self._spec.word_embeddings.weight.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._bf16):
            if self._spec.kind == "encoder":
                return masked_lm_logits(self._model, lowered, batch)
            if self._spec.kind == "seq2seq":
                return seq2seq_logits(self._model, lowered, *sources_and_targets(batch))[:2]
            found = label_hidden(self._model, lowered, batch)
            return vocabulary_logits(self._spec, found.hidden).float(), found.labels


def _numbers(lowered: LoweredPrompt) -> list[Tensor]:
    if isinstance(lowered, TextDependentTokens):
        raise InputError("expected a prompt that no text changes to stay near its start, got one that depends on it")
    if isinstance(lowered, GatedTokens):
        return [lowered.embeds, lowered.gates]
    numbers = [lowered.embeds] if isinstance(lowered, VirtualTokens) else [lowered.keys, lowered.values]
    return numbers if lowered.input_offsets is None else [*numbers, lowered.input_offsets]
