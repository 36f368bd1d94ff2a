"""Soft prompts as a tensor for servers and code that take input embeddings: vLLM's `prompt_embeds`, `inputs_embeds`.

Two files: the embeddings as safetensors, and json that says what they are, which model they belong to and how to use
them. Needs ptengine to write, nothing of ptengine to use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.errors import InputError
from ptengine.files import json_bytes, make_directory, safetensors_bytes, write_together
from ptengine.interop.plain import method_of, plain
from ptengine.prompts import LlamaAdapter, Prefix, SoftPrompt

__all__ = ["EMBEDS_JSON", "EMBEDS_NAME", "fingerprint", "require_deployable", "save_prompt_embeds"]

EMBEDS_NAME = "prompt_embeds.safetensors"
EMBEDS_JSON = "prompt_embeds.json"
FORMAT_VERSION = 1

_KEY = "prompt_embeds"
_HOW_TO_USE = (
    "For every request concatenate prompt_embeds [P, d] and model.get_input_embeddings()(token_ids) [T, d], the prompt "
    "first, before a beginning-of-text token too, and give the result [P + T, d] in place of token ids: to vLLM as "
    "prompt_embeds, with enable_prompt_embeds=True; to transformers as inputs_embeds with an attention mask of P + T "
    "ones. The rows stand behind the embedding module: whatever it multiplies its table by is in them already."
)


def save_prompt_embeds(model: Any, prompt: Any, directory: str | os.PathLike[str]) -> Path:
    """Write the virtual tokens of `prompt` as embeddings that stand before those of a text.

    Args:
        model: the prompt's backbone, a causal model.
        prompt: a `SoftPrompt`, or one that folds to it.
        directory: made if need be; its other files are not touched.

    Returns:
        The directory, with `prompt_embeds.safetensors` (tensor ``prompt_embeds`` [P, d] in the dtype of the model's
        word embeddings, which vLLM wants) and `prompt_embeds.json` (format_version, file, tensor, shape, dtype, the
        backbone's facts and its fingerprint, how_to_use). Both are written under temporary names and then renamed.

    Raises:
        InputError: a prompt that is no `SoftPrompt` or of another backbone, an encoder, a directory that cannot be
            written.
        UnsupportedModelError: the model is of no supported type.
    """
    prompt = plain(prompt)
    spec = require_deployable(model, prompt)
    rows = prompt.embeds.detach().to(spec.word_embeddings.weight.dtype)  # [P, d]
    description = {
        "format_version": FORMAT_VERSION,
        "file": EMBEDS_NAME,
        "tensor": _KEY,
        "shape": list(rows.shape),
        "dtype": str(rows.dtype).removeprefix("torch."),
        "backbone": prompt.facts.to_json(),
        "fingerprint": fingerprint(model),
        "how_to_use": _HOW_TO_USE,
    }
    contents = {EMBEDS_NAME: safetensors_bytes({_KEY: rows}, {"format": "pt"}), EMBEDS_JSON: json_bytes(description)}
    target = make_directory(directory)
    write_together(target, contents)
    return target


def require_deployable(model: Any, prompt: Any) -> BackboneSpec:
    """The facts of `model`, if `prompt` can stand before a text as input embeddings of it.

    Raises:
        InputError: it cannot; the message says why.
        UnsupportedModelError: the model is of no supported type.
    """
    if not isinstance(prompt, SoftPrompt):
        held = "; PEFT's format (save_peft) holds this one" if isinstance(prompt, Prefix | LlamaAdapter) else ""
        raise InputError(
            f"expected a SoftPrompt, got {method_of(prompt)!r}: only virtual tokens that are the same for every text, "
            f"and nothing beside them, are input embeddings{held}"
        )
    spec = backbone_spec(model)
    if spec.kind != "causal" or spec.lm_head is None:
        raise InputError(
            f"expected a causal model with an LM head, got {type(model).__name__}: other models read a text's first "
            "token or all of its tokens, and would read virtual ones"
        )
    prompt.facts.require_fits(spec, "the prompt to export")
    if not bool(torch.isfinite(prompt.embeds).all()):
        raise InputError("expected a prompt of finite numbers, got NaN or infinity")
    return spec


def fingerprint(model: Any) -> str:
    """`ptengine.training.identity.fingerprint_model`, the same as in a run's checkpoints and in `task.json`."""
    from ptengine.training.identity import fingerprint_model  # which draws in the trainer

    return fingerprint_model(model)
