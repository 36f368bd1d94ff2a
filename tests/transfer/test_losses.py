"""The losses of transfer: exact limits, formulas against plain computation, and exact resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertModel

from ptengine.backbone import patched
from ptengine.data import (
    ClassificationTask,
    EmbeddingTask,
    Seq2SeqClassificationTask,
    Template,
    Verbalizer,
    collate,
    load_rows,
)
from ptengine.errors import InputError
from ptengine.prompts import DecomposedPrompt
from ptengine.training import Trainer, TrainingConfig, TrainingResult
from ptengine.training.step_loss import MicroBatch, StepInfo
from ptengine.transfer.losses import TransferLoss
from ptengine.transfer.strategies import Anchor, Distill, Initialize, Joint, Strategy

SOURCE_TASK = ClassificationTask(Template("the {text} was"), Verbalizer({"neg": " poor", "pos": " fine"}))
SETTINGS = {
    "learning_rate": 0.05, "max_steps": 9, "per_device_train_batch_size": 3, "disable_tqdm": True, "logging_steps": 1,
    "seed": 7, "gradient_accumulation_steps": 2,
}  # fmt: skip


def run(
    tiny: ModuleType, folder: Path, strategy: Strategy | None, *, on_source: bool = False, kind: str = "soft",
    resume: bool = False, **settings: Any,
) -> tuple[TrainingResult, Any]:  # fmt: skip
    model = tiny.gpt2()
    prompt, start = getattr(tiny, kind)(model, 1), getattr(tiny, kind)(model, 1)
    config = TrainingConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    source, target = tiny.rows(11, 5), tiny.rows(8, 6)
    loss = None
    if strategy is not None:
        loss = TransferLoss(
            strategy, model=model, tokenizer=tiny.tokenizer(), start=start, config=config,
            source_task=SOURCE_TASK, source_data=source,
        )  # fmt: skip
    trainer = Trainer(
        model, prompt, source if on_source else target, None, config,
        task=SOURCE_TASK if on_source else tiny.words_task(), tokenizer=tiny.tokenizer(), step_loss=loss,
    )  # fmt: skip
    return trainer.fit(resume=resume), prompt


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize(("weight", "on_source"), [(0.0, False), (1.0, True)])
def test_at_its_ends_joint_training_is_training_on_one_task(
    tiny: ModuleType, tmp_path: Path, kind: str, weight: float, on_source: bool
) -> None:
    """Nine steps over two epochs of six or four micro-batches: to the last bit."""
    joint, prompt = run(tiny, tmp_path / "joint", Strategy(joint=Joint(weight)), kind=kind)
    alone, twin = run(tiny, tmp_path / "alone", None, on_source=on_source, kind=kind)
    assert joint.losses == alone.losses
    for name, tensor in prompt.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


def test_source_pairs_were_left_alone_in_the_last_batch(tiny: ModuleType, tmp_path: Path) -> None:
    """Five pairs in batches of two: the fifth had no other to be told from, and its step trained on nothing."""
    pairs = [{"text": row["text"], "text_pair": row["text"]} for row in tiny.rows(10)]
    task, settings = EmbeddingTask(), {**SETTINGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    losses = []
    for name in ("joint", "alone"):
        model = tiny.bert(BertModel)
        prompt, config = tiny.soft(model, 1), TrainingConfig(output_dir=str(tmp_path / name), **settings)
        loss = None
        if name == "joint":
            loss = TransferLoss(
                Strategy(joint=Joint(1.0)), model=model, tokenizer=tiny.tokenizer(special=True), start=prompt,
                config=config, source_task=task, source_data=pairs[:5],
            )  # fmt: skip
        rows = pairs[5:] if name == "joint" else pairs[:5]
        trainer = Trainer(
            model, prompt, rows, None, config, task=task, tokenizer=tiny.tokenizer(special=True), step_loss=loss
        )
        losses.append(trainer.fit().losses)
    assert losses[0] == losses[1]
    assert min(losses[0]) > 0


def test_a_single_source_pair_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    """It was trained on, with a loss of 0."""
    model, pair = tiny.bert(BertModel), {"text": "a b", "text_pair": "b a"}
    with pytest.raises(InputError, match="source: expected at least 2 rows"):
        TransferLoss(
            Strategy(joint=Joint()), model=model, tokenizer=tiny.tokenizer(special=True), start=tiny.soft(model),
            config=TrainingConfig(output_dir=str(tmp_path)), source_task=EmbeddingTask(), source_data=[pair],
        )  # fmt: skip


def test_in_between_both_tasks_count(tiny: ModuleType, tmp_path: Path) -> None:
    both, _ = run(tiny, tmp_path / "both", Strategy(joint=Joint(0.25)))
    ends = [run(tiny, tmp_path / f"{end}", Strategy(joint=Joint(end)))[0] for end in (0.0, 1.0)]
    # The first step's losses are taken at one prompt: fp32 sums of three terms.
    wanted = 0.75 * ends[0].losses[0] + 0.25 * ends[1].losses[0]
    assert both.losses[0] == pytest.approx(wanted, rel=1e-6)
    assert both.losses[5] != pytest.approx(ends[0].losses[5], rel=1e-3)


def test_schedules() -> None:
    linear = Joint(0.8, "linear", 0.2)
    assert [linear.weight(step, 4) for step in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    cosine = Joint(1.0, "cosine", 0.0)
    assert [cosine.weight(step, 3) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert cosine.weight(1, 5) == pytest.approx((1 + 0.5**0.5) / 2)
    assert [Joint(0.3).weight(step, 4) for step in (0, 3)] == [0.3, 0.3]
    assert Joint(0.8, "linear", 0.2).weight(0, 1) == 0.8


ALL = Strategy(joint=Joint(0.6, "linear", 0.1), anchor=Anchor(0.5), distill=Distill(0.3))


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_a_resumed_transfer_equals_the_uninterrupted_one(tiny: ModuleType, tmp_path: Path, kind: str) -> None:
    options = {"kind": kind, "save_steps": 4}
    whole, prompt = run(tiny, tmp_path / "whole", ALL, **options)
    cut = tmp_path / "cut"
    cut.mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(cut / "checkpoint-4")
    again, twin = run(tiny, cut, ALL, resume=True, **options)
    assert again.losses == whole.losses
    for name, tensor in prompt.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


def test_going_on_with_another_loss_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    run(tiny, tmp_path, ALL)
    for other in (None, Strategy(anchor=Anchor(0.5)), Strategy(joint=Joint(0.5), anchor=ALL.anchor)):
        with pytest.raises(InputError, match="step_loss"):
            run(tiny, tmp_path, other, resume=True)


def part_losses(tiny: ModuleType, strategy: Strategy, prompt: Any, start: Any, model: Any, batch: Any) -> list[Any]:
    config = TrainingConfig(output_dir="unused", **SETTINGS)
    loss = TransferLoss(strategy, model=model, tokenizer=tiny.tokenizer(), start=start, config=config)
    info = StepInfo(0, 9, 0.0, lambda: None)
    with patched(model):
        return [part.loss for part in loss.parts(None, prompt, [MicroBatch(batch, [0], 1, 1.0)], info)]  # type: ignore[arg-type]


def test_distillation_is_cross_entropy_and_squared_difference_of_logits(tiny: ModuleType) -> None:
    """Against the stock model on the virtual tokens in front of each row."""
    model = tiny.llama().eval()
    start, prompt = tiny.soft(model, 1), tiny.soft(model, 2)
    rows = tiny.words_task().encode(load_rows(tiny.rows(4)), tiny.tokenizer(), max_tokens=40).rows
    strategy = Strategy(distill=Distill(0.7))
    (loss,) = part_losses(tiny, strategy, prompt, start, model, collate(rows))
    wanted = []
    for row in rows:
        text = model.get_input_embeddings()(torch.tensor(row.input_ids))
        logits = [
            model(inputs_embeds=torch.cat([p.embeds, text])[None]).logits[0, 4 + row.prompt_length - 1]
            for p in (prompt, start)
        ]
        gold = torch.tensor(row.input_ids[row.prompt_length])
        wanted.append(F.cross_entropy(logits[0], gold) + 0.7 * F.mse_loss(*logits))
    # fp32 through two layers of width 16: relative error well below 1e-5.
    assert loss.item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-5)
    loss.backward()
    assert prompt.embeds.grad is not None
    assert start.embeds.grad is None


def test_distillation_of_an_encoder_decoder(tiny: ModuleType) -> None:
    """On every token of the labels' words, against the stock model on the virtual tokens in front of each source."""
    model = tiny.t5(dropout=0.0).eval()
    start, prompt = tiny.soft(model, 1), tiny.soft(model, 2)
    task = Seq2SeqClassificationTask(Template("{text} it was"), Verbalizer({"neg": "not fine", "pos": "good"}))
    rows = task.encode(load_rows(tiny.rows(4)), tiny.tokenizer(), max_tokens=40).rows
    lengths = torch.tensor([row.prompt_length for row in rows])
    batch = replace(collate(rows), source_lengths=lengths)
    (loss,) = part_losses(tiny, Strategy(distill=Distill(0.7)), prompt, start, model, batch)
    logits: list[list[torch.Tensor]] = [[], []]
    targets = [torch.tensor(row.input_ids[row.prompt_length :]) for row in rows]
    for row, target in zip(rows, targets, strict=True):
        source = model.get_input_embeddings()(torch.tensor(row.input_ids[: row.prompt_length]))
        for found, p in zip(logits, (prompt, start), strict=True):
            found.append(model(inputs_embeds=torch.cat([p.embeds, source])[None], labels=target[None]).logits[0])
    ours, wanted = torch.cat(logits[0]), torch.cat(logits[1])
    expected = F.cross_entropy(ours, torch.cat(targets)) + 0.7 * F.mse_loss(ours, wanted)
    # fp32 through four layers of width 16: relative error well below 1e-5.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert prompt.embeds.grad is not None
    assert start.embeds.grad is None


def test_a_likeness_multiplies_the_weight_of_distillation(tiny: ModuleType) -> None:
    model = tiny.llama()
    start, prompt, config = tiny.soft(model, 1), tiny.soft(model, 2), TrainingConfig(output_dir="unused", **SETTINGS)
    rows = tiny.words_task().encode(load_rows(tiny.rows(3)), tiny.tokenizer(), max_tokens=40).rows
    micro, info = MicroBatch(collate(rows), [0], 3, 1.0), StepInfo(0, 9, 0.0, lambda: None)

    def loss(weight: float, likeness: float) -> float:
        term = TransferLoss(
            Strategy(distill=Distill(weight)), model=model, tokenizer=tiny.tokenizer(), start=start, config=config,
            likeness=likeness,
        )  # fmt: skip
        assert term.identity()["distill"]["lambda"] == weight * likeness
        with patched(model):
            return next(term.parts(None, prompt, [micro], info)).loss.item()  # type: ignore[arg-type]

    alone, whole = loss(0.0, 1.0), loss(2.0, 1.0)
    assert whole > alone
    assert loss(2.0, 0.25) == pytest.approx(alone + 0.25 * (whole - alone), rel=1e-5)
    assert loss(2.0, 0.0) == alone


def test_the_anchor_is_the_distance_relative_to_the_start(tiny: ModuleType) -> None:
    model = tiny.llama()
    rows = tiny.words_task().encode(load_rows(tiny.rows(2)), tiny.tokenizer(), max_tokens=40).rows
    for kind in ("soft", "prefix"):
        start, prompt = getattr(tiny, kind)(model, 1), getattr(tiny, kind)(model, 2)
        strategy = Strategy(anchor=Anchor(3.0), distill=Distill(0.0))
        _, loss = part_losses(tiny, strategy, prompt, start, model, collate(rows))
        pairs = list(zip(prompt.parameters(), start.parameters(), strict=True))
        moved = sum((a - b).square().sum() for a, b in pairs)
        size = sum(b.square().sum() for _, b in pairs)
        assert loss.item() == pytest.approx(3 * (moved / size).item(), rel=1e-5)
        assert part_losses(tiny, strategy, start, start, model, collate(rows))[1].item() == 0


def test_joint_training_needs_a_source(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    with pytest.raises(InputError, match="source's task and rows"):
        TransferLoss(
            Strategy(joint=Joint()), model=model, tokenizer=tiny.tokenizer(), start=tiny.soft(model),
            config=TrainingConfig(output_dir="unused"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: Joint(1.5),
        lambda: Joint(0.5, "steps"),
        lambda: Anchor(-1),
        lambda: Distill(float("nan")),
        lambda: Distill(1.0, "shot_loss"),
        lambda: Initialize(fresh=1),  # type: ignore[arg-type]
        lambda: Strategy(Initialize(fresh=True)),
        lambda: Strategy(joint=0.5),  # type: ignore[arg-type]
    ],
)
def test_settings_are_checked_when_made(make: Any) -> None:
    with pytest.raises(InputError, match="expected"):
        make()


def test_the_anchor_left_out_what_is_added_to_the_text(tiny: ModuleType) -> None:
    """Of DePT the text's offsets, too, are numbers that the backbone reads."""
    model = tiny.llama()
    rows = tiny.words_task().encode(load_rows(tiny.rows(2)), tiny.tokenizer(), max_tokens=40).rows
    start, prompt = (DecomposedPrompt(model, 3, rank=2) for _ in range(2))
    torch.nn.init.normal_(start.right)
    with torch.no_grad():
        prompt.right.copy_(start.right * 1.5)
    strategy = Strategy(anchor=Anchor(3.0), distill=Distill(0.0))
    _, loss = part_losses(tiny, strategy, prompt, start, model, collate(rows))
    size = start.embeds.square().sum() + start.offsets().square().sum()
    assert loss.item() == pytest.approx(3 * ((0.5 * start.offsets()).square().sum() / size).item(), rel=1e-5)
