"""The distillation of a text into a prompt, against the stock computation in fp64."""

from __future__ import annotations

import pytest
import torch

import ptengine
from ptengine.backbone.packing import pack_rows
from ptengine.errors import InputError
from ptengine.prompts import Cartridge, SoftPrompt
from ptengine.training import context_distillation_loss, text_prefix

from . import tiny

TEXT = "the film was very good it was a lovely walk the song was dull"
ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
LABELS = [[-100, -100, 7, 8], [-100, 10], [-100, 12, -100]]


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    made = tiny.gpt2(dropout=0.0) if request.param == "gpt2" else tiny.llama()
    with ptengine.patched(made.eval().requires_grad_(False)) as patched:
        yield patched


def ids_of(text=TEXT):
    return tiny.tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("top_k", [1, 3, tiny.SIZE])
def test_the_loss_is_the_divergence_over_the_teachers_best_tokens(model, top_k):
    cartridge = Cartridge(model, 4, text=TEXT, tokenizer=tiny.tokenizer())
    loss = context_distillation_loss(
        model, cartridge, pack_rows(ROWS, labels=LABELS), text_prefix(model, ids_of()), top_k=top_k
    )
    loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in cartridge.parameters())

    ptengine.unpatch(model)
    exact = model.double()
    terms = []
    for ids, labels in zip(ROWS, LABELS, strict=True):
        at = [i - 1 for i, label in enumerate(labels) if label != -100]
        behind = [exact(torch.tensor([start + ids])).logits[0, len(start) :][at].log_softmax(-1)
                  for start in (ids_of(), ids_of()[:4])]  # fmt: skip
        for p, q in zip(*behind, strict=True):
            best = p.argsort(descending=True)[:top_k]
            terms.append((p[best].exp() * (p[best] - q[best])).sum())
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)


def test_a_cartridge_of_the_whole_text_has_nothing_to_learn(model):
    cartridge = Cartridge(model, len(ids_of()), text=TEXT, tokenizer=tiny.tokenizer())
    batch = pack_rows(ROWS, labels=LABELS)
    loss = context_distillation_loss(model, cartridge, batch, text_prefix(model, ids_of()), top_k=tiny.SIZE)
    assert abs(loss.item()) < 1e-6


def test_steps_on_it_bring_a_cartridge_closer_to_the_text(model):
    cartridge = Cartridge(model, 4, text=TEXT, tokenizer=tiny.tokenizer())
    teacher, batch, losses = text_prefix(model, ids_of()), pack_rows(ROWS, labels=LABELS), []
    optimizer = torch.optim.AdamW(cartridge.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(25):
        optimizer.zero_grad()
        loss = context_distillation_loss(model, cartridge, batch, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_is_one_clear_error(model):
    cartridge, teacher = Cartridge(model, 4, text=TEXT, tokenizer=tiny.tokenizer()), text_prefix(model, ids_of())
    batch = pack_rows(ROWS, labels=LABELS)
    for top_k in (0, tiny.SIZE + 1, 2.5, True):
        with pytest.raises(InputError, match=f"top_k, a whole number from 1 to {tiny.SIZE}"):
            context_distillation_loss(model, cartridge, batch, teacher, top_k=top_k)
    first = pack_rows(ROWS, labels=[[5, -100, 7, 8], *LABELS[1:]])
    with pytest.raises(InputError, match="no label at a row's first token"):
        context_distillation_loss(model, SoftPrompt(model, 4), first, teacher)
    for ids in ([], [-1], [tiny.SIZE]):
        with pytest.raises(InputError, match="token ids from 0"):
            text_prefix(model, ids)
    with pytest.raises(InputError, match="at most 48 positions"):
        text_prefix(model, [5] * 49)
