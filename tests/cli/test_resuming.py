"""`--resume` on a folder whose run it cannot go on with: refused with the reason, and the folder as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ptengine.errors import InputError


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def other_model(world: Any, tmp_path: Path) -> str:
    """A model of the same shape and other weights."""
    home = Path(shutil.copytree(world.llama, tmp_path / "other"))
    weights = {name: tensor * 1.5 for name, tensor in load_file(home / "model.safetensors").items()}
    save_file(weights, home / "model.safetensors", metadata={"format": "pt"})
    return str(home)


def test_a_refused_resumption_left_a_task_that_named_its_own_model(
    world: Any, call: Callable[..., Any], tmp_path: Path, other_model: str
) -> None:
    """Later commands then took the refused run's model and said nothing."""
    output = tmp_path / "out"
    assert call(*world.tune(output)).status == 0
    before = contents(output)
    arguments = [other_model if part == world.llama else part for part in world.tune(output)]
    for refused in (arguments, world.tune(output, "--dtype", "bfloat16"), world.tune(output, "--seed", "7")):
        assert call(*refused, "--resume").status == 2
        assert contents(output) == before
    # The same weights in another place are the same run, which then names that place.
    moved = shutil.copytree(world.llama, tmp_path / "moved")
    arguments = [str(moved) if part == world.llama else part for part in world.tune(output)]
    assert call(*arguments, "--resume").status == 0
    assert str(moved) in (output / "task.json").read_text()


def test_a_sweep_refused_in_the_folder_of_a_single_run_left_empty_folders_there(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert call(*world.tune(output)).status == 0
    before = contents(output)
    refused = call(*world.tune(output), "--eval", world.test, "--seeds", "1,2", "--resume")
    assert refused.status == 2
    assert "PromptSet" in refused.err
    assert contents(output) == before


def test_another_model_was_refused_as_another_learning_rate(
    world: Any, call: Callable[..., Any], tmp_path: Path, other_model: str
) -> None:
    """Nobody had given a rate: it is the method's own and follows from the embeddings and the method."""
    output = tmp_path / "out"
    assert call(*world.tune(output)).status == 0
    arguments = [other_model if part == world.llama else part for part in world.tune(output)]
    assert "expected model fingerprint=" in call(*arguments, "--resume").err
    assert "expected prompt method='soft_prompt'" in call(*world.tune(output, "--method", "prefix"), "--resume").err


def test_a_sweep_resumed_as_a_single_run_had_no_identity(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """KeyError, where the reverse was refused."""
    output = tmp_path / "out"
    assert call(*world.tune(output), "--eval", world.test, "--seeds", "1,2").status == 0
    before = contents(output)
    refused = call(*world.tune(output), "--eval", world.test, "--resume")
    assert refused.status == 2
    assert "expected a checkpoint of a single run" in refused.err
    assert contents(output) == before


def test_a_finished_run_without_checkpoints_was_replaced(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """By a run of other settings, too, since there was nothing to compare them with."""
    output = tmp_path / "out"
    arguments = [*world.tune(output), "--save-strategy", "no", "--eval", world.test]
    assert call(*arguments).status == 0
    before = contents(output)
    for options in ((), ("--num-virtual-tokens", "5"), ("--seeds", "1,2")):
        refused = call(*arguments, *options, "--resume")
        assert refused.status == 2
        assert "got the prompt of a finished run" in refused.err
        assert contents(output) == before


def test_a_refused_run_deleted_the_folder_of_the_one_that_was_training_there(
    world: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other had made it while this one was reading its data."""
    output = tmp_path / "out"

    def refuse(*_: Any, **__: Any) -> None:
        output.mkdir()
        (output / "log.jsonl").write_text("of another process")
        raise InputError("expected output_dir to be free")

    monkeypatch.setattr("ptengine.training.Trainer.fit", refuse)
    assert call(*world.tune(output)).status == 2
    assert (output / "log.jsonl").read_text() == "of another process"
