"""`ptengine tune` with several seeds and learning rates: one command, and an output folder that later ones take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_sweep_keeps_the_best_prompt_where_later_commands_look(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = world.tune(
        output, "--eval", world.test, "--test", world.test, "--seeds", "1,2", "--learning-rates", "0.001, 0.3",
        "--metric-for-best-model", "loss",
    )  # fmt: skip
    done = call(*arguments, "--json")
    assert done.status == 0
    found = done.json["sweep"]
    assert [(run["learning_rate"], run["seed"]) for run in found["runs"]] == [
        (0.001, 1),
        (0.001, 2),
        (0.3, 1),
        (0.3, 2),
    ]
    values = {run["folder"]: run["value"] for run in found["runs"]}
    assert values[found["best"]] == min(values.values())
    assert [rate["runs"] for rate in found["rates"]] == [2, 2]
    assert json.loads((output / "metrics.json").read_text()) == done.json
    best = call("eval", "--prompt", str(output), "--data", world.test, "--json")
    assert best.json["metrics"]["loss"] == pytest.approx(values[found["best"]], abs=1e-5)
    assert best.json["metrics"] == pytest.approx(done.json["test"]["metrics"], abs=1e-6)
    for folder, value in values.items():
        one = call("eval", "--prompt", str(output / folder / "best"), "--data", world.test, "--json")
        assert one.json["metrics"]["loss"] == pytest.approx(value, abs=1e-5)
    again = call(*arguments, "--resume")
    assert again.status == 0
    assert f"best: seed {found['best'].split('-')[1]}, learning rate" in again.out
    assert f"ptengine eval --prompt {output}" in again.out


def test_a_run_of_the_sweep_is_the_run_that_tune_alone_would_make(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    """Seeds draw the prompt too, as --seed does."""
    call(*world.tune(tmp_path / "sweep", "--eval", world.test, "--seeds", "4,5"))
    call(*world.tune(tmp_path / "alone", "--eval", world.test, "--seed", "5"))
    from safetensors.torch import load_file

    (folder,) = (tmp_path / "sweep").glob("seed-5-*")
    one, other = (load_file(path / "prompt" / "prompt.safetensors") for path in (folder, tmp_path / "alone"))
    assert torch.allclose(one["embeds"], other["embeds"], atol=1e-4)


def test_sweep_in_which_every_run_diverges_says_so(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    done = call(
        *world.tune(
            tmp_path / "out", "--eval", world.test, "--learning-rates", "1e25,1e26", "--weight-decay", "1e9",
            "--max-grad-norm", "none", "--lr-scheduler-type", "constant",
        )
    )  # fmt: skip
    assert done.status == 1
    assert "every run diverged" in done.out
    assert "1 run, 1 diverged" in done.out
    assert not (tmp_path / "out" / "prompt").exists()


def test_sweep_of_a_bert_model_gives_every_run_a_head_of_its_own(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    """A head in the shared model was refused; now the best run's head is in its prompt, for later commands too."""
    output = tmp_path / "out"
    done = call(
        "tune", "--model", world.bert, "--train", world.train, "--eval", world.test, "--test", world.test,
        "--text-column", "text", "--method", "prefix", "--num-virtual-tokens", "3", "--max-steps", "4",
        "--per-device-train-batch-size", "4", "--seeds", "1,2", "--head-learning-rate", "0.02", "--output", output,
        "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    judged = call("eval", "--prompt", output, "--data", world.test, "--json")
    assert judged.json["metrics"] == pytest.approx(done.json["test"]["metrics"], abs=1e-6)
    found = done.json["sweep"]
    (other,) = (run["folder"] for run in found["runs"] if run["folder"] != found["best"])
    both = call("eval", "--prompt", output, "--ensemble", output / other, "--data", world.test, "--json")
    assert both.status == 0, both.err
    assert set(both.json["ensemble"].values()) == {0.5}
    exported = call("export", "--prompt", output, "--format", "peft", "--output", tmp_path / "peft", "--json")
    assert exported.status == 0, exported.err
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    own = load_file(output / "prompt" / "prompt.safetensors")
    assert any(torch.equal(tensor, own["head.classifier/weight"]) for tensor in stored.values())


def test_a_head_starts_from_the_seed_in_a_sweep_as_in_a_run_alone(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    """The one is filled in by transformers when the model is loaded, the others are made by `HeadedPrompt`."""
    arguments = (
        "tune", "--model", world.bert, "--train", world.train, "--eval", world.test, "--text-column", "text",
        "--method", "prefix", "--num-virtual-tokens", "3", "--max-steps", "2", "--per-device-train-batch-size", "4",
    )  # fmt: skip
    assert call(*arguments, "--seeds", "4,5", "--output", tmp_path / "sweep").status == 0
    assert call(*arguments, "--seed", "5", "--output", tmp_path / "alone").status == 0
    from safetensors.torch import load_file

    (folder,) = (tmp_path / "sweep").glob("seed-5-*")
    one = load_file(folder / "prompt" / "prompt.safetensors")
    other = load_file(tmp_path / "alone" / "prompt" / "head.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.allclose(one[f"head.{name.replace('.', '/')}"], other[name], atol=1e-4)
