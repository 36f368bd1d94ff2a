"""The backward pass that several prompts share: their micro-batches as one packed batch against one backbone.

Every prompt is a row, or a prefix, of its own, which its rows alone read, and every run's loss is the mean over its own
labels, so no gradient reaches another prompt. Knows runs and the backbone; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone import backbone_spec, encoder_hidden, label_losses, masked_lm_losses, seq2seq_losses
from ptengine.backbone.lowering import LoweredPrompt, TextDependentTokens, VirtualTokens
from ptengine.backbone.packing import PackedBatch, join_batches, sources_and_targets
from ptengine.training.run import Run
from ptengine.training.step_loss import MicroBatch

__all__ = ["JointBackward"]

Part = tuple[Run, MicroBatch]


class JointBackward:
    """A `ptengine.training.loop.Backward` in as few forwards as `max_tokens` allows.

    Args:
        model: the patched, frozen model: causal, an encoder-decoder, a masked language model, or an encoder for whose
            head every prompt has weights of its own.
        device: of the model.
        bf16: run it under bfloat16 autocast.
        label_smoothing: of the training loss.
        max_tokens: most positions of one forward, virtual tokens among them; one run's micro-batch is never cut, so a
            single one may exceed it. None sets no limit.
    """

    def __init__(
        self, model: Any, device: torch.device, bf16: bool, label_smoothing: float, max_tokens: int | None
    ) -> None:
        self._model = model
        self._device = device
        self._bf16 = bf16
        self._label_smoothing = label_smoothing
        self._max_tokens = max_tokens
        spec = backbone_spec(model)
        self._kind = spec.kind
        self._has_head = spec.kind == "encoder" and spec.lm_head is None

    def __call__(self, steps: Sequence[tuple[Run, list[MicroBatch]]], check: Callable[[], None]) -> list[list[Tensor]]:
        """Micro-batches with the same number, one of each run, together."""
        losses: list[list[Tensor]] = [[] for _ in steps]
        for number in range(max(len(batches) for _, batches in steps)):
            if number:
                check()
            present = [i for i, (_, batches) in enumerate(steps) if number < len(batches)]
            found: list[Tensor] = []
            for group in self._groups([(steps[i][0], steps[i][1][number]) for i in present]):
                found += self._backward(group)
            for i, loss in zip(present, found, strict=True):
                losses[i].append(loss)
        return losses

    def _groups(self, parts: Sequence[Part]) -> Iterator[list[tuple[Part, LoweredPrompt]]]:
        """Parts in order, each with its prompt lowered, cut where a forward would grow too long."""
        group: list[tuple[Part, LoweredPrompt]] = []
        taken = 0
        for run, micro_batch in parts:
            lowered = run.lower()
            batch = micro_batch.batch
            in_rows = isinstance(lowered, TextDependentTokens)
            in_rows |= isinstance(lowered, VirtualTokens) and self._kind != "causal"
            size = (batch.num_rows if in_rows else 1) * lowered.num_virtual_tokens + batch.num_tokens
            if group and self._max_tokens is not None and taken + size > self._max_tokens:
                yield group
                group, taken = [], 0
            group.append(((run, micro_batch), lowered))
            taken += size
        yield group

    def _backward(self, group: Sequence[tuple[Part, LoweredPrompt]]) -> list[Tensor]:
        micro_batches = [micro_batch for (_, micro_batch), _ in group]
        batch = join_batches([micro_batch.batch for micro_batch in micro_batches])
        ids = [i for i, micro_batch in enumerate(micro_batches) for _ in range(micro_batch.batch.num_rows)]
        prompts = [lowered for _, lowered in group]
        if self._has_head:
            means = self._behind_heads(group, prompts, batch, ids)
        else:
            losses = self._losses(prompts, batch, ids)  # [n], in the rows' order
            own = losses.split([micro_batch.num_labels for micro_batch in micro_batches])
            means = [x.mean() for x in own]
        parts = [mean * micro_batch.share for mean, micro_batch in zip(means, micro_batches, strict=True)]
        # A sum, so that each prompt's gradient is that of its own part.
        torch.stack(parts).sum().backward()
        return [part.detach().float() for part in parts]

    def _behind_heads(
        self,
        group: Sequence[tuple[Part, LoweredPrompt]],
        prompts: Sequence[LoweredPrompt],
        batch: PackedBatch,
        ids: Sequence[int],
    ) -> list[Tensor]:
        """The mean loss of each run: one forward of the encoder, then every head on its own rows."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            hidden = encoder_hidden(self._model, prompts, batch, prompt_ids=ids)  # [N, d]
        own = hidden.split([micro_batch.batch.num_tokens for (_, micro_batch), _ in group])
        return [
            run.loss_of(its, micro_batch, self._label_smoothing)
            for ((run, micro_batch), _), its in zip(group, own, strict=True)
        ]

    def _losses(self, prompts: Sequence[LoweredPrompt], batch: PackedBatch, ids: Sequence[int]) -> Tensor:
        """The loss of every label, fp32 [n]."""
        options: dict[str, Any] = {"prompt_ids": ids, "label_smoothing": self._label_smoothing}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            if self._kind == "causal":
                return label_losses(self._model, prompts, batch, **options)[0]
            if self._kind == "encoder":
                return masked_lm_losses(self._model, prompts, batch, **options)[0]
            return seq2seq_losses(self._model, prompts, *sources_and_targets(batch), **options)[0]
