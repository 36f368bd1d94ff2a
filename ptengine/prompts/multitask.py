"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861): one shared prompt, rank-one factors for every task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import RATE, Initial, generator_from, is_trained
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized, fold_rows
from ptengine.prompts.soft_prompt import SoftPrompt

__all__ = ["MultitaskPrompt"]

VECTOR_INITS = ("normal", "ones")
_VECTOR_STD = 0.02  # of the authors' code


@register("multitask_prompt")
class MultitaskPrompt(Reparametrized):
    """P_k = P * (U_k V_k): a shared prompt P [P, d] times, element by element, U_k [P, r] V_k [r, d] of task k.

    With r = 1 this is Wang et al.'s P* o (u_k v_k^T). `lower` gives the prompt of `task`, `lower_tasks`
    those of all tasks, for a batch whose rows are of several tasks; `ptengine.training.multitask_loss` trains them.
    `fold` (and so `save`) keeps the prompt of one task. `for_target` starts a new task from what the old ones learned.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model. None means 20, or as many as
            `array` or `prompt` holds.
        init: where the shared prompt comes from, as in `SoftPrompt`; ``"sampled_vocab"`` as in the paper.
        num_tasks: K.
        num_ranks: r.
        vector_init: ``"normal"``, the authors': U and V normal with mean 0 and standard deviation 0.02, so that prompts
            start near zero; or ``"ones"``: U one and V 1/r, so that every task starts at the shared prompt.
        task: the task, counting from 0, that `lower` and `fold` mean; may be changed.
        init_text, class_labels, array, prompt, tokenizer: as in `SoftPrompt`.
        seed: of the shared prompt and the vectors.

    Attributes:
        shared: fp32 [P, d].
        columns: U, fp32 [K, P, r].
        rows: V, fp32 [K, r, d].

    Raises:
        InputError: an argument has the wrong type or range, is missing, or would be ignored.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_tasks", "num_ranks", "task")

    shared: nn.Parameter
    columns: nn.Parameter
    rows: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "sampled_vocab",
        *,
        num_tasks: int = 1,
        num_ranks: int = 1,
        vector_init: str = "normal",
        task: int = 0,
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        if vector_init not in VECTOR_INITS:
            raise InputError(f"expected vector_init, one of {', '.join(VECTOR_INITS)}, got {vector_init!r}")
        start = SoftPrompt(
            model, num_virtual_tokens, init, init_text=init_text, class_labels=class_labels, array=array,
            prompt=prompt, tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
        settings = {"num_tasks": num_tasks, "num_ranks": num_ranks, "task": task}
        self.check_settings(start.facts, settings)
        super().__init__(start.facts, start.num_virtual_tokens, settings)
        generator = generator_from(seed)
        with torch.no_grad():
            self.shared.copy_(start.embeds)
            if vector_init == "ones":
                self.columns.fill_(1)
                self.rows.fill_(1 / num_ranks)
            else:
                for vectors in (self.columns, self.rows):
                    vectors.copy_(torch.randn(vectors.shape, generator=generator) * _VECTOR_STD)
        rate = RATE * self.facts.embedding_std
        self._finish(backbone_spec(model), transferred=is_trained(init), rate=rate)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        tasks = check_whole("num_tasks", settings["num_tasks"])
        check_whole("num_ranks", settings["num_ranks"])
        _check_task(settings["task"], tasks)

    def _build(self) -> None:
        tasks, ranks, width = self.settings["num_tasks"], self.settings["num_ranks"], self.facts.hidden_size
        self.shared = nn.Parameter(torch.empty(self.num_virtual_tokens, width))  # [P, d]
        self.columns = nn.Parameter(torch.empty(tasks, self.num_virtual_tokens, ranks))  # [K, P, r]
        self.rows = nn.Parameter(torch.empty(tasks, ranks, width))  # [K, r, d]

    @property
    def task(self) -> int:
        task: int = self.settings["task"]
        return task

    @task.setter
    def task(self, task: int) -> None:
        self.settings["task"] = _check_task(task, self.settings["num_tasks"])

    def default_learning_rate(self) -> float:
        """That of a `SoftPrompt` for shared prompt and vectors, as in the paper: 0.3 of the embeddings' deviation."""
        return super().default_learning_rate()

    def compute(self) -> Tensor:
        return self._of_task(self.task)

    def lower_tasks(self) -> list[VirtualTokens]:
        """The prompts of all K tasks: what `packed_loss` takes with the rows' tasks as `prompt_ids`."""
        with torch.autocast(self.shared.device.type, enabled=False):
            return [VirtualTokens(self._of_task(task)) for task in range(self.settings["num_tasks"])]

    def fold(self, task: int | None = None) -> SoftPrompt:
        """The prompt of `task` (None means that of the attribute) as a `SoftPrompt`."""
        task = self.task if task is None else _check_task(task, self.settings["num_tasks"])
        with torch.no_grad():
            return fold_rows(self.facts, self._of_task(task))

    @torch.no_grad()
    def for_target(self, source: int | None = None) -> MultitaskPrompt:
        """A prompt of one new task that starts from this one's: the shared prompt, and vectors of the sources.

        Args:
            source: the task whose vectors to start from; None means the mean over all tasks, as in the paper.
        """
        count: int = self.settings["num_tasks"]
        tasks = list(range(count)) if source is None else [_check_task(source, count)]
        target = self.empty(self.facts, {**self.config(), "num_tasks": 1, "task": 0})
        target.to(self.shared)
        target.shared.copy_(self.shared)
        target.columns.copy_(self.columns[tasks].mean(dim=0, keepdim=True))
        target.rows.copy_(self.rows[tasks].mean(dim=0, keepdim=True))
        return target

    def _of_task(self, task: int) -> Tensor:
        return self.shared * (self.columns[task] @ self.rows[task])  # [P, d]


def _check_task(task: Any, tasks: int) -> int:
    return check_whole("a task", task, 0, tasks - 1)
