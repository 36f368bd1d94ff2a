"""Embeddings in the trainer: contrastive loss and ranks against plain computation, and learning."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertModel

import ptengine
from ptengine.backbone import backbone_spec, patched
from ptengine.data import EmbeddingTask, load_rows
from ptengine.errors import InputError
from ptengine.training import evaluate
from ptengine.training.objective import make_objective

PLAIN = EmbeddingTask(temperature=0.2)
LABELLED = EmbeddingTask(label_column="match", positive_label="yes", temperature=0.2)


def rows(tiny: ModuleType) -> list[dict[str, str]]:
    """Five pairs with a word in common, and three that do not match."""
    pairs = [{"text": f"the {word} was good", "text_pair": f"very {word}", "match": "yes"} for word in tiny.OTHER[:5]]
    others = [("film", "dull"), ("book book", "very song"), ("it", "not")]
    return pairs + [{"text": a, "text_pair": b, "match": "no"} for a, b in others]


def cosines(model: Any, prompt: Any, data: list[dict[str, str]], tokens: Any) -> torch.Tensor:
    """[n, n], of every text with every pair."""
    one, other = (ptengine.embed(model, prompt, [row[name] for row in data], tokens) for name in ("text", "text_pair"))
    return one @ other.T


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_over_all_pairs_of_the_batch(tiny: ModuleType, smoothing: float) -> None:
    """Rows that do not match are candidates alone."""
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)
    prompt = tiny.soft(model)
    log_p = (cosines(model, prompt, data, tokens) / 0.2).log_softmax(1)
    wanted = [i for i, row in enumerate(data) if row["match"] == "yes"]
    own = sum((1 - smoothing) * -log_p[i, i] + smoothing * -log_p[i].mean() for i in wanted)
    with patched(model.eval()):
        objective = make_objective(LABELLED, model, backbone_spec(model), tokens, False)
        batch = objective.collate(LABELLED.encode(load_rows(data), tokens, max_tokens=20).rows)
        loss = objective.loss(prompt, batch, smoothing)
        assert objective.count_labels(batch) == len(wanted)
        none = objective.collate(LABELLED.encode(load_rows(data), tokens, max_tokens=20).rows[5:])
        nothing = objective.loss(prompt, none, smoothing)
    assert loss.item() == pytest.approx(float(own) / len(wanted), rel=1e-4)
    assert float(torch.autograd.grad(loss, prompt.embeds)[0].norm()) > 0
    assert nothing.item() == 0
    assert float(torch.autograd.grad(nothing, prompt.embeds)[0].norm()) == 0


def test_training_divided_by_all_pairs_and_evaluation_by_those_that_match(tiny: ModuleType, tmp_path: Path) -> None:
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)
    prompt = tiny.soft(model)
    loss = evaluate(model, prompt, LABELLED, data, tokens, batch_size=8).metrics["loss"]
    trainer = tiny.trainer(
        tmp_path, model, prompt, LABELLED, data, tokens=tokens, max_steps=1, per_device_train_batch_size=8
    )
    assert trainer.fit().losses == pytest.approx([loss], rel=1e-5)


def test_accumulation_is_a_mean_over_the_pairs_that_match(tiny: ModuleType, tmp_path: Path) -> None:
    """Also where a micro-batch, or a whole step, has none."""
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)[:1] + rows(tiny)[5:] * 3
    alone = [
        tiny.trainer(
            tmp_path / f"{count}", model, tiny.soft(model), LABELLED, data, tokens=tokens, max_steps=-1,
            num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=count, learning_rate=1e-9,
        ).fit().losses
        for count in (1, 5)
    ]  # fmt: skip
    assert sorted(alone[0])[:4] == [0.0] * 4
    assert alone[1] == pytest.approx([max(alone[0])], rel=1e-5)


def test_ranks_and_scores(tiny: ModuleType) -> None:
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)
    prompt = tiny.soft(model)
    scores = cosines(model, prompt, data, tokens)
    ranks = [1 + int((scores[i] > scores[i, i] + 1e-6).sum()) for i in range(5)]
    result = evaluate(model, prompt, LABELLED, data, tokens, batch_size=3)
    assert result.metrics["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 5)
    assert result.metrics["recall_at_1"] == pytest.approx(ranks.count(1) / 5)
    assert [float(text) for text in result.predictions] == pytest.approx(scores.diagonal().tolist(), abs=1e-5)
    own = scores.diagonal()
    right = [(own[i] > own[j]).item() for i in range(5) for j in range(5, 8)]
    assert result.metrics["roc_auc"] == pytest.approx(sum(right) / 15)
    assert set(evaluate(model, prompt, PLAIN, data[:5], tokens).metrics) == {"loss", "mrr", "recall_at_1"}


def test_the_same_text_twice_is_the_same_answer(tiny: ModuleType) -> None:
    model, tokens = tiny.bert(BertModel), tiny.tokenizer(special=True)
    data = [{"text": "good film", "text_pair": "good film"}] * 3
    assert evaluate(model, None, PLAIN, data, tokens, batch_size=2).metrics["mrr"] == 1


@pytest.mark.parametrize("method", ["soft", "prefix"])
def test_it_trains_the_prompt_alone(tiny: ModuleType, tmp_path: Path, method: str) -> None:
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    prompt = getattr(tiny, method)(model)
    result = tiny.trainer(
        tmp_path, model, prompt, LABELLED, data, data, tokens, per_device_train_batch_size=8, max_steps=40,
    ).fit()  # fmt: skip
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert result.best is not None
    assert result.best["average_precision"] == max(one["average_precision"] for one in result.evaluations)


def test_one_kind_of_pairs_cannot_be_told_apart(tiny: ModuleType, tmp_path: Path) -> None:
    """A run came to its first evaluation before it was refused."""
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)
    with pytest.raises(InputError, match="data: expected pairs that match and pairs that do not"):
        evaluate(model, None, LABELLED, data[:5], tokens)
    with pytest.raises(InputError, match="eval: expected pairs that match and pairs that do not"):
        tiny.trainer(tmp_path / "out", model, tiny.soft(model), LABELLED, data, data[:5], tokens)


def test_a_text_without_others_in_its_batch(tiny: ModuleType, tmp_path: Path) -> None:
    """Its loss and gradient are zero: the run took its steps and learned nothing."""
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)
    prompt = tiny.soft(model)
    least = "of at least 2, since texts find their pairs among the others of a batch, got 1"
    refused: dict[str, dict[str, Any]] = {
        f"per_device_train_batch_size {least}": {"per_device_train_batch_size": 1},
        f"per_device_eval_batch_size {least}": {"per_device_eval_batch_size": 1},
        "train: expected at least 2 rows, since": {"train": data[:1]},
        "eval: expected at least 2 rows, since": {"evaluation": data[:1]},
    }
    for message, changes in refused.items():
        options = {"train": data, "evaluation": data, **changes}
        with pytest.raises(InputError, match=message):
            tiny.trainer(tmp_path / "out", model, prompt, PLAIN, tokens=tokens, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=f"batch_size {least}"):
        evaluate(model, prompt, PLAIN, data, tokens, batch_size=1)


def test_the_last_text_of_an_epoch_is_not_left_alone(tiny: ModuleType, tmp_path: Path) -> None:
    """Its step had loss 0, and an evaluation counted it as found."""
    model, tokens, data = tiny.bert(BertModel), tiny.tokenizer(special=True), rows(tiny)[:7]
    result = tiny.trainer(
        tmp_path, model, tiny.soft(model), PLAIN, data, tokens=tokens, max_steps=-1, num_train_epochs=2
    ).fit()  # batches of 3 and 4
    assert len(result.losses) == 4
    assert min(result.losses) > 0
    ends = [evaluate(model, None, PLAIN, part, tokens, batch_size=8).metrics["loss"] for part in (data[:3], data[3:])]
    whole = evaluate(model, None, PLAIN, data, tokens, batch_size=3).metrics["loss"]
    assert whole == pytest.approx((3 * ends[0] + 4 * ends[1]) / 7)
