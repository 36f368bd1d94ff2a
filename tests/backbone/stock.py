"""Tiny random backbones, and what the stock model computes for one row at a time, without padding or packing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ptengine.backbone import KeyValuePrefix, VirtualTokens

CAUSAL = ("gpt2", "llama", "qwen3")
VOCABULARY, WIDTH, LAYERS, POSITIONS = 97, 48, 3, 64
HIDE = -100

Rows = Sequence[Sequence[int]]
Lowered = VirtualTokens | KeyValuePrefix | None


def config(family: str, **changes: Any) -> Any:
    """Weights large enough for attention to choose among keys, and for a prompt to matter."""
    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        size = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
        return GPT2Config(**(common | size | changes))
    size = {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    if family == "bert":
        return BertConfig(**(common | size | {"num_labels": 3} | changes))
    if family == "llama":
        return LlamaConfig(**(common | size | {"num_key_value_heads": 2} | changes))
    return Qwen3Config(**(common | size | {"num_key_value_heads": 2, "head_dim": 16} | changes))


def make(family: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    classes = {
        "gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM,
        "bert": BertForSequenceClassification,
    }  # fmt: skip
    return classes[family](config(family, **changes)).eval().requires_grad_(False)


def stories(shared: Path) -> tuple[Any, Any]:
    """The real small model and its tokenizer."""
    folder = shared / "models" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def real_rows(shared: Path, tokenizer: Any, count: int, longest: int = 40) -> list[list[int]]:
    """Token ids of real sentences."""
    with open(shared / "data" / "sst2" / "validation.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(count)]
    return [tokenizer(text)["input_ids"][:longest] for text in texts]


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def virtual(size: int, seed: int = 0, width: int = WIDTH) -> VirtualTokens:
    """In the scale of the tiny models' word embeddings."""
    generator = torch.Generator().manual_seed(100 + seed)
    return VirtualTokens((0.2 * torch.randn(size, width, generator=generator)).requires_grad_())


def prefix(model: Any, size: int, seed: int = 0) -> KeyValuePrefix:
    c = model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    generator = torch.Generator().manual_seed(200 + seed)
    keys, values = (torch.randn(c.num_hidden_layers, size, heads, dim, generator=generator) for _ in range(2))
    return KeyValuePrefix(keys.requires_grad_(), values.requires_grad_())


def parameters(lowered: Lowered) -> list[Tensor]:
    if lowered is None:
        return []
    return [lowered.embeds] if isinstance(lowered, VirtualTokens) else [lowered.keys, lowered.values]


def stock_logits(model: Any, lowered: Lowered, ids: Sequence[int]) -> Tensor:
    """Logits [P + T, V] of one row behind its prompt; a prefix has none of its own: [T, V] then."""
    tokens = torch.tensor(ids, dtype=torch.int64)[None]  # [1, T]
    if isinstance(lowered, KeyValuePrefix):
        size = lowered.num_virtual_tokens
        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(lowered.keys, lowered.values, strict=True)):
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)  # [1, H_kv, P, D]
        positions = size + torch.arange(len(ids))[None]
        mask = torch.ones(1, size + len(ids), dtype=torch.int64)
        return model(tokens, past_key_values=cache, position_ids=positions, attention_mask=mask).logits[0]
    embeds = model.get_input_embeddings()(tokens)
    if lowered is not None:
        embeds = torch.cat([lowered.embeds[None].to(embeds.dtype), embeds], dim=1)
    return model(inputs_embeds=embeds).logits[0]


def stock_losses(model: Any, lowered: Lowered, ids: Sequence[int], labels: Sequence[int]) -> list[Tensor]:
    """The loss of every label of one row that something predicts, in order."""
    logits = stock_logits(model, lowered, ids)
    first = len(logits) - len(ids)  # where the text starts
    return [
        cross_entropy(logits[first + i - 1], torch.tensor(label))
        for i, label in enumerate(labels)
        if label != HIDE and first + i > 0
    ]


def stock_loss(model: Any, prompts: Sequence[Lowered], rows: Rows, labels: Rows) -> Tensor:
    """The mean over the labels of rows that run alone."""
    losses = [
        loss
        for lowered, ids, wanted in zip(prompts, rows, labels, strict=True)
        if ids
        for loss in stock_losses(model, lowered, ids, wanted)
    ]
    return torch.stack(losses).mean()


def pad(rows: Rows, side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as a stock batch [B, T] and its attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for target, kept, row in zip(ids, mask, rows, strict=True):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        target[place], kept[place] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask


def relative(got: Tensor, exact: Tensor) -> float:
    """The distance of two tensors, relative to the second."""
    return ((got - exact).norm() / exact.norm()).item()
