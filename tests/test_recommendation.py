"""The advisor: its rules, and that what it names can be made and trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import ptengine
from ptengine import recommendation
from ptengine.data import (
    ClassificationTask,
    GenerationTask,
    Seq2SeqClassificationTask,
    Seq2SeqTask,
    SequenceClassificationTask,
    Template,
    Verbalizer,
)
from ptengine.errors import InputError
from ptengine.prompts import Prefix, SoftPrompt, create
from ptengine.recommendation import recommend

WORDS = ClassificationTask(Template("{text} is"), Verbalizer({"pos": [" good", " fine"], "neg": " bad"}))
TEXTS = GenerationTask(Template("{text}"))
HEAD = SequenceClassificationTask(labels=("pos", "neg"))


def gpt2(positions: int = 128) -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=positions)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=2)
    return BertForSequenceClassification(config).eval()


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [3 + len(word) for word in text.split()]}


tokenizer.all_special_ids = []  # type: ignore[attr-defined]

CASES = {
    "few rows": (gpt2, WORDS, 32, "soft_prompt", 10, 300),
    "few rows, one less": (gpt2, WORDS, 199, "soft_prompt", 10, 300),
    "enough rows": (gpt2, WORDS, 200, "prefix", 20, 300),
    "more rows": (gpt2, WORDS, 801, "prefix", 20, 404),
    "very many rows": (gpt2, WORDS, 10**6, "prefix", 20, 30_000),
    "texts": (gpt2, TEXTS, 32, "prefix", 10, 300),
    "a head": (bert, HEAD, 600, "prefix", 20, 300),
    "a short model": (lambda: gpt2(positions=20), WORDS, 600, "prefix", 5, 300),
}


@pytest.mark.parametrize(("family", "method"), [("t5", "prefix"), ("longt5", "soft_prompt")])
def test_an_encoder_decoder_that_takes_no_prefix_gets_virtual_tokens(family, method):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, vocab_size=61, **sizes)).eval()
    found = recommend(model, Seq2SeqTask(Template("{text}")), 32)
    words = recommend(model, Seq2SeqClassificationTask(Template("{text}"), WORDS.verbalizer), 32)
    assert (words.method, words.options["class_labels"]) == ("soft_prompt", [" good", " bad"])
    assert found.method == method
    prompt = create(found.method, model, tokenizer=tokenizer, **found.options)
    assert ptengine.generate(model, prompt, [[5, 6], [7]], max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("case", CASES)
def test_the_rules_name_what_can_be_made(case):
    make, task, rows, method, count, steps = CASES[case]
    model = make()
    found = ptengine.recommend(model, task, rows)
    assert (found.method, found.num_virtual_tokens, found.max_steps) == (method, count, steps)
    prompt = create(found.method, model, tokenizer=tokenizer, **found.options)
    assert prompt.num_virtual_tokens == count
    assert found.learning_rate == prompt.default_learning_rate()
    assert {reason.choice for reason in found.reasons} == {
        "method", "num_virtual_tokens", "options", "learning_rate", "max_steps",
    }  # fmt: skip
    assert all(reason.text and reason.source for reason in found.reasons)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{method}, {count} virtual tokens")
    assert len(lines) == 1 + len(found.reasons)


def test_a_large_model_gets_virtual_tokens_however_many_rows(monkeypatch):
    model = gpt2()
    monkeypatch.setattr(recommendation, "_LARGE", sum(p.numel() for p in model.parameters()))
    assert recommend(model, WORDS, 5000).method == "soft_prompt"
    assert recommend(model, WORDS, 5000).num_virtual_tokens == 20
    monkeypatch.setattr(recommendation, "_LARGE", recommendation._LARGE + 1)
    assert recommend(model, WORDS, 5000).method == "prefix"


def test_a_soft_prompt_starts_at_the_first_word_of_every_label():
    found = recommend(gpt2(), WORDS, 32)
    assert found.options == {"num_virtual_tokens": 10, "init": "class_labels", "class_labels": [" good", " bad"]}


def test_a_model_that_no_prefix_fits_gets_virtual_tokens(monkeypatch):
    model = gpt2()
    spec = replace(recommendation.backbone_spec(model), value_dim=3)
    monkeypatch.setattr(recommendation, "backbone_spec", lambda _: spec)
    found = recommend(model, TEXTS, 500)
    assert (found.method, found.options["init"]) == ("soft_prompt", "sampled_vocab")


def test_the_rate_follows_the_embeddings():
    model = gpt2()
    before = recommend(model, WORDS, 32).learning_rate
    with torch.no_grad():
        model.get_input_embeddings().weight *= 10
    assert recommend(model, WORDS, 32).learning_rate == pytest.approx(10 * before)
    assert recommend(model, WORDS, 500).learning_rate == Prefix(model, 3).default_learning_rate()
    assert recommend(model, WORDS, 32).learning_rate == SoftPrompt(model, 3).default_learning_rate()


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (WORDS, 0, "n_examples, a whole number of at least 1, got 0"),
        (WORDS, True, "n_examples.*got True"),
        (WORDS, 2.5, r"n_examples.*got 2\.5"),
        ("sms_spam", 32, "a task of ptengine.data, got str"),
        (HEAD, 32, "a task for causal models with model type 'gpt2', got SequenceClassificationTask"),
    ],
)
def test_bad_input_is_one_clear_error(task, rows, message):
    with pytest.raises(InputError, match=message):
        recommend(gpt2(), task, rows)
