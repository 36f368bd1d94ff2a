"""Many prompts at once: each member has the numbers of the same prompt trained alone, whoever else is in the set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

from ptengine.backbone.lowering import VirtualTokens
from ptengine.data import MaskedClassificationTask, Template, Verbalizer
from ptengine.errors import TrainingDiverged
from ptengine.prompts import LoPAPrompt, SoftPrompt
from ptengine.training import PromptSet, PromptSetResult, Trainer, TrainingResult

Make = Callable[[Path], Trainer]


class Dropping(SoftPrompt):
    """A soft prompt that draws random numbers in every step: its losses tell whose generators were in place."""

    def lower(self) -> VirtualTokens:
        return VirtualTokens(torch.nn.functional.dropout(self.embeds, 0.3, self.training))


def soft_members(tiny: ModuleType, model: Any) -> dict[str, Make]:
    """Members that differ in all that may differ, by name."""

    def plain(folder: Path) -> Trainer:
        return tiny.trainer(folder, model, SoftPrompt(model, 4, seed=1), learning_rate=0.02)

    def longer(folder: Path) -> Trainer:
        """Longer prompt, other data of another size, accumulation whose last step takes what is left."""
        return tiny.trainer(
            folder, model, SoftPrompt(model, 9, seed=2), train=tiny.rows(11, 5), evaluation=tiny.rows(7, 3),
            per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=0.1, seed=3,
            lr_scheduler_type="cosine", warmup_steps=2, max_steps=7, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip

    def text(folder: Path) -> Trainer:
        """Another task, with several labels a row; clipped hard; another optimiser."""
        return tiny.trainer(
            folder, model, SoftPrompt(model, 2, seed=3), tiny.text_task(), max_grad_norm=0.01, optim="adafactor",
            lr_scheduler_type="constant", seed=9, max_steps=15,
        )  # fmt: skip

    def drawing(folder: Path) -> Trainer:
        return tiny.trainer(
            folder, model, Dropping(model, 5, seed=4), evaluation=tiny.rows(9, 1), seed=4, load_best_model_at_end=True,
        )  # fmt: skip

    def stopping(folder: Path) -> Trainer:
        """Stops early at step 6."""
        return tiny.trainer(
            folder, model, SoftPrompt(model, 4, seed=1), evaluation=tiny.rows(9, 1), learning_rate=1e-9, max_steps=50,
            eval_strategy="steps", eval_steps=2, early_stopping_patience=2, metric_for_best_model="accuracy",
        )  # fmt: skip

    return {"plain": plain, "longer": longer, "text": text, "drawing": drawing, "stopping": stopping}


def prefix_members(tiny: ModuleType, model: Any) -> dict[str, Make]:
    return {
        "plain": lambda folder: tiny.trainer(folder, model, tiny.prefix(model, 1)),
        "mlp": lambda folder: tiny.trainer(
            folder, model, tiny.prefix(model, 2, projection=True, projection_size=8), evaluation=tiny.rows(5, 1),
            gradient_accumulation_steps=2, seed=2,
        ),
        "text": lambda folder: tiny.trainer(folder, model, tiny.prefix(model, 3), tiny.text_task(), max_steps=5),
    }  # fmt: skip


MEMBERS = {"soft": soft_members, "prefix": prefix_members}


def masked_members(tiny: ModuleType, model: Any) -> dict[str, Make]:
    """Soft prompts of several lengths and templates on a masked language model, one of them chosen by the text."""
    tokens = tiny.tokenizer(special=True)

    def task(template: str) -> MaskedClassificationTask:
        return MaskedClassificationTask(Template(template), Verbalizer({"neg": ["bad", "poor"], "pos": "good"}))

    return {
        "plain": lambda folder: tiny.trainer(
            folder, model, SoftPrompt(model, 4, seed=1), task("{text} it was {mask}"), evaluation=tiny.rows(5, 1),
            tokens=tokens,
        ),
        "longer": lambda folder: tiny.trainer(
            folder, model, SoftPrompt(model, 9, seed=2), task("very {mask} {text}"), train=tiny.rows(11, 5),
            per_device_train_batch_size=2, gradient_accumulation_steps=3, seed=3, max_steps=7, tokens=tokens,
        ),
        "of the text": lambda folder: tiny.trainer(
            folder, model, LoPAPrompt(model, 3, rank=2, seed=4), task("{text} {mask}"), seed=5, max_steps=9,
            tokens=tokens,
        ),
    }  # fmt: skip


def masked_prefix_members(tiny: ModuleType, model: Any) -> dict[str, Make]:
    tokens = tiny.tokenizer(special=True)
    task = MaskedClassificationTask(Template("{text} it was {mask}"), Verbalizer({"neg": "bad", "pos": "good"}))
    return {
        str(seed): lambda folder, seed=seed: tiny.trainer(  # type: ignore[misc]
            folder, model, tiny.prefix(model, seed), task, seed=seed, max_steps=5, tokens=tokens
        )
        for seed in (1, 2)
    }


def together(
    makers: dict[str, Make], folder: Path, names: Sequence[str] | None = None, **options: Any
) -> PromptSetResult:
    """Train the members of `names` as a set, each in a folder of its name."""
    names = list(makers) if names is None else names
    return PromptSet([makers[name](folder / name) for name in names], folder, **options).fit()


def finished(result: PromptSetResult) -> list[TrainingResult]:
    found = [member for member in result.members if isinstance(member, TrainingResult)]
    assert len(found) == len(result.members)
    return found


def log(result: TrainingResult) -> list[dict[str, Any]]:
    """The log without what depends on the clock, and on which checkpoints were written."""
    lines = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_memory")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in lines
        if line["event"] != "checkpoint"
    ]


def assert_close(one: Any, other: Any, bound: float) -> None:
    """Equal structures whose numbers differ by at most `bound`."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name], bound)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b, bound)
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=bound, rel=0)
    else:
        assert one == other


def assert_same_result(one: TrainingResult, other: TrainingResult, bound: float) -> None:
    assert_close(one.losses, other.losses, bound)
    assert_close(one.evaluations, other.evaluations, bound)
    assert_close(one.best, other.best, bound)
    assert_close(one.metrics, other.metrics, bound)
    assert (one.steps, one.epochs, one.stopped_early) == (other.steps, other.epochs, other.stopped_early)
    assert_close(log(one), log(other), bound)
    assert (one.best_path is None) == (other.best_path is None)


@pytest.mark.parametrize(
    ("kind", "method", "double"),
    [("gpt2", "soft", False), ("gpt2", "soft", True), ("llama", "prefix", False), ("llama", "prefix", True)],
)
def test_members_equal_the_same_prompts_trained_alone(
    tiny: ModuleType, tmp_path: Path, kind: str, method: str, double: bool
) -> None:
    """In fp32 within 1e-5, the issue's bound; with a float64 backbone nothing but the prompts' own fp32 is rounded."""
    model = getattr(tiny, kind)()
    model = model.double() if double else model
    makers = MEMBERS[method](tiny, model)
    trainers = {name: makers[name](tmp_path / "set" / name) for name in makers}
    result = PromptSet(list(trainers.values()), tmp_path / "set").fit()
    for name, member in zip(makers, finished(result), strict=True):
        alone = makers[name](tmp_path / "alone" / name)
        assert_same_result(alone.fit(), member, 1e-9 if double else 1e-5)
        assert trainers[name].prompt is not None
        assert alone.prompt is not None
        for key, tensor in alone.prompt.state_dict().items():
            assert torch.allclose(
                tensor, trainers[name].prompt.state_dict()[key], rtol=0, atol=1e-7 if double else 1e-4
            )
    assert result.steps == max(member.steps for member in finished(result))
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("members", [masked_members, masked_prefix_members])
def test_members_of_a_masked_language_model_equal_the_same_prompts_trained_alone(
    tiny: ModuleType, tmp_path: Path, members: Callable[[ModuleType, Any], dict[str, Make]]
) -> None:
    makers = members(tiny, tiny.bert(BertForMaskedLM).double())
    limited = together(makers, tmp_path / "cut", max_tokens_per_batch=64)
    for name, member, cut in zip(makers, finished(together(makers, tmp_path / "set")), finished(limited), strict=True):
        alone = makers[name](tmp_path / "alone" / name).fit()
        assert_same_result(alone, member, 1e-9)
        assert_same_result(alone, cut, 1e-9)


@pytest.mark.parametrize("method", MEMBERS)
def test_no_member_changes_anothers_numbers(tiny: ModuleType, tmp_path: Path, method: str) -> None:
    """Members in another order, and fewer of them: rounding apart, a leak of any row or gradient would show."""
    model = tiny.gpt2().double()
    makers = MEMBERS[method](tiny, model)
    names = list(makers)
    first = dict(zip(names, finished(together(makers, tmp_path / "all")), strict=True))
    for number, chosen in enumerate((names[::-1], names[1:], names[:1])):
        again = finished(together(makers, tmp_path / str(number), chosen))
        for name, member in zip(chosen, again, strict=True):
            assert_same_result(first[name], member, 1e-9)


def test_a_limit_of_tokens_cuts_the_batch_and_not_the_numbers(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ptengine.training.joint as joint

    sizes: list[tuple[int, int]] = []
    real = joint.label_losses

    def counted(model: Any, lowered: Any, batch: Any, **options: Any) -> Any:
        sizes.append((len(lowered), batch.num_tokens + sum(prompt.num_virtual_tokens for prompt in lowered)))
        return real(model, lowered, batch, **options)

    monkeypatch.setattr(joint, "label_losses", counted)
    model = tiny.gpt2().double()
    makers = soft_members(tiny, model)
    whole = finished(together(makers, tmp_path / "whole"))
    assert max(prompts for prompts, _ in sizes) == len(makers)
    sizes.clear()
    cut = finished(together(makers, tmp_path / "cut", max_tokens_per_batch=60))
    assert all(tokens <= 60 or prompts == 1 for prompts, tokens in sizes)
    assert max(prompts for prompts, _ in sizes) > 1
    for one, other in zip(whole, cut, strict=True):
        assert_same_result(one, other, 1e-9)


def test_a_member_that_is_done_leaves_the_batch(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ptengine.training.joint as joint

    present: list[int] = []
    real = joint.label_losses

    def counted(model: Any, lowered: Any, *arguments: Any, **options: Any) -> Any:
        present.append(len(lowered))
        return real(model, lowered, *arguments, **options)

    monkeypatch.setattr(joint, "label_losses", counted)
    model = tiny.gpt2()
    makers = soft_members(tiny, model)
    chosen = ["plain", "text", "stopping"]  # 12 and 15 steps, and 6 that early stopping leaves
    result = together(makers, tmp_path, chosen)
    assert [member.steps for member in finished(result)] == [12, 15, 6]
    assert present == [3] * 6 + [2] * 6 + [1] * 3


def test_a_member_that_diverges_leaves_the_others_alone(tiny: ModuleType, tmp_path: Path) -> None:
    """In a sweep over learning rates some are too high; a NaN of theirs must not reach the others' rows."""
    model = tiny.gpt2().double()
    makers = soft_members(tiny, model)
    names = ["plain", "wild", "drawing"]
    makers["wild"] = lambda folder: tiny.trainer(
        folder, model, SoftPrompt(model, 4, seed=1), learning_rate=1e20, max_grad_norm=None, weight_decay=1e3,
        save_steps=2, evaluation=tiny.rows(9, 1), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    for name in ("plain", "drawing"):
        makers[name] = _with_save_steps(makers[name], 2)
    with pytest.raises(TrainingDiverged) as alone:
        makers["wild"](tmp_path / "alone").fit()
    result = together(makers, tmp_path / "set", names)
    wild = result.members[1]
    assert isinstance(wild, TrainingDiverged)
    assert (wild.step, wild.rows) == (alone.value.step, alone.value.rows)
    assert not (tmp_path / "set" / "wild" / "prompt").exists()
    last = json.loads((tmp_path / "set" / "wild" / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "diverged"
    for position, name in ((0, "plain"), (2, "drawing")):
        member = result.members[position]
        assert isinstance(member, TrainingResult)
        assert_same_result(makers[name](tmp_path / name).fit(), member, 1e-9)


def _with_save_steps(make: Make, steps: int) -> Make:
    def changed(folder: Path) -> Trainer:
        from dataclasses import replace

        trainer = make(folder)
        trainer.config = replace(trainer.config, save_steps=steps)
        return trainer

    return changed


def test_the_backbone_and_the_process_are_as_before(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainers = [tiny.trainer(tmp_path / str(seed), model, tiny.soft(model, seed), max_steps=2) for seed in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    PromptSet(trainers, tmp_path).fit()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for trainer in trainers for p in trainer.prompt.parameters())


def test_bf16_and_checkpointing_and_smoothing_are_those_of_the_members(tiny: ModuleType, tmp_path: Path) -> None:
    for name, settings, bound in (
        ("bf16", {"bf16": True}, 2e-2),
        ("smoothing", {"label_smoothing_factor": 0.3, "gradient_checkpointing": True}, 1e-5),
    ):
        model = tiny.llama()

        def make(folder: Path, seed: int, model: Any = model, settings: Any = settings) -> Trainer:
            return tiny.trainer(folder, model, tiny.soft(model, seed), seed=seed, max_steps=4, **settings)

        result = PromptSet([make(tmp_path / name / str(seed), seed) for seed in (1, 2)], tmp_path / name).fit()
        plain = tiny.trainer(tmp_path / f"{name} plain", model, tiny.soft(model, 1), seed=1, max_steps=4).fit()
        for seed, member in zip((1, 2), finished(result), strict=True):
            alone = make(tmp_path / f"{name} alone {seed}", seed).fit()
            assert member.losses == pytest.approx(alone.losses, abs=bound)
        assert result.members[0].losses != pytest.approx(plain.losses, abs=1e-4)  # type: ignore[union-attr]


def test_progress_shows_steps_and_members(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = tiny.gpt2()
    made = [
        tiny.trainer(tmp_path / str(i), model, tiny.soft(model, i), max_steps=3, disable_tqdm=False) for i in range(2)
    ]
    PromptSet(made, tmp_path).fit()
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "2 of 2 prompts" in shown
