"""The cases of `train_step.py` under pytest-benchmark: PEFT and ptengine side by side in one group per case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from train_step import CASES, SHARED, Case, make_batch, peft_step, ptengine_step

SIDES = {"peft": peft_step, "ptengine": ptengine_step}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("side", SIDES)
def test_train_step(benchmark: Any, case: Case, side: str) -> None:
    if case.length is None and not SHARED.is_dir():
        pytest.skip("needs ../shared/data (SST-2), which this checkout does not have")
    torch.set_num_threads(2)
    step = SIDES[side](case, make_batch(case))
    benchmark.group = case.name
    loss = benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert 0 < loss < 20  # about ln(50257) for random weights; a step that did not run would give nothing
