"""Similarity of prompts against numbers worked out by numpy, and where there is none."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import Prefix, SoftPrompt
from ptengine.transfer import mean_token_cosine, task_vector_cosine, token_cosine
from ptengine.transfer.similarity import prompt_similarity, token_vectors


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def soft(model: object, rows: np.ndarray) -> SoftPrompt:
    return SoftPrompt(model, init="array", array=rows)


def test_cosines_of_soft_prompts(tiny: ModuleType) -> None:
    model, draw = tiny.gpt2(), np.random.default_rng(0)
    a, b = draw.normal(size=(4, 16)).astype("float32"), draw.normal(size=(3, 16)).astype("float32")
    one, other = soft(model, a), soft(model, b)
    a, b = a.astype("float64"), b.astype("float64")
    # fp64 sums of 16 products: rounding far below 1e-12.
    assert mean_token_cosine(one, other) == pytest.approx(cosine(a.mean(0), b.mean(0)), abs=1e-12)
    pairs = np.mean([cosine(x, y) for x in a for y in b])
    assert token_cosine(one, other) == pytest.approx(pairs, abs=1e-12)
    assert mean_token_cosine(one, one) == pytest.approx(1, abs=1e-12)
    assert mean_token_cosine(one, soft(model, -3 * a.astype("float32"))) == pytest.approx(-1, abs=1e-12)


def test_token_vectors_of_a_prefix_keep_tokens_apart(tiny: ModuleType) -> None:
    prefix = tiny.prefix(tiny.llama())
    vectors = token_vectors(prefix)
    assert vectors.shape == (3, 2 * 2 * 2 * 4)
    one = torch.cat([torch.stack([prefix.keys[layer, 1], prefix.values[layer, 1]]).flatten() for layer in range(2)])
    assert torch.equal(vectors[1], one.detach().double())


def test_task_vectors_compare_what_training_moved(tiny: ModuleType) -> None:
    model, draw = tiny.gpt2(), np.random.default_rng(1)
    start, move, turn = (draw.normal(size=(4, 16)).astype("float32") for _ in range(3))
    initial, one, other = soft(model, start), soft(model, start + move), soft(model, start + turn)
    moved = [(start + x).astype(float) - start.astype(float) for x in (move, turn)]
    wanted = cosine(moved[0].ravel(), moved[1].ravel())
    assert task_vector_cosine(one, initial, other, initial) == pytest.approx(wanted, abs=1e-9)
    assert abs(mean_token_cosine(one, other) - wanted) > 0.05
    assert prompt_similarity("task_vector_cosine", one, other, initial, initial) == pytest.approx(wanted, abs=1e-9)


def test_what_cannot_be_compared_is_refused(tiny: ModuleType) -> None:
    model, llama = tiny.gpt2(), tiny.llama()
    one, other = tiny.soft(model), tiny.soft(model, 1)
    with pytest.raises(InputError, match="one kind and backbone"):
        mean_token_cosine(one, tiny.prefix(model))
    with pytest.raises(InputError, match="one kind and backbone"):
        # Of one method, yet of another width: the prefix of GPT-2 has no grouped heads.
        token_cosine(tiny.prefix(model), tiny.prefix(llama))
    with pytest.raises(InputError, match="same initial prompt"):
        task_vector_cosine(one, one, other, other)
    with pytest.raises(InputError, match="all zeros"):
        task_vector_cosine(one, one, other, one)
    with pytest.raises(InputError, match="tokens of all zeros"):
        token_cosine(Prefix(model, 2, init="zero"), Prefix(model, 2))
    with pytest.raises(InputError, match="P0"):
        prompt_similarity("task_vector_cosine", one, other)
    with pytest.raises(InputError, match="expected a measure"):
        prompt_similarity("cosine", one, other)


def test_numbers_that_are_not_finite_were_compared(tiny: ModuleType) -> None:
    """The cosine was NaN, which ranks before every number."""
    model = tiny.gpt2()
    one, other = tiny.soft(model), tiny.soft(model, 1)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            other.embeds[1, 2] = value
        for measure in (mean_token_cosine, token_cosine):
            with pytest.raises(InputError, match="finite numbers, got NaN or infinity in its 'embeds'"):
                measure(one, other)
