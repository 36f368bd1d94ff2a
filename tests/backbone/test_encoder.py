"""BERT: prefixes through the shared path and virtual tokens in the row, against BERT written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptengine.backbone import KeyValuePrefix, VirtualTokens, pack_padded, pack_rows, patched, sequence_logits
from ptengine.backbone.packing import join_batches
from ptengine.errors import InputError

from .stock import make, pad, parameters, prefix, random_rows, relative, virtual

LENGTHS = (5, 11, 1, 8)


def by_hand(model: Any, lowered: Any, ids: list[int], types: list[int] | None = None) -> Tensor:
    """Logits [C] of one row from BERT's weights and its paper alone; a prefix stands before the keys of every layer."""
    bert, c = model.bert, model.config
    size = 0 if lowered is None else lowered.num_virtual_tokens
    embeds = bert.embeddings.word_embeddings(torch.tensor(ids))  # [T, d]
    kinds = torch.zeros(len(ids), dtype=torch.int64) if types is None else torch.tensor(types)
    if isinstance(lowered, VirtualTokens):
        embeds, kinds = torch.cat([lowered.embeds, embeds]), torch.cat([torch.zeros(size, dtype=torch.int64), kinds])
    first = size if isinstance(lowered, KeyValuePrefix) else 0
    positions = first + torch.arange(len(embeds))
    x = embeds + bert.embeddings.position_embeddings(positions) + bert.embeddings.token_type_embeddings(kinds)
    x = bert.embeddings.LayerNorm(x)
    heads = c.num_attention_heads
    for index, layer in enumerate(bert.encoder.layer):
        own = layer.attention.self
        q, k, v = (
            f(x).unflatten(-1, (heads, -1)).transpose(0, 1) for f in (own.query, own.key, own.value)
        )  # [H, T, D]
        if isinstance(lowered, KeyValuePrefix):
            k = torch.cat([lowered.keys[index].transpose(0, 1), k], dim=1)
            v = torch.cat([lowered.values[index].transpose(0, 1), v], dim=1)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        out = layer.attention.output
        x = out.LayerNorm(x + out.dense((weights @ v).transpose(0, 1).flatten(1)))
        x = layer.output.LayerNorm(x + layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(x))))
    cls = x[size if isinstance(lowered, VirtualTokens) else 0]  # [CLS], not the first virtual token
    return model.classifier(torch.tanh(bert.pooler.dense(cls)))


def lowered(model: Any, kind: str, seed: int = 0, size: int = 6) -> Any:
    return {"soft": lambda: virtual(size, seed), "prefix": lambda: prefix(model, size, seed), "none": lambda: None}[
        kind
    ]()


@pytest.mark.parametrize("kind", ["soft", "prefix", "none"])
def test_equals_bert_by_hand(kind: str) -> None:
    model, rows = make("bert"), random_rows(*LENGTHS)
    prompt = lowered(model, kind)
    exact = torch.stack([by_hand(model, prompt, row) for row in rows])
    with patched(model):
        results = [sequence_logits(model, prompt, pack_rows(rows))]
        results += [sequence_logits(model, prompt, pack_padded(*pad(rows, side))) for side in ("left", "right")]
    for got in results:
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), parameters(prompt), retain_graph=True)
                                  for x in (got, exact)), strict=True) if prompt else ():  # fmt: skip
            assert relative(ours, theirs) < 1e-5


def test_without_a_prompt_equals_the_stock_call() -> None:
    model, rows = make("bert"), random_rows(*LENGTHS)
    ids, mask = pad(rows, "right")
    exact = model(ids, attention_mask=mask).logits
    with patched(model):
        torch.testing.assert_close(sequence_logits(model, None, pack_rows(rows)), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_several_prompts_and_token_types(kind: str) -> None:
    model, rows = make("bert"), random_rows(*LENGTHS)
    types = [[i % 2 for i in range(len(row))] for row in rows]
    prompts = [lowered(model, kind, seed, size) for seed, size in enumerate((6, 2, 1))]
    ids = [2, 0, -1, 0]
    exact = [by_hand(model, None if n < 0 else prompts[n], row, kinds)
             for n, row, kinds in zip(ids, rows, types, strict=True)]  # fmt: skip
    with patched(model):
        got = sequence_logits(model, prompts, pack_rows(rows, token_type_ids=types), prompt_ids=ids)
    torch.testing.assert_close(got, torch.stack(exact), rtol=1e-5, atol=1e-5)
    trained = parameters(prompts[0]) + parameters(prompts[2])
    pairs = (torch.autograd.grad(x.square().sum(), trained) for x in (got, torch.stack(exact)))
    for ours, theirs in zip(*pairs, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_rows_longer_together_than_the_positions() -> None:
    """Positions count within a row, not along the pack."""
    model, rows = make("bert"), random_rows(*[50] * 4)
    exact = torch.stack([by_hand(model, virtual(6), row) for row in rows])
    with patched(model):
        torch.testing.assert_close(sequence_logits(model, virtual(6), pack_rows(rows)), exact, rtol=1e-5, atol=1e-5)


def test_virtual_tokens_see_the_text() -> None:
    """Why they stand in every row: what [CLS] sees of the prompt depends on the words behind it."""
    model = make("bert")
    with patched(model), torch.no_grad():
        one, other = (sequence_logits(model, virtual(6), pack_rows([[5, 7, last]])) for last in (8, 9))
    assert (one - other).abs().max() > 1e-3


def test_gradient_checkpointing() -> None:
    model, rows = make("bert"), random_rows(*LENGTHS)
    for kind in ("soft", "prefix"):
        prompt = lowered(model, kind)
        with patched(model):
            plain = torch.autograd.grad(sequence_logits(model, prompt, pack_rows(rows)).sum(), parameters(prompt))
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for module in model.modules():
                module.training = type(module).__name__ == "BertLayer"
            again = torch.autograd.grad(sequence_logits(model, prompt, pack_rows(rows)).sum(), parameters(prompt))
            model.gradient_checkpointing_disable()
        for got, exact in zip(again, plain, strict=True):
            assert torch.equal(got, exact)
        model.eval()


def test_head_learns_and_the_encoder_does_not() -> None:
    model = make("bert")
    model.classifier.requires_grad_(True)
    prompt = virtual(6)
    with patched(model):
        sequence_logits(model, prompt, pack_rows(random_rows(*LENGTHS))).sum().backward()
    assert prompt.embeds.grad is not None
    assert {name for name, x in model.named_parameters() if x.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_joined_batches_keep_their_segments() -> None:
    """Without them prompts of pairs that train at once would read both texts as one segment."""
    one = pack_rows([[5, 6], [7]], token_type_ids=[[0, 1], [1]])
    joined = join_batches([one, pack_rows([[8, 9]]), one])
    assert joined.token_type_ids is not None
    assert joined.token_type_ids.tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    assert joined.labels is None
    assert join_batches([pack_rows([[8]]), pack_rows([[9]])]).token_type_ids is None
    with pytest.raises(InputError, match="expected batches with labels, got 1 without"):
        join_batches([one, pack_rows([[5]], [[5]])])
