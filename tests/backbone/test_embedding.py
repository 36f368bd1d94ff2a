"""Embeddings behind a prompt: the mean of what the stock model gives the text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformers import BertModel, PreTrainedTokenizerFast

import ptengine
from ptengine.backbone import is_patched, pack_rows, patched, text_embeddings
from ptengine.errors import InputError

from .stock import config, make, parameters, random_rows, relative, virtual

TEXTS = ["a b c d e f g", "c", "e e f", "b a"]


def encoder() -> Any:
    torch.manual_seed(0)
    return BertModel(config("bert")).eval().requires_grad_(False)


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefg"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def stock(model: Any, embeds: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    table = model.get_input_embeddings().weight
    found = []
    for row in rows:
        hidden = model(inputs_embeds=torch.cat([embeds, table[torch.tensor(row)]])[None]).last_hidden_state[0]
        found.append(normalize(hidden[len(embeds) :].mean(0), dim=0))
    return torch.stack(found)


def test_values_and_gradients() -> None:
    """fp32, three layers: rounding alone. Virtual tokens are not in the mean."""
    model, rows, prompt = encoder(), random_rows(5, 1, 9), virtual(4)
    exact = stock(model, prompt.embeds, rows)
    with patched(model):
        got = text_embeddings(model, prompt, pack_rows(rows))
    assert relative(got, exact) < 1e-5
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
    [ours], [theirs] = (torch.autograd.grad((x * weights).sum(), parameters(prompt)) for x in (got, exact))
    assert relative(ours, theirs) < 1e-5


@torch.no_grad()
def test_embed_gives_texts_in_their_order() -> None:
    """Batches are made by length; the order of the texts comes back, and the model is as it was."""
    model, tokens = encoder().train(), tokenizer()
    prompt = ptengine.SoftPrompt(model, 3)
    got = ptengine.embed(model, prompt, TEXTS, tokens, batch_size=2)
    assert model.training
    assert not is_patched(model)
    exact = stock(model.eval(), prompt.embeds, tokens(TEXTS)["input_ids"])
    assert relative(got, exact) < 1e-5
    torch.testing.assert_close(got.norm(dim=1), torch.ones(4))
    assert relative(ptengine.embed(model, prompt.lower(), TEXTS[1:], tokens), exact[1:]) < 1e-5
    plain = ptengine.embed(model, None, TEXTS, tokens)
    assert relative(plain, stock(model, prompt.embeds[:0], tokens(TEXTS)["input_ids"])) < 1e-5
    prefixed = ptengine.embed(model, ptengine.Prefix(model, 3), TEXTS, tokens)
    assert relative(prefixed, plain) > 1e-4
    cut = ptengine.embed(model, prompt, TEXTS, tokens, max_length=4, truncation=True)
    shorter = [[*row[:3], 2] if len(row) > 4 else row for row in tokens(TEXTS)["input_ids"]]
    assert relative(cut, stock(model, prompt.embeds, shorter)) < 1e-5


def test_a_mixture_embeds_without_the_noise_of_its_training() -> None:
    model, tokens = encoder(), tokenizer()
    mixture = ptengine.MixturePrompt(model, 3, num_experts=3).train()
    found = [ptengine.embed(model, mixture, TEXTS, tokens) for _ in range(2)]
    assert mixture.training
    assert torch.equal(*found)
    assert torch.equal(found[0], ptengine.embed(model, mixture.eval(), TEXTS, tokens))


def test_bad_inputs() -> None:
    model, tokens = encoder(), tokenizer()
    for texts in ("a", [], [3]):
        with pytest.raises(InputError, match="a list of at least one text"):
            ptengine.embed(model, None, texts, tokens)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"text 0 .*at most 4 tokens, got 9; truncation=True"):
        ptengine.embed(model, None, TEXTS, tokens, max_length=4)
    with pytest.raises(InputError, match="max_length of at most 61"):
        ptengine.embed(model, virtual(3), TEXTS, tokens, max_length=64)
    with pytest.raises(InputError, match="batch_size, a whole number"):
        ptengine.embed(model, None, TEXTS, tokens, batch_size=0)
    with pytest.raises(InputError, match="expected an encoder, got LlamaForCausalLM"):
        ptengine.embed(make("llama"), None, TEXTS, tokens)
    with patched(model), pytest.raises(InputError, match="empty row 1"):
        text_embeddings(model, None, pack_rows([[5], []]))


def test_what_is_no_prompt_had_no_attribute_facts() -> None:
    with pytest.raises(InputError, match="expected a ptengine prompt, got str"):
        ptengine.embed(encoder(), "my-prompt", TEXTS, tokenizer())  # type: ignore[arg-type]


def test_a_lowered_prompt_that_reads_the_text_was_taken_for_one_that_is_not_lowered() -> None:
    model, tokens = encoder(), tokenizer()
    prompt = ptengine.LoPAPrompt(model, 3).eval()
    assert torch.equal(
        ptengine.embed(model, prompt.lower(), TEXTS, tokens), ptengine.embed(model, prompt, TEXTS, tokens)
    )


def test_a_prompt_of_another_backbone_of_the_same_width() -> None:
    """Vectors and texts came out, and meant nothing."""
    torch.manual_seed(0)
    deeper = BertModel(config("bert", num_hidden_layers=4)).eval().requires_grad_(False)
    with pytest.raises(InputError, match="expected num_layers 3, got 4"):
        ptengine.embed(deeper, ptengine.SoftPrompt(encoder(), 3), TEXTS, tokenizer())
    other = make("llama", num_hidden_layers=4)
    with pytest.raises(InputError, match="expected num_layers 3, got 4"):
        ptengine.generate(other, ptengine.SoftPrompt(make("llama"), 3), random_rows(5), max_new_tokens=1)
