"""`ptengine doctor` on GPUs that this machine lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ptengine.commands.doctor import tile_report
from ptengine.kernels.launch import architecture


def test_doctor_says_whose_tiles_an_unknown_gpu_takes() -> None:
    assert tile_report("sm_120") == [
        "prefix_attention on sm_120: tiles those of sm_80 and sm_86, the nearest, since the table has none of its own",
        "prefix_concat on sm_120: tiles those of sm_80, the nearest, since the table has none of its own",
        "linear_cross_entropy on sm_120: tiles those of sm_80, the nearest, since the table has none of its own",
    ]
    assert "linear_cross_entropy on sm_90: tiles its own" in tile_report("sm_90")


def test_doctor_denied_the_tiles_that_a_gpu_has_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_86 has some for the backward pass alone, which the newer ones without any take, too."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(major=8, minor=6))
    found = tile_report(architecture.__wrapped__(torch.device("cuda", 0)))
    assert found[0] == (
        "prefix_attention on sm_86: tiles its own, and those of sm_80 where the table has none of its own"
    )
    assert found[1] == "prefix_concat on sm_86: tiles those of sm_80, the nearest, since the table has none of its own"
