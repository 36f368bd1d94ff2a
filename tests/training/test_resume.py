"""A resumed run equals the uninterrupted one bit for bit: losses, evaluations, prompt, best prompt, log."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ptengine.backbone.lowering import VirtualTokens
from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt
from ptengine.training import TrainingResult


class Dropping(SoftPrompt):
    """A soft prompt that drops tokens at random in training: its losses tell whether generators were put back."""

    def lower(self) -> VirtualTokens:
        return VirtualTokens(torch.nn.functional.dropout(self.embeds, 0.5, self.training))


def _dropping(model: Any, seed: int = 0) -> SoftPrompt:
    return Dropping(model, num_virtual_tokens=4, seed=seed)


def _assert_same_run(one: TrainingResult, other: TrainingResult) -> None:
    assert one.losses == other.losses
    assert one.evaluations == other.evaluations
    assert one.best == other.best
    assert (one.steps, one.epochs, one.stopped_early) == (other.steps, other.epochs, other.stopped_early)
    for path, twin in ((one.prompt_path, other.prompt_path), (one.best_path, other.best_path)):
        if path is None:
            assert twin is None
            continue
        assert twin is not None
        for file in path.iterdir():
            assert file.read_bytes() == (twin / file.name).read_bytes(), file.name
    assert _lines(one) == _lines(other)


def _lines(result: TrainingResult) -> list[dict[str, Any]]:
    """The log without what depends on the clock and on which checkpoints were written."""
    lines = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_memory")
    events = [line for line in lines if line["event"] in ("train", "eval", "end")]
    return [{name: value for name, value in line.items() if name not in timed} for line in events]


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optim": "adafactor", "weight_decay": 1e-5, "lr_scheduler_type": "constant"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "cosine warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 7},
    "constant warm-up": {"lr_scheduler_type": "constant", "warmup_steps": 7},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True, "weight_decay": 0.1},
    "smoothing, no clipping": {"label_smoothing_factor": 0.1, "max_grad_norm": None},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("soft on gpt2", case) for case in CASES),
        *(("MLP prefix on llama", case) for case in ("adamw", "adafactor", "bf16")),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tiny: ModuleType, tmp_path: Path, kind: str, case: str) -> None:
    def make(folder: str, seed: int) -> Any:
        model = tiny.llama() if "llama" in kind else tiny.gpt2()
        prompt = (
            tiny.prefix(model, seed, projection=True, projection_size=8) if "MLP" in kind else _dropping(model, seed)
        )
        return tiny.trainer(
            tmp_path / folder, model, prompt, evaluation=tiny.rows(9, 1), max_steps=12, save_steps=5,
            eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=True,  # so that the evaluation before the checkpoint stays the best
            **CASES[case],
        )  # fmt: skip

    whole = make("whole", 0).fit()
    # Seven steps are an epoch (ten with accumulation): step 5 is in the middle of one, behind one evaluation.
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    shutil.copy(whole.log_path, tmp_path / "resumed")
    _assert_same_run(whole, make("resumed", seed=99).fit(resume=True))


def test_head_resumes_exactly(tiny: ModuleType, tmp_path: Path) -> None:
    def make(folder: str, seed: int) -> Any:
        model = tiny.bert()
        with torch.no_grad():
            model.classifier.bias.add_(seed)
        return tiny.trainer(
            tmp_path / folder, model, tiny.prefix(model, seed), tiny.head_task(), evaluation=tiny.rows(9, 1),
            tokens=tiny.tokenizer(True), save_steps=5, head_learning_rate=0.05,
        )  # fmt: skip

    whole = make("whole", 0).fit()
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    shutil.copy(whole.log_path, tmp_path / "resumed")
    _assert_same_run(whole, make("resumed", 3).fit(resume=True))


def test_early_stopping_counts_on_after_a_resumption(tiny: ModuleType, tmp_path: Path) -> None:
    def make(folder: str) -> Any:
        return tiny.trainer(
            tmp_path / folder, evaluation=tiny.rows(9, 1), max_steps=50, learning_rate=1e-9, eval_strategy="steps",
            eval_steps=2, early_stopping_patience=3, save_steps=5, metric_for_best_model="accuracy",
        )  # fmt: skip

    whole = make("whole").fit()
    assert whole.steps == 8
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    shutil.copy(whole.log_path, tmp_path / "resumed")
    _assert_same_run(whole, make("resumed").fit(resume=True))
    # A run that stopped early stays stopped.
    _assert_same_run(whole, make("whole").fit(resume=True))


def test_finished_run_resumes_to_its_result(tiny: ModuleType, tmp_path: Path) -> None:
    def make() -> Any:
        return tiny.trainer(tmp_path, evaluation=tiny.rows(9, 1), save_steps=5)

    whole = make().fit()
    before = whole.log_path.read_text().splitlines()
    again = make().fit(resume=True)
    assert again.losses == whole.losses
    assert again.tokens_per_second == 0.0
    assert [line["event"] for line in map(json.loads, again.log_path.read_text().splitlines())] == [
        line["event"] for line in map(json.loads, before)
    ]


def test_torn_checkpoint_is_named_and_the_one_before_is_used(tiny: ModuleType, tmp_path: Path) -> None:
    def make(folder: str) -> Any:
        return tiny.trainer(tmp_path / folder, save_steps=5)

    whole = make("whole").fit()
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    torn = tmp_path / "torn" / "checkpoint-12" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint-12 is torn \(optimizer.safetensors has .*checkpoint-10"):
        resumed = make("torn").fit(resume=True)
    _assert_same_run(whole, resumed)
    assert torn.read_bytes() == (tmp_path / "whole" / "checkpoint-12" / "optimizer.safetensors").read_bytes()


def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny: ModuleType, tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path / "whole").fit()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"event": "train", "step": 1, "loss": 3.0}\n{"event": "tr')
    _assert_same_run(whole, tiny.trainer(tmp_path / "other").fit(resume=True))


def test_resume_from_a_path_goes_into_a_new_folder(tiny: ModuleType, tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path / "whole", save_steps=5).fit()
    other = tiny.trainer(tmp_path / "other", save_steps=5).fit(resume=tmp_path / "whole" / "checkpoint-5")
    assert other.losses == whole.losses
    assert [path.name for path in other.checkpoints] == ["checkpoint-5", "checkpoint-10", "checkpoint-12"]
    for target in ("whole", "other"):
        with pytest.raises(InputError, match="checkpoint-12; pass resume=True"):
            tiny.trainer(tmp_path / target, save_steps=5).fit(resume=str(tmp_path / "whole" / "checkpoint-5"))


def test_saved_run_is_never_started_over(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds log\.jsonl, prompt, checkpoint-2; pass resume=True"):
        tiny.trainer(tmp_path, max_steps=2).fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_prompt_without_a_checkpoint_was_replaced(tiny: ModuleType, tmp_path: Path) -> None:
    """By a run of any settings, since nothing was there to compare them with."""
    tiny.trainer(tmp_path, max_steps=2, save_strategy="no").fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="got the prompt of a finished run and none"):
        tiny.trainer(tmp_path, max_steps=3).fit(resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def _other_model(tiny: ModuleType) -> Any:
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.add_(1e-3)
    return model


REFUSED: dict[str, Any] = {
    r"config learning_rate=0\.05 .*got 0\.06": {"learning_rate": 0.06},
    r"config max_steps=12 .*got 13": {"max_steps": 13},
    r"config per_device_train_batch_size=3 .*got 4": {"per_device_train_batch_size": 4},
    r"config gradient_accumulation_steps=1 .*got 2": {"gradient_accumulation_steps": 2},
    r"config seed=7 .*got 8": {"seed": 8},
    r"config optim='adamw' .*got 'adafactor'": {"optim": "adafactor"},
    r"config lr_scheduler_type='linear' .*got 'constant'": {"lr_scheduler_type": "constant"},
    r"config bf16=False .*got True": {"bf16": True},
    r"config weight_decay=0\.0 .*got 0\.1": {"weight_decay": 0.1},
    r"config warmup_steps=0 .*got 2": {"warmup_steps": 2},
    r"train_data sha256=": {"train": lambda tiny: tiny.rows(20, seed=5)},
    r"train_data rows=20 .*got 19": {"train": lambda tiny: tiny.rows(19)},
    r"eval_data rows=": {"evaluation": lambda tiny: tiny.rows(5, 1)},
    r"prompt embeds=\[4, 16\] .*got \[5, 16\]": {
        "prompt": lambda tiny: SoftPrompt(tiny.gpt2(), num_virtual_tokens=5),
    },
    r"prompt method='soft_prompt' .*got 'prefix'": {"prompt": lambda tiny: tiny.prefix(tiny.gpt2())},
    r"model fingerprint=": {"model": _other_model},
}


def test_what_would_break_exactness_is_refused_by_name(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, save_steps=5).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for message, changes in REFUSED.items():
        settings = {name: value(tiny) if callable(value) else value for name, value in changes.items()}
        with pytest.raises(InputError, match=message):
            tiny.trainer(tmp_path, **settings).fit(resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for bad in (3, None, tmp_path / "checkpoint-6", tmp_path / "prompt"):
        with pytest.raises(InputError, match=r"expected (resume|a checkpoint|a complete checkpoint)"):
            tiny.trainer(tmp_path).fit(resume=bad)


def test_what_changes_no_loss_may_change(tiny: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 3}
    whole = tiny.trainer(tmp_path / "whole", max_steps=15, **settings).fit()
    tiny.trainer(tmp_path / "short", max_steps=6, **settings).fit()
    longer = tiny.trainer(
        tmp_path / "short", max_steps=15, save_steps=2, save_total_limit=3, logging_steps=1, report_to="tensorboard",
        **settings,
    ).fit(resume=True)  # fmt: skip
    assert longer.losses == whole.losses
    with pytest.raises(InputError, match="expected max_steps of at least the 15 steps"):
        tiny.trainer(tmp_path / "short", max_steps=6, **settings).fit(resume=True)


def test_other_arithmetic_is_said(tiny: ModuleType, tmp_path: Path) -> None:
    path = tiny.trainer(tmp_path, save_steps=5).fit().checkpoints[-1]
    state = json.loads((path / "state.json").read_text())
    state["environment"]["threads"] += 1
    shutil.rmtree(path)
    from ptengine.training.checkpoints import read_checkpoint, write_checkpoint

    write_checkpoint(tmp_path, 12, read_checkpoint(tmp_path / "checkpoint-10").tensors, state)
    with pytest.warns(UserWarning, match="was written with threads"):
        tiny.trainer(tmp_path, save_steps=5).fit(resume=True)


class _Tripwire:
    """Wraps a function and sends a signal to this process in its n-th call."""

    def __init__(self, function: Any, number: signal.Signals, call: int) -> None:
        self.function, self.number, self.left = function, number, call

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.function(*arguments, **options)


@pytest.mark.parametrize(
    ("number", "where", "call", "step"),
    # Two micro-batches a step; an evaluation batch calls label_hidden, a micro-batch packed_loss.
    [
        pytest.param(signal.SIGTERM, "packed_loss", 7, 3, id="first half of step 4"),
        pytest.param(signal.SIGINT, "packed_loss", 7, 3, id="interrupt in step 4"),
        pytest.param(signal.SIGTERM, "packed_loss", 8, 4, id="second half of step 4"),
        pytest.param(signal.SIGTERM, "packed_loss", 1, 0, id="first half of step 1"),
        pytest.param(signal.SIGTERM, "label_hidden", 1, 4, id="evaluation"),
        pytest.param(signal.SIGINT, "label_hidden", 2, 4, id="interrupt in evaluation"),
    ],
)
def test_signal_saves_and_leaves_with_its_status(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: Any, where: str, call: int, step: int
) -> None:
    def make(folder: str, seed: int) -> Any:
        model = tiny.gpt2()
        return tiny.trainer(
            tmp_path / folder, model, _dropping(model, seed), evaluation=tiny.rows(9, 1), max_steps=8,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=4,
            per_device_eval_batch_size=4,
        )  # fmt: skip

    whole = make("whole", 0).fit()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        import ptengine.training.objective as objective

        patch.setattr(objective, where, _Tripwire(getattr(objective, where), number, call))
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit) as caught:
                make("cut", 0).fit()
            assert caught.value.code == 143
        else:
            with pytest.raises(KeyboardInterrupt):
                make("cut", 0).fit()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "cut" / "prompt").exists()
    _assert_same_run(whole, make("cut", 99).fit(resume=True))


def test_second_interrupt_does_not_wait(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ptengine.training.objective as objective

    real = objective.packed_loss

    def twice(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(objective, "packed_loss", twice)
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path).fit()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_signal_in_the_last_moment_is_still_answered(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended before it could obey swallowed the signal, and the job system waited for its kill."""
    import ptengine.training.trainer as trainer

    def draw(path: Path, *_: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(trainer, "draw_curve", draw)
    with pytest.raises(SystemExit) as caught:
        tiny.trainer(tmp_path, max_steps=2).fit()
    assert caught.value.code == 143
    assert (tmp_path / "prompt" / "prompt.safetensors").exists()


def test_checkpoints_hold_tensors_and_json_only(tiny: ModuleType, tmp_path: Path) -> None:
    path = tiny.trainer(tmp_path, evaluation=tiny.rows(4, 1), max_steps=3, optim="adafactor").fit().checkpoints[0]
    assert sorted(file.name for file in path.iterdir()) == [
        "best.safetensors", "manifest.json", "optimizer.safetensors", "prompt.safetensors", "run.safetensors",
        "state.json",
    ]  # fmt: skip
    for file in path.glob("*.safetensors"):
        load_file(file)
    for file in path.glob("*.json"):
        json.loads(file.read_text())
