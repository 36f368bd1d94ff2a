"""How much a transfer was worth: gains over scratch, paired, with bootstrap intervals.

Every array holds one score per pair (a target with a seed), fractions where `best` is 1, greater is better, and the
arrays stand in the same order: pair i of all of them had the same rows and the same seed. Knows numbers only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ptengine.errors import InputError

__all__ = ["Interval", "paired_interval", "steps_to_reach", "transfer_measures"]

RESAMPLES = 9999
_DRAWN_AT_ONCE = 1_000_000  # numbers of resamples; all at once would be gigabytes for some thousand pairs
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Attributes:
    value: the measure on all pairs.
    low, high: its 95 % bootstrap interval over pairs; None with fewer than two pairs or where a resample has no value.
    pairs: how many there were.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_interval(
    arrays: Sequence[ArrayLike], statistic: Callable[..., NDArray[np.float64]], seed: int = 0
) -> Interval:
    """`statistic(*arrays, axis=-1)` with its percentile bootstrap interval, resampling pairs across all arrays.

    Raises:
        InputError: no pairs, arrays of different lengths, or a value that is not finite.
    """
    checked = [np.asarray(array, dtype=np.float64) for array in arrays]
    if len({array.shape for array in checked}) != 1 or checked[0].ndim != 1 or checked[0].size == 0:
        raise InputError(f"expected scores of one length, at least one pair, got {[array.shape for array in checked]}")
    if not all(bool(np.isfinite(array).all()) for array in checked):
        raise InputError("expected finite scores, got NaN or infinity")
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # a resample without a value: told by None
        value = float(statistic(*checked, axis=-1))
        low = high = None
        if checked[0].size > 1:
            found = stats.bootstrap(
                checked, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
                method="percentile", rng=np.random.default_rng(seed),
                batch=max(1, _DRAWN_AT_ONCE // checked[0].size),
            ).confidence_interval  # fmt: skip
            if np.isfinite(found.low) and np.isfinite(found.high):
                low, high = float(found.low), float(found.high)
    return Interval(value, low, high, checked[0].size)


def transfer_measures(
    scratch: ArrayLike,
    transferred: ArrayLike,
    *,
    source_only: ArrayLike | None = None,
    shuffled: ArrayLike | None = None,
    full: ArrayLike | None = None,
    best: float = 1.0,
    seed: int = 0,
) -> Mapping[str, Interval]:
    """The measures that the given scores allow.

    Args:
        scratch: m_0, trained on the target's shots from a fresh start.
        transferred: m_T, the transfer under judgement.
        source_only: the source prompt on the target, untouched.
        shuffled: as `transferred`, from a source prompt that was trained on shuffled labels.
        full: m_full, trained on all of the target's rows.
        best: the highest score there is.
        seed: of the bootstrap.

    Returns:
        ``absolute_gain`` m_T - m_0; ``relative_error_reduction`` (m_T - m_0) / (best - m_0), unless scratch makes no
        error; ``wins`` and ``negative_transfer_rate``, the shares of pairs with m_T above and below m_0; with
        `source_only` ``source_only_gain`` over scratch, with `shuffled` ``shuffled_gain`` over scratch; with `full`
        ``gap_closed`` (m_T - m_0) / (m_full - m_0), and with `source_only` too ``transfer_ratio`` source_only / m_full.
        Ratios are of means, so that no single pair with a small denominator decides.

    Raises:
        InputError: as `paired_interval`; another ratio whose denominator is zero.
    """

    def gain(new: Any, old: Any, axis: int = -1) -> Any:
        return (new - old).mean(axis)

    def reduction(new: Any, old: Any, axis: int = -1) -> Any:
        return (new - old).mean(axis) / (best - old.mean(axis))

    def wins(new: Any, old: Any, axis: int = -1) -> Any:
        return (new > old).mean(axis)

    def losses(new: Any, old: Any, axis: int = -1) -> Any:
        return (new < old).mean(axis)

    def closed(new: Any, old: Any, top: Any, axis: int = -1) -> Any:
        return (new - old).mean(axis) / (top - old).mean(axis)

    def ratio(zero: Any, top: Any, axis: int = -1) -> Any:
        return zero.mean(axis) / top.mean(axis)

    wanted: dict[str, tuple[list[ArrayLike | None], Callable[..., Any]]] = {
        "absolute_gain": ([transferred, scratch], gain),
        "relative_error_reduction": ([transferred, scratch], reduction),
        "wins": ([transferred, scratch], wins),
        "negative_transfer_rate": ([transferred, scratch], losses),
        "source_only_gain": ([source_only, scratch], gain),
        "shuffled_gain": ([shuffled, scratch], gain),
        "gap_closed": ([transferred, scratch, full], closed),
        "transfer_ratio": ([source_only, full], ratio),
    }
    found = {}
    for name, (arrays, statistic) in wanted.items():
        if any(array is None for array in arrays):
            continue
        measured = paired_interval([array for array in arrays if array is not None], statistic, seed)
        if np.isfinite(measured.value):
            found[name] = measured
        elif name != "relative_error_reduction":  # which nobody asked for
            raise InputError(f"expected scores for which {name} has a value, got a denominator of zero")
    return found


def steps_to_reach(curve: Sequence[tuple[int, float]], score: float) -> int | None:
    """The first step of `curve` (step, score) that is at least `score`; None where none is."""
    return next((step for step, value in curve if value >= score), None)
