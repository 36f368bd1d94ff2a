"""ULPT: the formula in fp64, a projection that a seed alone decides, its start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import ULPTPrompt, load_prompt


def projection_of(prompt):
    """R, read off the formula: Z is the identity, s one and b zero."""
    with torch.no_grad():
        probe = ULPTPrompt.empty(prompt.facts, prompt.config() | {"num_virtual_tokens": prompt.settings["rank"]})
        probe.codes.copy_(torch.eye(prompt.settings["rank"]))
        probe.scale.fill_(1)
        return probe.lower().embeds


def test_it_is_the_formula_of_the_paper(gpt2):
    prompt = ULPTPrompt(gpt2, 5, rank=3)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    s = {name: tensor.double().numpy() for name, tensor in prompt.state_dict().items()}
    assert sorted(s) == ["codes", "scale", "shift"]
    wanted = s["codes"] @ projection_of(prompt).double().numpy() * s["scale"] + s["shift"]
    np.testing.assert_allclose(prompt.lower().embeds.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_authors_do(make_model):
    prompt = ULPTPrompt(make_model("gpt2", n_positions=600), 500, rank=8)
    assert float(prompt.codes.detach().std()) == pytest.approx(1, rel=0.05)
    assert torch.equal(prompt.scale, torch.ones(32))
    assert not prompt.shift.any()
    bound = (6 / (8 + 32)) ** 0.5
    drawn = projection_of(prompt)
    assert 0.95 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_projection_is_that_of_its_own_seed(gpt2, tmp_path):
    first, second = ULPTPrompt(gpt2, 5, seed=1, projection_seed=9), ULPTPrompt(gpt2, 5, seed=2, projection_seed=9)
    assert torch.equal(projection_of(first), projection_of(second))
    assert not torch.equal(first.codes, second.codes)
    assert not torch.equal(projection_of(first), projection_of(ULPTPrompt(gpt2, 5, seed=1)))
    first.save(tmp_path, folded=False)
    loaded = load_prompt(tmp_path, gpt2)
    assert loaded.settings["projection_seed"] == 9
    assert torch.equal(loaded.lower().embeds, first.lower().embeds)


def test_it_follows_a_change_of_dtype(gpt2):
    prompt = ULPTPrompt(gpt2, 5)
    before = prompt.lower().embeds.detach()
    torch.testing.assert_close(prompt.double().lower().embeds.float(), before)


def test_a_prompt_that_was_first_used_in_inference_mode_could_not_be_trained(gpt2, tmp_path):
    """The projection, kept from there, was no tensor that a backward pass may save."""
    ULPTPrompt(gpt2, 5).save(tmp_path, folded=False)
    prompt = load_prompt(tmp_path, gpt2)
    with torch.inference_mode():
        prompt.lower()
    prompt.lower().embeds.sum().backward()
    assert prompt.codes.grad.abs().sum() > 0


BAD = {
    "no rank": ({"rank": 0}, "rank, a whole number of at least 1, got 0"),
    "a negative projection": ({"projection_seed": -1}, "projection_seed, a whole number from 0 to .*, got -1"),
    "a projection beyond generators": ({"projection_seed": 2**64}, r"projection_seed, a whole number .* 2\*\*63 - 1"),
    "a negative seed": ({"seed": -1}, "seed, a whole number from 0 to 2\\*\\*63 - 1, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        ULPTPrompt(gpt2, **arguments)
