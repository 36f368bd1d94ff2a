"""The ways of the stock `generate` beside greedy search, beams and sampling: assisted, static caches, stop strings.

Held to the stock model with the prompt in the row, on tiny models, the real small one and the embedded backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ptengine.assets import backbone_path
from ptengine.backbone import VirtualTokens, capture_prefix, generate, patched
from ptengine.backbone import attention as attention_module
from ptengine.errors import InputError
from ptengine.prompts import DecomposedPrompt

from .stock import make, prefix, random_rows, stories, virtual
from .test_families import make as make_windowed
from .test_generation import KINDS, LENGTHS, NEW, WAYS, in_row, lowered, same

FAMILIES = ["gpt2", "llama"]  # absolute positions, and rotary ones with fewer heads of keys
NEVER_ENDS = {"eos_token_id": None}
ASSISTED: dict[str, dict[str, Any]] = {
    "a model": {"assistant_model": 1},
    "the model itself": {"assistant_model": 0},
    "look-up": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
}


def assistance(model: Any, way: str) -> dict[str, Any]:
    """The arguments of a way, its assistant built: another model, or the very one that generates."""
    family = model.config.model_type
    if "assistant_model" not in ASSISTED[way]:
        return ASSISTED[way]
    return {"assistant_model": make(family, 1) if ASSISTED[way]["assistant_model"] else model}


@pytest.mark.parametrize("way", ASSISTED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_is_greedy_search(family: str, kind: str, way: str) -> None:
    if (family, way) == ("gpt2", "early exit"):
        pytest.skip("the stock GPT-2 has no early exit")
    model = make(family)
    prompt, row = lowered(model, kind), random_rows(4)[0] * 2  # whose repetition a look-up finds
    settings = {"max_new_tokens": 12, "do_sample": False} | NEVER_ENDS
    found = generate(model, prompt, [row], **settings, **assistance(model, way))
    assert torch.equal(found, generate(model, prompt, [row], **settings))
    if kind == "soft":
        same(found[:, len(row) :], in_row(model, prompt, row, 12, do_sample=False, **NEVER_ENDS))


@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_that_is_patched_proposes_what_it_would_alone(kind: str) -> None:
    """The call's prompt is its model's: behind it the assistant, of other layers and heads, would fail or change."""
    model, assistant = make("llama"), make("llama", 1, num_hidden_layers=4, num_key_value_heads=4)
    prompt, row, settings = lowered(model, kind), random_rows(7)[0], {"max_new_tokens": 12, "do_sample": False}
    said: list[Tensor] = []
    assistant.register_forward_hook(lambda module, args, out: said.append(out.logits[:, -1]))
    exact = generate(model, prompt, [row], **settings)
    assert torch.equal(generate(model, prompt, [row], assistant_model=assistant, **settings), exact)
    alone, said[:] = list(said), []
    with patched(assistant):
        assert torch.equal(generate(model, prompt, [row], assistant_model=assistant, **settings), exact)
    assert len(said) == len(alone) > 3
    torch.testing.assert_close(said, alone, rtol=1e-5, atol=1e-5)


def test_an_assistant_helps() -> None:
    """The model as its own assistant is right every time, so the model is called fewer times than it writes tokens."""
    model = make("llama")
    prompt, row, calls = lowered(model, "soft"), random_rows(7)[0], []
    assistant = make("llama")
    with assistant_behind(assistant, prompt), patched(model):
        model.register_forward_hook(lambda *_: calls.append(1))
        settings = {"max_new_tokens": 24, "do_sample": False} | NEVER_ENDS
        exact = generate(model, prompt, [row], **settings)
        plain, calls[:] = len(calls), []
        assert torch.equal(generate(model, prompt, [row], assistant_model=assistant, **settings), exact)
    assert plain >= 24
    assert len(calls) < 16


def assistant_behind(assistant: Any, prompt: VirtualTokens) -> Any:
    from ptengine.prompts import SoftPrompt

    return SoftPrompt(assistant, init="array", array=prompt.embeds.detach()).attached(assistant)


def test_assisted_sampling() -> None:
    """One seed: the same draws, whether the prompt is virtual tokens or the keys and values they have."""
    model, assistant = make("llama"), make("llama", 1)
    prompt, row, found = lowered(model, "soft"), random_rows(7)[0], []
    with patched(model), torch.no_grad():
        kept = capture_prefix(model, prompt)
    for one in (prompt, kept, None):
        torch.manual_seed(5)
        found.append(generate(model, one, [row], max_new_tokens=12, do_sample=True, assistant_model=assistant))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_assisted_decoding_with_offsets_in_the_embeddings() -> None:
    """Several tokens in one step, each with its own place in the text."""
    model = make("llama")
    prompt = DecomposedPrompt(model, 6, max_length=40, rank=4)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    row, settings = random_rows(4)[0] * 2, {"max_new_tokens": 12, "do_sample": False} | NEVER_ENDS
    exact = generate(model, prompt, [row], **settings)
    assert torch.equal(generate(model, prompt, [row], prompt_lookup_num_tokens=3, **settings), exact)
    assert not torch.equal(generate(model, None, [row], **settings), exact)


@pytest.mark.parametrize("way", [*WAYS, "sampling"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache(family: str, kind: str, way: str) -> None:
    """Ragged rows, left-padded: the tokens of the dynamic cache; a soft prompt's also those of the row alone."""
    ways = WAYS.get(way, {"do_sample": True, "top_k": 20, "num_return_sequences": 2})
    model, rows = make(family), random_rows(*LENGTHS)
    prompt, found = lowered(model, kind), []
    for cache in (None, "static"):
        torch.manual_seed(5)
        found.append(generate(model, prompt, rows, max_new_tokens=NEW, cache_implementation=cache, **ways))
    assert torch.equal(*found)
    if kind == "soft" and way in ("greedy", "beams"):
        same(found[1][1:2, max(LENGTHS) :], in_row(model, prompt, rows[1], **ways, cache_implementation="static"))


def test_a_static_cache_holds_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is kept once beside it, and attention reads the slots that are filled."""
    model, seen = make("llama"), []
    original = attention_module.prefix_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any) -> Any:
        seen.append((q.shape[0], k.shape[2], prefix_k.shape[:2], k.untyped_storage().nbytes() // k[:, :, :1].nbytes))
        return original(q, k, v, prefix_k, prefix_v, **options)

    monkeypatch.setattr(attention_module, "prefix_attention", spy)
    generate(
        model, virtual(6), random_rows(5, 5), max_new_tokens=4, min_new_tokens=4, num_beams=3,
        cache_implementation="static",
    )  # fmt: skip
    assert sorted({keys for _, keys, _, _ in seen}) == [5, 6, 7, 8]
    assert {rows for rows, *_ in seen} == {6}
    assert {shape for *_, shape, _ in seen} == {(1, 6)}
    assert {slots for *_, slots in seen} == {8}  # text and new tokens but for the last, which nothing reads


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_static_cache_behind_windows(family: str, way: str) -> None:
    """Windows that the prompt leaves: the stock static cache would drop what says how far the prompt is behind."""
    model, rows, prompt = make_windowed(family), random_rows(*LENGTHS), virtual(7)
    exact = generate(model, prompt, rows, max_new_tokens=12, **WAYS[way])
    same(exact[:1, max(LENGTHS) :], in_row(model, prompt, rows[0], 12, **WAYS[way]))
    asked = GenerationConfig(cache_implementation="static", max_new_tokens=12, **WAYS[way])
    asked.eos_token_id, asked.pad_token_id = model.generation_config.eos_token_id, 2
    for settings in (
        {"cache_implementation": "static", "max_new_tokens": 12, **WAYS[way]},
        {"cache_implementation": "dynamic", "max_new_tokens": 12, **WAYS[way]},
        {"generation_config": asked},
    ):
        assert torch.equal(generate(model, prompt, rows, **settings), exact)
    assert asked.cache_implementation == "static"
    for own in ("static", "hybrid"):  # what the model came with
        model.generation_config.cache_implementation = own
        assert torch.equal(generate(model, prompt, rows, max_new_tokens=12, **WAYS[way]), exact)
        assert model.generation_config.cache_implementation == own


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prefill_in_pieces(cache: str | None, padded: bool) -> None:
    """Later pieces of rows of equal length stood at the positions of the first: generate drops a mask of ones."""
    model, rows, prompt = make("llama"), random_rows(*((5, 11) if padded else (11, 11))), virtual(6)
    exact = generate(model, prompt, rows, max_new_tokens=NEW, do_sample=False)
    settings = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(generate(model, prompt, rows, prefill_chunk_size=3, **settings), exact)


class _Kept(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("way", ["greedy", "assisted", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming(kind: str, way: str) -> None:
    """The text first, then token by token what the call returns."""
    model = make("llama")
    prompt, row, streamer = lowered(model, kind), random_rows(7)[0], _Kept()
    ways = {"greedy": {}, "assisted": {"prompt_lookup_num_tokens": 3}, "static": {"cache_implementation": "static"}}
    out = generate(model, prompt, [row], max_new_tokens=NEW, do_sample=False, streamer=streamer, **ways[way])
    assert streamer.ended
    assert streamer.pieces[0].tolist() == row
    assert torch.cat(streamer.pieces).tolist() == out[0].tolist()
    assert len(streamer.pieces) > 2


@pytest.fixture(params=["stories260k", "embedded"])
def real(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The real small model, and the backbone that the package comes with."""
    if request.param == "stories260k":
        return stories(request.getfixturevalue("shared"))
    model = AutoModelForCausalLM.from_pretrained(backbone_path(), dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(backbone_path())


TEXTS = ["Once upon a time there was", "The"]
STOP = {"stop_strings": ["o", "."]}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static beams": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
    "stop strings": {"do_sample": False, **STOP},
    "stop strings, beams": {"do_sample": False, "num_beams": 3, **STOP},
    "stop strings, sampling": {"do_sample": True, "top_k": 20, **STOP},
    "assisted": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


def prompt_of(model: Any, tokenizer: Any, kind: str) -> Any:
    words = model.get_input_embeddings()(torch.tensor(tokenizer("Tom had a red ball.")["input_ids"]))
    noise = torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
    soft = VirtualTokens(words + 2 * words.std() * noise)  # strong enough to change what is written
    if kind == "soft":
        return soft
    with patched(model), torch.no_grad():
        return capture_prefix(model, soft)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_real_models_write_what_they_would_in_the_row(real: tuple[Any, Any], kind: str, mode: str) -> None:
    """Text by text, with one seed: the stock model's tokens; a prefix is that of the virtual tokens in its row."""
    (model, tokenizer), ways, new = real, MODES[mode], 12
    prompt, soft = prompt_of(model, tokenizer, kind), prompt_of(model, tokenizer, "soft")
    bare = 0
    for text in TEXTS:
        row = tokenizer(text)["input_ids"]
        stock = {name: value for name, value in ways.items() if name != "prompt_lookup_num_tokens"}
        if "stop_strings" in ways:
            stock["tokenizer"] = tokenizer
        torch.manual_seed(5)
        exact = in_row(model, soft, row, new, **stock)
        torch.manual_seed(5)
        got = generate(model, prompt, [row], tokenizer, max_new_tokens=new, **ways)
        same_text(got[:, len(row) :], exact, tokenizer)
        torch.manual_seed(5)
        bare += got.tolist() == generate(model, None, [row], tokenizer, max_new_tokens=new, **ways).tolist()
    assert bare < len(TEXTS)


def same_text(got: Tensor, exact: Tensor, tokenizer: Any) -> None:
    assert len(got) == len(exact)
    for ours, theirs in zip(got.tolist(), exact.tolist(), strict=True):
        assert tokenizer.decode(ours, skip_special_tokens=True) == tokenizer.decode(theirs, skip_special_tokens=True)
        shorter = min(len(ours), len(theirs))
        assert ours[:shorter] == theirs[:shorter]


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_each_row_where_they_stand(real: tuple[Any, Any], kind: str) -> None:
    """A batch: every text ends with its first stop string, or has none."""
    model, tokenizer = real
    prompt = prompt_of(model, tokenizer, kind)
    settings = {"max_new_tokens": 20, "do_sample": False}
    free = generate(model, prompt, TEXTS, tokenizer, **settings)
    stopped = generate(model, prompt, TEXTS, tokenizer, **settings, **STOP)
    ended = 0
    for whole, part in zip(free, stopped, strict=True):
        assert whole.startswith(part)
        ended += any(stop in part for stop in STOP["stop_strings"])
        assert not any(stop in part[:-6] for stop in STOP["stop_strings"])  # a token may end behind the string
    assert ended


def test_a_search_of_ones_own(real: tuple[Any, Any]) -> None:
    """What transformers has moved out of the library, such as contrastive search, comes as `custom_generate`."""
    model, tokenizer = real
    prompt, row = prompt_of(model, tokenizer, "prefix"), tokenizer(TEXTS[0])["input_ids"]

    def search(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        states = {name: kwargs[name] for name in ("past_key_values", "attention_mask", "use_cache")}
        ids = input_ids
        for _ in range(kwargs["generation_config"].max_new_tokens):
            step = ids if not states["past_key_values"].get_seq_length() else ids[:, -1:]
            logits = model(**model.prepare_inputs_for_generation(step, **states)).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            states["attention_mask"] = torch.ones_like(ids)
        return ids

    settings = {"max_new_tokens": 12, "do_sample": False} | NEVER_ENDS
    exact = generate(model, prompt, [row], tokenizer, **settings)
    assert torch.equal(generate(model, prompt, [row], tokenizer, custom_generate=search, **settings), exact)


ERRORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "contrastive search": (
        lambda m: generate(m, virtual(3), [[5]], penalty_alpha=0.6, top_k=4),
        "no penalty_alpha: contrastive search is no part of transformers any more; its code can be given as custom_gen",
    ),
    "DoLa": (lambda m: generate(m, virtual(3), [[5]], dola_layers="low"), "no dola_layers: DoLa is no part"),
    "constraints": (lambda m: generate(m, virtual(3), [[5]], force_words_ids=[[6]]), "no force_words_ids: constrained"),
    "groups of beams": (
        lambda m: generate(m, virtual(3), [[5]], num_beams=4, num_beam_groups=2), "no num_beam_groups: group beam"
    ),
    "in a configuration": (
        lambda m: generate(m, virtual(3), [[5]], generation_config=GenerationConfig(penalty_alpha=0.6, top_k=4)),
        "no penalty_alpha",
    ),
    "several inputs with an assistant": (
        lambda m: generate(m, virtual(3), [[5], [6]], assistant_model=m), "one input with assistant_model, got 2"
    ),
    "several inputs with a look-up": (
        lambda m: generate(m, virtual(3), [[5], [6]], prompt_lookup_num_tokens=2), "one input with prompt_lookup_num"
    ),
    "a quantized cache": (
        lambda m: generate(m, virtual(3), [[5]], cache_implementation="quantized"), "got 'quantized', which rounds them"
    ),
    "an old cache": (
        lambda m: generate(m, virtual(3), [[5]], cache_implementation="hybrid"),
        "cache_implementation dynamic, offloaded, static, offloaded_static or None, got 'hybrid'",
    ),
    "a cache away from no GPU": (
        lambda m: generate(m, virtual(3), [[5]], cache_implementation="offloaded"), "a model on a GPU, .* on the CPU"
    ),
    "stop strings without a tokenizer": (
        lambda m: generate(m, virtual(3), [[5]], stop_strings=["a"]), "a tokenizer to go with stop_strings"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_refused(case: str) -> None:
    """Before any work: no layer has run."""
    model = make("llama")
    call, message = ERRORS[case]
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message) as raised:
        call(model)
    assert "\n" not in str(raised.value)
    assert "_ptengine_state" not in vars(model)


class _AfterThree(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 10)


def test_other_ends(shared: Path) -> None:
    """Stopping criteria and logits processors of the caller see the text's tokens, from its first one."""
    model = make("llama")
    prompt, row, seen = prefix(model, 6), random_rows(7)[0], []

    def watch(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids[0].tolist())
        return scores

    out = generate(
        model, prompt, [row], max_new_tokens=20, do_sample=False, stopping_criteria=[_AfterThree()],
        logits_processor=[watch], **NEVER_ENDS,
    )  # fmt: skip
    assert out.shape == (1, 10)
    assert seen == [out[0, :length].tolist() for length in (7, 8, 9)]


@pytest.mark.parametrize("family", ["mistral", "bloom"])
@pytest.mark.filterwarnings("ignore:model type 'bloom'")
def test_the_padding_of_a_configuration_that_is_given(family: str) -> None:
    """The model's own stood in its place."""
    model, rows = make_windowed(family), random_rows(5, 3)
    prompt = virtual(4, width=model.config.hidden_size)
    (end,) = generate(model, prompt, rows[:1], max_new_tokens=1, do_sample=False)[0, 5:].tolist()
    asked = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=55, eos_token_id=end)
    found = generate(model, prompt, rows, generation_config=asked)
    assert found[0, 5:].tolist() == [end, *[55] * (found.shape[1] - 6)]
    assert found[1, :2].tolist() == [55, 55]
    assert asked.pad_token_id == 55


def test_what_a_given_configuration_leaves_open_was_read_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock `generate` takes the model's own then: 60 new tokens, not 20, in the places counted for 20."""
    model, asked, rows = make("gpt2"), GenerationConfig(do_sample=False), random_rows(5, 5)
    model.generation_config.max_new_tokens = 60
    with pytest.raises(InputError, match="5 tokens of text and 60 new ones"):
        generate(model, virtual(4), rows, generation_config=asked)
    model.generation_config.max_new_tokens, model.generation_config.num_beams = 2, 4
    seen = []
    monkeypatch.setattr(
        "ptengine.backbone.generation.decodes", lambda model, spec, settings: seen.append(settings("num_beams"))
    )
    assert generate(model, virtual(4), random_rows(50, 50), generation_config=asked).shape == (2, 52)
    assert seen == [4]


def test_a_static_cache_of_a_configuration_had_too_few_slots() -> None:
    """20 behind windows, where the model's own configuration has it write 30."""
    model, rows, prompt = make_windowed("mistral"), random_rows(5, 3), virtual(4)
    model.generation_config.max_new_tokens, model.generation_config.eos_token_id = 30, None
    exact = generate(model, prompt, rows, do_sample=False, cache_implementation="static")
    asked = GenerationConfig(do_sample=False, cache_implementation="static")
    assert exact.shape == (2, 35)
    assert torch.equal(generate(model, prompt, rows, generation_config=asked), exact)


@pytest.mark.filterwarnings("ignore:model type 'bart'")
def test_a_longest_text_of_a_configuration_is_that_of_every_row() -> None:
    """Rows that run without others' padding were given as many new tokens more."""
    model, rows = make_windowed("bart"), random_rows(9, 3)
    prompt = virtual(4, width=model.config.hidden_size)
    exact = generate(model, prompt, rows, max_length=12, do_sample=False, **NEVER_ENDS)
    assert exact.shape == (2, 12)
    model.generation_config.eos_token_id = None
    asked = GenerationConfig(max_length=12, do_sample=False)
    assert torch.equal(generate(model, prompt, rows, generation_config=asked), exact)
    model.generation_config.max_length = 12
    assert torch.equal(generate(model, prompt, rows, do_sample=False), exact)
