"""What a block may meet besides a frozen model and rows padded on the right: changes of the model, padding, windows."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForTokenClassification

from ptengine.prompts import SoftPrompt

from ..backbone.stock import HIDE, VOCABULARY, WIDTH, make, pad, random_rows, relative
from ..backbone.test_families import make as make_family
from .attached_cases import KINDS, alone, prompt_for


def adapted() -> tuple[Any, Any]:
    """A model with two adapters in it, and PEFT's wrapper around it."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapper: Any = peft.get_peft_model(make("llama"), config, adapter_name="a")
    wrapper.add_adapter("b", config)
    return wrapper.get_base_model().eval(), wrapper


@torch.no_grad()
def test_adapters_switched_inside_a_block() -> None:
    """The prompt's keys and values stayed those of the adapters that were on first, as for DPO's reference logits."""
    model, wrapper = adapted()
    prompt, (row,) = prompt_for(model, "soft"), random_rows(7)
    ids = torch.tensor([row])
    for name in ("a", "b", "a"):
        wrapper.set_adapter(name)
        wrapper.requires_grad_(False)
        expected = alone(model, prompt, row)
        with wrapper.disable_adapter():
            plain = alone(model, prompt, row)
        wrapper.requires_grad_(False)
        with prompt.attached(model):
            assert relative(model(ids).logits[0], expected) < 1e-5
            with wrapper.disable_adapter():
                assert relative(model(ids).logits[0], plain) < 1e-5
            wrapper.requires_grad_(False)
            wrapper.set_adapter("b" if name == "a" else "a")
            wrapper.requires_grad_(False)
            other = model(ids).logits[0]
            wrapper.merge_adapter()
            assert relative(model(ids).logits[0], other) < 1e-4
            wrapper.unmerge_adapter()
        assert relative(other, alone(model, prompt, row)) < 1e-5
        assert relative(other, expected) > 1e-2


@torch.no_grad()
def test_weights_changed_inside_a_block() -> None:
    """By loading a state, in place and by new parameters."""
    model, (row,) = make("llama"), random_rows(7)
    prompt, ids = prompt_for(model, "soft"), torch.tensor([row])
    states = [copy.deepcopy(make("llama", seed=seed).state_dict()) for seed in (1, 2, 3)]
    with prompt.attached(model):
        before = model(ids).logits[0]
        for state, assign in zip(states, (False, True, True), strict=True):
            model.load_state_dict(state, assign=assign)
            now = model(ids).logits[0]
            other = make("llama")
            other.load_state_dict(state)
            assert relative(now, alone(other, prompt, row)) < 1e-5
            assert relative(now, before) > 1e-2
            before = now


def modern_bert() -> Any:
    """Most layers see four tokens on either side."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        local_attention=8, pad_token_id=2, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return ModernBertForTokenClassification(config).eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_windows_of_an_encoder(side: str) -> None:
    """Virtual tokens stood before padding on the left, out of reach of a text that looks at its neighbours alone."""
    model = modern_bert()
    prompt, rows = prompt_for(model, "soft"), random_rows(5, 14, 3)
    ids, mask = pad(rows, side)
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        for index, row in enumerate(rows):
            one = model(torch.tensor([row]), output_hidden_states=True)
            kept = mask[index].bool()
            assert relative(out.logits[index][kept], one.logits[0]) < 1e-5
            assert relative(out.hidden_states[1][index][kept], one.hidden_states[1][0]) < 1e-5


@pytest.mark.filterwarnings("ignore:model type 'bloom'")
@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("gpt2", "llama") for k in KINDS] + [("bloom", "soft")])
def test_a_first_token_s_label_counts_on_neither_side(family: str, kind: str) -> None:
    """Behind padding the stock loss predicted it from a padding slot, and the prompt learned from that."""
    model = make_family("bloom") if family == "bloom" else make(family)
    prompt, rows = prompt_for(model, kind), random_rows(5, 9, 4)

    def learned(side: str) -> tuple[Tensor, Tensor]:
        ids, mask = pad(rows, side)
        labels = ids.masked_fill(mask == 0, HIDE)
        before = labels.clone()
        with prompt.attached(model):
            loss = model(ids, attention_mask=mask, labels=labels).loss
            loss.backward()
        assert torch.equal(labels, before)
        gradient = torch.cat([one.grad.flatten() for one in prompt.parameters() if one.grad is not None])
        prompt.zero_grad(set_to_none=True)
        return loss.detach(), gradient

    (left, from_left), (right, from_right) = learned("left"), learned("right")
    assert left == pytest.approx(float(right), rel=1e-5)
    assert relative(from_left, from_right) < 1e-4


def test_labels_of_a_model_that_shifts_none_are_all_kept() -> None:
    """Of an encoder, whose every position predicts its own label."""
    model = modern_bert()
    prompt = SoftPrompt(model, 4, init="array", array=prompt_for(model, "soft", 4).embeds.detach())
    ids, mask = pad(random_rows(5, 9), "left")
    labels = (ids % 3).masked_fill(mask == 0, HIDE)
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=HIDE)
    assert float(out.loss.detach()) == pytest.approx(float(expected), rel=1e-6)
