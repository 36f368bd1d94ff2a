"""kill -9 at any moment costs at most the steps since the last checkpoint, and nothing in the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = 20


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_child.py")), str(tmp_path), str(KILLS), "11"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["kills"] == KILLS
    assert report["finished"]
    # Kills in all stages of a run: before the first checkpoint, and after several.
    assert min(report["progress"]) < 20 < max(report["progress"])
    whole = tmp_path / "whole"
    for name in report["finished"]:
        cut = tmp_path / name
        assert json.loads((cut / "result.json").read_text()) == json.loads((whole / "result.json").read_text())
        for file in ("prompt/prompt.safetensors", "best/prompt.safetensors", "best/training.json"):
            assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
        assert _numbers(cut / "log.jsonl") == _numbers(whole / "log.jsonl")
        assert not list(cut.glob(".tmp-*"))
        assert not list(cut.glob(".old-*"))


def _numbers(path: Path) -> list[dict[str, float]]:
    """The log but for the clock and the checkpoints: a kill may come after one is there and before its line is."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["event"] != "checkpoint"]
    timed = ("seconds", "tokens_per_second", "peak_memory")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]
