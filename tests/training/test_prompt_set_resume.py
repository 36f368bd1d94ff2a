"""A resumed set equals the uninterrupted one bit for bit, member by member, wherever it was cut."""

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

from ptengine.backbone.lowering import VirtualTokens
from ptengine.errors import InputError, TrainingDiverged
from ptengine.prompts import HeadedPrompt, SoftPrompt
from ptengine.training import PromptSet, PromptSetResult, TrainingResult


class Dropping(SoftPrompt):
    def lower(self) -> VirtualTokens:
        return VirtualTokens(torch.nn.functional.dropout(self.embeds, 0.3, self.training))


def make(tiny: ModuleType, folder: Path, seed: int = 0, **settings: Any) -> PromptSet:
    """Four members of different lengths: one draws random numbers, one accumulates, one stops early after step 4."""
    model = tiny.gpt2()
    settings = {"save_steps": 5, **settings}
    return PromptSet(
        [
            tiny.trainer(folder / "a", model, Dropping(model, 4, seed=seed), evaluation=tiny.rows(9, 1), max_steps=9,
                         eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, **settings),
            tiny.trainer(folder / "b", model, tiny.soft(model, seed + 1), seed=3, max_steps=12,
                         per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings),
            tiny.trainer(folder / "c", model, Dropping(model, 6, seed=seed), optim="adafactor", max_steps=7, seed=5,
                         lr_scheduler_type="constant", **settings),
            tiny.trainer(folder / "d", model, tiny.soft(model, seed), evaluation=tiny.rows(9, 1), learning_rate=1e-9,
                         max_steps=50, eval_strategy="steps", eval_steps=2, early_stopping_patience=1,
                         metric_for_best_model="accuracy", **settings),
        ],
        folder,
    )  # fmt: skip


def lines(result: TrainingResult) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_memory")
    kept = [line for line in found if line["event"] in ("train", "eval", "end")]
    return [{name: value for name, value in line.items() if name not in timed} for line in kept]


def assert_same(one: PromptSetResult, other: PromptSetResult) -> None:
    assert one.steps == other.steps
    for a, b in zip(one.members, other.members, strict=True):
        assert isinstance(a, TrainingResult)
        assert isinstance(b, TrainingResult)
        for name in ("losses", "evaluations", "best", "metrics", "steps", "epochs", "stopped_early"):
            assert getattr(a, name) == getattr(b, name), name
        assert lines(a) == lines(b)
        for path, twin in ((a.prompt_path, b.prompt_path), (a.best_path, b.best_path)):
            assert (path is None) == (twin is None)
            if path is not None and twin is not None:
                assert {f.name: f.read_bytes() for f in path.iterdir()} == {
                    f.name: f.read_bytes() for f in twin.iterdir()
                }


@pytest.fixture(scope="module")
def whole(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> PromptSetResult:
    """The uninterrupted set; tests do not change its folders."""
    return make(tiny, tmp_path_factory.mktemp("uninterrupted")).fit()


def test_resumed_set_equals_the_uninterrupted_one(tiny: ModuleType, tmp_path: Path, whole: PromptSetResult) -> None:
    """At step 5 one member has stopped, another is inside an epoch, a third has a best prompt; at 10 two are done."""
    home = whole.checkpoints[0].parent
    assert [member.steps for member in whole.members if isinstance(member, TrainingResult)] == [9, 12, 7, 4]
    names = [path.name for path in whole.checkpoints]
    # Every five steps, and when a member has done its last.
    assert names == ["checkpoint-4", "checkpoint-5", "checkpoint-7", "checkpoint-9", "checkpoint-10", "checkpoint-12"]
    for step in (5, 10):
        cut = tmp_path / str(step)
        shutil.copytree(home, cut)
        for path in cut.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        for member in "abcd":
            shutil.rmtree(cut / member / "prompt")
        assert_same(whole, make(tiny, cut, seed=90).fit(resume=True))
    shutil.copytree(home, tmp_path / "done")
    assert_same(whole, make(tiny, tmp_path / "done").fit(resume=True))  # nothing left to do
    resumed = make(tiny, tmp_path / "path", seed=90).fit(resume=home / "checkpoint-5")
    assert [member.losses for member in resumed.members] == [member.losses for member in whole.members]  # type: ignore[union-attr]


def test_checkpoints_are_thinned_out_and_may_be_left_out(tiny: ModuleType, tmp_path: Path) -> None:
    few = make(tiny, tmp_path / "few", save_total_limit=2).fit()
    assert [path.name for path in few.checkpoints] == ["checkpoint-10", "checkpoint-12"]
    assert make(tiny, tmp_path / "none", save_strategy="no").fit().checkpoints == []
    with pytest.raises(InputError, match="got the prompt of a finished run and none"):
        make(tiny, tmp_path / "none").fit(resume=True)


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
    ("number", "module", "where", "call", "step"),
    # Two forwards a step, since one member accumulates; evaluations call label_hidden.
    [
        pytest.param(signal.SIGTERM, "joint", "label_losses", 5, 2, id="first half of step 3"),
        pytest.param(signal.SIGINT, "joint", "label_losses", 6, 3, id="second half of step 3"),
        pytest.param(signal.SIGTERM, "objective", "label_hidden", 3, 4, id="evaluation of the last member at step 4"),
        pytest.param(signal.SIGTERM, "objective", "label_hidden", 2, 4, id="evaluation of the first member at step 4"),
    ],
)
def test_signal_saves_the_set_and_leaves_with_its_status(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: PromptSetResult, number: Any,
    module: str, where: str, call: int, step: int,
) -> None:  # fmt: skip
    import importlib

    target = importlib.import_module(f"ptengine.training.{module}")
    with monkeypatch.context() as patch:
        patch.setattr(target, where, _Tripwire(getattr(target, where), number, call))
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as caught:
            make(tiny, tmp_path / "cut").fit()
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert json.loads((tmp_path / "cut" / "a" / "log.jsonl").read_text().splitlines()[-1])["event"] == "interrupted"
    assert not (tmp_path / "cut" / "a" / "prompt").exists()
    assert_same(whole, make(tiny, tmp_path / "cut", seed=90).fit(resume=True))


def test_diverged_member_stays_out_after_a_resumption(tiny: ModuleType, tmp_path: Path) -> None:
    def two(folder: Path) -> PromptSet:
        model = tiny.gpt2()
        return PromptSet(
            [
                tiny.trainer(folder / "wild", model, tiny.soft(model), learning_rate=1e20, weight_decay=1e3,
                             max_grad_norm=None, save_steps=4, evaluation=tiny.rows(4, 1), eval_strategy="steps",
                             eval_steps=1),
                tiny.trainer(folder / "calm", model, tiny.soft(model), save_steps=4),
            ],
            folder,
        )  # fmt: skip

    whole = two(tmp_path).fit()
    for path in whole.checkpoints[1:]:
        shutil.rmtree(path)
    again = two(tmp_path).fit(resume=True)
    for one, other in zip(whole.members[:1], again.members[:1], strict=True):
        assert isinstance(one, TrainingDiverged)
        assert isinstance(other, TrainingDiverged)
        assert (str(one), one.step, one.rows) == (str(other), other.step, other.rows)
    assert whole.members[1].losses == again.members[1].losses  # type: ignore[union-attr]


def test_what_would_break_exactness_is_refused_by_name(
    tiny: ModuleType, tmp_path: Path, whole: PromptSetResult
) -> None:
    shutil.copytree(whole.checkpoints[0].parent, tmp_path / "set")
    tiny.trainer(tmp_path / "single").fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    same = make(tiny, tmp_path / "set")
    cases: list[tuple[str, PromptSet, Any]] = [
        (r"holds checkpoint-4.*pass resume=True", same, False),
        (r"expected 4 members as in the checkpoint .*got 3", PromptSet(same.members[:3], tmp_path / "set"), True),
        (r"checkpoint-12, member 0", PromptSet(same.members[::-1], tmp_path / "set"), True),
        (r"max_tokens_per_batch=None as in .*got 99",
         PromptSet(same.members, tmp_path / "set", max_tokens_per_batch=99), True),
        (r"one of a single run", make(tiny, tmp_path / "new"), tmp_path / "single" / "checkpoint-12"),
        (r"holds log.jsonl, best, prompt", PromptSet(same.members, tmp_path / "new"), False),
        (r"without checkpoints of a run of its own.*single",
         PromptSet([tiny.trainer(tmp_path / "single")], tmp_path / "new"), True),
    ]  # fmt: skip
    for message, made, resume in cases:
        with pytest.raises(InputError, match=message):
            made.fit(resume=resume)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_members_that_cannot_share_a_batch_are_refused(tiny: ModuleType, tmp_path: Path) -> None:
    model, encoder = tiny.gpt2(), tiny.bert()
    one = tiny.trainer(tmp_path / "one", model, tiny.soft(model))

    def other(name: str = "two", **settings: Any) -> Any:
        return tiny.trainer(tmp_path / name, model, settings.pop("prompt", None) or tiny.soft(model), **settings)

    head = tiny.trainer(tmp_path / "h", encoder, tiny.prefix(encoder), tiny.head_task(), tokens=tiny.tokenizer(True))
    inner = tiny.soft(encoder)
    heads_around_one_prompt = [
        tiny.trainer(tmp_path / str(seed), encoder, HeadedPrompt(encoder, inner, ("neg", "pos"), seed=seed),
                     tiny.head_task(), tokens=tiny.tokenizer(True))
        for seed in (1, 2)
    ]  # fmt: skip
    cases: list[tuple[str, list[Any]]] = [
        ("expected at least one member, got none", []),
        ("member 0: expected a ptengine.Trainer, got SoftPrompt", [one.prompt]),
        ("member 1: expected the model object of member 0", [one, tiny.trainer(tmp_path / "two")]),
        (
            "member 0: .*for a task with a trained head a HeadedPrompt.*got SequenceClassificationTask with Prefix",
            [head],
        ),
        ("member 1: expected bf16=False as in member 0, got True", [one, other(bf16=True)]),
        ("member 1: expected save_steps=500 as in member 0, got 3", [one, other(save_steps=3)]),
        ("member 1: expected a prompt of its own, got that of member 0", [one, other(prompt=one.prompt)]),
        ("member 1: expected a prompt of its own, got that of member 0", heads_around_one_prompt),
        ("member 1: expected an output_dir of its own, .* as member 0", [one, other("one")]),
        ("member 1: expected an output_dir of its own, .* as the set", [one, other("set")]),
        ("VirtualTokens in member 0 and KeyValuePrefix in member 1", [one, other(prompt=tiny.prefix(model))]),
    ]
    for message, members in cases:
        with pytest.raises(InputError, match=message):
            PromptSet(members, tmp_path / "set")
    for limit in (0, True, 1.5):
        with pytest.raises(InputError, match="expected max_tokens_per_batch, a whole number"):
            PromptSet([one], tmp_path / "set", max_tokens_per_batch=limit)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
