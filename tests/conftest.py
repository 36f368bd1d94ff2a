"""Fixtures of the whole suite. Nothing here reaches the network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """The garbage collector passes over what collection imported; each of the suite's many runs would walk through it
    to settle it (`ptengine.garbage`), which took longer than their training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models beside the checkout; a clone without it skips and says so."""
    if not (SHARED / "data").is_dir():
        if os.environ.get("PTENGINE_REQUIRE_SHARED") == "1":
            pytest.fail(f"PTENGINE_REQUIRE_SHARED=1 but there is no {SHARED}")
        pytest.skip("needs ../shared (real data sets and models), which this checkout does not have")
    return SHARED
