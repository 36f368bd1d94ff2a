"""One row of the family matrix for an encoder-decoder: soft prompts in the encoder's rows, prefixes in the decoder."""

from __future__ import annotations

from typing import Any

import family_causal
import torch
from family_configs import MOST_PARAMETERS, VIRTUAL, rows, small_config
from family_numbers import brief, errors_of, judged, require_finite, without_stock
from family_sets import auto_class
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import ptengine
from ptengine.backbone import KeyValuePrefix, VirtualTokens, backbone_spec, pack_rows, patched, seq2seq_logits
from ptengine.errors import UnsupportedModelError


def build(model_type: str, kind: str = "seq2seq") -> Any:
    torch.manual_seed(0)
    config = small_config(model_type)
    for one in (config, *(getattr(config, name, None) for name in ("encoder", "decoder"))):
        if one is not None:
            one.decoder_start_token_id = 0
    if model_type == "encoder-decoder":
        config.decoder.is_decoder = config.decoder.add_cross_attention = True
    model = auto_class(kind, model_type).from_config(config).float().eval().requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise RuntimeError(f"the shrunken model still has {count} parameters")
    return model


def pairs() -> tuple[list[list[int]], list[list[int]]]:
    """Sources and targets, a long one with a short one and the reverse."""
    texts = rows()
    return texts, [texts[1][:-1], texts[0][::-1]]


def shifted(model: Any, target: list[int]) -> Tensor:
    """What the decoder reads: mBART's language code stands at the end of its labels, others have a start token."""
    if model.config.model_type in ("mbart", "plbart"):
        return torch.tensor([[target[-1], *target[:-1]]])
    start = 1 if model.config.model_type.startswith("t5gemma") else 0  # which begins with bos_token_id
    return torch.tensor([[start, *target[:-1]]])


def stock_soft(model: Any, embeds: Tensor) -> Tensor:
    """Logits of every target's tokens, rows run alone: [n, V]."""
    out = []
    for source, target in zip(*pairs(), strict=True):
        words = model.get_input_embeddings()(torch.tensor(source))
        row = torch.cat([embeds, words])[None]
        out.append(model(inputs_embeds=row, decoder_input_ids=shifted(model, target), use_cache=False).logits[0])
    return torch.cat(out)


def stock_prefix(model: Any, keys: Tensor, values: Tensor) -> Tensor:
    out = []
    for source, target in zip(*pairs(), strict=True):
        own = DynamicCache()
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            own.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
        cache = EncoderDecoderCache(own, DynamicCache())
        read = shifted(model, target)
        call = {"input_ids": torch.tensor([source]), "decoder_input_ids": read, "past_key_values": cache}
        out.append(model(**call, use_cache=False).logits[0])
    return torch.cat(out)


def ours(model: Any, prompt: Any) -> Tensor:
    sources, targets = pairs()
    with patched(model):
        return seq2seq_logits(model, prompt, pack_rows(sources), pack_rows(targets))[0]


def check(model_type: str, kind: str = "seq2seq") -> dict[str, Any]:
    """One row of the table; transformers has causal models that read sounds among these, too."""
    row = _check(model_type, kind)
    if kind == "multimodal" and row["status"] in ("refused", "not built"):
        row |= family_causal.check_tower(model_type)
    return row


def _check(model_type: str, kind: str) -> dict[str, Any]:
    try:
        model = build(model_type, kind)
    except Exception as error:
        return {"status": "not built", "reason": brief(error)}
    if not model.config.is_encoder_decoder:
        return family_causal.check_model(model)
    try:
        generator = torch.Generator().manual_seed(2)
        width = model.get_input_embeddings().weight.shape[1]
        embeds = (0.1 * torch.randn(VIRTUAL, width, generator=generator)).requires_grad_()
        require_finite(stock_soft(model, embeds))
    except Exception as error:
        return without_stock(model, error)
    try:
        ptengine.patch(model)
    except UnsupportedModelError as error:
        return {"status": "refused", "reason": str(error)}
    ptengine.unpatch(model)
    spec = backbone_spec(model)
    result: dict[str, Any] = {"status": "pass", "pads": spec.pads, "prefix": "yes"}
    if spec.path == "in_row":
        result |= {"status": "in-row", "reason": spec.why_in_row, "prefix": "refused"}
    soft = VirtualTokens(embeds)
    result["soft_logits"], result["soft_gradient"] = errors_of(
        (lambda: ours(model, soft), lambda: stock_soft(model, embeds)), [embeds]
    )
    if spec.path == "shared":
        keys, values = (
            torch.randn(spec.num_layers, VIRTUAL, spec.num_kv_heads, dim, generator=generator).requires_grad_()
            for dim in (spec.head_dim, spec.value_dim)
        )
        result["prefix_logits"], result["prefix_gradient"] = errors_of(
            (lambda: ours(model, KeyValuePrefix(keys, values)), lambda: stock_prefix(model, keys, values)),
            [keys, values],
        )
    return judged(result)
