"""Generation behind a prompt: token for token what the stock `generate` gives with the prompt placed in the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from ptengine.backbone import KeyValuePrefix, VirtualTokens, capture_prefix, generate, patched
from ptengine.backbone import attention as attention_module
from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt

from ..training import tiny
from .stock import CAUSAL, POSITIONS, Lowered, make, pad, prefix, random_rows, stories, virtual

NEW = 8
LENGTHS = (5, 11, 1, 8)
KINDS = ["soft", "prefix"]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several of several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "to the last token": {"do_sample": False, "min_new_tokens": NEW},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.fixture(params=CAUSAL)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def lowered(model: Any, kind: str, size: int = 6, seed: int = 0) -> Any:
    return virtual(size, seed, model.config.hidden_size) if kind == "soft" else prefix(model, size, seed)


@torch.no_grad()
def in_row(model: Any, prompt: Lowered, ids: list[int], new: int = NEW, **ways: Any) -> Tensor:
    """New tokens [n, new] of one row alone by the stock model: a soft prompt as embeddings, a prefix as a cache."""
    tokens = torch.tensor([ids])
    settings = {"max_new_tokens": new, "pad_token_id": 2} | ways
    if isinstance(prompt, VirtualTokens):
        embeds = torch.cat([prompt.embeds, model.get_input_embeddings()(tokens[0])])[None]
        return model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **settings)
    if prompt is None:
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[:, len(ids) :]
    assert ways.get("num_beams", 1) == 1
    assert not ways.get("do_sample")
    return stock_prefix_search(model, prompt, ids, new)


def stock_prefix_search(model: Any, prompt: KeyValuePrefix, ids: list[int], new: int) -> Tensor:
    """Greedy search by hand over stock calls: the cache starts with the prefix, positions behind it."""
    cache, size = DynamicCache(), prompt.num_virtual_tokens
    for layer, (k, v) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    step, found = torch.tensor([ids]), []
    for _ in range(new):
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + step.shape[1])[None]
        mask = torch.ones(1, seen + step.shape[1])
        logits = model(step, past_key_values=cache, position_ids=positions, attention_mask=mask).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(step))
        if found[-1] == model.generation_config.eos_token_id:
            break
    assert cache.get_seq_length() >= size + len(ids)
    return torch.tensor([found])


def same(got: Tensor, exact: Tensor) -> None:
    """Equal up to the end of the sequence, behind which a batch pads."""
    assert len(got) == len(exact)
    for ours, theirs in zip(got.tolist(), exact.tolist(), strict=True):
        assert ours[: len(theirs)] == theirs
        assert set(ours[len(theirs) :]) <= {1, 2}


@pytest.mark.parametrize("way", WAYS)
def test_soft_prompt_equals_prompt_in_the_row(model: Any, way: str) -> None:
    """A batch of ragged rows gives what each row gives alone."""
    rows, prompt = random_rows(*LENGTHS), lowered(model, "soft")
    out = generate(model, prompt, rows, max_new_tokens=NEW, **WAYS[way])
    count = WAYS[way].get("num_return_sequences", 1)
    assert isinstance(out, Tensor)
    assert out.shape[0] == len(rows) * count
    for index, row in enumerate(rows):
        same(out[index * count : (index + 1) * count, max(LENGTHS) :], in_row(model, prompt, row, **WAYS[way]))
        assert out[index * count, max(LENGTHS) - len(row) : max(LENGTHS)].tolist() == row


@pytest.mark.parametrize("way", ["greedy", "no cache"])
def test_prefix_equals_prefix_in_the_cache(model: Any, way: str) -> None:
    rows, prompt = random_rows(*LENGTHS), lowered(model, "prefix")
    out = generate(model, prompt, rows, max_new_tokens=NEW, **WAYS[way])
    for index, row in enumerate(rows):
        same(out[index : index + 1, max(LENGTHS) :], stock_prefix_search(model, prompt, row, NEW))


@pytest.mark.parametrize("way", WAYS)
def test_kept_prefix_equals_soft_prompt(model: Any, way: str) -> None:
    """Whatever the search: a soft prompt's keys and values are a prefix that generates the same."""
    rows, prompt = random_rows(*LENGTHS), lowered(model, "soft")
    with patched(model), torch.no_grad():
        kept = capture_prefix(model, prompt)
    pair = [generate(model, one, rows, max_new_tokens=NEW, **WAYS[way]) for one in (prompt, kept)]
    assert torch.equal(*pair)


def test_sampling(model: Any) -> None:
    """One row, one seed: the same numbers are drawn from the same probabilities."""
    prompt, row = lowered(model, "soft"), random_rows(7)[0]
    ways = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(5)
    out = generate(model, prompt, [row], max_new_tokens=NEW, **ways)
    torch.manual_seed(5)
    same(out[:, 7:], in_row(model, prompt, row, **ways))
    torch.manual_seed(6)
    assert not torch.equal(generate(model, prompt, [row], max_new_tokens=NEW, **ways), out)


def test_without_a_prompt(model: Any) -> None:
    rows = random_rows(*LENGTHS)
    out = generate(model, None, rows, max_new_tokens=NEW, do_sample=False)
    ids, mask = pad(rows, "left", value=2)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("way", ["greedy", "beams", "several of several beams"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_per_row(model: Any, kind: str, way: str) -> None:
    """Prompts of different length, one given twice, and a row without: each row as with its prompt alone."""
    rows = random_rows(*LENGTHS, 6)
    first, second, third = (lowered(model, kind, size, seed) for seed, size in enumerate((6, 2, 9)))
    prompts = [second, first, None, third, first]
    out = generate(model, prompts, rows, max_new_tokens=NEW, **WAYS[way])
    count = WAYS[way].get("num_return_sequences", 1)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = generate(model, prompt, [row], max_new_tokens=NEW, **WAYS[way])
        same(out[index * count : (index + 1) * count, max(LENGTHS) :], alone[:, len(row) :])


def test_soft_prompts_and_prefixes_in_one_batch(model: Any) -> None:
    rows, prompts = random_rows(5, 8), [lowered(model, "soft"), lowered(model, "prefix")]
    out = generate(model, prompts, rows, max_new_tokens=NEW, do_sample=False)
    same(out[:1, 8:], in_row(model, prompts[0], rows[0], do_sample=False))
    same(out[1:, 8:], in_row(model, prompts[1], rows[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_input(model: Any, kind: str) -> None:
    """Lists, tensors, and batches padded on either side mean the same rows."""
    rows, prompt = random_rows(5, 11, 8), lowered(model, kind)
    exact = generate(model, prompt, rows, max_new_tokens=NEW, do_sample=False)
    for side in ("left", "right"):
        ids, mask = pad(rows, side, value=50)
        given = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(generate(model, prompt, given, max_new_tokens=NEW, do_sample=False), exact)
    square = random_rows(6, 6)
    exact = generate(model, prompt, square, max_new_tokens=NEW, do_sample=False)
    for same_rows in (torch.tensor(square), {"input_ids": torch.tensor(square)}):
        assert torch.equal(generate(model, prompt, same_rows, max_new_tokens=NEW, do_sample=False), exact)


def test_model_is_left_as_it_was(model: Any) -> None:
    """Patched for the call alone; training mode is off inside and back afterwards, module by module."""
    rows, prompt = random_rows(5, 8), lowered(model, "soft")
    exact = generate(model, prompt, rows, max_new_tokens=NEW, do_sample=False)
    before = sorted(vars(model))
    for module in model.modules():  # dropout that would show
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.base_model.eval()
    mixed = [module.training for module in model.modules()]
    for modes in (mixed, [True] * len(mixed)):
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        assert torch.equal(generate(model, prompt, rows, max_new_tokens=NEW, do_sample=False), exact)
        assert [module.training for module in model.modules()] == modes
    assert sorted(vars(model)) == before
    assert prompt.embeds.grad is None
    with patched(model):
        generate(model, prompt, rows, max_new_tokens=1)
        assert model.config._attn_implementation == "ptengine"


def test_prompt_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows and beams there are, attention reads one copy of the prompt's keys and values."""
    model = make("llama")
    shapes, calls = set(), []
    original = attention_module.prefix_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any) -> Any:
        shapes.add((*prefix_k.shape, prefix_k.untyped_storage().nbytes(), prefix_v.untyped_storage().nbytes()))
        calls.append((q.shape[0], k.shape[2]))
        return original(q, k, v, prefix_k, prefix_v, **options)

    monkeypatch.setattr(attention_module, "prefix_attention", spy)
    for beams in (1, 4):
        generate(model, virtual(6), random_rows(5, 5, 5), max_new_tokens=3, min_new_tokens=3, num_beams=beams)
    stored = 3 * 6 * 2 * 12 * 4  # layers, P, H_kv, D in fp32
    assert shapes == {(1, 6, 2, 12, stored, stored)}
    assert {batch for batch, _ in calls} == {3, 12}
    assert max(keys for _, keys in calls) == 7  # the cache holds text alone


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_model(shared: Path, kind: str) -> None:
    """Texts in, texts out, as the stock model writes them behind the same prompt."""
    model, tokenizer = stories(shared)
    embeds = model.get_input_embeddings()(torch.tensor(tokenizer("Tom had a red ball .")["input_ids"]))
    prompt: Any = VirtualTokens(embeds + 0.02 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0)))
    with patched(model), torch.no_grad():
        prompt = capture_prefix(model, prompt) if kind == "prefix" else prompt
    texts = ["Once upon a time", "One day , a girl named Lily went", "The"]
    out = generate(model, prompt, texts, tokenizer, max_new_tokens=30, do_sample=False)
    assert isinstance(out, list)
    for text, got in zip(texts, out, strict=True):
        row = tokenizer(text)["input_ids"]
        exact = in_row(model, prompt, row, new=30, do_sample=False)
        assert got == tokenizer.decode(exact[0], skip_special_tokens=True)
        assert len(got) > 30
        assert generate(model, prompt, text, tokenizer, max_new_tokens=30, do_sample=False) == [got]
    beams = generate(
        model, prompt, texts, tokenizer, max_new_tokens=12, num_beams=3, num_return_sequences=2, do_sample=False
    )
    assert len(beams) == 6
    if kind == "soft":
        for index, text in enumerate(texts):
            row = tokenizer(text)["input_ids"]
            exact = in_row(model, prompt, row, new=12, num_beams=3, num_return_sequences=2, do_sample=False)
            assert beams[2 * index : 2 * index + 2] == tokenizer.batch_decode(exact, skip_special_tokens=True)


@pytest.mark.parametrize("ahead", ["", "[CLS] "])
def test_a_text_was_continued_behind_the_eos_of_its_tokenizer(ahead: str) -> None:
    """Training and evaluation leave it out, and so wrote another text than `generate`; a source keeps it."""
    tokens, text = tiny.tokenizer(True), "film song it"
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{ahead}$A [EOS]", special_tokens=[("[CLS]", 2), ("[EOS]", 1)]
    )
    ids = tokens(text)["input_ids"]
    assert ids[-1] == 1
    options = {"max_new_tokens": NEW, "do_sample": False} | {"eos_token_id": None}
    for model, row in ((tiny.gpt2(), ids[:-1]), (tiny.t5(), ids)):
        written = generate(model, tiny.soft(model), [row], **options)
        (found,) = generate(model, tiny.soft(model), [text], tokens, **options)
        start = 0 if model.config.is_encoder_decoder else len(row)
        assert found == tokens.decode(written[0, start:], skip_special_tokens=True)
    if ahead:  # and a text without tokens is still continued from its BOS
        tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", 2)]
        )
        assert generate(tiny.gpt2(), None, "", tokens, **options)


def test_ended_rows_were_padded_with_a_word() -> None:
    """Token 0, where nothing declares a padding token; the stock `generate` takes the first that ends a row."""
    model, rows = make("gpt2"), random_rows(5, 5)
    model.generation_config.pad_token_id = None
    prompt = SoftPrompt(model, init="array", array=virtual(6).embeds.detach())
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    end = int(generate(model, prompt, rows, **options)[0, 6])
    with prompt.attached(model):
        exact = model.generate(torch.tensor(rows), attention_mask=torch.ones(2, 5), eos_token_id=[end, 3], **options)
    assert exact[0, 7:].tolist() == [end] * (exact.shape[1] - 7)
    assert exact.shape[1] > 8
    assert torch.equal(generate(model, prompt, rows, eos_token_id=[end, 3], **options), exact)
    asked = GenerationConfig(eos_token_id=[end, 3], **options)
    assert torch.equal(generate(model, prompt, rows, generation_config=asked), exact)


def test_length_limit(model: Any) -> None:
    """Prompt, text and new tokens may use every position and not one more."""
    rows, prompt = random_rows(50, 3), virtual(6)
    assert generate(model, prompt, rows, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (2, 58)
    assert generate(model, prompt, rows, max_length=58, min_new_tokens=8, do_sample=False).shape == (2, 58)
    for too_long in ({"max_new_tokens": 9}, {"max_length": 59}):
        with pytest.raises(
            InputError, match=f"input 0: expected at most {POSITIONS} positions, got 6 virtual tokens, 50 .* 9 new"
        ):
            generate(model, prompt, rows, **too_long)
    with pytest.raises(InputError, match=r"input 0: .* 20 new"):
        generate(model, prompt, random_rows(50))  # the stock default: 20 new tokens
    assert generate(model, None, rows, max_new_tokens=14, do_sample=False).shape[1] <= 64


ERRORS: dict[str, tuple[Any, str]] = {
    "no inputs": (lambda m: generate(m, virtual(3), []), "at least one input, got none"),
    "an empty input": (lambda m: generate(m, virtual(3), [[5], []]), "input 1: expected at least one token"),
    "an input of padding": (
        lambda m: generate(m, virtual(3), {"input_ids": torch.ones(2, 3, dtype=torch.int64),
                                           "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}),
        "input 1: expected at least one token",
    ),
    "texts without a tokenizer": (lambda m: generate(m, virtual(3), ["a", "b"]), "a tokenizer to go with texts"),
    "texts among tokens": (lambda m: generate(m, virtual(3), [[5], "b"]), "texts or token ids, got str"),
    "fractions": (lambda m: generate(m, virtual(3), [[0.5]]), "texts or token ids, got float"),
    # These came as TypeErrors and KeyErrors of Python's.
    "no text": (lambda m: generate(m, virtual(3), [None]), "input 0: expected texts or token ids, got NoneType"),
    "token ids without a list": (lambda m: generate(m, virtual(3), [5, 6]), "input 0: .* token ids, got int"),
    "none for inputs": (lambda m: generate(m, virtual(3), None), "expected texts, .* or a mapping, got NoneType"),
    "a mapping without ids": (lambda m: generate(m, virtual(3), {"ids": 1}), "expected input_ids .*, got 'ids'"),
    "a mapping of lists": (
        lambda m: generate(m, virtual(3), {"input_ids": [[5], [6, 7]]}), "input_ids as a tensor .*, got list"
    ),
    # An IndexError on a CPU; on a GPU it ended the process.
    "an id beyond the vocabulary": (
        lambda m: generate(m, virtual(3), [[5], [6, 10**6]]), "row 1: expected token ids from 0 to .*, got 1000000"
    ),
    "an id below zero": (lambda m: generate(m, virtual(3), [[-100]]), "row 0: expected token ids .*, got -100"),
    "one axis": (lambda m: generate(m, virtual(3), torch.tensor([5, 6])), r"input_ids \[B, T\], got \[2\]"),
    "mask of another shape": (
        lambda m: generate(m, virtual(3), {"input_ids": torch.ones(2, 3, dtype=torch.int64),
                                           "attention_mask": torch.ones(2, 2)}),
        r"attention_mask of shape \[2, 3\], got \[2, 2\]",
    ),
    "too few prompts": (
        lambda m: generate(m, [virtual(3)], [[5], [6]]), r"one prompt or one per input \(2\), got 1"
    ),
    # An AttributeError of Python's.
    "a path for a prompt": (lambda m: generate(m, "my-prompt", [[5]]), "expected a ptengine prompt, got str"),
    "width of the prompt": (lambda m: generate(m, virtual(3, width=4), [[5]]), "width 48, got 4"),
    "positions": (lambda m: generate(m, virtual(3), [[5]], position_ids=torch.zeros(1, 1)), "no position_ids"),
    "embeddings": (lambda m: generate(m, virtual(3), [[5]], inputs_embeds=torch.zeros(1)), "no inputs_embeds"),
    "a cache": (lambda m: generate(m, virtual(3), [[5]], past_key_values=DynamicCache()), "no past_key_values"),
    "a model without a head": (lambda m: generate(m.model, virtual(3), [[5]]), "generate with, got LlamaModel"),
    "an encoder": (lambda m: generate(make("bert"), virtual(3), [[5]]), "LM head to generate with, got Bert"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_refused(case: str) -> None:
    model = make("llama")
    call, message = ERRORS[case]
    with pytest.raises(InputError, match=message) as raised:
        call(model)
    assert "\n" not in str(raised.value)
    assert "_ptengine_state" not in vars(model)
