"""Other people's trainers take the steps of ours: the same batches give the same losses and the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer as TransformersTrainer
from transformers import TrainingArguments

from ptengine.backbone import PackedBatch
from ptengine.prompts import Prompt
from ptengine.training import objective

from ..backbone.stock import HIDE, pad, relative
from ..training import tiny

STEPS, BATCH, RATE = 20, 3, 0.05
KINDS: dict[str, Callable[..., Prompt]] = {"soft": tiny.soft, "prefix": tiny.prefix}

Row = dict[str, list[int]]
Run = tuple[list[float], list[Row], Prompt]


def our_run(kind: str, output: Path, patch: pytest.MonkeyPatch) -> Run:
    """Losses of ptengine's Trainer, the rows it saw, one batch after another, and the prompt it made."""
    seen: list[Row] = []
    original = objective.packed_loss

    def recording(model: Any, lowered: Any, batch: PackedBatch, **options: Any) -> Any:
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            assert batch.labels is not None
            seen.append({"input_ids": batch.input_ids[start:end].tolist(), "labels": batch.labels[start:end].tolist()})
        return original(model, lowered, batch, **options)

    patch.setattr(objective, "packed_loss", recording)
    model = tiny.llama()
    prompt = KINDS[kind](model)
    result = tiny.trainer(
        output, model, prompt, tiny.text_task(), max_steps=STEPS, per_device_train_batch_size=BATCH,
        learning_rate=RATE, lr_scheduler_type="constant", save_strategy="no", train=tiny.rows(STEPS * BATCH),
    ).fit()  # fmt: skip
    assert len(seen) == STEPS * BATCH
    return result.losses, seen, prompt


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    ids, mask = pad([row["input_ids"] for row in rows], "right", value=4)
    return {"input_ids": ids, "attention_mask": mask, "labels": pad([row["labels"] for row in rows], "right", HIDE)[0]}


def settings(output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output), "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": RATE,
        "weight_decay": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip


def in_order(trainer: type[Any]) -> type[Any]:
    def sampler(self: Any, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    return type("InOrder", (trainer,), {"_get_train_sampler": sampler})


def logged(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_transformers(both: Any, rows: list[Row], output: Path) -> list[float]:
    arguments = TrainingArguments(**settings(output))
    return logged(in_order(TransformersTrainer)(both, arguments, collate, train_dataset=rows))


def by_trl(both: Any, rows: list[Row], output: Path) -> list[float]:
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    arguments = trl.SFTConfig(**settings(output), dataset_kwargs={"skip_prepare_dataset": True})
    return logged(
        in_order(trl.SFTTrainer)(
            both, arguments, collate, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny.tokenizer()
        )
    )


def by_accelerate(both: Any, rows: list[Row], output: Path) -> list[float]:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    runner, found = accelerate.Accelerator(cpu=True), []
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, weight_decay=0.0)
    ready, optimizer, loader = runner.prepare(both, optimizer, loader)
    ready.train()
    for batch in loader:
        loss = ready(**batch).loss
        runner.backward(loss)
        runner.clip_grad_norm_(ready.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [by_transformers, by_accelerate, by_trl], ids=["transformers", "accelerate", "trl"])
def test_the_losses_of_our_trainer(train: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps in fp32; what a step rounds, the next ones carry on."""
    losses, rows, trained = our_run(kind, tmp_path / "ours", monkeypatch)
    model = tiny.llama()
    prompt = KINDS[kind](model)
    with prompt.attached(model) as both:
        found = train(both, rows, tmp_path / "theirs")
    assert len(found) == len(losses) == STEPS
    assert found == pytest.approx(losses, abs=2e-5)
    assert losses[0] - losses[-1] > 0.1
    for ours, theirs in zip(trained.parameters(), prompt.parameters(), strict=True):
        assert relative(theirs, ours) < 1e-3


def test_smoothed_labels_stood_one_token_too_early(tmp_path: Path) -> None:
    """Trainer shifts them for models it knows by name, which the wrapper had none of: the prompt learnt to copy."""
    model, draw = tiny.llama(), torch.Generator().manual_seed(0)
    ids = torch.randint(5, tiny.SIZE, (STEPS * BATCH, 6), generator=draw)
    rows = [{"input_ids": row, "labels": [HIDE, *row[1:]]} for row in ids.tolist()]
    with tiny.soft(model).attached(model) as both:
        with torch.no_grad():
            logits = model(ids[:BATCH]).logits[:, :-1]  # [B, T - 1, V]
        arguments = TrainingArguments(**settings(tmp_path) | {"max_steps": 1, "label_smoothing_factor": 0.1})
        trainer = in_order(TransformersTrainer)(both, arguments, collate, train_dataset=rows)
        assert (type(both).__name__, repr(both)[:25]) == ("AttachedLlamaForCausalLM", "AttachedLlamaForCausalLM(")
        (found,) = logged(trainer)
    exact = cross_entropy(logits.flatten(0, 1), ids[:BATCH, 1:].flatten(), label_smoothing=0.1)
    assert found == pytest.approx(exact.item(), abs=1e-4)
