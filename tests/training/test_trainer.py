"""What a run does: the backbone stays as it is, the loss is the mean over all labels, the best prompt is kept."""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ptengine.backbone import is_patched, pack_rows, packed_loss, patched
from ptengine.prompts import Prompt, SoftPrompt, load_prompt
from ptengine.training import evaluate, load_head


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _embeds(prompt: Prompt) -> torch.Tensor:
    assert isinstance(prompt, SoftPrompt)
    return prompt.embeds


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backbone_is_bit_for_bit_what_it_was(tiny: ModuleType, tmp_path: Path, kind: str, checkpointing: bool) -> None:
    model = getattr(tiny, kind)()
    model.train()
    list(model.modules())[-1].eval()
    next(iter(model.parameters())).requires_grad_(False)
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    before = _state(model)
    prompt = tiny.soft(model)
    start = prompt.embeds.detach().clone()
    tiny.trainer(tmp_path, model, prompt, gradient_checkpointing=checkpointing, max_steps=3).fit()
    assert _same(before, _state(model))
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in [*model.parameters(), *prompt.parameters()])
    assert not is_patched(model)
    assert not torch.equal(start, prompt.embeds)


def test_dropout_is_off_in_the_frozen_backbone(tiny: ModuleType, tmp_path: Path) -> None:
    """A prompt tuned through the backbone's dropout trains on noise; the losses must not depend on its rate."""
    losses = []
    for rate in (0.0, 0.5):
        model = tiny.gpt2(dropout=rate)
        model.train()
        losses.append(
            tiny.trainer(tmp_path / str(rate), model, max_steps=3, gradient_checkpointing=True, seed=3).fit().losses
        )
    assert losses[0] == losses[1]


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers recomputes only in training mode, so a backbone in eval mode silently kept all activations."""
    import ptengine.training.freezing as freezing

    calls: list[int] = []
    real = freezing.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(freezing, "checkpoint", counted)
    plain = tiny.trainer(tmp_path / "a", max_steps=4).fit()
    assert not calls
    saving = tiny.trainer(tmp_path / "b", max_steps=4, gradient_checkpointing=True).fit()
    assert len(calls) == 4 * 2  # steps times layers
    assert saving.losses == pytest.approx(plain.losses, abs=1e-6)


@pytest.mark.parametrize("task", ["words_task", "text_task"])
def test_accumulation_equals_one_large_batch(tiny: ModuleType, tmp_path: Path, task: str) -> None:
    """The mean of the micro-batches' means weighs labels of short batches more; generation targets differ in length."""
    rows = tiny.rows(6)
    for i, row in enumerate(rows):
        row["target"] = " ".join(["fine"] * (1 + i % 5))
    results = []
    for size, accumulation in ((6, 1), (4, 2), (1, 6)):
        model = tiny.gpt2()
        prompt = tiny.soft(model)
        folder = tmp_path / f"{size}"
        made = tiny.trainer(
            folder, model, prompt, getattr(tiny, task)(), rows, max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        results.append((made.fit().losses, prompt.embeds.detach().clone()))
    for losses, embeds in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-5)
        assert torch.allclose(embeds, results[0][1], atol=1e-4)


def test_last_step_of_an_epoch_takes_what_is_left(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3, gradient_accumulation_steps=4
    ).fit()
    assert result.steps == 4  # 20 rows: 7 micro-batches, in steps of 4 and 3
    assert result.epochs == 2
    assert len(result.losses) == 4


def test_a_tiny_part_of_an_epoch_was_no_step_at_all(tiny: ModuleType, tmp_path: Path) -> None:
    assert tiny.trainer(tmp_path, max_steps=-1, num_train_epochs=1e-8).fit().steps == 1


def test_losses_are_those_of_adamw_by_hand(tiny: ModuleType, tmp_path: Path) -> None:
    rows = tiny.rows(6)
    result = tiny.trainer(
        tmp_path, train=rows, max_steps=5, per_device_train_batch_size=6, learning_rate=0.1, weight_decay=0.01,
        lr_scheduler_type="constant", max_grad_norm=None, label_smoothing_factor=0.1,
    ).fit()  # fmt: skip
    model = tiny.gpt2().eval().requires_grad_(False)
    prompt = tiny.soft(model)
    tokens = tiny.tokenizer()
    ids = [tokens(f"{row['text']} it was {'good' if row['label'] == 'pos' else 'bad'}")["input_ids"] for row in rows]
    batch = pack_rows(ids, [[-100] * (len(row) - 1) + row[-1:] for row in ids])
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=0.01)
    losses = []
    with patched(model):
        for _ in range(5):
            optimizer.zero_grad()
            loss = packed_loss(model, prompt.lower(), batch, label_smoothing=0.1).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-5)


def test_gradients_are_clipped_to_the_norm(tiny: ModuleType, tmp_path: Path) -> None:
    start = tiny.soft(tiny.gpt2()).embeds.detach()
    moved = []
    for norm in (None, 1e-12):
        model = tiny.gpt2()
        prompt = tiny.soft(model)
        # Against Adam's epsilon of 1e-8 a gradient of 1e-12 moves next to nothing.
        tiny.trainer(tmp_path / str(norm), model, prompt, max_steps=1, max_grad_norm=norm, warmup_steps=0).fit()
        moved.append((prompt.embeds.detach() - start).abs().max().item())
    assert moved[0] > 0.04
    assert moved[1] < 1e-4


def test_schedule_warms_up_and_falls(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(
        tmp_path, max_steps=10, learning_rate=0.1, lr_scheduler_type="linear", warmup_ratio=0.2, logging_steps=1
    ).fit()
    lines = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["event"] == "train"]
    assert rates == pytest.approx([0.0, 0.05, 0.1, *(0.1 * (8 - i) / 8 for i in range(1, 8))])


def test_learning_rate_comes_from_the_prompt_unless_given(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    result = tiny.trainer(tmp_path, model, learning_rate=None, max_steps=1).fit()
    line = json.loads(result.log_path.read_text().splitlines()[0])
    assert line["learning_rate"] == pytest.approx(tiny.soft(model).default_learning_rate())


def test_best_prompt_is_kept_apart_and_loaded_when_asked(tiny: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "max_steps": 6, "learning_rate": 0.1,
        "metric_for_best_model": "loss", "greater_is_better": True,  # so the first evaluation is the best
    }  # fmt: skip
    model = tiny.gpt2()
    prompt = tiny.soft(model)
    evaluation = tiny.rows(15, 1)
    last = tiny.trainer(tmp_path / "last", model, prompt, evaluation=evaluation, **settings).fit()
    assert last.best is not None
    assert last.best_path is not None
    losses = [entry["loss"] for entry in last.evaluations]
    assert last.best["loss"] == max(losses) > losses[-1] == last.metrics["loss"]
    assert torch.equal(_embeds(load_prompt(last.prompt_path, model)), prompt.embeds)
    kept = load_prompt(last.best_path, model)
    found = evaluate(model, kept, tiny.words_task(), evaluation, tiny.tokenizer())
    assert found.metrics["loss"] == pytest.approx(last.best["loss"], abs=1e-6)
    facts = json.loads((last.best_path / "training.json").read_text())
    assert facts == last.best

    again = tiny.soft(model)
    best = tiny.trainer(
        tmp_path / "best", model, again, evaluation=evaluation, load_best_model_at_end=True, **settings
    ).fit()
    assert best.losses == last.losses
    assert torch.equal(again.embeds, _embeds(kept))
    assert torch.equal(_embeds(load_prompt(best.prompt_path, model)), _embeds(kept))
    assert best.metrics["loss"] == max(losses)


def test_early_stopping_counts_evaluations_without_a_new_best(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(
        tmp_path, evaluation=tiny.rows(9, 1), max_steps=50, learning_rate=1e-9, eval_strategy="steps", eval_steps=2,
        early_stopping_patience=3, metric_for_best_model="accuracy",
    ).fit()  # fmt: skip
    assert result.stopped_early
    assert result.steps == 8
    assert result.best is not None
    assert result.best["step"] == 2
    assert [path.name for path in result.checkpoints] == ["checkpoint-8"]


def test_evaluation_strategy_follows_the_data(tiny: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1.5}
    with_data = tiny.trainer(tmp_path / "a", evaluation=tiny.rows(5, 1), **settings).fit()
    assert [entry["step"] for entry in with_data.evaluations] == [7, 11]
    assert tiny.trainer(tmp_path / "b", **settings).fit().evaluations == []
    asked = tiny.trainer(tmp_path / "c", evaluation=tiny.rows(5, 1), eval_strategy="no", **settings).fit()
    assert asked.evaluations == []
    assert asked.best is asked.best_path is None


def test_head_is_trained_and_the_encoder_is_not(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.bert()
    before = _state(model)
    result = tiny.trainer(
        tmp_path, model, tiny.prefix(model), tiny.head_task(), evaluation=tiny.rows(8, 1), tokens=tiny.tokenizer(True),
        head_learning_rate=0.1,
    ).fit()  # fmt: skip
    after = _state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert set(load_file(result.prompt_path / "head.safetensors")) == changed
    other = tiny.bert()
    load_head(result.prompt_path, other)
    assert _same(after, _state(other))


def test_head_alone_is_trained_without_a_prompt(tiny: ModuleType, tmp_path: Path) -> None:
    from ptengine.training import Trainer, TrainingConfig

    model = tiny.bert()
    config = TrainingConfig(output_dir=str(tmp_path), max_steps=15, head_learning_rate=0.3, disable_tqdm=True)
    result = Trainer(
        model, None, tiny.rows(20), None, config, task=tiny.head_task(), tokenizer=tiny.tokenizer(True)
    ).fit()
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    assert sorted(path.name for path in result.prompt_path.iterdir()) == ["head.safetensors", "training.json"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("method", ["soft", "prefix"])
def test_bf16_autocast_keeps_prompts_in_float32(tiny: ModuleType, tmp_path: Path, kind: str, method: str) -> None:
    """Rotary embeddings leave float32 queries beside bf16 values under autocast, which attention refused."""
    losses = []
    for bf16 in (False, True):
        model = getattr(tiny, kind)()
        prompt = getattr(tiny, method)(model)
        task, tokens = (tiny.head_task(), tiny.tokenizer(True)) if kind == "bert" else (None, None)
        made = tiny.trainer(tmp_path / str(bf16), model, prompt, task, tokens=tokens, bf16=bf16, max_steps=4)
        losses.append(made.fit().losses)
        assert {parameter.dtype for parameter in prompt.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.usefixtures("draws_curve")
def test_everything_is_written_and_named(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(
        tmp_path, evaluation=tiny.rows(6, 1), max_steps=7, logging_steps=3, report_to="tensorboard", save_steps=3,
        eval_strategy="steps", eval_steps=5,
    ).fit()  # fmt: skip
    lines = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 3), ("checkpoint", 3), ("eval", 5), ("train", 6), ("checkpoint", 6), ("train", 7), ("eval", 7),
        ("checkpoint", 7), ("end", 7),
    ]  # fmt: skip
    means = [line["loss"] for line in lines if line["event"] == "train"]
    parts = [result.losses[0:3], result.losses[3:6], result.losses[6:7]]
    assert means == pytest.approx([sum(part) / len(part) for part in parts])
    assert result.curve_path.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
    assert [path.name for path in result.checkpoints] == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert result.tokens_per_second > 0
    assert result.peak_memory > 50_000_000
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pth")]
    assert not list(tmp_path.glob(".tmp*"))


def test_tensorboard_holds_the_numbers(tiny: ModuleType, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tiny.trainer(tmp_path, evaluation=tiny.rows(6, 1), max_steps=4, report_to="tensorboard").fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(result.losses)
    assert [event.step for event in events.Scalars("eval/accuracy")] == [4]


def test_progress_bar_shows_loss_speed_and_remaining_time(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tiny.trainer(tmp_path / "a", max_steps=3, disable_tqdm=False).fit()
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "tokens/s" in shown
    assert "loss" in shown
    assert "<" in shown  # elapsed<remaining
    tiny.trainer(tmp_path / "b", max_steps=3).fit()
    assert "step" not in capsys.readouterr().err


def test_no_bar_is_drawn_into_a_file(tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where standard error was a file or a pipe, every redraw of the bar stayed in it."""
    tiny.trainer(tmp_path, max_steps=3, disable_tqdm=False).fit()
    assert capsys.readouterr().err == ""


def test_checkpoints_are_thinned_out_but_for_newest_and_best(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(
        tmp_path, evaluation=tiny.rows(6, 1), max_steps=8, save_steps=2, save_total_limit=2, learning_rate=1e-9,
        eval_strategy="steps", eval_steps=2, metric_for_best_model="accuracy",
    ).fit()  # fmt: skip
    assert [path.name for path in result.checkpoints] == ["checkpoint-2", "checkpoint-8"]


def test_the_process_keeps_its_random_numbers(tiny: ModuleType, tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, max_steps=2)
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    made.fit()
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_runs_in_a_thread_where_signals_cannot_be_caught(tiny: ModuleType, tmp_path: Path) -> None:
    results: list[Any] = []
    made = tiny.trainer(tmp_path, max_steps=2)
    thread = threading.Thread(target=lambda: results.append(made.fit()))
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_seed_decides_the_order(tiny: ModuleType, tmp_path: Path) -> None:
    one, two, three = (
        tiny.trainer(tmp_path / str(i), seed=seed, max_steps=5).fit().losses for i, seed in enumerate((1, 1, 2))
    )
    assert one == two != three
