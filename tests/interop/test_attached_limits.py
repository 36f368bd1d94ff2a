"""What attaching a prompt leaves as it was, keeps apart, and refuses."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import ptengine
from ptengine.backbone import attached as mechanism
from ptengine.backbone import generate
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import Prompt

from ..backbone.stock import (
    CAUSAL,
    POSITIONS,
    make,
    pad,
    random_rows,
    relative,
)
from .attached_cases import KINDS, prompt_for, state


@pytest.fixture(params=CAUSAL)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.mark.parametrize("training", [False, True])
def test_model_is_as_before(model: Any, training: bool) -> None:
    """Patched or not, after the end and after an exception."""
    model.train(training).requires_grad_(True)
    model.base_model.eval()
    prompt, ids = prompt_for(model, "soft"), torch.tensor(random_rows(5))
    before = state(model)
    exact = model(ids).logits
    for is_patched in (False, True):
        if is_patched:
            ptengine.patch(model)
            before = state(model)
        with prompt.attached(model) as both:
            both(ids)
            model.train()
            assert model.config._attn_implementation == "ptengine"
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert state(model) == before
        with pytest.raises(RuntimeError, match="stop"), prompt.attached(model):
            raise RuntimeError("stop")
        assert state(model) == before
        with prompt.attached(model), pytest.raises(InputError):
            model(ids, attention_mask=torch.ones(1, 3))
        assert state(model) == before
        assert relative(model(ids).logits, exact) < 1e-6
    assert prompt.training
    ptengine.unpatch(model)
    with prompt.attached(model):
        ptengine.patch(model)
        ptengine.unpatch(model)
        with pytest.raises(InputError, match="expected a patched model"):
            model(ids)
    assert "_ptengine_state" not in vars(model)
    assert "prepare_inputs_for_generation" not in vars(model)
    assert not mechanism._hosts


def test_threads() -> None:
    """Each thread its own prompt on one model, begun and ended at odd times."""
    model = make("llama")
    before, rows, errors = state(model), random_rows(5, 9), []
    prompts = [
        prompt_for(model, kind, size, seed) for seed, (kind, size) in enumerate([("soft", 4), ("prefix", 7)] * 2)
    ]
    ids, mask = pad(rows, "left", value=2)
    exact = [generate(model, prompt, rows, max_new_tokens=6, do_sample=False) for prompt in prompts]
    start = threading.Barrier(len(prompts))

    def work(prompt: Prompt, wanted: Any) -> None:
        try:
            start.wait()
            for _ in range(6):
                with prompt.attached(model):
                    for _ in range(2):
                        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
                        assert torch.equal(found, wanted)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(prompts, exact, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert state(model) == before


def test_another_thread() -> None:
    """A thread without a prompt is refused; the module that the block gave carries its prompt into any thread."""
    model = make("llama")
    first, second = prompt_for(model, "soft"), prompt_for(model, "prefix", seed=1)
    ids = torch.tensor(random_rows(5))
    settings = {"max_new_tokens": 4, "do_sample": False}
    exact = [generate(model, prompt, ids, **settings) for prompt in (first, None)]
    found: dict[str, Any] = {}

    def attempt(name: str, call: Any) -> None:
        def run() -> None:
            try:
                found[name] = call()
            except InputError as error:
                found[name] = error

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def attach_differently() -> None:
        with second.attached(model, freeze=False):
            pass

    with first.attached(model) as both:
        attempt("stock", lambda: model.generate(ids, **settings))
        attempt("through", lambda: both.generate(ids, **settings))
        attempt("none", lambda: generate(model, None, ids, **settings))
        attempt("freeze", attach_differently)
    assert isinstance(found["stock"], InputError)
    assert "attached in this thread" in str(found["stock"])
    assert torch.equal(found["through"], exact[0])
    assert torch.equal(found["none"], exact[1])
    assert "freeze=True, as another thread" in str(found["freeze"])
    with pytest.raises(InputError, match="inside the block that attached"):
        both(ids)


def test_length_limit(model: Any) -> None:
    """Every position may be used and not one more; `generate` stops with an error at the step that has none left."""
    prompt = prompt_for(model, "soft")
    ids = torch.tensor(random_rows(POSITIONS - 6))
    with prompt.attached(model), torch.no_grad():
        model(ids)
        model.generate(ids[:, :-4], max_new_tokens=4, min_new_tokens=4)
        message = f"at most {POSITIONS} positions, got 6 virtual tokens and {POSITIONS - 5} tokens of text"
        longer = torch.cat([ids, ids[:, :1]], dim=1)
        for given in ({}, {"attention_mask": torch.ones_like(longer)}):
            with pytest.raises(InputError, match=message):
                model(longer, **given)
        with pytest.raises(InputError, match=f"at most {POSITIONS} positions"):
            model.generate(ids, max_new_tokens=4, min_new_tokens=4)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
ERRORS: dict[str, tuple[Any, str]] = {
    "a hole": (
        lambda m: m(IDS, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])), "row 1: .* got holes between them"
    ),
    "a mask of another length": (
        lambda m: m(IDS, attention_mask=torch.ones(2, 10)), r"of shape \[2, 4\] .*, got \[2, 10\]"
    ),
    "a mask of four axes": (
        lambda m: m(IDS, attention_mask=torch.ones(2, 1, 4, 4)), r"of shape \[2, 4\] .*, got \[2, 1, 4, 4\]"
    ),
    "two texts in a row": (lambda m: m(IDS, position_ids=torch.tensor([[0, 1, 0, 1]])), "count a row's tokens up"),
    "positions below zero": (lambda m: m(IDS, position_ids=torch.arange(4)[None] - 9), "count a row's tokens up"),
    "positions of another length": (
        lambda m: m(IDS, position_ids=torch.arange(9)[None]), r"position_ids of shape \[2, 4\], got \[1, 9\]"
    ),
    "padding on the right to generate": (
        lambda m: m.generate(IDS, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), max_new_tokens=1),
        "input 1: expected padding on the left",
    ),
    "dropout of attention": (lambda m: drop_out(m)(IDS), "eval mode, got attention dropout of 0.5"),
    "the same prompt twice": (lambda m: attach(m), "without a prompt, got one that this thread"),
    "the model without its head": (lambda m: attach(m.model), "without a prompt, got one that this thread"),
    "saving the model": (lambda m: HELD[0].save_pretrained("out"), r"prompt\.save"),
}  # fmt: skip
HELD: list[Any] = []


def drop_out(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model.train()


def attach(model: Any, prompt: Prompt | None = None) -> None:
    with (prompt or prompt_for(model, "soft")).attached(model):
        pass


@pytest.mark.parametrize("case", ERRORS)
def test_refused(case: str) -> None:
    model = make("llama")
    call, message = ERRORS[case]
    exact = model(IDS).logits
    with prompt_for(model, "soft").attached(model) as both:
        HELD[:] = [both]
        with pytest.raises(InputError, match=message) as raised:
            call(model)
        assert "\n" not in str(raised.value)
    assert torch.equal(model(IDS).logits, exact)


def test_refused_caches() -> None:
    """What another call put into a cache stands at other positions: without the prompt, or behind another one."""
    model = make("llama")
    first, second = prompt_for(model, "soft"), prompt_for(model, "soft", seed=1)
    stock = model(IDS).past_key_values
    with first.attached(model), torch.no_grad():
        with pytest.raises(InputError, match="filled while this prompt was attached, got 4 tokens"):
            model(IDS[:, :1], past_key_values=stock)
        kept = model(IDS).past_key_values
    with second.attached(model), torch.no_grad(), pytest.raises(InputError, match="filled while this prompt"):
        model(IDS[:, :1], past_key_values=kept)
    with first.attached(model), torch.no_grad():
        model(IDS[:, :1], past_key_values=kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_does_not_fit(kind: str) -> None:
    model = make("llama")
    before = state(model)
    for other in (make("qwen3"), make("llama", num_hidden_layers=2), make("llama", vocab_size=98)):
        with pytest.raises(InputError, match="made for another backbone"):
            attach(model, prompt_for(other, kind))
    with pytest.raises(UnsupportedModelError, match="expected a transformers model, got Linear"):
        attach(torch.nn.Linear(2, 2), prompt_for(model, kind))
    assert state(model) == before
    assert not mechanism._hosts
