"""Prompts that depend on the text: each row's numbers equal those with its own virtual tokens, from its input alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from ptengine.backbone import (
    TextDependentTokens,
    VirtualTokens,
    capture_prefix,
    generate,
    label_hidden,
    pack_rows,
    packed_loss,
    patched,
    seq2seq_loss,
    sequence_logits,
)
from ptengine.backbone.step import capture_prefixes
from ptengine.errors import InputError
from ptengine.prompts.text_dependent import largest_elements, mean_token

from .stock import CAUSAL, HIDE, WIDTH, make, prefix, random_rows, relative, stock_loss, virtual


def by_mean(base: Tensor, seen: list[Any] | None = None) -> TextDependentTokens:
    """base [P, d] times one plus the mean token of the text."""

    def of_texts(texts: Tensor, lengths: Tensor) -> Tensor:
        if seen is not None:
            seen.append((texts, lengths))
        return base * (1 + texts.sum(1) / lengths[:, None])[:, None]  # [B, P, d]

    return TextDependentTokens(len(base), of_texts)


def by_hand(model: Any, base: Tensor, row: list[int]) -> VirtualTokens:
    return VirtualTokens(base * (1 + model.get_input_embeddings()(torch.tensor(row)).mean(0)))


def base_of(size: int = 4) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(3)).mul(0.3).requires_grad_()


ROWS = random_rows(6, 9, 5, 12)
INPUTS = (4, 3, 4, 12)  # tokens before the first label
LABELS = [
    [HIDE] * 4 + ROWS[0][4:],
    [HIDE] * 3 + [ROWS[1][3], HIDE] + ROWS[1][5:],
    [HIDE] * 4 + ROWS[2][4:],
    [HIDE] * 12,
]


@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradient_are_those_of_each_rows_own_prompt(family: str) -> None:
    model, base = make(family), base_of()
    own = [by_hand(model, base, row[:length]) for row, length in zip(ROWS, INPUTS, strict=True)]
    expected = stock_loss(model, own, ROWS, LABELS)
    with patched(model):
        out = packed_loss(model, by_mean(base), pack_rows(ROWS, LABELS))
    assert abs(out.loss.item() - expected.item()) < 1e-5
    got, exact = (torch.autograd.grad(loss, base)[0] for loss in (out.loss, expected))
    assert relative(got, exact) < 1e-5


def test_what_it_reads_is_the_input_and_never_a_label() -> None:
    model, seen = make("gpt2"), []
    other = [[*row[:length], *((token + 1) % 90 for token in row[length:])]
             for row, length in zip(ROWS, INPUTS, strict=True)]  # fmt: skip
    with patched(model), torch.no_grad():
        for rows in (ROWS, other):
            labels = [[HIDE if y == HIDE else x for x, y in zip(*pair, strict=True)]
                      for pair in zip(rows, LABELS, strict=True)]  # fmt: skip
            label_hidden(model, by_mean(base_of(), seen), pack_rows(rows, labels))
    (texts, lengths), (others, _) = seen
    assert lengths.tolist() == list(INPUTS)
    assert torch.equal(texts, others)
    assert texts.shape == (4, 12, WIDTH)
    for text, row, length in zip(texts, ROWS, INPUTS, strict=True):
        assert torch.equal(text[:length], model.get_input_embeddings()(torch.tensor(row[:length])))
        assert not text[length:].any()


def test_beside_fixed_prompts_and_rows_without_one() -> None:
    model, base, fixed = make("llama"), base_of(), virtual(7)
    unread = TextDependentTokens(3, lambda texts, lengths: pytest.fail("no row reads it"))
    prompts = [unread, by_mean(base), fixed]
    own = [None, by_hand(model, base, ROWS[1][:3]), fixed, by_hand(model, base, ROWS[3])]
    expected = stock_loss(model, own, ROWS, LABELS)
    with patched(model):
        out = packed_loss(model, prompts, pack_rows(ROWS, LABELS), prompt_ids=[-1, 1, 2, 1])
    assert abs(out.loss.item() - expected.item()) < 1e-5


def test_an_encoder_reads_the_whole_row() -> None:
    model, base = make("bert"), base_of()
    own = [by_hand(model, base, row) for row in ROWS]
    batch = pack_rows(ROWS, [[HIDE, *row[1:]] for row in ROWS])
    with patched(model):
        expected = sequence_logits(model, own, batch, prompt_ids=range(4))
        got = sequence_logits(model, by_mean(base), batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_decoder_reads_the_source() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, **sizes)).eval().requires_grad_(False)
    base, targets = base_of(), pack_rows(random_rows(3, 5, 2, 4, seed=1))
    own = [by_hand(model, base, row) for row in ROWS]
    with patched(model):
        expected = seq2seq_loss(model, own, pack_rows(ROWS), targets, prompt_ids=range(4)).loss
        got = seq2seq_loss(model, by_mean(base), pack_rows(ROWS), targets).loss
        plain = seq2seq_loss(model, VirtualTokens(base), pack_rows(ROWS), targets).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert abs(got - plain) > 1e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generate_gives_every_input_its_own_prompt(options: dict[str, Any]) -> None:
    model, base = make("llama"), base_of()
    own = [by_hand(model, base, row) for row in ROWS]
    given = {"max_new_tokens": 6, "do_sample": False, **options}
    expected = generate(model, own, ROWS, **given)
    assert torch.equal(generate(model, by_mean(base), ROWS, **given), expected)
    mixed = generate(model, [by_mean(base), None, virtual(5), prefix(model, 3)], ROWS, **given)
    assert torch.equal(mixed, generate(model, [own[0], None, virtual(5), prefix(model, 3)], ROWS, **given))
    assert not torch.equal(mixed, expected)


@pytest.mark.parametrize("family", CAUSAL)
def test_prompts_captured_together_are_those_captured_alone(family: str) -> None:
    model, prompts = make(family), [virtual(size, seed) for seed, size in enumerate((5, 1, 8))]
    with patched(model), torch.no_grad():
        for got, prompt in zip(capture_prefixes(model, prompts), prompts, strict=True):
            alone = capture_prefix(model, prompt)
            assert got.keys.shape == alone.keys.shape
            torch.testing.assert_close(got.keys, alone.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.values, alone.values, rtol=1e-5, atol=1e-5)


def test_a_row_without_input_is_refused() -> None:
    model, base = make("gpt2"), base_of()
    with patched(model):
        with pytest.raises(InputError, match=r"row 1: expected at least one token of input .*before the first label"):
            packed_loss(model, by_mean(base), pack_rows(ROWS[:2], [LABELS[0], ROWS[1]]))
        packed_loss(model, [by_mean(base)], pack_rows(ROWS[:2], [LABELS[0], ROWS[1]]), prompt_ids=[0, -1])


def test_tokens_that_the_model_does_not_embed_are_refused_before_they_are_read() -> None:
    model = make("gpt2")
    with patched(model), pytest.raises(InputError, match=r"row 1: expected token ids from 0 to 96.* got 97"):
        packed_loss(model, by_mean(base_of()), pack_rows([ROWS[0], [3, 97, 4]], [LABELS[0], [HIDE, HIDE, 4]]))
    with pytest.raises(InputError, match=r"row 0: expected token ids from 0 to 96.* got 97"):
        generate(model, by_mean(base_of()), [[97]])


def test_pooling_leaves_padding_out() -> None:
    texts = torch.randn(2, 5, 3) - 4  # below the zeros of padding
    texts[1, 2:] = 0
    lengths = torch.tensor([5, 2])
    torch.testing.assert_close(mean_token(texts, lengths), torch.stack([texts[0].mean(0), texts[1, :2].mean(0)]))
    assert torch.equal(largest_elements(texts, lengths), torch.stack([texts[0].amax(0), texts[1, :2].amax(0)]))
