"""What the packed step refuses: one clear error each, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptengine.backbone import (
    KeyValuePrefix,
    VirtualTokens,
    capture_prefix,
    generate,
    label_hidden,
    label_log_probs,
    pack_padded,
    pack_rows,
    packed_loss,
    patch,
    patched,
    sequence_logits,
)
from ptengine.errors import InputError

from .stock import HIDE, LAYERS, POSITIONS, WIDTH, make, prefix, random_rows, virtual

ROWS = random_rows(5, 9)
BATCH = pack_rows(ROWS, ROWS)


def pair(*shape: int) -> KeyValuePrefix:
    return KeyValuePrefix(torch.zeros(shape), torch.zeros(shape))


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no labels": (lambda m: packed_loss(m, virtual(3), pack_rows(ROWS)), "a batch with labels, got none"),
    "no label at all": (
        lambda m: packed_loss(m, virtual(3), pack_rows([[5, 6]], [[HIDE, HIDE]])), "at least one label"
    ),
    "only a label that nothing predicts": (
        lambda m: packed_loss(m, None, pack_rows([[5, 6]], [[5, HIDE]])), "at least one label"
    ),
    "only first labels behind a prefix": (
        lambda m: packed_loss(m, prefix(m, 3), pack_rows([[5], [7]], [[5], [7]])), "at least one label"
    ),
    "only empty rows": (lambda m: packed_loss(m, virtual(3), pack_rows([[], []], [[], []])), "at least one label"),
    "width of a soft prompt": (
        lambda m: packed_loss(m, virtual(3, width=WIDTH + 1), BATCH), f"width {WIDTH}, got {WIDTH + 1}"
    ),
    "layers of a prefix": (
        lambda m: packed_loss(m, pair(LAYERS + 1, 3, 2, 12), BATCH), f"keys of {LAYERS} layers .* got {LAYERS + 1} with"
    ),
    "heads of a prefix": (
        lambda m: packed_loss(m, pair(LAYERS, 3, 4, 12), BATCH), "2 key-value heads of 12, got 3 with 4 of 12"
    ),
    "head width of a prefix": (lambda m: packed_loss(m, pair(LAYERS, 3, 2, 13), BATCH), "got 3 with 2 of 13"),
    "head width of its values": (
        lambda m: packed_loss(m, KeyValuePrefix(torch.zeros(LAYERS, 3, 2, 12), torch.zeros(LAYERS, 3, 2, 13)), BATCH),
        "prefix values .* got 3 with 2 of 13",
    ),
    "axes of a soft prompt": (lambda m: VirtualTokens(torch.zeros(1, 3, WIDTH)), r"shape \[P, d\], got \[1, 3, 48\]"),
    "axes of a prefix": (lambda m: pair(3, 2, 12), r"\[L, P, H_kv, D\]"),
    "keys and values of two lengths": (
        lambda m: KeyValuePrefix(torch.zeros(3, 4, 2, 12), torch.zeros(3, 5, 2, 12)), r"got \[3, 4, 2, 12\] and"
    ),
    "row beyond the positions": (
        lambda m: packed_loss(m, virtual(4), pack_rows([[5] * 60, [5] * 61], [[5] * 60, [5] * 61])),
        f"row 1: expected at most {POSITIONS} positions, got 4 virtual tokens and 61 tokens",
    ),
    "row beyond the positions without a prompt": (
        lambda m: packed_loss(m, None, pack_rows([[5] * 65], [[5] * 65])), "row 0: .* 0 virtual tokens and 65 tokens"
    ),
    "row beyond the positions behind a prefix": (
        lambda m: packed_loss(m, prefix(m, 4), pack_rows([[5] * 61], [[5] * 61])), "row 0: .* 4 virtual tokens and 61"
    ),
    "prompt beyond the positions": (lambda m: packed_loss(m, virtual(65), BATCH), "at most 64 .* a prompt of 65"),
    "prompt beyond the positions that nobody reads": (
        lambda m: packed_loss(m, [virtual(65)], BATCH, prompt_ids=[-1, -1]), "at most 64 .* a prompt of 65"
    ),
    "prompt beyond the positions, kept": (lambda m: capture_prefix(m, virtual(65)), "at most 64 .* a prompt of 65"),
    "prompt beyond the positions, generating": (
        lambda m: generate(m, virtual(65), ROWS, max_new_tokens=1), "at most 64 .* a prompt of 65"
    ),
    # It came as an IndexError from the table of embeddings, and on CUDA as the end of the process.
    "token beyond the vocabulary": (
        lambda m: packed_loss(m, virtual(3), pack_rows([[5, 6], [7, m.config.vocab_size]], [[5, 6], [7, 7]])),
        "row 1: expected token ids from 0 to .*the model's vocabulary, got",
    ),
    "token below zero": (
        lambda m: packed_loss(m, None, pack_rows([[5, -100]], [[5, 6]])), "row 0: expected token ids .* got -100"
    ),
    "prompts without prompt_ids": (
        lambda m: packed_loss(m, [virtual(3), virtual(4)], BATCH), "prompt_ids to choose among 2 prompts"
    ),
    "one prompt in a list": (lambda m: packed_loss(m, [virtual(3)], BATCH), "prompt_ids to choose among 1"),
    "prompt_ids without prompts": (lambda m: packed_loss(m, None, BATCH, prompt_ids=[-1, -1]), "got None"),
    "too few prompt_ids": (
        lambda m: packed_loss(m, [virtual(3)], BATCH, prompt_ids=[0]), r"2 prompt_ids from -1 to 0, got 1: \[0\]"
    ),
    "prompt_ids beyond": (
        lambda m: packed_loss(m, [virtual(3)], BATCH, prompt_ids=[0, 1]), r"from -1 to 0, got 2: \[0, 1\]"
    ),
    "prompt_ids below": (lambda m: packed_loss(m, [virtual(3)], BATCH, prompt_ids=[0, -2]), "from -1 to 0"),
    "prompts of two kinds": (
        lambda m: packed_loss(m, [virtual(3), prefix(m, 3)], BATCH, prompt_ids=[0, 1]), "of one kind"
    ),
    "classifying with a language model": (
        lambda m: sequence_logits(m, virtual(3), BATCH), "encoder with a sequence-classification head, got Llama"
    ),
    "no rows": (lambda m: pack_rows([]), "at least one row"),
    "labels of another length": (lambda m: pack_rows([[1, 2]], [[1]]), r"own lengths \[2\], got \[1\]"),
    "labels of fewer rows": (lambda m: pack_rows([[1], [2]], [[1]]), "own lengths"),
    "token types of another length": (lambda m: pack_rows([[1, 2]], token_type_ids=[[0]]), "token_type_ids"),
    "row labels of another number": (lambda m: pack_rows([[1], [2]], row_labels=[0]), r"per row \(2\), got 1"),
    "padded ids of one axis": (lambda m: pack_padded(torch.ones(3, dtype=torch.int64)), r"\[B, T\], got \[3\]"),
    "mask of another shape": (
        lambda m: pack_padded(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4)), r"mask of shape \[2, 3\]"
    ),
    "padded labels of another shape": (
        lambda m: pack_padded(torch.ones(2, 3, dtype=torch.int64), labels=torch.ones(3, 2)), r"labels of shape \[2, 3\]"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return patch(make("llama"))


@pytest.mark.parametrize("case", CASES)
def test_refused(model: Any, case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(InputError, match=message) as raised:
        call(model)
    assert "\n" not in str(raised.value)
    packed_loss(model, virtual(3), BATCH)  # and the model still works


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_positions_to_the_last_one(family: str) -> None:
    """Prompt and text together may use every position."""
    model = make(family)
    rows = [[5] * 60, [6] * 60]
    with patched(model):
        assert packed_loss(model, virtual(4), pack_rows(rows, rows)).num_labels == 120
        with pytest.raises(InputError, match="row 0"):
            packed_loss(model, virtual(5), pack_rows(rows, rows))


def test_stock_models() -> None:
    model, encoder = make("llama"), make("bert")
    for call in (packed_loss, label_hidden, label_log_probs):
        with pytest.raises(InputError, match=r"patched model, got a stock LlamaForCausalLM: call ptengine\.patch"):
            call(model, virtual(3), BATCH)
    with pytest.raises(InputError, match="patched model"):
        capture_prefix(model, virtual(3))
    with pytest.raises(InputError, match="patched model, got a stock Bert"):
        sequence_logits(encoder, virtual(3), BATCH)
    with patched(encoder):
        for call in (packed_loss, label_hidden, label_log_probs):
            with pytest.raises(InputError, match="causal model with an LM head, got Bert"):
                call(encoder, virtual(3), BATCH)
        with pytest.raises(InputError, match="its virtual tokens depend on the text"):
            capture_prefix(encoder, virtual(3))
        with pytest.raises(InputError, match="an empty row 1"):
            sequence_logits(encoder, virtual(3), pack_rows([[5], []]))
        with pytest.raises(InputError, match="row 1: expected at most 64 positions"):
            sequence_logits(encoder, virtual(4), pack_rows([[5] * 60, [5] * 61]))
    with patched(encoder.bert), pytest.raises(InputError, match="sequence-classification head, got BertModel"):
        sequence_logits(encoder.bert, virtual(3), BATCH)
    with patched(model.model), pytest.raises(InputError, match="LM head, got LlamaModel"):
        packed_loss(model.model, virtual(3), BATCH)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_attention_dropout(family: str) -> None:
    """Regression: a backbone in training mode silently trained without its attention dropout."""
    model = make(family, **({"attn_pdrop": 0.1} if family == "gpt2" else {"attention_dropout": 0.1}))
    with patched(model):
        packed_loss(model, virtual(3), BATCH)
        with pytest.raises(InputError, match=r"eval mode, got attention dropout of 0\.1"):
            packed_loss(model.train(), virtual(3), BATCH)
        model(torch.tensor([[1, 2, 3]]))  # the stock call draws it


def test_attention_changed_after_patch() -> None:
    """Regression: the prefix was silently ignored, and the numbers wrong, after set_attn_implementation."""
    model = patch(make("llama"))
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="'ptengine' of a patched model, got 'eager'"):
        packed_loss(model, virtual(3), BATCH)
    with pytest.raises(InputError, match="'ptengine' of a patched model, got 'eager'"):
        generate(model, virtual(3), ROWS, max_new_tokens=1)
