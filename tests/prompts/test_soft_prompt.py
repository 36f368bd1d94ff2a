"""SoftPrompt: where its first numbers come from, what it trains, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptengine.backbone.lowering import VirtualTokens
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import Prefix, SoftPrompt


def words_of(model):
    return model.get_input_embeddings().weight.detach()


def test_random_has_the_mean_and_std_of_every_coordinate_of_the_word_embeddings(make_model):
    """PEFT's RANDOM has a standard deviation of 0.975 against 0.02 of the word embeddings."""
    model = make_model("gpt2", hidden_size=16, n_positions=20001)
    words = words_of(model)
    with torch.no_grad():
        words[:, 3] = words[:, 3] * 50 + 4  # the outlier coordinate of real models
    embeds = SoftPrompt(model, 20000).embeds
    std, mean = torch.std_mean(words, dim=0, correction=0)
    torch.testing.assert_close(embeds.std(dim=0), std, rtol=0.03, atol=0)
    assert ((embeds.mean(dim=0) - mean).abs() < 0.03 * std).all()
    torch.testing.assert_close(embeds.std(), words.std(), rtol=0.03, atol=0)


def test_the_seed_decides_and_the_global_random_state_is_left_alone(gpt2):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for init in ("random", "sampled_vocab"):
        first, again, other = (SoftPrompt(gpt2, 6, init, seed=seed).embeds for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_is_twenty_tokens(gpt2):
    assert SoftPrompt(gpt2).embeds.shape == (20, 32)
    assert SoftPrompt(gpt2).num_virtual_tokens == 20


def rows_as_ids(embeds, model):
    return [int((words_of(model) == row).all(dim=1).nonzero()) for row in embeds]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_sampled_vocab_takes_distinct_ordinary_tokens(model, tokenizer, with_tokenizer):
    prompt = SoftPrompt(model, 58, "sampled_vocab", tokenizer=tokenizer if with_tokenizer else None)
    assert sorted(rows_as_ids(prompt.embeds, model)) == list(range(3, 61))


def test_sampled_vocab_stays_among_the_five_thousand_most_frequent(make_model):
    model = make_model("gpt2", hidden_size=8, vocab_size=9000, n_positions=512)
    ids = rows_as_ids(SoftPrompt(model, 300, "sampled_vocab").embeds, model)
    assert max(ids) < 5003
    assert max(ids) > 4500


def test_sampled_vocab_repeats_tokens_only_when_there_are_too_few(make_model):
    model = make_model("gpt2", vocab_size=10)
    ids = rows_as_ids(SoftPrompt(model, 40, "sampled_vocab").embeds, model)
    assert len(ids) == 40
    assert set(ids) == set(range(3, 10))


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_text_is_cut_or_repeated(model, tokenizer, count):
    prompt = SoftPrompt(model, count, "text", init_text="is this review good", tokenizer=tokenizer)
    ids = [0, 3, 4, 5, 6]
    assert torch.equal(prompt.embeds, words_of(model)[torch.tensor((ids * 3)[:count])])


def test_class_labels_give_one_embedding_each_then_the_vocabulary(model, tokenizer):
    labels = ["very good", "bad"]
    prompt = SoftPrompt(model, 6, "class_labels", class_labels=labels, tokenizer=tokenizer)
    words = words_of(model)
    torch.testing.assert_close(prompt.embeds[0].data, (words[9] + words[6]) / 2)
    assert torch.equal(prompt.embeds[1], words[8])
    rest = rows_as_ids(prompt.embeds[2:], model)
    assert len(set(rest)) == 4
    assert min(rest) >= 3
    assert SoftPrompt(model, 2, "class_labels", class_labels=labels, tokenizer=tokenizer).embeds.shape == (2, 32)


@pytest.mark.parametrize("form", ["tensor", "ndarray", "float64", "path", "str"])
def test_array_is_taken_as_it_is_into_own_memory(gpt2, tmp_path, form):
    rows = torch.randn(7, 32)
    np.save(tmp_path / "rows.npy", rows.numpy())
    source = {
        "tensor": rows,
        "ndarray": rows.numpy(),
        "float64": rows.numpy().astype(np.float64),
        "path": tmp_path / "rows.npy",
        "str": str(tmp_path / "rows.npy"),
    }[form]
    prompt = SoftPrompt(gpt2, init="array", array=source)
    kept = rows.clone()
    rows.zero_()
    assert prompt.num_virtual_tokens == 7
    assert torch.equal(prompt.embeds, kept)


@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_published_prompts_of_google_load_into_a_model_of_their_width(make_model, shared: Path, task):
    path = shared / f"models/t5_lm100k_base_prompts/t5_1_1_lm100k_base_prompt_{task}.npy"
    model = make_model("gpt2", hidden_size=768, n_layer=1, n_head=12, n_positions=128)
    prompt = SoftPrompt(model, init="array", array=path)
    assert np.array_equal(prompt.embeds.detach().numpy(), np.load(path))
    with pytest.raises(InputError, match=r"\[P, 32\], got \[100, 768\]"):
        SoftPrompt(make_model("gpt2", n_positions=128), init="array", array=path)


def test_prompt_starts_from_another_prompt_or_its_directory(gpt2, tmp_path):
    source = SoftPrompt(gpt2, 5, seed=3)
    source.save(tmp_path)
    for given in (source, tmp_path, str(tmp_path)):
        prompt = SoftPrompt(gpt2, init="prompt", prompt=given)
        assert torch.equal(prompt.embeds, source.embeds)
        assert prompt.embeds.data_ptr() != source.embeds.data_ptr()


@pytest.mark.parametrize("init", ["random", "sampled_vocab", "text", "class_labels"])
def test_parameters_are_fp32_over_a_half_precision_model(gpt2, tokenizer, init):
    given = {
        "text": {"init_text": "good", "tokenizer": tokenizer},
        "class_labels": {"class_labels": ["very good"], "tokenizer": tokenizer},
    }.get(init, {})
    prompt = SoftPrompt(gpt2.to(torch.bfloat16), 4, init, **given)
    assert prompt.embeds.dtype == torch.float32
    assert prompt.embeds.requires_grad


def test_trains_embeds_alone_and_keeps_no_model(gpt2):
    prompt = SoftPrompt(gpt2, 4)
    assert list(prompt.state_dict()) == ["embeds"]
    assert [name for name, _ in prompt.named_parameters()] == ["embeds"]
    lowered = prompt.lower()
    assert isinstance(lowered, VirtualTokens)
    weight = torch.randn(4, 32)
    (lowered.embeds * weight).sum().backward()
    assert torch.equal(prompt.embeds.grad, weight)
    assert all(parameter.grad is None for parameter in gpt2.parameters())


def test_a_trained_prompt_does_not_change_the_model_it_was_taken_from(gpt2, tokenizer):
    before = words_of(gpt2).clone()
    prompt = SoftPrompt(gpt2, 4, "text", init_text="good", tokenizer=tokenizer)
    with torch.no_grad():
        prompt.embeds += 1
    assert torch.equal(words_of(gpt2), before)


def test_fold_is_an_independent_copy(gpt2):
    prompt = SoftPrompt(gpt2, 4)
    folded = prompt.fold()
    with torch.no_grad():
        prompt.embeds += 1
    assert torch.equal(folded.embeds + 1, prompt.embeds)
    assert folded.facts == prompt.facts
    assert folded.embeds.requires_grad


def test_the_default_learning_rate_follows_the_embeddings(gpt2):
    std = float(words_of(gpt2).std(correction=0))
    prompt = SoftPrompt(gpt2, 4)
    assert prompt.default_learning_rate() == pytest.approx(0.3 * std)
    assert SoftPrompt(gpt2, init="prompt", prompt=prompt).default_learning_rate() == pytest.approx(0.075 * std)
    with torch.no_grad():
        gpt2.get_input_embeddings().weight *= 10
    assert SoftPrompt(gpt2, 4).default_learning_rate() == pytest.approx(3 * std)


BAD = {
    "zero tokens": ({"num_virtual_tokens": 0}, "at least 1, got 0"),
    "negative tokens": ({"num_virtual_tokens": -3}, "at least 1, got -3"),
    "fractional tokens": ({"num_virtual_tokens": 2.5}, r"whole number of at least 1, got 2\.5"),
    "boolean tokens": ({"num_virtual_tokens": True}, "whole number of at least 1, got True"),
    "as many tokens as positions": ({"num_virtual_tokens": 64}, "below the 64 positions of the model.*got 64"),
    "unknown init": ({"init": "xavier"}, "random, sampled_vocab, text, class_labels, array, prompt, got 'xavier'"),
    "text without text": ({"init": "text", "tokenizer": "TOKENIZER"}, "needs init_text"),
    "text without tokenizer": ({"init": "text", "init_text": "good"}, "needs tokenizer"),
    "empty text": ({"init": "text", "init_text": "  ", "tokenizer": "TOKENIZER"}, "at least one token"),
    "text of another type": (
        {"init": "text", "init_text": 3, "tokenizer": "TOKENIZER"},
        "init_text, a string, got int",
    ),
    "tokenizer by name": (
        {"init": "text", "init_text": "good", "tokenizer": "gpt2"},
        "transformers tokenizer, got str",
    ),
    "foreign tokenizer": (
        {"init": "text", "init_text": "good", "tokenizer": lambda text, **_: {"input_ids": [99]}},
        "ids below 61, got one that maps 'good' to 99",
    ),
    "labels without labels": ({"init": "class_labels", "tokenizer": "TOKENIZER"}, "needs class_labels"),
    "labels without tokenizer": ({"init": "class_labels", "class_labels": ["good"]}, "needs tokenizer"),
    "labels in one string": (
        {"init": "class_labels", "class_labels": "good", "tokenizer": "TOKENIZER"},
        "a list of strings, got 'good'",
    ),
    "labels not strings": (
        {"init": "class_labels", "class_labels": ["good", 0], "tokenizer": "TOKENIZER"},
        "non-empty strings, got 0 at index 1",
    ),
    "an empty label": (
        {"init": "class_labels", "class_labels": ["good", ""], "tokenizer": "TOKENIZER"},
        "non-empty strings, got '' at index 1",
    ),
    "no labels": ({"init": "class_labels", "class_labels": [], "tokenizer": "TOKENIZER"}, "got 0"),
    "more labels than tokens": (
        {"num_virtual_tokens": 1, "init": "class_labels", "class_labels": ["a", "b"], "tokenizer": "TOKENIZER"},
        "1 to 1 class_labels.*got 2",
    ),
    "no array": ({"init": "array"}, "needs array"),
    "array of another width": ({"init": "array", "array": torch.zeros(4, 31)}, r"\[P, 32\], got \[4, 31\]"),
    "array of another rank": ({"init": "array", "array": torch.zeros(4, 32, 1)}, r"\[P, 32\], got \[4, 32, 1\]"),
    "array of no rows": ({"init": "array", "array": torch.zeros(0, 32)}, "at least 1, got 0"),
    "array of another length": (
        {"init": "array", "array": torch.zeros(4, 32), "num_virtual_tokens": 5},
        "num_virtual_tokens=5 rows, got 4",
    ),
    "array of integers": ({"init": "array", "array": torch.zeros(4, 32, dtype=torch.int64)}, "floating-point.*int64"),
    "ndarray of integers": ({"init": "array", "array": np.zeros((4, 32), dtype=np.int32)}, "floating-point.*int32"),
    "array with NaN": ({"init": "array", "array": torch.full((4, 32), float("nan"))}, "finite numbers"),
    "array as a list": ({"init": "array", "array": [[0.0] * 32]}, "got list"),
    "array file missing": ({"init": "array", "array": "nowhere.npy"}, "'nowhere.npy', which is not a file"),
    "array longer than the model": ({"init": "array", "array": torch.zeros(70, 32)}, "below the 64 positions"),
    "no prompt": ({"init": "prompt"}, "needs prompt"),
    "prompt of another type": ({"init": "prompt", "prompt": 3}, "SoftPrompt or the directory of one, got int"),
    "prompt directory missing": ({"init": "prompt", "prompt": "nowhere"}, "'nowhere', which is not a directory"),
    "an argument that would be ignored": ({"init_text": "good"}, "init='random' does not use init_text"),
    "an array that would be ignored": (
        {"init": "sampled_vocab", "array": torch.zeros(4, 32)},
        "init='sampled_vocab' does not use array",
    ),
    "negative seed": ({"seed": -1}, "seed, a whole number from 0 to 2\\*\\*63 - 1, got -1"),
    "seed of another type": ({"seed": "0"}, "seed, a whole number from 0 to 2\\*\\*63 - 1, got '0'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, tokenizer, case):
    arguments, message = BAD[case]
    if isinstance(arguments.get("tokenizer"), str) and arguments["tokenizer"] == "TOKENIZER":
        arguments = arguments | {"tokenizer": tokenizer}
    with pytest.raises(InputError, match=message):
        SoftPrompt(gpt2, **arguments)


def test_a_pickled_or_damaged_npy_is_refused(gpt2, tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object))
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.savez(tmp_path / "archive.npz", a=np.zeros((4, 32)))
    for name in ("pickled.npy", "damaged.npy", "archive.npz"):
        with pytest.raises(InputError, match=name):
            SoftPrompt(gpt2, init="array", array=tmp_path / name)


def test_prompts_of_other_models_or_methods_are_refused(make_model, gpt2):
    with pytest.raises(InputError, match="expected hidden_size 16, got 32"):
        SoftPrompt(gpt2, init="prompt", prompt=SoftPrompt(make_model("gpt2", hidden_size=16), 4))
    with pytest.raises(InputError, match="expected model_type 'llama', got 'gpt2'"):
        SoftPrompt(gpt2, init="prompt", prompt=SoftPrompt(make_model("llama"), 4))
    with pytest.raises(InputError, match="got Prefix"):
        SoftPrompt(gpt2, init="prompt", prompt=Prefix(gpt2, 4))


def test_what_is_no_supported_model_is_refused(gpt2):
    with pytest.raises(UnsupportedModelError, match="Linear"):
        SoftPrompt(torch.nn.Linear(2, 2))
    gpt2.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*encoder-decoder"):
        SoftPrompt(gpt2)


def test_a_scaled_table_is_met_behind_its_scale() -> None:
    """Gemma 3 multiplies its table by sqrt(d): rows of the bare table would be far too small for virtual tokens."""
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, vocab_size=50, max_position_embeddings=64, sliding_window=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    words = model.get_input_embeddings()(torch.arange(50))  # [V, d]
    table = model.get_input_embeddings().weight
    assert torch.allclose(words, 4 * table)
    sampled = SoftPrompt(model, num_virtual_tokens=5, init="sampled_vocab")
    assert torch.cdist(sampled.embeds, words).min(dim=1).values.max() < 1e-2  # others are 0.3 away
    random = SoftPrompt(model, num_virtual_tokens=40)
    assert 0.9 < (random.embeds.std() / words.std()).item() < 1.1
    assert sampled.facts.embedding_std == pytest.approx(words.std(correction=0).item(), rel=1e-5)
