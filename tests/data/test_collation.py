"""Order and packing of rows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from ptengine.data import EncodedRow, SequenceClassificationTask, ShuffledBatches, collate


def row(ids: list[int], labels: list[int], **options: Any) -> EncodedRow:
    return EncodedRow(ids, labels, index=0, prompt_length=1, **options)


def test_packs_without_padding() -> None:
    batch = collate([row([5, 6, 7], [-100, 6, 7], class_id=2), row([8], [-100], class_id=0)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.labels is not None
    assert batch.labels.tolist() == [-100, 6, 7, -100]
    assert batch.row_labels is not None
    assert batch.row_labels.tolist() == [2, 0]
    assert batch.token_type_ids is None


def test_class_zero_is_a_class() -> None:
    batch = collate([row([5], [5], class_id=0)])
    assert batch.row_labels is not None
    assert batch.row_labels.tolist() == [0]
    assert collate([row([5], [5])]).row_labels is None


def test_encoder_rows_have_no_token_labels(bert: Any) -> None:
    dataset = Dataset.from_dict({"text": ["a b", "c"], "label": ["x", "y"]})
    split = SequenceClassificationTask(labels=("x", "y")).encode(dataset, bert, max_tokens=9)
    batch = collate(split.rows)
    assert batch.labels is None
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [0] * 7
    assert batch.row_labels is not None
    assert batch.row_labels.tolist() == [0, 1]


def test_order_is_the_documented_one() -> None:
    """Pinned: an order that changes between versions would break every checkpoint's promise."""
    batches = list(itertools.islice(ShuffledBatches(7, 3, seed=5), 6))
    assert [(b.epoch, b.batch_index, len(b.rows)) for b in batches] == [
        (0, 0, 3),
        (0, 1, 3),
        (0, 2, 1),
        (1, 0, 3),
        (1, 1, 3),
        (1, 2, 1),
    ]
    orders = [[row for b in batches if b.epoch == epoch for row in b.rows] for epoch in (0, 1)]
    for epoch, order in enumerate(orders):
        mixed = int(np.random.SeedSequence([5, epoch]).generate_state(1, np.uint64)[0])
        assert order == torch.randperm(7, generator=torch.Generator().manual_seed(mixed)).tolist()
    assert orders[0] != orders[1]


def test_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(ShuffledBatches(10, 2, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**31), st.integers(0, 60))
def test_resumes_with_exactly_the_next_batch(num_rows: int, batch_size: int, seed: int, taken: int) -> None:
    batches = ShuffledBatches(num_rows, batch_size, seed)
    list(itertools.islice(batches, taken))
    state = json.loads(json.dumps(batches.state_dict()))
    expected = list(itertools.islice(batches, 2 * batches.batches_per_epoch))
    resumed = ShuffledBatches(num_rows, batch_size, seed)
    next(resumed)
    resumed.load_state_dict(state)
    assert list(itertools.islice(resumed, 2 * batches.batches_per_epoch)) == expected
    assert resumed.state_dict() == batches.state_dict()


@given(st.integers(2, 40), st.integers(2, 45), st.integers(0, 2**31))
def test_no_row_by_itself_where_two_are_needed(num_rows: int, batch_size: int, seed: int) -> None:
    alone, joined = ShuffledBatches(num_rows, batch_size, seed), ShuffledBatches(num_rows, batch_size, seed, least=2)
    for _ in range(2):
        before, after = ([next(one).rows for _ in range(one.batches_per_epoch)] for one in (alone, joined))
        if len(before[-1]) == 1:
            before[-2:] = [before[-2] + before[-1]]
        assert after == before


@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**31))
def test_every_row_once_per_epoch(num_rows: int, batch_size: int, seed: int) -> None:
    batches = ShuffledBatches(num_rows, batch_size, seed)
    for epoch in range(3):
        seen = list(itertools.islice(batches, batches.batches_per_epoch))
        assert [b.epoch for b in seen] == [epoch] * batches.batches_per_epoch
        assert [b.batch_index for b in seen] == list(range(batches.batches_per_epoch))
        assert sorted(row for b in seen for row in b.rows) == list(range(num_rows))
        assert all(len(b.rows) == batch_size for b in seen[:-1])


def test_seeds_differ() -> None:
    orders = {tuple(next(ShuffledBatches(50, 50, seed)).rows) for seed in range(20)}
    assert len(orders) == 20


def test_a_state_that_is_refused_changes_nothing() -> None:
    batches = ShuffledBatches(10, 3, seed=1)
    next(batches)
    before = batches.state_dict()
    with pytest.raises(ValueError, match="batch_index below 4, got 4"):
        batches.load_state_dict({**before, "epoch": 7, "batch_index": 4})
    assert batches.state_dict() == before
