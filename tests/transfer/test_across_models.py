"""Across models: exact between linear images of one vocabulary, numpy's least squares elsewhere, refused otherwise."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ptengine.errors import InputError
from ptengine.prompts import PTuning, SoftPrompt
from ptengine.transfer import carry_prompt, shared_tokens
from ptengine.transfer.bank import PromptBank

SPECIAL = ["[UNK]", "[EOS]"]


def tokens(words: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[EOS]")


WORDS = [f"w{i}" for i in range(60)]
TOKENS = tokens(WORDS)


def gpt2(width: int, seed: int, size: int = len(WORDS) + 2) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=32, n_embd=width, n_layer=1, n_head=2, initializer_range=0.3)
    ).eval()


def gemma3() -> Gemma3ForCausalLM:
    """Its embedding module multiplies the table by sqrt(d) = 4."""
    torch.manual_seed(5)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(WORDS) + 2, max_position_embeddings=32, hidden_size=16, intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def table(model: Any) -> Tensor:
    return model.get_input_embeddings().weight.detach()


def set_table(model: Any, rows: Tensor) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)


def rotation(width: int) -> Tensor:
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def test_a_linear_map_between_the_embeddings_is_recovered() -> None:
    source, target = gpt2(8, 1), gpt2(12, 2)
    mapping = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    set_table(target, (table(source).double() @ mapping).float())
    prompt = SoftPrompt(source, 5, seed=4)
    carried = carry_prompt(prompt, source, TOKENS, target, TOKENS)
    wanted = prompt.embeds.detach().double() @ mapping
    # The target's table is rounded to fp32 and the map is as well conditioned as 60 random rows of 8.
    assert torch.allclose(carried.embeds.double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    assert carried.embeds.shape == (5, 12)
    assert carried.embeds.requires_grad
    assert carried.default_learning_rate() == pytest.approx(SoftPrompt(target).default_learning_rate() / 4)


def test_to_the_same_model_it_is_the_identity() -> None:
    model = gpt2(8, 1)
    prompt = SoftPrompt(model, 5, seed=4)
    kept = prompt.embeds.detach().clone()
    carried = carry_prompt(prompt, model, TOKENS, model, TOKENS)
    assert torch.allclose(carried.embeds, kept, rtol=0, atol=1e-5)
    assert torch.equal(prompt.embeds, kept)
    assert carried.embeds.data_ptr() != prompt.embeds.data_ptr()


@pytest.mark.parametrize(("width", "copied"), [(8, False), (40, False), (8, True)])
def test_least_squares_as_numpy_has_it(width: int, copied: bool) -> None:
    """Also where 20 tokens, or a coordinate that copies another, leave the map open: then the one of least norm."""
    source, target = gpt2(width, 1), gpt2(12, 2)
    if copied:
        set_table(source, table(source)[:, [0, 0, *range(2, width)]])
    prompt = SoftPrompt(source, 5, seed=4)
    options = {"num_tokens": 20, "skip_frequent": 10, "min_shared_tokens": 20}
    carried = carry_prompt(prompt, source, TOKENS, target, TOKENS, **options)  # type: ignore[arg-type]
    used = slice(len(SPECIAL) + 10, len(SPECIAL) + 30)
    ours, theirs = (table(model).double().numpy()[used] for model in (source, target))
    mapping = np.linalg.lstsq(ours, theirs, rcond=None)[0]
    wanted = prompt.embeds.detach().double().numpy() @ mapping
    # fp64 throughout, one rounding to fp32 at the end.
    np.testing.assert_allclose(carried.embeds.detach().numpy(), wanted, rtol=2e-7, atol=1e-9)


def test_the_scale_of_an_embedding_module_counts() -> None:
    """Prompts enter behind the module, so Gemma 3's rows are four times its table's, on either side."""
    scaled, plain = gemma3(), gpt2(16, 1)
    set_table(scaled, table(plain))
    prompt = SoftPrompt(plain, 3, seed=4)
    there = carry_prompt(prompt, plain, TOKENS, scaled, TOKENS)
    assert torch.allclose(there.embeds, 4 * prompt.embeds, rtol=1e-5, atol=1e-6)
    assert torch.allclose(carry_prompt(there, scaled, TOKENS, plain, TOKENS).embeds, prompt.embeds, rtol=0, atol=1e-5)
    searched = carry_prompt(prompt, plain, TOKENS, scaled, TOKENS, "relative_anchors", steps=5)
    assert float(searched.embeds.detach().std(correction=0)) == pytest.approx(
        4 * float(table(plain).std(correction=0)), 1e-5
    )


def test_tokens_pair_by_what_they_say_not_by_id() -> None:
    source, target = gpt2(8, 1), gpt2(8, 2)
    theirs = tokens([*reversed(WORDS[5:]), "x0", "x1", "x2", "x3", "x4"])
    pairs = shared_tokens(TOKENS, theirs)
    assert pairs == [(2 + i, 2 + 59 - i) for i in range(5, 60)]
    for s, t in pairs:
        set_table(target, table(target).index_copy(0, torch.tensor([t]), table(source)[s : s + 1]))
    prompt = SoftPrompt(source, 4, seed=4)
    carried = carry_prompt(prompt, source, TOKENS, target, theirs)
    assert torch.allclose(carried.embeds, prompt.embeds, rtol=0, atol=1e-5)


def test_marks_of_a_blank_count_as_one() -> None:
    assert shared_tokens(tokens(["Ġthe", "of", "é"]), tokens(["▁the", "▁of", "é"])) == [(2, 2), (4, 4)]


def test_relative_anchors_undo_a_rotation() -> None:
    """Cosines to anchors do not change under a rotation and a scale, so rows turn with the vocabulary."""
    source, target = gpt2(8, 1), gpt2(8, 2)
    turn = rotation(8)
    set_table(target, (3 * table(source).double() @ turn).float())
    prompt = SoftPrompt(source, 5, seed=4)
    carried = carry_prompt(prompt, source, TOKENS, target, TOKENS, "relative_anchors")
    rows = carried.embeds.detach().double()
    wanted = prompt.embeds.detach().double()
    assert float(F.cosine_similarity(rows, wanted @ turn).min()) > 0.9999
    ours, theirs = (F.normalize(table(model).double()[2:], dim=1) for model in (source, target))
    relative = F.normalize(wanted, dim=1) @ ours.T, F.normalize(rows, dim=1) @ theirs.T
    assert float(F.cosine_similarity(*relative).min()) > 0.9999
    assert float(rows.mean()) == pytest.approx(float(table(target).mean()), abs=1e-6)
    assert float(rows.std(correction=0)) == pytest.approx(float(table(target).std(correction=0)), rel=1e-5)


def test_the_search_climbs_and_its_seed_decides() -> None:
    source, target = gpt2(8, 1), gpt2(12, 2)
    prompt = SoftPrompt(source, 5, seed=4)
    ours, theirs = (F.normalize(table(model).double()[2:], dim=1) for model in (source, target))
    wanted = F.normalize(prompt.embeds.detach().double(), dim=1) @ ours.T

    def carry(**options: Any) -> SoftPrompt:
        return carry_prompt(prompt, source, TOKENS, target, TOKENS, "relative_anchors", **options)

    def agreement(carried: SoftPrompt) -> float:
        relative = F.normalize(carried.embeds.detach().double(), dim=1) @ theirs.T
        return float(F.cosine_similarity(relative, wanted).mean())

    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad():
        found = {steps: carry(steps=steps) for steps in (1, 30, 2000)}
    assert torch.equal(torch.get_rng_state(), before)
    assert agreement(found[1]) + 0.05 < agreement(found[30]) < agreement(found[2000])
    # The best there is without the mean held: cosines in the span of the anchors, by projection.
    best = torch.linalg.norm(wanted @ torch.linalg.qr(theirs).Q, dim=1) / wanted.norm(dim=1)
    assert float(best.mean()) - 0.03 < agreement(found[2000]) < float(best.mean()) + 1e-6
    assert torch.equal(carry(steps=30, seed=0).embeds, found[30].embeds)
    assert not torch.equal(carry(steps=30, seed=1).embeds, found[30].embeds)
    assert all(parameter.grad is None for model in (source, target) for parameter in model.parameters())


def test_what_folds_to_a_soft_prompt_is_carried_as_that() -> None:
    model = gpt2(8, 1)
    prompt = PTuning(model, num_virtual_tokens=4, seed=2)
    folded = prompt.fold()
    assert isinstance(folded, SoftPrompt)
    carried = carry_prompt(prompt, model, TOKENS, model, TOKENS)
    assert torch.allclose(carried.embeds, folded.embeds, rtol=0, atol=1e-5)


def test_too_few_shared_tokens_are_refused() -> None:
    source, target = gpt2(8, 1), gpt2(12, 2)
    prompt = SoftPrompt(source, 4)
    few = tokens([*WORDS[:7], *(f"x{i}" for i in range(53))])
    with pytest.raises(InputError, match=r"at least 8 shared tokens .* got 7: .* have 7 ordinary tokens in common"):
        carry_prompt(prompt, source, TOKENS, target, few)
    with pytest.raises(InputError, match=r"at least 12 shared tokens .* got 11: .* have 60 .* at most 11"):
        carry_prompt(prompt, source, TOKENS, target, TOKENS, "relative_anchors", num_tokens=11)
    with pytest.raises(InputError, match=r"at least 61 shared tokens"):
        carry_prompt(prompt, source, TOKENS, target, TOKENS, min_shared_tokens=61)
    assert carry_prompt(prompt, source, TOKENS, target, few, min_shared_tokens=7).embeds.shape == (4, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "v2v_nn"}, "expected method, one of v2v_lin, relative_anchors, got 'v2v_nn'"),
        ({"seed": 1}, "'v2v_lin' does not use seed"),
        ({"steps": 5}, "'v2v_lin' does not use steps"),
        ({"method": "relative_anchors", "steps": 0}, "expected steps, a whole number of at least 1"),
        ({"method": "relative_anchors", "seed": -1}, "expected seed"),
        ({"num_tokens": True}, "expected num_tokens"),
        ({"skip_frequent": -1}, "expected skip_frequent, a whole number of at least 0"),
        ({"min_shared_tokens": 0}, "expected min_shared_tokens"),
        ({"source_tokenizer": "gpt2"}, "expected source_tokenizer, a transformers tokenizer, got str"),
        ({"target_tokenizer": tokens([*WORDS, "more"])}, "expected target_tokenizer, .* ids below 62, got .* id 62"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    source = gpt2(8, 1)
    given = {"source_tokenizer": TOKENS, "target_model": gpt2(12, 2), "target_tokenizer": TOKENS} | options
    with pytest.raises(InputError, match=words):
        carry_prompt(SoftPrompt(source, 4), source, **given)


def test_prompts_that_no_vocabulary_carries_are_refused(tiny: ModuleType) -> None:
    source, target = gpt2(8, 1), gpt2(12, 2)

    def carry(prompt: Any, method: str = "v2v_lin") -> None:
        carry_prompt(prompt, source, TOKENS, target, TOKENS, method)

    with pytest.raises(InputError, match=r"folds to a SoftPrompt, .* got 'prefix'"):
        carry(tiny.prefix(source))
    with pytest.raises(InputError, match="a ptengine prompt, got Tensor"):
        carry(torch.zeros(4, 8))
    with pytest.raises(InputError, match=r"the prompt to carry was made for another backbone: expected hidden_size 12"):
        carry(SoftPrompt(target, 4))
    broken = SoftPrompt(source, 4)
    with torch.no_grad():
        broken.embeds[1] = 0
    with pytest.raises(InputError, match="without rows of zeros"):
        carry(broken, "relative_anchors")
    with torch.no_grad():
        broken.embeds[1, 0] = float("nan")
    with pytest.raises(InputError, match="finite numbers to carry"):
        carry(broken)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=62, n_positions=4, n_embd=8, n_layer=1, n_head=2))
    none_shared = tokens([f"x{i}" for i in range(60)])  # refused later
    with pytest.raises(InputError, match="below the 4 positions"):
        carry_prompt(SoftPrompt(source, 4), source, TOKENS, short, none_shared)


def test_the_bank_names_the_bridge_where_there_is_one(tiny: ModuleType, tmp_path: Any) -> None:
    model, llama, words = tiny.gpt2(), tiny.llama(), tiny.tokenizer()
    bank = PromptBank(tmp_path)
    asked = {"tokenizer": words, "task": tiny.words_task()}
    entry = bank.add("soft", tiny.soft(model), model=model, **asked)
    prefix = bank.add("prefix", tiny.prefix(model), model=model, **asked)
    with pytest.raises(InputError, match=r"'llama'; ptengine.transfer.carry_prompt can carry it there"):
        entry.load(llama, words)
    found = bank.search(model=llama, tokenizer=words, measure="token_cosine", prompt=tiny.soft(llama))
    assert "carry_prompt" in found.refused["soft"]
    assert "carry_prompt" not in found.refused["prefix"]
    other = tiny.gpt2()
    set_table(other, table(other) + 1)
    with pytest.raises(InputError, match=r"other weights; ptengine.transfer.carry_prompt"):
        entry.load(other, words)
    # The same model in another dtype, or behind another tokenizer, has nothing to be carried to.
    for refused, present, behind in (
        (prefix, llama, words), (entry, tiny.gpt2().to(torch.bfloat16), words), (entry, model, tiny.tokenizer(True))
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            refused.load(present, behind)
        assert "carry_prompt" not in str(raised.value)
    carried = carry_prompt(entry.load(model, words), model, words, llama, words)
    carried.facts.require_same(tiny.soft(llama).facts, "the carried prompt")
