"""Fixtures of the training tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module `tiny.py` beside this file: backbones, data and a trainer small enough for tests."""
    name = "ptengine_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def draws_curve() -> None:
    """Asked for by the tests that look at the curve; drawing takes longer than all else in a tiny run."""


@pytest.fixture(autouse=True)
def _fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, so none waits for the disk; the kill test's own process does."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    if "draws_curve" not in request.fixturenames:
        monkeypatch.setattr("ptengine.training.trainer.draw_curve", lambda path, *_: path)
