"""Cartridge: keys and values of a text, the first token frozen; folding, files, training, concatenation."""

from __future__ import annotations

import pytest
import torch
import transformers

import ptengine
from ptengine.backbone.lowering import KeyValuePrefix
from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import Cartridge, Prefix, SoftPrompt, concatenate_prefixes, load_prompt

TEXT = "is this review good or bad very positive negative good"  # <s> and ten words
ROWS = [{"text": "good or good", "label": "good"}, {"text": "bad review", "label": "bad"}]


@pytest.fixture
def cartridge(gpt2, tokenizer):
    return Cartridge(gpt2, 6, text=TEXT, tokenizer=tokenizer)


def shaken(prompt):
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return prompt


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_it_starts_as_the_text(make_model, tokenizer, family):
    """What the model says behind the cartridge is what it says behind the first P tokens of the text."""
    model = make_model(family).requires_grad_(False)
    ids = torch.tensor([[0, 3, 4, 5, 6, 7, 20, 21, 22]])  # the text's first six tokens, then others
    cartridge = Cartridge(model, 6, text=TEXT, tokenizer=tokenizer)
    with cartridge.attached(model):
        got = model(ids[:, 6:]).logits
    torch.testing.assert_close(got, model(ids).logits[:, 6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_the_first_tokens_are_not_trained(gpt2, tokenizer, frozen):
    cartridge = Cartridge(gpt2, 6, text=TEXT, tokenizer=tokenizer, num_frozen_tokens=frozen)
    before = cartridge.lower()
    assert isinstance(before, KeyValuePrefix)
    assert before.keys.shape == before.values.shape == (2, 6, 4, 8)
    assert [name for name, _ in cartridge.named_parameters()] == ["keys", "values"]
    (before.keys.sum() + before.values.sum()).backward()
    assert all(bool((parameter.grad == 1).all()) for parameter in cartridge.parameters())
    before = [part.detach().clone() for part in (before.keys, before.values)]
    lowered = shaken(cartridge).lower()
    for part, start in zip((lowered.keys, lowered.values), before, strict=True):
        assert torch.equal(part[:, :frozen], start[:, :frozen])
        assert bool((part[:, frozen:] != start[:, frozen:]).any(dim=-1).all())


def test_fold_is_a_prefix_of_the_same_numbers(cartridge):
    shaken(cartridge)
    folded, lowered = cartridge.fold(), cartridge.lower()
    assert type(folded) is Prefix
    assert torch.equal(folded.lower().keys, lowered.keys)
    assert torch.equal(folded.lower().values, lowered.values)
    assert folded.keys.requires_grad
    shaken(cartridge)
    assert torch.equal(folded.keys, lowered.keys)


def test_save_keeps_the_prefix_and_what_is_trained(gpt2, cartridge, tmp_path):
    lowered = shaken(cartridge).lower()
    cartridge.save(tmp_path / "folded")
    assert torch.equal(load_prompt(tmp_path / "folded", gpt2).lower().values, lowered.values)
    cartridge.save(tmp_path / "whole", folded=False)
    whole = load_prompt(tmp_path / "whole", gpt2)
    assert type(whole) is Cartridge
    assert whole.config() == {"num_virtual_tokens": 6, "num_frozen_tokens": 1}
    assert torch.equal(whole.lower().keys, lowered.keys)
    assert [name for name, p in whole.named_parameters() if p.requires_grad] == ["keys", "values"]
    assert whole.default_learning_rate() == cartridge.default_learning_rate() == 0.03


def test_a_prefix_starts_from_it(gpt2, cartridge):
    start = Prefix(gpt2, init="prompt", prompt=shaken(cartridge))
    assert torch.equal(start.values, cartridge.lower().values)
    with pytest.raises(InputError, match="a SoftPrompt or the directory of one, got Prefix"):
        SoftPrompt(gpt2, init="prompt", prompt=cartridge)


def test_it_trains_with_the_trainer_and_resumes_exactly(gpt2, tokenizer, tmp_path):
    task = ClassificationTask(Template("{text} is"), Verbalizer({"good": " good", "bad": " bad"}))

    def fit(name, steps, resume=False):
        cartridge = Cartridge(gpt2, 6, text=TEXT, tokenizer=tokenizer)
        config = ptengine.TrainingConfig(
            output_dir=str(tmp_path / name), max_steps=steps, per_device_train_batch_size=1, disable_tqdm=True,
            lr_scheduler_type="constant", save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer = ptengine.Trainer(gpt2, cartridge, ROWS, ROWS, config, task=task, tokenizer=tokenizer)
        return cartridge, trainer.fit(resume=resume)

    whole, result = fit("whole", 4)
    fit("cut", 2)
    resumed, again = fit("cut", 4, resume=True)
    assert again.losses == result.losses
    assert result.losses[-1] < result.losses[0]
    assert torch.equal(resumed.keys, whole.keys)
    assert torch.equal(load_prompt(result.prompt_path, gpt2).keys, whole.fold().keys)


def test_concatenation_has_all_keys_and_values_in_order(gpt2, tokenizer, cartridge):
    other = Prefix(gpt2, 3)
    both = concatenate_prefixes([cartridge, other])
    assert type(both) is Prefix
    assert both.num_virtual_tokens == 9
    assert torch.equal(both.keys[:, :6], cartridge.lower().keys)
    assert torch.equal(both.values[:, 6:], other.values)
    with both.attached(gpt2):
        assert gpt2(torch.tensor([[5, 6]])).logits.shape == (1, 2, 61)


BAD = {
    "no tokens": ({"num_virtual_tokens": 0}, "at least 1, got 0"),
    "a text too short": ({"num_virtual_tokens": 12}, "at least num_virtual_tokens=12 tokens, got 11"),
    "all frozen": ({"num_frozen_tokens": 6}, "num_frozen_tokens below num_virtual_tokens=6, got 6"),
    "fewer than none frozen": ({"num_frozen_tokens": -1}, "num_frozen_tokens, a whole number of at least 0, got -1"),
    "no text": ({"text": 3}, "text, a string, got int"),
    "no tokenizer": ({"tokenizer": "gpt2"}, "transformers tokenizer, got str"),
    "a foreign tokenizer": ({"tokenizer": lambda text: {"input_ids": [99] * 9}}, "ids below 61, got one with 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, tokenizer, case):
    arguments, message = BAD[case]
    given = {"num_virtual_tokens": 6, "text": TEXT, "tokenizer": tokenizer} | arguments
    with pytest.raises(InputError, match=message):
        Cartridge(gpt2, **given)


def test_a_model_without_prefixes_made_a_stack_of_nothing(tokenizer):
    small = transformers.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"is not supported by Cartridge: .*; a SoftPrompt works"):
        Cartridge(transformers.MambaForCausalLM(small), 6, text=TEXT, tokenizer=tokenizer)


def test_what_cannot_be_one_prefix_is_refused(make_model, gpt2, tokenizer, cartridge):
    with pytest.raises(InputError, match="at least two prompts to concatenate, got 1"):
        concatenate_prefixes([cartridge])
    with pytest.raises(InputError, match="got SoftPrompt at index 1"):
        concatenate_prefixes([cartridge, SoftPrompt(gpt2, 4)])
    with pytest.raises(InputError, match="expected num_layers 2, got 3"):
        concatenate_prefixes([cartridge, Prefix(make_model("gpt2", n_layer=3), 4)])
    with pytest.raises(InputError, match="encoder 'bert'"):
        Cartridge(make_model("bert"), 6, text=TEXT, tokenizer=tokenizer)
    with pytest.raises(InputError, match="num_virtual_tokens and num_frozen_tokens"):
        Cartridge.empty(cartridge.facts, {"num_virtual_tokens": 6})
