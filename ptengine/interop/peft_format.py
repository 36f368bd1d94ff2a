"""PEFT checkpoints of prompt tuning and prefix tuning, read and written without PEFT.

A checkpoint is a directory with `adapter_config.json` (indent 2, sorted keys) and `adapter_model.safetensors` (header
{"format": "pt"}): `prompt_embeddings` fp32, [P, d] for PROMPT_TUNING and [P, L*2*H_kv*D] for PREFIX_TUNING, and for
sequence classification the trained head under `base_model.<its name in the model>`. PEFT saves what its
reparametrisation computes, never the MLP itself, so folding a prompt before writing loses nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.spec import backbone_spec, kind_of
from ptengine.errors import InputError
from ptengine.files import make_directory, safetensors_bytes, write_together
from ptengine.prompts import BackboneFacts, Prefix, Prompt, SoftPrompt, backbone_facts
from ptengine.prompts.initialization import check_count
from ptengine.prompts.io import read_safetensors
from ptengine.prompts.prefix import blocks_to_prefix, prefix_to_blocks

__all__ = ["load_peft", "save_peft"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # the version whose format this is
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS")

_PROMPT_KEY = "prompt_embeddings"
_HEAD_PREFIX = "base_model."
_HEADS = ("classifier", "score")  # PEFT's names of the heads it trains and saves under SEQ_CLS


def save_peft(
    prompt: Prompt,
    directory: str | os.PathLike[str],
    model: Any | None = None,
    *,
    task_type: str | None = None,
) -> Path:
    """Write `prompt` as a checkpoint that `PeftModel.from_pretrained(model, directory)` loads.

    Both files are written under temporary names first and then renamed, the configuration last.

    Args:
        prompt: a `SoftPrompt` or a `Prefix`; a reparametrisation is folded, as PEFT does.
        directory: made if need be; its other files are not touched.
        model: the prompt's backbone. SEQ_CLS needs it: its head (`classifier` or `score`) is written along, and PEFT
            loads no checkpoint of that task without one. CAUSAL_LM does not.
        task_type: ``"CAUSAL_LM"`` or ``"SEQ_CLS"``; None means CAUSAL_LM for causal backbones and SEQ_CLS for encoders.

    Returns:
        The directory.

    Raises:
        InputError: a prompt of another method (PEFT has no form for it), another task type, CAUSAL_LM for an encoder,
            a prompt of an encoder-decoder, SEQ_CLS without a model or with one that has no such head, a model that is
            not the prompt's backbone, or a directory that cannot be written.
    """
    if not isinstance(prompt, SoftPrompt | Prefix):
        method = getattr(prompt, "method", type(prompt).__name__)
        raise InputError(f"expected a SoftPrompt or a Prefix, the prompts PEFT has a form for, got {method!r}")
    facts = prompt.facts
    kind = kind_of(facts.model_type)
    if kind == "seq2seq":
        raise InputError(
            f"expected a prompt of a causal model or an encoder, got one of the encoder-decoder {facts.model_type!r}, "
            "whose PEFT formats are not written"
        )
    if task_type is None:
        task_type = "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
    if task_type not in TASK_TYPES:
        raise InputError(f"expected task_type, one of {', '.join(TASK_TYPES)}, got {task_type!r}")
    if task_type == "CAUSAL_LM" and kind != "causal":
        raise InputError(f"expected task_type SEQ_CLS for the encoder {facts.model_type!r}, got {task_type!r}")

    if task_type == "SEQ_CLS" and model is None:
        raise InputError("task_type SEQ_CLS needs model, whose head is part of PEFT's checkpoint, got None")
    tensors: dict[str, Tensor] = {}
    if model is not None:
        facts.require_same(backbone_facts(model), "the prompt to export")
    if task_type == "SEQ_CLS":
        tensors |= {_HEAD_PREFIX + name: tensor for name, tensor in _head(model).items()}
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": facts.base_model,
        "inference_mode": True,
        "modules_to_save": list(_HEADS) if task_type == "SEQ_CLS" else None,
        "num_layers": facts.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": task_type,
    }
    if isinstance(prompt, SoftPrompt):
        tensors[_PROMPT_KEY] = prompt.embeds.float()  # [P, d]
        config |= {
            "num_attention_heads": facts.num_heads,
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "token_dim": facts.hidden_size,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }
    else:
        lowered = prompt.lower()
        tensors[_PROMPT_KEY] = prefix_to_blocks(lowered.keys.float(), lowered.values.float())  # [P, L*2*H_kv*D]
        width = facts.num_kv_heads * facts.head_dim
        config |= {
            "encoder_hidden_size": width,
            "init_weights": None,
            "num_attention_heads": facts.num_kv_heads,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "token_dim": width,
        }
    target = make_directory(directory)
    text = json.dumps(config, indent=2, sort_keys=True)  # no newline at the end, as PEFT writes it
    contents = {WEIGHTS_NAME: safetensors_bytes(tensors, {"format": "pt"}), CONFIG_NAME: text.encode()}
    write_together(target, contents)
    return target


def load_peft(directory: str | os.PathLike[str], model: Any, *, load_head: bool = True) -> SoftPrompt | Prefix:
    """Read a PEFT checkpoint of prompt tuning or prefix tuning for use with `model`.

    Args:
        directory: where PEFT's `save_pretrained` (or `save_peft`) wrote.
        model: the backbone.
        load_head: a checkpoint of sequence classification carries the head that was trained with the prompt; it is
            copied into the head of `model`, in place. False leaves the model as it is and drops that head.

    Returns:
        The prompt, flat, fp32, on the device of the model's word embeddings, with PEFT's numbers.

    Raises:
        InputError: files missing or damaged (pickled `adapter_model.bin` is not read); another peft_type; an
            encoder-decoder checkpoint; numbers that do not fit the model, naming the field, what the model needs and
            what the checkpoint has. The model is untouched then.
        UnsupportedModelError: the model is of no supported type.
    """
    facts = backbone_facts(model)
    spec = backbone_spec(model)
    directory = Path(directory)
    config = _read_config(directory)
    if not (directory / WEIGHTS_NAME).is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"expected {WEIGHTS_NAME} in {str(directory)!r}, got the pickled adapter_model.bin, which can run code "
            "when read and is refused: save it again with safe_serialization=True"
        )
    tensors, _ = read_safetensors(directory / WEIGHTS_NAME)
    if _PROMPT_KEY not in tensors:
        raise InputError(f"expected {_PROMPT_KEY!r} in {str(directory / WEIGHTS_NAME)!r}, got {sorted(tensors)}")
    rows = tensors.pop(_PROMPT_KEY)
    is_prefix = config["peft_type"] == "PREFIX_TUNING"
    count = check_count(config.get("num_virtual_tokens"), spec)
    _check_shape(rows, config, facts, count, is_prefix)
    head = _checked_head(tensors, model) if load_head else {}

    described = {"num_virtual_tokens": count, "init": "array"}
    rows = rows.float()
    device = spec.word_embeddings.weight.device
    prompt: SoftPrompt | Prefix
    if is_prefix:
        prompt = Prefix.empty(facts, described)
        keys, values = blocks_to_prefix(rows, facts)  # [L, P, H_kv, D] each
        prompt.load_state_dict({"keys": keys, "values": values})
    else:
        prompt = SoftPrompt.empty(facts, described)
        prompt.load_state_dict({"embeds": rows})
    with torch.no_grad():
        for parameter, tensor in head.values():
            parameter.copy_(tensor)
    return prompt.to(device)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"expected a PEFT checkpoint in {str(directory)!r}, but there is no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"expected a json file, got {str(path)!r}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"expected a json object in {str(path)!r}, got {type(config).__name__}")
    if config.get("peft_type") not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise InputError(
            f"expected peft_type PROMPT_TUNING or PREFIX_TUNING in {str(path)!r}, the kinds that are a prompt and "
            f"nothing else, got {config.get('peft_type')!r}"
        )
    if config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("num_transformer_submodules") not in (None, 1):
        raise InputError(
            f"expected a checkpoint of a model with one transformer in {str(path)!r}, got an encoder-decoder one "
            f"(task_type {config.get('task_type')!r}, num_transformer_submodules "
            f"{config.get('num_transformer_submodules')!r}), which no supported backbone is"
        )
    return config


def _check_shape(rows: Tensor, config: dict[str, Any], facts: BackboneFacts, count: int, is_prefix: bool) -> None:
    wanted = {"num_layers": facts.num_layers}
    if is_prefix:
        wanted |= {"num_attention_heads": facts.num_kv_heads, "token_dim": facts.num_kv_heads * facts.head_dim}
        shape = [count, facts.num_layers * 2 * facts.num_kv_heads * facts.head_dim]
    else:
        wanted |= {"token_dim": facts.hidden_size}
        shape = [count, facts.hidden_size]
    for name, value in wanted.items():
        if config.get(name) != value:
            raise InputError(
                f"the PEFT checkpoint was made for another backbone: the model needs {name} {value}, got "
                f"{config.get(name)!r}"
            )
    if list(rows.shape) != shape or not rows.is_floating_point():
        raise InputError(f"expected {_PROMPT_KEY} floating point {shape}, got {rows.dtype} {list(rows.shape)}")


def _head(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of the model's classification head by their names in the model."""
    head = {name: p for name, p in model.named_parameters() if name.split(".")[0] in _HEADS}
    if not head:
        raise InputError(
            f"expected a model with a head named {' or '.join(_HEADS)} for SEQ_CLS, got {type(model).__name__}"
        )
    return head


def _checked_head(tensors: dict[str, Tensor], model: Any) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Pairs of a parameter of the model's head and the tensor to copy into it, by name, all shapes equal."""
    if not tensors:
        return {}
    own = {_HEAD_PREFIX + name: parameter for name, parameter in _head(model).items()}
    wanted = {name: list(parameter.shape) for name, parameter in own.items()}
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if wanted != got:
        raise InputError(f"expected a checkpoint with the model's head {wanted}, got {got}")
    return {name: (own[name], tensors[name]) for name in own}
