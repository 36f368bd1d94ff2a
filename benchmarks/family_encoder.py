"""One row of the family matrix for a bidirectional family: its heads behind a soft prompt and behind a prefix.

The stock side of a soft prompt is the stock model on rows with the prompt in place, whose virtual tokens a hook takes
out of what the head reads. That of a prefix is the stock model with a plain attention that puts it before the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from family_configs import MOST_PARAMETERS, VIRTUAL, rows, small_config
from family_numbers import brief, errors_of, judged, require_finite, without_stock
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.masking_utils import eager_mask
from transformers.models.auto import modeling_auto

import ptengine
from ptengine.backbone import (
    KeyValuePrefix,
    VirtualTokens,
    backbone_spec,
    encoder_hidden,
    pack_rows,
    patched,
    sequence_logits,
    token_logits,
)
from ptengine.errors import UnsupportedModelError

HEADS = {
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
    "sequence": (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, AutoModelForSequenceClassification),
}
PLAIN = "family_matrix_plain"
_prefix: list[Any] = []  # keys and values, and the number of calls so far


def build(model_type: str, auto: Any) -> Any:
    torch.manual_seed(0)
    config = small_config(model_type)
    config.num_labels = 3
    model = auto.from_config(config).float().eval().requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise RuntimeError(f"the shrunken model still has {count} parameters")
    return model


def plain_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention of one row over [prefix; text], written out."""
    keys, values, calls = _prefix
    size, length = keys.shape[1], q.shape[2]
    k = torch.cat([keys[calls].transpose(0, 1)[None], k], dim=2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = torch.cat([values[calls].transpose(0, 1)[None], v], dim=2).repeat_interleave(q.shape[1] // v.shape[1], 1)
    _prefix[2] += 1
    scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
    scores = q @ k.transpose(2, 3) * scale  # [1, H, T, P + T]
    window = kwargs.get("sliding_window")
    if window:
        apart = size + torch.arange(length)[:, None] - torch.arange(size + length)  # [T, P + T]
        scores = scores.masked_fill(apart.abs() >= window, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, plain_attention)
AttentionMaskInterface.register(PLAIN, eager_mask)


@contextmanager
def head_reads_text(model: Any, virtual: int) -> Iterator[None]:
    """The head of a stock model reads what stands behind `virtual` tokens."""
    base = model.base_model

    def behind(_: Any, __: Any, out: Any) -> Any:
        own = out.last_hidden_state
        if out.get("pooler_output") is not None:
            ways = [lambda h: base.pooler(h), lambda h: base.pooler_activation(base.pooler(h[:, 0])),
                    lambda h: base.activation(base.pooler(h[:, 0]))]  # fmt: skip
            out["pooler_output"] = next(text for way in ways if (text := pooled(way, own, out, virtual)) is not None)
        out["last_hidden_state"] = own[:, virtual:]
        return out

    def pooled(way: Any, own: Tensor, out: Any, virtual: int) -> Tensor | None:
        try:
            return way(own[:, virtual:]) if torch.equal(way(own), out["pooler_output"]) else None
        except (AttributeError, TypeError, RuntimeError, IndexError):
            return None

    handle = base.register_forward_hook(behind)
    try:
        yield
    finally:
        handle.remove()


def stock_soft(model: Any, embeds: Tensor, texts: list[list[int]], what: str) -> Tensor:
    """Of rows alone: logits [N, V] or [B, C], or last hidden states [N, d]."""
    out = []
    for ids in texts:
        row = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(ids))])[None]
        if what == "hidden":
            out.append(model.base_model(inputs_embeds=row).last_hidden_state[0, len(embeds) :])
        else:
            with head_reads_text(model, len(embeds)):
                out.append(model(inputs_embeds=row).logits[0])
    return torch.stack(out) if what == "sequence" else torch.cat(out)


def stock_prefix(model: Any, keys: Tensor, values: Tensor, texts: list[list[int]], what: str, first: int) -> Tensor:
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    out = []
    try:
        for config in configs.values():
            config._attn_implementation = PLAIN
        for ids in texts:
            _prefix[:] = [keys, values, 0]
            places = first + VIRTUAL + torch.arange(len(ids))[None]
            words = model.get_input_embeddings()(torch.tensor(ids))[None]
            if what == "hidden":
                out.append(model.base_model(inputs_embeds=words, position_ids=places).last_hidden_state[0])
            else:
                out.append(model(inputs_embeds=words, position_ids=places).logits[0])
            if _prefix[2] != len(keys):
                raise RuntimeError(f"{_prefix[2]} calls of attention")
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
    return torch.stack(out) if what == "sequence" else torch.cat(out)


def ours(model: Any, prompt: Any, texts: list[list[int]], what: str) -> Tensor:
    call = {"masked": token_logits, "sequence": sequence_logits, "hidden": encoder_hidden}[what]
    with patched(model):
        return call(model, prompt, pack_rows(texts))


def check(model_type: str) -> dict[str, Any]:
    """One row of the table: the worst of the heads there are."""
    results = {head: check_head(model_type, head) for head, (names, _) in HEADS.items() if model_type in names}
    order = ["failed", "pass", "in-row", "refused", "not built"]
    worst = min(results.values(), key=lambda one: order.index(one["status"]))
    return worst if len(results) == 1 else {"status": worst["status"], "reason": worst.get("reason"), **results}


def check_head(model_type: str, head: str) -> dict[str, Any]:
    """The row of one head."""
    try:
        model = build(model_type, HEADS[head][1])
    except Exception as error:
        return {"status": "not built", "reason": brief(error)}
    texts = rows()
    try:
        generator = torch.Generator().manual_seed(2)
        width = model.get_input_embeddings().weight.shape[1]
        embeds = (0.1 * torch.randn(VIRTUAL, width, generator=generator)).requires_grad_()
        require_finite(stock_soft(model, embeds, texts, "hidden"))
    except Exception as error:
        return without_stock(model, error)
    try:
        ptengine.patch(model)
    except UnsupportedModelError as error:
        return {"status": "refused", "reason": str(error)}
    ptengine.unpatch(model)
    spec = backbone_spec(model)
    if spec.kind != "encoder":
        reason = "its tokens do not see what stands behind them; heads other than for words are read in encoders alone"
        return {"status": "refused", "reason": reason}
    result: dict[str, Any] = {"status": "pass", "prefix": "yes", "head": spec.no_head or "yes"}
    if spec.path == "in_row":
        result |= {"status": "in-row", "reason": spec.why_in_row, "pads": spec.pads}
    if spec.no_prefix is not None:
        result["prefix"] = f"refused: {spec.no_prefix}"
    what = "hidden" if spec.no_head else head
    soft = VirtualTokens(embeds)
    pair = (lambda: ours(model, soft, texts, what), lambda: stock_soft(model, embeds, texts, what))
    result["soft_logits"], result["soft_gradient"] = errors_of(pair, [embeds])
    if spec.no_prefix is None:
        keys, values = (
            torch.randn(spec.num_layers, VIRTUAL, spec.num_kv_heads, dim, generator=generator).requires_grad_()
            for dim in (spec.head_dim, spec.value_dim)
        )
        pair = (
            lambda: ours(model, KeyValuePrefix(keys, values), texts, what),
            lambda: stock_prefix(model, keys, values, texts, what, spec.first_position),
        )
        result["prefix_logits"], result["prefix_gradient"] = errors_of(pair, [keys, values])
    return judged(result)
