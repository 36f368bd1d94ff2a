"""Every random generator of the process as tensors and json values, so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Generators", "load_random_state", "random_state", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of python's, numpy's and torch's global generators, as tensors and json values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    plain = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"name": name, "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    return tensors, plain


def load_random_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `random_state` took. CUDA generators are set where the saved device exists."""
    random.setstate((plain["python"]["version"], tuple(tensors["python"].tolist()), plain["python"]["gauss"]))
    saved = plain["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached"]))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


class Generators:
    """The random numbers that one run draws.

    Alone in the process a run draws from the global generators as they stand. One of several runs has a state of its
    own, put in place while it draws: it draws what it would draw alone, whatever the others do in between.

    Args:
        own: whether to keep a state apart, beginning with that of the global generators now.
    """

    def __init__(self, own: bool = False) -> None:
        self._own = random_state() if own else None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Around everything that may draw."""
        if self._own is None:
            yield
            return
        load_random_state(*self._own)
        try:
            yield
        finally:
            self._own = random_state()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `random_state`."""
        return random_state() if self._own is None else self._own

    def load(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        load_random_state(tensors, plain)
        if self._own is not None:
            self._own = random_state()
