"""The ways of `model.generate` while a prompt is attached: the stock numbers of the prompt placed in the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache, TextIteratorStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ptengine.backbone import VirtualTokens, generate, patched
from ptengine.errors import InputError
from ptengine.prompts import Prefix, SoftPrompt

from ..backbone.stock import make, pad, random_rows, relative
from ..backbone.test_families import make as make_windowed
from ..backbone.test_generation import in_row, same
from ..backbone.test_generation_modes import (
    ASSISTED,
    FAMILIES,
    MODES,
    STOP,
    TEXTS,
    assistance,
    prompt_of,
    real,
    same_text,
)
from .attached_cases import KINDS, LENGTHS, prompt_for
from .test_attached import WAYS

__all__ = ["real"]  # a fixture

NEW = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.mark.parametrize("way", ASSISTED)
@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding(model: Any, kind: str, way: str) -> None:
    """Greedy search's tokens; the first call of the block may be that of an assistant that stops at an early layer."""
    if (model.config.model_type, way) == ("gpt2", "early exit"):
        pytest.skip("the stock GPT-2 has no early exit")
    prompt, row = prompt_for(model, kind), random_rows(4)[0] * 2
    ids, layers = torch.tensor([row]), model.config.num_hidden_layers
    exact = generate(model, prompt, ids, **NEW)
    with prompt.attached(model):
        assert torch.equal(model.generate(ids, **NEW, **assistance(model, way)), exact)
        assert model.config.num_hidden_layers == layers
    if kind == "soft":
        same(exact[:, len(row) :], in_row(model, prompt.lower(), row, **{**NEW, "new": 12, "max_new_tokens": 12}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_with_a_prompt_of_its_own(kind: str) -> None:
    """A prompt for each of the two models, and a row that has padding before it."""
    model, assistant, calls = make("llama"), make("llama"), []
    prompt, row = prompt_for(model, kind), random_rows(7)[0]
    exact = generate(model, prompt, [row], **NEW)
    ids, mask = torch.tensor([[2, 2, *row]]), torch.tensor([[0, 0, *[1] * len(row)]])
    with prompt.attached(model), prompt_for(assistant, kind).attached(assistant):
        model.register_forward_hook(lambda *_: calls.append(1))
        found = model.generate(ids, attention_mask=mask, assistant_model=assistant, **NEW)
    assert torch.equal(found[:, 2:], exact)
    assert len(calls) < 10  # of 12 tokens: the assistant is the same model behind the same prompt


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache(model: Any, kind: str, way: str) -> None:
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    ids, mask = pad(rows, "left", value=2)
    torch.manual_seed(5)
    exact = generate(model, prompt, rows, max_new_tokens=8, **WAYS[way])
    with prompt.attached(model):
        torch.manual_seed(5)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=8, cache_implementation="static", **WAYS[way])
    assert torch.equal(found, exact)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("lengths", [(5, 11), (11, 11)])
def test_a_prefill_in_pieces(cache: str | None, lengths: tuple[int, ...]) -> None:
    model, rows = make("llama"), random_rows(*lengths)
    prompt, (ids, mask) = prompt_for(model, "soft"), pad(rows, "left", value=2)
    exact = generate(model, prompt, rows, **NEW)
    with prompt.attached(model):
        given = {"attention_mask": mask, "cache_implementation": cache, "prefill_chunk_size": 3}
        assert torch.equal(model.generate(ids, **NEW, **given), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_a_static_cache(model: Any, kind: str) -> None:
    """Filled in two calls and one token at a time, emptied and filled again; the prompt takes none of its slots."""
    rows, prompt = random_rows(9, 6), prompt_for(model, kind)
    ids, mask = pad(rows, "left", value=50)
    cache = StaticCache(config=model.config, max_cache_len=9)
    with prompt.attached(model), torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for _ in range(2):
            parts = [model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache).logits]
            parts.append(model(ids[:, 5:8], attention_mask=mask[:, :8], past_key_values=cache).logits)
            parts.append(model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits)
            assert relative(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()]) < 1e-5
            assert int(cache.get_seq_length()) == 9
            cache.reset()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_turns(model: Any, kind: str, static: bool) -> None:
    """A conversation on one cache: each turn continues what is in it, text that came between included."""
    first, between, prompt = random_rows(7)[0], random_rows(4, seed=1)[0], prompt_for(model, kind)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    with prompt.attached(model):
        turn = model.generate(torch.tensor([first]), past_key_values=cache, **(NEW | {"max_new_tokens": 3}))
        assert torch.equal(turn, generate(model, prompt, [first], **(NEW | {"max_new_tokens": 3})))
        said = torch.cat([turn, torch.tensor([between])], dim=1)
        turn = model.generate(said, past_key_values=cache, **(NEW | {"max_new_tokens": 5}))
        assert torch.equal(turn, generate(model, prompt, said, **(NEW | {"max_new_tokens": 5})))
        assert int(cache.get_seq_length()) == 7 + 3 + 4 + 5 - 1
        turn = model.generate(turn, past_key_values=cache, **NEW)
    assert torch.equal(turn, generate(model, prompt, turn[:, :-12], **NEW))


@pytest.mark.parametrize("way", ["greedy", "beams", "sampling", "assisted"])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_and_the_cache_that_generate_makes(family: str, way: str) -> None:
    """It is told to keep what leaves a window: by its tokens the prompt is as far behind as it is in the row."""
    model, rows = make_windowed(family), random_rows(*((11,) if way == "assisted" else LENGTHS))
    prompt = SoftPrompt(model, init="array", array=0.2 * torch.randn(7, 48, generator=torch.Generator().manual_seed(3)))
    ids, mask = pad(rows, "left", value=2)
    ways = {"assisted": {"do_sample": False, "prompt_lookup_num_tokens": 2}, **WAYS}[way]
    plain = {name: value for name, value in ways.items() if name != "prompt_lookup_num_tokens"}
    torch.manual_seed(5)
    exact = generate(model, prompt, rows, max_new_tokens=12, **plain)
    if way != "sampling":
        same(exact[:1, ids.shape[1] :], in_row(model, prompt.lower(), rows[0], 12, **plain))
    with prompt.attached(model):
        torch.manual_seed(5)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=12, **ways)
        assert torch.equal(found, exact)
        given = DynamicCache(config=model.config)
        assert any(type(layer) is DynamicSlidingWindowLayer for layer in given.layers)
        model(ids, attention_mask=mask, past_key_values=given)
        assert all(type(layer) is DynamicLayer for layer in given.layers)


@pytest.mark.parametrize("mode", ["sampling", "sampled beams", "static beams", "stop strings, beams", "assisted"])
@pytest.mark.parametrize("kind", KINDS)
def test_real_models_write_what_they_would_in_the_row(real: tuple[Any, Any], kind: str, mode: str) -> None:
    (model, tokenizer), ways, bare = real, dict(MODES[mode]), 0
    soft = prompt_of(model, tokenizer, "soft")
    prompt = prompt_in(model, soft, kind)
    if "stop_strings" in ways:
        ways["tokenizer"] = tokenizer
    stock = {name: value for name, value in ways.items() if name != "prompt_lookup_num_tokens"}
    for text in TEXTS:
        row = tokenizer(text)["input_ids"]
        torch.manual_seed(5)
        exact = in_row(model, soft, row, 12, **stock)
        with prompt.attached(model):
            torch.manual_seed(5)
            got = model.generate(torch.tensor([row]), max_new_tokens=12, pad_token_id=2, **ways)
        same_text(got[:, len(row) :], exact, tokenizer)
        torch.manual_seed(5)
        bare += got.tolist() == model.generate(torch.tensor([row]), max_new_tokens=12, pad_token_id=2, **ways).tolist()
    assert bare < len(TEXTS)


def prompt_in(model: Any, soft: VirtualTokens, kind: str) -> Any:
    if kind == "soft":
        return SoftPrompt(model, init="array", array=soft.embeds)
    from ptengine.backbone import capture_prefix

    with patched(model), torch.no_grad():
        kept = capture_prefix(model, soft)
    return Prefix(model, init="array", array=torch.stack([kept.keys, kept.values]))


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_and_stop_strings(real: tuple[Any, Any], kind: str) -> None:
    """The pieces of text make the whole, up to the string that ends it."""
    model, tokenizer = real
    prompt = prompt_in(model, prompt_of(model, tokenizer, "soft"), kind)
    row = tokenizer(TEXTS[0])["input_ids"]
    exact = generate(model, prompt, [row], tokenizer, max_new_tokens=20, do_sample=False, **STOP)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with prompt.attached(model):
        model.generate(
            torch.tensor([row]), max_new_tokens=20, do_sample=False, streamer=streamer, tokenizer=tokenizer, **STOP
        )
    text = "".join(streamer)
    assert text.strip() == tokenizer.decode(exact[0, len(row) :], skip_special_tokens=True).strip()
    assert any(stop in text for stop in STOP["stop_strings"])


def test_a_compiled_step_with_a_static_cache() -> None:
    """As `generate` compiles it by itself on a GPU."""
    model, rows = make("llama"), random_rows(*LENGTHS)
    prompt, (ids, mask) = prompt_for(model, "prefix"), pad(rows, "left", value=2)
    exact = generate(model, prompt, rows, **NEW)
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=False)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    with prompt.attached(model):
        given = {"attention_mask": mask, "cache_implementation": "static", "compile_config": compiled}
        assert torch.equal(model.generate(ids, **NEW, **given), exact)
    torch._dynamo.reset()


def test_refused_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounds keys, and what has dropped some or will."""
    model, windowed = make("llama"), make_windowed("mistral")
    ids = torch.tensor(random_rows(12))
    quantized = QuantizedCache.__new__(QuantizedCache)
    quantized.layers = []
    with prompt_for(model, "soft").attached(model):
        with pytest.raises(InputError, match="got a QuantizedCache, which rounds them"):
            model(ids, past_key_values=quantized)
        with pytest.raises(InputError, match="a cache of transformers beside an attached prompt, got tuple"):
            model(ids, past_key_values=())
    prompt = SoftPrompt(windowed, 3)
    dropped = windowed(ids, past_key_values=DynamicCache(config=windowed.config)).past_key_values
    with prompt.attached(windowed):
        for cache in (dropped, StaticCache(config=windowed.config, max_cache_len=20)):
            with pytest.raises(InputError, match=r"drops what has left a sliding window: give past_key_values=Dynamic"):
                windowed(ids[:, :1], past_key_values=cache)


def test_the_first_call_of_an_early_exit_keeps_all_layers() -> None:
    """The prompt's keys and values are computed in the midst of a call that runs one layer of three."""
    model = make("llama")
    prompt, ids = prompt_for(model, "soft"), torch.tensor(random_rows(6))
    with prompt.attached(model), torch.no_grad():
        model.config.num_hidden_layers = 1
        early = model(ids).logits
        model.config.num_hidden_layers = 3
        whole: Tensor = model(ids).logits
    with prompt.attached(model), torch.no_grad():
        assert relative(whole, model(ids).logits) < 1e-6
    assert relative(early, whole) > 1e-3
