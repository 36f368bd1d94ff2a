"""Tasks of encoders in the trainer: losses and scores are those of the stock model with the prompt placed by hand."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertForMaskedLM

from ptengine.data import ClassificationTask, MaskedClassificationTask, Template, Verbalizer, load_rows
from ptengine.errors import InputError
from ptengine.prompts import PTuning, SoftPrompt
from ptengine.training import PromptSet, evaluate

WORDS = Verbalizer({"neg": ["bad", "poor"], "pos": "good"})
PLACED = "{prompt:2} {text} it {prompt:1} was {mask} {prompt:1}"


def masked_task(template: str = PLACED) -> MaskedClassificationTask:
    return MaskedClassificationTask(Template(template), WORDS)


def by_hand(model: Any, embeds: Tensor, tokens: list[int], places: list[int]) -> tuple[Tensor, list[int]]:
    """Stock logits [P + T, V] of one row whose embeddings are put together token by token; where the text stands."""
    table = model.get_input_embeddings().weight
    row: list[Tensor] = []
    text: list[int] = []
    for at in range(len(tokens) + 1):
        row += [embeds[i] for i, place in enumerate(places) if place == at]
        if at < len(tokens):
            text.append(len(row))
            row.append(table[tokens[at]])
    return model.eval()(inputs_embeds=torch.stack(row)[None]).logits[0], text


@pytest.mark.parametrize("template", [PLACED, "{text} it was {mask}"])
@torch.no_grad()
def test_masked_scores_are_the_stock_models(tiny: ModuleType, template: str) -> None:
    model, tokens, rows = tiny.bert(BertForMaskedLM), tiny.tokenizer(special=True), tiny.rows(9)
    prompt, task = tiny.soft(model), masked_task(template)
    losses, labels = [], []
    for row in task.encode(load_rows(rows), tokens, max_tokens=40):
        logits, text = by_hand(model, prompt.embeds, row.input_ids, row.virtual_at or [0] * 4)
        at = row.input_ids.index(tokens.mask_token_id)
        gold = torch.tensor(row.labels[at])
        losses.append(cross_entropy(logits[text[at]], gold).item())
        p = logits[text[at]].softmax(0)
        bad, poor, good = (p[tokens.convert_tokens_to_ids(word)] for word in ("bad", "poor", "good"))
        labels.append("neg" if bad + poor > good else "pos")
    result = evaluate(model, prompt, task, rows, tokens, batch_size=4)
    assert result.predictions == labels
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert result.metrics["accuracy"] == sum(a == b["label"] for a, b in zip(labels, rows, strict=True)) / 9


@pytest.mark.parametrize("method", [SoftPrompt, PTuning])
def test_masked_classification_trains(tiny: ModuleType, tmp_path: Path, method: Any) -> None:
    """The first loss is the stock one at the start, the last is lower, and the frozen model is as it was."""
    model, tokens, rows = tiny.bert(BertForMaskedLM), tiny.tokenizer(special=True), tiny.rows(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompt = method(model, num_virtual_tokens=4, seed=1)
    with torch.no_grad():
        start = evaluate(model, prompt, masked_task(), rows, tokens).metrics["loss"]
    result = tiny.trainer(
        tmp_path, model, prompt, masked_task(), rows, rows, tokens, per_device_train_batch_size=8, max_steps=30,
        learning_rate=0.05,
    ).fit()  # fmt: skip
    assert result.losses[0] == pytest.approx(start, rel=1e-5)
    assert result.losses[-1] < 0.75 * result.losses[0]
    assert result.metrics["loss"] < 0.75 * start
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("words", ["one token", "several tokens"])
@torch.no_grad()
def test_causal_scores_with_the_prompt_between_words(tiny: ModuleType, words: str) -> None:
    """A virtual token right before the answer predicts it; candidates of several tokens keep the places."""
    model, tokens, rows = tiny.gpt2(), tiny.tokenizer(), tiny.rows(7)
    named = {"neg": "bad", "pos": "good" if words == "one token" else "very good"}
    task = ClassificationTask(Template("the {prompt:1} {text} {prompt:2} it was {prompt:1}"), Verbalizer(named))
    prompt = tiny.soft(model)
    labels, total, count = [], 0.0, 0
    for row in task.encode(load_rows(rows), tokens, max_tokens=40):
        text = row.input_ids[: row.prompt_length]
        scores = []
        for label, word in named.items():
            target = tokens(word)["input_ids"]
            logits, places = by_hand(model, prompt.embeds, text + target, row.virtual_at)
            p = logits.log_softmax(-1)
            scores.append(sum(p[places[len(text) + i] - 1, token].item() for i, token in enumerate(target)))
            if label == rows[row.index]["label"]:
                total, count = total - scores[-1], count + len(target)
        labels.append("neg" if scores[0] > scores[1] else "pos")
    result = evaluate(model, prompt, task, rows, tokens, batch_size=4)
    assert result.predictions == labels
    assert result.metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_causal_prompt_between_words_trains_and_says_what_it_costs(tiny: ModuleType, tmp_path: Path) -> None:
    task = ClassificationTask(Template("{text} {prompt:4} it was"), Verbalizer({"neg": "bad", "pos": "good"}))
    with pytest.warns(UserWarning, match="behind text, so every row runs its own"):
        trainer = tiny.trainer(tmp_path, task=task, train=tiny.rows(8), per_device_train_batch_size=8, max_steps=30)
    losses = trainer.fit().losses
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(InputError, match=r"member 0: .*stand before the text.*\{prompt:4\}"):
        PromptSet([trainer], tmp_path / "set")


@pytest.mark.parametrize("template", [PLACED, "{prompt:4} {text} it was {mask}"])
def test_a_set_refuses_virtual_tokens_inside_masked_rows(tiny: ModuleType, tmp_path: Path, template: str) -> None:
    """Those before the text stand behind [CLS]."""
    model, tokens = tiny.bert(BertForMaskedLM), tiny.tokenizer(special=True)
    trainer = tiny.trainer(tmp_path, model, SoftPrompt(model, 4), masked_task(template), tokens=tokens)
    with pytest.raises(InputError, match=r"member 0: .*before the text.*MaskedClassificationTask with the template"):
        PromptSet([trainer], tmp_path / "set")


def test_places_before_all_text_are_the_shared_prompt(tiny: ModuleType, tmp_path: Path, recwarn: Any) -> None:
    """The same losses as without a place, to the bit: it is the same computation."""
    losses = []
    for name, text in (("plain", "{text} it was"), ("placed", "{prompt:4}{text} it was")):
        task = ClassificationTask(Template(text), Verbalizer({"neg": "bad", "pos": "good"}))
        losses.append(tiny.trainer(tmp_path / name, task=task, max_steps=3).fit().losses)
    assert losses[0] == losses[1]
    assert not [warning for warning in recwarn if "behind text" in str(warning.message)]


def test_bad_inputs(tiny: ModuleType, tmp_path: Path) -> None:
    model, tokens = tiny.bert(BertForMaskedLM), tiny.tokenizer(special=True)
    with pytest.raises(InputError, match="a prompt of 4 virtual tokens, as many as the template places, got 5"):
        tiny.trainer(tmp_path, model, SoftPrompt(model, 5), masked_task(), tokens=tokens)
    with pytest.raises(InputError, match="4 that the template places, got Prefix"):
        evaluate(model, tiny.prefix(model), masked_task(), tiny.rows(2), tokens)
    with pytest.raises(InputError, match="with a language-modelling head, got BertForSequenceClassification"):
        evaluate(tiny.bert(), None, masked_task(), tiny.rows(2), tokens)
    with pytest.raises(InputError, match="got MaskedClassificationTask, which is for encoder models"):
        evaluate(tiny.gpt2(), None, masked_task(), tiny.rows(2), tokens)
    assert evaluate(model, None, masked_task(), tiny.rows(3), tokens).n == 3  # the frozen model, places passed over
