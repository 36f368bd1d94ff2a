"""Soft prompts as google-research/prompt-tuning (Lester et al. 2021) keeps them: one .npy file of an array [P, d].

T5X writes the prompt of a run beside its checkpoints in this form, and `prompts.from_array` with `prompts.np_load`
reads it. The file says nothing of its model; for T5 the rows stand before the encoder's input.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptengine.errors import InputError
from ptengine.files import make_directory, write_atomic
from ptengine.interop.plain import method_of, plain
from ptengine.prompts import SoftPrompt

__all__ = ["load_npy", "save_npy"]


def load_npy(path: str | os.PathLike[str], model: Any) -> SoftPrompt:
    """Read a prompt [P, d] of google-research/prompt-tuning for use with `model`.

    As ``SoftPrompt(model, init="array", array=path)``, which does for fp16, fp32 and fp64, but bfloat16 is read, too:
    numpy has no such type, so JAX's arrays lie in the file as two bytes of no meaning.

    Returns:
        The prompt, fp32, on the device of the model's word embeddings.

    Raises:
        InputError: the file is missing or no .npy of one array (pickled objects are not read); its shape is not [P, d]
            with the d of the model, or P leaves no position for text; its numbers are not floating point or not finite.
        UnsupportedModelError: the model is of no supported type.
    """
    array: Any = path
    if Path(path).is_file():
        try:
            raw = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raw = None  # which the prompt refuses in its own words
        if isinstance(raw, np.ndarray) and raw.dtype == np.dtype("V2"):
            array = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    return SoftPrompt(model, init="array", array=array)


def save_npy(prompt: Any, path: str | os.PathLike[str]) -> Path:
    """Write a soft prompt as google-research/prompt-tuning reads it: fp32 [P, d], rows one after another.

    Args:
        prompt: a `SoftPrompt`, or one that folds to it.
        path: the file, whose name ends in .npy; it is replaced in one step, and its folder is made if need be.

    Returns:
        The path.

    Raises:
        InputError: a prompt of another method, which that library has no form for; another file name; a folder that
            cannot be written.
    """
    prompt = plain(prompt)
    if not isinstance(prompt, SoftPrompt):
        raise InputError(f"expected a SoftPrompt, whose embeddings are what the file holds, got {method_of(prompt)!r}")
    path = Path(path)
    if path.suffix != ".npy":
        raise InputError(f"expected a file name that ends in .npy, got {str(path)!r}")
    make_directory(path.parent)
    buffer = io.BytesIO()
    rows = prompt.embeds.detach().float().cpu().contiguous()  # [P, d]
    np.save(buffer, rows.numpy(), allow_pickle=False)
    return write_atomic(path, buffer.getvalue())
