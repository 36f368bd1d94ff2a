"""MPT's loss: every row behind the prompt of its task, and what teachers add, against the stock computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ptengine
from ptengine.backbone.packing import pack_rows
from ptengine.errors import InputError
from ptengine.prompts import MultitaskPrompt, SoftPrompt
from ptengine.training import multitask_loss

from . import tiny

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
LABELS = [[-100, -100, 7, 8], [-100, 10], [11, -100, 13]]
TASKS = [1, 0, 1]


@pytest.fixture
def model():
    with ptengine.patched(tiny.gpt2(dropout=0.0).eval().requires_grad_(False)) as patched:
        yield patched


def stock(model, prompts):
    """Last hidden states and logits behind the labels of every row, each behind its own prompt, in fp64."""
    hidden, labels = [], []
    for ids, wanted, task in zip(ROWS, LABELS, TASKS, strict=True):
        embeds = torch.cat([prompts[task].double(), model.get_input_embeddings()(torch.tensor(ids))])
        out = model.transformer(inputs_embeds=embeds[None]).last_hidden_state[0]
        at = [i for i, label in enumerate(wanted) if label != -100]
        hidden.append(out[[len(prompts[task]) + i - 1 for i in at]])
        labels += [wanted[i] for i in at]
    hidden = torch.cat(hidden)
    return hidden, model.lm_head(hidden), torch.tensor(labels)


@pytest.mark.parametrize("weight", [None, 0.0, 0.9])
def test_the_loss_and_its_gradient_are_those_of_the_formula(model, weight):
    prompt = MultitaskPrompt(model, 4, num_tasks=2, vector_init="ones")
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    teachers = [SoftPrompt(model, 4, seed=1), SoftPrompt(model, 3, seed=2)]
    given = {} if weight is None else {"teachers": teachers, "distillation_weight": weight}
    batch = pack_rows(ROWS, labels=LABELS)
    loss = multitask_loss(model, prompt, batch, TASKS, **given)
    loss.backward()
    assert all(teacher.embeds.grad is None for teacher in teachers)

    ptengine.unpatch(model)
    exact = tiny.gpt2(dropout=0.0).eval().double()
    copies = {name: p.detach().double().requires_grad_() for name, p in prompt.named_parameters()}
    prompts = [copies["shared"] * (copies["columns"][k] @ copies["rows"][k]) for k in range(2)]
    hidden, logits, labels = stock(exact, prompts)
    wanted = F.cross_entropy(logits, labels)
    if weight is not None:
        target_hidden, target, _ = stock(exact, [teacher.embeds.detach() for teacher in teachers])
        p, q = target.log_softmax(-1), logits.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        wanted = wanted + weight * (kl + (hidden - target_hidden).square().mean())
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    for name, parameter in prompt.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), copies[name].grad, rtol=1e-3, atol=1e-5)


def test_steps_on_it_teach_every_task(model):
    prompt = MultitaskPrompt(model, 4, num_tasks=2, vector_init="ones")
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=prompt.default_learning_rate())
    batch, losses = pack_rows(ROWS, labels=LABELS), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = multitask_loss(model, prompt, batch, TASKS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_bad_input_is_one_clear_error(model):
    prompt, batch = MultitaskPrompt(model, 4, num_tasks=2), pack_rows(ROWS, labels=LABELS)
    with pytest.raises(InputError, match="one teacher for each of 2 tasks, got 1"):
        multitask_loss(model, prompt, batch, TASKS, teachers=[SoftPrompt(model, 4)])
    with pytest.raises(InputError, match="distillation_weight of at least 0, got -1"):
        multitask_loss(model, prompt, batch, TASKS, distillation_weight=-1)
    with pytest.raises(InputError, match="prompt_ids"):
        multitask_loss(model, prompt, batch, [0, 1, 2])
