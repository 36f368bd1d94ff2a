"""Prompts of other methods leave as what they fold to: an export that asked for the class refused them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptengine.errors import InputError
from ptengine.interop import load_peft, save_npy, save_peft, save_prompt_embeds
from ptengine.prompts import DecomposedPrompt, Prompt, PTuning, ResidualPrompt, SoftPrompt, create

from ..backbone.stock import make

METHODS: dict[str, dict[str, Any]] = {
    "residual_prompt": {},
    "p_tuning": {},
    "superpos_prompt": {"num_sampled_tokens": 8},
}


def rows_of(prompt: Prompt) -> torch.Tensor:
    with torch.no_grad():
        folded = prompt.fold()
    assert isinstance(folded, SoftPrompt)
    return folded.embeds.detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_as_the_prompt_it_folds_to(tmp_path: Path, method: str) -> None:
    model = make("llama")
    prompt = create(method, model, num_virtual_tokens=4, **METHODS[method]).eval()
    want = rows_of(prompt)
    loaded = load_peft(save_peft(prompt, tmp_path / "peft", model), model)
    assert isinstance(loaded, SoftPrompt)
    assert torch.equal(loaded.embeds, want)
    assert np.array_equal(np.load(save_npy(prompt, tmp_path / "one.npy")), want.numpy())
    written = load_file(save_prompt_embeds(model, prompt, tmp_path / "embeds") / "prompt_embeds.safetensors")
    assert torch.equal(written["prompt_embeds"], want)


def test_what_does_not_fold_is_refused_by_name(tmp_path: Path) -> None:
    """DePT changes the text's embeddings, too, for which no other format has a place."""
    model = make("llama")
    prompt = DecomposedPrompt(model, 4, max_length=8, rank=2)
    for save in (lambda: save_peft(prompt, tmp_path / "a", model), lambda: save_npy(prompt, tmp_path / "a.npy"),
                 lambda: save_prompt_embeds(model, prompt, tmp_path / "b")):  # fmt: skip
        with pytest.raises(InputError, match="decomposed_prompt"):
            save()
    assert list(tmp_path.iterdir()) == []


def test_several_tasks_of_different_methods(tmp_path: Path) -> None:
    model = make("llama")
    prompts = [ResidualPrompt(model, 4).eval(), PTuning(model, 4).eval()]
    path = save_peft(prompts, tmp_path / "tasks", model, peft_type="MULTITASK_PROMPT_TUNING")
    for task, prompt in enumerate(prompts):
        loaded = load_peft(path, model, task_id=task)
        assert isinstance(loaded, SoftPrompt)
        assert torch.equal(loaded.embeds, rows_of(prompt))
