"""Causal models that read no prompt kept apart: `generate` and attached prompts put virtual tokens in their rows."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ptengine.backbone import backbone_spec, causal_rows, generate, pack_rows, packed_loss, patched, supports
from ptengine.backbone import generation as generation_module
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import DecomposedPrompt, LlamaAdapter, SoftPrompt

from ..interop.attached_cases import gradients, labels_for, state
from .stock import HIDE, pad, random_rows, relative, stock_logits, stock_loss, virtual
from .test_families import PROMPT, WIDTH, make
from .test_generation import WAYS, in_row, same

# Biases from the mask, linear attention beside full, states alone, and positions that are counted from the left.
FAMILIES = ["bloom", "qwen3_next", "mamba", "bart"]
LENGTHS = (5, 11, 1, 8)
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("ignore:model type")


def prompt_of(model: Any, size: int = PROMPT, seed: int = 0) -> SoftPrompt:
    return SoftPrompt(model, init="array", array=virtual(size, seed, WIDTH).embeds.detach())


@pytest.mark.parametrize("way", ["greedy", "beams", "several of several beams", "no cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_writes_what_it_would_alone(family: str, way: str) -> None:
    model, rows, prompt = make(family), random_rows(*LENGTHS), virtual(PROMPT, width=WIDTH)
    before = state(model)
    out = generate(model, prompt, rows, max_new_tokens=NEW, **WAYS[way])
    assert state(model) == before
    count = WAYS[way].get("num_return_sequences", 1)
    for index, row in enumerate(rows):
        same(out[index * count : (index + 1) * count, max(LENGTHS) :], in_row(model, prompt, row, NEW, **WAYS[way]))
        assert out[index * count, max(LENGTHS) - len(row) : max(LENGTHS)].tolist() == row
    if family != "mamba":  # whose random states forget what is far behind
        assert not torch.equal(generate(model, None, rows, max_new_tokens=NEW, **WAYS[way]), out)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt_per_row(family: str) -> None:
    """Of different lengths, one given twice, and a row without: what stands beside a row changes nothing."""
    model, rows = make(family), random_rows(*LENGTHS)
    one, two = virtual(PROMPT, width=WIDTH), virtual(3, 1, WIDTH)
    prompts = [two, one, None, two]
    out = generate(model, prompts, rows, **GREEDY)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        same(out[index : index + 1, max(LENGTHS) :], in_row(model, prompt, row, NEW, do_sample=False))


def test_sampling_and_assistance() -> None:
    model, row, prompt = make("bloom"), random_rows(4)[0] * 2, virtual(PROMPT, width=WIDTH)
    ways = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(5)
    out = generate(model, prompt, [row], max_new_tokens=NEW, **ways)
    torch.manual_seed(5)
    same(out[:, 8:], in_row(model, prompt, row, NEW, **ways))
    exact = generate(model, prompt, [row], **GREEDY)
    assert torch.equal(generate(model, prompt, [row], prompt_lookup_num_tokens=2, **GREEDY), exact)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_calls(family: str, side: str) -> None:
    """Logits, loss, hidden states and gradient of ragged rows are those of each row alone; labels stand at the text."""
    model, rows = make(family), random_rows(*((5, 5) if (family, side) == ("bart", "left") else LENGTHS))
    prompt, (ids, mask) = prompt_of(model), pad(rows, side, value=50)
    given = labels_for(rows)
    if family == "bart":  # whose stock head does not shift them
        given = [[*row[1:], HIDE] for row in given]
    labels, _ = pad(given, side, value=HIDE)
    model(ids[:1], output_hidden_states=True)  # for which transformers leaves a mark
    before = state(model)
    with prompt.attached(model):
        out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        out.loss.backward()
        with torch.no_grad():
            words = model.get_input_embeddings()(ids)
            by_words = model(inputs_embeds=words, attention_mask=mask).logits
        packed = packed_loss(model, prompt.lower(), pack_rows(rows, labels_for(rows))).loss
    assert state(model) == before
    found = gradients(prompt)
    for logits, kept, row in zip(out.logits, mask.bool(), rows, strict=True):
        assert relative(logits[kept], stock_logits(model, prompt.lower(), row)[-len(row) :]) < 2e-5
    assert relative(by_words[mask.bool()], out.logits[mask.bool()]) < 1e-6
    assert {hidden.shape for hidden in out.hidden_states} == {(*ids.shape, WIDTH)}
    exact = stock_loss(model, [prompt.lower()] * len(rows), rows, labels_for(rows))
    exact.backward()
    assert abs(out.loss - exact) < 1e-5
    assert abs(packed - exact) < 1e-5  # which has its prompt in place, whatever is attached
    assert relative(found, gradients(prompt)) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_while_attached(family: str) -> None:
    """Ragged rows in beams, embeddings, and calls of ours inside the block, which have their own prompt."""
    model, rows = make(family), random_rows(*((8, 8) if family == "bart" else LENGTHS))
    prompt, other, (ids, mask) = prompt_of(model), virtual(3, 1, WIDTH), pad(rows, "left", value=2)
    beams = GREEDY | {"num_beams": 3}
    exact, different = generate(model, prompt, rows, **beams), generate(model, other, rows, **GREEDY)
    with prompt.attached(model) as both:
        assert torch.equal(model.generate(ids, attention_mask=mask, **beams), exact)
        assert torch.equal(both.generate(ids, attention_mask=mask, **beams), exact)
        assert torch.equal(generate(model, other, rows, **GREEDY), different)
        words = model.get_input_embeddings()(ids[1:2])
        found = model.generate(inputs_embeds=words, attention_mask=mask[1:2], **GREEDY)
    same(found, generate(model, prompt, rows[1:2], **GREEDY)[:, len(rows[1]) :])


@pytest.mark.parametrize("family", ["bloom", "qwen3_next", "bart"])
def test_turns(family: str) -> None:
    """A cache is continued by the whole text or by what is new; it holds the virtual tokens, too."""
    model, row, between = make(family), random_rows(7)[0], torch.tensor(random_rows(4, seed=1))
    prompt, never = prompt_of(model), GREEDY | {"eos_token_id": None, "pad_token_id": 2}
    first = generate(model, prompt, [row], **never)
    whole = torch.cat([first, between], dim=1)
    exact = generate(model, prompt, whole, **never)
    with prompt.attached(model), torch.no_grad():
        cache = DynamicCache(config=model.config)
        said = model.generate(torch.tensor([row]), past_key_values=cache, **never)
        assert torch.equal(said, first)
        given = {"past_key_values": cache, "attention_mask": torch.ones_like(whole)}
        assert torch.equal(model.generate(whole, **given, **never), exact)
        assert int(cache.get_seq_length()) == PROMPT + whole.shape[1] + NEW - 1
        start = model(whole[:, :5], use_cache=True)
        rest = model(whole[:, 5:], past_key_values=start.past_key_values).logits
        assert relative(rest, model(whole).logits[:, 5:]) < 1e-5


def test_threads_do_not_mix_prompts() -> None:
    """Two attach prompts of their own, two generate with theirs, all on one model."""
    model, rows = make("bloom"), random_rows(5, 8)
    prompts = [prompt_of(model, size, seed) for seed, size in enumerate((PROMPT, 3, 5, 4))]
    exact = [generate(model, prompt, rows, **GREEDY).tolist() for prompt in prompts]
    before, found, (ids, mask) = state(model), [[] for _ in prompts], pad(rows, "left", value=2)
    barrier = threading.Barrier(len(prompts), timeout=30)

    def run(index: int) -> None:
        barrier.wait()
        for _ in range(3):
            if index % 2:
                found[index].append(generate(model, prompts[index], rows, **GREEDY).tolist())
                continue
            found[index].append(model.generate(ids, attention_mask=mask, **GREEDY).tolist())

    def work(index: int) -> None:
        with nullcontext() if index % 2 else prompts[index].attached(model):
            run(index)
            barrier.wait()  # hooks go once nobody calls

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    with patched(model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[one] * 3 for one in exact]
    assert state(model) == before


def test_offsets_in_the_embeddings() -> None:
    """A decomposed prompt adds to the text's embeddings, in the first step and in later ones."""
    model = make("bloom")
    prompt, row = DecomposedPrompt(model, 6, max_length=40, rank=4), random_rows(7)[0]
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        lowered = prompt.lower()
        out = generate(model, prompt, [row], **GREEDY)
        words = model.get_input_embeddings()(out)[0] + lowered.input_offsets[: out.shape[1]]
        logits = model(inputs_embeds=torch.cat([lowered.embeds, words])[None]).logits[0, 6 + len(row) - 1 : -1]
    assert out[0, len(row) :].tolist() == logits.argmax(-1).tolist()
    with prompt.attached(model):
        assert torch.equal(model.generate(torch.tensor([row]), **GREEDY), out)


def test_what_is_found_out_of_each_model() -> None:
    facts = {family: backbone_spec(make(family)) for family in FAMILIES}
    assert all(spec.no_generation is None for spec in facts.values())
    assert [spec.pads_left for spec in facts.values()] == [True, True, True, False]
    assert "no generation" not in supports(make("bloom")).reason


def test_steps_that_differ_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that forgets that its row has virtual tokens: no cache then, and no padding on the left."""
    past = causal_rows._past
    monkeypatch.setattr(causal_rows, "_past", lambda cache, rows: min(past(cache, rows), 1))
    model = make("falcon")
    reason = str(backbone_spec(model).no_generation)
    assert "steps with a cache" in reason
    monkeypatch.setattr(causal_rows, "_past", past)
    prompt, row = prompt_of(model), random_rows(7)[0]
    assert f"no generation: {reason}" in supports(model).reason
    with pytest.raises(UnsupportedModelError, match="not supported for generation: "):
        generate(model, prompt, [row], **GREEDY)
    uncached = GREEDY | {"use_cache": False}
    exact = generate(model, prompt, [row], **uncached)
    with prompt.attached(model):
        with pytest.raises(UnsupportedModelError, match=r"steps with a cache .*\(give use_cache=False\)"):
            model.generate(torch.tensor([row]), **GREEDY)
        assert torch.equal(model.generate(torch.tensor([row]), **uncached), exact)


def test_rows_of_one_length_where_padding_changes_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, seen = make("bloom"), virtual(PROMPT, width=WIDTH), []
    rows = random_rows(5, 8, 5)
    exact = generate(model, prompt, rows, **GREEDY)
    found = generation_module.require_patched
    monkeypatch.setattr(generation_module, "require_patched", lambda model: replace(found(model), pads_left=False))
    with patched(model):
        model.transformer.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
        for limit in ({"max_new_tokens": NEW}, {"max_length": 8 + NEW}):
            seen.clear()
            assert torch.equal(generate(model, prompt, rows, do_sample=False, **limit), exact)
            assert [shape for shape in seen if shape[1] > 1] == [(2, PROMPT + 5), (1, PROMPT + 8)]


def test_length_limit() -> None:
    """gpt_neo has 64 positions: virtual tokens, text and new tokens may use all of them and not one more."""
    model, rows = make("gpt_neo"), random_rows(50, 3)
    prompt, mixed = prompt_of(model), [virtual(3, 1, WIDTH), virtual(PROMPT, width=WIDTH)]
    full = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    assert generate(model, prompt, rows, **full).shape == (2, 57)
    more = {"max_new_tokens": 11, "min_new_tokens": 11, "do_sample": False}
    assert generate(model, mixed, rows, **more).shape == (2, 61)  # 3 + 50 + 11 and 7 + 3 + 11
    with pytest.raises(InputError, match="input 0: expected at most 64 positions, got 7 virtual tokens, 50"):
        generate(model, prompt, rows, max_new_tokens=8)
    with prompt.attached(model), pytest.raises(InputError, match="at most 64 positions, got 7 virtual tokens and 58"):
        model(torch.tensor(random_rows(58)))


def test_refused() -> None:
    model, bart = make("bloom"), make("bart")
    prompt, ids = prompt_of(model), torch.tensor(random_rows(5, 5))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(InputError, match="the dynamic cache, in which virtual tokens have slots of their own, got 'st"):
        generate(model, prompt, [[5]], cache_implementation="static", **GREEDY)
    foreign = model(ids).past_key_values
    with prompt.attached(model):
        with pytest.raises(InputError, match="which need slots of it, got a static one"):
            model.generate(ids, cache_implementation="static", **GREEDY)
        with pytest.raises(InputError, match="filled while this prompt was attached, got 5 tokens of another call"):
            model(ids[:, :1], past_key_values=foreign)
        with pytest.raises(InputError, match="expected at least one token in every row"):
            model(ids, attention_mask=mask * torch.tensor([[1], [0]]))
        with pytest.raises(InputError, match="input 0: expected padding on the left to generate"):
            model.generate(ids, attention_mask=mask.flip(1), **GREEDY)
        with pytest.raises(InputError, match="got holes"):
            model(ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
        model(ids, past_key_values=None)  # nothing of a call that failed is left for the next
    with prompt_of(bart).attached(bart), pytest.raises(InputError, match="no padding before a text with a prompt"):
        bart(ids, attention_mask=mask)
    with pytest.raises(UnsupportedModelError, match="bloom"):
        LlamaAdapter(model, 3)
