"""The facts of a backbone that prompts, packing and lowering need, read once from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ptengine.errors import UnsupportedModelError

__all__ = ["SUPPORTED_MODEL_TYPES", "BackboneSpec", "backbone_spec"]

SUPPORTED_MODEL_TYPES: dict[str, Literal["causal", "encoder"]] = {
    "gpt2": "causal",
    "llama": "causal",
    "qwen3": "causal",
    "bert": "encoder",
}


@dataclass(frozen=True)
class BackboneSpec:
    """What is fixed about a frozen model.

    Attributes:
        model_type: transformers' name of the architecture, for example ``"llama"``.
        kind: ``"causal"`` (virtual tokens run as a row of the batch, shared by all rows) or ``"encoder"``
            (bidirectional: virtual tokens stand in every row).
        hidden_size: d, width of the word embeddings.
        num_layers: L.
        num_kv_heads: H_kv, key and value heads (fewer than the query heads under grouped-query attention).
        num_heads: H, query heads.
        head_dim: D.
        max_positions: tokens the position embeddings reach, virtual tokens included.
        vocab_size: rows of the word embeddings.
        word_embeddings: the input embedding module.
        base_model: the model without its head.
        lm_head: the module from hidden states to vocabulary logits, or None.
    """

    model_type: str
    kind: Literal["causal", "encoder"]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int
    word_embeddings: nn.Embedding
    base_model: nn.Module
    lm_head: nn.Module | None


def backbone_spec(model: Any) -> BackboneSpec:
    """Read the facts of `model`, a transformers PreTrainedModel.

    Raises:
        UnsupportedModelError: the model type is not one of `SUPPORTED_MODEL_TYPES`; the message names it.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is None or model_type is None:
        raise UnsupportedModelError(f"expected a transformers model, got {type(model).__name__}")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: its attention layout has not been proven equal to the stock "
            f"computation; supported are {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
        )
    if getattr(config, "add_cross_attention", False) or (model_type == "bert" and getattr(config, "is_decoder", False)):
        raise UnsupportedModelError(f"model type {model_type!r} with cross-attention or as a decoder is not supported")
    if getattr(config, "use_sliding_window", False):
        raise UnsupportedModelError(f"model type {model_type!r} with sliding-window layers is not supported")
    num_heads = config.num_attention_heads
    embeddings = model.get_input_embeddings()
    output = model.get_output_embeddings()
    return BackboneSpec(
        model_type=model_type,
        kind=SUPPORTED_MODEL_TYPES[model_type],
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        max_positions=config.max_position_embeddings,
        vocab_size=embeddings.num_embeddings,
        word_embeddings=embeddings,
        base_model=model.base_model,
        lm_head=output,
    )
