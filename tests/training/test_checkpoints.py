"""Checkpoint folders: whole or absent, torn ones found out, the newest and the best never thinned out."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptengine.configuration import TrainingConfig
from ptengine.errors import InputError
from ptengine.training.checkpoints import (
    checkpoint_steps,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from ptengine.training.folders import clean_leftovers, exclusive, write_folder
from ptengine.training.optimization import (
    load_optimizer_state,
    load_schedule_state,
    make_optimizer,
    make_schedule,
    optimizer_state,
    schedule_state,
)
from ptengine.training.randomness import load_random_state, random_state, seed_everything


def _write(folder: Path, step: int, value: float = 0.0) -> Path:
    return write_checkpoint(
        folder, step, {"prompt": {"w": torch.full((2, 3), value)}}, {"step": step, "loss": math.pi / 3}
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = _write(tmp_path, 7, 0.1)
    checkpoint = read_checkpoint(path)
    assert checkpoint.step == 7
    assert checkpoint.state["loss"] == math.pi / 3
    assert torch.equal(checkpoint.tensors["prompt"]["w"], torch.full((2, 3), 0.1))
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "prompt.safetensors", "state.json"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "prompt.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "short", "flipped"])
def test_torn_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str, harm: str) -> None:
    _write(tmp_path, 5)
    file = _write(tmp_path, 10) / name
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "short":
        file.write_bytes(content[:-3])
    else:
        file.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    if (name, harm) == ("manifest.json", "flipped"):
        file.write_text(file.read_text().replace('"size"', '"seize"'))
    found, torn = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5
    assert len(torn) == 1
    assert "checkpoint-10 is torn" in torn[0]
    with pytest.raises(InputError, match="expected a complete checkpoint"):
        read_checkpoint(tmp_path / "checkpoint-10")
    _write(tmp_path, 10, 2.0)
    assert read_checkpoint(tmp_path / "checkpoint-10").tensors["prompt"]["w"][0, 0] == 2.0


def test_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    _write(tmp_path, 5, 1.0)
    _write(tmp_path, 5, 2.0)
    assert read_checkpoint(tmp_path / "checkpoint-5").tensors["prompt"]["w"][0, 0] == 1.0


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_checkpoint(tmp_path, 5, {"prompt": {"w": torch.zeros(1)}}, {"step": 5, "loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_newest_and_best(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        _write(tmp_path, step)
    prune_checkpoints(tmp_path, None, newest=20, best=5)
    assert checkpoint_steps(tmp_path) == [5, 10, 15, 20]
    prune_checkpoints(tmp_path, 2, newest=20, best=5)
    assert checkpoint_steps(tmp_path) == [5, 20]
    prune_checkpoints(tmp_path, 1, newest=20, best=5)
    assert checkpoint_steps(tmp_path) == [5, 20]


def test_pruning_never_trades_a_complete_checkpoint_for_a_torn_newer_one(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    (_write(tmp_path, 30) / "manifest.json").unlink()
    prune_checkpoints(tmp_path, 1, newest=10, best=None)
    assert checkpoint_steps(tmp_path)[0] == 10


def test_names_that_are_no_steps_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert newest_checkpoint(tmp_path) == (None, [])


def test_replaced_folder_survives_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    """`best/` was gone when a kill came after the old one had been moved aside and before the new one came in."""
    write_folder(tmp_path / "best", lambda folder: (folder / "a").write_text("old"))
    (tmp_path / "best").rename(tmp_path / ".old-best-0011aabb")
    (tmp_path / ".tmp-best-0011aabb").mkdir()
    (tmp_path / ".tmp-checkpoint-5-0011aabb").mkdir()
    clean_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "a").read_text() == "old"
    write_folder(tmp_path / "best", lambda folder: (folder / "b").write_text("new"))
    assert [entry.name for entry in (tmp_path / "best").iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]


def test_folder_belongs_to_one_run(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(InputError, match="another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 2, 4), (5,)])
def test_optimizer_and_schedule_come_back_to_the_last_bit(tmp_path: Path, optim: str, shape: tuple[int, ...]) -> None:
    config = TrainingConfig(output_dir="x", optim=optim, lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.01)

    def build(start: torch.Tensor) -> tuple[Any, ...]:
        prompt, head = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(3))
        optimizer = make_optimizer(config, [prompt], [head], 0.3)
        return prompt, head, optimizer, make_schedule(config, optimizer, 20)

    def step(state: tuple[Any, ...], number: int) -> None:
        prompt, head, optimizer, schedule = state
        generator = torch.Generator().manual_seed(number)
        prompt.grad = torch.randn(shape, generator=generator)
        head.grad = torch.randn(3, generator=generator)
        optimizer.step()
        schedule.step()

    one = build(torch.randn(shape))
    for number in range(7):
        step(one, number)
    tensors, plain = optimizer_state(one[2])
    write_checkpoint(tmp_path, 7, {"o": tensors}, {"step": 7, "o": plain, "s": schedule_state(one[3])})
    saved = read_checkpoint(tmp_path / "checkpoint-7")
    two = build(one[0].detach())
    with torch.no_grad():
        two[1].copy_(one[1])
    load_optimizer_state(two[2], saved.tensors["o"], saved.state["o"])
    load_schedule_state(two[3], saved.state["s"])
    for number in range(7, 15):
        step(one, number)
        step(two, number)
        assert one[2].param_groups[0]["lr"] == two[2].param_groups[0]["lr"]
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_random_state_comes_back(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()

    before = random_state()
    try:
        seed_everything(3)
        random.gauss(0, 1)
        np.random.randn()
        tensors, plain = random_state()
        write_checkpoint(tmp_path, 1, {"r": tensors}, {"step": 1, "r": plain})
        expected = draw(), draw()
        saved = read_checkpoint(tmp_path / "checkpoint-1")
        load_random_state(saved.tensors["r"], saved.state["r"])
        assert (draw(), draw()) == expected
    finally:
        load_random_state(*before)
