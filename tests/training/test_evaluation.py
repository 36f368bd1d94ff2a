"""Evaluation against the stock computation: the prompt in the row, every word of every label scored on its own."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine.backbone import is_patched
from ptengine.data import ClassificationTask, Template, Verbalizer, classification_metrics, generation_metrics
from ptengine.errors import InputError
from ptengine.training import evaluate
from ptengine.transfer import evaluate_ensemble


def _log_probs(model: Any, prompt: Any, ids: list[int]) -> torch.Tensor:
    """Stock log probabilities [T, V]: row t is the distribution of token t, given the prompt and the tokens before."""
    text = model.get_input_embeddings()(torch.tensor(ids))  # [T, d]
    embeds = text if prompt is None else torch.cat([prompt.embeds, text])  # [P + T, d]
    logits = model(inputs_embeds=embeds[None]).logits[0].float()  # [P + T, V]
    return torch.log_softmax(logits, -1)[-len(ids) - 1 : -1]


@torch.no_grad()
def _classify(
    tiny: ModuleType, model: Any, prompt: Any, task: Any, rows: list[dict[str, str]]
) -> tuple[list[str], float]:
    """Labels by brute force, and the mean loss over the tokens of the first word of the gold label."""
    tokens = tiny.tokenizer()
    predictions, total, count = [], 0.0, 0
    for row in rows:
        text = tokens(task.template.render(row, 0))["input_ids"]
        scores = {}
        for label, words in task.verbalizer.words.items():
            per_word = []
            for word in words:
                target = tokens(word)["input_ids"]
                found = _log_probs(model, prompt, text + target)[len(text) - len(text + target) :]
                found = found[-len(target) :].gather(1, torch.tensor(target)[:, None]).sum()
                per_word.append(found)
                if label == row["label"] and word == words[0]:
                    total -= found.item()
                    count += len(target)
            scores[label] = torch.logsumexp(torch.stack(per_word), 0).item()
        predictions.append(max(scores, key=scores.__getitem__))
    return predictions, total / count


@pytest.mark.parametrize("several", [False, True], ids=["one token", "several words and tokens"])
@pytest.mark.parametrize("with_prompt", [False, True], ids=["hard prompt only", "soft prompt"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_labels_and_loss_equal_the_stock_computation(
    tiny: ModuleType, kind: str, with_prompt: bool, several: bool
) -> None:
    model = getattr(tiny, kind)().train()
    prompt = tiny.soft(model, seed=1) if with_prompt else None
    task, rows = tiny.words_task(several), tiny.rows(9, 3)
    found = evaluate(model, prompt, task, rows, tiny.tokenizer(), batch_size=4)
    assert model.training
    assert not is_patched(model)
    predictions, loss = _classify(tiny, model.eval(), prompt, task, rows)
    labels = list(task.labels)
    assert found.n == 9
    assert found.predictions == predictions
    assert found.metrics.pop("loss") == pytest.approx(loss, abs=1e-5)
    gold = [labels.index(row["label"]) for row in rows]
    assert found.metrics == classification_metrics(gold, [labels.index(label) for label in predictions], labels)


def test_labels_compare_by_the_sum_over_their_words(tiny: ModuleType) -> None:
    """Two words of 0.3 each beat one of 0.4, although each of them alone would lose."""
    model, tokens = tiny.gpt2().eval(), tiny.tokenizer()
    row = {"text": "film song", "label": "neg"}
    ids = tokens("film song it was")["input_ids"]
    with torch.no_grad():
        following = model(torch.tensor([ids])).logits[0, -1].softmax(-1)  # [V]
    ranked = sorted(tiny.WORDS, key=lambda word: -following[tokens(word)["input_ids"][0]].item())
    top = following[tokens(ranked[0])["input_ids"][0]]
    rest = sum(following[tokens(word)["input_ids"][0]] for word in ranked[1:])
    assert top < rest
    template = Template("{text} it was")
    for others, label in (([ranked[1]], "neg"), (ranked[1:], "pos")):
        task = ClassificationTask(template, Verbalizer({"neg": ranked[0], "pos": others}))
        assert evaluate(model, None, task, [row], tokens).predictions == [label]


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_generation_loss_is_weighted_by_tokens(tiny: ModuleType, batch_size: int) -> None:
    model = tiny.gpt2()
    prompt = tiny.soft(model, seed=2)
    rows = tiny.rows(11, 4)
    for i, row in enumerate(rows):
        row["target"] = " ".join(["fine"] * (1 + 3 * (i % 3)))
    found = evaluate(model, prompt, tiny.text_task(), rows, tiny.tokenizer(), batch_size=batch_size)
    model.eval()
    tokens, total, count = tiny.tokenizer(), 0.0, 0
    with torch.no_grad():
        for row in rows:
            text = tokens(f"{row['text']} it")["input_ids"]
            target = [*tokens(row["target"])["input_ids"], tokens.eos_token_id]
            log_probs = _log_probs(model, prompt, text + target)[-len(target) :]
            total -= log_probs.gather(1, torch.tensor(target)[:, None]).sum().item()
            count += len(target)
    assert found.metrics["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.predictions == []


@torch.no_grad()
def _greedy(model: Any, prompt: Any, ids: list[int], new: int, eos: int) -> list[int]:
    out: list[int] = []
    while len(out) < new and (not out or out[-1] != eos):
        text = model.get_input_embeddings()(torch.tensor(ids + out))
        embeds = text if prompt is None else torch.cat([prompt.embeds, text])
        out.append(int(model(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("with_prompt", [False, True])
def test_generated_texts_stand_in_the_rows_order(tiny: ModuleType, with_prompt: bool) -> None:
    """Rows of like length share a batch, so texts come back in another order than they are asked for."""
    model = tiny.llama()
    prompt = tiny.soft(model, seed=2) if with_prompt else None
    rows, tokens = tiny.rows(9, 6), tiny.tokenizer()
    found = evaluate(
        model, prompt, tiny.text_task(), rows, tokens, batch_size=2, generate=True, max_new_tokens=4
    )  # fmt: skip
    texts = [
        tokens.decode(_greedy(model.eval(), prompt, tokens(f"{row['text']} it")["input_ids"], 4, tokens.eos_token_id),
                      skip_special_tokens=True)
        for row in rows
    ]  # fmt: skip
    assert found.predictions == texts
    scores = generation_metrics(texts, [[row["target"]] for row in rows])
    assert {name: found.metrics[name] for name in scores} == scores


@pytest.mark.parametrize("own", [None, 2, [2, 3]])
def test_texts_went_on_behind_the_ending_of_their_task(tiny: ModuleType, own: Any) -> None:
    """Only what ends the model's texts ended them; the tokenizer's EOS, which training teaches, was written over."""
    model, tokens, row = tiny.llama(), tiny.tokenizer(), {"text": "film song", "target": "fine"}
    with torch.no_grad():  # the last token alone says what follows: "it", "fine", EOS, "walk" and no end
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        it, fine, walk = tokens("it fine walk")["input_ids"]
        seen = torch.nn.functional.normalize(model.model.embed_tokens.weight[[it, fine, tokens.eos_token_id, walk]])
        following = torch.tensor([fine, tokens.eos_token_id, walk, walk])
        model.lm_head.weight.zero_().index_add_(0, following, seen)
    model.generation_config.eos_token_id = own
    found = evaluate(model, tiny.soft(model), tiny.text_task(), [row], tokens, generate=True, max_new_tokens=8)
    assert found.predictions == ["fine"]
    assert model.generation_config.eos_token_id == own


def test_encoder_head_equals_the_stock_model(tiny: ModuleType) -> None:
    model, tokens = tiny.bert(), tiny.tokenizer(True)
    rows = tiny.rows(10, 3)
    found = evaluate(model, None, tiny.head_task(), rows, tokens, batch_size=4)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([tokens(row["text"])["input_ids"]])).logits for row in rows])
    gold = torch.tensor([["neg", "pos"].index(row["label"]) for row in rows])
    assert found.predictions == [["neg", "pos"][i] for i in logits.argmax(1)]
    assert found.metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, gold).item(), abs=1e-5)


def test_evaluation_reads_a_file(tiny: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\nfilm was fine,pos\nfilm was dull,neg\n")
    found = evaluate(tiny.gpt2(), None, tiny.words_task(), path, tiny.tokenizer())
    assert found.n == len(found.predictions) == 2


def test_training_and_evaluation_see_the_same_numbers(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    prompt = tiny.soft(model)
    rows = tiny.rows(9, 1)
    result = tiny.trainer(tmp_path, model, prompt, evaluation=rows, per_device_eval_batch_size=4).fit()
    found = evaluate(model, prompt, tiny.words_task(), rows, tiny.tokenizer(), batch_size=4)
    assert found.metrics == result.metrics


def test_a_prompt_learns_which_words_are_asked_for(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    train, test, tokens = tiny.rows(100, 8), tiny.rows(50, 9), tiny.tokenizer()
    before = evaluate(model, None, tiny.words_task(), test, tokens).metrics["loss"]
    prompt = tiny.prefix(model)
    tiny.trainer(
        tmp_path, model, prompt, train=train, max_steps=40, per_device_train_batch_size=16, learning_rate=0.5
    ).fit()
    after = evaluate(model, prompt, tiny.words_task(), test, tokens).metrics["loss"]
    assert after < 2.5 < 4.0 < before


def test_too_many_new_tokens_were_refused_as_a_text_of_less_than_none(tiny: ModuleType) -> None:
    """The message asked for "a text of 1 to -92 tokens" where no text would do."""
    model, rows, tokens = tiny.llama(), tiny.rows(2, 6), tiny.tokenizer()
    room = model.config.max_position_embeddings - 4
    with pytest.raises(InputError, match=rf"expected max_new_tokens of at most {room - 1} .*, got {room}$"):
        evaluate(
            model, tiny.soft(model, 4), tiny.text_task(), rows, tokens, batch_size=2, generate=True, max_new_tokens=room
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "expected max_length, .* at least 1, got 0"),  # meant no limit
        ({"max_length": -3}, "expected max_length, .* got -3"),  # was called max_tokens
        ({"max_length": "8"}, "expected max_length, .* got '8'"),  # a TypeError
        ({"truncation": "no"}, "expected truncation, True or False, got 'no'"),  # counted as True
        ({"bf16": "no"}, "expected bf16, True or False, got 'no'"),  # torch's TypeError
    ],
)
def test_settings_that_a_training_run_refuses_were_taken(
    tiny: ModuleType, options: dict[str, Any], message: str
) -> None:
    model = tiny.gpt2()
    for ask in (evaluate, evaluate_ensemble):
        prompt = tiny.soft(model) if ask is evaluate else [tiny.soft(model)]
        with pytest.raises(InputError, match=message):
            ask(model, prompt, tiny.words_task(), tiny.rows(2), tiny.tokenizer(), **options)


def test_an_unknown_bleu_tokenizer_came_to_light_after_the_evaluation(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptengine.training.evaluation.make_objective", lambda *_: pytest.fail("it was begun"))
    model = tiny.gpt2()
    with pytest.raises(InputError, match=r"expected bleu_tokenizer among 13a, .*, got 'xx'"):
        evaluate(
            model, tiny.soft(model), tiny.text_task(), tiny.rows(2), tiny.tokenizer(), generate=True,
            bleu_tokenizer="xx",
        )  # fmt: skip
