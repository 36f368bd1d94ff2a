"""One row of the family matrix for a causal family: soft prompts and prefixes against the stock computation."""

from __future__ import annotations

from typing import Any

import family_encoder
import torch
from family_configs import MOST_PARAMETERS, VIRTUAL, rows, small_config
from family_numbers import brief, errors_of, judged, require_finite, without_stock
from family_sets import CAUSAL, SEQUENCE, auto_class
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ptengine
from ptengine.backbone import KeyValuePrefix, VirtualTokens, backbone_spec, label_hidden, pack_rows, patched
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.errors import UnsupportedModelError

BOTH_WAYS = "its tokens see each other both ways, which no next token may be asked of"


def build(model_type: str, kind: str = "causal") -> Any:
    torch.manual_seed(0)
    config = small_config(model_type)
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True  # encoders with a causal head are bidirectional without
    make = auto_class(kind, model_type).from_config
    if isinstance(getattr(config, "decoder", None), PreTrainedConfig):  # of a configuration of several parts
        make, config = auto_class(kind, model_type)._model_mapping[type(config)]._from_config, config.decoder
    model = make(config).float().eval().requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise RuntimeError(f"the shrunken model still has {count} parameters")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
    return model


def stock_soft(model: Any, embeds: Tensor, texts: list[list[int]]) -> Tensor:
    """Logits of the positions that predict a token of the texts, rows run alone: [n, V]."""
    out = []
    for ids in texts:
        words = model.get_input_embeddings()(torch.tensor(ids))
        logits = model(inputs_embeds=torch.cat([embeds, words])[None], use_cache=False).logits[0]
        out.append(logits[len(embeds) - 1 : -1])
    return torch.cat(out)


def stock_prefix(model: Any, prompt: KeyValuePrefix, texts: list[list[int]], first: int) -> Tensor:
    out, size = [], prompt.num_virtual_tokens
    for ids in texts:
        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
        logits = model(
            torch.tensor(ids)[None], past_key_values=cache, position_ids=first + size + torch.arange(len(ids))[None],
            attention_mask=torch.ones(1, size + len(ids), dtype=torch.int64),
        ).logits[0]  # fmt: skip
        out.append(logits[:-1])
    return torch.cat(out)


def ours(model: Any, prompt: Any, texts: list[list[int]]) -> Tensor:
    found = label_hidden(model, prompt, pack_rows(texts, texts))
    return vocabulary_logits(backbone_spec(model), found.hidden)


def check(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    try:
        model = build(model_type)
    except Exception as error:
        return {"status": "not built", "reason": brief(error)}
    row = check_model(model)
    if row.get("reason") == BOTH_WAYS and model_type in SEQUENCE:
        row["sequence"] = family_encoder.check_head(model_type, "sequence")
    return row


def check_tower(model_type: str) -> dict[str, str]:
    """Of a type that reads images or sounds, what the language model of its text part comes to alone, if it is one."""
    config = CONFIG_MAPPING[model_type]().get_text_config()
    if config.model_type == model_type or config.model_type not in CAUSAL:
        return {}
    return {"text part alone": f"{config.model_type}: {check(config.model_type)['status']}"}


def check_model(model: Any) -> dict[str, Any]:
    """The row of a causal model, alone or with parts for other things than text."""
    texts = rows()
    try:
        generator = torch.Generator().manual_seed(2)
        width = model.get_input_embeddings().weight.shape[1]
        embeds = (0.1 * torch.randn(VIRTUAL, width, generator=generator)).requires_grad_()
        expected = stock_soft(model, embeds, texts)
        require_finite(expected)
    except Exception as error:
        return without_stock(model, error)
    try:
        ptengine.patch(model)
    except UnsupportedModelError as error:
        if not torch.equal(stock_soft(model, embeds, texts), expected):
            return {"status": "failed", "reason": f"after the refusal the model computes other numbers: {error}"}
        return {"status": "refused", "reason": str(error)}
    ptengine.unpatch(model)
    spec = backbone_spec(model)
    if spec.kind != "causal":
        return {
            "status": "refused",
            "reason": BOTH_WAYS,
        }
    result: dict[str, Any] = {"status": "pass", "generation": spec.no_generation or "yes"}
    if spec.path == "in_row":
        result |= {"status": "in-row", "reason": spec.why_in_row, "prefix": "refused"}

    def through_ours(prompt: Any) -> Tensor:
        with patched(model):
            return ours(model, prompt, texts)

    soft = VirtualTokens(embeds)
    pair = (lambda: through_ours(soft), lambda: stock_soft(model, embeds, texts))
    result["soft_logits"], result["soft_gradient"] = errors_of(pair, [embeds])
    if spec.path == "in_row":
        return judged(result)
    keys, values = (
        torch.randn(spec.num_layers, VIRTUAL, spec.num_kv_heads, dim, generator=generator).requires_grad_()
        for dim in (spec.head_dim, spec.value_dim)
    )
    prefix = KeyValuePrefix(keys, values)
    try:
        stock_prefix(model, prefix, texts, spec.first_position)
    except Exception as error:
        result["prefix"] = f"not compared: the stock model takes no such cache ({brief(error)})"
    else:
        pair = (lambda: through_ours(prefix), lambda: stock_prefix(model, prefix, texts, spec.first_position))
        result["prefix_logits"], result["prefix_gradient"] = errors_of(pair, [keys, values])
    return judged(result)
