"""MPT: the formula in fp64, one prompt per task, a target from the sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import MultitaskPrompt, SoftPrompt, load_prompt


@pytest.fixture
def prompt(gpt2):
    made = MultitaskPrompt(gpt2, 5, num_tasks=3, num_ranks=2, task=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter)
    return made


def formula(prompt, task):
    s = {name: tensor.double().numpy() for name, tensor in prompt.state_dict().items()}
    outer = sum(np.outer(s["columns"][task][:, r], s["rows"][task][r]) for r in range(s["rows"].shape[1]))  # [P, d]
    return s["shared"] * outer


def test_every_task_has_the_prompt_of_the_formula(prompt):
    for task, lowered in enumerate(prompt.lower_tasks()):
        wanted = formula(prompt, task)
        np.testing.assert_allclose(lowered.embeds.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
        folded = prompt.fold(task)
        assert type(folded) is SoftPrompt
        assert torch.equal(folded.embeds, lowered.embeds)
    assert torch.equal(prompt.lower().embeds, prompt.fold(1).embeds)
    assert torch.equal(prompt.fold().embeds, prompt.fold(1).embeds)
    prompt.task = 2
    assert torch.equal(prompt.lower().embeds, prompt.fold(2).embeds)


def test_one_rank_is_the_papers_outer_product(gpt2):
    prompt = MultitaskPrompt(gpt2, 5, num_tasks=2)
    u, v = prompt.columns.detach()[1, :, 0], prompt.rows.detach()[1, 0]
    torch.testing.assert_close(prompt.fold(1).embeds.detach(), prompt.shared.detach() * torch.outer(u, v))


def test_it_starts_as_the_authors_do(make_model):
    model = make_model("gpt2", n_positions=600)
    prompt = MultitaskPrompt(model, 500, num_tasks=4, seed=2)
    assert torch.equal(prompt.shared, SoftPrompt(model, 500, "sampled_vocab", seed=2).embeds)
    assert float(prompt.columns.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(prompt.rows.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert prompt.default_learning_rate() == SoftPrompt(model, 500).default_learning_rate()


@pytest.mark.parametrize("ranks", [1, 3])
def test_ones_start_every_task_at_the_shared_prompt(gpt2, ranks):
    prompt = MultitaskPrompt(gpt2, 5, num_tasks=2, num_ranks=ranks, vector_init="ones")
    for task in range(2):
        torch.testing.assert_close(prompt.fold(task).embeds, prompt.shared)


def test_a_target_starts_from_the_sources(gpt2, prompt, tmp_path):
    target = prompt.for_target()
    assert target.settings == {"num_tasks": 1, "num_ranks": 2, "task": 0}
    assert torch.equal(target.shared, prompt.shared)
    torch.testing.assert_close(target.columns[0], prompt.columns.mean(0))
    torch.testing.assert_close(target.rows[0], prompt.rows.mean(0))
    one = prompt.for_target(2)
    assert torch.equal(one.fold().embeds, prompt.fold(2).embeds)
    assert all(parameter.requires_grad for parameter in one.parameters())
    with torch.no_grad():
        one.shared += 1
    assert torch.equal(target.shared, prompt.shared)
    target.save(tmp_path, folded=False)
    assert torch.equal(load_prompt(tmp_path, gpt2).lower().embeds, target.lower().embeds)


def test_only_the_task_at_hand_and_the_shared_prompt_learn(prompt):
    prompt.lower().embeds.sum().backward()
    assert prompt.shared.grad.abs().sum() > 0
    for gradient in (prompt.columns.grad, prompt.rows.grad):
        assert [bool(part.any()) for part in gradient] == [False, True, False]


BAD = {
    "no task": ({"num_tasks": 0}, "num_tasks, a whole number of at least 1, got 0"),
    "no rank": ({"num_ranks": 0}, "num_ranks, a whole number of at least 1, got 0"),
    "a task there is not": ({"num_tasks": 2, "task": 2}, "a task, a whole number from 0 to 1, got 2"),
    "another start": ({"vector_init": "zeros"}, "vector_init, one of normal, ones, got 'zeros'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        MultitaskPrompt(gpt2, **arguments)


def test_tasks_there_are_not_are_refused(prompt):
    for call in (lambda: prompt.fold(3), lambda: prompt.for_target(-1), lambda: setattr(prompt, "task", True)):
        with pytest.raises(InputError, match="a task, a whole number from 0 to 2"):
            call()
