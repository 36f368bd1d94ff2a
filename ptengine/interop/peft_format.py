"""PEFT checkpoints of its prompt methods, read and written without PEFT.

A checkpoint is a directory with `adapter_config.json` (indent 2, sorted keys) and `adapter_model.safetensors` (header
{"format": "pt"}): `prompt_embeddings` fp32, [P, d] for soft prompts and [P, L*2*H_kv*D] for prefixes, tensors under
their layers' names for LLaMA-Adapters, and for tasks with a head the trained one under `base_model.<its name in the
model>`. PEFT saves what its
reparametrisation computes, never the MLP itself, so folding a prompt before writing loses nothing. What the methods
differ in is the business of `ptengine.interop.peft_types` and `ptengine.interop.peft_adapters`.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ptengine.backbone.heads import task_head
from ptengine.backbone.spec import BackboneSpec, backbone_spec, kind_of
from ptengine.errors import InputError
from ptengine.files import make_directory, safetensors_bytes, write_together
from ptengine.interop.peft_adapters import ADAPTER_TYPE, adapter_of, adapter_parts
from ptengine.interop.peft_pairs import (
    PAIR_TYPES,
    SUBMODULES,
    blocks_to_decoder,
    decoder_to_blocks,
    soft_rows,
    written_layers,
)
from ptengine.interop.peft_types import (
    PREFIX_TYPES,
    SOFT_TYPES,
    multitask_tensors,
    rows_of,
    training_fields,
)
from ptengine.interop.plain import method_of, plain
from ptengine.prompts import BackboneFacts, HeadedPrompt, LlamaAdapter, Prefix, Prompt, SoftPrompt, backbone_facts
from ptengine.prompts.headed import without_head
from ptengine.prompts.initialization import check_count
from ptengine.prompts.io import read_safetensors
from ptengine.prompts.prefix import blocks_to_prefix, prefix_to_blocks

__all__ = ["load_peft", "save_peft"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # the version whose format this is
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_PAIRS = "SEQ_2_SEQ_LM"  # the only task of encoder-decoders

_PROMPT_KEY = "prompt_embeddings"
_HEAD_PREFIX = "base_model."
# Modules whose names end so are those that PEFT trains and saves beside the prompt, unless told of more.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_POOLING = "classifies a row by its first slot, a virtual token, where ptengine takes the text's first token"


def save_peft(
    prompt: Prompt | Sequence[Prompt],
    directory: str | os.PathLike[str],
    model: Any | None = None,
    *,
    task_type: str | None = None,
    peft_type: str | None = None,
) -> Path:
    """Write `prompt` as a checkpoint that `PeftModel.from_pretrained(model, directory)` loads.

    Both files are written under temporary names first and then renamed, the configuration last.

    Args:
        prompt: a `SoftPrompt`, a `Prefix` or one that folds to them, as PEFT folds its own; or a `LlamaAdapter` with
            one gate per layer, which needs `model` and is written as ADAPTION_PROMPT for CAUSAL_LM. With a
            `HeadedPrompt` its head is written in the place of the model's. For
            MULTITASK_PROMPT_TUNING a list of soft prompts of the same length on the same backbone, too: task i is the
            i-th.
        directory: made if need be; its other files are not touched.
        model: the prompt's backbone. Every task with a head needs it: that head (`classifier` or `score`, `qa_outputs`
            for QUESTION_ANS, and whatever else of the model is no part of its base) is written along, and PEFT loads no
            checkpoint of such a task without one.
        task_type: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"QUESTION_ANS"`` or ``"FEATURE_EXTRACTION"``, with
            which PEFT gives what the model gives by itself: hidden states, or a masked language model's logits. None
            means CAUSAL_LM for causal backbones and SEQ_CLS for encoders. Encoder-decoders have ``"SEQ_2_SEQ_LM"``
            alone.
        peft_type: the method PEFT will take it for. A soft prompt may be ``"PROMPT_TUNING"`` (None means this),
            ``"P_TUNING"`` (folded: PEFT infers with it, but would train an encoder that starts at random) or
            ``"MULTITASK_PROMPT_TUNING"`` (rank P: columns are the identity, rows the prompts, the shared prompt ones);
            a prefix ``"PREFIX_TUNING"`` (None means this) or ``"CARTRIDGE"`` (no frozen tokens). All give the same
            logits, but for SEQ_CLS of an encoder behind a soft prompt: PEFT's model classifies by the row's first slot,
            a virtual token, ptengine's by the text's first token. Such a checkpoint is written with a UserWarning. Of
            an encoder-decoder PROMPT_TUNING, P_TUNING and PREFIX_TUNING are written.

    Returns:
        The directory.

    Raises:
        InputError: a prompt of another method (PEFT has no form for it); a prefix of a backbone that reads no
            `past_key_values`, as which PEFT hands it over (ALBERT, DistilBERT, ModernBERT); a peft_type that is not for
            this kind of prompt or cannot hold it, with the reason; another task type; CAUSAL_LM for an encoder; a task
            with a head without a model or with one that has no such head; a model that is not the prompt's
            backbone; several prompts for another type, or ones that differ in length or backbone; or a directory that
            cannot be written.
    """
    given = [prompt] if isinstance(prompt, Prompt) or not isinstance(prompt, Sequence) else list(prompt)
    headed = [one for one in given if isinstance(one, HeadedPrompt)]
    if headed and len(given) > 1:
        raise InputError("expected prompts without heads of their own, where a checkpoint is of several, got one with")
    prompts: list[Any] = [plain(without_head(one)) for one in given]
    peft_type = _checked_type(prompts, peft_type)
    facts = prompts[0].facts
    kind = kind_of(facts.model_type)
    is_pair = kind == "seq2seq"
    if is_pair and (peft_type not in PAIR_TYPES or task_type not in (None, _PAIRS)):
        raise InputError(
            f"expected {', '.join(PAIR_TYPES)} and task_type {_PAIRS} for the encoder-decoder {facts.model_type!r}, "
            f"got {peft_type} and {task_type!r}"
        )
    if task_type is None:
        task_type = _PAIRS if is_pair else "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
    if task_type not in TASK_TYPES and not is_pair:
        raise InputError(f"expected task_type, one of {', '.join(TASK_TYPES)}, got {task_type!r}")
    if task_type == "CAUSAL_LM" and kind != "causal":
        raise InputError(
            f"expected task_type, one of {', '.join(TASK_TYPES[1:])} for the encoder {facts.model_type!r}, got "
            f"{task_type!r}"
        )

    if task_type in _HEADS and model is None:
        raise InputError(f"task_type {task_type} needs model, whose head is part of PEFT's checkpoint, got None")
    tensors: dict[str, Tensor] = {}
    if model is not None:
        facts.require_same(backbone_facts(model), "the prompt to export")
    saved_modules = None
    if task_type in _HEADS:
        saved_modules = _saved_modules(model, task_type)
        head: Mapping[str, Tensor] = task_head(model)
        if headed:
            own, wanted = headed[0].head_weights(), _shapes(head)
            if _shapes(own) != wanted:
                raise InputError(f"expected a prompt with the head {wanted} of the model, got {_shapes(own)}")
            head = own
        tensors |= {_HEAD_PREFIX + name: tensor for name, tensor in head.items()}
    if task_type == "SEQ_CLS" and kind == "encoder" and peft_type in SOFT_TYPES:
        warnings.warn(
            f"{peft_type} is written for {facts.model_type!r}, whose model in PEFT {_POOLING}: its logits differ from "
            "those here (a prefix has the same ones)",
            stacklevel=2,
        )
    count = prompts[0].num_virtual_tokens
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": facts.base_model,
        "inference_mode": True,
        "peft_type": peft_type,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": task_type,
    }
    if peft_type == ADAPTER_TYPE:
        if task_type != "CAUSAL_LM":
            raise InputError(f"expected task_type CAUSAL_LM for {ADAPTER_TYPE}, got {task_type!r}")
        tensors, fields = adapter_parts(prompts[0], model)
        return _write(directory, tensors, config | fields)
    config |= {
        "modules_to_save": saved_modules,
        "num_layers": facts.num_layers,
        "num_transformer_submodules": SUBMODULES if is_pair else 1,
        "num_virtual_tokens": count,
    }
    config |= training_fields(peft_type, num_ranks=count, num_tasks=len(prompts))
    if peft_type in SOFT_TYPES:
        config |= {"num_attention_heads": facts.num_heads, "token_dim": facts.hidden_size}
        if peft_type == "MULTITASK_PROMPT_TUNING":
            tensors |= multitask_tensors([one.embeds for one in prompts])
        else:
            rows = prompts[0].embeds.detach().float()  # [P, d]
            tensors[_PROMPT_KEY] = soft_rows(rows) if is_pair else rows
    else:
        _refuse_unread_prefix(facts.model_type)
        lowered = prompts[0].lower()
        if is_pair:
            config["num_layers"] = written_layers(facts.num_layers)
        to_blocks = decoder_to_blocks if is_pair else prefix_to_blocks
        tensors[_PROMPT_KEY] = to_blocks(lowered.keys.detach().float(), lowered.values.detach().float())
        width = facts.num_kv_heads * facts.head_dim
        config |= {"num_attention_heads": facts.num_kv_heads, "token_dim": width}
        if peft_type == "PREFIX_TUNING":
            config["encoder_hidden_size"] = width
    return _write(directory, tensors, config)


def load_peft(
    directory: str | os.PathLike[str], model: Any, *, load_head: bool = True, task_id: int | None = None
) -> SoftPrompt | Prefix | LlamaAdapter:
    """Read a checkpoint of one of PEFT's prompt methods for use with `model`.

    =========================  ==========  =====================================================================
    peft_type                  becomes     from
    =========================  ==========  =====================================================================
    PROMPT_TUNING              SoftPrompt  `prompt_embeddings` [P, d]
    P_TUNING                   SoftPrompt  `prompt_embeddings` [P, d], which PEFT saves folded; or the encoder's own
                                           tensors, named as in `PeftModel.state_dict()`
    MULTITASK_PROMPT_TUNING    SoftPrompt  `prompt_embeddings` times the columns and rows of task `task_id`
    CPT                        SoftPrompt  `prompt_embeddings` [P, d]; or `embedding` and `delta_embedding`, whose rows
                                           are scaled into their epsilon balls as PEFT does in every forward
    PREFIX_TUNING              Prefix      `prompt_embeddings` [P, L*2*H_kv*D]
    CARTRIDGE                  Prefix      the same; its frozen first tokens come along as ordinary ones, so training
                                           on changes them, too
    ADAPTION_PROMPT            LlamaAdapter
                                           `adaption_prompt` and `adaption_gate` of every adapted layer
    =========================  ==========  =====================================================================

    Of an encoder-decoder (SEQ_2_SEQ_LM) PROMPT_TUNING, P_TUNING and PREFIX_TUNING are read, and of them what PEFT's
    models read: the first P rows of a soft prompt's 2P, and for the decoder's layer i the blocks 4i and 4i + 1 modulo
    2N of a prefix, N being the encoder's layers, at least as many as the decoder's.

    Args:
        directory: where PEFT's `save_pretrained` (or `save_peft`) wrote.
        model: the backbone.
        load_head: a checkpoint of classification (of texts or tokens) or question answering carries the head that was
            trained with the prompt; it is copied into the head of `model`, in place, and parts of the head that it does
            not carry stay as they are. False leaves the model as it is and drops that head. A head of SEQ_CLS on an
            encoder behind virtual tokens has learned another slot than it is given here (see `save_peft`), which a
            UserWarning says.
        task_id: which task of MULTITASK_PROMPT_TUNING, from 0; for other methods None.

    Returns:
        The prompt, flat, fp32, on the device of the model's word embeddings, with PEFT's numbers.

    Raises:
        InputError: files missing or damaged (pickled `adapter_model.bin` is not read); another peft_type; an
            encoder-decoder's checkpoint for another model, or the reverse; numbers that do not fit the model, naming
            the field, what the model needs and what the checkpoint has; parts of the backbone that were trained, too
            (`modules_to_save`); a prefix of a backbone that reads no `past_key_values`; a `task_id` that is missing,
            out of range or of no use; ADAPTION_PROMPT with a model of another type than llama and mistral, or one for
            which PEFT computes another formula. The model is untouched then.
        UnsupportedModelError: the model is of no supported type.
    """
    facts = backbone_facts(model)
    spec = backbone_spec(model)
    directory = Path(directory)
    config = _read_config(directory)
    is_pair = _is_pair(config, spec, directory / CONFIG_NAME)
    if not (directory / WEIGHTS_NAME).is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"expected {WEIGHTS_NAME} in {str(directory)!r}, got the pickled adapter_model.bin, which can run code "
            "when read and is refused: save it again with safe_serialization=True"
        )
    tensors, _ = read_safetensors(directory / WEIGHTS_NAME)
    if config["peft_type"] == ADAPTER_TYPE:
        if task_id is not None:
            raise InputError(f"{ADAPTER_TYPE} has no tasks, got task_id={task_id!r}")
        try:
            return adapter_of(config, tensors, facts, model).to(spec.word_embeddings.weight.device)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from error
    is_prefix = config["peft_type"] in PREFIX_TYPES
    if is_prefix:
        _refuse_unread_prefix(facts.model_type)
    count = check_count(config.get("num_virtual_tokens"), spec)
    width = _checked_width(config, facts, is_prefix, is_pair)
    stored = count * (SUBMODULES if is_pair and not is_prefix else 1)
    try:
        rows = rows_of(config | {"num_virtual_tokens": stored}, tensors, width, task_id)[:count]
    except InputError as error:
        raise InputError(f"{directory / WEIGHTS_NAME}: {error}") from error
    _refuse_trained_backbone(tensors, model, config, directory)
    head = _checked_head(tensors, model, config) if load_head else {}
    if head and config.get("task_type") == "SEQ_CLS" and spec.kind == "encoder" and not is_prefix:
        warnings.warn(
            f"the head in {str(directory)!r} has learned something else if PEFT trained it, whose model {_POOLING}",
            stacklevel=2,
        )

    described = {"num_virtual_tokens": count, "init": "array"}
    device = spec.word_embeddings.weight.device
    prompt: SoftPrompt | Prefix
    if is_prefix:
        prompt = Prefix.empty(facts, described)
        if is_pair:
            keys, values = blocks_to_decoder(rows, facts.num_layers, facts.num_kv_heads, facts.head_dim)
        else:
            keys, values = blocks_to_prefix(rows, facts)  # [L, P, H_kv, D] each
        prompt.load_state_dict({"keys": keys, "values": values})
    else:
        prompt = SoftPrompt.empty(facts, described)
        prompt.load_state_dict({"embeds": rows})
    with torch.no_grad():
        for parameter, tensor in head.values():
            parameter.copy_(tensor)
    return prompt.to(device)


def _write(directory: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    target = make_directory(directory)
    text = json.dumps(config, indent=2, sort_keys=True)  # no newline at the end, as PEFT writes it
    contents = {WEIGHTS_NAME: safetensors_bytes(tensors, {"format": "pt"}), CONFIG_NAME: text.encode()}
    write_together(target, contents)
    return target


def _checked_type(prompts: Sequence[Any], peft_type: str | None) -> str:
    """The PEFT method that `prompts` are written as."""
    for prompt in prompts or [None]:
        if not isinstance(prompt, SoftPrompt | Prefix | LlamaAdapter):
            name = method_of(prompt)
            raise InputError(
                f"expected a SoftPrompt, a Prefix or a LlamaAdapter, the prompts PEFT has a form for, got {name!r}"
            )
    is_soft = isinstance(prompts[0], SoftPrompt)
    allowed: tuple[str, ...] = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING") if is_soft else PREFIX_TYPES
    if isinstance(prompts[0], LlamaAdapter):
        allowed = (ADAPTER_TYPE,)
    if peft_type is None:
        peft_type = allowed[0]
    if peft_type == "CPT" and is_soft:
        raise InputError(
            "expected peft_type PROMPT_TUNING, which holds the same numbers, got 'CPT', whose checkpoint names the "
            "tokens of the context it started from, which a SoftPrompt does not have"
        )
    if peft_type not in allowed:
        raise InputError(
            f"expected peft_type, one of {', '.join(allowed)} for a {type(prompts[0]).__name__}, got {peft_type!r}"
        )
    if len(prompts) > 1:
        if peft_type != "MULTITASK_PROMPT_TUNING":
            raise InputError(f"expected one prompt for {peft_type}, got {len(prompts)}")
        for index, prompt in enumerate(prompts):
            if type(prompt) is not type(prompts[0]) or prompt.num_virtual_tokens != prompts[0].num_virtual_tokens:
                raise InputError(
                    f"expected {prompts[0].num_virtual_tokens} virtual tokens of a SoftPrompt for task {index}, as for "
                    f"task 0, got a {type(prompt).__name__} of {prompt.num_virtual_tokens}"
                )
            prompts[0].facts.require_same(prompt.facts, "the prompt of task 0")
    return peft_type


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
    peft_type = config.get("peft_type")
    if peft_type not in (*SOFT_TYPES, *PREFIX_TYPES, ADAPTER_TYPE):
        raise InputError(
            f"expected peft_type, one of {', '.join((*SOFT_TYPES, *PREFIX_TYPES, ADAPTER_TYPE))}, in {str(path)!r}, "
            f"the kinds that are a prompt and nothing else, got {peft_type!r}"
        )
    return config


def _is_pair(config: dict[str, Any], spec: BackboneSpec, path: Path) -> bool:
    """Whether the checkpoint and the model are an encoder-decoder's; both or neither must be."""
    task, parts = config.get("task_type"), config.get("num_transformer_submodules")
    found = f"(task_type {task!r}, num_transformer_submodules {parts!r})"
    if spec.kind != "seq2seq":
        if task == _PAIRS or parts not in (None, 1):
            raise InputError(
                f"expected a checkpoint of a model with one transformer in {str(path)!r} for the {spec.kind} "
                f"{spec.model_type!r}, got an encoder-decoder one {found}"
            )
        return False
    if task != _PAIRS or parts != SUBMODULES or config["peft_type"] not in PAIR_TYPES:
        raise InputError(
            f"expected {', '.join(PAIR_TYPES)} of an encoder-decoder (task_type {_PAIRS!r}, num_transformer_submodules "
            f"{SUBMODULES}) in {str(path)!r} for {spec.model_type!r}, got {config['peft_type']} {found}"
        )
    return True


def _checked_width(config: dict[str, Any], facts: BackboneFacts, is_prefix: bool, is_pair: bool) -> int:
    """The numbers of a row: d, or N*2*H_kv*D of a prefix of N layers; what the checkpoint says of its model must be
    true of this one."""
    layers = facts.num_layers
    if is_pair and is_prefix:
        layers = config.get("num_layers")  # type: ignore[assignment]  # until it is checked
        if not isinstance(layers, int) or layers < facts.num_layers:
            raise InputError(
                f"expected a prefix with num_layers of at least {facts.num_layers}, for each layer of the decoder of "
                f"{facts.model_type!r}, got {layers!r}: PEFT makes one for each layer of the encoder"
            )
    # Of an encoder-decoder's soft prompt PEFT counts the encoder's layers, which this knows nothing of.
    wanted = {} if is_pair and not is_prefix else {"num_layers": layers}
    if is_prefix:
        wanted |= {"num_attention_heads": facts.num_kv_heads, "token_dim": facts.num_kv_heads * facts.head_dim}
    else:
        wanted |= {"token_dim": facts.hidden_size}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise InputError(
                f"the PEFT checkpoint was made for another backbone: the model needs {name} {value}, got "
                f"{config.get(name)!r}"
            )
    return layers * 2 * wanted["token_dim"] if is_prefix else wanted["token_dim"]


def _refuse_unread_prefix(model_type: str) -> None:
    stock = MODEL_MAPPING.get(CONFIG_MAPPING[model_type], None) if model_type in CONFIG_MAPPING else None
    if isinstance(stock, type) and "past_key_values" not in inspect.signature(stock.forward).parameters:
        raise InputError(
            f"expected a backbone that reads past_key_values, as which PEFT hands over a prefix, got {model_type!r}: "
            f"{stock.__name__} takes none, so in PEFT the prefix is refused or without its effect"
        )


def _head_names(task_type: str | None) -> tuple[str, ...]:
    return _HEADS.get(task_type or "", _HEADS["SEQ_CLS"])


def _saved_modules(model: Any, task_type: str | None) -> list[str]:
    """The modules that PEFT is to save for the task: those it knows as a head, and whatever else is part of the model's
    own, which ptengine trains as a whole."""
    names = _head_names(task_type)
    parts = dict.fromkeys(name.split(".")[0] for name in task_head(model))
    if not any(part.endswith(names) for part in parts):
        raise InputError(
            f"expected a model with a head named {' or '.join(names)} for {task_type}, got {type(model).__name__}"
        )
    return [*names, *(part for part in parts if not part.endswith(names))]


def _checked_head(
    tensors: dict[str, Tensor], model: Any, config: dict[str, Any]
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Pairs of a parameter of the model's head and the tensor to copy into it, by name, all shapes equal.

    What the checkpoint does not say to save is the model's, which PEFT has not trained.
    """
    if not tensors:
        return {}
    _saved_modules(model, config.get("task_type"))  # refuses a model without such a head
    saved = (*_head_names(config.get("task_type")), *(config.get("modules_to_save") or ()))
    own = {_HEAD_PREFIX + name: p for name, p in task_head(model).items() if name.split(".")[0].endswith(saved)}
    if _shapes(own) != _shapes(tensors):
        raise InputError(f"expected a checkpoint with the model's head {_shapes(own)}, got {_shapes(tensors)}")
    return {name: (own[name], tensors[name]) for name in own}


def _refuse_trained_backbone(tensors: dict[str, Tensor], model: Any, config: dict[str, Any], directory: Path) -> None:
    """Beside the prompt a checkpoint may carry a head; whatever else `modules_to_save` named is frozen here."""
    head = task_head(model) if config.get("task_type") in (None, *_HEADS) else {}
    frozen = model.state_dict().keys() - head.keys()
    inner = f"{model.base_model_prefix}."  # which the names in a model with a head have, and those in its base have not
    for name in sorted(tensors):
        own = name.removeprefix(_HEAD_PREFIX)
        if own in frozen or own.removeprefix(inner) in frozen:
            raise InputError(
                f"expected a prompt, with a head at most, in {str(directory)!r}, got one that was trained together "
                f"with {own!r} of the backbone (modules_to_save {config.get('modules_to_save')}), which is frozen here"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
