"""SuperPos: weighted sums of sampled word embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import SuperPosPrompt


def test_it_is_the_formula_of_the_paper(model):
    prompt = SuperPosPrompt(model, 5, num_sampled_tokens=9)
    weights, words = prompt.weights.detach().double().numpy(), prompt.words.detach().double().numpy()
    wanted = np.array([sum(weights[i, j] * words[j] for j in range(9)) for i in range(5)])
    np.testing.assert_allclose(prompt.lower().embeds.detach().numpy(), wanted, rtol=1e-5, atol=1e-7)


def test_it_sums_ordinary_tokens_of_the_model_each_once(gpt2, tokenizer):
    prompt = SuperPosPrompt(gpt2, 4, num_sampled_tokens=58, tokenizer=tokenizer)
    table = gpt2.get_input_embeddings().weight.detach()
    ids = [(table == row).all(1).nonzero().item() for row in prompt.words]
    assert sorted(ids) == sorted(set(range(61)) - set(tokenizer.all_special_ids))
    assert SuperPosPrompt(gpt2, 4).settings["num_sampled_tokens"] == 61  # fewer words than 128


def test_it_starts_with_the_mean_square_of_words(make_model):
    prompt = SuperPosPrompt(make_model("gpt2", vocab_size=400, n_positions=600), 500)
    assert prompt.words.shape == (128, 32)
    assert float(prompt.weights.detach().std()) == pytest.approx(128**-0.5, rel=0.02)
    ratio = prompt.lower().embeds.detach().square().mean() / prompt.words.detach().square().mean()
    assert float(ratio) == pytest.approx(1, rel=0.1)


def test_the_words_are_trained_on_demand(gpt2):
    frozen, trained = SuperPosPrompt(gpt2, 4), SuperPosPrompt(gpt2, 4, train_embeddings=True)
    assert torch.equal(frozen.words, trained.words)
    assert [n for n, p in frozen.named_parameters() if p.requires_grad] == ["weights"]
    assert [n for n, p in trained.named_parameters() if p.requires_grad] == ["weights", "words"]


BAD = {
    "no words": ({"num_sampled_tokens": 0}, "num_sampled_tokens, a whole number of at least 1, got 0"),
    "more words than there are": ({"num_sampled_tokens": 62}, "at most 61, the vocabulary, got 62"),
    "training by name": ({"train_embeddings": "yes"}, "train_embeddings, True or False, got 'yes'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        SuperPosPrompt(gpt2, **arguments)
