"""XPrompt: which tokens and pieces are kept, that the others stay zero, and what is taken back."""

from __future__ import annotations

import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import Prefix, PrunedPrompt, SoftPrompt, create, prune_pieces, prune_tokens


@pytest.fixture
def prompt(gpt2):
    return SoftPrompt(gpt2, 5)


def test_the_best_tokens_are_kept_in_their_order(prompt):
    pruned = prune_tokens(prompt, torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), 3)
    assert type(pruned) is SoftPrompt
    assert torch.equal(pruned.embeds, prompt.embeds[[0, 2, 4]])
    tied = prune_tokens(prompt, torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), 4)
    assert torch.equal(tied.embeds, prompt.embeds[[0, 1, 2, 4]])
    with torch.no_grad():
        pruned.embeds += 1
    assert not torch.equal(pruned.embeds, prompt.embeds[[0, 2, 4]])


def test_the_best_pieces_are_kept_and_the_others_are_zero(prompt):
    scores = torch.randn(5, 4)
    pruned = prune_pieces(prompt, scores, 7)
    embeds = pruned.lower().embeds
    kept = set(scores.flatten().argsort(descending=True)[:7].tolist())
    for token in range(5):
        for piece in range(4):
            part = slice(8 * piece, 8 * piece + 8)
            wanted = prompt.embeds[token, part] if 4 * token + piece in kept else torch.zeros(8)
            assert torch.equal(embeds[token, part], wanted)


def test_pruned_pieces_stay_zero_through_training(prompt):
    pruned = prune_pieces(prompt, torch.randn(5, 4), 7)
    zero = pruned.lower().embeds == 0
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (pruned.lower().embeds - 1).square().sum().backward()
        optimizer.step()
    after = pruned.lower().embeds
    assert torch.equal(after == 0, zero)
    assert not torch.equal(after[~zero], prompt.embeds[~zero])
    assert torch.equal(pruned.fold().embeds, after)
    assert pruned.default_learning_rate() == prompt.default_learning_rate()


def test_kept_numbers_are_taken_back_to_an_earlier_state(gpt2, prompt):
    early = SoftPrompt(gpt2, 5, seed=9)
    scores = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    assert torch.equal(prune_tokens(prompt, scores, 2, rewind_to=early).embeds, early.embeds[[2, 4]])
    pieces = torch.zeros(5, 2)
    pieces[3, 1] = 1
    rewound = prune_pieces(prompt, pieces, 1, rewind_to=early).lower().embeds
    assert torch.equal(rewound[3, 16:], early.embeds[3, 16:])
    assert int((rewound != 0).sum()) == 16


BAD = {
    "too many tokens": (lambda p: prune_tokens(p, torch.ones(5), 6), "at most the prompt's 5 virtual tokens, got 6"),
    "no tokens": (lambda p: prune_tokens(p, torch.ones(5), 0), "keep, a whole number of at least 1, got 0"),
    "scores of other tokens": (lambda p: prune_tokens(p, torch.ones(4), 2), r"finite numbers \[5\], got \[4\]"),
    "scores not finite": (lambda p: prune_tokens(p, torch.full((5,), float("nan")), 2), "finite numbers"),
    "scores as a list": (lambda p: prune_tokens(p, [1.0] * 5, 2), r"finite numbers \[5\], got list"),
    "too many pieces": (lambda p: prune_pieces(p, torch.ones(5, 2), 11), "at most the prompt's 10 pieces, got 11"),
    "pieces of other tokens": (lambda p: prune_pieces(p, torch.ones(4, 2), 3), r"\[5, 2\], got \[4, 2\]"),
    "pieces that do not divide": (
        lambda p: prune_pieces(p, torch.ones(5, 3), 3),
        "divides the model's width 32, got 3",
    ),
    "no prompt": (lambda p: prune_tokens(3, torch.ones(5), 2), "SoftPrompt.*got int"),
    "a mask of numbers": (lambda p: PrunedPrompt(p, torch.ones(5, 2)), r"bool tensor \[P, k\], got torch.float32"),
    "a mask of nothing": (lambda p: PrunedPrompt(p, torch.zeros(5, 2, dtype=torch.bool)), "5 with 0 kept"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(prompt, case):
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call(prompt)


def test_other_prompts_are_refused(make_model, gpt2, prompt):
    with pytest.raises(InputError, match=r"SoftPrompt \(fold other methods first\), got Prefix"):
        prune_tokens(Prefix(gpt2, 5), torch.ones(5), 2)
    with pytest.raises(InputError, match="rewind_to of the prompt's 5 virtual tokens, got 4"):
        prune_tokens(prompt, torch.ones(5), 2, rewind_to=SoftPrompt(gpt2, 4))
    with pytest.raises(InputError, match="expected hidden_size 32, got 16"):
        prune_tokens(prompt, torch.ones(5), 2, rewind_to=SoftPrompt(make_model("gpt2", hidden_size=16), 5))
    with pytest.raises(InputError, match="made from a trained prompt"):
        create("pruned_prompt", gpt2)
