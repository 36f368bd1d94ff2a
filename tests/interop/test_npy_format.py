"""Prompts of google-research/prompt-tuning: the array [P, d] of a .npy file, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ptengine.errors import InputError
from ptengine.interop import load_npy, save_npy
from ptengine.prompts import Prefix, SoftPrompt

from ..backbone.stock import WIDTH, make


@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_real_prompts_come_back_byte_for_byte(tmp_path: Path, shared: Path, task: str) -> None:
    """Trained for T5 1.1 base, whose width GPT-2 has: numbers and file stay what they were."""
    source = shared / f"models/t5_lm100k_base_prompts/t5_1_1_lm100k_base_prompt_{task}.npy"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=768, n_layer=1, n_head=12, vocab_size=30, n_positions=128))
    prompt = load_npy(source, model)
    assert torch.equal(prompt.embeds, torch.from_numpy(np.load(source)))
    assert save_npy(prompt, tmp_path / "new" / "prompt.npy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_floating_point_type_is_read(tmp_path: Path, dtype: str) -> None:
    """bfloat16 as JAX's arrays lie in a file: two bytes whose type numpy does not know."""
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    if dtype == "bfloat16":
        rows = rows.bfloat16()
        np.save(tmp_path / "rows.npy", rows.view(torch.int16).numpy().view("V2"))
    else:
        np.save(tmp_path / "rows.npy", rows.numpy().astype(dtype))
        rows = torch.from_numpy(rows.numpy().astype(dtype))
    prompt = load_npy(tmp_path / "rows.npy", make("llama"))
    assert torch.equal(prompt.embeds, rows.float())
    assert prompt.num_virtual_tokens == 5


BAD: dict[str, tuple[Any, str]] = {
    "missing": (None, "which is not a file"),
    "a pickle": (np.array([{}]), "without pickled objects"),
    "a batch": (np.zeros((1, 5, WIDTH), np.float32), rf"\[P, {WIDTH}\], got \[1, 5, {WIDTH}\]"),
    "another width": (np.zeros((5, 768), np.float32), rf"\[P, {WIDTH}\], got \[5, 768\]"),
    "whole numbers": (np.zeros((5, WIDTH), np.int32), "floating-point dtype, got int32"),
    "not a number": (np.full((5, WIDTH), np.nan, np.float32), "finite numbers"),
    "too long": (np.zeros((64, WIDTH), np.float32), "below the 64 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_error(tmp_path: Path, case: str) -> None:
    array, message = BAD[case]
    if array is not None:
        np.save(tmp_path / "rows.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        load_npy(tmp_path / "rows.npy", make("llama"))


def test_bad_exports_are_refused_and_write_nothing(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(InputError, match=r"expected a SoftPrompt, .* got 'prefix'"):
        save_npy(Prefix(model, 4), tmp_path / "out.npy")
    with pytest.raises(InputError, match=r"ends in \.npy, got .*out.safetensors"):
        save_npy(SoftPrompt(model, 4), tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
