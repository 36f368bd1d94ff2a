"""A soft prompt baked into a stock Hugging Face checkpoint: P new tokens whose embeddings are the virtual tokens.

For servers and code that know nothing of prompts: `AutoModelForCausalLM` and `AutoTokenizer` load the directory, and a
text that begins with the P new tokens gives the numbers of ptengine with the prompt. Weights are shared with the model
while writing; only its two vocabulary tables are copied. How text reaches the new tokens is the business of
`ptengine.interop.baked_tokenizer`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptengine.backbone import label_hidden, pack_rows, patched
from ptengine.backbone.modes import eval_mode
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.trial import tolerance
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.files import staged_directory, write_json_atomic
from ptengine.interop.baked_tokenizer import BakedTokenizer, bake_tokenizer
from ptengine.interop.plain import plain
from ptengine.interop.prompt_embeds import fingerprint, require_deployable
from ptengine.prompts import SoftPrompt
from ptengine.prompts.facts import embedding_scale

__all__ = ["BAKED_JSON", "save_baked_checkpoint"]

BAKED_JSON = "soft_prompt.json"
FORMAT_VERSION = 1

_NEVER = -30000.0  # a logit that no dtype's softmax gives a probability, and that fp16 can hold
_BY_IDS = (
    "Encode a text as ever and put ids before its token ids, or use the chat template, which begins with the prompt's "
    "tokens; then call, generate or serve the model as any other."
)
_BY_PREFIX = (
    f"{_BY_IDS} Or encode prefix + text with add_special_tokens=False: the prefix has the special tokens that the "
    "tokenizer puts before a text."
)


def save_baked_checkpoint(model: Any, prompt: Any, tokenizer: Any, directory: str | os.PathLike[str]) -> Path:
    """Write `model` as a stock checkpoint in which P new tokens are the virtual tokens of `prompt`.

    - **Tokenizer**: the P special tokens ``<|soft_prompt_0|>``, ``<|soft_prompt_1|>``, ... get the ids behind its last
      one. A chat template begins with them. `prefix` in `soft_prompt.json` is the string that stands before a plain
      text: the new tokens, then whatever special tokens the tokenizer puts before a text. It is null where the
      tokenizer splits a text behind special tokens in another way than alone; then `ids` go before the text's.
    - **Input embeddings**: the rows of the new ids are the prompt's, divided by the factor that the embedding module
      multiplies its table by, if any, and rounded to the table's dtype. Rows that a padded vocabulary has for ids
      without a token are overwritten where the new ids fall on them; otherwise the table grows.
    - **LM head**: the rows of the new ids are the mean over the rows of all tokens, so their logit is the mean of all
      logits, which is never the largest: greedy decoding and beam search never write one, and sampling at temperature
      1 writes one of them with a probability below P / V. Where the head has a bias, theirs is -30000: never. And
      `generation_config.json` lists them in `suppress_tokens`, which transformers' `generate` obeys. All other logits
      are what they were.
    - **Tied embeddings** are untied (`tie_word_embeddings` is false in the checkpoint, and the head's table is written
      out): a tied head would score the prompt's own vectors.

    Before anything is written under `directory`, the checkpoint's logits for a few tokens behind the new ones are
    compared with those of ptengine and the prompt.

    Args:
        model: the prompt's backbone, a causal transformers model; not changed.
        prompt: a `SoftPrompt`, or one that folds to it.
        tokenizer: the model's tokenizer; not changed.
        directory: new or empty; made in one step when everything is written.

    Returns:
        The directory: what `save_pretrained` of model and tokenizer writes, and `soft_prompt.json` (format_version,
        tokens, ids, prefix, untied, the backbone's facts and fingerprint, how_to_use).

    Raises:
        InputError: a prompt that is no `SoftPrompt` (keys and values of layers are no embeddings) or of another
            backbone; an encoder; a tokenizer with ids that the model does not have, that already has such tokens, or
            that reads a text differently once it was written; an id of the configuration among the new ones; a
            directory with files.
        UnsupportedModelError: the model is of no supported type, is quantised or carries weights of another library,
            or the same embeddings given as token ids do not give the same logits.
    """
    prompt = plain(prompt)
    spec = require_deployable(model, prompt)
    _require_plain(model)
    baked = bake_tokenizer(tokenizer, prompt.num_virtual_tokens, spec.vocab_size)
    _require_free(model, baked.ids)
    with staged_directory(directory) as staging:
        with torch.no_grad():
            new = _extended(model, spec, prompt, baked.ids)
            _require_equal(model, spec, new, prompt, baked)
        new.save_pretrained(staging)
        prefix = baked.save(staging)
        write_json_atomic(
            staging / BAKED_JSON,
            {
                "format_version": FORMAT_VERSION,
                "tokens": baked.tokens,
                "ids": baked.ids,
                "prefix": prefix,
                "untied": _head_name(model, spec) is None,
                "backbone": prompt.facts.to_json(),
                "fingerprint": fingerprint(model),
                "how_to_use": _BY_IDS if prefix is None else _BY_PREFIX,
            },
        )
    return Path(directory)


def _require_plain(model: Any) -> None:
    """A transformers model whose weights are those its class makes."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"expected a transformers model to write as a checkpoint, got {name}")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"expected a {name} in floating point to extend its vocabulary, got one quantised")


def _require_free(model: Any, ids: list[int]) -> None:
    """No token the configuration names may be among the new ones: rows of a padded vocabulary can have a meaning."""
    sources = [model.config.get_text_config(), model.config, getattr(model, "generation_config", None)]
    for source in sources:
        for name, value in vars(source).items() if source is not None else ():
            named = value if isinstance(value, list) else [value]
            if name.endswith(("_token_id", "_token_index")) and any(one in ids for one in named if one is not None):
                raise InputError(
                    f"expected no special token behind the tokenizer's last id, where the prompt's go, got {name} "
                    f"{value!r}"
                )


def _extended(model: Any, spec: BackboneSpec, prompt: SoftPrompt, ids: list[int]) -> Any:
    """A stock model that shares all weights with `model` but the tables of its vocabulary, in eval mode."""
    size = max(spec.vocab_size, ids[-1] + 1)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.vocab_size, text.tie_word_embeddings, config.tie_word_embeddings = size, False, False
    head: Any = spec.lm_head
    own = _own_state(model)
    head_name = _head_name(model, spec) or _name_of(model, head)
    for module_name, changed in (
        (_name_of(model, spec.word_embeddings), {"weight": _embedding_rows(spec, prompt)}),
        (head_name, _head_rows(head, ids[0], len(ids))),
    ):
        table: Any = model.get_submodule(module_name)
        for name, rows in changed.items():
            own[f"{module_name}.{name}"] = _placed(getattr(table, name).detach(), rows, ids, size)
    try:
        with torch.device("meta"):
            new = type(model)._from_config(config, dtype=spec.word_embeddings.weight.dtype, attn_implementation=None)
        new.load_state_dict(own, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"expected a {type(model).__name__} with the weights its class makes, got others: "
            f"{' '.join(str(error).split())}"
        ) from error
    for name, buffer in _unsaved_buffers(model):
        owner, _, last = name.rpartition(".")
        new.get_submodule(owner)._buffers[last] = buffer
    new.generation_config = copy.deepcopy(model.generation_config)
    new.generation_config.suppress_tokens = [*(new.generation_config.suppress_tokens or []), *ids]
    return new.eval()


def _embedding_rows(spec: BackboneSpec, prompt: SoftPrompt) -> Tensor:
    """What the embedding module turns into the prompt: [P, d]."""
    return prompt.embeds.detach().float() / embedding_scale(spec)


def _head_rows(head: Any, known: int, count: int) -> dict[str, Tensor]:
    """Rows of the LM head whose logit is the mean of all tokens' logits, or as good as minus infinity."""
    mean = head.weight.detach()[:known].float().mean(0, keepdim=True)  # [1, d]
    rows = {"weight": mean.expand(count, -1)}
    if getattr(head, "bias", None) is not None:
        rows["bias"] = torch.full((count,), _NEVER)
    return rows


def _placed(table: Tensor, rows: Tensor, ids: list[int], size: int) -> Tensor:
    """`table` [V, ...] grown to `size` rows, with `rows` [P, ...] at `ids`."""
    grown = table.new_zeros(size, *table.shape[1:])
    grown[: len(table)] = table
    grown[ids] = rows.to(grown)
    return grown


def _require_equal(model: Any, spec: BackboneSpec, new: Any, prompt: SoftPrompt, baked: BakedTokenizer) -> None:
    """The checkpoint gives the logits of ptengine behind the prompt, for ids from both ends of the vocabulary."""
    known, room = baked.ids[0], spec.max_positions - len(baked.ids)
    ids = [*range(min(4, known)), *range(max(known - 4, 0), known)][:room]
    with patched(model), eval_mode(model):
        found = label_hidden(model, prompt.lower(), pack_rows([ids], [ids]))
        expected = vocabulary_logits(spec, found.hidden)[:, :known]  # [T, V]
    rows = torch.tensor([baked.ids + ids], device=expected.device)
    got = new(input_ids=rows).logits[0, len(baked.ids) - 1 : -1]  # [T, V']
    distance = ((got[:, :known] - expected).double().norm() / expected.double().norm()).item()
    bound = tolerance(spec, expected.dtype)
    if not distance <= bound:
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported: with the prompt as rows of its vocabulary its logits "
            f"differ by {distance:.1e} (relative; bound {bound:.1e}), so it does more with token ids than to look up "
            "their embeddings"
        )


def _own_state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _head_name(model: Any, spec: BackboneSpec) -> str | None:
    """The LM head's name, or None where its weight is that of the input embeddings."""
    head: Any = spec.lm_head
    return None if head.weight is spec.word_embeddings.weight else _name_of(model, head)


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that no checkpoint holds, such as the frequencies of rotary embeddings."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)
