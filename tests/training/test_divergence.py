"""A loss that is not finite stops the run before the step, names it, and leaves alone what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine.data import ShuffledBatches
from ptengine.errors import TrainingDiverged


def _poison(monkeypatch: pytest.MonkeyPatch, call: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the loss of the n-th micro-batch."""
    import ptengine.training.objective as objective

    real = objective.packed_loss
    calls = [0]

    def poisoned(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        found = real(*arguments, **options)
        if calls[0] == call:
            object.__setattr__(found, "loss", change(found.loss))
        return found

    monkeypatch.setattr(objective, "packed_loss", poisoned)


def _files(folder: Path) -> dict[str, bytes]:
    found = [path for part in ("checkpoint-*", "best", "prompt") for path in folder.glob(f"{part}/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_and_rows_are_named_and_nothing_is_lost(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "evaluation": tiny.rows(4, 1), "lr_scheduler_type": "constant",
    }  # fmt: skip
    model = tiny.gpt2()
    good = tiny.soft(model)
    tiny.trainer(tmp_path / "good", model, good, max_steps=3, **settings).fit()
    prompt = tiny.soft(model)
    made = tiny.trainer(tmp_path / "bad", model, prompt, **settings)
    _poison(monkeypatch, 8, lambda loss: loss * value)  # second micro-batch of step 4
    with pytest.raises(TrainingDiverged) as caught:
        made.fit()
    order = ShuffledBatches(20, 2, 7)
    batches = [next(order).rows for _ in range(8)]
    assert caught.value.step == 4
    assert caught.value.rows == batches[7]
    message = str(caught.value)
    assert f"step 4: the loss is not finite; training rows of the batch: {batches[7]}" in message
    assert str(tmp_path / "bad" / "checkpoint-2") in message
    assert torch.equal(prompt.embeds, good.embeds)  # the weights from before the step
    assert [path.name for path in (tmp_path / "bad").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "bad" / "prompt").exists()
    line = json.loads((tmp_path / "bad" / "log.jsonl").read_text().splitlines()[-1])
    assert (line["event"], line["step"]) == ("diverged", 4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_that_is_not_finite_stops_too(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a finite loss the prompt would take the step, and every later checkpoint would hold NaN."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * float("nan")

    model = tiny.gpt2()
    prompt = tiny.soft(model)
    _poison(monkeypatch, 3, Poison.apply)
    with pytest.raises(TrainingDiverged, match=r"step 3: the gradient has norm nan.*nothing was saved yet"):
        tiny.trainer(tmp_path, model, prompt).fit()
    assert bool(prompt.embeds.isfinite().all())


def test_spoilt_weights_are_never_saved(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update itself can overflow; the loss shows it one step later, when a checkpoint may have been written."""
    real = torch.optim.AdamW.step

    def overflowing(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        parameter = self.param_groups[0]["params"][0]
        if self.state[parameter]["step"] == 2:
            with torch.no_grad():
                parameter[0, 0] = float("inf")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(TrainingDiverged, match=r"step 2: prompt\.embeds is not finite after the step.*checkpoint-1"):
        tiny.trainer(tmp_path / "a", max_steps=3, save_steps=1).fit()
    assert [path.name for path in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-1"]
    with pytest.raises(TrainingDiverged, match=r"step 2: prompt\.embeds is not finite after the step"):
        tiny.trainer(tmp_path / "b", max_steps=2, save_strategy="no").fit()
    assert not (tmp_path / "b" / "prompt").exists()


def test_diverged_run_resumes_from_its_last_checkpoint(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.trainer(tmp_path / "whole", save_steps=3).fit()
    with monkeypatch.context() as patch:
        _poison(patch, 8, lambda loss: loss * float("nan"))
        with pytest.raises(TrainingDiverged):
            tiny.trainer(tmp_path / "cut", save_steps=3).fit()
    before = _files(tmp_path / "cut")
    assert {name.split("/")[0] for name in before} == {"checkpoint-3", "checkpoint-6"}
    assert tiny.trainer(tmp_path / "cut", save_steps=3).fit(resume=True).losses == whole.losses
    after = _files(tmp_path / "cut")
    assert all(after[name] == content for name, content in before.items())
