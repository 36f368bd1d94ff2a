"""A sweep is one call: every seed at every rate, each as if trained alone, and the best of them by evaluation."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import ptengine
from ptengine.errors import InputError
from ptengine.prompts import PTuning, SoftPrompt
from ptengine.training import SweepResult, TrainingConfig, TrainingResult


def run(tiny: ModuleType, folder: Path, model: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    config = {"max_steps": 6, "per_device_train_batch_size": 3, "disable_tqdm": True, "seed": 7, "learning_rate": 0.05}
    config |= {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"} | (settings or {})
    arguments: dict[str, Any] = {"train": tiny.rows(20), "evaluation": tiny.rows(9, 1)} | options
    make_prompt = arguments.pop("make_prompt", lambda seed: SoftPrompt(model, 4, seed=seed))
    return ptengine.sweep(
        model, make_prompt, arguments.pop("train"), arguments.pop("evaluation"),
        TrainingConfig(output_dir=str(folder), **config), task=tiny.words_task(), tokenizer=tiny.tokenizer(),
        **arguments,
    )  # fmt: skip


def test_every_seed_at_every_rate_is_a_run_of_its_own(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    found: SweepResult = run(tiny, tmp_path / "sweep", model, seeds=[1, 2], learning_rates=[0.01, 0.2])
    assert [(one.learning_rate, one.seed) for one in found.runs] == [(0.01, 1), (0.01, 2), (0.2, 1), (0.2, 2)]
    for one in found.runs:
        alone: TrainingResult = tiny.trainer(
            tmp_path / one.output_dir.name, model, SoftPrompt(model, 4, seed=one.seed), evaluation=tiny.rows(9, 1),
            learning_rate=one.learning_rate, seed=one.seed, max_steps=6, eval_strategy="steps", eval_steps=3,
            metric_for_best_model="loss",
        ).fit()  # fmt: skip
        assert one.result is not None
        assert alone.best is not None
        assert one.result.losses == pytest.approx(alone.losses, abs=1e-5)
        assert one.value == pytest.approx(alone.best["loss"], abs=1e-5)
        assert one.output_dir == tmp_path / "sweep" / f"seed-{one.seed}-lr-{one.learning_rate}"
        assert (one.output_dir / "log.jsonl").is_file()


def test_the_best_run_is_picked_and_kept(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    for greater in (False, True):
        folder = tmp_path / str(greater)
        found = run(
            tiny, folder, model, {"greater_is_better": greater}, seeds=[1, 2, 3], learning_rates=[1e-4, 0.2]
        )  # fmt: skip
        values = [one.value for one in found.runs]
        assert len(set(values)) == 6
        assert found.best is not None
        assert found.best.value == (max(values) if greater else min(values))
        kept = ptengine.load_prompt(found.prompt_path, model)
        twin = ptengine.load_prompt(found.best.result.best_path, model)
        assert torch.equal(kept.embeds, twin.embeds)  # type: ignore[arg-type]
        for number, rate in enumerate(found.rates):
            part = values[3 * number : 3 * number + 3]
            assert rate.mean == pytest.approx(statistics.mean(part))
            assert rate.std == pytest.approx(statistics.stdev(part))
        written = json.loads((folder / "sweep.json").read_text())
        assert written["best"] == found.best.output_dir.name
        assert [one["value"] for one in written["runs"]] == values


def test_a_rate_that_diverges_is_told_and_not_picked(tiny: ModuleType, tmp_path: Path) -> None:
    found = run(tiny, tmp_path, tiny.gpt2(), {"weight_decay": 1e3, "max_grad_norm": None}, learning_rates=[1e-9, 1e20])
    assert found.runs[1].result is found.runs[1].value is None
    assert "diverged at step" in found.runs[1].diverged
    assert found.best is found.runs[0]
    assert (found.rates[1].mean, found.rates[1].diverged) == (None, 1)


def test_defaults_are_those_of_the_settings_and_of_the_prompt(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    found = run(tiny, tmp_path, model, {"learning_rate": None}, seeds=[3])
    assert [one.seed for one in found.runs] == [3]
    assert found.runs[0].learning_rate == SoftPrompt(model, 4).default_learning_rate()
    again = run(tiny, tmp_path, model, {"learning_rate": None}, seeds=[3], resume=True)
    assert again.runs[0].result.losses == found.runs[0].result.losses


def test_seeds_whose_prompts_have_rates_of_their_own_are_summed_up_together(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    found = run(
        tiny, tmp_path, model, {"learning_rate": None}, seeds=[1, 2],
        make_prompt=lambda seed: PTuning(model, 4, encoder_hidden_size=4, seed=seed),
    )  # fmt: skip
    assert len({one.learning_rate for one in found.runs}) == 2
    assert [(rate.learning_rate, rate.runs) for rate in found.rates] == [(None, 2)]
    assert found.rates[0].mean == pytest.approx(statistics.mean(one.value for one in found.runs))


def test_rates_of_numpy_do_not_end_a_finished_sweep(tiny: ModuleType, tmp_path: Path) -> None:
    found = run(tiny, tmp_path, tiny.gpt2(), learning_rates=np.logspace(-2, -1, 2))
    assert [one.output_dir.name for one in found.runs] == ["seed-7-lr-0.01", "seed-7-lr-0.1"]
    assert [one["runs"] for one in json.loads((tmp_path / "sweep.json").read_text())["rates"]] == [1, 1]


def test_the_data_are_encoded_once(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptengine.data import ClassificationTask

    calls: list[int] = []
    real = ClassificationTask.encode

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(ClassificationTask, "encode", counted)
    run(tiny, tmp_path, tiny.gpt2(), {"max_steps": 1, "eval_steps": 1}, seeds=[1, 2, 3])
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("message", "settings", "options"),
    [
        (r"expected seeds, one or more different values, got \[\]", {}, {"seeds": []}),
        (r"expected seeds, one or more different values, got \[1, 1\]", {}, {"seeds": [1, 1]}),
        (r"expected learning_rates, .*got \[0\.1, 0\.1\]", {}, {"learning_rates": [0.1, 0.1]}),
        ("expected learning_rate, None or a number above 0, got -1", {}, {"learning_rates": [0.1, -1]}),
        ("expected seed, a whole number from 0 to 4294967295, got 0.5", {}, {"seeds": [0.5]}),
        ("by which a sweep compares", {"eval_strategy": "no", "eval_steps": None, "metric_for_best_model": None}, {}),
        ("train: expected at least one row", {}, {"train": []}),
        # Only the first was looked at, and None was let through.
        (
            "make_prompt to return a ptengine prompt, got NoneType",
            {},
            {"seeds": [1, 2], "make_prompt": lambda seed: None},
        ),
        ("expected max_tokens_per_batch, a whole number", {}, {"max_tokens_per_batch": 0}),
    ],
)
def test_bad_input_is_one_error_before_anything_is_written(
    tiny: ModuleType, tmp_path: Path, message: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny, tmp_path / "out", tiny.gpt2(), settings, **options)
    assert not (tmp_path / "out").exists()
