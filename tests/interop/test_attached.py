"""The stock calls of a model that has a prompt attached: the numbers of the prompt placed in the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertForMaskedLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    pipeline,
)

from ptengine.backbone import generate, pack_rows, patched, sequence_logits
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import SoftPrompt

from ..backbone.stock import (
    CAUSAL,
    HIDE,
    POSITIONS,
    config,
    make,
    pad,
    random_rows,
    relative,
    stock_loss,
    stories,
)
from .attached_cases import KINDS, LENGTHS, SIDES, alone, gradients, labels_for, prompt_for


@pytest.fixture(params=CAUSAL)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_logits_loss_and_gradient(model: Any, kind: str, side: str) -> None:
    """A batch of ragged rows, padded on either side, gives what each row gives alone behind the prompt."""
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    ids, mask = pad(rows, side, value=50)
    labels, _ = pad(labels_for(rows), side, value=HIDE)
    with prompt.attached(model):
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
    assert out.logits.shape == (*ids.shape, model.config.vocab_size)
    found = gradients(prompt)
    for logits, kept, row in zip(out.logits, mask.bool(), rows, strict=True):
        assert relative(logits[kept], alone(model, prompt, row)) < 1e-5
    exact = stock_loss(model, [prompt.lower()] * len(rows), rows, labels_for(rows))
    exact.backward()
    assert (out.loss - exact).abs() < 1e-5
    assert relative(found, gradients(prompt)) < 1e-5


def test_forms_of_a_call(model: Any) -> None:
    """No mask, embeddings, positions of the text, tuples, positional arguments, the model without its head."""
    rows, prompt = random_rows(7, 7), prompt_for(model, "soft")
    ids = torch.tensor(rows)
    exact = torch.stack([alone(model, prompt, row) for row in rows])
    embeds = model.get_input_embeddings()(ids)
    with prompt.attached(model), torch.no_grad():
        for given in (
            {"input_ids": ids}, {"inputs_embeds": embeds}, {"input_ids": ids, "return_dict": False},
            {"input_ids": ids, "position_ids": torch.arange(7)[None]},
            {"input_ids": ids, "position_ids": torch.arange(7).expand(2, -1), "attention_mask": torch.ones(2, 7)},
            {"input_ids": ids, "use_cache": False},
        ):  # fmt: skip
            assert relative(model(**given)[0], exact) < 1e-5, given.keys()
        assert relative(model(ids).logits, exact) < 1e-5
        out = model(ids, output_hidden_states=True)
        assert {hidden.shape for hidden in out.hidden_states} == {(2, 7, model.config.hidden_size)}
        assert relative(model.get_output_embeddings()(model.base_model(ids).last_hidden_state), exact) < 1e-5
        # Positions that start elsewhere are respected: as behind a prompt that is followed by a gap.
        moved = model(ids, position_ids=torch.arange(7)[None] + 4).logits
        embeds = torch.cat([prompt.lower().embeds.expand(2, -1, -1), embeds], dim=1)  # type: ignore[union-attr]
    positions = torch.cat([torch.arange(6), torch.arange(10, 17)])[None]
    # With a mask, or transformers would take a gap for the beginning of another text.
    mask = torch.ones(2, 13, dtype=torch.int64)
    gap = model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).logits[:, 6:]
    assert relative(moved, gap) < 1e-5
    assert relative(moved, exact) > 1e-3


def test_rows_without_tokens_and_cached_steps(model: Any) -> None:
    """A cache that a call made is continued by the next, in one step or several."""
    rows, prompt = random_rows(9, 6), prompt_for(model, "soft")
    ids, mask = pad(rows, "left", value=50)
    with prompt.attached(model), torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :5], attention_mask=mask[:, :5])
        rest = model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        assert relative(rest.logits[0], whole[0, 5:]) < 1e-5
        assert relative(rest.logits[1], whole[1, 5:]) < 1e-5
        empty = torch.cat([mask, torch.zeros(1, 9, dtype=torch.int64)])
        out = model(torch.cat([ids, ids[:1]]), attention_mask=empty).logits
    assert relative(out[:2][mask.bool()], whole[mask.bool()]) < 1e-5
    assert out.isfinite().all()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several of several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "to the last token": {"do_sample": False, "min_new_tokens": 8},
    "no cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_generate(model: Any, kind: str, way: str) -> None:
    """Token for token what `ptengine.generate` gives, which other tests hold to the stock model."""
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    ids, mask = pad(rows, "left", value=2)
    torch.manual_seed(5)
    exact = generate(model, prompt, rows, max_new_tokens=8, **WAYS[way])
    with prompt.attached(model) as both:
        torch.manual_seed(5)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, **WAYS[way]), exact)
        torch.manual_seed(5)
        assert torch.equal(both.generate(ids, attention_mask=mask, max_new_tokens=8, **WAYS[way]), exact)
        torch.manual_seed(5)
        assert torch.equal(generate(model, prompt, rows, max_new_tokens=8, **WAYS[way]), exact)
    assert not torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, **WAYS[way]), exact)


def test_generate_by_embeddings_look_up_and_turns(model: Any) -> None:
    row, prompt = random_rows(7)[0], prompt_for(model, "soft")
    ids = torch.tensor([row])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    exact = generate(model, prompt, [row], **settings)
    assert isinstance(exact, Tensor)
    with prompt.attached(model):
        embeds = model.get_input_embeddings()(ids)
        found = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, 7), **settings)
        assert torch.equal(found, exact[:, 7:])
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), exact)
        cache = DynamicCache()
        turn = model.generate(ids, past_key_values=cache, **(settings | {"max_new_tokens": 3}))
        assert torch.equal(model.generate(turn, past_key_values=cache, **(settings | {"max_new_tokens": 5})), exact)


def test_pipeline(shared: Path) -> None:
    """The real model with its own tokenizer: one text, and several in batches."""
    model, tokenizer = stories(shared)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or "<unk>"
    tokenizer.padding_side = "left"
    prompt = SoftPrompt(model, 6, init="text", init_text="Tom had a red ball .", tokenizer=tokenizer)
    texts = ["Once upon a time", "One day , a girl named Lily went", "The"]
    exact = generate(model, prompt, texts, tokenizer, max_new_tokens=20, do_sample=False)
    with prompt.attached(model):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
        for options in ({}, {"batch_size": 3}):
            assert [out[0]["generated_text"] for out in write(texts, **settings, **options)] == exact
    assert [out[0]["generated_text"] for out in write(texts, **settings)] != exact


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_classifier(kind: str, side: str) -> None:
    """BERT: logits, loss, hidden states and gradient of each row alone, virtual tokens in the row or a prefix."""
    model = make("bert")
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    ids, mask = pad(rows, side, value=50)
    types = torch.arange(ids.shape[1]).expand_as(ids) % 2 * mask
    labels = torch.tensor([0, 2, 1, 1])
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, token_type_ids=types, labels=labels, output_hidden_states=True)
        out.loss.backward()
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids)
            given = {"attention_mask": mask, "token_type_ids": types}
            assert torch.equal(model(inputs_embeds=embeds, **given).logits, out.logits)
            square = model(ids[1:2], token_type_ids=types[1:2]).logits
            assert relative(square, out.logits[1:2]) < 1e-5
        with pytest.raises(InputError, match="return_dict=True"):
            model.bert(ids, return_dict=False)
    found = gradients(prompt)
    assert {hidden.shape for hidden in out.hidden_states} == {(*ids.shape, model.config.hidden_size)}
    with patched(model):
        exact = []
        for row, kept, kinds in zip(rows, mask.bool(), types, strict=True):
            batch = pack_rows([row], token_type_ids=[kinds[kept].tolist()])
            exact.append(sequence_logits(model, prompt.lower(), batch)[0])
        cross_entropy(torch.stack(exact), labels).backward()
    assert relative(out.logits, torch.stack(exact)) < 1e-5
    assert relative(found, gradients(prompt)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_masked_language_model(kind: str) -> None:
    """Another head on an encoder: token for token the same on both sides of the padding, in the slots as given."""
    torch.manual_seed(0)
    model = BertForMaskedLM(config("bert")).eval()
    rows, prompt = random_rows(5, 9), prompt_for(model, kind)
    with prompt.attached(model), torch.no_grad():
        exact = [model(torch.tensor([row])).logits[0] for row in rows]
        for side in SIDES:
            ids, mask = pad(rows, side, value=50)
            out = model(ids, attention_mask=mask).logits
            for logits, kept, wanted in zip(out, mask.bool(), exact, strict=True):
                assert relative(logits[kept], wanted) < 1e-5
    if kind == "soft":
        embeds = torch.cat([prompt.lower().embeds, model.get_input_embeddings()(torch.tensor(rows[0]))])[None]  # type: ignore[union-attr]
        assert relative(exact[0], model(inputs_embeds=embeds).logits[0, 6:]) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_other_families(family: str) -> None:
    """A sliding window that parts of the prompt leave, and a head that calls the decoder past its base model."""
    shape = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 2}
    shape |= {"max_position_embeddings": POSITIONS}
    torch.manual_seed(0)
    if family == "mistral":
        settings = MistralConfig(
            **shape, num_key_value_heads=2, intermediate_size=64, sliding_window=8, initializer_range=0.2
        )
        model: Any = MistralForCausalLM(settings).eval()
    else:
        model = OPTForCausalLM(OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=48, init_std=0.2)).eval()
    rows, prompt = random_rows(12, 7), prompt_for(model, "soft")
    ids, mask = pad(rows, "left", value=50)
    exact = [alone(model, prompt, row) for row in rows]
    ways = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    continued = generate(model, prompt, rows, **ways)
    with prompt.attached(model), torch.no_grad():
        out = model(ids, attention_mask=mask).logits
        for logits, kept, wanted in zip(out, mask.bool(), exact, strict=True):
            assert relative(logits[kept], wanted) < 1e-5
        for cache in ({}, {"past_key_values": DynamicCache()}):
            found = model.generate(ids, attention_mask=mask, **cache, **ways)
            assert torch.equal(found[:, 12:], continued[:, 12:])


def test_a_head_past_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not call the model it stands on gets an error, not an answer without the prompt."""
    model = make("llama")
    prompt = prompt_for(model, "soft")
    monkeypatch.setattr(type(model), "forward", lambda self, ids: self.lm_head(self.model.embed_tokens(ids)))
    with prompt.attached(model), pytest.raises(UnsupportedModelError, match="does not call its LlamaModel"):
        model(torch.tensor([[5, 6]]))
