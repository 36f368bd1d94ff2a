"""From encoded rows to batches: in which order, and packed how.

Knows rows of tokens; no text, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch, pack_rows
from ptengine.checks import check_whole
from ptengine.data.encoding import EncodedRow
from ptengine.errors import InputError

__all__ = ["BatchIndices", "ShuffledBatches", "batch_starts", "collate"]


def collate(rows: Sequence[EncodedRow]) -> PackedBatch:
    """Pack rows one after another, without padding.

    The batch has `labels` if any row has a labelled token, `row_labels` if the rows have class ids or answers, and
    `token_type_ids` and `virtual_at` if the rows have those.

    Raises:
        InputError: no rows, or rows of which only some have class ids, segment ids or places of virtual tokens (they
            are of different tasks).
    """
    if not rows:
        raise InputError("expected at least one row to collate, got none")
    for name in ("class_id", "token_type_ids", "virtual_at", "window"):
        without = [row.index for row in rows if getattr(row, name) is None]
        if 0 < len(without) < len(rows):
            raise InputError(f"expected rows of one task in a batch, got {name} in some but not in row {without[0]}")
    labelled = any(label != IGNORE_INDEX for row in rows for label in row.labels)
    types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    classes: list[int] | list[tuple[int, int]] = [row.class_id for row in rows if row.class_id is not None]
    if not classes:
        classes = [row.window.answer for row in rows if row.window is not None]
    places = [row.virtual_at for row in rows if row.virtual_at is not None]
    return pack_rows(
        [row.input_ids for row in rows],
        labels=[row.labels for row in rows] if labelled else None,
        row_labels=classes or None,
        token_type_ids=types or None,
        virtual_at=places or None,
    )


def batch_starts(num_rows: int, batch_size: int, least: int = 1) -> range:
    """Where batches of rows begin, one after another; a last one of fewer than `least` rows joins the one before."""
    return range(0, max(num_rows - least, 0) + 1, batch_size)


@dataclass(frozen=True)
class BatchIndices:
    """One batch of an epoch.

    Attributes:
        epoch: from 0.
        batch_index: within the epoch, from 0.
        rows: row numbers of the data.
    """

    epoch: int
    batch_index: int
    rows: list[int]


class ShuffledBatches:
    """Endless shuffled batches, epoch after epoch, resumable at any batch.

    The order of epoch e is ``torch.randperm(num_rows)`` on the CPU from a generator seeded with
    ``numpy.random.SeedSequence([seed, e]).generate_state(1, numpy.uint64)``: it depends on nothing that came before, so
    a resumed run continues with exactly the batch that would have come. Every row comes once per epoch. The last batch
    of an epoch may be short; one of fewer than `least` rows joins the batch before it.

    Iteration continues where the object stands: a second iterator does not start over.

    Args:
        num_rows: rows of the data, at least 1.
        batch_size: rows per batch, at least 1.
        seed: at least 0.
        least: rows of the shortest batch, from 1 to the batch size.

    Raises:
        InputError: an argument is not a whole number in its range.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, least: int = 1) -> None:
        for name, value, low in (("num_rows", num_rows, 1), ("batch_size", batch_size, least), ("seed", seed, 0)):
            check_whole(name, value, low)
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._starts = batch_starts(num_rows, batch_size, least)
        self._epoch = 0
        self._batch_index = 0
        self._order: tuple[int, list[int]] | None = None  # the epoch whose order is at hand

    @property
    def batches_per_epoch(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[BatchIndices]:
        return self

    def __next__(self) -> BatchIndices:
        start = self._starts[self._batch_index]
        is_last = self._batch_index + 1 == self.batches_per_epoch
        rows = self._permutation(self._epoch)[start : None if is_last else start + self.batch_size]
        batch = BatchIndices(self._epoch, self._batch_index, rows)
        self._batch_index += 1
        if is_last:
            self._epoch, self._batch_index = self._epoch + 1, 0
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch stands, and what it is a batch of; plain JSON."""
        return {
            "epoch": self._epoch,
            "batch_index": self._batch_index,
            "num_rows": self.num_rows,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that a `state_dict` points to.

        Raises:
            InputError: the state lacks an entry, has a position that does not exist, or was written with other rows,
                batch size or seed. Nothing is changed then.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise InputError(
                f"expected the entries {', '.join(self.state_dict())} in the sampler's state, got {list(state)}"
            )
        for name in ("num_rows", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"expected a sampler's state with {name}={getattr(self, name)} as in this run, got {state[name]!r}"
                )
        check_whole("epoch", state["epoch"], 0)
        check_whole("batch_index", state["batch_index"], 0)
        if state["batch_index"] >= self.batches_per_epoch:
            raise InputError(f"expected batch_index below {self.batches_per_epoch}, got {state['batch_index']}")
        self._epoch, self._batch_index = state["epoch"], state["batch_index"]

    def _permutation(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            self._order = (epoch, torch.randperm(self.num_rows, generator=generator).tolist())
        return self._order[1]
