"""The place for other losses: the default is the task's loss, parts add up, and a run keeps its promises with them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine.errors import InputError, TrainingDiverged
from ptengine.training import PromptSet, Trainer, TrainingConfig
from ptengine.training.step_loss import LossPart, TaskLoss


class Extra(TaskLoss):
    """The task's loss and, as a part of its own, `weight` times the prompt's sum; told apart by `name`."""

    def __init__(self, weight: float, name: str = "extra", broken_at: int | None = None) -> None:
        self.weight, self.name, self.broken_at = weight, name, broken_at
        self.steps: list[tuple[int, int, int]] = []

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def parts(self, objective: Any, prompt: Any, batches: Any, info: Any) -> Iterator[LossPart]:
        self.steps.append((info.step, info.total_steps, len(batches)))
        assert sum(batch.share for batch in batches) == pytest.approx(1)
        yield from super().parts(objective, prompt, batches, info)
        info.check()
        factor = float("nan") if info.step == self.broken_at else self.weight
        yield LossPart(prompt.embeds.sum() * factor, (), 0)


def trainer(tiny: ModuleType, folder: Path, step_loss: Any, **settings: Any) -> tuple[Trainer, Any]:
    model = tiny.gpt2(dropout=0.0)
    prompt = tiny.soft(model)
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 2, "learning_rate": 0.05, "seed": 7}
    config = TrainingConfig(
        output_dir=str(folder), per_device_train_batch_size=3, disable_tqdm=True, **(options | settings)
    )
    made = Trainer(
        model, prompt, tiny.rows(20), None, config, task=tiny.words_task(), tokenizer=tiny.tokenizer(),
        step_loss=step_loss,
    )  # fmt: skip
    return made, prompt


def test_the_default_is_the_task_alone(tiny: ModuleType, tmp_path: Path) -> None:
    losses = [trainer(tiny, tmp_path / name, loss)[0].fit().losses for name, loss in (("a", None), ("b", TaskLoss()))]
    assert losses[0] == losses[1]


def test_a_set_of_prompts_takes_task_losses_alone(tiny: ModuleType, tmp_path: Path) -> None:
    """Its one batch computes no other: a member's anchor or source rows would have been left out without a word."""
    member, _ = trainer(tiny, tmp_path / "one", Extra(0.5))
    with pytest.raises(InputError, match=r"member 0: expected a trainer of its task's loss alone.*got step_loss=Extra"):
        PromptSet([member], tmp_path)


def test_parts_add_up_and_are_told_the_step(tiny: ModuleType, tmp_path: Path) -> None:
    plain, prompt = trainer(tiny, tmp_path / "plain", None)
    start = prompt.embeds.sum().item()
    loss = Extra(0.5)
    added = trainer(tiny, tmp_path / "added", loss)[0].fit()
    # The first step is taken at the same prompt: one fp32 sum apart.
    assert added.losses[0] == pytest.approx(plain.fit().losses[0] + 0.5 * start, rel=1e-5)
    # 20 rows in batches of 3 are 7 micro-batches, of which the last step of an epoch has one.
    assert loss.steps == [(step, 6, 1 if step == 3 else 2) for step in range(6)]


def test_a_run_is_only_resumed_with_its_own_loss(tiny: ModuleType, tmp_path: Path) -> None:
    trainer(tiny, tmp_path, Extra(0.5))[0].fit()
    for other in (None, Extra(0.5, "other")):
        with pytest.raises(InputError, match="step_loss name"):
            trainer(tiny, tmp_path, other)[0].fit(resume=True)
    assert trainer(tiny, tmp_path, Extra(0.5))[0].fit(resume=True).steps == 6


def test_a_part_of_no_rows_that_breaks_still_stops_the_run(tiny: ModuleType, tmp_path: Path) -> None:
    made, prompt = trainer(tiny, tmp_path, Extra(0.5, broken_at=2))
    with pytest.raises(TrainingDiverged) as raised:
        made.fit()
    assert (raised.value.step, raised.value.rows) == (3, [])
    assert bool(prompt.embeds.isfinite().all())


def test_a_signal_between_parts_drops_the_step(tiny: ModuleType, tmp_path: Path) -> None:
    class Signalled(Extra):
        def parts(self, objective: Any, prompt: Any, batches: Any, info: Any) -> Iterator[LossPart]:
            for part in super().parts(objective, prompt, batches, info):
                yield part
                if info.step == 3 and not self.weight:
                    self.weight = 1.0
                    signal.raise_signal(signal.SIGTERM)

    loss = Signalled(0.0)
    made, _ = trainer(tiny, tmp_path / "cut", loss)
    with pytest.raises(SystemExit):
        made.fit()
    assert [path.name for path in sorted((tmp_path / "cut").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    again, twin = trainer(tiny, tmp_path / "cut", Extra(0.0))
    result = again.fit(resume=True)
    whole, other = trainer(tiny, tmp_path / "whole", Extra(0.0))
    assert result.losses == whole.fit().losses
    assert torch.equal(twin.embeds, other.embeds)
