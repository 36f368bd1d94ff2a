"""Prefix: flat and reparametrised, its starts, and that folding changes no number."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import ptengine
from ptengine.backbone.lowering import KeyValuePrefix
from ptengine.errors import InputError
from ptengine.prompts import Cartridge, Prefix, SoftPrompt, load_prompt
from ptengine.prompts.prefix import blocks_to_prefix, prefix_to_blocks

SHAPES = {"gpt2": (2, 4, 8), "llama": (3, 2, 8), "qwen3": (3, 2, 16), "bert": (2, 4, 8)}  # L, H_kv, D


def shape_of(model, count):
    layers, heads, width = SHAPES[model.config.model_type]
    return (layers, count, heads, width)


def logits_behind(model, prefix, ids):
    """Stock logits of `ids` behind the prefix, laid into the cache by hand."""
    lowered = prefix.lower()
    pairs = [
        (k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in zip(lowered.keys, lowered.values, strict=True)
    ]
    start = prefix.num_virtual_tokens
    positions = torch.arange(start, start + ids.shape[1])[None]
    return model(ids, past_key_values=DynamicCache(pairs), position_ids=positions).logits


def test_shapes_follow_the_key_value_heads(model):
    prefix = Prefix(model, 5)
    assert prefix.keys.shape == prefix.values.shape == shape_of(model, 5)
    assert prefix.keys.dtype == torch.float32
    lowered = prefix.lower()
    assert isinstance(lowered, KeyValuePrefix)
    assert lowered.keys.shape == shape_of(model, 5)
    assert Prefix(model).num_virtual_tokens == 20


def test_random_is_small_noise_of_its_seed(make_model):
    """PEFT's random prefix has a standard deviation of 1 and learns badly."""
    model = make_model("gpt2", n_positions=2001)
    prefix = Prefix(model, 2000)
    for tensor in (prefix.keys.detach(), prefix.values.detach()):
        assert float(tensor.std()) == pytest.approx(0.02, rel=0.02)
        assert abs(float(tensor.mean())) < 1e-3
    assert torch.equal(Prefix(model, 5, seed=1).keys, Prefix(model, 5, seed=1).keys)
    assert not torch.equal(Prefix(model, 5, seed=1).keys, Prefix(model, 5, seed=2).keys)


@pytest.mark.parametrize("projection", [False, True])
def test_the_global_random_state_is_left_alone(gpt2, projection):
    before = torch.get_rng_state()
    Prefix(gpt2, 5, projection=projection)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("projection", [False, True])
def test_zero_is_zero(model, projection):
    lowered = Prefix(model, 5, "zero", projection=projection, projection_size=7 if projection else None).lower()
    assert lowered.keys.shape == shape_of(model, 5)
    assert not lowered.keys.any()
    assert not lowered.values.any()


@pytest.mark.parametrize(
    ("init", "projection", "same"), [("zero", False, True), ("zero", True, False), ("random", False, False)]
)
def test_tokens_of_a_flat_zero_start_stay_equal_and_no_others_do(gpt2, init, projection, same):
    """What the documentation of `init` warns of."""
    prefix = Prefix(gpt2, 4, init, projection=projection, projection_size=7 if projection else None)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        logits_behind(gpt2, prefix, torch.arange(6)[None]).logsumexp(-1).sum().backward()
        optimizer.step()
    values = prefix.lower().values  # [L, P, H_kv, D]
    spread = (values - values[:, :1]).abs().max()
    assert values.abs().max() > 1e-3
    assert (spread < 1e-6) == same


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_prefix_from_a_text_is_that_text(make_model, tokenizer, family):
    model = make_model(family).requires_grad_(False)
    prefix = Prefix(model, 5, "text", init_text="is this review good or bad", tokenizer=tokenizer)
    text, rest = torch.tensor([[0, 3, 4, 5, 6]]), torch.tensor([[20, 21, 22, 23]])
    whole = model(torch.cat([text, rest], dim=1)).logits[:, 5:]
    torch.testing.assert_close(logits_behind(model, prefix, rest), whole, rtol=1e-5, atol=1e-6)


def test_a_prefix_from_a_short_text_repeats_it(make_model, tokenizer):
    model = make_model("llama").requires_grad_(False)
    prefix = Prefix(model, 7, "text", init_text="good bad", tokenizer=tokenizer)
    text, rest = torch.tensor([[0, 6, 8, 0, 6, 8, 0]]), torch.tensor([[20, 21]])
    whole = model(torch.cat([text, rest], dim=1)).logits[:, 7:]
    torch.testing.assert_close(logits_behind(model, prefix, rest), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_text_longer_than_a_window_lost_its_first_tokens(tokenizer, tmp_path, family):
    """The cache of a model with sliding windows keeps the last tokens only, and what was saved could not be loaded."""
    settings = {"sliding_window": 4}
    if family == "gemma3_text":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        family, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, vocab_size=64, max_position_embeddings=64, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    given = {"text": "is this review good or bad", "tokenizer": tokenizer}
    for prefix in (
        Prefix(model, 5, "text", init_text=given["text"], tokenizer=tokenizer),
        Cartridge(model, 5, **given),
    ):
        text, rest = torch.tensor([[0, 3, 4, 5, 6]]), torch.tensor([[20, 21, 22, 23]])
        whole = model(torch.cat([text, rest], dim=1)).logits[:, 5:]
        torch.testing.assert_close(logits_behind(model, prefix, rest), whole, rtol=1e-5, atol=1e-6)
        prefix.save(tmp_path / prefix.method)
        assert torch.equal(load_prompt(tmp_path / prefix.method, model).lower().keys, prefix.lower().keys)


def test_a_prefix_from_a_text_on_a_real_model(shared):
    path = shared / "models/stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Once upon a time, there was a little girl", return_tensors="pt")["input_ids"]
    prefix = Prefix(model, 9, "text", init_text="Once upon a time, there was a little girl", tokenizer=tokenizer)
    with torch.no_grad():
        got, whole = logits_behind(model, prefix, ids[:, 9:]), model(ids).logits[:, 9:]
    assert ids.shape[1] > 10
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_text_gives_the_same_prefix_on_a_patched_model(make_model, tokenizer, family):
    model = make_model(family)
    given = {"init": "text", "init_text": "is this review good or bad", "tokenizer": tokenizer}
    stock = Prefix(model, 5, **given)
    with ptengine.patched(model):
        ours = Prefix(model, 5, **given)
    torch.testing.assert_close(ours.keys, stock.keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.values, stock.values, rtol=1e-5, atol=1e-6)


def test_text_is_read_without_dropout_and_leaves_every_mode_as_it_was(gpt2, tokenizer):
    given = {"init": "text", "init_text": "good or bad", "tokenizer": tokenizer}
    quiet = Prefix(gpt2, 4, **given)
    gpt2.train()
    gpt2.transformer.h[0].eval()
    modes = [module.training for module in gpt2.modules()]
    assert torch.equal(Prefix(gpt2, 4, **given).keys, quiet.keys)
    assert [module.training for module in gpt2.modules()] == modes
    assert all(parameter.grad is None for parameter in gpt2.parameters())
    assert not quiet.keys.grad_fn


def test_text_of_a_half_precision_model_gives_fp32_parameters(gpt2, tokenizer):
    prefix = Prefix(gpt2.to(torch.bfloat16), 4, "text", init_text="good or bad", tokenizer=tokenizer)
    assert prefix.keys.dtype == prefix.values.dtype == torch.float32


@pytest.mark.parametrize("form", ["tensor", "path"])
def test_array_and_prompt_are_taken_as_they_are(model, tmp_path, form):
    both = torch.randn(2, *shape_of(model, 6))
    np.save(tmp_path / "prefix.npy", both.numpy())
    prefix = Prefix(model, init="array", array=both if form == "tensor" else tmp_path / "prefix.npy")
    assert prefix.num_virtual_tokens == 6
    assert torch.equal(prefix.keys, both[0])
    assert torch.equal(prefix.values, both[1])
    prefix.save(tmp_path / "saved")
    for source in (prefix, tmp_path / "saved"):
        again = Prefix(model, 6, "prompt", prompt=source)
        assert torch.equal(again.keys, both[0])
        assert torch.equal(again.values, both[1])
        assert again.keys.data_ptr() != prefix.keys.data_ptr()


def test_projection_is_the_formula_of_the_paper(model):
    """[K; V] = W2 tanh(W1 E + b1) + b2, block 2i = K of layer i, 2i + 1 = V."""
    prefix = Prefix(model, 5, projection=True, projection_size=7)
    layers, heads, width = SHAPES[model.config.model_type]
    state = {name: tensor.double().numpy() for name, tensor in prefix.state_dict().items()}
    assert sorted(state) == [
        "embedding.weight",
        "transform.0.bias",
        "transform.0.weight",
        "transform.2.bias",
        "transform.2.weight",
    ]
    hidden = np.tanh(state["embedding.weight"] @ state["transform.0.weight"].T + state["transform.0.bias"])  # [P, mid]
    out = hidden @ state["transform.2.weight"].T + state["transform.2.bias"]  # [P, L*2*H_kv*D]
    lowered = prefix.lower()
    for layer in range(layers):
        for offset, got in ((0, lowered.keys), (1, lowered.values)):
            start = (2 * layer + offset) * heads * width
            block = out[:, start : start + heads * width].reshape(5, heads, width)
            np.testing.assert_allclose(got[layer].detach().numpy(), block, rtol=1e-5, atol=1e-6)


def test_projection_starts_as_torch_layers_do(gpt2):
    prefix = Prefix(gpt2, 50, projection=True)
    assert float(prefix.embedding.weight.detach().std()) == pytest.approx(1, rel=0.1)
    first, last = prefix.transform[0], prefix.transform[2]
    assert (first.in_features, first.out_features, last.out_features) == (32, 512, 2 * 2 * 32)
    for linear in (first, last):
        bound = 1 / math.sqrt(linear.in_features)
        for tensor in (linear.weight, linear.bias):
            assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound
    assert torch.equal(Prefix(gpt2, 50, projection=True).transform[2].weight, last.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("init", ["random", "zero"])
@pytest.mark.parametrize("projection", [False, True])
def test_fold_changes_no_number_and_drops_the_mlp(model, projection, init, dtype):
    prefix = Prefix(model, 5, init, projection=projection, projection_size=7 if projection else None).to(dtype)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folded, lowered = prefix.fold(), prefix.lower()
    assert sorted(folded.state_dict()) == ["keys", "values"]
    assert folded.keys.dtype == dtype
    assert torch.equal(folded.lower().keys, lowered.keys)
    assert torch.equal(folded.lower().values, lowered.values)
    assert folded.keys.is_contiguous()
    assert folded.keys.requires_grad
    assert folded.facts == prefix.facts
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter += 1
    assert torch.equal(folded.keys, lowered.keys) or not projection


@pytest.mark.parametrize("projection", [False, True])
def test_gradients_reach_every_parameter(model, projection):
    prefix = Prefix(model, 5, projection=projection, projection_size=7 if projection else None)
    lowered = prefix.lower()
    ((lowered.keys * torch.randn_like(lowered.keys)).sum() + lowered.values.square().sum()).backward()
    for name, parameter in prefix.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mlp_stays_fp32_under_autocast(gpt2):
    """The reparametrisation is part of the fp32 master."""
    prefix = Prefix(gpt2, 5, projection=True)
    plain = prefix.lower()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prefix.lower()
    assert torch.equal(inside.keys, plain.keys)


def test_the_state_dict_restores_the_mlp(gpt2):
    first = Prefix(gpt2, 5, projection=True, projection_size=7, seed=1)
    second = Prefix(gpt2, 5, projection=True, projection_size=7, seed=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.lower().values, first.lower().values)


def test_blocks_and_prefix_are_inverse(model):
    prefix = Prefix(model, 5)
    layers, heads, width = SHAPES[model.config.model_type]
    blocks = torch.arange(5.0 * layers * 2 * heads * width).view(5, -1)
    keys, values = blocks_to_prefix(blocks, prefix.facts)
    assert torch.equal(prefix_to_blocks(keys, values), blocks)
    view = blocks.view(5, 2 * layers, heads, width)
    assert torch.equal(keys[1], view[:, 2])
    assert torch.equal(values[1], view[:, 3])


def test_default_learning_rates(gpt2):
    assert Prefix(gpt2, 4).default_learning_rate() == 0.03
    for width, rate in ((64, 0.03), (384, 0.015), (4096, 0.005)):
        prefix = Prefix(gpt2, 4)
        prefix.facts = replace(prefix.facts, hidden_size=width)
        assert prefix.default_learning_rate() == pytest.approx(rate)
    assert Prefix(gpt2, 4, projection=True).default_learning_rate() == 1e-3
    assert Prefix(gpt2, init="prompt", prompt=Prefix(gpt2, 4)).default_learning_rate() == 0.0075


BAD = {
    "zero tokens": ({"num_virtual_tokens": 0}, "at least 1, got 0"),
    "as many tokens as positions": ({"num_virtual_tokens": 64}, "below the 64 positions"),
    "unknown init": ({"init": "sampled_vocab"}, "random, zero, text, array, prompt, got 'sampled_vocab'"),
    "text without text": ({"init": "text", "tokenizer": "TOKENIZER"}, "needs init_text"),
    "text without tokenizer": ({"init": "text", "init_text": "good"}, "needs tokenizer"),
    "empty text": ({"init": "text", "init_text": "", "tokenizer": "TOKENIZER"}, "at least one token"),
    "text with projection": (
        {"init": "text", "init_text": "good", "tokenizer": "TOKENIZER", "projection": True},
        "cannot be turned back into the weights of the MLP",
    ),
    "array with projection": ({"init": "array", "array": torch.zeros(2, 2, 4, 4, 8), "projection": True}, "the MLP"),
    "projection size zero": ({"projection": True, "projection_size": 0}, "projection_size.*got 0"),
    "projection size of another type": ({"projection": True, "projection_size": "512"}, "projection_size.*got '512'"),
    "projection size without projection was ignored": ({"projection_size": 64}, "expected projection=True"),
    "no array": ({"init": "array"}, "needs array"),
    "array of other layers": (
        {"init": "array", "array": torch.zeros(2, 3, 4, 4, 8)},
        r"\[2, 2, P, 4, 8\].*3, 4, 4, 8\]",
    ),
    "array of other heads": ({"init": "array", "array": torch.zeros(2, 2, 4, 2, 8)}, r"\[2, 2, P, 4, 8\]"),
    "array without values": (
        {"init": "array", "array": torch.zeros(2, 4, 4, 8)},
        r"\[2, 2, P, 4, 8\].*got \[2, 4, 4, 8\]",
    ),
    "array of another length": (
        {"init": "array", "array": torch.zeros(2, 2, 4, 4, 8), "num_virtual_tokens": 5},
        "num_virtual_tokens=5, got 4",
    ),
    "array of no tokens": ({"init": "array", "array": torch.zeros(2, 2, 0, 4, 8)}, "at least 1, got 0"),
    "array with infinity": ({"init": "array", "array": torch.full((2, 2, 4, 4, 8), math.inf)}, "finite"),
    "no prompt": ({"init": "prompt"}, "needs prompt"),
    "prompt of another type": ({"init": "prompt", "prompt": 3}, "a Prefix or the directory of one, got int"),
    "a text that would be ignored": ({"init": "zero", "init_text": "good"}, "init='zero' does not use init_text"),
    "negative seed": ({"seed": -1}, "seed.*got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, tokenizer, case):
    arguments, message = BAD[case]
    if "tokenizer" in arguments:
        arguments = arguments | {"tokenizer": tokenizer}
    with pytest.raises(InputError, match=message):
        Prefix(gpt2, **arguments)


def test_prompts_of_other_models_methods_and_encoders_are_refused(make_model, gpt2, tokenizer):
    with pytest.raises(InputError, match="expected num_layers 3, got 2"):
        Prefix(gpt2, init="prompt", prompt=Prefix(make_model("gpt2", n_layer=3), 4))
    with pytest.raises(InputError, match="got SoftPrompt"):
        Prefix(gpt2, init="prompt", prompt=SoftPrompt(gpt2, 4))
    with pytest.raises(InputError, match="encoder 'bert'"):
        Prefix(make_model("bert"), 4, "text", init_text="good", tokenizer=tokenizer)
