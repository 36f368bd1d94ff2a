"""The guard's folds and its rule."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from ptengine.errors import InputError
from ptengine.training import EvalResult
from ptengine.transfer.guard import Guess, HeldOut, decide, folds, pooled
from ptengine.transfer.strategies import Guard


def test_folds_hold_every_row_back_once_and_keep_the_balance() -> None:
    labels = ["a"] * 8 + ["b"] * 4
    cut = folds(labels, 12, 4, seed=3)
    assert sorted(row for _, held in cut for row in held) == list(range(12))
    for train, held in cut:
        assert sorted(train + held) == list(range(12))
        assert Counter(labels[row] for row in held) == {"a": 2, "b": 1}
    assert cut == folds(labels, 12, 4, seed=3)
    assert cut != folds(labels, 12, 4, seed=4)
    assert sorted(row for _, held in folds(None, 5, 2, seed=0) for row in held) == list(range(5))


def test_too_few_shots_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4 target shots of every label for 4 folds, got 3 of 'b'"):
        folds(["a"] * 8 + ["b"] * 3, 11, 4, 0)
    with pytest.raises(InputError, match="at least 4 target shots for 4 folds, got 3"):
        folds(None, 3, 4, 0)


def test_results_of_the_parts_are_put_in_row_order() -> None:
    one = EvalResult({"loss": 1.0}, ["a", "b"], 2)
    two = EvalResult({"loss": 4.0}, ["a"], 1)
    held = pooled([(one, [2, 0], ["b", "b"]), (two, [1], ["a"])], {"a": 1, "b": 1})
    assert held == HeldOut(2.0, (1.0, 1.0, 0.0))
    assert held.score == pytest.approx(2 / 3)
    texts = pooled([(EvalResult({"loss": 2.0}, [], 2), [0, 1], None)], {})
    assert (texts.correct, texts.score) == (None, -2.0)


def test_a_loss_per_token_passed_for_one_per_shot() -> None:
    """Longer words made a source that knows nothing look better than a guess."""
    gold = ["a", "b", "b"]
    found = pooled([(EvalResult({"loss": 0.6}, ["a", "b", "a"], 3), [0, 1, 2], gold)], {"a": 1, "b": 3})
    assert found.loss == pytest.approx(0.6 * 7 / 3)
    coin = pooled([(EvalResult({"loss": 0.584}, ["a"] * 10, 10), range(10), ["a", "b"] * 5)], {"a": 2, "b": 2})
    found = decide(Guard(), {"scratch-1": held(6, 1.2), "source": coin, "transferred": held(9, 1.0)}, COIN)
    assert "no better than guessing" in found.reason


def held(right: int, loss: float) -> HeldOut:
    return HeldOut(loss, (1.0,) * right + (0.0,) * (10 - right))


@pytest.mark.parametrize(
    ("transferred", "source", "scratch", "gain", "chosen", "negative"),
    [
        # Clear differences in accuracy decide, whatever the losses say.
        (held(9, 0.9), held(6, 0.7), held(6, 0.6), 0.0, "transferred", False),
        (held(4, 0.5), held(4, 0.5), held(7, 0.6), 0.0, "scratch", True),
        (held(6, 0.5), held(9, 0.7), held(7, 0.6), 0.0, "source", False),
        (held(4, 0.5), held(9, 0.7), held(7, 0.6), 0.0, "source", True),
        # One shot of ten is one standard error: the loss decides.
        (held(6, 0.5), held(6, 0.7), held(7, 0.6), 0.0, "transferred", False),
        (held(8, 0.7), held(6, 0.7), held(7, 0.6), 0.0, "scratch", True),
        (held(7, 0.5), held(6, 0.5), held(7, 0.6), 0.0, "transferred", False),
        (held(7, 0.7), held(7, 0.8), held(7, 0.6), 0.0, "scratch", True),
        # A source far below scratch knows another task: two standard errors are asked for.
        (held(9, 0.5), held(3, 0.9), held(7, 0.6), 0.0, "scratch", False),
        (held(7, 0.5), held(3, 0.9), held(7, 0.6), 0.0, "scratch", False),
        (held(10, 0.5), held(3, 0.9), held(6, 0.6), 0.0, "transferred", False),
        # A lower loss alone does not put the untouched start before the transferred prompt.
        (held(8, 0.5), held(8, 0.4), held(7, 0.6), 0.0, "transferred", False),
        (held(8, 0.5), held(9, 0.3), held(7, 0.6), 0.0, "transferred", False),
        (held(7, 0.7), held(7, 0.5), held(7, 0.6), 0.0, "source", True),
        (held(9, 0.5), held(6, 0.4), held(7, 0.6), 0.25, "scratch", False),
        (HeldOut(0.5, None), HeldOut(0.8, None), HeldOut(0.6, None), 0.0, "transferred", False),
        (HeldOut(0.7, None), HeldOut(0.8, None), HeldOut(0.6, None), 0.0, "scratch", True),
    ],
)
def test_the_rule(
    transferred: HeldOut, source: HeldOut, scratch: HeldOut, gain: float, chosen: str, negative: bool
) -> None:
    candidates = {"scratch-1": scratch, "source": source, "transferred": transferred}
    found = decide(Guard(min_gain=gain), candidates)
    assert (found.chosen, found.negative_transfer) == (chosen, negative)
    named = {"transferred": "the transferred prompt", "source": "the source prompt untouched", "scratch": "scratch"}
    assert found.reason.startswith(f"{named[chosen]} is kept")
    assert ("two standard errors" in found.reason) == (scratch.score - source.score > 0.25)


COIN = Guess(0.5, 0.693)


@pytest.mark.parametrize(
    ("transferred", "source", "guess", "chosen"),
    [
        (held(9, 0.5), held(7, 0.9), COIN, "scratch"),  # 7 of 10 are within two standard errors of 5
        (held(9, 0.5), held(7, 0.693), COIN, "scratch"),
        (held(9, 0.5), held(7, 0.69), COIN, "transferred"),  # better than a coin in loss
        (held(9, 0.5), held(5, 0.69), COIN, "transferred"),
        (held(9, 0.5), held(8, 0.9), COIN, "transferred"),  # and in accuracy
        (held(9, 0.5), held(7, 0.9), None, "transferred"),
        (held(9, 0.5), held(7, 0.9), Guess(0.3, 0.693), "transferred"),
        (held(9, 0.5), held(7, 0.9), Guess(0.5, 1.1), "transferred"),
        (held(9, 0.5), held(2, 0.9), COIN, "scratch"),  # clearly another accuracy, and a lower one
        (held(9, 0.5), held(5, 0.9), Guess(0.9, 0.325), "scratch"),  # though scratch is not clearly better either
        (held(10, 0.5), held(7, 0.9), COIN, "transferred"),  # 4 of 10 more are two standard errors
        (HeldOut(0.5, None), HeldOut(0.8, None), COIN, "transferred"),
    ],
)
def test_a_source_no_better_than_guessing_knows_another_task(
    transferred: HeldOut, source: HeldOut, guess: Guess | None, chosen: str
) -> None:
    """Scratch on few shots may be no better itself, and no source can then be clearly worse."""
    scratch = HeldOut(0.6, None) if transferred.correct is None else held(6, 0.6)
    found = decide(Guard(), {"scratch-1": scratch, "source": source, "transferred": transferred}, guess)
    assert found.chosen == chosen
    asked = chosen == "scratch" or transferred == held(10, 0.5)
    assert ("two standard errors" in found.reason) == asked


def test_guessing_knows_how_often_labels_are() -> None:
    assert Guess.of(["a", "b", "a", "a"]).accuracy == 0.75
    assert Guess.of(["a", "b", "a", "a"]).loss == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert Guess.of(["a", "a"]) == Guess(1.0, 0.0)


def test_the_best_scratch_counts() -> None:
    candidates = {
        "scratch-1": held(5, 0.6), "scratch-0.3": held(7, 0.6), "source": held(5, 0.6), "transferred": held(5, 0.6),
    }  # fmt: skip
    found = decide(Guard(scratch_rates=(1.0, 0.3)), candidates)
    assert (found.chosen, found.scratch, found.negative_transfer) == ("scratch", "scratch-0.3", True)
    assert found.gain is not None
    assert found.gain.value == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "bad",
    [
        {"folds": 1},
        {"min_gain": -1},
        {"scratch_rates": ()},
        {"scratch_rates": (1.0, 1.0)},
        {"scratch_rates": (1e9,)},
        {"scratch_rates": (1.0, 1.0000001)},  # both ran in one folder
    ],
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        Guard(**bad)
