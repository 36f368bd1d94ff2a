"""Keeps Python's garbage collector away from what was there before a loop began. Knows nothing of training.

A step makes thousands of short-lived objects, so every few dozen steps the collector walks through all others too, the
million that torch and transformers bring: a third of a second each time, in which a GPU runs out of work.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["settled_objects"]


# Python 3.12 starts with some hundred frozen objects of its own; whoever freezes what torch brought has many more.
_BY_PYTHON = 5000


@contextmanager
def settled_objects() -> Iterator[None]:
    """Inside, objects from before are not collected; cycles among new ones are. A caller's own `gc.freeze` is kept."""
    if gc.get_freeze_count() > _BY_PYTHON:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
