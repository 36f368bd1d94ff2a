"""Encoder-decoders write targets behind a prompt: token for token what the stock `generate` writes with it in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import ptengine
from ptengine.backbone import KeyValuePrefix, VirtualTokens, backbone_spec, generate, patched, supports
from ptengine.errors import InputError, UnsupportedModelError

from .stock import pad, random_rows
from .test_patching import traces
from .test_seq2seq import FAMILIES, PROMPT, SHARED, lowered, make

SOURCES = random_rows(5, 11, 1, 8)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "no cache": {"do_sample": False, "use_cache": False},
    "forced and stopped": {"do_sample": False, "forced_bos_token_id": 9, "repetition_penalty": 1.3, "min_length": 4},
}
LONGEST = {"max_new_tokens": 7}


def writer(family: str) -> Any:
    """A head of its own: tied to the embeddings a random model repeats what it reads, prompt or no prompt."""
    model = make(family)
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return model


def by_stock(model: Any, prompt: Any, sources: list[list[int]], **settings: Any) -> Tensor:
    """One batch of the stock `generate`, padded behind its rows, with the prompt in them or in the decoder's cache."""
    ids, mask = pad(sources, "right", 3)
    words = model.get_input_embeddings()(ids)
    if isinstance(prompt, VirtualTokens):
        rows, size = len(sources), prompt.num_virtual_tokens
        words = torch.cat([prompt.embeds.expand(rows, -1, -1), words], dim=1)
        mask = torch.cat([mask.new_ones(rows, size), mask], dim=1)
    if isinstance(prompt, KeyValuePrefix):
        _prefill(model, prompt)
    try:
        with torch.no_grad():
            return model.generate(inputs_embeds=words, attention_mask=mask, **LONGEST, **settings)
    finally:
        vars(model).pop("prepare_inputs_for_generation", None)


def _prefill(model: Any, prompt: KeyValuePrefix) -> None:
    """Lay the prefix itself into the empty cache of the first step, once per row and beam; without a cache, of each."""
    from transformers import DynamicCache, EncoderDecoderCache

    prepare = model.prepare_inputs_for_generation

    def filled(input_ids: Tensor, **kwargs: Any) -> Any:
        inputs = prepare(input_ids, **kwargs)
        if inputs.get("use_cache") is False:
            inputs["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        own = inputs["past_key_values"].self_attention_cache
        if own.get_seq_length() == 0:
            for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
                shape = (len(input_ids), -1, -1, -1)
                own.update(keys.transpose(0, 1).expand(shape), values.transpose(0, 1).expand(shape), layer)
        return inputs

    model.prepare_inputs_for_generation = filled


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "kind"), [("t5", "soft"), ("t5", "prefix"), ("bart", "soft"), ("bart", "prefix"), ("longt5", "soft")]
)
def test_equals_the_stock_batch(family: str, kind: str, mode: str) -> None:
    model = writer(family)
    prompt = lowered(model, kind)
    torch.manual_seed(1)
    exact = by_stock(model, prompt, SOURCES, **MODES[mode])
    before = traces(model)
    torch.manual_seed(1)
    got = generate(model, prompt, SOURCES, **LONGEST, **MODES[mode])
    assert got.tolist() == exact.tolist()
    assert traces(model) == before
    bare = generate(model, None, SOURCES, **LONGEST, **MODES[mode])
    assert bare.tolist() != got.tolist()


@pytest.mark.parametrize(("family", "kind"), [("mbart", "soft"), ("umt5", "prefix"), ("mbart", "prefix")])
def test_rows_alone(family: str, kind: str) -> None:
    """The other families that are routed; what stands beside a row changes nothing."""
    model = writer(family)
    prompt = lowered(model, kind)
    got = generate(model, prompt, SOURCES, **LONGEST, do_sample=False)
    for row, source in zip(got, SOURCES, strict=True):
        alone = by_stock(model, prompt, [source], do_sample=False)[0].tolist()
        assert row.tolist()[: len(alone)] == alone
        assert len(set(alone)) > 2


@pytest.mark.parametrize(("family", "kind"), [("t5", "soft"), ("t5", "prefix")])
def test_a_prompt_per_row(family: str, kind: str) -> None:
    """Of different lengths, one of them twice, and a row without; in the inputs' order, two targets each."""
    model = make(family)
    one, two = lowered(model, kind, 0), lowered(model, kind, 1, 2)
    prompts = [two, one, None, two]
    settings = {"do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    got = generate(model, prompts, SOURCES, **LONGEST, **settings).reshape(len(SOURCES), 2, -1)
    for prompt, source, targets in zip(prompts, SOURCES, got, strict=True):
        exact = by_stock(model, prompt, [source], **settings)
        assert targets[:, : exact.shape[1]].tolist() == exact.tolist()
        assert set(targets[:, exact.shape[1] :].flatten().tolist()) <= {model.config.pad_token_id}


@pytest.mark.parametrize(("family", "kind"), [("t5", "soft"), ("t5", "prefix"), ("bart", "soft"), ("bart", "prefix")])
def test_assisted_decoding_and_static_caches(family: str, kind: str) -> None:
    """Greedy search's targets by look-up, with an assistant that has no prompt, and from a cache of fixed size."""
    model, assistant = writer(family), make(family)
    prompt, source = ptengine_prompt(model, kind), SOURCES[1]
    settings = LONGEST | {"do_sample": False}
    exact = by_stock(model, prompt.lower(), [source], do_sample=False).tolist()
    # Before, the stock assisted search of a BART ended at its start token, which is its EOS.
    is_assisted = family != "bart" or Version(transformers.__version__) >= Version("5.23")
    looked_up: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if is_assisted:
        assert generate(model, prompt, [source], **settings, **looked_up).tolist() == exact
    static = {"cache_implementation": "static"}
    if kind == "soft":
        assert generate(model, prompt, [source], **settings, **static).tolist() == exact
        many = generate(model, prompt, SOURCES, **settings, num_beams=3, **static)
        assert many.tolist() == generate(model, prompt, SOURCES, **settings, num_beams=3).tolist()
    else:
        with pytest.raises(
            InputError, match="the dynamic cache behind a prefix, in which its slots stand empty, got 's"
        ):
            generate(model, prompt, [source], **settings, **static)
        assert generate(model, prompt, [source], **settings, cache_implementation="dynamic").tolist() == exact
    with pytest.raises(InputError, match="expected no assistant_model: it would be handed the prompt; inside"):
        generate(model, prompt, [source], **settings, assistant_model=assistant)
    ids = torch.tensor([source])
    with prompt.attached(model):
        ways = [looked_up, {"assistant_model": assistant}] if is_assisted else []
        for given in [*ways, *([static] if kind == "soft" else [])]:
            assert model.generate(ids, **settings, **given).tolist() == exact
        if kind == "prefix":
            with pytest.raises(InputError, match="a dynamic cache beside a prefix attached"):
                model.generate(ids, **settings, **static)


def ptengine_prompt(model: Any, kind: str) -> Any:
    """A prompt that lowers to what `lowered` gives."""
    given = lowered(model, kind)
    if kind == "soft":
        return ptengine.SoftPrompt(model, init="array", array=given.embeds.detach())
    return ptengine.Prefix(model, init="array", array=torch.stack([given.keys, given.values]).detach())


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_the_encoder_runs_once(kind: str) -> None:
    model, calls = make("t5"), []
    prompt = lowered(model, kind)
    with patched(model):
        model.encoder.register_forward_hook(lambda *_: calls.append(1))
        generate(model, prompt, SOURCES, **LONGEST, num_beams=3)
    assert len(calls) == 1


def test_rows_of_one_length_where_padding_changes_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from ptengine.backbone import generation

    model = make("t5")
    prompt = lowered(model, "soft")
    sources, seen = [SOURCES[0], SOURCES[1], SOURCES[0][::-1]], []
    exact = generate(model, prompt, sources, **LONGEST, do_sample=False)
    found = generation.require_patched
    monkeypatch.setattr(generation, "require_patched", lambda model: replace(found(model), pads=False))
    with patched(model):
        model.encoder.register_forward_pre_hook(
            lambda _module, _args, call: seen.append(call["inputs_embeds"].shape[:2]), with_kwargs=True
        )
        assert generate(model, prompt, sources, **LONGEST, do_sample=False).tolist() == exact.tolist()
    assert sorted(seen) == [(1, PROMPT + 11), (2, PROMPT + 5)]


def test_texts() -> None:
    class Words:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

        def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
            assert skip_special_tokens
            return [" ".join(map(str, row)) for row in rows.tolist()]

    model = make("t5")
    prompt = ptengine.SoftPrompt(model, 3)
    texts = generate(model, prompt, ["5 6", "7"], Words(), **LONGEST, do_sample=False)
    ids = generate(model, prompt, [[5, 6], [7]], **LONGEST, do_sample=False)
    assert texts == [" ".join(map(str, row)) for row in ids.tolist()]


def test_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, long = make("bart"), make("longt5")
    for name in ("decoder_input_ids", "encoder_outputs", "inputs_embeds"):
        with pytest.raises(InputError, match=f"expected no {name}"):
            generate(model, None, [[5]], **LONGEST, **{name: torch.ones(1, 1)})
    with pytest.raises(InputError, match=r"row 0: expected at most 64 positions, got 6 virtual tokens and 59"):
        generate(model, lowered(model, "soft"), [[5] * 59], **LONGEST)
    with pytest.raises(InputError, match=r"a prefix of 6, the start token and 58 new ones"):
        generate(model, lowered(model, "prefix"), [[5]], max_new_tokens=58)
    with pytest.raises(UnsupportedModelError, match="with a prefix of keys and values"):
        generate(long, lowered(model, "prefix"), [[5]], **LONGEST)
    from ptengine.backbone import seq2seq_proof

    monkeypatch.setattr(seq2seq_proof, "compare_steps", lambda *_: "its steps differ")
    other = make("t5")
    with pytest.raises(UnsupportedModelError, match="generation behind a prefix: its steps differ"):
        generate(other, lowered(other, "prefix"), [[5]], **LONGEST)
    assert "no generation behind a prefix: its steps differ" in supports(other).reason
    generate(other, lowered(other, "soft"), [[5]], **LONGEST)


def test_steps_that_differ_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that forgets the relative bias of its prefix."""
    from ptengine.backbone import attention

    bias = attention._relative_bias
    monkeypatch.setattr(
        attention, "_relative_bias", lambda x: None if x is not None and x.shape[2] == 1 and x.shape[3] > 5 else bias(x)
    )
    assert "steps with a cache" in str(backbone_spec(make("t5")).no_generation)


def test_every_family_generates_behind_what_it_takes() -> None:
    for family in FAMILIES:
        spec = backbone_spec(make(family))
        assert spec.no_generation is None
        assert (spec.no_prefix is None) == (family in SHARED)
