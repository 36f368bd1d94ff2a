"""SMoP: the router's formula in fp64, its perturbation in training alone, and one expert that is a soft prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ptengine.backbone import generate
from ptengine.prompts import MixturePrompt, SoftPrompt

from .test_reparametrized import shaken
from .test_text_dependent import LENGTHS, texts


def test_every_row_has_the_prompt_its_router_picks(gpt2: Any) -> None:
    prompt = shaken(MixturePrompt(gpt2, num_experts=3))
    with torch.no_grad():
        for row, (text, length) in enumerate(zip(texts(gpt2), LENGTHS, strict=True)):
            prompt.router[row] = text[:length].mean(0)
    assert prompt.num_virtual_tokens == 5
    s = {name: tensor.double().numpy() for name, tensor in prompt.state_dict().items()}
    got = prompt.virtual_tokens(texts(gpt2), LENGTHS).detach().numpy()
    picked = set()
    for row, (text, length) in enumerate(zip(texts(gpt2).double().numpy(), LENGTHS, strict=True)):
        scores = s["router"] @ text[:length].mean(0)
        shares = np.exp(scores) / np.exp(scores).sum()
        best = int(shares.argmax())
        picked.add(best)
        np.testing.assert_allclose(got[row], s["experts"][best] * shares[best], rtol=1e-5, atol=1e-6)
    assert len(picked) == 3


def test_the_router_is_perturbed_in_training_alone(gpt2: Any) -> None:
    prompt = shaken(MixturePrompt(gpt2))
    rows = texts(gpt2), LENGTHS
    plain = prompt.virtual_tokens(*rows)
    assert torch.equal(prompt.eval().lower().of_texts(*rows), plain)
    prompt.train()
    torch.manual_seed(1)
    first = prompt.lower()
    drawn = first.of_texts(*rows)
    assert not torch.allclose(drawn, plain)
    torch.manual_seed(1)
    again = prompt.lower()
    torch.rand(7)  # what is drawn between does not matter: the rows may be computed elsewhere
    assert torch.equal(again.of_texts(*rows), drawn)
    assert not torch.equal(prompt.lower().of_texts(*rows), drawn)


def test_generate_does_not_perturb_a_prompt_in_training_mode(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded prompt is in training mode, as every new module is."""
    prompt, given = shaken(MixturePrompt(gpt2)), []
    monkeypatch.setattr(
        prompt, "probabilities", lambda *call: given.append(call[2]) or MixturePrompt.probabilities(prompt, *call)
    )
    generate(gpt2, prompt, [[3, 4, 5]], max_new_tokens=2)
    assert given == [None]
    assert prompt.training


def test_the_perturbation_is_relative_and_its_scale_a_constant(gpt2: Any) -> None:
    prompt = shaken(MixturePrompt(gpt2, num_experts=3))
    one, lengths = texts(gpt2)[:1], LENGTHS[:1]
    many = one.expand(4000, -1, -1), lengths.expand(4000)
    with torch.no_grad():
        plain = prompt.probabilities(one, lengths)[0].log()
        noisy = prompt.probabilities(*many, torch.Generator().manual_seed(0)).log()  # [4000, E]
        scores = (one.sum(1) / lengths) @ prompt.router.T  # [1, E]
    # Differences of scores: mean unmoved, deviation the root of the scores' squares.
    gap = noisy[:, 0] - noisy[:, 1]
    spread = float((scores[0, 0] ** 2 + scores[0, 1] ** 2).sqrt())
    assert float(gap.mean()) == pytest.approx(float(plain[0] - plain[1]), abs=4 * spread / 4000**0.5)
    assert float(gap.std()) == pytest.approx(spread, rel=0.05)

    # d log p_0 / d R of e fixed: the plain softmax's gradient at the moved scores.
    p = prompt.probabilities(one, lengths, torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad(p[0, 0].log(), prompt.router)
    mean = (one.sum(1) / lengths)[0]  # [d]
    wanted = (torch.tensor([1.0, 0, 0]) - p[0].detach())[:, None] * mean
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_a_single_expert_is_a_soft_prompt(gpt2: Any) -> None:
    prompt = shaken(MixturePrompt(gpt2, 4, "random", num_experts=1, seed=2))
    folded = prompt.fold()
    assert type(folded) is SoftPrompt
    rows = prompt.lower().of_texts(texts(gpt2), LENGTHS)
    torch.testing.assert_close(rows, folded.embeds.expand(3, 4, 32), rtol=1e-6, atol=0)
    with torch.no_grad():
        prompt.experts.zero_()
    assert folded.embeds.any()
    assert torch.equal(
        MixturePrompt(gpt2, 4, "random", num_experts=1, seed=2).experts[0], SoftPrompt(gpt2, 4, seed=2).embeds
    )


def test_it_starts_with_experts_of_their_own_and_an_orthogonal_router(gpt2: Any) -> None:
    prompt = MixturePrompt(gpt2, 5, num_experts=4)
    assert len({tuple(expert.flatten().tolist()) for expert in prompt.experts.detach()}) == 4
    torch.testing.assert_close(prompt.router.detach() @ prompt.router.detach().T, torch.eye(4), rtol=0, atol=1e-5)
    assert not torch.equal(prompt.experts[0], MixturePrompt(gpt2, 5, num_experts=4, seed=1).experts[0])


def test_the_largest_seed_was_refused_by_one_nobody_gave(gpt2):
    assert MixturePrompt(gpt2, 3, "random", num_experts=4, seed=2**63 - 1).experts.isfinite().all()
