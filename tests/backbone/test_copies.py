"""Deep copies of a patched model are models of their own; what cannot be copied or pickled says so."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch

import ptengine
from ptengine.errors import InputError

from ..interop.attached_cases import KINDS, prompt_for
from .stock import make, random_rows
from .test_families import make as make_family


def continued(model: Any, prompt: Any) -> list[list[int]]:
    """Six tokens behind texts of two lengths."""
    out: torch.Tensor = ptengine.generate(
        model, prompt, random_rows(5, 3), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    return out.tolist()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:model type 'bloom'")
@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("gpt2", "llama") for k in KINDS] + [("bloom", "soft")])
def test_a_copy_of_a_patched_model_generates_behind_its_prompt(family: str, kind: str) -> None:
    """It silently generated without: the copy's steps asked for the original's embeddings. Bloom's was not copied."""
    model = make_family("bloom") if family == "bloom" else make(family)
    prompt = prompt_for(model, kind)
    ptengine.patch(model)
    other = copy.deepcopy(model)
    expected = continued(model, prompt)
    assert expected != continued(model, None)
    assert continued(other, prompt) == expected
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    changed = continued(other, prompt)
    assert changed != expected
    assert continued(model, prompt) == expected
    ptengine.unpatch(model)
    assert continued(other, prompt) == changed
    ptengine.unpatch(other)
    assert continued(other, prompt) == changed


def test_a_copy_does_not_keep_the_original_alive() -> None:
    model = make("llama")
    other, gone = copy.deepcopy(ptengine.patch(model)), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert other.prepare_inputs_for_generation(torch.tensor([[5]]))["input_ids"].tolist() == [[5]]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_patched_model_is_not_pickled(family: str) -> None:
    """A pickle of functions that live in this process alone would fail when it is read, if not before."""
    model = make(family)
    with ptengine.patched(model), pytest.raises(InputError, match=r"call ptengine\.unpatch first"):
        torch.save(model, io.BytesIO())
    torch.save(model, io.BytesIO())


def test_a_model_with_an_attached_prompt_is_not_copied() -> None:
    model = make("llama")
    prompt = prompt_for(model, "soft")
    with prompt.attached(model) as both:
        for one in (model, both):
            with pytest.raises(InputError, match="LlamaForCausalLM without an attached prompt to copy or pickle"):
                copy.deepcopy(one)
    copy.deepcopy(model)
