"""Many prompts trained at once: every step one batch against one frozen backbone, everything else each prompt's own.

A member is a `Trainer` that is not fitted alone. Data, order of rows, optimiser state, learning rate, clipping,
accumulation, evaluation, early stopping, best prompt, log and folder are its own; forward and backward are shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptengine.backbone.lowering import TextDependentTokens
from ptengine.checks import check_whole
from ptengine.data import EmbeddingTask, MaskedClassificationTask
from ptengine.errors import InputError, TrainingDiverged
from ptengine.files import make_directory
from ptengine.garbage import settled_objects
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training.checkpoints import Checkpoint, checkpoint_steps
from ptengine.training.conditions import training_conditions
from ptengine.training.folders import clean_leftovers, exclusive
from ptengine.training.interruption import Interruption
from ptengine.training.joint import JointBackward
from ptengine.training.journal import progress_bar
from ptengine.training.loop import Loop
from ptengine.training.resumption import (
    Resume,
    keep_finished_prompt,
    refuse_finished_work,
    require_exact,
    starting_point,
)
from ptengine.training.run import Interrupted, Plan, Run
from ptengine.training.saving import SetSaver, restore_set
from ptengine.training.step_loss import TaskLoss
from ptengine.training.trainer import TRACES, Trainer, TrainingResult, leave, peak_memory

__all__ = ["PromptSet", "PromptSetResult"]

SHARED_SETTINGS = (
    "label_smoothing_factor",
    "bf16",
    "gradient_checkpointing",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "disable_tqdm",
)
"""Settings of the one batch and of the one checkpoint: equal in all members."""


@dataclass(frozen=True)
class PromptSetResult:
    """What a set did.

    Attributes:
        members: one per member, in order: what its `Trainer.fit` would have returned, or the `TrainingDiverged` it
            would have raised. `seconds` is that of the set, `tokens_per_second` counts the member's own tokens,
            `checkpoints` is empty: they are the set's.
        steps: optimiser steps of the longest member.
        seconds: wall time of this call of `fit`.
        tokens_per_second: text tokens of all members per second of the steps of this call; 0.0 where there was none.
        peak_memory: as in `TrainingResult`.
        checkpoints: folders, each of the whole set.
    """

    members: list[TrainingResult | TrainingDiverged]
    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    checkpoints: list[Path]


class PromptSet:
    """Trains the prompts of several trainers at once, in one batch a step against their one frozen backbone: a causal
    model, an encoder-decoder, a masked language model, or an encoder with a head, for which every prompt has weights of
    its own (`ptengine.HeadedPrompt`).

    Every step takes the next rows of every member, each member as many as its own settings say, runs them packed in one
    forward and backward (N prompts beside each other, read by their own rows alone), and then updates every prompt with
    its own optimiser. A member that has done its steps, or stopped early, or diverged, leaves the batch.

    **Equal to training alone.** A member's losses, evaluations and prompt are those that its `Trainer.fit` would give:
    its loss is the mean over its own labels, it is clipped by its own norm, and it draws its own random numbers. The
    numbers differ by rounding only (about 1e-7 of a loss in fp32, grown over the steps as any rounding grows): a matrix
    product of more rows may add up in another order. With a float64 backbone they agree to 1e-9 and better.

    **What may differ between members.** The method, as long as all become virtual tokens (whether they depend on the
    text or not), all prefixes or all gated tokens; P; task, data, seed, learning rate, schedule, batch size,
    accumulation and everything else in `TrainingConfig` but `label_smoothing_factor`, `bf16`, `gradient_checkpointing`,
    `save_strategy`, `save_steps`, `save_total_limit` and `disable_tqdm`. A checkpoint, in `output_dir`, holds all
    members; each member's folder (its config's `output_dir`) gets ``log.jsonl``, ``best/``, ``prompt/`` and
    ``curve.png``.

    Args:
        members: trainers on one model (the same object), each with a prompt and a folder of its own.
        output_dir: folder of the set's checkpoints; may be the parent of the members' folders.
        max_tokens_per_batch: most positions of one forward, virtual tokens among them; a step of more is run as several
            forwards, of whole members each. None runs every step as one: the activations of all members' micro-batches
            are then in memory together.

    Raises:
        InputError: no members, or members that cannot share a batch; the message says which and why.
    """

    def __init__(
        self, members: Sequence[Trainer], output_dir: str | Path, *, max_tokens_per_batch: int | None = None
    ) -> None:
        self.members = list(members)
        if not str(output_dir):
            raise InputError("expected output_dir, the path of a folder, got ''")
        self.output_dir = Path(output_dir)
        if max_tokens_per_batch is not None:
            check_whole("max_tokens_per_batch", max_tokens_per_batch)
        self.max_tokens_per_batch = max_tokens_per_batch
        _check_members(self.members, self.output_dir)

    def fit(self, resume: Resume = False) -> PromptSetResult:
        """Train all members.

        Args:
            resume: as in `Trainer.fit`, of the set's checkpoints. Exact under the same conditions, for the same members
                in the same order and the same `max_tokens_per_batch`.

        Returns:
            What was done. A member that diverged does not end the others; its error stands in its place.

        Raises:
            InputError: as `Trainer.fit`, for `output_dir` and for the folder of every member.
            SystemExit: status 143 after SIGTERM, once a checkpoint is written.
            KeyboardInterrupt: after SIGINT, once a checkpoint is written; a second SIGINT does not wait for it.
        """
        started = time.perf_counter()
        plans = [trainer.make_plan() for trainer in self.members]
        if not all(folder.exists() for folder in (self.output_dir, *(plan.output_dir for plan in plans))):
            self._start(plans, resume)  # a refusal leaves no folder behind
        with self._folders(plans):
            checkpoint = self._start(plans, resume)
            result = None
            first = self.members[0]
            prompts = [trainer.prompt for trainer in self.members if trainer.prompt is not None]
            with (
                training_conditions(first.model, prompts, {}, first.device, first.config.gradient_checkpointing),
                Interruption() as interruption,
            ):
                runs = [trainer.new_run(plan, alone=False) for trainer, plan in zip(self.members, plans, strict=True)]
                if checkpoint is not None:
                    restore_set(runs, checkpoint)
                try:
                    with settled_objects():
                        result = self._go(runs, interruption, started)
                except Interrupted:
                    pass
        leave(interruption, done=result is not None)
        assert result is not None
        return result

    def _start(self, plans: Sequence[Plan], resume: Resume) -> Checkpoint | None:
        """The checkpoint to go on from, found fit for every member; None starts anew."""
        checkpoint = starting_point(self.output_dir, resume, ())
        for plan in plans:
            if resume is False:
                refuse_finished_work(plan.output_dir, TRACES)
            elif own := checkpoint_steps(plan.output_dir):
                raise InputError(
                    f"expected a member's folder without checkpoints of a run of its own, got {str(plan.output_dir)!r} "
                    f"with checkpoint-{own[-1]}"
                )
            elif checkpoint is None:
                keep_finished_prompt(plan.output_dir)
        if checkpoint is None:
            return None
        where = str(checkpoint.path)
        saved = checkpoint.state.get("runs")
        if saved is None:
            raise InputError(f"expected a checkpoint of a PromptSet, got {where!r}, which is one of a single run")
        if len(saved) != len(plans):
            raise InputError(f"expected {len(saved)} members as in the checkpoint {where}, got {len(plans)}")
        if checkpoint.state["max_tokens_per_batch"] != self.max_tokens_per_batch:
            raise InputError(
                f"expected max_tokens_per_batch={checkpoint.state['max_tokens_per_batch']} as in the checkpoint "
                f"{where}, got {self.max_tokens_per_batch}"
            )
        for index, (state, plan) in enumerate(zip(saved, plans, strict=True)):
            require_exact(state, plan, f"{where}, member {index}")
        return checkpoint

    @contextmanager
    def _folders(self, plans: Sequence[Plan]) -> Iterator[None]:
        """The set's folder and its members', made and held."""
        with ExitStack() as held:
            for folder in dict.fromkeys([self.output_dir, *(plan.output_dir for plan in plans)]):
                held.enter_context(exclusive(make_directory(folder)))
                clean_leftovers(folder)
            yield

    def _go(self, runs: Sequence[Run], interruption: Interruption, started: float) -> PromptSetResult:
        config = self.members[0].config
        with ExitStack() as opened:
            journals = [
                opened.enter_context(trainer.open_journal(run, show_bar=False))
                for trainer, run in zip(self.members, runs, strict=True)
            ]
            pairs = list(zip(runs, journals, strict=True))
            saver = SetSaver(pairs, self.output_dir, {"max_tokens_per_batch": self.max_tokens_per_batch})
            longest = max(run.plan.total_steps for run in runs)
            bar = opened.enter_context(progress_bar(saver.step, longest, show=not config.disable_tqdm))

            def after_step(active: int) -> None:
                bar.set_postfix_str(f"{active} of {len(runs)} prompts", refresh=False)
                bar.update(1)

            backward = JointBackward(
                self.members[0].model,
                self.members[0].device,
                config.bf16,
                config.label_smoothing_factor,
                self.max_tokens_per_batch,
            )
            loop = Loop(pairs, backward, saver, interruption, after_step)
            try:
                loop.go()
            except Interrupted:
                for run, journal in pairs:
                    if not run.finished:
                        journal.record("interrupted", run.progress.step, run.epoch, {})
                raise
            members: list[TrainingResult | TrainingDiverged] = []
            for trainer, (run, journal) in zip(self.members, pairs, strict=True):
                try:
                    members.append(run.diverged or trainer.conclude(run, journal, started))
                except TrainingDiverged as error:
                    members.append(error)
            return PromptSetResult(
                members=members,
                steps=saver.step,
                seconds=time.perf_counter() - started,
                tokens_per_second=sum(run.tokens for run in runs) / loop.seconds if loop.seconds else 0.0,
                peak_memory=peak_memory(self.members[0].device),
                checkpoints=[self.output_dir / f"checkpoint-{step}" for step in checkpoint_steps(self.output_dir)],
            )


def _check_members(members: Sequence[Any], output_dir: Path) -> None:
    """Refuse what cannot train in one batch, by the first member that does not fit."""
    if not members:
        raise InputError("expected at least one member, got none")
    owners: dict[int, int] = {}  # of parameters
    folders = {output_dir.resolve(): "the set"}
    kinds: dict[str, int] = {}
    for index, trainer in enumerate(members):
        if not isinstance(trainer, Trainer):
            raise InputError(f"member {index}: expected a ptengine.Trainer, got {type(trainer).__name__}")
        if trainer.prompt is None or (trainer.task.trains_head and not isinstance(trainer.prompt, HeadedPrompt)):
            raise InputError(
                f"member {index}: expected a prompt, for a task with a trained head a HeadedPrompt, since all members "
                f"share the model and its head, got {type(trainer.task).__name__} with {type(trainer.prompt).__name__}"
            )
        placed = getattr(trainer.task, "template", None)
        inside = placed is not None and not placed.is_behind_prompt
        if isinstance(trainer.task, MaskedClassificationTask):  # what its template places stands behind [CLS]
            inside = trainer.task.template.num_virtual_tokens is not None
        if isinstance(trainer.task, EmbeddingTask) or inside:  # the loss of an embedding is over pairs of rows
            raise InputError(
                f"member {index}: expected a task with labels whose virtual tokens stand before the text, which one "
                f"batch can share, got {type(trainer.task).__name__}"
                + (f" with the template {placed.text!r}" if placed is not None else "")
            )
        if type(trainer.step_loss) is not TaskLoss:  # a subclass may add to it
            raise InputError(
                f"member {index}: expected a trainer of its task's loss alone, which one batch computes, got step_loss="
                f"{type(trainer.step_loss).__name__}"
            )
        if trainer.model is not members[0].model:
            raise InputError(f"member {index}: expected the model object of member 0, got another one")
        for name in SHARED_SETTINGS:
            wanted, got = getattr(members[0].config, name), getattr(trainer.config, name)
            if wanted != got:
                raise InputError(f"member {index}: expected {name}={wanted!r} as in member 0, got {got!r}")
        for parameter in trainer.prompt.parameters():  # two heads may stand around one prompt
            first = owners.setdefault(id(parameter), index) if parameter.requires_grad else index
            if first != index:
                raise InputError(f"member {index}: expected a prompt of its own, got that of member {first}")
        folder = Path(trainer.config.output_dir).resolve()
        if folder in folders:
            raise InputError(
                f"member {index}: expected an output_dir of its own, got {trainer.config.output_dir!r} as "
                f"{folders[folder]}"
            )
        folders[folder] = f"member {index}"
        with torch.no_grad():
            lowered = trainer.prompt.lower()
        # What depends on the text is virtual tokens by the time it meets the others.
        kind = "VirtualTokens" if isinstance(lowered, TextDependentTokens) else type(lowered).__name__
        kinds.setdefault(kind, index)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise InputError(
            f"expected prompts of one kind, which one batch can hold, got {one} in member {first} and {other} in "
            f"member {second}: train them as two sets"
        )
