"""Which rows beside the run's own a step takes: a function of the seed and the step's number, so nothing is remembered.

Knows tasks and their encoded rows; no loss beyond a task's own.
"""

from __future__ import annotations

from typing import Any

from ptengine.backbone.spec import backbone_spec
from ptengine.data import ShuffledBatches, Task
from ptengine.data.serialization import task_to_json
from ptengine.prompts.base import Prompt
from ptengine.training import TrainingConfig
from ptengine.training.identity import fingerprint_rows
from ptengine.training.objective import make_objective
from ptengine.training.preparation import DataSource, check_batches, encode, row_limits
from ptengine.training.step_loss import MicroBatch, micro_batches

__all__ = ["StepRows", "TaskRows"]


class StepRows:
    """The micro-batches that a run of `config` on `num_rows` rows alone would draw, of `least_rows` at least."""

    def __init__(self, num_rows: int, config: TrainingConfig, least_rows: int = 1) -> None:
        self._order = ShuffledBatches(num_rows, config.per_device_train_batch_size, config.seed, least_rows)
        self._accumulation = config.gradient_accumulation_steps

    def __call__(self, step: int) -> list[list[int]]:
        """Row numbers of every micro-batch of optimiser step `step`, counted from 0."""
        per_epoch = self._order.batches_per_epoch
        epoch, group = divmod(step, -(-per_epoch // self._accumulation))
        begin = group * self._accumulation
        self._order.load_state_dict(self._order.state_dict() | {"epoch": epoch, "batch_index": begin})
        return [next(self._order).rows for _ in range(min(self._accumulation, per_epoch - begin))]


class TaskRows:
    """Rows of another task than the run's own, in the batches that a run on them alone would draw.

    Args:
        task, data: of the rows.
        model, tokenizer: the frozen backbone.
        prompt: whose length the rows must fit beside.
        config: of the run; its batch sizes, seed, lengths and precision also hold for these rows.
        name: of the rows in errors.

    Attributes:
        objective: the task's.

    Raises:
        InputError: whatever is wrong with the rows, as `ptengine.Trainer`.
    """

    def __init__(
        self,
        task: Task,
        data: DataSource,
        model: Any,
        tokenizer: Any,
        prompt: Prompt,
        config: TrainingConfig,
        name: str,
    ) -> None:
        spec = backbone_spec(model)
        self.objective = make_objective(task, model, spec, tokenizer, config.bf16)
        self._task = task
        self._rows = encode(task, data, tokenizer, prompt, spec, name=name, **row_limits(config)).rows
        size = config.per_device_train_batch_size
        check_batches(self.objective, len(self._rows), size, name, "per_device_train_batch_size")
        self._drawn = StepRows(len(self._rows), config, self.objective.least_rows)

    def identity(self) -> dict[str, Any]:
        """Json values that must be equal for a run to go on exactly."""
        return {"task": task_to_json(self._task), "rows": fingerprint_rows(self._rows)}

    def batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimiser step `step`, counted from 0."""
        return micro_batches(self.objective, self._rows, self._drawn(step))
