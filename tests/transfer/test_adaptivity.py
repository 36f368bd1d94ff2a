"""Adaptivity: losses against the stock model, and prompts made of known words found again."""

from __future__ import annotations

import copy
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM

from ptengine.data import Template
from ptengine.errors import InputError
from ptengine.prompts import MixturePrompt, SoftPrompt
from ptengine.transfer import prompt_adaptivity

TEMPLATE = Template("the {text} it was")


@torch.no_grad()
def stock_losses(model: Any, prompt: Any, ids: list[int]) -> list[float]:
    """-log p of every token but the first."""
    text = model.get_input_embeddings()(torch.tensor(ids))
    embeds = text if prompt is None else torch.cat([prompt.embeds, text])
    logits = model(inputs_embeds=embeds[None]).logits[0, -len(ids) : -1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


def test_a_mixture_is_scored_without_the_noise_of_its_training(tiny: ModuleType) -> None:
    model, texts = tiny.gpt2().eval(), [row["text"] for row in tiny.rows(10, 2)]
    mixture = MixturePrompt(model, 4, num_experts=3, seed=1).train()
    found = [
        prompt_adaptivity(model, tiny.tokenizer(), TEMPLATE, texts, {"own": prompt})["own"]
        for prompt in (mixture, mixture, copy.deepcopy(mixture).eval())
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_are_those_of_the_stock_model(tiny: ModuleType, kind: str) -> None:
    model, tokens = getattr(tiny, kind)().eval(), tiny.tokenizer()
    prompt, texts = tiny.soft(model, 1), [row["text"] for row in tiny.rows(40, 2)]
    found = prompt_adaptivity(model, tokens, TEMPLATE, texts, {"own": prompt, "none": None})
    for name, one in (("own", prompt), ("none", None)):
        losses = [loss for text in texts for loss in stock_losses(model, one, tokens(text)["input_ids"])]
        assert found[name].text_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        fixed = stock_losses(model, one, tokens("the it was")["input_ids"])
        assert found[name].template_perplexity == pytest.approx(math.exp(sum(fixed) / len(fixed)), rel=1e-5)
    assert found["own"].num_virtual_tokens == 4
    assert (found["none"].token_distance, found["none"].num_virtual_tokens) == (None, 0)
    assert found["own"].term_coverage is None  # nothing to stand out from


def test_a_template_that_begins_with_the_bos_was_scored_with_two(tiny: ModuleType) -> None:
    model, tokens, texts = tiny.gpt2().eval(), tiny.tokenizer(special=True), [row["text"] for row in tiny.rows(5, 2)]
    tokens.add_special_tokens({"bos_token": "[CLS]"})
    assert tokens("[CLS] the", add_special_tokens=False)["input_ids"] == tokens("the")["input_ids"][:-1]
    plain, chat = (
        prompt_adaptivity(model, tokens, Template(text), texts, {"none": None})["none"].template_perplexity
        for text in ("the {text} it was", "[CLS] the {text} it was")
    )
    assert plain is not None
    assert chat == plain


@torch.no_grad()
def test_a_masked_language_model_reads_a_text_seven_times(tiny: ModuleType) -> None:
    """Every token is hidden once, with those seven, fourteen, .. tokens from it; the stock model says what it costs."""
    model, tokens = tiny.bert(BertForMaskedLM).eval(), tiny.tokenizer(special=True)
    prompt, text = tiny.soft(model, 1), "film song meal room walk talk game film book"
    ids = tokens(text)["input_ids"]  # [CLS] nine words [SEP]
    losses = []
    for first in range(7):
        hidden = [at for at in range(1, 10) if (at - 1) % 7 == first]
        seen = torch.tensor([tokens.mask_token_id if at in hidden else token for at, token in enumerate(ids)])
        row = torch.cat([prompt.embeds, model.get_input_embeddings()(seen)])
        logits = model(inputs_embeds=row[None]).logits[0, 4:]
        losses += [F.cross_entropy(logits[at], torch.tensor(ids[at])).item() for at in hidden]
    assert len(losses) == 9
    found = prompt_adaptivity(model, tokens, Template("{text} it was {mask}"), [text], {"it": prompt})["it"]
    assert found.text_loss == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert found.template_perplexity is not None
    bare = prompt_adaptivity(model, tokens, Template("{text}{mask}"), [text], {"it": None})["it"]
    assert bare.template_perplexity is None
    with pytest.raises(InputError, match=r"a tokenizer with a mask token, got .* without one"):
        prompt_adaptivity(model, tiny.tokenizer(), Template("{text}"), [text], {"it": None})


def test_a_prompt_of_words_is_found_among_them(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptengine.transfer.adaptivity.NEAREST", 1)
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    texts, background = ["film film song", "song film great"], ["meal room walk", "meal great walk", "room"]

    def scores(*words: str, scale: float = 1.0) -> Any:
        rows = scale * model.get_input_embeddings().weight[[tokens(word)["input_ids"][0] for word in words]].detach()
        prompt = SoftPrompt(model, init="array", array=rows)
        return prompt_adaptivity(model, tokens, TEMPLATE, texts, {"it": prompt}, background=background)["it"]

    # Two words stand in the texts twice, film and song; great does once.
    assert [scores(*words).term_coverage for words in (("film", "song"), ("film", "room"), ("meal",))] == [1, 0.5, 0]
    table = model.get_input_embeddings().weight.detach()
    length = table[tokens("film")["input_ids"][0]].norm() / table.norm(dim=1).mean()
    assert scores("film").norm_ratio == pytest.approx(length.item(), rel=1e-5)
    assert scores("film", scale=3.0).norm_ratio == pytest.approx(3 * length.item(), rel=1e-5)
    assert scores("film", scale=3.0).token_distance == pytest.approx(0, abs=1e-6)


def test_the_distance_is_to_the_nearest_word_alone(tiny: ModuleType) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    table = model.get_input_embeddings().weight.detach()
    away = SoftPrompt(model, init="array", array=torch.randn(4, 16, generator=torch.Generator().manual_seed(3)))
    far = prompt_adaptivity(model, tokens, TEMPLATE, ["film song"], {"it": away})["it"]
    cosines = F.normalize(away.embeds, dim=1) @ F.normalize(table, dim=1).T
    assert far.token_distance == pytest.approx(1 - cosines.max(dim=1).values.mean().item(), abs=1e-6)


def test_what_cannot_be_said_is_left_open(tiny: ModuleType) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    asked = (model, tokens, TEMPLATE)
    found = prompt_adaptivity(*asked, ["film song"], {"deep": tiny.prefix(model)}, background=["room"])["deep"]
    assert (found.term_coverage, found.token_distance, found.norm_ratio) == (None, None, None)
    assert found.text_loss > 0
    # No word stands in the target twice.
    assert (
        prompt_adaptivity(*asked, ["film song"], {"it": tiny.soft(model)}, background=["room"])["it"].term_coverage
        is None
    )
    bare = prompt_adaptivity(model, tokens, Template("{text}"), ["film song"], {"it": None})["it"]
    assert bare.template_perplexity is None
    with pytest.raises(InputError, match="at least two tokens"):
        prompt_adaptivity(*asked, ["film"], {"it": None})
    with pytest.raises(InputError, match="another backbone"):
        prompt_adaptivity(*asked, ["film song"], {"it": tiny.soft(tiny.llama())})
    with pytest.raises(InputError, match="a language-modelling head"):
        prompt_adaptivity(tiny.bert(), tokens, TEMPLATE, ["film song"], {})


def test_an_encoder_decoder_gives_texts_no_likelihood(tiny: ModuleType) -> None:
    """Its prompts still have a form."""
    model = tiny.t5(dropout=0.0)
    prompts = {"none": None, "soft": tiny.soft(model)}
    found = prompt_adaptivity(model, tiny.tokenizer(), Template("{text} it was"), ["film song", "book"], prompts)
    assert {name: (scores.text_loss, scores.template_perplexity) for name, scores in found.items()} == {
        "none": (None, None), "soft": (None, None)
    }  # fmt: skip
    assert found["soft"].norm_ratio is not None
    assert found["soft"].norm_ratio > 0
