"""Measures of transfer against hand-made numbers, and intervals against what they must hold."""

from __future__ import annotations

import numpy as np
import pytest

from ptengine.errors import InputError
from ptengine.transfer import paired_interval, steps_to_reach, transfer_measures


def test_every_measure_on_numbers_one_can_check() -> None:
    scratch, moved = [0.5, 0.6, 0.7, 0.6], [0.6, 0.7, 0.7, 0.5]
    found = transfer_measures(
        scratch, moved, source_only=[0.5, 0.5, 0.5, 0.5], shuffled=[0.5, 0.6, 0.6, 0.6], full=[0.8, 0.8, 0.8, 0.8]
    )
    values = {name: interval.value for name, interval in found.items()}
    assert values == pytest.approx(
        {
            "absolute_gain": 0.025,
            "relative_error_reduction": 0.025 / 0.4,
            "wins": 0.5,
            "negative_transfer_rate": 0.25,
            "source_only_gain": -0.1,
            "shuffled_gain": -0.025,
            "gap_closed": 0.025 / 0.2,
            "transfer_ratio": 0.5 / 0.8,
        }
    )
    assert {interval.pairs for interval in found.values()} == {4}


def test_only_measures_with_their_scores_are_given() -> None:
    assert set(transfer_measures([0.5, 0.6], [0.6, 0.6])) == {
        "absolute_gain", "relative_error_reduction", "wins", "negative_transfer_rate",
    }  # fmt: skip


def test_intervals_are_paired() -> None:
    """A constant gain over wildly different pairs is certain; unpaired resampling would not see that."""
    draw = np.random.default_rng(0)
    scratch = draw.uniform(0.2, 0.8, 30)
    found = transfer_measures(scratch, scratch + 0.03)["absolute_gain"]
    assert (found.low, found.high) == pytest.approx((0.03, 0.03), abs=1e-12)
    noisy = transfer_measures(scratch, scratch + draw.normal(0.03, 0.05, 30))["absolute_gain"]
    assert noisy.low is not None
    assert noisy.high is not None
    # Near the normal interval of 30 draws with standard deviation 0.05: 2 * 1.96 * 0.05 / sqrt(30) = 0.036.
    assert 0.024 < noisy.high - noisy.low < 0.048
    assert noisy.low < noisy.value < noisy.high
    assert transfer_measures(scratch, scratch + 0.03) == transfer_measures(scratch, scratch + 0.03)


def test_one_pair_has_no_interval() -> None:
    found = transfer_measures([0.5], [0.75])["absolute_gain"]
    assert (found.value, found.low, found.high, found.pairs) == (0.25, None, None, 1)


def test_bad_scores_are_refused() -> None:
    with pytest.raises(InputError, match="one length"):
        transfer_measures([0.5, 0.6], [0.5])
    with pytest.raises(InputError, match="at least one pair"):
        transfer_measures([], [])
    with pytest.raises(InputError, match="finite"):
        transfer_measures([0.5], [float("nan")])
    with pytest.raises(InputError, match="gap_closed"):
        transfer_measures([0.5], [0.6], full=[0.5])
    assert paired_interval([[1.0, 2.0]], lambda a, axis=-1: a.mean(axis)).value == 1.5


def test_steps_to_reach() -> None:
    curve = [(10, 0.4), (20, 0.6), (30, 0.5)]
    assert [steps_to_reach(curve, score) for score in (0.3, 0.6, 0.7)] == [10, 20, None]


def test_resamples_of_many_pairs_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once they took gigabytes for the rows of a common test file."""
    drawn: list[int] = []

    def difference(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn.append(one.size)
        return (one - other).mean(axis)

    generator = np.random.default_rng(0)
    one, other = generator.random(4000), generator.random(4000)
    found = paired_interval([one, other], difference)
    assert max(drawn) <= 1_000_000
    assert sum(drawn) >= 9999 * 4000
    monkeypatch.setattr("ptengine.transfer.measures._DRAWN_AT_ONCE", 10**9)
    assert paired_interval([one, other], difference) == found


def test_scratch_without_an_error_was_refused() -> None:
    """Since the share of its errors that is mended has no value, which nobody had asked for."""
    found = transfer_measures([1.0, 1.0], [1.0, 0.5])
    assert set(found) == {"absolute_gain", "wins", "negative_transfer_rate"}
    assert found["absolute_gain"].value == -0.25
