"""When checkpoints are written and what they hold: those of one run, and those of a set of runs.

The folders themselves are `ptengine.training.checkpoints`' business, the state inside them is `Run.snapshot`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ptengine.errors import TrainingDiverged
from ptengine.training.checkpoints import Checkpoint, prune_checkpoints, write_checkpoint
from ptengine.training.journal import Journal
from ptengine.training.run import Run

__all__ = ["RunSaver", "SetSaver", "restore_run", "restore_set"]


class RunSaver:
    """Checkpoints of one run, in its own folder."""

    def __init__(self, run: Run, journal: Journal) -> None:
        self._run = run
        self._journal = journal

    def due(self) -> bool:
        return _due(self._run)

    def save(self) -> None:
        """Write a checkpoint of the last whole step, unless there is one, and thin out the older ones."""
        run, step = self._run, self._run.progress.step
        output_dir = run.plan.output_dir
        path = output_dir / f"checkpoint-{step}"
        if run.last_checkpoint == path:
            return
        run.last_checkpoint = write_checkpoint(output_dir, step, *run.snapshot())
        self._journal.record("checkpoint", step, run.epoch, {"path": path.name})
        prune_checkpoints(output_dir, run.plan.config.save_total_limit, step, run.progress.best_step)


class SetSaver:
    """Checkpoints of several runs that go in step, all in one: ``output_dir/checkpoint-<steps of the longest>``.

    Tensors of run i are named ``<i>.<name>`` in the file that a checkpoint of one run has them in. Of a run that
    diverged only its history and its best prompt are kept.

    Args:
        runs: each with its journal.
        output_dir: where checkpoints go.
        facts: json values that each of them holds besides.
    """

    def __init__(self, runs: Sequence[tuple[Run, Journal]], output_dir: Path, facts: Mapping[str, Any]) -> None:
        self._runs = runs
        self._output_dir = output_dir
        self._facts = facts

    @property
    def step(self) -> int:
        return max(run.progress.step for run, _ in self._runs)

    def due(self) -> bool:
        """When a run that took the last step would save one, and in the end."""
        step = self.step
        # A run that diverged did not take the step, or took one that may not be saved.
        return any(run.progress.step == step and run.diverged is None and _due(run) for run, _ in self._runs) or (
            _saves(self._runs[0][0]) and all(run.finished for run, _ in self._runs)
        )

    def save(self) -> None:
        """Write a checkpoint of all runs' last whole steps, unless there is one, and thin out the older ones."""
        path = self._output_dir / f"checkpoint-{self.step}"
        if all(run.last_checkpoint == path for run, _ in self._runs):
            return
        tensors: dict[str, dict[str, Tensor]] = {}
        states = []
        for index, (run, _) in enumerate(self._runs):
            groups, state = run.snapshot()
            if run.diverged is not None:
                groups = {stem: groups[stem] for stem in ("run", "best") if stem in groups}
                error = run.diverged
                state["diverged"] = {"message": str(error), "step": error.step, "rows": error.rows}
            for stem, group in groups.items():
                tensors.setdefault(stem, {}).update({f"{index}.{name}": tensor for name, tensor in group.items()})
            states.append(state)
        write_checkpoint(self._output_dir, self.step, tensors, {**self._facts, "step": self.step, "runs": states})
        for run, journal in self._runs:
            run.last_checkpoint = path
            if run.diverged is None and run.progress.step == self.step:
                journal.record("checkpoint", run.progress.step, run.epoch, {"path": str(path)})
        limit = self._runs[0][0].plan.config.save_total_limit
        prune_checkpoints(self._output_dir, limit, self.step, None)


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Put what `RunSaver` wrote, whose identity has been found equal, into a fresh run."""
    run.restore(checkpoint.tensors, checkpoint.state, checkpoint.path)


def restore_set(runs: Sequence[Run], checkpoint: Checkpoint) -> None:
    """Put what `SetSaver` wrote, whose identities have been found equal, into fresh runs."""
    for index, (run, state) in enumerate(zip(runs, checkpoint.state["runs"], strict=True)):
        tensors = _part(checkpoint.tensors, f"{index}.")
        if "diverged" in state:
            run.restore_history(tensors, state, checkpoint.path)
            run.diverged = TrainingDiverged(**state["diverged"])
        else:
            run.restore(tensors, state, checkpoint.path)


def _part(tensors: Mapping[str, Mapping[str, Tensor]], prefix: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for stem, group in tensors.items():
        own = {name.removeprefix(prefix): tensor for name, tensor in group.items() if name.startswith(prefix)}
        if own:
            found[stem] = own
    return found


def _saves(run: Run) -> bool:
    return run.plan.config.save_strategy != "no"


def _due(run: Run) -> bool:
    if run.progress.step == 0 or not _saves(run) or run.diverged is not None:
        return False
    return run.progress.stopped_early or run.due(run.plan.config.save_strategy, run.plan.config.save_steps)
