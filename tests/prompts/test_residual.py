"""Residual prompt tuning: the formula in fp64, where it starts, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import ResidualPrompt, SoftPrompt


def test_it_is_the_formula_of_the_paper(gpt2):
    prompt = ResidualPrompt(gpt2, 5, bottleneck_size=7)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    s = {name: tensor.double().numpy() for name, tensor in prompt.state_dict().items()}
    up = np.maximum(s["embeds"] @ s["down.weight"].T + s["down.bias"], 0) @ s["up.weight"].T + s["up.bias"]
    centred = up - up.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * s["norm.weight"] + s["norm.bias"]
    np.testing.assert_allclose(prompt.lower().embeds.detach().numpy(), s["embeds"] + normal, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_authors_do(gpt2, tokenizer):
    prompt = ResidualPrompt(gpt2, 5, seed=4, tokenizer=tokenizer)
    assert prompt.down.weight.shape == (800, 32)
    assert torch.equal(prompt.embeds, SoftPrompt(gpt2, 5, "sampled_vocab", seed=4, tokenizer=tokenizer).embeds)
    assert torch.equal(prompt.norm.weight, torch.ones(32))
    assert not prompt.norm.bias.any()
    for layer in (prompt.down, prompt.up):
        bound = layer.in_features**-0.5
        assert 0.8 * bound < float(layer.weight.detach().abs().max()) <= bound
    near = ResidualPrompt(gpt2, 5, seed=4, layer_norm_init=0.01)
    assert float((near.lower().embeds - near.embeds).detach().std()) == pytest.approx(0.01, rel=0.02)


def test_starts_of_a_soft_prompt_are_its_own(gpt2, tokenizer):
    array = torch.randn(6, 32)
    assert torch.equal(ResidualPrompt(gpt2, init="array", array=array).embeds, array)
    text = ResidualPrompt(gpt2, 3, "text", init_text="good or bad", tokenizer=tokenizer)
    assert torch.equal(text.embeds, SoftPrompt(gpt2, 3, "text", init_text="good or bad", tokenizer=tokenizer).embeds)
    fresh, trained = (ResidualPrompt(gpt2, init=init, **given) for init, given in
                      (("sampled_vocab", {"num_virtual_tokens": 6}), ("array", {"array": array})))  # fmt: skip
    assert fresh.default_learning_rate() == SoftPrompt(gpt2, 6).default_learning_rate()
    assert trained.default_learning_rate() == pytest.approx(fresh.default_learning_rate() / 4)


BAD = {
    "no bottleneck": ({"bottleneck_size": 0}, "bottleneck_size, a whole number of at least 1, got 0"),
    "no normalisation": ({"layer_norm_init": 0}, "layer_norm_init, a number above 0, got 0"),
    "unknown init": ({"init": "xavier"}, "got 'xavier'"),
    "an ignored text": ({"init_text": "good"}, "init='sampled_vocab' does not use init_text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        ResidualPrompt(gpt2, **arguments)
