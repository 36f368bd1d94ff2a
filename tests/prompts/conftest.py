"""Tiny random backbones and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3}
WORDS = ["<s>", "</s>", "<pad>", "is", "this", "review", "good", "or", "bad", "very", "positive", "negative"]


def _make(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    size = {"vocab_size": 61, "hidden_size": 32} | changes
    if family == "gpt2":
        size["n_embd"] = size.pop("hidden_size")
        return GPT2LMHeadModel(GPT2Config(**({"n_layer": 2, "n_head": 4, "n_positions": 64} | ids | size))).eval()
    size = {"max_position_embeddings": 64} | size
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**(GQA | ids | size))).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**({"head_dim": 16} | GQA | ids | size))).eval()
    bert = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**(bert | ids | size))).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A fresh random model: make_model(family, **changes of its configuration)."""
    return _make


@pytest.fixture(params=["gpt2", "llama", "qwen3", "bert"])
def model(request: pytest.FixtureRequest) -> Any:
    return _make(request.param)


@pytest.fixture
def gpt2() -> Any:
    return _make("gpt2")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Whole words; ids below 61; <s> goes before every text."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
