"""The training loop: optimiser steps, evaluations and checkpoints of one run, or of several that go in step.

Decides the order only. What a step computes between its two ends is `backward`'s business, what is evaluated and
remembered is the run's, and what is written is the saver's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from torch import Tensor

from ptengine.errors import TrainingDiverged
from ptengine.training.interruption import Interruption
from ptengine.training.journal import Journal
from ptengine.training.run import Interrupted, Run
from ptengine.training.step_loss import MicroBatch

__all__ = ["Backward", "Loop", "Saver"]

Backward: TypeAlias = Callable[[Sequence[tuple[Run, list[MicroBatch]]], Callable[[], None]], list[list[Tensor]]]
"""Adds the gradients of one step of each of several runs; returns the parts of each one's loss, fp32.

Calls its second argument between parts, which may raise to break off; no step is then taken.
"""


class Saver(Protocol):
    """Writes checkpoints."""

    def due(self) -> bool:
        """Whether one is to be written now."""
        ...

    def save(self) -> None:
        """Write one of every run's last whole step, unless there is one."""
        ...


class Loop:
    """Moves runs on, each by one optimiser step at a time, until all are finished.

    A run that diverges leaves the others alone: its error is kept in `Run.diverged`.

    Args:
        runs: each with its journal.
        backward: what computes the micro-batches of a step.
        saver: of the checkpoints.
        interruption: a signal to obey.
        after_step: called after every step with how many runs took it.

    Attributes:
        seconds: wall time of the steps.
    """

    def __init__(
        self,
        runs: Sequence[tuple[Run, Journal]],
        backward: Backward,
        saver: Saver,
        interruption: Interruption,
        after_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._runs = runs
        self._backward = backward
        self._saver = saver
        self._interruption = interruption
        self._after_step = after_step
        self.seconds = 0.0

    def go(self) -> None:
        """Run to the end.

        Raises:
            Interrupted: a signal came; a checkpoint of the last whole step has been written.
        """
        try:
            while True:
                # Also of a run that has done its last step.
                for run, journal in self._sound():
                    if run.progress.evaluation_due:
                        with _diverging(run, journal):
                            run.evaluate(journal, self._interruption)
                if self._saver.due():
                    self._save()
                active = [(run, journal) for run, journal in self._runs if not run.finished]
                if not active:
                    return
                if self._interruption.received is not None:
                    raise Interrupted
                self._step(active)
        except Interrupted:
            if self._save():
                raise

    def _sound(self) -> list[tuple[Run, Journal]]:
        return [(run, journal) for run, journal in self._runs if run.diverged is None]

    def _step(self, active: Sequence[tuple[Run, Journal]]) -> None:
        """One optimiser step of every active run over its own micro-batches."""
        begun = time.perf_counter()
        losses = self._backward([(run, run.begin_step()) for run, _ in active], self._check)
        for (run, journal), values in zip(active, losses, strict=True):
            with _diverging(run, journal):
                run.end_step(values)
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        for run, journal in active:
            if run.diverged is None:
                run.report(journal, seconds)
        self._after_step(len(active))

    def _check(self) -> None:
        # The step so far is dropped: generators, weights and moments in a snapshot are those before it.
        if self._interruption.received is not None:
            raise Interrupted

    def _save(self) -> bool:
        """Write a checkpoint of what is sound; False where nothing is."""
        for run, journal in self._sound():
            with _diverging(run, journal):
                run.require_finite()
        if not self._sound():
            return False
        self._saver.save()
        return True


@contextmanager
def _diverging(run: Run, journal: Journal) -> Iterator[None]:
    """Note in `run` and in its journal that it diverged inside."""
    try:
        yield
    except TrainingDiverged as error:
        run.diverged = error
        journal.record("diverged", error.step, run.epoch, {"message": str(error)})
