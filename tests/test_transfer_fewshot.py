"""The few-shot experiment's bookkeeping: its summary, its file, and its clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transfer_fewshot as experiment


def runs() -> dict[str, Any]:
    """Two finished pairs of one group, and one that lacks its scratch runs."""
    found: dict[str, Any] = {"source/soft/books": {"validation_accuracy": 0.7}}
    for seed, scratch, moved in ((0, {"a": 0.5, "b": 0.6}, 0.7), (1, {"a": 0.6, "b": 0.6}, 0.6), (2, None, 0.9)):
        key = f"soft/16/music/{seed}"
        scores = {"plain": moved, "joint": moved, "anchor": 0.5, "source_only": 0.4, "shuffled": 0.6}
        found |= {f"{key}/selected": "books", **{f"{key}/{name}": value for name, value in scores.items()}}
        if scratch is not None:
            found[f"{key}/scratch"] = scratch
    return found


def test_scratch_counts_with_its_best_mean_and_unfinished_pairs_wait() -> None:
    found = experiment.summary(runs())
    assert set(found) == {"soft/16"}
    group = found["soft/16"]
    assert (group["pairs"], group["scratch_configuration"]) == (2, "b")
    assert group["accuracy"]["scratch"] == pytest.approx(0.6)
    plain = group["measures"]["plain"]
    assert plain["absolute_gain"]["value"] == pytest.approx(0.05)
    assert plain["wins"]["value"] == pytest.approx(0.5)
    assert plain["shuffled_gain"]["value"] == pytest.approx(0.0)
    assert experiment.summary({}) == {}


def test_the_file_goes_on_and_the_clock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "environment", dict)
    path, settings = tmp_path / "few.json", {"seeds": 1}
    store = experiment.Store.open(path, settings, None)
    assert store.once("a", lambda: 1) == 1
    again = experiment.Store.open(path, settings, 0.0)
    assert again.once("a", lambda: 2) == 1
    with pytest.raises(experiment.OutOfTime):
        again.once("b", lambda: 2)
    assert json.loads(path.read_text())["runs"] == {"a": 1}
    with pytest.raises(SystemExit, match="choose another file"):
        experiment.Store.open(path, {"seeds": 2}, None)
