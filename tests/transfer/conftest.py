"""Fixtures of the transfer tests: the tiny backbones, data and tokenizer of the training tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """`tests/training/tiny.py`: backbones, data and a trainer small enough for tests."""
    name = "ptengine_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "training" / "tiny.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, so none waits for the disk, and nobody looks at training's curves."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("ptengine.training.trainer.draw_curve", lambda path, *_: path)
