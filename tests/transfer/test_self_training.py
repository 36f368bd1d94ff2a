"""Self-training: who teaches what on which texts, the student's loss, and the way through `transfer`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM

from ptengine import HeadedPrompt
from ptengine.backbone import packed_loss
from ptengine.data import (
    MaskedClassificationTask,
    Seq2SeqClassificationTask,
    Template,
    Verbalizer,
    collate,
    load_rows,
)
from ptengine.errors import InputError
from ptengine.training import TrainingConfig, evaluate
from ptengine.training.freezing import frozen
from ptengine.training.step_loss import MicroBatch, StepInfo
from ptengine.transfer import Anchor, Augmentation, Guard, Joint, PromptBank, SelfTrain, Strategy, transfer
from ptengine.transfer.losses import TransferLoss
from ptengine.transfer.self_training import SelfTrainTerm, Taught, teach, unlabelled_rows

CONFIG = TrainingConfig(
    output_dir="unset", max_steps=4, per_device_train_batch_size=4, disable_tqdm=True, seed=3, save_steps=2
)


def texts(tiny: ModuleType, count: int = 12, seed: int = 8) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": "no label of the task"} for row in tiny.rows(count, seed)]


def taught_by(tiny: ModuleType, model: Any, teacher: Any, task: Any = None, **settings: Any) -> Taught:
    task = task or tiny.words_task()
    return teach(
        model, tiny.tokenizer(), task, unlabelled_rows(task, texts(tiny)), teacher, SelfTrain(**settings), CONFIG
    )


@torch.no_grad()
def stock_logits(model: Any, prompt: Any, ids: list[int]) -> torch.Tensor:
    text = model.get_input_embeddings()(torch.tensor(ids))
    return model(inputs_embeds=torch.cat([prompt.embeds, text])[None]).logits[0, -1]  # [V]


def test_the_teacher_s_probabilities_are_those_of_the_stock_model(tiny: ModuleType) -> None:
    model, tokens, task = tiny.llama().eval(), tiny.tokenizer(), tiny.words_task()
    teacher = tiny.soft(model, 1)
    words = [tokens(task.verbalizer.words[label][0])["input_ids"][0] for label in task.labels]
    wanted = []
    for row in texts(tiny):
        ids = tokens(task.template.render(row, 0))["input_ids"]
        wanted.append(stock_logits(model, teacher, ids)[words].softmax(-1))
    sure = [p.max().item() for p in wanted]
    threshold = sorted(sure)[5] - 1e-5  # five texts fall below, one lies just above
    assert sorted(sure)[4] < threshold
    kept = [i for i, value in enumerate(sure) if value >= threshold]
    hard = taught_by(tiny, model, teacher, threshold=threshold)
    assert (hard.texts, hard.kept, len(hard.examples)) == (12, 7, 7)
    assert [row.index for row in hard.rows] == kept
    assert [row.class_id for row in hard.rows] == [int(wanted[i].argmax()) for i in kept]
    assert all(targets == [1.0] for _, targets in hard.examples)
    assert sum(hard.labels.values()) == 7
    assert hard.one_label == (len({row.class_id for row in hard.rows}) == 1)
    assert replace(hard, labels={"neg": 0, "pos": 7}).one_label
    assert not replace(hard, labels={"neg": 1, "pos": 6}).one_label
    soft = taught_by(tiny, model, teacher, threshold=threshold, temperature=0.5)
    for (rows, targets), i in zip(soft.examples, kept, strict=True):
        sharpened = wanted[i].square() / wanted[i].square().sum()
        assert targets == pytest.approx(sharpened.tolist(), rel=1e-4)
        assert [soft.rows[row].class_id for row in rows] == [0, 1]
    with pytest.raises(InputError, match=r"got none of 12; of the clearest it is 0\.\d+ sure"):
        taught_by(tiny, model, teacher, threshold=1.0)


@pytest.mark.parametrize("several", [False, True])
def test_hard_targets_are_the_task_s_own_loss_on_those_labels(tiny: ModuleType, several: bool) -> None:
    model, task = tiny.gpt2(dropout=0.0), tiny.words_task(several)
    taught = taught_by(tiny, model, tiny.soft(model, 1), task, threshold=0.5)
    student = tiny.soft(model, 2)
    term = SelfTrainTerm(SelfTrain(), taught, model, task, CONFIG, "teacher")
    batch, targets = collate(list(taught.rows)), torch.ones(len(taught.rows))
    labelled = [
        {**row, "label": task.labels[made.class_id]} for row, made in zip(texts(tiny), taught.rows, strict=True)
    ]
    with frozen(model):
        found = term.loss(student, batch, targets, 0.0)
    wanted = evaluate(model, student, task, labelled, tiny.tokenizer()).metrics["loss"]
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    found.backward()
    assert student.embeds.grad is not None


def _other_models(tiny: ModuleType) -> dict[str, tuple[Any, Any, Any]]:
    """Model, task and a prompt by its seed, of every kind of model that is not causal."""
    masked, headed, t5 = tiny.bert(BertForMaskedLM), tiny.bert(), tiny.t5(dropout=0.0)
    labels = Verbalizer({"neg": ["bad", "poor"], "pos": "good"})
    words = Seq2SeqClassificationTask(Template("{text} it was"), Verbalizer({"neg": "bad", "pos": "very good"}))
    return {
        "mask": (
            masked, MaskedClassificationTask(Template("{text} {prompt:4} {mask}"), labels),
            lambda seed: tiny.soft(masked, seed),
        ),
        "head": (
            headed, tiny.head_task(),
            lambda seed: HeadedPrompt(headed, tiny.prefix(headed, seed), ("neg", "pos"), seed=seed),
        ),
        "words of an encoder-decoder": (t5, words, lambda seed: tiny.soft(t5, seed)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["mask", "head", "words of an encoder-decoder"])
def test_models_that_are_not_causal(tiny: ModuleType, kind: str) -> None:
    """The teacher's labels are its predictions, and the student's loss is the task's own on rows that have them; with
    soft targets it is the sum of both labels' losses, each with its share."""
    model, task, make = _other_models(tiny)[kind]
    tokens = tiny.tokenizer(special=model.config.model_type == "bert")
    teacher, student = make(1), make(2)
    rows = unlabelled_rows(task, texts(tiny))
    hard = teach(model, tokens, task, rows, teacher, SelfTrain(threshold=0.0), CONFIG)
    said = evaluate(model, teacher, task, rows, tokens).predictions
    assert [task.labels[row.class_id] for row in hard.rows] == said

    def loss_on(labels: list[str]) -> float:
        labelled = [row | {"label": label} for row, label in zip(texts(tiny), labels, strict=True)]
        return evaluate(model, student, task, labelled, tokens).metrics["loss"]

    term = SelfTrainTerm(SelfTrain(), hard, model, task, replace(CONFIG, per_device_train_batch_size=12), "teacher")
    ((batch, targets, _),) = term.batches(0)
    with frozen(model):
        found = term.loss(student, batch, targets, 0.0)
        found.backward()
    assert found.item() == pytest.approx(loss_on(said), rel=1e-5)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    soft = teach(model, tokens, task, rows, teacher, SelfTrain(threshold=0.0, temperature=1.0), CONFIG)
    for (places, given), row in zip(soft.examples, rows, strict=True):
        assert [soft.rows[place].class_id for place in places] == [0, 1]
        assert sum(given) == pytest.approx(1)
        alone = [evaluate(model, student, task, [row | {"label": label}], tokens) for label in task.labels]
        own = collate([soft.rows[place] for place in places])
        if task.backbone_kind == "seq2seq":
            lengths = torch.tensor([soft.rows[place].prompt_length for place in places])
            own = replace(own, source_lengths=lengths)
        with frozen(model), torch.no_grad():
            got = term.loss(student, own, torch.tensor(given), 0.0).item()
        counts = [sum(x != -100 for x in soft.rows[place].labels) or 1 for place in places]
        parts = [t * n * one.metrics["loss"] for t, n, one in zip(given, counts, alone, strict=True)]
        assert got == pytest.approx(sum(parts) / sum(t * n for t, n in zip(given, counts, strict=True)), rel=1e-4)


def test_soft_targets_weigh_the_words_of_all_labels(tiny: ModuleType) -> None:
    model, task, tokens = tiny.llama().eval(), tiny.words_task(), tiny.tokenizer()
    taught = taught_by(tiny, model, tiny.soft(model, 1), threshold=0.0, temperature=1.0)
    student = tiny.soft(model, 2)
    term = SelfTrainTerm(SelfTrain(), taught, model, task, CONFIG, "teacher")
    words = [tokens(task.verbalizer.words[label][0])["input_ids"][0] for label in task.labels]
    shares = []
    for (batch, targets, share), group in zip(term.batches(0), term._drawn(0), strict=True):
        with frozen(model):
            found = term.loss(student, batch, targets, 0.0).item()
        wanted = 0.0
        for text in group:
            rows, given = taught.examples[text]
            row = taught.rows[rows[0]]
            log_q = F.log_softmax(stock_logits(model, student, row.input_ids[: row.prompt_length]), -1)[words]
            wanted -= (torch.tensor(given) @ log_q).item() / len(group)
        assert found == pytest.approx(wanted, rel=1e-5)
        shares.append(share)
    assert sum(shares) == pytest.approx(1)


def test_accumulation_with_words_of_several_tokens_was_a_mean_of_means(tiny: ModuleType) -> None:
    model, task = tiny.gpt2(dropout=0.0), tiny.words_task(several=True)
    taught = taught_by(tiny, model, tiny.soft(model, 1), task, threshold=0.0)
    assert 0 < taught.labels["pos"] < 12  # "bad" is one token, "very good" two
    student, losses = tiny.soft(model, 2), []
    for size, accumulation in ((12, 1), (5, 3), (1, 12)):
        config = replace(CONFIG, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        term = SelfTrainTerm(SelfTrain(), taught, model, task, config, "teacher")
        with frozen(model), torch.no_grad():
            parts = [
                term.loss(student, batch, targets, 0.0).item() * share for batch, targets, share in term.batches(0)
            ]
        assert len(parts) == accumulation
        losses.append(sum(parts))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_views_are_changed_copies_with_the_text_s_own_target(tiny: ModuleType) -> None:
    model, tokens = tiny.llama().eval(), tiny.tokenizer()
    views = Augmentation(copies=2, delete=0.3, seed=1)
    plain = taught_by(tiny, model, tiny.soft(model, 1), threshold=0.0)
    changed = taught_by(tiny, model, tiny.soft(model, 1), threshold=0.0, views=views)
    read = [tokens.decode(row.input_ids[: row.prompt_length]) for row in changed.rows]
    own = [tokens.decode(row.input_ids[: row.prompt_length]) for row in plain.rows]
    assert not set(read) & set(own)
    assert all(text.endswith("it was") for text in read)  # the template is never changed
    assert (changed.kept, len(changed.examples)) == (12, len(read))
    for row, text in zip(changed.rows, read, strict=True):
        near = max(range(12), key=lambda i: len(set(own[i].split()) & set(text.split())))
        if set(text.split()) <= set(own[near].split()) and sum(set(text.split()) <= set(t.split()) for t in own) == 1:
            assert row.class_id == plain.rows[near].class_id


def step_losses(tiny: ModuleType, strategy: Strategy, model: Any, taught: Taught | None) -> float:
    rows = tiny.words_task().encode(load_rows(tiny.rows(4)), tiny.tokenizer(), max_tokens=40).rows
    loss = TransferLoss(
        strategy, model=model, tokenizer=tiny.tokenizer(), start=tiny.soft(model, 1), config=CONFIG,
        task=tiny.words_task(), source_task=tiny.words_task(), source_data=tiny.rows(6, 9), taught=taught,
    )  # fmt: skip

    class Plain:
        def loss(self, prompt: Any, batch: Any, label_smoothing: float) -> torch.Tensor:
            return packed_loss(model, prompt.lower(), batch).loss

    calls: list[int] = []
    info = StepInfo(0, 4, 0.0, lambda: calls.append(1))
    with frozen(model):
        parts = loss.parts(Plain(), tiny.soft(model, 2), [MicroBatch(collate(rows), [0], 4, 1.0)], info)  # type: ignore[arg-type]
        values = [part.loss.item() for part in parts]
    assert len(calls) == len(values) - 1
    return sum(values)


def test_the_share_lies_between_labelled_and_unlabelled_texts(tiny: ModuleType) -> None:
    model = tiny.gpt2(dropout=0.0)
    taught = taught_by(tiny, model, tiny.soft(model, 1), threshold=0.5)

    def loss(share: float | None, source: float | None = None) -> float:
        strategy = Strategy(
            self_train=None if share is None else SelfTrain(share),
            joint=None if source is None else Joint(source),
        )
        return step_losses(tiny, strategy, model, None if share is None else taught)

    labelled, unlabelled = loss(None), loss(1.0)
    assert loss(0.0) == labelled
    assert loss(0.25) == pytest.approx(0.75 * labelled + 0.25 * unlabelled, rel=1e-6)
    assert loss(0.25, 0.4) == pytest.approx(0.4 * loss(None, 1.0) + 0.6 * loss(0.25), rel=1e-6)


@pytest.fixture(scope="module")
def world(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, tokens = tiny.gpt2(dropout=0.0), tiny.tokenizer()
    bank = PromptBank(tmp_path_factory.mktemp("bank"))
    for seed in (1, 2):
        prompt = tiny.soft(model, seed)
        bank.add(f"p{seed}", prompt, model=model, tokenizer=tokens, task=tiny.words_task())
    draw = tiny.rows(40, 9)
    shots = [row for label in ("pos", "neg") for row in [r for r in draw if r["label"] == label][:4]]

    def run(folder: Path, **more: Any) -> Any:
        training = replace(CONFIG, output_dir=str(folder))
        given = {"task": tiny.words_task(), "shots": shots, "unlabelled": texts(tiny), "bank": bank} | more
        return transfer(model, tokens, training=training, **given)

    return run


def test_a_transfer_learns_from_unlabelled_texts_under_the_guard(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    strategy = Strategy(anchor=Anchor(0.1), self_train=SelfTrain(0.5, 0.5, views=Augmentation(copies=1)))
    options = {"strategy": strategy, "guard": Guard(folds=2), "augmentation": Augmentation(copies=2)}
    whole = world(tmp_path / "whole", **options)
    assert set(whole.decision.scores) == {"scratch-1", "source", "transferred"}
    told = json.loads((tmp_path / "whole" / "transfer.json").read_text())
    assert (told["taught"]["texts"], told["taught"]["kept"]) == (12, sum(told["taught"]["labels"].values()))
    assert told["augmented"]["rows"] == 8
    assert 0 < told["augmented"]["made"] <= 16
    plain = world(tmp_path / "plain", strategy=Strategy(anchor=Anchor(0.1)), unlabelled=None)
    assert plain.runs["transferred"].losses != whole.runs["transferred"].losses
    # Sources are searched by the shots as they are, not by changed copies.
    assert [match.score for match in plain.search.matches] == [match.score for match in whole.search.matches]
    # Killed in the last run, it goes on to the same numbers.
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for name in ("transferred/prompt", "transferred/checkpoint-4", "prompt"):
        shutil.rmtree(cut / name)
    again = world(cut, resume=True, **options)
    assert again.runs["transferred"].losses == whole.runs["transferred"].losses
    assert torch.equal(again.prompt.embeds, whole.prompt.embeds)
    for other in ({"unlabelled": texts(tiny, 11)}, {"augmentation": None}):
        with pytest.raises(InputError, match=f"expected {next(iter(other))}"):
            world(cut, resume=True, **{**options, **other})


def test_with_all_of_the_share_the_shots_labels_are_not_trained_on(
    world: Any, tiny: ModuleType, tmp_path: Path
) -> None:
    """Shots with their labels turned round lead to the same prompt, as long as the same source is chosen."""
    strategy, turned = Strategy(self_train=SelfTrain(1.0, 0.5)), {"pos": "neg", "neg": "pos"}
    draw = tiny.rows(40, 9)
    shots = [row for label in ("pos", "neg") for row in [r for r in draw if r["label"] == label][:4]]
    found = [
        world(tmp_path / name, strategy=strategy, shots=rows, exclude=["p2"])
        for name, rows in (("right", shots), ("turned", [{**r, "label": turned[r["label"]]} for r in shots]))
    ]
    assert torch.equal(found[0].prompt.embeds, found[1].prompt.embeds)


def test_bad_input_is_refused_before_anything_is_written(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    strategy = Strategy(self_train=SelfTrain(0.5, 0.5))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"unlabelled": None}, "expected unlabelled texts"),
        ({"strategy": Strategy()}, "expected unlabelled texts"),
        ({"unlabelled": [{"review": "fine"}]}, "'text'"),
        ({"unlabelled": [{"text": "fine " * 60}]}, "unlabelled, row 0"),
        ({"task": tiny.text_task()}, "a task of labels for self-training, got GenerationTask"),
    ]
    for more, words in cases:
        with pytest.raises(InputError, match=words):
            world(tmp_path / "out", **({"strategy": strategy} | more))
        assert not (tmp_path / "out").exists(), words
    for bad in ({"share": 1.5}, {"threshold": -0.1}, {"temperature": -1}, {"views": 2}):
        with pytest.raises(InputError, match="expected"):
            SelfTrain(**bad)  # type: ignore[arg-type]
