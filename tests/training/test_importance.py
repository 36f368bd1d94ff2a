"""XPrompt's scores against a mask that is really multiplied in, row by row, in fp64."""

from __future__ import annotations

import pytest
import torch

from ptengine.backbone.packing import pack_rows
from ptengine.errors import InputError
from ptengine.prompts import DecomposedPrompt, Prefix, SoftPrompt
from ptengine.training import prompt_importance

from . import tiny

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
LABELS = [[-100, -100, 7, 8], [-100, 10], [11, -100, 13]]


def literal(model, embeds, pieces, offsets=None):
    """E_x |dL/dg| with the stock model in fp64, one row and one factor mask at a time."""
    model = model.double().eval()
    tokens, parts = torch.zeros(len(embeds)).double(), torch.zeros(len(embeds), pieces).double()
    for ids, labels in zip(ROWS, LABELS, strict=True):
        gamma = torch.ones(len(embeds), dtype=torch.float64, requires_grad=True)
        zeta = torch.ones(len(embeds), pieces, dtype=torch.float64, requires_grad=True)
        masked = embeds.double() * gamma[:, None] * zeta.repeat_interleave(embeds.shape[1] // pieces, dim=1)
        text = model.get_input_embeddings()(torch.tensor(ids))
        if offsets is not None:
            text = text + offsets.double()[: len(ids)]
        logits = model(inputs_embeds=torch.cat([masked, text])[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[len(embeds) - 1 : -1], torch.tensor(labels))
        by_token, by_piece = torch.autograd.grad(loss, [gamma, zeta])
        tokens += by_token.abs()
        parts += by_piece.abs()
    return tokens / len(ROWS), parts / len(ROWS)


def test_scores_are_those_of_a_mask(monkeypatch):
    model = tiny.gpt2()
    prompt = SoftPrompt(model, 4)
    batches = [pack_rows(ROWS[:2], labels=LABELS[:2]), pack_rows(ROWS[2:], labels=LABELS[2:])]
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = prompt.embeds.detach().clone()
    found = prompt_importance(model, prompt, batches, num_pieces=8)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert torch.equal(prompt.embeds, before)
    assert prompt.embeds.grad is None
    tokens, pieces = literal(model, before, 8)
    torch.testing.assert_close(found.tokens.double(), tokens, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.pieces.double(), pieces, rtol=1e-4, atol=1e-7)


def test_offsets_of_the_text_were_left_out():
    """DePT's second part changes what the text says, and with it what the virtual tokens matter."""
    model = tiny.gpt2()
    prompt = DecomposedPrompt(model, 4)
    torch.nn.init.normal_(prompt.right)
    batches = [pack_rows(ROWS, labels=LABELS)]
    found = prompt_importance(model, prompt, batches, num_pieces=8)
    lowered = prompt.lower()
    tokens, pieces = literal(model, lowered.embeds.detach(), 8, lowered.input_offsets.detach())
    torch.testing.assert_close(found.tokens.double(), tokens, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.pieces.double(), pieces, rtol=1e-4, atol=1e-7)


BAD = {
    "a prefix": (lambda m: (Prefix(m, 4), [pack_rows(ROWS, labels=LABELS)], 4), "got the prefix of Prefix"),
    "no prompt": (lambda m: (None, [], 4), "a ptengine prompt, got NoneType"),
    "no rows": (lambda m: (SoftPrompt(m, 4), [], 4), "at least one row"),
    "odd pieces": (lambda m: (SoftPrompt(m, 4), [], 3), "divides the model's width 16, got 3"),
    "another model": (lambda m: (SoftPrompt(tiny.llama(), 4), [], 4), "expected model_type 'llama', got 'gpt2'"),
    "a row without labels": (
        lambda m: (SoftPrompt(m, 4), [pack_rows(ROWS[:2], labels=[LABELS[0], [-100, -100]])], 4),
        "a label in every row, got none in row 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case):
    make, message = BAD[case]
    model = tiny.gpt2()
    prompt, batches, pieces = make(model)
    with pytest.raises(InputError, match=message):
        prompt_importance(model, prompt, batches, pieces)
