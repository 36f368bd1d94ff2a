"""The errors users meet.

Everything here is raised at a boundary, before any work is done, with one sentence that says what was expected and
what came. The command line turns `InputError` into one line and exit status 2.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["InputError", "TrainingDiverged", "UnsupportedModelError"]


class InputError(ValueError):
    """A file, column, option or argument is not what was expected; the message names it."""


class UnsupportedModelError(InputError):
    """The backbone cannot be served exactly; the message names its model type and what is missing."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
        step: the optimiser step (counted from 1) whose loss was not finite.
        rows: indices, in the training data, of the rows of that batch.
    """

    def __init__(self, message: str, step: int, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.step = step
        self.rows = list(rows)
