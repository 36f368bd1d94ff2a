"""Ensembles: the mixture of what each prompt says alone, whatever the batches, and one prompt alone is itself."""

from __future__ import annotations

import copy
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

from ptengine import HeadedPrompt, MixturePrompt
from ptengine.backbone import is_patched
from ptengine.data import EmbeddingTask, MaskedClassificationTask, Seq2SeqClassificationTask, Template, Verbalizer
from ptengine.errors import InputError
from ptengine.training import evaluate
from ptengine.transfer import evaluate_ensemble, likelihood_weights


@torch.no_grad()
def stock_word(model: Any, prompt: Any, text: list[int], word: list[int]) -> float:
    """log p(word | text) in the stock model with the virtual tokens in the row."""
    embeds = torch.cat([prompt.embeds, model.get_input_embeddings()(torch.tensor(text + word))])
    logits = model(inputs_embeds=embeds[None]).logits[0].double().log_softmax(-1)
    at = len(prompt.embeds) + len(text) - 1
    return sum(logits[at + i, token].item() for i, token in enumerate(word))


@pytest.mark.parametrize("several", [False, True], ids=["one token", "several words and tokens"])
def test_probabilities_are_averaged_over_prompts(tiny: ModuleType, several: bool) -> None:
    model, tokens, task, rows = tiny.llama().eval(), tiny.tokenizer(), tiny.words_task(several), tiny.rows(7, 3)
    prompts, weights = [tiny.soft(model, seed) for seed in (1, 2, 3)], [1.0, 0.0, 3.0]
    found = evaluate_ensemble(model, prompts, task, rows, tokens, weights=weights, batch_size=5)
    assert not is_patched(model)
    said, total, count = [], 0.0, 0
    for row in rows:
        text = tokens(task.template.render(row, 0))["input_ids"]
        mixture = dict.fromkeys(task.labels, 0.0)
        first = 0.0
        for prompt, weight in zip(prompts, weights, strict=True):
            words = {
                label: [math.exp(stock_word(model, prompt, text, tokens(word)["input_ids"])) for word in words]
                for label, words in task.verbalizer.words.items()
            }
            whole = sum(map(sum, words.values()))
            for label, values in words.items():
                mixture[label] += weight / 4 * sum(values) / whole
            first += weight / 4 * words[row["label"]][0]
        said.append(max(mixture, key=mixture.__getitem__))
        total -= math.log(first)
        count += len(tokens(task.verbalizer.words[row["label"]][0])["input_ids"])
    assert found.predictions == said
    assert found.metrics["loss"] == pytest.approx(total / count, rel=1e-5)  # fp32 through two layers


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("what", ["words", "text"])
def test_one_prompt_alone_is_evaluated_as_ever(tiny: ModuleType, kind: str, what: str) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    task, prompt = getattr(tiny, f"{what}_task")(), getattr(tiny, kind)(model, 1)
    wanted = evaluate(model, prompt, task, tiny.rows(6), tokens)
    for prompts in ([prompt], [prompt, prompt]):
        found = evaluate_ensemble(model, prompts, task, tiny.rows(6), tokens)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5)
        assert found.predictions == wanted.predictions


def _other_models(tiny: ModuleType) -> dict[str, tuple[Any, Any, Any]]:
    """Model, task and a prompt by its seed, of every kind of model that is not causal."""
    masked, headed, t5 = tiny.bert(BertForMaskedLM), tiny.bert(), tiny.t5()
    labels = Verbalizer({"neg": ["bad", "poor"], "pos": "good"})
    words = Seq2SeqClassificationTask(Template("{text} it was"), Verbalizer({"neg": "bad", "pos": "very good"}))
    return {
        "mask": (masked, MaskedClassificationTask(Template("{text} it was {mask}"), labels),
                 lambda seed: tiny.prefix(masked, seed)),
        "mask among virtual tokens": (
            masked, MaskedClassificationTask(Template("{prompt:2} {text} {prompt:2} {mask}"), labels),
            lambda seed: tiny.soft(masked, seed),
        ),
        "head": (headed, tiny.head_task(),
                 lambda seed: HeadedPrompt(headed, tiny.soft(headed, seed), ("neg", "pos"), seed=seed)),
        "words of an encoder-decoder": (t5, words, lambda seed: tiny.soft(t5, seed)),
        "texts of an encoder-decoder": (t5, tiny.pair_task(), lambda seed: tiny.prefix(t5, seed)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["mask", "mask among virtual tokens", "head", "words of an encoder-decoder", "texts of an encoder-decoder"],
)
def test_models_that_are_not_causal(tiny: ModuleType, kind: str) -> None:
    """One prompt alone is `evaluate`; of several the mixture of two classes is taken of what each says alone."""
    model, task, make = _other_models(tiny)[kind]
    tokens, rows = tiny.tokenizer(special=model.config.model_type == "bert"), tiny.rows(7, 2)
    prompts = [make(seed) for seed in (1, 2, 3)]
    alone = [evaluate(model, prompt, task, rows, tokens) for prompt in prompts]
    for one, wanted in zip(prompts, alone, strict=True):
        found = evaluate_ensemble(model, [one, one], task, rows, tokens, batch_size=3)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5)
        assert found.predictions == wanted.predictions
    weights = likelihood_weights(model, prompts, task, rows, tokens, batch_size=4)
    losses = torch.tensor([result.metrics["loss"] for result in alone])
    assert weights == pytest.approx(torch.softmax(-losses, 0).tolist(), rel=1e-5)
    mixed = evaluate_ensemble(model, prompts, task, rows, tokens, weights=weights)
    assert len({round(loss, 6) for loss in losses.tolist()}) == 3
    # -log of a mean lies below the mean of -log, and above the lowest of each target's.
    assert mixed.metrics["loss"] < sum(w * x for w, x in zip(weights, losses.tolist(), strict=True))
    assert mixed.metrics["loss"] > min(losses.tolist()) + math.log(min(weights))


@torch.no_grad()
def test_heads_are_averaged_by_hand(tiny: ModuleType) -> None:
    model, task, make = _other_models(tiny)["head"]
    tokens, rows, prompts = tiny.tokenizer(special=True), tiny.rows(6, 2), [make(seed) for seed in (1, 2)]
    expected = []
    for row in rows:
        said = []
        for prompt in prompts:
            twin = copy.deepcopy(model).eval()
            prompt.install_head(twin)
            with prompt.prompt.attached(twin):
                said.append(twin(**tokens(row["text"], return_tensors="pt")).logits[0].softmax(0))
        expected.append(0.25 * said[0] + 0.75 * said[1])
    found = evaluate_ensemble(model, prompts, task, rows, tokens, weights=[1, 3])
    assert found.predictions == [task.labels[int(p.argmax())] for p in expected]
    gold = [task.labels.index(row["label"]) for row in rows]
    loss = -sum(math.log(p[at]) for p, at in zip(expected, gold, strict=True)) / 6
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_generation_task_mixes_token_by_token(tiny: ModuleType) -> None:
    model, tokens, task, rows = tiny.gpt2(), tiny.tokenizer(), tiny.text_task(), tiny.rows(1)
    prompts = [tiny.prefix(model, seed) for seed in (1, 2)]
    alone = [evaluate(model, prompt, task, rows, tokens).metrics["loss"] for prompt in prompts]
    mixed = evaluate_ensemble(model, prompts, task, rows, tokens)
    # -log of a mean lies below the mean of -log, and above the lowest of each token's.
    assert mixed.metrics["loss"] < sum(alone) / 2
    assert mixed.metrics["loss"] > min(alone) - math.log(2)
    assert mixed.metrics["perplexity"] == pytest.approx(math.exp(mixed.metrics["loss"]))
    assert mixed.predictions == []


def test_weights_of_held_back_rows_are_their_likelihoods(tiny: ModuleType) -> None:
    model, tokens, task, rows = tiny.gpt2(), tiny.tokenizer(), tiny.words_task(), tiny.rows(6, 4)
    prompts = [tiny.soft(model, seed) for seed in (1, 2, 3)]
    losses = [evaluate(model, prompt, task, rows, tokens).metrics["loss"] for prompt in prompts]
    found = likelihood_weights(model, prompts, task, rows, tokens, batch_size=4)
    wanted = torch.softmax(-torch.tensor(losses), dim=0)
    assert found == pytest.approx(wanted.tolist(), rel=1e-5)
    assert likelihood_weights(model, prompts, task, [*rows, *rows], tokens) == pytest.approx(found, rel=1e-5)


def test_a_mixture_is_asked_without_the_noise_of_its_training(tiny: ModuleType) -> None:
    """Loaded prompts are in training mode, and a fold keeps it: every call gave other numbers."""
    model, tokens, task, rows = tiny.gpt2(), tiny.tokenizer(), tiny.words_task(), tiny.rows(6, 4)
    mixture = MixturePrompt(model, 4, num_experts=3, seed=1).train()
    wanted = evaluate(model, mixture, task, rows, tokens).metrics["loss"]
    for prompts in ([mixture], [mixture, mixture], [mixture, mixture.fold()]):
        found = evaluate_ensemble(model, prompts, task, rows, tokens)
        assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    assert likelihood_weights(model, [mixture, mixture], task, rows, tokens) == pytest.approx([0.5, 0.5], rel=1e-6)
    with_soft = evaluate_ensemble(model, [mixture, tiny.soft(model)], task, rows, tokens, weights=[1e308, 1e308])
    assert with_soft.metrics["loss"] < max(
        wanted, evaluate(model, tiny.soft(model), task, rows, tokens).metrics["loss"]
    )
    assert mixture.training


def test_bad_ensembles_are_refused(tiny: ModuleType) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    soft = tiny.soft(model)

    def ask(prompts: Any, task: Any = None, **more: Any) -> None:
        evaluate_ensemble(model, prompts, task or tiny.words_task(), tiny.rows(3), tokens, **more)

    with pytest.raises(InputError, match="at least one prompt"):
        ask([])
    with pytest.raises(InputError, match="got KeyValuePrefix and VirtualTokens"):
        ask([soft, tiny.prefix(model)])
    with pytest.raises(InputError, match="None among them"):
        ask([soft, None])
    with pytest.raises(InputError, match="another backbone"):
        ask([tiny.soft(tiny.llama())])
    with pytest.raises(InputError, match="expected a HeadedPrompt"):
        ask([soft], tiny.head_task())
    with pytest.raises(InputError, match="model type 'gpt2', got Seq2SeqTask"):
        ask([soft], tiny.pair_task())
    with pytest.raises(InputError, match="labels or of texts to write for an ensemble, got EmbeddingTask"):
        ask([soft], EmbeddingTask())
    for weights in ([1.0, 2.0], [-1.0], [0.0], [float("nan")]):
        with pytest.raises(InputError, match="expected 1 weights"):
            ask([soft], weights=weights)
    with pytest.raises(InputError, match="batch_size"):
        ask([soft], batch_size=0)
