"""CPT: context embeddings plus a delta in a ball, by projected gradient descent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import ContextPrompt, create

from .method_cases import WORDS, words_to_ids

PIECES = [("format", "is"), ("input", "this very"), ("label", "good"), ("format", "or"), ("label", "bad")]
KINDS = ["format", "input", "input", "label", "format", "label"]
IDS = [3, 4, 7, 5, 8, 6]


@pytest.fixture
def prompt(gpt2):
    return ContextPrompt(gpt2, PIECES, tokenizer=words_to_ids, input_epsilon=2.0, format_epsilon=1.0)


def radius(kind):
    return {"input": 2.0, "format": 1.0, "label": 0.0}[kind] * math.sqrt(32 / 2048)


def projected(delta):
    """fp64: every row scaled back to its ball."""
    rows = []
    for kind, row in zip(KINDS, delta.double().numpy(), strict=True):
        norm, limit = np.sqrt((row**2).sum()), radius(kind)
        rows.append(row * limit / norm if norm > limit else row)
    return np.stack(rows)


def test_it_starts_at_the_words_of_the_context(gpt2, prompt):
    assert torch.equal(prompt.lower().embeds, gpt2.get_input_embeddings().weight[IDS])
    assert [name for name, _ in prompt.named_parameters()] == ["delta"]


@pytest.mark.parametrize("scale", [0.01, 0.5])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_it_is_context_plus_projected_delta(prompt, scale, training, grad):
    with torch.no_grad():
        prompt.delta += scale * torch.randn_like(prompt.delta)
    wanted = prompt.context.double().numpy() + projected(prompt.delta.detach())
    prompt.train(training)
    with torch.set_grad_enabled(grad):
        got = prompt.lower().embeds.detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(prompt.fold().embeds.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_only_training_moves_the_parameter_back_into_the_ball(prompt):
    with torch.no_grad():
        prompt.delta += 1
        outside = prompt.delta.clone()
        prompt.lower()
    prompt.eval().lower()
    assert torch.equal(prompt.delta, outside)
    prompt.train().lower()
    np.testing.assert_allclose(prompt.delta.detach().numpy(), projected(outside), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_the_projected_point_and_spares_labels(prompt, training):
    with torch.no_grad():
        prompt.delta += 1
    weights = torch.randn(6, 32)
    (prompt.train(training).lower().embeds * weights).sum().backward()
    is_label = torch.tensor([kind == "label" for kind in KINDS])
    assert torch.equal(prompt.delta.grad[~is_label], weights[~is_label])
    assert not prompt.delta.grad[is_label].any()


def test_steps_are_those_of_projected_gradient_descent(prompt):
    target = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    delta = np.zeros((6, 32))
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.05)
    context = prompt.context.double().numpy()
    free = np.array([kind != "label" for kind in KINDS])[:, None]
    for _ in range(4):
        optimizer.zero_grad()
        (prompt.lower().embeds - target).square().sum().backward()
        optimizer.step()
        delta = delta - 0.05 * 2 * (context + delta - target.double().numpy()) * free
        delta = projected(torch.from_numpy(delta))
    np.testing.assert_allclose(prompt.fold().embeds.detach().numpy(), context + delta, rtol=1e-5, atol=1e-6)


def test_the_default_rate_is_a_tenth_of_the_ball(gpt2, prompt):
    assert prompt.default_learning_rate() == pytest.approx(0.1 * radius("format") / math.sqrt(32))
    wide = ContextPrompt(gpt2, PIECES, tokenizer=words_to_ids, input_epsilon=99.0, format_epsilon=99.0)
    assert wide.default_learning_rate() == pytest.approx(0.3 * wide.facts.embedding_std)


def test_it_is_made_by_name_with_a_context_as_json_has_it(gpt2):
    pieces = [list(piece) for piece in PIECES]
    assert torch.equal(create("context_prompt", gpt2, context=pieces, tokenizer=words_to_ids).context[0],
                       gpt2.get_input_embeddings().weight[3])  # fmt: skip
    with pytest.raises(InputError, match="'context_prompt' needs the option 'context'"):
        create("context_prompt", gpt2, tokenizer=words_to_ids)


BAD = {
    "one text": ({"context": "this is good"}, r"pieces \(kind, text\), got 'this is good'"),
    "no pieces": ({"context": []}, "at least one token of an input or of the format, got none"),
    "labels alone": ({"context": [("label", "good")]}, "at least one token of an input or of the format"),
    "a piece of one": ({"context": [("input",)]}, r"two strings, got \('input',\) at index 0"),
    "a kind there is not": ({"context": [("input", "is"), ("answer", "bad")]}, "got 'answer' at index 1"),
    "no tokenizer": ({"tokenizer": None}, "transformers tokenizer, got NoneType"),
    "a foreign tokenizer": ({"tokenizer": lambda text, **_: {"input_ids": [99]}}, "ids below 61, got one that maps"),
    "a ball of nothing": ({"input_epsilon": 0}, "input_epsilon, a number above 0, got 0"),
    "a negative ball": ({"format_epsilon": -1.0}, "format_epsilon, a number above 0, got -1.0"),
    "longer than the model": ({"context": [("input", " ".join(WORDS * 11))]}, "below the 64 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        ContextPrompt(gpt2, **({"context": PIECES, "tokenizer": words_to_ids} | arguments))
