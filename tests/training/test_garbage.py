"""The collector during a run: old objects settled, new cycles collected, and everything as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ptengine.garbage import settled_objects
from ptengine.training.loop import Loop

from . import tiny


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """As in most releases of Python; 3.12 starts with a few objects frozen, and the suite with all that it imported."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()


def test_old_objects_are_settled_and_new_cycles_collected() -> None:
    with settled_objects():
        assert gc.get_freeze_count() > 10000
        seen = weakref.ref(Cycle())
        gc.collect()
        assert seen() is None
    assert gc.get_freeze_count() == 0


def test_an_error_settles_nothing_for_good() -> None:
    with pytest.raises(KeyError), settled_objects():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_python_froze_as_it_started_settled_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 has 375 objects frozen before anybody asks: nothing was ever settled there."""
    count = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)
    with settled_objects():
        assert count() > 10000
    assert count() == 0


def test_what_the_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with settled_objects():
            pass
        assert gc.get_freeze_count() >= count - 10  # some of them may have died
    finally:
        gc.unfreeze()


def test_a_run_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    original = Loop.go

    def go(self: Loop, *args: Any) -> None:
        counts.append(gc.get_freeze_count())
        original(self, *args)

    monkeypatch.setattr(Loop, "go", go)
    tiny.trainer(tmp_path, max_steps=1).fit()
    assert counts[0] > 10000
    assert gc.get_freeze_count() == 0
